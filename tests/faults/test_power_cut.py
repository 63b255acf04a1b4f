"""The process dies, or the power fails, at any single call that changes the disk while a checkpoint is made."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from disk_shim import Recorder, Shim, rebuild, through
from scorecard import Trials
from small_checkpoints import RUN, folder, made, no_waiting_for_the_disk, read_newest, run_with, same  # noqa: F401

from moelet.storage.checkpoint import save
from moelet.storage.disk import write_file
from moelet.storage.lock import lock
from moelet.storage.manifest import retain

KILLED = 137
WAYS = ("nothing", "empty", "half", "all", "mix", "mix")


def nothing_yet(run: Path) -> list[int]:
    return []


def two_before(run: Path) -> list[int]:
    run_with(run, 1, 2)
    return [2]


def a_damaged_later_one(run: Path) -> list[int]:
    """As after a fallback: step 4 was passed over, and the run comes to step 3."""
    run_with(run, 1, 2, 4)
    os.truncate(folder(run, 4) / "optimizer.safetensors", 7)
    return [2]


def damaged_at_the_same_step(run: Path) -> list[int]:
    run_with(run, 1, 2, 3)
    os.truncate(folder(run, 3) / "model.safetensors", 7)
    return [2]


def another_runs_at_the_same_step(run: Path) -> list[int]:
    run_with(run, 3, run_id="another")
    run_with(run, 1, 2)
    return [2]


BEFORE = (nothing_yet, two_before, a_damaged_later_one, damaged_at_the_same_step, another_runs_at_the_same_step)


def save_and_retain(run: Path, saved: Callable[[], None] = lambda: None) -> None:
    """What a run does at an interval, from taking the folder on."""
    with lock(run):
        if not (run / "run_id").exists():
            write_file(run / "run_id", RUN.encode())
        save(run, made(3))
        saved()
        retain(run, 1, None, good=3)


def in_a_child(work: Callable[[], None]) -> int:
    """Do something in a forked process; return its exit code."""
    process = os.fork()
    if process == 0:
        torch.set_num_threads(1)  # OpenMP's other threads are not forked: waiting for them would never end
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.check(2)
@pytest.mark.usefixtures("no_waiting_for_the_disk")
@pytest.mark.parametrize("before", BEFORE)
def test_killed_at_any_call(trials: Trials, tmp_path: Path, before: Callable[[Path], list[int]]) -> None:
    """The checkpoint before or the new one is there, whole; the next save sweeps up what is left."""
    counted = Shim(tmp_path / "counted")
    expected = before(tmp_path / "counted")
    with through(counted):
        save_and_retain(tmp_path / "counted")
    assert counted.count > 20
    step = trials.count(small=9, full=1)
    for k in range(trials.random.randrange(step) + 1, counted.count + 1, step):
        with trials.one(f"{before.__name__}, call {k}"):
            run = tmp_path / f"{k}"
            before(run)

            def work(run: Path = run, k: int = k) -> None:
                with through(Shim(run, at=lambda number: number == k, act=lambda: os._exit(KILLED))):
                    save_and_retain(run)

            assert in_a_child(work) == KILLED
            found, _ = read_newest(run) if run.exists() else (None, [])
            reached = None if found is None else found.step
            assert reached in (*(expected or [None]), 3), reached
            assert found is None or same(found, found.step)
            save_and_retain(run)
            assert same(read_newest(run)[0], 3)
            left = {path.name for path in (run / "checkpoints").iterdir()}
            assert left <= {"step-00000003", "step-00000004.damaged", "step-00000003.of-run-another"}, left
            shutil.rmtree(run)


@pytest.mark.check(2)
@pytest.mark.parametrize("before", BEFORE)
def test_the_power_fails_after_any_call(trials: Trials, tmp_path: Path, before: Callable[[Path], list[int]]) -> None:
    """Whatever of the data not yet synced is lost, cut in half or there: the checkpoint before or the new one is whole;
    once the save has returned, the new one."""
    top = tmp_path / "disk"
    top.mkdir()
    expected: list[int | None] = [*(before(top / "run") or [None])]
    allowed: list[int | None] = [*expected, 3]
    draw = random.Random(2)
    cuts = 0
    step = trials.count(small=7, full=1)
    ways = WAYS if trials.full else ("nothing", "mix")

    def cut(recorder: Recorder) -> None:
        nonlocal cuts
        cuts += 1
        if cuts % step and allowed != [3]:
            return
        for how in ways:
            with trials.one(f"{before.__name__}, call {cuts} {recorder.log[-1]}, {how} of what isn't synced"):
                after = tmp_path / "after"
                shutil.rmtree(after, ignore_errors=True)
                rebuild(recorder, after, how, draw)
                run = after / "run"
                found, _ = read_newest(run) if run.exists() else (None, [])
                assert (None if found is None else found.step) in allowed
                assert found is None or same(found, found.step)

    recorder = Recorder(top, cut)
    with through(recorder):
        save_and_retain(top / "run", lambda: allowed.__setitem__(slice(None), [3]))
    cut(recorder)  # there may have been nothing to clear out
    assert cuts > 20 and allowed == [3]


@pytest.mark.check(2)
def test_the_power_fails_while_settings_are_written(trials: Trials, tmp_path: Path) -> None:
    """The old file or the new one is there, whole; once the write has returned, the new one."""
    top = tmp_path / "disk"
    top.mkdir()
    write_file(top / "hparams.json", b"old content")
    allowed = [b"old content", b"new content"]
    draw = random.Random(3)

    def cut(recorder: Recorder) -> None:
        for how in (*WAYS, *WAYS):
            with trials.one(f"{recorder.log[-1]}, {how}"):
                after = tmp_path / "after"
                shutil.rmtree(after, ignore_errors=True)
                rebuild(recorder, after, how, draw)
                assert (after / "hparams.json").read_bytes() in allowed

    recorder = Recorder(top, cut)
    with through(recorder):
        write_file(top / "hparams.json", b"new content")
    allowed.remove(b"old content")
    cut(recorder)


@pytest.mark.check(2)
@pytest.mark.usefixtures("no_waiting_for_the_disk")
def test_the_manifest_is_written_last(trials: Trials, tmp_path: Path) -> None:
    """All else is on the disk before it, so that a folder with a manifest is complete."""
    trials.count(small=1, full=1)
    with trials.one("order"):
        recorder = Recorder(run_with(tmp_path, 1), lambda recorder: None)
        with through(recorder):
            save(tmp_path, made(2))
        last = [path.name for kind, path in recorder.log if kind == "write"][-1]
        opened = [path.name for kind, path in recorder.log if kind == "open"]
        assert last == opened[-1] == "manifest.json" and len(opened) == 4
