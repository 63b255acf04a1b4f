"""The failures a person can act on, and how each ends the process. Anything else is a bug and shows its traceback."""

import difflib
import errno
import os
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from typing import IO, TypeVar

T = TypeVar("T")
DISK = {  # what a disk's answers to writing mean, and what to do
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "is full: make room"),
    **dict.fromkeys((errno.EIO, errno.EROFS), "fails: mend that"),
}


class UserError(ValueError):
    """The given files or settings don't fit, or don't fit together: exit code 78.

    The message has three parts: what was given, what is needed, what to do.
    """

    exit_code = 78


class TemporaryError(RuntimeError):
    """The outside world failed and nothing is lost: run the same command again. Exit code 75."""

    exit_code = 75


class Interrupted(Exception):
    """A signal asked the run to stop, and it is saved. Exit code 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, signal_number: int, message: str) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(message)


def require(package: str, extra: str) -> None:
    """Raise UserError, with what to run, where an optional package isn't installed."""
    if find_spec(package) is None:
        raise UserError(
            f"{package} isn't installed, and this needs it. Run pip install {package}, or, for all of it, "
            f'pip install -e ".[{extra}]".'
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def pick(table: Mapping[str, T], name: str, setting: str) -> T:
    """Return `table[name]`; raise UserError with the names there are when it is missing."""
    if name in table:
        return table[name]
    raise UserError(f"{setting} is '{name}'. It must be one of: {', '.join(table)}.{nearest(name, table)}")


def printable(text: str) -> str:
    """Return text that can't drive a terminal: control characters but newline and tab, and what no encoding takes, are
    shown as U+FFFD."""
    shown = (
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return "".join(shown)


def complain(text: str) -> None:
    """Say why the process ends; where nobody hears it any more, the exit code still does."""
    try:
        print(f"moelet: {printable(text)}", file=sys.stderr, flush=True)
    except OSError:
        lead_nowhere(sys.stderr)


def lead_nowhere(file: IO[str]) -> None:
    """Have a file whose reader has gone take whatever comes, so that what waits in it doesn't fail at the end."""
    with suppress(OSError, ValueError):  # not a file of the system's
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)
