"""Opens what a stranger may have written: a regular file, inside its folder, of bounded size; JSON without surprises.

What a file means is not known here. Nothing is read, or memory taken, before the size is known to be one that such a
file can have, and no link is followed on the way from a folder to a file in it.
"""

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from moelet.errors import UserError

LARGEST_JSON = 4 * 2**20  # bytes; an index of 30,000 tensors takes 3 MB, and in memory it takes up to 30 times its size
LARGEST_LINES = 2**30  # bytes of a text that is read line by line: measurements, tasks
LONGEST_LINE = 16 * 2**20  # bytes; a million numbers
DEEPEST = 64  # lists in lists; what moelet writes has 8
MARKS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{\]}]', re.DOTALL)  # a whole string, else a bracket
ADVICE = "Don't trust it, or give another."
KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device", stat.S_IFLNK: "a link",
}  # fmt: skip


def open_file(path: Path, most: int) -> BufferedReader:
    """Return the file that a person named, for reading. Raises UserError for what is no regular file or over `most`
    bytes, and OSError where it can't be opened.
    """
    _require_regular(os.stat(path), path)  # opening a pipe waits for a writer, a device may do anything
    return _checked(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), path, most)


def open_inside(folder: Path, name: str, most: int) -> BufferedReader:
    """Return a file that lies in a folder, `name` being its path from there with "/" between.

    Raises UserError for a name that leads out, a link on the way, what is no regular file, or over `most` bytes;
    OSError where it isn't there or can't be opened. The folder itself may be a link: a person named it.
    """
    parts, path = name_parts(folder, name), folder / name
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            _refuse_link(at, part, path)
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = below
        _refuse_link(at, parts[-1], path)
        _require_regular(os.stat(parts[-1], dir_fd=at, follow_symlinks=False), path)
        handle = os.open(parts[-1], os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    finally:
        os.close(at)
    return _checked(handle, path, most)


def lines_inside(folder: Path, name: str, most: int = LARGEST_LINES) -> Iterator[str]:
    """Yield the lines of a text file that lies in a folder, none where there is no such file; what isn't UTF-8 becomes
    U+FFFD, and a line over LONGEST_LINE comes in parts. Raises as `open_inside`.
    """
    try:
        file = open_inside(folder, name, most)
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(LONGEST_LINE):
            yield line.decode("utf-8", errors="replace").rstrip("\r\n")


def refuse_links(folder: Path) -> None:
    """Raise UserError where anything right in a folder is a link: what is written to it would land elsewhere. Nor may
    it be a pipe or device, which never ends.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_symlink():
            raise UserError(
                f"{folder / entry.name} is a link. A folder's files lie in it. Copy what it leads to: cp -rL."
            )
        if not (entry.is_dir() or entry.is_file()):
            raise UserError(f"{folder / entry.name} is neither a file nor a folder. Don't trust it, or remove it.")


def name_parts(folder: Path, name: Any) -> list[str]:
    """Return the parts of a path from the folder to a file in it. Raises UserError for what is none, or leads out."""
    parts = name.split("/") if isinstance(name, str) and name.isprintable() else []
    if not parts or any(part in ("", ".", "..") for part in parts):
        raise UserError(f"{folder} names the file {shown(name)}. A folder's files lie in it. {ADVICE}")
    return parts


def shown(value: Any) -> str:
    """Return a stranger's value, short enough to be read."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _refuse_link(at: int, part: str, path: Path) -> None:
    if stat.S_ISLNK(os.stat(part, dir_fd=at, follow_symlinks=False).st_mode):
        raise UserError(
            f"{path} leads out of its folder, or may: {part} is a link. Copy what it leads to in its place: cp -rL."
        )


def _require_regular(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise UserError(f"{path} is {kind}. It must be a file. Give one.")


def _checked(handle: int, path: Path, most: int) -> BufferedReader:
    file = os.fdopen(handle, "rb")
    try:
        found = os.fstat(handle)
        _require_regular(found, path)
        if found.st_size > most:
            raise UserError(f"{path} has {found.st_size} bytes. It has at most {most}. {ADVICE}")
    except UserError:
        file.close()
        raise
    return file


def size_of(file: BufferedReader) -> int:
    return os.fstat(file.fileno()).st_size


def parse_json(data: bytes | str, where: str) -> Any:
    """Return what JSON says, NaN included. Raises UserError, naming `where`, for what isn't JSON, nests deeper than
    DEEPEST, or names a key twice.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        _refuse_depth(text)
        return json.loads(text, object_pairs_hook=_without_twins)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:  # ValueError also for a number of more than 4300 digits
        raise UserError(f"{where} is not valid JSON: {error}. Mend the file at that place.") from None


def _refuse_depth(text: str) -> None:
    """Raise ValueError where lists and objects nest deeper than DEEPEST: what reads them would take the stack."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return
    depth = 0
    for found in MARKS.finditer(text):
        mark = found[0]
        if mark in "[{":
            depth += 1
            if depth > DEEPEST:
                raise ValueError(f"it nests deeper than {DEEPEST}")
        elif mark in "]}":
            depth -= 1


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise UserError(f"it names {', '.join(map(repr, twice[:3]))} twice. Keep one of each.")
    return found
