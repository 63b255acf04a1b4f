"""The disk is full, over its quota, broken or read-only when a checkpoint is to be written."""

import errno
import io
import json
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import TinySettings
from cuts import in_process  # noqa: F401
from disk_shim import Shim, through
from rich.console import Console
from scorecard import Trials
from small_checkpoints import folder, made, no_waiting_for_the_disk, read_newest, run_with, same  # noqa: F401
from test_power_cut import in_a_child

from moelet import metrics, session, train
from moelet.cli import main
from moelet.console import Progress
from moelet.errors import TemporaryError, UserError
from moelet.hparams import make_hparams
from moelet.storage import saving
from moelet.storage.checkpoint import SaveError, load, save
from moelet.storage.lock import lock
from moelet.storage.manifest import checkpoint_steps, folders, make_room
from moelet.tokenizer import Tokenizer

CODES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)
WRITES = ("open", "write", "fsync", "mkdir", "rename")


def failing(code: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return fail


class Said(Progress):
    """Keeps what a run says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, *lines: str) -> None:
        self.lines += lines

    def show(self, line: str, lasting: bool) -> None:
        pass


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tries follow at once, and there is one place for what is parked."""
    monkeypatch.setattr(saving, "PAUSES", (0.0, 0.0, 0.0))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))


@pytest.mark.check(3)
@pytest.mark.usefixtures("no_waiting_for_the_disk")
def test_a_write_fails_in_a_save(trials: Trials, tmp_path: Path) -> None:
    """The checkpoints before are untouched, what was half written is removed, and the message says what is needed, what
    is free, and the last good step."""
    counted = Shim(run_with(tmp_path / "counted", 1, 2), WRITES)
    with through(counted):
        save(counted.root, made(3))
    assert counted.count > 10
    for code in CODES:
        stride = trials.count(small=5, full=1)
        for k in range(trials.random.randrange(stride) + 1, counted.count + 1, stride):
            with trials.one(f"{errno.errorcode[code]} at call {k}"):
                run = run_with(tmp_path / "run", 1, 2)
                said = ""
                with through(Shim(run, WRITES, lambda number, k=k: number == k, failing(code))):
                    try:
                        save(run, made(3))
                    except SaveError as error:
                        said = str(error)
                found, passed = read_newest(run)
                assert same(found, 3) or (same(found, 2) and said)
                assert passed == [] and {1, 2} <= set(checkpoint_steps(run))
                assert not [path for path in (run / "checkpoints").iterdir() if ".tmp" in path.name]
                if said:
                    for part in (os.strerror(code), "step 3", "it needs", "MiB are free", "step 2 is untouched"):
                        assert part in said, said
                save(run, made(3))
                assert same(read_newest(run)[0], 3)
                shutil.rmtree(run)


@pytest.fixture
def settings(tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path: Path) -> dict[str, Any]:
    tokenizer.save(tmp_path / "given.model")
    made = {"train_steps": 6, "checkpoint_steps": 2, "eval_steps": 6, "eval_tokens": 200}
    return tiny_settings(tokenizer={"file": str(tmp_path / "given.model")}, train=made)


def on_checkpoints(run: Path, code: int, steps: set[int]) -> Any:
    """Have every write to the checkpoints of these steps fail."""

    class OfSteps(Shim):
        def call(self, kind: str, path: Path, half: Any = lambda: None, *details: Any) -> None:
            if any(f"step-{step:08}" in str(path) for step in steps):
                super().call(kind, path, half, *details)

    return through(OfSteps(run, ("write",), lambda number: True, failing(code)))


