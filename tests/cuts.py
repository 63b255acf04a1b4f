"""Runs inside the test's own process, cut where a test wants: cheap enough for hundreds of them."""

import gc
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from moelet import metrics, session, train
from moelet.console import Progress
from moelet.hparams import make_hparams


class Killed(BaseException):
    pass


class Step(NamedTuple):
    """What a step was made of and what came of it, to the last bit."""

    number: int
    batches: str  # SHA-256 of all ids, labels and segments
    loss: str
    lr: str
    grad_norm: str
    balance: str
    skipped: bool


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured, and nothing synced."""
    gc.freeze()  # half a second for each collection else, of torch's modules
    monkeypatch.setattr(metrics, "RATE_SECONDS", 0.0)
    monkeypatch.setitem(metrics.RATE_SIZE, "cpu", 8)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def digest_of(batches: Any) -> str:
    found = hashlib.sha256()
    for tensor in (part for batch in batches for part in batch):
        found.update(b"none" if tensor is None else tensor.to(torch.int64).numpy().tobytes())
    return found.hexdigest()


def train_until(
    monkeypatch: pytest.MonkeyPatch,
    run: Path,
    settings: dict[str, Any] | None,
    step: int | None,
    steps: list[Step] | None = None,
    **resume: Any,
) -> None:
    """Start a run (or resume it: settings None) and let it die when `step` steps are made; None: not at all. What
    each step was is added to `steps`."""
    real = session.train_step

    def dying(training: Any, batches: Any) -> Any:
        if training.step == step:
            raise Killed
        report = real(training, batches)
        if steps is not None:
            numbers = (report.loss, report.lr, report.grad_norm, report.balance_loss or 0.0)
            steps.append(Step(training.step, digest_of(batches), *map(float.hex, numbers), report.skipped))
        return report

    with monkeypatch.context() as patch:
        patch.setattr(session, "train_step", dying)
        try:
            if settings is None:
                train.resume(run, resume.pop("changes", []), Progress(), **resume)
            else:
                train.start(make_hparams(settings), run, Progress())
        except Killed:
            return
    assert step is None, f"step {step} never came"


def files_of(run: Path) -> Iterator[tuple[str, str]]:
    """Yield the names and digests of all files of a run's folder but its lock."""
    for path in sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock"):
        yield str(path.relative_to(run)), hashlib.sha256(path.read_bytes()).hexdigest()
