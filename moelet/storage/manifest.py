"""Which checkpoints a run folder has, whether they are what was written, which of them are kept. Needs no torch.

A folder belongs to one run, whose id is in its file `run_id` and in each checkpoint's manifest: of checkpoints of other
runs nothing is read, changed or removed. Order is that of steps; times of files count for nothing.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from moelet.errors import UserError
from moelet.storage.disk import sealed, write_file
from moelet.storage.intake import LARGEST_JSON, open_inside, parse_json, size_of

FORMAT, FORMAT_OF_PARTS = 1, 2  # the second: no rank has all of it, and each writes files of its own
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
PARTS, RUN_ID = (MODEL, OPTIMIZER, STATE), "run_id"
UNSAVED = "unsaved"  # a file that is in a run's folder until its first checkpoint is
LARGEST = 2**44  # bytes of a file of tensors, which are held against the machine's memory later
T = TypeVar("T")


def of_rank(name: str, rank: int) -> str:
    """Return what another rank than the leader calls its part of a file."""
    return name.replace(".", f".rank-{rank}.", 1)


def parts_of(name: str, files: Iterable[str]) -> list[str]:
    """Return those of `files` that are parts of the file `name`."""
    stem, ending = name.split(".")
    return [file for file in files if re.fullmatch(rf"{stem}(\.rank-[0-9]{{1,7}})?\.{ending}", file)]


class Damaged(ValueError):
    """A checkpoint that isn't what was written; the message says which file, and what of it."""


class OtherFormat(Damaged):
    """A checkpoint that another version of this program wrote."""


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08}"


def name_run(run: Path) -> str:
    """Give the run that begins in a folder an id of its own; return it."""
    run_id = uuid.uuid4().hex[:16]
    write_file(run / RUN_ID, run_id.encode())
    return run_id


def note_unsaved(run: Path) -> None:
    """Note that the run in a folder has no checkpoint yet: there is nothing of it that starting over could lose."""
    write_file(run / UNSAVED, b"No checkpoint of this run has been written yet.\n")


def run_id_of(run: Path) -> str:
    """Return the id of the run in a folder; without the file, that of its checkpoints. Raises UserError where it would
    have to choose."""
    with suppress(OSError), open_inside(run, RUN_ID, 64) as file:
        if found := file.read().decode("ascii", "replace").strip():
            return found
    owners = {owner: step for step, folder in folders(run) if (owner := owner_of(folder)) is not None}
    if len(owners) > 1:
        listed = ", ".join(f"{owner or 'none'} (step {step})" for owner, step in owners.items())
        raise UserError(
            f"{run} holds checkpoints of {len(owners)} runs and no file {RUN_ID} that says which is its own; their ids "
            f"are: {listed}. Move the other runs' checkpoints elsewhere."
        )
    return next(iter(owners), "")


def folders(run: Path) -> list[tuple[int, Path]]:
    """Return the folders with the name of a checkpoint, by step. Only names count, never times of files.

    Raises UserError for a link, which leads out of the run.
    """
    place = run / "checkpoints"
    found = [(path.name[5:], path) for path in place.glob("step-*") if path.is_dir()]
    for path in (place, *(path for _, path in found)):
        if path.is_symlink():
            raise UserError(f"{path} is a link. A run's checkpoints lie in it. Copy what it leads to: cp -rL.")
    steps = [(int(name), path) for name, path in found if name.isascii() and name.isdecimal()]
    return sorted((step, path) for step, path in steps if path == folder_of(run, step))  # `step-30` is no name of ours


def owner_of(folder: Path) -> str | None:
    """Return the id of the run that a checkpoint is of, None where its manifest doesn't tell."""
    try:
        return str(read_manifest(folder).get("run_id", ""))
    except Damaged:
        return None


def checkpoint_steps(run: Path) -> list[int]:
    """Return the steps of the checkpoints of a run, oldest first.

    A folder has such a name only once it is complete; one that no longer is was damaged, and `fault` says so. Those
    whose manifest says that they are another run's aren't among them.
    """
    run_id = run_id_of(run)
    return [step for step, folder in folders(run) if owner_of(folder) in (run_id, None)]


