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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
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
from moelet.storage.tensor_file import ALL, TensorFile, Tensors
from moelet.tokenizer import Tokenizer

HPARAMS, TOKENIZER = "hparams.json", "tokenizer.model"
T = TypeVar("T")


# Has other ranks write their parts of a checkpoint into a folder; what it returns waits for them, in any thread, and
# returns what they wrote.
Others = Callable[[Path], Callable[[], dict[str, Part]]]


class Checkpoint(NamedTuple):
    """What a checkpoint holds; the manifest says what it belongs to."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    identity: dict[str, str]  # fingerprints that must be equal at resume, by name
    run_id: str = ""  # of the run that it is of; "" for those from before there were ids
    others: Others | None = None  # where no rank has all of the model
    shapes: dict[str, tuple[int, ...]] = {}  # noqa: RUF012  of the model's tensors, whole; of one that was read


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
    Writing(run, checkpoint).finish()


class Writing:
    """A checkpoint on its way to the disk: a copy of what goes into it, and the folder where it is being made."""

    def __init__(self, run: Path, checkpoint: Checkpoint) -> None:
        """Copy the tensors, which may change from then on, and have other ranks do so. Raises SaveError."""
        self._files = serialised(checkpoint)
        self._run, self._made = run, checkpoint._replace(model={}, optimizer={})
        self._target = folder_of(run, checkpoint.step)
        name = f"{self._target.name}.tmp-{checkpoint.run_id}-{os.getpid()}"
        self._temporary: Path | None = self._target.with_name(name)
        self._others: Callable[[], dict[str, Part]] = dict
        with self._telling():
            if owner_of(self._target) == checkpoint.run_id and fault(self._target) is None:
                self._temporary = None
                return
            make_folders(self._target.parent)
            sweep(run)  # what a killed process left may be what the disk is full of
            self._temporary.mkdir()
            if checkpoint.others is not None:
                self._others = checkpoint.others(self._temporary)

    def finish(self) -> None:
        """Write it, in any thread; as `save` says."""
        with self._telling():
            if self._temporary is not None:
                self._write(self._temporary)
            sync_folder(self._target.parent)
            for later, folder in folders(self._run):
                if later > self._made.step and owner_of(folder) in (self._made.run_id, None):
                    put_aside(folder, "damaged")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            size = sum(map(len, self._files.values()))
            raise SaveError(_unsaved(self._run, self._made.run_id, self._made.step, size, error), self._run) from error

    def _write(self, temporary: Path) -> None:
        """Write the files, the manifest last, and give them their name once they are on the disk."""
        run_id, target = self._made.run_id, self._target
        try:
            for name, data in self._files.items():
                write_synced(temporary / name, data)
            files = {name: _part(data) for name, data in self._files.items()} | self._others()
            write_synced(temporary / MANIFEST, sealed(_manifest(self._made, files)))
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
            with suppress(OSError, UserError):
                self._others()  # they write there
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def pack_tensors(rank: int, model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> dict[str, bytes]:
    """Return the files that a rank gives to a checkpoint."""
    tensors = ((MODEL, model), (OPTIMIZER, optimizer))
    return {of_rank(name, rank): safetensors.torch.save(_on_cpu(some)) for name, some in tensors}


def write_packed(folder: Path, files: dict[str, bytes]) -> dict[str, Part]:
    """Write a rank's files into the folder where a checkpoint is being made; return what was written."""
    for name, data in files.items():
        write_synced(folder / name, data)
    return {name: _part(data) for name, data in files.items()}


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


def whole(name: str, rows: int) -> slice:
    """The part of a tensor that is all of it."""
    return slice(0, rows)


def read_newest(run: Path, part: Callable[[str, int], slice] = whole) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that verifies, and a line for each passed over. Raises UserError as `newest`.

    `part(name, rows)` says which rows are read of the model's tensor `name` and of its optimizer's state.
    """
    return newest_read(run, lambda folder: _read(folder, part))


def _read(folder: Path, part: Callable[[str, int], slice]) -> Checkpoint:
    """Return a checkpoint; no tensor is made of it before all of it is verified. Raises Damaged."""
    manifest, expected = read_manifest(folder), expected_parts(folder, folder.name)
    identity = _identity(manifest)
    with ExitStack() as stack:
        files = {name: stack.enter_context(open_verified(folder, name, part)) for name, part in expected.items()}
        state = _parsed(STATE, lambda: parse_json(files[STATE].read(), STATE))
        if not isinstance(state, dict):
            raise Damaged(f"{STATE} holds a {type(state).__name__}, not an object")
        of_model, of_optimizer = (_tensors(name, files) for name in (MODEL, OPTIMIZER))
        model = _read_parts(folder / MODEL, of_model, part)
        optimizer = _read_parts(folder / OPTIMIZER, of_optimizer, lambda key, n: part(key.rpartition(":")[0], n))
    run_id = manifest.get("run_id", "")
    return Checkpoint(manifest["step"], model, optimizer, state, identity, run_id, shapes=of_model.shapes)


def _identity(manifest: dict[str, Any]) -> dict[str, str]:
    identity = manifest.get("identity")
    if not isinstance(identity, dict) or not all(isinstance(mark, str) for mark in identity.values()):
        raise Damaged(f"{MANIFEST} has no identity of names and fingerprints")
    return identity


def _tensors(name: str, files: dict[str, BufferedReader]) -> Tensors:
    """Return the tensors of a file and of those that other ranks wrote beside it."""
    return _parsed(name, lambda: Tensors([TensorFile(files[file], file) for file in parts_of(name, files)]))


def _read_parts(path: Path, tensors: Tensors, part: Callable[[str, int], slice]) -> dict[str, Tensor]:
    """Return the rows of each tensor that `part` says, once there is memory for them."""
    rows = {name: part(name, shape[0]) if shape else ALL for name, shape in tensors.shapes.items()}
    require_memory(sum(tensors.bytes_of(name, rows[name]) for name in rows), str(path))
    return _parsed(path.name, lambda: {name: tensors.read(name, rows[name]) for name in rows})


def _parsed(name: str, parse: Callable[[], T]) -> T:
    """Return what `parse` makes of a file that is what its manifest says. Raises Damaged where that isn't anything."""
    try:
        return parse()
    except UserError as error:
        raise Damaged(f"{name} is what its manifest says, and can't be read ({error})") from None


def read(run: Path, step: int, part: Callable[[str, int], slice] = whole) -> Checkpoint:
    """Return the checkpoint of a step, `part` of it as in `read_newest`. Raises UserError when it doesn't verify."""
    folder = folder_of(run, step)
    try:
        return _read(folder, part)
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
        tensors = _tensors(MODEL, files)
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
