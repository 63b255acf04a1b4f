"""Checkpoints that are whole or absent: atomic save, verification, retention, the run folder's lock, load().

A checkpoint is written into a temporary folder, every file synced, the manifest with each file's SHA-256 last, and
renamed into place. Nothing in it is code: safetensors and JSON.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from moelet.disk import NOT_OFFERED, file_sha256, sealed, sync_folder, write_synced
from moelet.errors import TemporaryError, UserError
from moelet.hparams import Hparams, read_hparams
from moelet.modelling import GPT
from moelet.tokenizer import Tokenizer

FORMAT = 1
LOG = logging.getLogger("moelet")
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
HPARAMS, TOKENIZER, LOCK = "hparams.json", "tokenizer.model", ".lock"


class Checkpoint(NamedTuple):
    """What a checkpoint holds; the manifest says what it belongs to."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    identity: dict[str, str]  # fingerprints that must be equal at resume, by name


class Loaded(NamedTuple):
    """A trained run, ready to use."""

    model: GPT
    tokenizer: Tokenizer
    hparams: Hparams
    step: int


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08}"


def checkpoint_steps(run: Path) -> list[int]:
    """Return the steps of the checkpoints of a run, oldest first. Only names count, never times of files.

    A folder has such a name only once it is complete; one that no longer is was damaged, and `fault` says so.
    """
    names = [path.name[5:] for path in (run / "checkpoints").glob("step-*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def _remove(folder: Path) -> None:
    """Remove a checkpoint: cut off at any point, it is whole or no longer a checkpoint."""
    aside = folder.with_name(f"{folder.name}.tmp-old")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def serialised(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the files of a checkpoint, all but its manifest."""
    return {
        MODEL: safetensors.torch.save(_on_cpu(checkpoint.model)),
        OPTIMIZER: safetensors.torch.save(_on_cpu(checkpoint.optimizer)),
        STATE: json.dumps(checkpoint.state).encode(),
    }


def save(run: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint; either all of it is there afterwards, or none. Those of later steps are removed: a run
    comes to an earlier step again only where they didn't verify.

    Raises TemporaryError when the disk doesn't take it; what was there before is untouched.
    """
    target = _folder(run, checkpoint.step)
    parts = serialised(checkpoint)
    manifest = {
        "format": FORMAT,
        "step": checkpoint.step,
        "identity": checkpoint.identity,
        "files": {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in parts.items()},
        "made_by": {"torch": torch.__version__, "python": platform.python_version()},
    }
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process of the same number: 1 in a container
        temporary.mkdir(parents=True)
        for name, data in parts.items():
            write_synced(temporary / name, data)
        write_synced(temporary / MANIFEST, sealed(manifest))
        sync_folder(temporary)
        if target.exists():  # the same step, passed over at the resume
            _remove(target)
        os.rename(temporary, target)
        sync_folder(target.parent)
        for later in checkpoint_steps(run):
            if later > checkpoint.step:
                _remove(_folder(run, later))
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        size = sum(map(len, parts.values())) / 2**20
        free = shutil.disk_usage(run).free / 2**20
        last = checkpoint_steps(run)
        raise TemporaryError(
            f"the checkpoint of step {checkpoint.step} can't be written to {target.parent} ({error.strerror}): "
            f"it needs {size:.0f} MiB, {free:.0f} MiB are free. "
            + (f"The checkpoint of step {last[-1]} is untouched. " if last else "")
            + f"Mend that and run: python -m moelet train --resume {run}"
        ) from error


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fault(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, or None: every file there, of its size and SHA-256."""
    try:
        raw = (folder / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} is of format {manifest['format']}, this version reads {FORMAT}"
        digest = manifest.pop("sha256")
        if sealed(manifest) != raw:
            return f"{MANIFEST} doesn't have the SHA-256 that it says, {digest}"
        if folder.name != _folder(folder, manifest["step"]).name:
            return f"{MANIFEST} is that of step {manifest['step']}"
        expected = {name: (manifest["files"][name]["bytes"], manifest["files"][name]["sha256"]) for name in _PARTS}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{MANIFEST} can't be read ({type(error).__name__}: {error})"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, its manifest says {size}"
        actual = file_sha256(path)
        if actual != digest:
            return f"{name} has SHA-256 {actual}, its manifest says {digest}"
    return None


_PARTS = (MODEL, OPTIMIZER, STATE)


def newest(run: Path) -> tuple[int | None, list[str]]:
    """Return the step of the newest checkpoint that verifies (None: there is none), and a line for each passed over."""
    passed: list[str] = []
    for step in reversed(checkpoint_steps(run)):
        wrong = fault(_folder(run, step))
        if wrong is None:
            return step, passed
        passed.append(f"checkpoint of step {step} passed over: {wrong}")
    return None, passed


def read(run: Path, step: int) -> Checkpoint:
    """Return a checkpoint that `newest` has verified. Raises UserError when its tensors can't be read."""
    folder = _folder(run, step)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return Checkpoint(
            step,
            safetensors.torch.load_file(folder / MODEL),
            safetensors.torch.load_file(folder / OPTIMIZER),
            json.loads((folder / STATE).read_bytes()),
            manifest["identity"],
        )
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{folder} can't be read ({error}). Resume from an earlier checkpoint: remove it.") from None


def read_state(run: Path, step: int) -> dict[str, Any]:
    """Return the small state of a checkpoint that need not verify; empty where it can't be read."""
    try:
        state = json.loads((_folder(run, step) / STATE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def retain(run: Path, keep: int, best: int | None) -> None:
    """Remove all but the `keep` newest checkpoints and the best one, and what interrupted saves left behind."""
    steps = checkpoint_steps(run)
    for step in steps[:-keep]:
        if step != best:
            with suppress(OSError):
                _remove(_folder(run, step))
    for leftover in (run / "checkpoints").glob("step-*.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Hold the run folder for this process. Raises UserError when another one holds it; a dead one's lock is free."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / LOCK, "a+", encoding="utf-8")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the run folder {run} can't be written to ({error.strerror}). A run needs one. Give another with --run."
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NOT_OFFERED:
                LOG.warning(f"{run} is on a file system without locks: take care that only one process trains there")
                yield
                return
            file.seek(0)
            raise UserError(
                f"the run folder {run} is in use by {file.read().strip() or 'another process'}. One process trains in "
                "a folder at a time. Wait for it, stop it, or give another folder with --run."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield


def load_run_settings(run: Path) -> tuple[Hparams, Tokenizer]:
    """Return the settings and tokenizer that a run folder holds. Raises UserError when it isn't a run folder."""
    if not (run / HPARAMS).is_file() or not (run / TOKENIZER).is_file():
        raise UserError(
            f"{run} is not a run folder: it holds no {HPARAMS} and {TOKENIZER}. Give the folder that `moelet train` "
            "wrote, such as runs/hparams-20260131-120000."
        )
    return read_hparams(run / HPARAMS), Tokenizer.load(run / TOKENIZER)


def load(run: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """Return the newest verified model of a run folder, in evaluation mode, with its tokenizer and settings.

    Raises UserError when the folder is no run or has no checkpoint that verifies.
    """
    run = Path(run)
    hparams, tokenizer = load_run_settings(run)
    step, passed = newest(run)
    if step is None:
        if passed:
            raise UserError(f"{run} holds no model that verifies ({'; '.join(passed)}). Restore one from a copy.")
        raise UserError(f"{run} holds no checkpoint yet. Train it first: python -m moelet train --resume {run}")
    identity = json.loads((_folder(run, step) / MANIFEST).read_bytes())["identity"]
    for name, file, now in (
        ("tokenizer", TOKENIZER, tokenizer.fingerprint),
        ("model", HPARAMS, hparams.model.fingerprint),
    ):
        if identity.get(name) != now:
            raise UserError(f"{run / file} isn't the one that the model was trained with. Restore it from a copy.")
    model = GPT(hparams.model, tokenizer.vocab_size)
    try:
        model.load_state_dict(safetensors.torch.load_file(_folder(run, step) / MODEL))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{run / HPARAMS} isn't that of the saved model ({reason}). Restore it from a copy.") from None
    return Loaded(model.to(device).eval(), tokenizer, hparams, step)