def _remove(folder: Path) -> None:
    """Remove a checkpoint: cut off at any point, it is whole or no longer a checkpoint."""
    shutil.rmtree(put_aside(folder, "tmp-old"), ignore_errors=True)


def put_aside(folder: Path, why: str) -> Path:
    """Take a folder's name from it, that it is no longer taken for a checkpoint; return the one it has now."""
    aside, number = folder.with_name(f"{folder.name}.{why}"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.{why}-{number}")
    os.rename(folder, aside)
    return aside


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, whose own SHA-256 is right. Raises Damaged."""
    try:
        with open_inside(folder, MANIFEST, LARGEST_JSON) as file:
            raw = file.read()
        manifest: dict[str, Any] = parse_json(raw, MANIFEST)
        digest = manifest.pop("sha256")
        again = sealed(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} can't be read ({type(error).__name__}: {error})") from None
    if again != raw:
        actual = json.loads(again)["sha256"]
        raise Damaged(f"{MANIFEST} has SHA-256 {actual}, it says {digest}, and isn't as it was written")
    return manifest


class Part(NamedTuple):
    """What a file of a checkpoint must be."""

    bytes: int
    sha256: str


def expected_parts(folder: Path, name: str) -> dict[str, Part]:
    """Return what the files of a checkpoint must be; its folder is, or will be, called `name`. Raises Damaged."""
    manifest = read_manifest(folder)
    if manifest.get("format") not in (FORMAT, FORMAT_OF_PARTS):
        raise OtherFormat(
            f"{MANIFEST} is of format {manifest.get('format')}, this version reads {FORMAT} and {FORMAT_OF_PARTS}"
        )
    try:
        step, files = int(manifest["step"]), manifest["files"]
        names = list(PARTS)
        if manifest["format"] == FORMAT_OF_PARTS:
            names = list(dict.fromkeys([*PARTS, *parts_of(MODEL, files), *parts_of(OPTIMIZER, files)]))
        parts = {part: Part(int(files[part]["bytes"]), str(files[part]["sha256"])) for part in names}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise Damaged(f"{MANIFEST} lacks something ({error!r})") from None
    if name != folder_of(folder, step).name:
        raise Damaged(f"{MANIFEST} is that of step {step}")
    return parts


def open_verified(folder: Path, name: str, expected: Part) -> BufferedReader:
    """Return a file of a checkpoint, once it is what its manifest says, to be read from that handle. Raises Damaged."""
    says = f"its manifest says {expected.bytes} with SHA-256 {expected.sha256}"
    try:
        file = open_inside(folder, name, LARGEST)
    except FileNotFoundError:
        raise Damaged(f"{name} is missing; {says}") from None
    except (OSError, UserError) as error:
        raise Damaged(f"{name} can't be read ({error}); {says}") from None
    try:
        found = size_of(file)  # a file that is longer than it should be may be of any length, and isn't read
        actual = hashlib.file_digest(file, "sha256").hexdigest() if found <= expected.bytes else "not looked at"
        if found != expected.bytes:
            raise Damaged(f"{name} has {found} bytes with SHA-256 {actual}, {says}")
        if actual != expected.sha256:
            raise Damaged(f"{name} has SHA-256 {actual}, its manifest says {expected.sha256}")
        file.seek(0)
    except OSError as error:
        file.close()
        raise Damaged(f"{name} can't be read ({error}); {says}") from None
    except Damaged:
        file.close()
        raise
    return file


def verify(folder: Path, name: str) -> None:
    """Raise Damaged unless every file of a checkpoint is what its manifest says; its folder is, or will be, `name`."""
    for part, expected in expected_parts(folder, name).items():
        open_verified(folder, part, expected).close()


def fault(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, or None: every file there, of its size and SHA-256."""
    try:
        verify(folder, folder.name)
    except Damaged as error:
        return str(error)
    return None


def newest(run: Path) -> tuple[int | None, list[str]]:
    """Return the step of the newest checkpoint that verifies (None: there is none), and a line for each passed over.

    Raises UserError where another version wrote a newer one: that isn't damage.
    """

    def step_of(folder: Path) -> int:
        verify(folder, folder.name)
        return int(folder.name[5:])

    return newest_read(run, step_of)


def newest_read(run: Path, read: Callable[[Path], T]) -> tuple[T | None, list[str]]:
    """Return what `read` makes of the newest checkpoint for which it doesn't raise Damaged; None: there is none.

    The rest is as of `newest`.
    """
    passed: list[str] = []
    run_id = run_id_of(run)
    for step, folder in reversed(folders(run)):
        if (owner := owner_of(folder)) not in (run_id, None):
            passed.append(f"checkpoint of step {step} left alone: it is of another run, {owner or 'one without an id'}")
            continue
        try:
            return read(folder), passed
        except OtherFormat as error:
            raise UserError(
                f"the checkpoint of step {step} of {run}: {error}. Nothing was changed. Go on with the version of "
                "moelet that wrote it, or a newer one; to go on from an earlier step, move that folder elsewhere."
            ) from None
        except Damaged as error:
            passed.append(f"checkpoint of step {step} passed over: {error}")
    return None, passed


def verified(run: Path) -> list[int]:
    """Return the steps of the checkpoints that verify, oldest first."""
    return [step for step in checkpoint_steps(run) if fault(folder_of(run, step)) is None]


def read_state(run: Path, step: int) -> dict[str, Any]:
    """Return the small state of a checkpoint that need not verify; empty where it can't be read."""
    try:
        with open_inside(folder_of(run, step), STATE, LARGEST_JSON) as file:
            state = parse_json(file.read(), STATE)
    except (OSError, UserError):
        return {}
    return state if isinstance(state, dict) else {}


def retain(run: Path, keep: int, best: int | None, good: int | None = None) -> None:
    """Remove all of the run's own checkpoints but the `keep` newest, the best, and the newest that verifies, which
    `good` is if it is given; and what interrupted saves left behind.

    Order is that of steps. Nothing is removed whose manifest doesn't say that it is this run's.
    """
    try:
        run_id = run_id_of(run)
    except UserError:  # which checkpoints are its own isn't known: the next resume says so
        return
    own = _own(run, run_id)
    if good is None:
        good = next((step for step in reversed(own) if fault(folder_of(run, step)) is None), None)
    for step in own[:-keep]:
        if step not in (best, good):
            with suppress(OSError):
                _remove(folder_of(run, step))
    for damaged in (run / "checkpoints").glob("step-*.damaged*"):
        name = damaged.name[5:].partition(".")[0]
        if good is not None and name.isdecimal() and int(name) <= good and owner_of(damaged) == run_id:
            with suppress(OSError):
                _remove(damaged)
    sweep(run)
    if good is not None:
        with suppress(OSError):
            (run / UNSAVED).unlink(missing_ok=True)


def _own(run: Path, run_id: str) -> list[int]:
    return [step for step, folder in folders(run) if owner_of(folder) == run_id]


def make_room(run: Path, best: int | None) -> list[int]:
    """Remove the run's own checkpoints that are older than the newest one that verifies, but the best, which is that of
    step `best` or what the newest one says; return their steps.
    """
    try:
        run_id = run_id_of(run)
    except UserError:  # as in `retain`
        return []
    own = _own(run, run_id)
    good = next((step for step in reversed(own) if fault(folder_of(run, step)) is None), None)
    if good is None:
        return []
    noted = read_state(run, good).get("best")
    kept = {best, good, noted.get("step") if isinstance(noted, dict) else None}
    removed = []
    for step in own[: own.index(good)]:
        if step not in kept:
            with suppress(OSError):
                _remove(folder_of(run, step))
                removed.append(step)
    return removed


def sweep(run: Path) -> None:
    """Remove what interrupted saves and removals left behind; to be called by the holder of the run's lock."""
    for leftover in (run / "checkpoints").glob("step-*.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
