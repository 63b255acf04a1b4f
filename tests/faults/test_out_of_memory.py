"""Memory that runs out in the middle of training: the same step in smaller parts, or an end that loses nothing."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinySettings
from injection import SHORTAGES, infect, moelet, places, quick, run_out_of_memory, write_settings
from processes import assert_same_run, digests, newest, rows
from scorecard import Trials
from test_step import make_training, ragged_batch, relative_difference, step_and_gradients
from test_step import tokenizer as step_tokenizer  # noqa: F401  a fixture

from moelet import session
from moelet.data import Batch
from moelet.hparams import make_hparams
from moelet.shortage import within_memory
from moelet.state import Training, build
from moelet.step import forget_step
from moelet.tokenizer import Tokenizer

STEPS, WHOLE, ROWS = 8, 12, 8
SUGGESTIONS = ("--set train.checkpoint_activations=true", "where more memory is free", "start a new run with a lower")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


@pytest.fixture
def settings(tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path: Path) -> dict[str, Any]:
    tokenizer.save(tmp_path / "given.model")
    given: dict[str, Any] = tiny_settings(
        tokenizer={"file": str(tmp_path / "given.model")},
        train={
            "batch_size": ROWS, "global_batch_size": WHOLE, "train_steps": STEPS, "checkpoint_steps": 1,
            "keep_checkpoints": 99, "eval_tokens": 300,
        },
    )  # fmt: skip
    return given


def anywhere(trials: Trials, settings: dict[str, Any], fits: int, at: int) -> Any:
    """Return a fault at a place drawn by chance, forward or backward, in one of the ways memory runs out."""
    model = build(make_hparams(settings), Tokenizer.load(settings["tokenizer"]["file"])).model
    draw = trials.random
    return run_out_of_memory(draw.choice(places(model)), draw.random() < 0.5, fits, at, draw.choice(SHORTAGES))


def step_within_memory(training: Training, batch: Batch) -> tuple[list[int], Any, int | None]:
    """Return the rows of each attempt, the last one's report and gradients, and the rows that fitted."""
    tried: list[int] = []

    def attempt(parts: list[Batch]) -> Any:
        tried.append(max(len(part.labels) for part in parts))
        return step_and_gradients(training, parts)

    return tried, *within_memory(attempt, [batch], None, lambda: forget_step(training))


@pytest.mark.check(27)
def test_out_of_memory_at_any_place(
    trials: Trials,
    step_tokenizer: Tokenizer,  # noqa: F811
) -> None:
    """The step is made again from fresh gradients in smaller parts: the same rows, the same gradients to rounding."""
    draw = trials.random
    for index in range(trials.count(small=6, full=60)):
        changes = {"balance__z_loss": draw.choice([0.0, 0.1]), "train__checkpoint_activations": draw.random() < 0.3}
        wide = draw.random() < 0.5
        fits, place = draw.choice([1, 2, 3, 5]), draw.choice(places(make_training(step_tokenizer).model))
        fault = run_out_of_memory(place, draw.random() < 0.5, fits, 0, draw.choice(SHORTAGES))
        batch = ragged_batch(step_tokenizer, [8, 7, 6][index % 3])
        with trials.one(f"{index}: {place}, {fits} rows fit"):
            whole, training = (make_training(step_tokenizer, **changes) for _ in range(2))
            if wide:
                whole.model.double(), training.model.double()
            fault(training)
            report, expected = step_and_gradients(whole, [batch])
            tried, (parts, actual), rows_at_once = step_within_memory(training, batch)
            assert rows_at_once is not None and rows_at_once <= fits < tried[-2]
            halves = [[8, 4, 2, 1], [7, 4, 2, 1], [6, 3, 2, 1]][index % 3]
            assert tried == halves[: len(tried)], "halved each time"
            assert relative_difference(actual, expected) < (1e-12 if wide else 1e-6)
            assert parts.loss == pytest.approx(report.loss, rel=1e-6)
            assert parts.tokens == report.tokens


