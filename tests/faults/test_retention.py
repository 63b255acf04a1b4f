"""Which checkpoints are kept when clocks go back, others' checkpoints lie about, and files can't be removed."""

import errno
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from scorecard import Trials
from small_checkpoints import no_waiting_for_the_disk  # noqa: F401

from moelet.storage.disk import sealed
from moelet.storage.manifest import MANIFEST, PARTS, fault, folders, newest, retain, sweep

OWN, YEAR = "own", 365 * 86400


def write(run: Path, step: int, run_id: str) -> Path:
    """Write a checkpoint of a few bytes, as another program might: needs no torch."""
    import hashlib

    place = run / "checkpoints" / f"step-{step:08}"
    place.mkdir(parents=True)
    files = {}
    for name in PARTS:
        data = f"{name} of step {step} of {run_id}".encode()
        (place / name).write_bytes(data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    says = {"format": 1, "run_id": run_id, "step": step, "identity": {}, "files": files}
    (place / MANIFEST).write_bytes(sealed(says))
    return place


@contextmanager
def refusing(draw: random.Random) -> Iterator[None]:
    """Half of all removals fail: somebody has the file open on a network drive, or the folder is read-only."""
    real = {kind: getattr(os, kind) for kind in ("unlink", "rmdir", "rename")}

    def sometimes(kind: str) -> object:
        def call(*given: object, **named: object) -> None:
            if draw.random() < 0.5:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            real[kind](*given, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for kind in real:
            patch.setattr(os, kind, sometimes(kind))
        yield


@pytest.mark.check(7)
@pytest.mark.usefixtures("no_waiting_for_the_disk")
def test_folders_with_nearly_a_checkpoints_name(trials: Trials, tmp_path: Path) -> None:
    """`step-30` beside `step-00000030`: it is no checkpoint, whatever it holds; nothing of it is read or removed."""
    (tmp_path / "run_id").write_text(OWN)
    places = {step: write(tmp_path, step, OWN) for step in (10, 20, 30)}
    trials.count(small=1, full=1)
    for name in ("step-30", "step-000000040", "step-+0000050"):
        with trials.one(name):
            odd = shutil.copytree(places[30], tmp_path / "checkpoints" / name)
            assert [path for _, path in folders(tmp_path)] == [path for path in places.values() if path.exists()]
            retain(tmp_path, 1, None)
            assert newest(tmp_path) == (30, []) and list(odd.iterdir())


@pytest.mark.check(7)
@pytest.mark.usefixtures("no_waiting_for_the_disk")
def test_checkpoints_are_cleared_out(trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with the highest steps are kept, the best, and the newest that verifies, whatever the times of files, the
    clock and the time zone say; never is one of another run removed, or one that can't be told."""
    for index in range(trials.count(small=40, full=500)):
        draw = random.Random(f"{trials.number} {index}")
        with trials.one(f"case {index}"), monkeypatch.context() as patch:
            run = tmp_path / f"{index}"
            run.mkdir()
            (run / "run_id").write_text(OWN)
            steps = draw.sample(range(1, 60), draw.randint(2, 9))
            own = sorted(step for step in steps if draw.random() < 0.7)
            damaged, unreadable = set(), set()
            for step in steps:
                place = write(run, step, OWN if step in own else draw.choice(["", "older", "zzz"]))
                if draw.random() < 0.25:
                    damaged.add(step)
                    (place / draw.choice(PARTS)).write_bytes(b"other bytes")
                elif draw.random() < 0.1:
                    unreadable.add(step)
                    (place / MANIFEST).write_bytes(b"{")
            for path in (run / "checkpoints").rglob("*"):
                when = time.time() + draw.uniform(-3 * YEAR, YEAR)
                os.utime(path, (when, when))
            now = time.time() + draw.choice([-YEAR, 0, YEAR])
            patch.setattr(time, "time", lambda now=now: now)
            patch.setenv("TZ", draw.choice(["UTC", "America/New_York", "Pacific/Kiritimati"]))
            time.tzset()
            keep, best = draw.randint(1, 3), draw.choice([None, *own])
            known = [step for step in own if step not in unreadable]
            good = [step for step in known if step not in damaged]
            fails = draw.random() < 0.3
            if fails:
                with refusing(draw):
                    retain(run, keep, best)
            else:
                retain(run, keep, best)
            left = {int(path.name[5:]) for path in (run / "checkpoints").iterdir() if path.name[5:].isdecimal()}
            expected = set(known[-keep:]) | set(good[-1:]) | ({best} & set(known))
            others = set(steps) - set(known)
            assert expected | others <= left, "removed what had to stay"
            for step in left - damaged - unreadable:
                assert fault(run / "checkpoints" / f"step-{step:08}") is None, "half removed under its name"
            if not fails:
                assert left == expected | others
            assert newest(run)[0] == (good[-1] if good else None)
            retain(run, keep, best)  # the next one makes up for what failed
            sweep(run)
            names = {path.name for path in (run / "checkpoints").iterdir()}
            assert names == {f"step-{step:08}" for step in expected | others}
        shutil.rmtree(tmp_path / f"{index}")
    time.tzset()


@pytest.mark.check(7)
@pytest.mark.usefixtures("no_waiting_for_the_disk")
def test_the_newest_checkpoints_were_damaged_on_the_disk(trials: Trials, tmp_path: Path) -> None:
    """The last good one stays, however many newer ones there are."""
    for count in range(1, trials.count(small=3, full=6)):
        with trials.one(f"{count} damaged"):
            run = tmp_path / f"{count}"
            for step in range(1, 3 + count):
                write(run, step, OWN)
            for step in range(3, 3 + count):
                (run / "checkpoints" / f"step-{step:08}" / PARTS[0]).write_bytes(b"")
            (run / "run_id").write_text(OWN)
            retain(run, 1, None)
            assert newest(run)[0] == 2
            assert json.loads((run / "checkpoints" / "step-00000002" / MANIFEST).read_bytes())["step"] == 2
