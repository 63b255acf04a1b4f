"""Two processes on one run folder, a holder that died, one on another host, a lock file that somebody removed."""

import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TinySettings
from paused import ROOT, Place, Runs
from processes import digests, last_step
from scorecard import Trials

from moelet.errors import UserError
from moelet.storage import lock as locks
from moelet.storage.lock import DEAD_AFTER, LOCK, lock
from moelet.storage.manifest import newest
from moelet.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    found = Runs(tmp_path_factory.mktemp("runs"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def settings(tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    tokenizer.save(folder / "given.model")
    saving = {"train_steps": 4, "checkpoint_steps": 1, "eval_tokens": 200}
    path = folder / "settings.json"
    path.write_text(json.dumps(tiny_settings(tokenizer={"file": str(folder / "given.model")}, train=saving)))
    return path


@pytest.mark.check(6)
def test_two_runs_start_in_one_folder(trials: Trials, runs: Runs, settings: Path, tmp_path: Path) -> None:
    """One trains; the other ends with 78 within two seconds and says which process has the folder, where and since
    when."""
    expected = None
    for index in range(trials.count(small=2, full=100)):
        with trials.one(f"race {index}"):
            run = tmp_path / f"{index}"
            command: list[object] = ["train", settings, "--resume" if index % 3 == 2 else "--run", run]
            started = runs.start(command, command, place=Place("step"))  # the winner trains when the other is gone
            loser, code, seconds = runs.wait()
            said = runs.said()
            runs.go.touch()
            last = runs.wait()[1]  # before anything is asserted: a lost race must not disturb the next
            (winner,) = set(started) - {loser}
            assert code == 78, said
            assert f"in use by process {winner} on {socket.gethostname()} since 20" in said, said
            assert seconds < (2 if trials.full else 10), "a busy machine takes its time"
            assert last == 0, runs.said()
            assert newest(run) == (4, [])
            expected = expected or digests(run)
            assert digests(run) == expected


@pytest.mark.check(6)
def test_a_second_command_is_refused_before_torch_is_loaded(trials: Trials, settings: Path, tmp_path: Path) -> None:
    """It is a matter of a fraction of a second, not of what it takes to be able to train."""
    trials.count(small=1, full=1)
    code = "import sys; from moelet.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    with trials.one("train"), lock(tmp_path / "run"):
        command = [sys.executable, "-c", code, "train", str(settings), "--run", str(tmp_path / "run")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.stdout == "78 False\n" and f"process {os.getpid()} on" in done.stderr, done.stderr


def hold(folder: Path, told: object) -> None:
    with lock(folder):
        told.set()  # type: ignore[attr-defined]
        time.sleep(60)


@pytest.mark.check(6)
def test_the_process_that_had_the_folder_died(trials: Trials, tmp_path: Path) -> None:
    """Its lock is free at once, whatever its file says."""
    context = multiprocessing.get_context("fork")
    for index in range(trials.count(small=3, full=20)):
        with trials.one(f"death {index}"):
            folder, told = tmp_path / f"{index}", context.Event()
            holder = context.Process(target=hold, args=(folder, told))
            holder.start()
            assert told.wait(30)
            with pytest.raises(UserError, match=f"in use by process {holder.pid} on"), lock(folder):
                pass
            assert holder.pid is not None
            if index % 2:  # neither does a process that stands still lose it
                os.kill(holder.pid, signal.SIGSTOP)
                with pytest.raises(UserError, match="in use by"), lock(folder):
                    pass
            holder.kill()
            holder.join()
            assert str(holder.pid) in (folder / LOCK).read_text()
            with lock(folder) as held:
                held.check()
                assert str(os.getpid()) in (folder / LOCK).read_text()
            assert (folder / LOCK).read_text() == "", "who ends properly leaves no name"


@pytest.mark.check(6)
def test_another_host_has_the_folder(trials: Trials, tmp_path: Path) -> None:
    """Where locks don't reach other hosts, the file's signs of life tell: fresh ones count, old ones don't."""
    ages = [0.0, 0.5 * DEAD_AFTER, 1.5 * DEAD_AFTER, 86_400.0, -86_400.0]
    for age in ages:
        with trials.one(f"a sign of life {age:g} s ago"):
            folder = tmp_path / f"{age}"
            folder.mkdir()
            (folder / LOCK).write_text("process 7 on elsewhere since 2026-01-31 12:00:00 +0000\n0123\n")
            when = time.time() - age
            os.utime(folder / LOCK, (when, when))
            if abs(age) < DEAD_AFTER:
                with pytest.raises(UserError, match="process 7 on elsewhere since 2026-01-31 12:00:00"), lock(folder):
                    pass
            else:
                with lock(folder) as held:
                    held.check()


@pytest.mark.check(6)
def test_a_folder_on_a_drive_without_locks(trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life stand in for the lock: a live holder is respected, a dead one is not."""
    context = multiprocessing.get_context("fork")

    def no_locks(*given: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr("fcntl.flock", no_locks)
    for index in range(trials.count(small=1, full=5)):
        with trials.one(f"drive {index}"):
            folder, told = tmp_path / f"{index}", context.Event()
            holder = context.Process(target=hold, args=(folder, told))
            holder.start()
            assert told.wait(30)
            with pytest.raises(UserError, match=f"in use by process {holder.pid} on"), lock(folder):
                pass
            holder.kill()
            holder.join()
            with lock(folder) as held:
                held.check()


@pytest.mark.check(6)
def test_the_holder_gives_signs_of_life(trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a process has the folder, its lock file never looks old."""
    trials.count(small=1, full=1)
    monkeypatch.setattr(locks, "BEAT", 0.02)
    with trials.one("beats"), lock(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        limit = time.monotonic() + 20
        while os.stat(tmp_path / LOCK).st_mtime < time.time() - DEAD_AFTER:
            assert time.monotonic() < limit
            time.sleep(0.01)


@pytest.mark.check(6)
def test_somebody_removes_the_lock_file(trials: Trials, runs: Runs, settings: Path, tmp_path: Path) -> None:
    """A second run gets in; the first sees it before it writes a checkpoint, ends with 78, and leaves everything to the
    second."""
    trials.count(small=1, full=1)
    with trials.one("removed"):
        run = tmp_path / "run"
        (first,) = runs.start(["train", settings, "--run", run], place=Place("step", 3))
        runs.come_to()
        assert last_step(run) == 2
        (run / LOCK).unlink()
        with lock(run):
            before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
            runs.go.touch()
            process, code, _ = runs.wait()
            assert (process, code) == (first, 78), runs.said()
            assert f"was taken over by process {os.getpid()} on" in runs.said()
            assert {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")} == before
        runs.run("train", "--resume", run)
        assert newest(run) == (4, [])
    with trials.one("removed, and nobody came"):
        run = tmp_path / "alone"
        runs.start(["train", settings, "--run", run], place=Place("step", 3))
        runs.come_to()
        (run / LOCK).unlink()
        runs.go.touch()
        assert runs.wait()[1] == 0, runs.said()
        assert newest(run) == (4, [])
