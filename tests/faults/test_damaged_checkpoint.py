"""A checkpoint was damaged while nobody looked: bits flipped, files cut, deleted, exchanged."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TinySettings
from cuts import in_process, train_until  # noqa: F401
from processes import assert_same_run
from scorecard import Trials
from small_checkpoints import folder, made, no_waiting_for_the_disk, read_newest, run_with, same  # noqa: F401

from moelet.storage import checkpoint, manifest
from moelet.storage.disk import file_sha256, sealed
from moelet.storage.manifest import MANIFEST, PARTS
from moelet.tokenizer import Tokenizer

Harm = Callable[[Path, random.Random], None]


def flip_a_bit(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def zero_a_stretch(path: Path, draw: random.Random) -> None:
    """As a lost block of the disk leaves it."""
    data = path.read_bytes()
    at = draw.randrange(len(data))
    path.write_bytes(data[:at] + bytes(len(data) - at))


def cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def append(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 9)))


def delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def take_that_of_step_1(path: Path, draw: random.Random) -> None:
    shutil.copy(folder(path.parents[2], 1) / path.name, path)


def exchange_with_a_sibling(path: Path, draw: random.Random) -> None:
    other = draw.choice([sibling for sibling in path.parent.iterdir() if sibling != path])
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


def make_a_link(path: Path, draw: random.Random) -> None:
    """To the very same bytes: still not what was written."""
    moved = path.rename(path.parents[2] / "moved")
    path.symlink_to(moved)


def opened(file: Any) -> str:
    return os.readlink(f"/proc/self/fd/{file.fileno()}")


OFTEN = [flip_a_bit] * 12 + [zero_a_stretch, cut, append] * 2
HARMS: list[Harm] = [*OFTEN, delete, take_that_of_step_1, exchange_with_a_sibling, make_a_link]


@pytest.mark.check(4)
@pytest.mark.usefixtures("no_waiting_for_the_disk")
def test_a_file_of_a_checkpoint_is_damaged(trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found before a tensor is made of it; the checkpoint before is taken, and the file is named, with the
    SHA-256 that it should have and the one it has."""
    run = run_with(tmp_path / "run", 1, 2)
    intact = shutil.copytree(folder(run, 2), tmp_path / "intact")
    manifest_of_2 = json.loads((intact / MANIFEST).read_bytes())
    used: list[str] = []
    real = checkpoint.TensorFile.read
    monkeypatch.setattr(
        checkpoint.TensorFile, "read", lambda self, *given: used.append(opened(self._file)) or real(self, *given)
    )
    for index in range(trials.count(small=120, full=1000)):
        harm, name = trials.random.choice(HARMS), trials.random.choice([*PARTS, MANIFEST])
        with trials.one(f"{index}: {harm.__name__} {name}"):
            path = folder(run, 2) / name
            before = path.read_bytes()
            harm(path, trials.random)
            if not path.is_symlink() and path.exists() and path.read_bytes() == before:
                continue  # zeros on zeros
            used.clear()
            found, passed = read_newest(run)
            assert same(found, 1)
            assert [line.partition(":")[0] for line in passed] == ["checkpoint of step 2 passed over"]
            assert used and all("step-00000001" in path for path in used), "a tensor was made of damaged bytes"
            if name == MANIFEST or harm is exchange_with_a_sibling:
                assert MANIFEST in passed[0] or any(part in passed[0] for part in PARTS)
            else:
                assert name in passed[0] and manifest_of_2["files"][name]["sha256"] in passed[0]
                if harm in (flip_a_bit, zero_a_stretch, cut):
                    assert file_sha256(path) in passed[0]
        shutil.rmtree(folder(run, 2))
        (run / "moved").unlink(missing_ok=True)
        shutil.copytree(intact, folder(run, 2))
        assert same(read_newest(run)[0], 2)


