"""Checkpoints that are whole or absent: atomic save, load(). What a run folder has of them is `manifest`'s.

A checkpoint is written into a temporary folder, every file synced, the manifest with each file's SHA-256 last, read
back, and renamed into place. Nothing in it is code: safetensors and JSON.
"""

import errno
import hashlib
import json
import os
import platform
import shlex
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from moelet.errors import TemporaryError, UserError
from moelet.hparams import Hparams, read_hparams_inside
from moelet.memory import require_memory
from moelet.modelling import GPT, shapes_of
from moelet.storage.disk import make_folders, sealed, sync_folder, write_synced
from moelet.storage.intake import parse_json, size_of
from moelet.storage.manifest import (
    FORMAT,
    FORMAT_OF_PARTS,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    Damaged,
    Part,
    expected_parts,
    fault,
    folder_of,
    folders,
    newest,
    newest_read,
    of_rank,
    open_verified,
    owner_of,
    parts_of,
    put_aside,
    read_manifest,
    sweep,
    verify,
)
from moelet.storage.tensor_file import TensorFile, Tensors
from moelet.tokenizer import Tokenizer

HPARAMS, TOKENIZER = "hparams.json", "tokenizer.model"
T = TypeVar("T")


class Checkpoint(NamedTuple):
    """What a checkpoint holds; the manifest says what it belongs to."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    identity: dict[str, str]  # fingerprints that must be equal at resume, by name
    run_id: str = ""  # of the run that it is of; "" for those from before there were ids
    others: Callable[[Path], dict[str, Part]] | None = None  # has other ranks write their parts of it into a folder


class Loaded(NamedTuple):
    """A trained run, ready to use."""

    model: GPT
    tokenizer: Tokenizer
    hparams: Hparams
    step: int


class SaveError(TemporaryError):
    """A checkpoint wasn't written, and what was there before is untouched; `reason` is the message without advice."""

    def __init__(self, reason: str, run: Path) -> None:
        self.reason = reason
        super().__init__(f"{reason} Mend that and run: python -m moelet train --resume {shlex.quote(str(run))}")


