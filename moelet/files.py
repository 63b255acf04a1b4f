"""Text from files of the machine: which files the settings name, and the documents in each."""

import codecs
import glob
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from moelet.documents import Cursor, Document, Items, Skipped, checked, no_field
from moelet.errors import UserError
from moelet.hparams import SourceSettings

ENDINGS = (".txt", ".md", ".py", ".jsonl")
PART = 16 * 2**20  # bytes of a text file held at once
LARGEST_ROW = 256 * 2**20  # bytes of a .jsonl row; ten thousand books
SAMPLE = 64 * 2**10  # bytes at either end of a file that its fingerprint reads

S = TypeVar("S", bound=SourceSettings)
Parts = Iterator[tuple[Document | Skipped, int, int]]  # with the bytes, and the rows or parts, read of the file


def _find_files(settings: SourceSettings) -> list[Path]:
    """Return the files that settings.files names, sorted, each once; raise UserError where it names none."""
    patterns = [settings.files] if isinstance(settings.files, str) else settings.files or []
    found: set[Path] = set()
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        paths = [path for match in matches for path in _below(Path(match))]
        if not paths:
            raise UserError(
                f"data.files names {pattern!r} and no file matches (the current directory is {os.getcwd()}). "
                f"It must name files or folders with {', '.join(ENDINGS)}. Set data.files."
            )
        found.update(path.resolve() for path in paths)
    return sorted(found)


def _below(path: Path) -> Iterator[Path]:
    """Yield the file itself, or the text files of a folder and its folders, those with a dot first left out."""
    if not path.is_dir():
        if path.suffix not in ENDINGS:
            raise UserError(f"{path} doesn't end in {', '.join(ENDINGS)}. Convert it, or take it out of data.files.")
        yield path
    for folder, subfolders, names in os.walk(path):
        if ".lock" in names:  # a run's folder: what it writes must not become what it reads
            subfolders.clear()
            continue
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if name.endswith(ENDINGS))


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}). Mend that, or take it out of data.files.") from None


def read_files(settings: SourceSettings, seed: int, epoch: int, cursor: Cursor | None) -> Items:
    """A cursor is the place in the permuted files, the bytes read of that file, and the rows or parts read of it."""
    paths = _find_files(settings)
    paths = [paths[i] for i in np.random.default_rng([seed, epoch]).permutation(len(paths))]
    if cursor is None:
        _check_first_row([path for path in paths if path.suffix == ".jsonl"][:1], settings.text_field)
        cursor = {"file": 0, "offset": 0, "row": 0}
    for k in range(cursor["file"], len(paths)):
        offset, row = (cursor["offset"], cursor["row"]) if k == cursor["file"] else (0, 0)
        with _open(paths[k]) as file:
            name, field, rows = str(paths[k]), settings.text_field, paths[k].suffix == ".jsonl"
            items = _read_rows(file, name, field, offset, row) if rows else _read_parts(file, name, offset, row)
            for item, offset, row in items:
                yield item, {"file": k, "offset": offset, "row": row}


def _read_parts(file: BinaryIO, name: str, offset: int, row: int) -> Parts:
    """Yield the parts of a text file from `offset`, cut at line ends, each with the offset and number after it."""
    size = os.fstat(file.fileno()).st_size
    if row == 0 and not _is_utf8(file):
        yield Skipped("invalid UTF-8", name), size, 1
        return
    ends = row > 0 and offset >= size
    while not ends:
        file.seek(offset)
        data = file.read(PART)
        starts, ends = offset == 0, len(data) < PART or offset + len(data) >= size
        end = len(data) if ends else data.rfind(b"\n") + 1 or len(data)
        text, used = codecs.utf_8_decode(data[:end], "strict", ends)  # leaves a character cut in two to the next part
        offset, row = offset + used, row + 1
        text = text.removeprefix("\ufeff") if starts else text
        yield (checked(text, name) if starts and ends else Document(text, name, starts, ends)), offset, row


def _is_utf8(file: BinaryIO) -> bool:
    """Return whether the whole file is UTF-8, so that no document breaks off after its first parts."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while data := file.read(PART):
            decoder.decode(data)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _read_rows(file: BinaryIO, name: str, field: str, offset: int, row: int) -> Parts:
    """Yield the rows of a .jsonl file from `offset`, each with the offset and number after it."""
    file.seek(offset)
    while line := file.readline(LARGEST_ROW + 1):
        offset, row, where = offset + len(line), row + 1, f"{name}:{row + 1}"
        if len(line) <= LARGEST_ROW:
            yield _parse(line.removeprefix(codecs.BOM_UTF8) if row == 1 else line, field, where), offset, row
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(PART)
            offset += len(line)
        yield Skipped("over-long", where), offset, row


def _parse(line: bytes, field: str, where: str) -> Document | Skipped:
    if line.isspace() or not line:
        return Skipped("empty", where)
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return Skipped("invalid UTF-8", where)
    except (ValueError, RecursionError):  # ValueError: bad JSON, or a number of more than 4300 digits
        return Skipped("invalid JSON", where)
    if not isinstance(record, dict) or field not in record:
        return Skipped("no text field", where)
    return checked(record[field], where)


def _check_first_row(paths: list[Path], field: str) -> None:
    """Raise UserError when the first row of a .jsonl file has fields, but not the one that holds the text."""
    for path in paths:
        with _open(path) as file:
            line = file.readline(LARGEST_ROW).removeprefix(codecs.BOM_UTF8)
        if _parse(line, field, "") == Skipped("no text field", "") and isinstance(record := json.loads(line), dict):
            raise no_field(f"row 1 of {path}", field, list(record))


def fingerprint_files(settings: SourceSettings) -> str:
    digest = hashlib.sha256(settings.text_field.encode())
    for path in _find_files(settings):
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"\0{path.name}\0{size}\0".encode() + file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def pin_files(settings: S) -> S:
    """Return the settings with absolute paths, so that the run can go on from anywhere."""
    names = [settings.files] if isinstance(settings.files, str) else settings.files or []
    return settings.model_copy(update={"files": [os.path.abspath(name) for name in names]})
