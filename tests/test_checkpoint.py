"""Checkpoints: whole or absent whatever the moment of death, damage found, the newest and the best kept, one owner."""

import builtins
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import TinySettings

from moelet.errors import TemporaryError, UserError
from moelet.hparams import make_hparams
from moelet.state import Training, build, snapshot
from moelet.storage import checkpoint, manifest
from moelet.storage.checkpoint import Checkpoint
from moelet.storage.disk import file_sha256, write_file
from moelet.storage.lock import lock
from moelet.tokenizer import Tokenizer

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synced is tested by the order of the calls; thousands of real ones would take minutes."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Killed(BaseException):
    """The process is dead: nothing after this may run, so nothing catches it."""


def made(step: int) -> Checkpoint:
    """A checkpoint of a few hundred bytes, different at every step."""
    generator = torch.Generator().manual_seed(step)
    model = {"w": torch.randn(4, 5, generator=generator), "b": torch.randn(3, generator=generator)}
    optimizer = {"w:exp_avg": torch.randn(4, 5, generator=generator), "w:step": torch.tensor(float(step))}
    state = {"step": step, "best": {"step": 1, "val_loss": 0.1 + step}, "cursor": {"source": None, "counts": {"ü": 1}}}
    return Checkpoint(step, model, optimizer, state, {"settings": "a" * 64, "tokenizer": "b" * 64})


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    assert found.step == expected.step
    assert found.state == expected.state
    assert found.identity == expected.identity
    for kind in ("model", "optimizer"):
        one, other = getattr(found, kind), getattr(expected, kind)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08}"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def run_with(path: Path, *steps: int) -> Path:
    for step in steps:
        checkpoint.save(path, made(step))
    return path


def test_what_is_saved_is_read_back_exactly(tmp_path: Path) -> None:
    run = run_with(tmp_path, 5, 10)
    assert checkpoint.newest(run) == (10, [])
    assert manifest.checkpoint_steps(run) == [5, 10]
    for step in (5, 10):
        assert_same(checkpoint.read(run, step), made(step))
    assert names(run) == ["step-00000005", "step-00000010"]


def test_special_values_survive(tmp_path: Path) -> None:
    odd = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45])
    tensors = {"f": odd, "h": odd.bfloat16(), "i": torch.tensor([2**62]), "e": torch.empty(0, 3)}
    checkpoint.save(tmp_path, made(1)._replace(model=tensors))
    found = checkpoint.read(tmp_path, 1).model
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
        assert found[name].numpy(force=True).tobytes() == tensor.numpy(force=True).tobytes() if name != "h" else True
    assert torch.equal(found["h"].view(torch.int16), tensors["h"].view(torch.int16))


def test_no_file_of_a_checkpoint_is_code(tmp_path: Path) -> None:
    run = run_with(tmp_path, 1)
    assert sorted(path.name for path in folder(run, 1).iterdir()) == list(FILES)
    for path in folder(run, 1).iterdir():
        data = path.read_bytes()
        if path.suffix == ".json":
            assert isinstance(json.loads(data), dict)
        else:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            assert all({"dtype", "shape", "data_offsets"} <= set(entry) for entry in header.values())


# damage


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def lengthen(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 9)))


def delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def swap(path: Path, draw: random.Random) -> None:
    shutil.copy(folder(path.parents[2], 1) / path.name, path)


@pytest.mark.parametrize(("harm", "times"), [(flip, 60), (truncate, 15), (lengthen, 3), (delete, 1), (swap, 1)])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_the_checkpoint_before_is_taken(
    tmp_path: Path, name: str, harm: Callable[[Path, random.Random], None], times: int
) -> None:
    run = run_with(tmp_path, 1, 2)
    path, draw = folder(run, 2) / name, random.Random(name)
    intact = path.read_bytes()
    for _ in range(times):
        harm(path, draw)
        wrong = checkpoint.fault(folder(run, 2))
        assert wrong is not None and name in wrong
        assert checkpoint.newest(run) == (1, [f"checkpoint of step 2 passed over: {wrong}"])
        path.write_bytes(intact)
        assert checkpoint.newest(run) == (2, [])


def test_the_digest_expected_and_found_are_both_named(tmp_path: Path) -> None:
    run = run_with(tmp_path, 1)
    expected = json.loads((folder(run, 1) / "manifest.json").read_bytes())["files"]["state.json"]["sha256"]
    flip(folder(run, 1) / "state.json", random.Random(0))
    wrong = checkpoint.fault(folder(run, 1))
    assert wrong is not None and expected in wrong
    assert file_sha256(folder(run, 1) / "state.json") in wrong