def serialised(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the files of a checkpoint, all but its manifest."""
    return {
        MODEL: safetensors.torch.save(_on_cpu(checkpoint.model)),
        OPTIMIZER: safetensors.torch.save(_on_cpu(checkpoint.optimizer)),
        STATE: json.dumps(checkpoint.state).encode(),
    }


def save(run: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint; either all of it is there afterwards, or none.

    One of the same step stays if it verifies. What is in the way otherwise is put aside: of the same step or later, a
    run passed it over when it was resumed. Raises SaveError when the disk doesn't take it.
    """
    parts = serialised(checkpoint)
    target = folder_of(run, checkpoint.step)
    try:
        if owner_of(target) != checkpoint.run_id or fault(target) is not None:
            _write(target, checkpoint, parts)
        sync_folder(target.parent)
        for later, folder in folders(run):
            if later > checkpoint.step and owner_of(folder) in (checkpoint.run_id, None):
                put_aside(folder, "damaged")
    except OSError as error:
        size = sum(map(len, parts.values()))
        raise SaveError(_unsaved(run, checkpoint.run_id, checkpoint.step, size, error), run) from error


def write_tensors(folder: Path, rank: int, model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> dict[str, Part]:
    """Write what a rank gives to a checkpoint into the folder where it is being made; return what was written."""
    written = {}
    for name, tensors in ((MODEL, model), (OPTIMIZER, optimizer)):
        data = safetensors.torch.save(_on_cpu(tensors))
        write_synced(folder / of_rank(name, rank), data)
        written[of_rank(name, rank)] = _part(data)
    return written


def _part(data: bytes) -> Part:
    return Part(len(data), hashlib.sha256(data).hexdigest())


def _manifest(checkpoint: Checkpoint, files: dict[str, Part]) -> dict[str, Any]:
    return {
        "format": FORMAT if checkpoint.others is None else FORMAT_OF_PARTS,
        "run_id": checkpoint.run_id,
        "step": checkpoint.step,
        "identity": checkpoint.identity,
        "files": {name: part._asdict() for name, part in files.items()},
        "made_by": {"torch": torch.__version__, "python": platform.python_version()},
    }


def _write(target: Path, checkpoint: Checkpoint, parts: dict[str, bytes]) -> None:
    """Write a checkpoint's files, the manifest last, and give them their name once they are on the disk."""
    run_id = checkpoint.run_id
    make_folders(target.parent)
    sweep(target.parents[1])  # what a killed process left may be what the disk is full of
    temporary = target.with_name(f"{target.name}.tmp-{run_id}-{os.getpid()}")
    try:
        temporary.mkdir()
        for name, data in parts.items():
            write_synced(temporary / name, data)
        files = {name: _part(data) for name, data in parts.items()}
        files |= {} if checkpoint.others is None else checkpoint.others(temporary)
        write_synced(temporary / MANIFEST, sealed(_manifest(checkpoint, files)))
        sync_folder(temporary)
        try:
            verify(temporary, target.name)
        except Damaged as error:
            raise OSError(errno.EIO, f"read back, {error}") from None
        if target.exists():
            owner = owner_of(target)
            put_aside(target, "damaged" if owner in (run_id, None) else f"of-run-{owner}")
        os.rename(temporary, target)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _unsaved(run: Path, run_id: str, step: int, size: int, error: OSError) -> str:
    try:
        free = f"{shutil.disk_usage(run).free / 2**20:.0f} MiB are free"
    except OSError:
        free = "what is free can't be told"
    last = [saved for saved, folder in folders(run) if saved != step and owner_of(folder) == run_id]
    return (
        f"the checkpoint of step {step} can't be written to {run / 'checkpoints'} ({error.strerror}): it needs "
        f"{size / 2**20:.0f} MiB, {free}. " + (f"The checkpoint of step {last[-1]} is untouched." if last else "")
    ).strip()


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def read_newest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that verifies, and a line for each passed over. Raises UserError as `newest`."""
    return newest_read(run, _read)


def _read(folder: Path) -> Checkpoint:
    """Return a checkpoint; no tensor is made of it before all of it is verified. Raises Damaged."""
    manifest, expected = read_manifest(folder), expected_parts(folder, folder.name)
    identity = _identity(manifest)
    with ExitStack() as stack:
        files = {name: stack.enter_context(open_verified(folder, name, part)) for name, part in expected.items()}
        state = _parsed(STATE, lambda: parse_json(files[STATE].read(), STATE))
        if not isinstance(state, dict):
            raise Damaged(f"{STATE} holds a {type(state).__name__}, not an object")
        model, optimizer = (_tensors(folder, name, files) for name in (MODEL, OPTIMIZER))
    return Checkpoint(manifest["step"], model, optimizer, state, identity, manifest.get("run_id", ""))


def _identity(manifest: dict[str, Any]) -> dict[str, str]:
    identity = manifest.get("identity")
    if not isinstance(identity, dict) or not all(isinstance(mark, str) for mark in identity.values()):
        raise Damaged(f"{MANIFEST} has no identity of names and fingerprints")
    return identity


def _tensors(folder: Path, name: str, files: dict[str, BufferedReader]) -> dict[str, Tensor]:
    """Return the tensors of a file and of those that other ranks wrote beside it."""
    found = _parsed(name, lambda: Tensors([TensorFile(files[part], part) for part in parts_of(name, files)]))
    require_memory(sum(size_of(files[part]) for part in parts_of(name, files)), str(folder / name))
    return _parsed(name, found.read_all)


def _parsed(name: str, parse: Callable[[], T]) -> T:
    """Return what `parse` makes of a file that is what its manifest says. Raises Damaged where that isn't anything."""
    try:
        return parse()
    except UserError as error:
        raise Damaged(f"{name} is what its manifest says, and can't be read ({error})") from None


def read(run: Path, step: int) -> Checkpoint:
    """Return the checkpoint of a step. Raises UserError when it doesn't verify."""
    folder = folder_of(run, step)
    try:
        return _read(folder)
    except Damaged as error:
        raise UserError(f"{folder}: {error}. Take another checkpoint, or restore it from a copy.") from None


def load_run_settings(run: Path) -> tuple[Hparams, Tokenizer]:
    """Return the settings and tokenizer that a run folder holds. Raises UserError when it isn't a run folder."""
    if not (run / HPARAMS).is_file() or not (run / TOKENIZER).is_file():
        raise UserError(
            f"{run} is not a run folder: it holds no {HPARAMS} and {TOKENIZER}. Give the folder that `moelet train` "
            "wrote, such as runs/hparams-20260131-120000."
        )
    return read_hparams_inside(run, HPARAMS), Tokenizer.load_inside(run, TOKENIZER)


def load(run: str | Path, device: str | torch.device = "cpu", step: int | None = None) -> Loaded:
    """Return the newest verified model of a run folder, in evaluation mode, with its tokenizer and settings; or that of
    `step`, one of `verified`.

    Raises UserError when the folder is no run or has no checkpoint that verifies.
    """
    run = Path(run)
    hparams, tokenizer = load_run_settings(run)
    step, passed = newest(run) if step is None else (step, [])
    if step is None:
        if passed:
            raise UserError(f"{run} holds no model that verifies ({'; '.join(passed)}). Restore one from a copy.")
        again = f"python -m moelet train --resume {shlex.quote(str(run))}"
        raise UserError(f"{run} holds no checkpoint yet. Train it first: {again}")
    folder = folder_of(run, step)
    try:
        expected, identity = expected_parts(folder, folder.name), _identity(read_manifest(folder))
        return Loaded(
            _load_model(run, folder, expected, hparams, tokenizer, identity).to(device), tokenizer, hparams, step
        )
    except Damaged as error:
        raise UserError(f"{folder}: {error}. Restore it from a copy.") from None


def _load_model(
    run: Path, folder: Path, expected: dict[str, Part], hparams: Hparams, tokenizer: Tokenizer, identity: dict[str, str]
) -> GPT:
    """Return the model of a checkpoint, to be evaluated. Raises Damaged, and UserError where it isn't the run's."""
    for name, file, now in (
        ("tokenizer", TOKENIZER, tokenizer.fingerprint),
        ("model", HPARAMS, hparams.model.fingerprint),
    ):
        if identity.get(name) != now:
            raise UserError(f"{run / file} isn't the one that the model was trained with. Restore it from a copy.")
    with ExitStack() as stack:
        names = parts_of(MODEL, expected)
        files = {name: stack.enter_context(open_verified(folder, name, expected[name])) for name in names}
        tensors = _parsed(MODEL, lambda: Tensors([TensorFile(file, str(folder / n)) for n, file in files.items()]))
        refuse_other_shapes(run, tensors.shapes, hparams, tokenizer)
        require_memory(sum(map(size_of, files.values())), f"the model of {run}")
        model = GPT(hparams.model, tokenizer.vocab_size)
        with torch.no_grad():
            for name, parameter in model.state_dict().items():
                parameter.copy_(tensors.read(name))
    return model.eval()


def refuse_other_shapes(run: Path, found: dict[str, tuple[int, ...]], hparams: Hparams, tokenizer: Tokenizer) -> None:
    """Raise UserError unless saved tensors have the names and shapes that the run's settings say: before a model of
    such a size is made.
    """
    settings = hparams.model
    if settings.n_layers <= len(found):
        expected = shapes_of(settings, tokenizer.vocab_size)
        odd = next((name for name in sorted(expected.keys() | found) if expected.get(name) != found.get(name)), None)
        if odd is None:
            return
        reason = f"{odd} has shape {found.get(odd, 'none')}, not {expected.get(odd, 'none')}"
    else:
        reason = f"{settings.n_layers} layers are more than its {len(found)} tensors"
    raise UserError(f"{run / HPARAMS} isn't that of the saved model ({reason}). Restore it from a copy.")
