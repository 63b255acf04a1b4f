"""The lock of a folder in which one process at a time may work: a run's, a study's, that of prepared text.

It is flock's, on the file `.lock`, so a process's end frees it, however it ends. The file says who holds it, and its
holder touches it every BEAT seconds: that counts where flock isn't offered, or doesn't reach other hosts. Needs no
torch.
"""

import errno
import fcntl
import logging
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from moelet.errors import UserError
from moelet.storage.disk import NOT_OFFERED, make_folders
from moelet.storage.intake import open_inside, refuse_links

LOCK = ".lock"
LARGEST = 2**16  # bytes of it: a name
LOG = logging.getLogger("moelet")
BEAT, DEAD_AFTER = 5.0, 20.0  # seconds between signs of life; without one for so long, a holder elsewhere is dead
PATIENCE = 0.5  # seconds: who only looks holds the lock for an instant
SETTLED = 0.3  # seconds after which, without flock, the last of two who wrote their names at once is the holder
HOLDER = re.compile(r"process (\d+) on (\S+) since ")


class Held:
    """A folder's lock in this process's hands."""

    def __init__(self, folder: Path, file: BinaryIO) -> None:
        self.folder, self._file, self._place = folder, file, os.stat(folder)
        self._name = f"{_who()}\n{uuid.uuid4().hex}\n".encode()
        file.truncate(0)
        file.write(self._name)  # at the end, which is the beginning: the file is opened for appending
        file.flush()

    def check(self) -> None:
        """Raise UserError when the lock was lost: its file was removed, or another process is the holder by now."""
        path = self.folder / LOCK
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # somebody removed it: whoever comes now is let in, so come first
            if not os.path.samestat(self._place, os.stat(self.folder)):  # of its name: ours was moved, or isn't mounted
                raise OSError(errno.ESTALE, "it is another folder now", str(self.folder)) from None
            self._file = _take(self.folder)[0]
            self._file.write(self._name)
            self._file.flush()
            return
        if content != self._name:
            raise UserError(
                f"the run folder {self.folder} was taken over by {_holder(content)}, while this process had it. One "
                "process trains in a folder at a time. Nothing was written since. Stop one of the two."
            )

    def beat(self) -> None:
        with suppress(OSError, ValueError):  # ValueError: closed meanwhile
            os.utime(self._file.fileno())

    def release(self) -> None:
        with suppress(OSError):
            if (self.folder / LOCK).read_bytes() == self._name:
                self._file.truncate(0)
        self._file.close()


def _who() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S %z')}"


def _holder(content: bytes) -> str:
    return content.decode(errors="replace").partition("\n")[0].strip() or "another process"


@contextmanager
def lock(folder: Path) -> Iterator[Held]:
    """Hold a folder for this process. Raises UserError when another one holds it; a dead one's lock is free."""
    try:
        make_folders(folder)
        refuse_links(folder)
        file, offered = _take(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the run folder {folder} can't be written to ({error.strerror}). A run needs one. Give another with --run."
        ) from None
    held, done = Held(folder, file), threading.Event()
    beating = threading.Thread(target=_beat, args=(held, done), name="moelet-lock", daemon=True)
    try:
        if not offered:
            LOG.warning(f"{folder} is on a file system without locks: signs of life in its {LOCK} stand in for them")
            time.sleep(SETTLED)
            held.check()
        beating.start()
        yield held
    finally:
        done.set()
        held.release()


def _beat(held: Held, done: threading.Event) -> None:
    while not done.wait(BEAT):
        held.beat()


def _take(folder: Path) -> tuple[BinaryIO, bool]:
    """Return the lock file, locked, and whether there are locks here. Raises UserError where another process has it."""
    limit = time.monotonic() + PATIENCE
    while True:
        file = open(folder / LOCK, "a+b")
        try:
            offered = _flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            if offered is None and time.monotonic() > limit:
                raise refusal(folder, content)
            if offered is not None and _is(file, folder / LOCK):
                if _lives_elsewhere(file, content, offered):
                    raise refusal(folder, content)
                return file, offered
        except BaseException:
            file.close()
            raise
        file.close()
        time.sleep(0.02)


def _flock(file: BinaryIO, kind: int) -> bool | None:
    """Take the lock without waiting; return None where another process has it, False where there are no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        return False
    return True


def _is(file: BinaryIO, path: Path) -> bool:
    """Return whether the path still leads to this file: somebody may have removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _lives_elsewhere(file: BinaryIO, content: bytes, offered: bool) -> bool:
    """Return whether the lock file's content is that of a live process which flock doesn't tell of."""
    found = HOLDER.match(content.decode(errors="replace"))
    if found is None or (found[2] == socket.gethostname() and (offered or not _runs(int(found[1])))):
        return False
    with tempfile.TemporaryFile(dir=Path(file.name).parent) as now:  # by the file system's own clock
        return abs(os.fstat(now.fileno()).st_mtime - os.fstat(file.fileno()).st_mtime) < DEAD_AFTER


def _runs(process: int) -> bool:
    if process == os.getpid():  # in a new container the same number comes again
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def refusal(folder: Path, content: bytes) -> UserError:
    return UserError(
        f"the run folder {folder} is in use by {_holder(content)}. One process trains in a folder at a time. Wait for "
        "it, stop it, or give another folder with --run."
    )


def refuse_held(folder: Path | None) -> None:
    """Raise UserError when another process holds the folder, if there is one: a look, before what takes time."""
    if folder is None:
        return
    limit = time.monotonic() + PATIENCE
    while True:
        try:
            with open_inside(folder, LOCK, LARGEST) as file:
                if _flock(file, fcntl.LOCK_SH) is not None:
                    return
                content = file.read()
        except OSError:  # no lock, no folder: what is wrong with that is told later
            return
        if content or time.monotonic() > limit:  # else its holder is about to write who it is
            raise refusal(folder, content)
        time.sleep(0.02)
