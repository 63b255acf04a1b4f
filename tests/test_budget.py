"""Time budgets: durations, the steps that fit, and whole runs that end in time with their schedule."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TinySettings

from moelet import budget, metrics, session, train
from moelet.budget import Clock, Pace, parse_duration
from moelet.console import Progress
from moelet.errors import UserError
from moelet.hparams import make_hparams
from moelet.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("text", "seconds"), [("5h", 18000), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("1.5h", 5400), ("2d1s", 172801)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "h", "5 h", "-5h", "5x", "1h30", "0s", "nan", "1e3s"])
def test_what_is_no_duration_is_explained(text: str) -> None:
    with pytest.raises(UserError, match="5h, 90m or 1h30m"):
        parse_duration(text)


class Time:
    """A clock that tests set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.seconds)


def seconds_of(steps: int, extras: Any) -> float:
    """Return what `steps` steps after the fourth take, of 2 s each and the extras that are due: one by one."""
    last = 4 + steps
    due = (
        (cost, step)
        for step in range(5, last + 1)
        for cost, every in extras
        if step == last or (every and step % every == 0)
    )
    return 2 * steps + sum(cost for cost, _ in due)


def test_the_steps_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Time(monkeypatch)
    pace = Pace(Clock(50.0, 990.0), 1000.0, evaluation=4.0)  # 60 of 1000 s are gone
    assert not pace.is_due(None)
    for seconds in (30.0, 2.0, 2.0, 2.0):  # the first doesn't count
        assert not pace.is_due(None), "not before the calibration is over"
        now.seconds += seconds
        pace.note_step(seconds)
    assert pace.is_due(None) and not pace.is_due(None)
    left = 1000 * (1 - budget.MARGIN) - 96 - budget.REPORT_SECONDS
    assert pace.steps_left(4, None, None) == int((left - 8) / 2)
    pace.costs = {"evaluation": 20.0, "checkpoint": 5.0}
    for eval_steps, checkpoint_steps in [(10, 100), (7, None), (None, 3), (1, 1), (1000, 1000)]:
        found = pace.steps_left(4, eval_steps, checkpoint_steps)
        costs = [seconds_of(steps, ((20, eval_steps), (5, checkpoint_steps))) for steps in (found, found + 1)]
        assert costs[0] <= left < costs[1]
    now.seconds += 2000
    assert pace.is_due(None) and pace.steps_left(4, None, None) == 1, "late, it still ends with a step at min_lr"


def test_the_plan_is_looked_at_when_half_of_the_rest_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Time(monkeypatch)
    pace = Pace(Clock(0.0, 1000.0), 1000.0, evaluation=1.0)
    looks = []
    while now.seconds < 2000:
        now.seconds += 1
        pace.note_step(1.0)
        if pace.is_due(None):
            looks.append(now.seconds - 1000)
    assert looks[0] == budget.CALIBRATION_SHARE * 1000
    assert looks[1] == pytest.approx(looks[0] + (1000 - looks[0]) / 2, abs=1) and 8 <= len(looks) <= 14


# whole runs, on a machine whose speed the test sets