def test_a_folder_under_another_steps_name_is_found(tmp_path: Path) -> None:
    run = run_with(tmp_path, 1, 2)
    os.rename(folder(run, 1), folder(run, 3))
    step, passed = checkpoint.newest(run)
    assert step == 2
    assert len(passed) == 1 and "of step 1" in passed[0]


def test_another_format_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_with(tmp_path, 1)
    for module in (checkpoint, manifest):
        monkeypatch.setattr(module, "FORMAT", 99)
    run_with(run, 2)
    monkeypatch.undo()
    assert "format 99" in str(checkpoint.fault(folder(run, 2)))
    with pytest.raises(UserError, match="step 2.*format 99.*reads 1.*Nothing was changed.*a newer one"):
        checkpoint.newest(run)


def test_odd_names_among_the_checkpoints_are_left_alone(tmp_path: Path) -> None:
    run = run_with(tmp_path, 7)
    for name in ("step-", "step-x", "step-²", "notes"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / "step-00000009").write_text("a file")
    assert manifest.checkpoint_steps(run) == [7]
    manifest.retain(run, 1, None)
    assert checkpoint.newest(run) == (7, [])
    assert len(names(run)) == 6


# death and full disks


class Faults:
    """Counts what changes the disk, and raises `error` at operation number `at` (0: never); a write does half first."""

    def __init__(self, kinds: set[str], at: int, error: Callable[[], BaseException]) -> None:
        self.kinds, self.at, self.error, self.count = kinds, at, error, 0
        self.log: list[str] = []

    def note(self, kind: str, before: Callable[[], Any] = lambda: None) -> None:
        if kind in self.kinds:
            self.count += 1
            self.log.append(kind)
            if self.count == self.at:
                before()
                raise self.error()


