"""Files that are whole or not there, whenever the power goes, and how one tells that they are what was written;
and the files and folders that a command's results go to.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moelet.errors import UserError

# what mounted drives and network folders answer to locks and syncs that they don't have
NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def sync(handle: int) -> None:
    """Have what was written on the disk before returning, where the file system knows what that means."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk before returning."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        sync(handle)
    finally:
        os.close(handle)


def make_folders(folder: Path) -> None:
    """Make a folder, and those above it that aren't there, each with its name on the disk before returning."""
    if not folder.parent.exists():
        make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    with suppress(PermissionError):  # one may enter a folder without being allowed to list it
        sync_folder(folder.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file that nobody looks for yet; on the disk before returning."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        sync(file.fileno())


def write_file(path: Path, data: bytes) -> None:
    """Write a file: cut off at any point, the old one or the new one is there; on the disk before returning."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a link, in a folder from a stranger, would lead out of it
        write_synced(temporary, data)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sealed(manifest: dict[str, Any]) -> bytes:
    """Return the file of a manifest, its own SHA-256 included."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1).encode()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(path: Path | None) -> None:
    """Raise UserError, before any work, for a file that can't be written where it is wanted."""
    if path is None:
        return
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            writable = not path.exists() or (path.is_file() and os.access(path, os.W_OK))
    except OSError:
        writable = False
    if not writable:
        raise UserError(
            f"{path} can't be written: it is a folder, or its folder is not there, or one of them can't be changed. "
            "Give another path."
        )


def make_folder(path: Path | None) -> None:
    """Make the folder that results go to. Raises UserError, before any work, where nothing can be written there."""
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{path} can't be a folder for results ({error.strerror}). Give another with --out.") from None


def write_json(path: Path | None, result: Any) -> None:
    """Write a command's results as JSON, where they are wanted."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def refuse_existing(out: Path) -> None:
    """Raise UserError, before any work, for a place where something is, or where nothing can be."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} is there already. An export needs a place of its own. Give another --out.")
    nearest = next(folder for folder in out.absolute().parents if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise UserError(f"{out} can't be made: {nearest} can't be written to. Give another --out.")


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Give a path to write to, and rename it into place at the end; cut short or failing, nothing is there."""
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    _remove(temporary)  # left by a killed process of the same number: 1 in a container
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        refuse_existing(out)  # somebody else may have been quicker, and os.rename wouldn't mind a file
        os.rename(temporary, out)
        sync_folder(out.absolute().parent)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
