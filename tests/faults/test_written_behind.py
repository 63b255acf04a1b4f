"""Checkpoints that are written while training goes on: nothing is waited for, nothing that fails is missed."""

import errno
import json
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TinySettings
from cuts import in_process  # noqa: F401
from paused import Place, Runs
from processes import assert_same_run, last_step
from scorecard import Trials
from test_disk_full import CODES, Said, on_checkpoints

from moelet import session, train
from moelet.errors import Interrupted, TemporaryError
from moelet.hparams import make_hparams
from moelet.storage import checkpoint, saving
from moelet.storage.manifest import checkpoint_steps, newest
from moelet.tokenizer import Tokenizer

PLACES = [Place("half of a file", 5), Place("before reading back", 1), Place("before the name", 1)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    found = Runs(tmp_path_factory.mktemp("runs"), waiting="nothing")
    yield found
    found.close()


@pytest.fixture
def settings(tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path: Path) -> dict[str, Any]:
    tokenizer.save(tmp_path / "given.model")
    made = {"train_steps": 9, "checkpoint_steps": 4, "eval_steps": 9, "eval_tokens": 200, "log_steps": 1}
    return tiny_settings(tokenizer={"file": str(tmp_path / "given.model")}, train=made)


@pytest.fixture
def whole(settings: dict[str, Any], tmp_path: Path) -> Path:
    """The same run, whose checkpoints were waited for."""
    run = tmp_path / "whole"
    train.start(make_hparams(settings), run, Said())
    return run


@pytest.fixture
def as_on_gpus(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "WAITING", ())


@pytest.mark.check(3)
@pytest.mark.usefixtures("in_process", "as_on_gpus")
def test_training_goes_on_meanwhile(
    trials: Trials, settings: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are made while a file is written, and the checkpoint is of the step at which it was begun."""
    going_on, steps = threading.Event(), session.train_step
    write, waited = checkpoint.write_synced, []

    def step(training: Any, batches: Any) -> Any:
        report = steps(training, batches)
        if training.step == 7:  # three steps behind the checkpoint of step 4
            going_on.set()
        return report

    def slow(path: Path, data: bytes) -> None:
        if "step-00000004.tmp" in str(path) and path.name == "model.safetensors":
            waited.append(going_on.wait(60))
        write(path, data)

    trials.count(small=1, full=1)
    with trials.one("a slow disk"):
        monkeypatch.setattr(session, "train_step", step)
        monkeypatch.setattr(checkpoint, "write_synced", slow)
        train.start(make_hparams(settings), tmp_path / "run", Said())
        assert waited == [True]
        assert checkpoint_steps(tmp_path / "run") == checkpoint_steps(whole) == [8, 9]
        assert_same_run(tmp_path / "run", whole)


@pytest.mark.check(3)
@pytest.mark.usefixtures("in_process", "as_on_gpus")
def test_a_failure_is_noticed(
    trials: Trials, settings: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said, and the run as it is by then is saved at once; what else fails then, fails as ever."""
    monkeypatch.setattr(saving, "PAUSES", (0.0, 0.0, 0.0))
    for code in CODES[: trials.count(small=1, full=5)]:
        with trials.one(errno.errorcode[code]):
            run, said = tmp_path / f"{code}", Said()
            with on_checkpoints(run, code, {4}):
                train.start(make_hparams(settings), run, said)
            (warning,) = [line for line in said.lines if "WARNING" in line]
            assert "checkpoint of step 4" in warning and "while training went on" in warning, said.lines
            assert checkpoint_steps(run) == [8, 9] and (run / "checkpoints").exists()
            assert_same_run(run, whole)


@pytest.mark.check(3)
@pytest.mark.usefixtures("in_process", "as_on_gpus")
def test_a_failure_is_made_good(trials: Trials, settings: dict[str, Any], tmp_path: Path) -> None:
    """Not at the next checkpoint that is due, but at the step at which it is noticed."""
    settings["train"] |= {"keep_checkpoints": 9, "checkpoint_steps": 6}
    trials.count(small=1, full=1)
    with trials.one("one save"), on_checkpoints(tmp_path / "run", errno.ENOSPC, {6}):
        train.start(make_hparams(settings), tmp_path / "run", Said())
    made = checkpoint_steps(tmp_path / "run")
    assert made[-1] == 9 and any(step in (7, 8) for step in made), made


@pytest.mark.check(3)
@pytest.mark.usefixtures("in_process", "as_on_gpus")
def test_the_last_one_fails(
    trials: Trials, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal asks to stop at the very step whose checkpoint is being written: it counts once it is there."""
    monkeypatch.setattr(saving, "PAUSES", (0.0, 0.0, 0.0))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    begin = session.Session.save_behind

    def begin_and_stop(self: session.Session) -> None:
        begin(self)
        self.asked.signals.append(signal.SIGTERM)

    monkeypatch.setattr(session.Session, "save_behind", begin_and_stop)
    trials.count(small=1, full=1)
    with trials.one("full"), on_checkpoints(tmp_path / "full", errno.ENOSPC, {4}):
        with pytest.raises(TemporaryError, match="can't be written.* parked in"):
            train.start(make_hparams(settings), tmp_path / "full", Said())
    with trials.one("slow"):
        with pytest.raises(Interrupted, match="saved at step 4"):
            train.start(make_hparams(settings), tmp_path / "slow", Said())
        assert checkpoint_steps(tmp_path / "slow") == [4]


@pytest.mark.check(1)
def test_killed_meanwhile(trials: Trials, runs: Runs, settings: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    """What is half written doesn't count; the run goes on from the checkpoint before and ends the same."""
    path = tmp_path / "settings.json"
    settings["train"]["checkpoint_steps"] = 2
    path.write_text(json.dumps(settings))
    for place in PLACES[: trials.count(small=1, full=3)]:
        with trials.one(str(place)):
            run = tmp_path / place.name
            (process,) = runs.start(["train", path, "--run", run], place=place)
            runs.come_to()
            runs.send(process, signal.SIGKILL)
            runs.wait()
            step, passed = newest(run)
            assert passed == [] and last_step(run) - (step or 0) <= 4  # two intervals: one is being written
            runs.run("train", "--resume", run)
            assert_same_run(run, whole)
            assert not [path for path in (run / "checkpoints").iterdir() if ".tmp" in path.name], "not swept"