@pytest.mark.check(27)
def test_out_of_memory_from_some_step_on(
    trials: Trials,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """The run goes on, to the last bit the one with a batch size set smaller at that step; also if resumed later."""
    given = write_settings(tmp_path / "given.json", settings)
    for index in range(trials.count(small=1, full=20)):
        at, fits = trials.random.randrange(1, STEPS - 2), trials.random.choice([4, 7, 2])
        small = 4 if fits >= 4 else 2
        fault = anywhere(trials, settings, fits, at)
        run, other = (tmp_path / f"{name}-{index}" for name in ("run", "other"))
        with trials.one(f"{index}: {fits} rows fit from step {at + 1} on"):
            with monkeypatch.context() as patch:
                infect(patch, fault)
                done = moelet(capsys, "train", given, "--run", run)
            assert done.code == 0, done.text
            assert f"memory ran out at step {at + 1}" in done.text and f"{small} rows a micro-step" in done.text
            assert [row.get("micro_rows") for row in rows(run)] == [None] * at + [small] * (STEPS - at)
            stop_at(monkeypatch, capsys, given, other, at)
            resumed = moelet(capsys, "train", "--resume", other, "--set", f"train.batch_size={small}")
            assert resumed.code == 0, resumed.text
            assert digests(run) == digests(other)
            for step in (at, *range(at + 2, STEPS + 1)):
                (run / "checkpoints" / f"step-{step:08}").rename(tmp_path / f"gone-{index}-{step}")
            expected = digests(other)
            resumed = moelet(capsys, "train", "--resume", run)  # nothing is wrong with memory any more
            assert resumed.code == 0 and digests(run) == expected, "the cut is part of the run"


def stop_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: Path, run: Path, at: int
) -> None:
    """Train up to step `at`, and be interrupted."""
    real = session.train_step

    def dying(training: Any, batches: Any) -> Any:
        if training.step == at:
            raise KeyboardInterrupt
        return real(training, batches)

    with monkeypatch.context() as patch:
        patch.setattr(session, "train_step", dying)
        moelet(capsys, "train", given, "--run", run)


@pytest.mark.check(27)
def test_out_of_memory_with_a_single_row(
    trials: Trials,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Exit code 78, with the peak and three ways on; all is saved, and resumed with more memory it ends as usual."""
    settings["train"]["checkpoint_steps"] = None
    given = write_settings(tmp_path / "given.json", settings)
    assert moelet(capsys, "train", given, "--run", tmp_path / "whole").code == 0
    for index in range(trials.count(small=1, full=20)):
        at, run = trials.random.randrange(1, STEPS), tmp_path / f"run-{index}"
        fault = anywhere(trials, settings, 0, at)
        with trials.one(f"{index}: at step {at + 1}"):
            with monkeypatch.context() as patch:
                infect(patch, fault)
                ended = moelet(capsys, "train", given, "--run", run)
            assert ended.code == 78, ended.text
            assert all(suggestion in ended.text for suggestion in SUGGESTIONS), ended.text
            assert re.search(rf"at step {at + 1}; peak \d+ MiB; saved are all steps up to {at}\b", ended.text)
            assert newest(run).name == f"step-{at:08}"
            assert moelet(capsys, "train", "--resume", run).code == 0
            assert_same_run(run, tmp_path / "whole")


def break_the_optimizer(at: int, raise_it: Callable[[], None], calls: list[int], training: Training) -> None:
    real = training.optimizer.step

    def half_a_step() -> None:
        calls.append(training.step)
        if training.step == at:
            with torch.no_grad():
                training.model.norm.weight += 1.0
            raise_it()
        real()

    training.optimizer.step = half_a_step  # type: ignore[method-assign]


@pytest.mark.check(27)
def test_out_of_memory_in_the_optimizer(
    trials: Trials,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Exit code 78: weights that may be half changed are never saved, and the step is not made twice."""
    given = write_settings(tmp_path / "given.json", settings)
    for index in range(trials.count(small=1, full=6)):
        at, run, raise_it = trials.random.randrange(1, STEPS), tmp_path / f"run-{index}", SHORTAGES[index % 3]
        calls: list[int] = []
        with trials.one(f"{index}: at step {at + 1}"):
            with monkeypatch.context() as patch:
                infect(patch, partial(break_the_optimizer, at, raise_it, calls))
                ended = moelet(capsys, "train", given, "--run", run)
            assert ended.code == 78 and "memory ran out in the optimizer" in ended.text
            assert newest(run).name == f"step-{at:08}" and calls.count(at) == 1


def break_evaluations(fits: int, raise_it: Callable[[], None], training: Training) -> None:
    def hook(module: Any, given: Any) -> None:
        if not module.training and len(given[0]) > fits:
            raise_it()

    training.model.register_forward_pre_hook(hook)


@pytest.mark.check(27)
def test_out_of_memory_in_an_evaluation(
    trials: Trials,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """It is made in smaller parts, with the same result to rounding; training is not touched."""
    given = write_settings(tmp_path / "given.json", settings)
    assert moelet(capsys, "train", given, "--run", tmp_path / "whole").code == 0
    for index in range(trials.count(small=1, full=6)):
        run, raise_it, fits = tmp_path / f"run-{index}", SHORTAGES[index % 3], trials.random.choice([1, 3])

        with trials.one(f"{index}: {fits} rows fit"):
            with monkeypatch.context() as patch:
                infect(patch, partial(break_evaluations, fits, raise_it))
                ended = moelet(capsys, "train", given, "--run", run)
            assert ended.code == 0, ended.text
            assert digests(run) == digests(tmp_path / "whole")
            found, expected = rows(run)[-1], rows(tmp_path / "whole")[-1]
            assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)
            assert "micro_rows" not in found