class Machine:
    """Steps and evaluations take as long as the test says, without anybody waiting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: float, evaluation: float) -> None:
        self.step, self.evaluation, self.seconds = step, evaluation, 0.0
        for name in ("monotonic", "perf_counter"):
            monkeypatch.setattr(time, name, lambda: self.seconds)
        real_step, real_evaluate = session.train_step, session.evaluate

        def train_step(*given: Any) -> Any:
            self.seconds += self.step
            return real_step(*given)

        def evaluate(*given: Any) -> Any:
            self.seconds += self.evaluation
            return real_evaluate(*given)

        monkeypatch.setattr(session, "train_step", train_step)
        monkeypatch.setattr(session, "evaluate", evaluate)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(train, "matrix_rate", lambda device, dtype: 1e12)
    monkeypatch.setattr(metrics, "RATE_SECONDS", 0.0)
    return Machine(monkeypatch, 2.0, 8.0)  # an evaluation of 250 tokens, at 32 a step, is guessed to take 8 s


@pytest.fixture
def settings(tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path: Path) -> dict[str, Any]:
    tokenizer.save(tmp_path / "given.model")
    length = {"train_steps": None, "time_budget": 180.0, "eval_steps": 25, "checkpoint_steps": 5, "batch_size": 1}
    length["eval_tokens"] = 250
    optim = {"warmup_steps": 1000, "schedule": "cosine"}
    return tiny_settings(
        tokenizer={"file": str(tmp_path / "given.model")}, data={"piece_chars": 300}, train=length, optim=optim
    )


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_ends_in_time(run: Path, machine: Machine, lowest: float = 0.001) -> None:
    last = rows(run)[-1]
    assert 150 <= machine.seconds + budget.REPORT_SECONDS <= 180, machine.seconds
    assert last["lr"] == lowest and last["step"] == last["total_steps"] and "val_loss" in last
    assert max(row["lr"] for row in rows(run)) == 0.01, "the warm-up ended"


def test_a_run_ends_in_time_with_its_schedule(machine: Machine, settings: dict[str, Any], tmp_path: Path) -> None:
    train.start(make_hparams(settings), tmp_path / "run", Progress(), 0.0)
    assert_ends_in_time(tmp_path / "run", machine)
    totals = [row["total_steps"] for row in rows(tmp_path / "run")]
    assert totals[0] is None and len(set(totals)) <= 3, "one plan, and little to mend on a steady machine"


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_a_machine_that_turns_slow_or_fast_still_ends_in_time(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, settings: dict[str, Any], tmp_path: Path, factor: float
) -> None:
    inner = session.train_step

    def changing(training: Any, batches: Any) -> Any:
        machine.step = 2.0 if training.step < 25 else 2.0 * factor
        return inner(training, batches)

    monkeypatch.setattr(session, "train_step", changing)
    train.start(make_hparams(settings), tmp_path / "run", Progress(), 0.0)
    assert_ends_in_time(tmp_path / "run", machine)


@pytest.mark.parametrize("budget_seconds", [0.5, 7.0])
def test_a_time_too_short_still_ends_and_at_min_lr(
    machine: Machine, settings: dict[str, Any], tmp_path: Path, budget_seconds: float
) -> None:
    settings["train"]["time_budget"] = budget_seconds
    machine.seconds = 30.0  # the start took longer than there is
    train.start(make_hparams(settings), tmp_path / "run", Progress(), 0.0)
    last = rows(tmp_path / "run")[-1]
    assert last["step"] == last["total_steps"] <= 6 and last["lr"] == 0.001 and "val_loss" in last


def test_slow_first_steps_do_not_end_the_run_early(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, settings: dict[str, Any], tmp_path: Path
) -> None:
    """The first plan is far too short; it is looked at again before it is over."""
    inner = session.train_step

    def warming(training: Any, batches: Any) -> Any:
        machine.step = 6.0 if training.step < 5 else 0.4
        return inner(training, batches)

    monkeypatch.setattr(session, "train_step", warming)
    machine.evaluation = 2.0
    train.start(make_hparams(settings), tmp_path / "run", Progress(), 0.0)
    assert_ends_in_time(tmp_path / "run", machine)


def test_a_machine_that_stalls_at_the_end_does_not_go_on_for_ever(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, settings: dict[str, Any], tmp_path: Path
) -> None:
    inner = session.train_step

    def stalling(training: Any, batches: Any) -> Any:
        machine.step = 50.0 if training.step == 60 else 2.0
        return inner(training, batches)

    monkeypatch.setattr(session, "train_step", stalling)
    train.start(make_hparams(settings), tmp_path / "run", Progress(), 0.0)
    last = rows(tmp_path / "run")[-1]
    assert last["step"] == last["total_steps"] <= 65 and last["lr"] == 0.001


class Killed(BaseException):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int, work: Any) -> None:
    inner = session.train_step

    def dying(training: Any, batches: Any) -> Any:
        if training.step == step:
            raise Killed
        return inner(training, batches)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(session, "train_step", dying)
        work()


@pytest.mark.parametrize("step", [2, 33, 52])
def test_a_budget_cut_in_two_by_a_kill(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, settings: dict[str, Any], tmp_path: Path, step: int
) -> None:
    """The time of steps that the kill lost counts, too: the run ends when it was to end."""
    run = tmp_path / "run"
    kill_at(monkeypatch, step, lambda: train.start(make_hparams(settings), run, Progress(), 0.0))
    killed_at = machine.seconds
    machine.seconds += 5000  # switched off; this time is nobody's
    began = machine.seconds
    machine.seconds += 5  # to start up again
    train.resume(run, [], Progress(), began)
    machine.seconds -= 5000
    assert killed_at > (40 if step > 2 else 0)
    assert_ends_in_time(run, machine)


def test_a_run_resumed_inside_a_shorter_time_ends_then(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, settings: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings["train"] |= {"time_budget": None, "train_steps": 5000}  # never meant to have a budget
    settings["optim"]["warmup_steps"] = 20
    kill_at(monkeypatch, 33, lambda: train.start(make_hparams(settings), run, Progress(), 0.0))
    began = machine.seconds
    train.resume(run, [], Progress(), began, seconds=60.0)
    assert 50 <= machine.seconds - began + budget.REPORT_SECONDS <= 60
    last = rows(run)[-1]
    assert last["lr"] == 0.001 and last["step"] == last["total_steps"] < 80
    saved = json.loads((run / "hparams.json").read_text())["train"]
    assert saved["time_budget"] > 60 and saved["train_steps"] is None


def test_other_lengths_still_make_another_run(machine: Machine, settings: dict[str, Any], tmp_path: Path) -> None:
    settings["train"] |= {"time_budget": None, "train_steps": 4}
    train.start(make_hparams(settings), tmp_path / "run", Progress(), 0.0)
    with pytest.raises(UserError, match="train_steps: the run has 4, given is 8"):
        train.resume(tmp_path / "run", ["train.train_steps=8"], Progress(), 0.0)