@pytest.mark.check(4)
@pytest.mark.usefixtures("no_waiting_for_the_disk")
def test_a_whole_checkpoint_is_exchanged(trials: Trials, tmp_path: Path) -> None:
    """One of another step, or of another run, under this one's name is told from it."""
    trials.count(small=2, full=2)
    with trials.one("of another step"):
        run = run_with(tmp_path / "a", 1, 2)
        shutil.copytree(folder(run, 1), folder(run, 3))
        found, passed = read_newest(run)
        assert same(found, 2) and "is that of step 1" in passed[0]
    with trials.one("of another run"):
        other = run_with(tmp_path / "other", 9, run_id="another")
        run = run_with(tmp_path / "b", 1, 2)
        shutil.copytree(folder(other, 9), folder(run, 9))
        found, passed = read_newest(run)
        assert same(found, 2) and passed == ["checkpoint of step 9 left alone: it is of another run, another"]
        assert manifest.checkpoint_steps(run) == [1, 2]


@pytest.mark.check(4)
@pytest.mark.usefixtures("no_waiting_for_the_disk")
def test_the_disk_gives_back_other_bytes_than_it_took(
    trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written is read back before it gets its name: the save has failed, the one before stays the newest."""
    write = checkpoint.write_synced
    for name in (*PARTS, MANIFEST)[: trials.count(small=4, full=4)]:
        with trials.one(name):

            def bad(path: Path, data: bytes, name: str = name) -> None:
                write(path, data[:-1] + bytes([data[-1] ^ 1]) if path.name == name else data)

            run = run_with(tmp_path / name, 1)
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, "write_synced", bad)
                with pytest.raises(checkpoint.SaveError, match=f"read back, {name}"):
                    checkpoint.save(run, made(2))
            assert same(read_newest(run)[0], 1)
            assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.check(4)
@pytest.mark.usefixtures("in_process")
def test_a_run_is_resumed_from_a_damaged_checkpoint(
    trials: Trials, tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on from the one before, says so, and ends to the last bit where it would have ended."""
    tokenizer.save(tmp_path / "given.model")
    settings: dict[str, Any] = tiny_settings(
        tokenizer={"file": str(tmp_path / "given.model")}, train={"train_steps": 8, "checkpoint_steps": 2}
    )
    train_until(monkeypatch, tmp_path / "whole", settings, None)
    for harm in (flip_a_bit, delete, cut, exchange_with_a_sibling)[: trials.count(small=1, full=4)]:
        for name in (*PARTS, MANIFEST)[: trials.count(small=1, full=4)]:
            with trials.one(f"{harm.__name__} {name}"):
                run = tmp_path / f"{harm.__name__}-{name}"
                train_until(monkeypatch, run, settings, 5)
                harm(folder(run, 4) / name, trials.random)
                train_until(monkeypatch, run, None, None)
                assert_same_run(run, tmp_path / "whole")


@pytest.mark.check(4)
@pytest.mark.usefixtures("no_waiting_for_the_disk")
def test_the_manifest_lies(trials: Trials, tmp_path: Path) -> None:
    """One that is sealed again after a change is found by what it says: another step, other sizes, parts missing."""
    changes: list[Callable[[dict[str, Any]], Any]] = [
        lambda says: says.update(step=3),
        lambda says: says.update(step="2"),
        lambda says: says["files"].pop("state.json"),
        lambda says: says["files"]["state.json"].update(bytes=10**15),
        lambda says: says["files"]["state.json"].update(sha256="0" * 64),
        lambda says: says.update(files=[]),
        lambda says: says.update(identity=None),
        lambda says: says.pop("identity"),
    ]
    for index, change in enumerate(changes):
        with trials.one(f"change {index}"):
            run = run_with(tmp_path / f"{index}", 1, 2)
            path = folder(run, 2) / MANIFEST
            says = json.loads(path.read_bytes())
            del says["sha256"]
            change(says)
            path.write_bytes(sealed(says))
            found, passed = read_newest(run)
            if index != 1:  # a number as a word is still that step
                assert same(found, 1) and len(passed) == 1