class FaultyFile:
    def __init__(self, file: Any, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def __enter__(self) -> "FaultyFile":
        return self

    def __exit__(self, *about: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._faults.note("write", half)
        written: int = self._file.write(data)
        return written


OPERATIONS = {"open", "write", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "rmtree"}


@contextmanager
def faulty(faults: Faults) -> Iterator[None]:
    real = builtins.open, shutil.rmtree

    def open_file(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if not set(mode) & set("wax+"):
            return real[0](path, mode, *rest, **named)
        faults.note("open")
        return FaultyFile(real[0](path, mode, *rest, **named), faults)

    def noted(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            faults.note(kind)
            return function(*given, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", open_file)
        patch.setattr(shutil, "rmtree", noted("rmtree", real[1]))
        for kind in ("open", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, kind, noted(kind, getattr(os, kind)))
        yield


def cycle(run: Path, step: int, keep: int = 1, best: int | None = None) -> None:
    checkpoint.save(run, made(step))
    manifest.retain(run, keep, best)


def count_operations(path: Path, prepare: Callable[[Path], Path], step: int, kinds: set[str]) -> int:
    faults = Faults(kinds, 0, Killed)
    run = prepare(path / "counted")
    with faulty(faults):
        cycle(run, step)
    return faults.count


def two(path: Path) -> Path:
    return run_with(path, 1, 2)


def two_and_a_damaged_third(path: Path) -> Path:
    """As after a fallback: the run has come to step 2 again and is about to save step 3 again."""
    run = run_with(path, 1, 2, 3)
    delete(folder(run, 3) / "state.json", random.Random())
    return run


@pytest.mark.parametrize("prepare", [two, two_and_a_damaged_third])
def test_death_at_any_operation_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, prepare: Callable[[Path], Path]
) -> None:
    count = count_operations(tmp_path, prepare, 3, OPERATIONS)
    assert count > 30
    outcomes = set()
    for k in range(1, count + 1):
        run = prepare(tmp_path / f"{k}")
        with pytest.raises(Killed), faulty(Faults(OPERATIONS, k, Killed)):
            cycle(run, 3)
        step, _ = checkpoint.newest(run)
        assert step in (2, 3), f"operation {k}"
        assert_same(checkpoint.read(run, step), made(step))
        outcomes.add(step)
        cycle(run, step + 1)  # the process that follows, with the same number as in a container, cleans up
        assert names(run) == [folder(run, step + 1).name], f"operation {k}"
        assert checkpoint.newest(run) == (step + 1, [])
    assert outcomes == {2, 3}


def test_death_while_retaining_never_leaves_half_a_checkpoint(tmp_path: Path) -> None:
    """Those that are being removed are whole or gone: a half one would be found damaged when it is needed."""
    steps = (1, 2, 3, 4)
    counted = Faults(OPERATIONS, 0, Killed)
    run = run_with(tmp_path / "counted", *steps)
    with faulty(counted):
        manifest.retain(run, 1, 2)
    assert counted.count > 10
    for k in range(1, counted.count + 1):
        run = run_with(tmp_path / f"{k}", *steps)
        with pytest.raises(Killed), faulty(Faults(OPERATIONS, k, Killed)):
            manifest.retain(run, 1, 2)
        left = manifest.checkpoint_steps(run)
        assert {2, 4} <= set(left)
        assert all(checkpoint.fault(folder(run, step)) is None for step in left)


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path) -> None:
    faults = Faults({"write", "fsync", "replace", "rename"}, 0, Killed)
    with faulty(faults):
        checkpoint.save(tmp_path, made(1))
    assert faults.log == [
        "fsync",  # the name of the folder of checkpoints
        *["write", "fsync"] * len(FILES),
        *["fsync", "rename", "fsync"],  # the folder, its name
    ]
    faults.log.clear()
    with faulty(faults):
        write_file(tmp_path / "hparams.json", b"x")
    assert faults.log == ["write", "fsync", "replace", "fsync"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG])
def test_a_full_disk_at_any_write_leaves_the_old_checkpoint(tmp_path: Path, code: int) -> None:
    kinds = {"open", "write", "fsync", "mkdir"}
    count = count_operations(tmp_path, two, 3, kinds)
    assert count > 12
    for k in range(1, count + 1):
        run = two(tmp_path / f"{k}")
        with faulty(Faults(kinds, k, lambda: OSError(code, os.strerror(code)))):
            try:
                checkpoint.save(run, made(3))
            except TemporaryError as error:
                text = str(error)
            else:
                text = ""
        step, passed = checkpoint.newest(run)
        assert passed == []
        assert_same(checkpoint.read(run, 2), made(2))
        assert [name for name in names(run) if ".tmp" in name] == [], f"operation {k}"
        if step == 3:  # it was the old ones' turn, or the folder's last sync
            continue
        assert os.strerror(code) in text and "MiB" in text and "--resume" in text
        assert "step 3" in text and "step 2 is untouched" in text


@pytest.mark.parametrize("kind", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("error", [Killed, lambda: OSError(errno.ENOSPC, "full")], ids=["killed", "full"])
def test_write_file_leaves_the_old_content_or_the_new(
    tmp_path: Path, kind: str, error: Callable[[], BaseException]
) -> None:
    path = tmp_path / "hparams.json"
    write_file(path, b"old content")
    with pytest.raises((Killed, OSError)), faulty(Faults({kind}, 1, error)):
        write_file(path, b"new content")
    assert path.read_bytes() == b"old content"
    write_file(path, b"new content")
    assert path.read_bytes() == b"new content"
    assert os.listdir(tmp_path) == ["hparams.json"]


# retention


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (1, None, [50]),
        (2, None, [40, 50]),
        (2, 20, [20, 40, 50]),
        (2, 50, [40, 50]),
        (1, 10, [10, 50]),
        (9, None, [10, 20, 30, 40, 50]),
    ],
)
def test_the_newest_and_the_best_are_kept_whatever_the_clock_says(
    tmp_path: Path, keep: int, best: int | None, left: list[int]
) -> None:
    run = run_with(tmp_path, 10, 20, 30, 40, 50)
    draw = random.Random(keep)
    for path in (run / "checkpoints").rglob("*"):
        os.utime(path, (draw.uniform(0, 2e9), draw.uniform(0, 2e9)))
    manifest.retain(run, keep, best)
    assert manifest.checkpoint_steps(run) == left
    assert names(run) == [folder(run, step).name for step in left]
    assert checkpoint.newest(run) == (50, [])


def test_what_interrupted_saves_left_is_removed(tmp_path: Path) -> None:
    run = run_with(tmp_path, 1)
    shutil.copytree(folder(run, 1), run / "checkpoints" / "step-00000002.tmp-99")
    (run / "checkpoints" / "step-00000003.tmp-1").mkdir()
    assert checkpoint.newest(run) == (1, [])
    manifest.retain(run, 1, None)
    assert names(run) == ["step-00000001"]


def test_after_a_fallback_the_damaged_later_checkpoint_displaces_no_good_one(tmp_path: Path) -> None:
    run = run_with(tmp_path, 10, 20, 30)
    flip(folder(run, 30) / "model.safetensors", random.Random(0))
    assert checkpoint.newest(run)[0] == 20
    cycle(run, 25, keep=1, best=20)
    assert checkpoint.newest(run) == (25, [])
    assert manifest.checkpoint_steps(run) == [20, 25]


# the lock

HOLDER = """
import sys, time
from pathlib import Path
from moelet.storage.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_the_run_and_a_dead_ones_lock_is_free(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught, lock(tmp_path):
            pass
        text = str(caught.value)
        assert f"process {holder.pid} on {os.uname().nodename} since 20" in text
        assert str(tmp_path) in text and "Wait for it" in text and "--run" in text
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_the_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(Killed), lock(tmp_path):
        raise Killed
    with lock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()}"), lock(tmp_path):
        pass


def test_a_file_in_the_place_of_the_run_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"can't be written to \(.*--run"), lock(path):
            pass


# load()


def marks_of(training: Training) -> dict[str, str]:
    return {"tokenizer": training.tokenizer.fingerprint, "model": training.hparams.model.fingerprint}


@pytest.fixture
def trained(tmp_path: Path, tiny_settings: TinySettings, tokenizer: Tokenizer) -> tuple[Path, Training]:
    training = build(make_hparams(tiny_settings()), tokenizer)
    training.step = 3
    write_file(tmp_path / "hparams.json", training.hparams.to_json().encode())
    tokenizer.save(tmp_path / "tokenizer.model")
    checkpoint.save(tmp_path, snapshot(training, marks_of(training)))
    return tmp_path, training


def test_load_returns_the_saved_model_bit_for_bit(trained: tuple[Path, Training]) -> None:
    run, training = trained
    ids = torch.randint(4, 400, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        training.model.eval()
        expected = training.model.logits(training.model(ids).hidden)
        loaded = checkpoint.load(run)
        assert not loaded.model.training
        assert torch.equal(loaded.model.logits(loaded.model(ids).hidden), expected)
    assert (loaded.step, loaded.hparams) == (3, training.hparams)
    assert loaded.tokenizer.fingerprint == training.tokenizer.fingerprint
    assert loaded.model.table.data_ptr() == loaded.model.embed.tokens.weight.data_ptr()


def test_the_tied_table_is_saved_once(trained: tuple[Path, Training]) -> None:
    run, training = trained
    saved = safetensors.torch.load_file(folder(run, 3) / "model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == sum(p.numel() for p in training.model.parameters())


def test_load_falls_back_to_the_checkpoint_before(trained: tuple[Path, Training]) -> None:
    run, training = trained
    training.step = 4
    checkpoint.save(run, snapshot(training, marks_of(training)))
    assert checkpoint.load(run).step == 4
    flip(folder(run, 4) / "model.safetensors", random.Random(0))
    assert checkpoint.load(run).step == 3


def test_load_explains_what_it_cannot_load(trained: tuple[Path, Training], tmp_path_factory: Any) -> None:
    run, training = trained
    with pytest.raises(UserError, match=r"is not a run folder.*hparams.json.*Give the folder"):
        checkpoint.load(tmp_path_factory.mktemp("empty"))
    with pytest.raises(UserError, match="is not a run folder"):
        checkpoint.load(run / "nowhere")

    other = Tokenizer.train(["other words entirely " * 99], 300)
    write_file(run / "tokenizer.model", other.model_bytes)
    with pytest.raises(UserError, match=r"tokenizer.model isn't the one that the model was trained with.*Restore"):
        checkpoint.load(run)
    training.tokenizer.save(run / "tokenizer.model")

    for old, new in (('"d_ff": 64', '"d_ff": 128'), ('"embed_scale": 1.0', '"embed_scale": 2.0')):
        edited = training.hparams.to_json().replace(old, new)
        assert edited != training.hparams.to_json()
        write_file(run / "hparams.json", edited.encode())
        with pytest.raises(UserError, match=r"hparams.json isn't the one that the model was trained with.*Restore"):
            checkpoint.load(run)
    write_file(run / "hparams.json", training.hparams.to_json().encode())

    delete(folder(run, 3) / "optimizer.safetensors", random.Random())
    with pytest.raises(UserError, match=r"no model that verifies.*step 3 passed over: optimizer.*missing.*Restore"):
        checkpoint.load(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint yet.*--resume"):
        checkpoint.load(run)


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL])
def test_a_drive_without_locks_and_syncs_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """What a folder mounted from a cloud says to flock and fsync."""

    def not_offered(*given: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", not_offered)
    monkeypatch.setattr(os, "fsync", not_offered)
    with lock(tmp_path):
        checkpoint.save(tmp_path, made(3))
    assert "without locks" in caplog.text
    assert checkpoint.newest(tmp_path) == (3, [])