@pytest.mark.check(3)
@pytest.mark.usefixtures("in_process")
def test_the_disk_is_full_for_a_while(trials: Trials, settings: dict[str, Any], tmp_path: Path) -> None:
    """Each save is tried four times, each interval warns, training goes on, and ends as if nothing had been."""
    whole = tmp_path / "whole"
    train.start(make_hparams(settings), whole, Said())
    for code in CODES[: trials.count(small=1, full=5)]:
        with trials.one(errno.errorcode[code]):
            run, said = tmp_path / f"{code}", Said()
            with on_checkpoints(run, code, {2, 4}):
                train.start(make_hparams(settings), run, said)
            warned = [line for line in said.lines if line.startswith("WARNING")]
            assert len(warned) == 2 and "step 2" in warned[0] and "step 4" in warned[1], said.lines
            assert all("Training goes on" in line and os.strerror(code) in line for line in warned)
            assert checkpoint_steps(run) == [6]
            name = "checkpoints/step-00000006/model.safetensors"
            assert (run / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.check(3)
@pytest.mark.usefixtures("in_process")
def test_a_save_fails_once(trials: Trials, settings: dict[str, Any], tmp_path: Path) -> None:
    """It is tried again, and nobody need know."""
    for k in range(1, trials.count(small=1, full=6) + 1):
        with trials.one(f"write {k}"):
            run, said = tmp_path / f"{k}", Said()
            shim = Shim(run / "checkpoints", ("write",), lambda number, k=k: number == k, failing(errno.ENOSPC))
            with through(shim):
                train.start(make_hparams(settings), run, said)
            assert shim.count > 12 and checkpoint_steps(run) == [4, 6]
            assert not [line for line in said.lines if "WARNING" in line]


@pytest.mark.check(3)
@pytest.mark.usefixtures("in_process")
def test_the_last_save_fails(trials: Trials, settings: dict[str, Any], tmp_path: Path) -> None:
    """The run ends with 75, and all of it is parked in another folder, from which it goes on."""
    for code in CODES[: trials.count(small=1, full=5)]:
        with trials.one(errno.errorcode[code]):
            run = tmp_path / f"{code}"
            with on_checkpoints(run, code, {6}), pytest.raises(TemporaryError) as caught:
                train.start(make_hparams(settings), run, Said())
            assert caught.value.exit_code == 75
            text = str(caught.value)
            (parked,) = (tmp_path / "elsewhere").glob(f"moelet-parked-{code}-*")
            assert f"parked in {parked}" in text and f"--resume {parked}" in text and "step 4 is untouched" in text
            assert checkpoint_steps(run)[-1] == 4
            assert load(parked).step == 6
            lines = [(each / "metrics.jsonl").read_text() for each in (run, parked)]
            assert lines[0] == lines[1] and len(lines[1].splitlines()) == 6
            with on_checkpoints(run, code, {6}), pytest.raises(TemporaryError, match="in place of") as again:
                train.resume(run, [], Said())  # a second time from step 4: of a run there is one parked folder
            assert str(parked) in str(again.value) and not parked.exists()
            (parked,) = (tmp_path / "elsewhere").glob(f"moelet-parked-{code}-*")
            train.resume(parked, [], Said())  # a run like any other
            with on_checkpoints(run, code, {6}), pytest.raises(TemporaryError) as again:
                train.resume(run, [], Said())
            assert "in place of" not in str(again.value) and parked.exists(), "it is somebody's by now"
            shutil.rmtree(tmp_path / "elsewhere")
            (tmp_path / "elsewhere").mkdir()


@pytest.mark.check(3)
@pytest.mark.usefixtures("in_process")
def test_a_disk_that_the_run_itself_fills(trials: Trials, settings: dict[str, Any], tmp_path: Path) -> None:
    """Its older checkpoints make room, which it says; never the best, and never the newest that is whole."""
    settings["train"] |= {"checkpoint_steps": 1, "keep_checkpoints": 9}
    for code in (errno.ENOSPC, errno.EDQUOT)[: trials.count(small=1, full=2)]:
        with trials.one(errno.errorcode[code]):
            run, said = tmp_path / f"{code}", Said()

            def is_full(number: int, run: Path = run) -> bool:
                return len(list((run / "checkpoints").glob("step-????????"))) == 3

            with through(Shim(run / "checkpoints", ("write",), is_full, failing(code))):
                train.start(make_hparams(settings), run, said)
            assert checkpoint_steps(run) == [5, 6]
            assert [line for line in said.lines if "WARNING" in line] == [
                f"WARNING: the disk is full. This run's checkpoints of steps {steps} made room."
                for steps in ("1, 2", "3, 4")
            ]
    with trials.one("what is kept"):
        run = run_with(tmp_path / "run", 1, 2, 3, 4, 5)
        (folder(run, 5) / "model.safetensors").write_bytes(b"damaged")
        run_with(tmp_path / "other", 0, run_id="f" * 16)
        folder(tmp_path / "other", 0).rename(folder(run, 0))
        assert make_room(run, 2) == [1, 3]
        assert [step for step, _ in folders(run)] == [0, 2, 4, 5]
        assert make_room(run, 2) == []


@pytest.mark.check(3)
@pytest.mark.usefixtures("in_process")
def test_the_folder_of_a_run_goes_away(
    trials: Trials, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renamed or unmounted, it is a save that fails: the run warns, goes on once it is back, or ends with 75, parked.
    In another run's at its place nothing is written: 78."""
    real = session.train_step
    trials.count(small=1, full=1)

    def started(run: Path, at: dict[int, Callable[[], Any]]) -> Said:
        def step(training: Any, batches: Any) -> Any:
            at.get(training.step, lambda: None)()
            return real(training, batches)

        said = Said()
        with monkeypatch.context() as patch:
            patch.setattr(session, "train_step", step)
            train.start(make_hparams(settings), run, said)
        return said

    run, away = tmp_path / "run", tmp_path / "away"
    with trials.one("for a while"):
        said = started(run, {3: lambda: run.rename(away), 5: lambda: away.rename(run)})
        (warning,) = [line for line in said.lines if "WARNING: the checkpoint" in line]
        assert f"step 4 can't be written: the run folder {run} can't be used" in warning
        assert checkpoint_steps(run) == [2, 6] and len((run / "metrics.jsonl").read_text().splitlines()) == 6
        shutil.rmtree(run)
    for name, replaced in (("for good", False), ("with an empty one in its place", True)):
        with trials.one(name), pytest.raises(TemporaryError, match="can't be used.* parked in") as caught:
            started(run, {3: lambda: (run.rename(away), replaced and run.mkdir())})  # noqa: B023
        assert caught.value.exit_code == 75 and checkpoint_steps(away) == [2]
        assert not run.exists() or not os.listdir(run)
        (parked,) = (tmp_path / "elsewhere").glob("moelet-parked-run-*")
        assert load(parked).step == 6
        assert [json.loads(line)["step"] for line in (parked / "metrics.jsonl").read_text().splitlines()] == [4, 5, 6]
        for path in (run, away, parked):
            shutil.rmtree(path, ignore_errors=True)
    with trials.one("with another run in its place"), ExitStack() as stack:
        with pytest.raises(UserError, match="was taken over"):
            started(run, {3: lambda: (run.rename(away), stack.enter_context(lock(run)))})
        assert os.listdir(run) == [".lock"]


@pytest.mark.check(3)
@pytest.mark.usefixtures("in_process")
def test_a_save_fails_and_the_settings_say_stop(trials: Trials, settings: dict[str, Any], tmp_path: Path) -> None:
    """The run ends with 75 at that step, parked like a last one."""
    trials.count(small=1, full=1)
    with trials.one("stop"):
        settings["train"]["on_save_failure"] = "stop"
        with on_checkpoints(tmp_path / "run", errno.ENOSPC, {4}), pytest.raises(TemporaryError, match="step 4.*parked"):
            train.start(make_hparams(settings), tmp_path / "run", Said())
        (parked,) = (tmp_path / "elsewhere").glob("moelet-parked-run-*")
        assert load(parked).step == 4 and checkpoint_steps(tmp_path / "run") == [2]


@pytest.mark.check(3)
@pytest.mark.usefixtures("in_process")
def test_a_save_fails_and_the_settings_say_pause(
    trials: Trials, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training stands still, and goes on once there is room."""
    trials.count(small=1, full=1)
    with trials.one("pause"):
        monkeypatch.setattr(saving, "PAUSED_SECONDS", 0.0)
        settings["train"]["on_save_failure"] = "pause"
        run, said = tmp_path / "run", Said()
        shim = Shim(run / "checkpoints", ("write",), lambda number: number < 12, failing(errno.ENOSPC))
        with through(shim):
            train.start(make_hparams(settings), run, said)
        assert [line for line in said.lines if "Training is paused" in line]
        assert "the checkpoint of step 2 is written; training goes on." in said.lines
        assert checkpoint_steps(run) == [4, 6]


@pytest.mark.check(3)
@pytest.mark.usefixtures("in_process")
def test_metrics_do_not_fit_on_the_disk(trials: Trials, settings: dict[str, Any], tmp_path: Path) -> None:
    """Their lines wait, are whole when they are written, and none is lost."""
    for k in range(1, trials.count(small=2, full=6) + 1):
        with trials.one(f"from write {k} on, for three"):

            class OfMetrics(Shim):
                def call(self, kind: str, path: Path, half: Any = lambda: None, *details: Any) -> None:
                    if path.name == metrics.METRICS_FILE:
                        super().call(kind, path, half, *details)

            run, said = tmp_path / f"{k}", Said()
            with through(OfMetrics(run, ("write",), lambda number, k=k: k <= number < k + 3, failing(errno.ENOSPC))):
                train.start(make_hparams(settings), run, said)
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
            assert len([line for line in said.lines if "metrics.jsonl can't be written" in line]) == 1


@pytest.mark.check(3)
@pytest.mark.usefixtures("in_process")
def test_metrics_never_fit_on_the_disk(trials: Trials, settings: dict[str, Any], tmp_path: Path) -> None:
    """The run is trained to its end and saved; with all lines it is parked in another folder, and ends with 75."""
    trials.count(small=1, full=1)
    with trials.one("from the third line on"):

        class OfMetrics(Shim):
            def call(self, kind: str, path: Path, half: Any = lambda: None, *details: Any) -> None:
                if path.name == metrics.METRICS_FILE:
                    super().call(kind, path, half, *details)

        run = tmp_path / "run"
        with through(OfMetrics(run, ("write",), lambda number: number > 2, failing(errno.ENOSPC))):
            with pytest.raises(TemporaryError, match="last lines of .*metrics.jsonl can't be written.*parked in"):
                train.start(make_hparams(settings), run, Said())
        (parked,) = (tmp_path / "elsewhere").glob("moelet-parked-run-*")
        assert checkpoint_steps(run)[-1] == 6 and load(parked).step == 6
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
        assert [json.loads(line)["step"] for line in (parked / "metrics.jsonl").read_text().splitlines()] == [
            *range(1, 7)
        ]


@pytest.mark.check(3)
def test_what_a_run_says_goes_to_a_full_disk(trials: Trials) -> None:
    """Training goes on without being heard."""
    trials.count(small=1, full=1)
    with trials.one("/dev/full"):
        full = io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True)  # type: ignore[arg-type]
        with Progress(Console(file=full)) as progress:
            progress.say("one", "two")
            progress.show("three", lasting=True)
        with pytest.raises(OSError):
            full.write("so it is full")


@pytest.mark.check(3)
def test_the_reader_of_what_a_run_says_goes_away(trials: Trials, settings: dict[str, Any], tmp_path: Path) -> None:
    """As in `moelet train ... | head`: training goes on without being heard, and the exit code is the run's."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(settings))

    def work() -> None:
        heard, says = os.pipe()
        os.close(heard)
        os.dup2(says, 1), os.dup2(says, 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
        metrics.RATE_SECONDS = 0.0
        metrics.RATE_SIZE["cpu"] = 8
        code = main(["train", str(path), "--run", str(tmp_path / "run")])
        sys.stdout.flush(), sys.stderr.flush()  # as an interpreter does at its end
        os._exit(code)

    trials.count(small=1, full=1)
    with trials.one("nobody hears it"):
        assert in_a_child(work) == 0
        assert checkpoint_steps(tmp_path / "run") == [4, 6] and (tmp_path / "run" / "report.html").exists()
    with trials.one("nobody hears that it failed"):
        assert in_a_child(work) == 78


@pytest.mark.check(3)
def test_a_real_limit_on_the_size_of_files(trials: Trials, settings: dict[str, Any], tmp_path: Path) -> None:
    """A run that can't write its optimizer's file trains to its end, says so, parks its weights and ends with 75."""
    trials.count(small=1, full=1)
    with trials.one("RLIMIT_FSIZE"):
        path, run = tmp_path / "tiny.json", tmp_path / "run"
        path.write_text(json.dumps(settings))

        def work() -> None:
            sys.stdout = sys.stderr = open(tmp_path / "said", "w", buffering=1)
            metrics.RATE_SECONDS = 0.0
            metrics.RATE_SIZE["cpu"] = 8
            resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))
            os._exit(main(["train", str(path), "--run", str(run)]))

        assert in_a_child(work) == 75
        text = (tmp_path / "said").read_text()
        assert text.count("WARNING: the checkpoint of step") == 2 and "File too large" in text
        (parked,) = (tmp_path / "elsewhere").glob("moelet-parked-run-*")
        assert f"The weights of step 6 are parked in {parked}" in text
        assert (parked / "model.safetensors").stat().st_size < 120_000
        assert not list((run / "checkpoints").iterdir())
