"""Checkpoints of a few hundred bytes, each step's different, for tests that make thousands of them."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from moelet.storage import checkpoint
from moelet.storage.checkpoint import Checkpoint, read_newest, save

RUN = "0123456789abcdef"  # the id of the run that is tested


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def made(step: int, run_id: str = RUN) -> Checkpoint:
    draw = torch.Generator().manual_seed(step)
    tensors = {"w": torch.randn(4, 5, generator=draw), "b": torch.randn(3, generator=draw)}
    return Checkpoint(step, tensors, {"w:exp_avg": tensors["w"] * 2}, {"step": step}, {"settings": "a" * 64}, run_id)


def run_with(run: Path, *steps: int, run_id: str = RUN) -> Path:
    """Return a run folder with checkpoints of these steps."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "run_id").write_text(run_id)
    for step in steps:
        save(run, made(step, run_id))
    return run


def same(found: Checkpoint | None, step: int) -> bool:
    """Return whether what was read is, to the last bit, what was saved at that step."""
    expected = made(step)
    if found is None or (found.step, found.state, found.run_id) != (step, expected.state, RUN):
        return False
    pairs: list[tuple[Any, Any]] = [(found.model, expected.model), (found.optimizer, expected.optimizer)]
    return all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one) for one, other in pairs
    )


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08}"


__all__ = ["RUN", "checkpoint", "folder", "made", "no_waiting_for_the_disk", "read_newest", "run_with", "same"]
