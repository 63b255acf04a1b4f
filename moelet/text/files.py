"""Text from files of the machine: which files the settings name, and the documents in each."""

import codecs
import errno
import glob
import hashlib
import io
import json
import logging
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import pyarrow as pa

from moelet.errors import UserError
from moelet.sections import SourceSettings
from moelet.storage.intake import KINDS, open_file
from moelet.text.decompress import BLOCK, CODECS, Decompressed
from moelet.text.documents import Cursor, Document, Items, Parts, Skipped, checked, no_field, place_in
from moelet.text.pulse import beat
from moelet.text.tables import LARGEST_TEXT, fields_of, read_table

PART = 16 * 2**20  # bytes of a text file held at once
LARGEST_ROW = LARGEST_TEXT  # bytes of a .jsonl row
MOST_OPENED = 2 * 2**20  # brackets in one: as many empty lists take 150 MB
SAMPLE, SAMPLED = 64 * 2**10, 128 * 2**20  # bytes of a block that a fingerprint reads, and of all: a tenth of a second
DAMAGE = (UnicodeDecodeError, EOFError, OSError, pa.ArrowException)  # what reading a file that is broken raises

LOG = logging.getLogger("moelet")
S = TypeVar("S", bound=SourceSettings)
Reader = Callable[[Path, str, int, int], Parts]  # of a file: its path, the field, the offset and number to go on from


def _find_files(settings: SourceSettings) -> list[Path]:
    """Return the files that settings.files names, sorted, each once; raise UserError where it names none."""
    patterns = [settings.files] if isinstance(settings.files, str) else settings.files or []
    found: dict[Path, Path] = {}  # names by what they lead to; the target of a link needs no ending
    for pattern in patterns:
        if os.path.exists(pattern):
            paths = list(_below(Path(pattern), Path(pattern)))
        else:
            top = next(path for path in (Path(pattern), *Path(pattern).parents) if not glob.has_magic(str(path)))
            matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
            paths = [path for match in matches if _belongs(match, top) for path in _below(match, top)]
        if not paths:
            raise UserError(
                f"data.files names {pattern!r} and no file matches (the current directory is {os.getcwd()}). "
                f"It must name files that end in {ENDINGS}, or folders with such. Set data.files."
            )
        for path in paths:
            name, target = path.parent.resolve() / path.name, path.resolve()
            found[target] = min(name, found.get(target, name))
    return sorted(found.values())


def _below(path: Path, top: Path) -> Iterator[Path]:
    """Yield the file itself, or the text files of a folder and its folders, those with a dot first left out.

    A link that a person names is theirs; what is found in a folder must lie in `top`.
    """
    if not path.is_dir():
        if not path.name.endswith(tuple(READERS)):
            raise UserError(f"{path} doesn't end in {ENDINGS}. Convert it, or take it out of data.files.")
        yield path
    for folder, subfolders, names in os.walk(path):
        if ".lock" in names:  # a run's folder: what it writes must not become what it reads
            subfolders.clear()
            continue
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found = (Path(folder, name) for name in names if name.endswith(tuple(READERS)))
        yield from (name for name in found if _belongs(name, top))


def _belongs(path: Path, top: Path) -> bool:
    """Return whether what was found in a folder lies in it, and isn't what opening would wait for; say what isn't read.

    Links of the Hugging Face Hub's cache lead from `snapshots` to `blobs`, and may. One that leads to nothing is told
    when it is opened.
    """
    target, top = Path(os.path.realpath(path)), Path(os.path.realpath(top))
    blobs = [above.parent / "blobs" for above in (top, *top.parents) if above.name == "snapshots"]
    if not any(target.is_relative_to(place) for place in (top, *blobs)):
        _tell(f"{path} is left out: it leads out of {top}, to {target}. To read it, name it in data.files, or copy it")
        return False
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        mode = stat.S_IFLNK if error.errno == errno.ELOOP else stat.S_IFREG
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        _tell(f"{path} is left out: it is {KINDS[stat.S_IFMT(mode)]}, not a file")
        return False
    return True


def _open(path: Path) -> BinaryIO:
    try:
        return open_file(path, sys.maxsize)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}). Mend that, or take it out of data.files.") from None


def _open_text(path: Path, offset: int = 0) -> BinaryIO:
    """Return the text of a file, decompressed, from `offset` in its bytes; what comes before is decompressed again."""
    file = _open(path)
    if path.suffix not in CODECS:
        file.seek(offset)
        return file
    text = io.BufferedReader(Decompressed(file, path.suffix), BLOCK)
    for start in range(0, offset, PART):
        text.read(min(PART, offset - start))
    return text


def read_files(settings: SourceSettings, seed: int, epoch: int, cursor: Cursor | None) -> Items:
    """Yield the documents of all files, file by file.

    A cursor is the place in the permuted files, the offset in that file, and the rows or parts read of it. The offset
    is in bytes of the text, which for a compressed file means to decompress it again up to there, or it is a row
    group, which a table goes on at directly.
    """
    paths = _find_files(settings)
    paths = [paths[i] for i in np.random.default_rng([seed, epoch]).permutation(len(paths))]
    if cursor is None:
        _check_fields(paths, settings.text_field)
        cursor = {"file": 0, "offset": 0, "row": 0}
    cursor = place_in(cursor, "file", "offset", "row")
    for k in range(cursor["file"], len(paths)):
        place = (cursor["offset"], cursor["row"]) if k == cursor["file"] else (0, 0)
        try:
            for item, offset, row in _reader(paths[k])(paths[k], settings.text_field, *place):
                place = (offset, row)
                yield item, {"file": k, "offset": offset, "row": row}
        except DAMAGE as error:
            if isinstance(error, MemoryError) or getattr(error, "errno", None):
                raise  # the machine's failure, not the file's
            reason = "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else "damaged"
            _tell(f"{paths[k]} is skipped from row {place[1] + 1} on: {reason}")
            yield Skipped(reason, str(paths[k])), {"file": k + 1, "offset": 0, "row": 0}


@cache
def _tell(words: str) -> None:
    """Warn once a process, however many passes come to it."""
    LOG.warning(words)


def _read_text(path: Path, field: str, offset: int, row: int) -> Parts:
    """Yield the parts of a text from `offset`, cut at line ends, each with the offset and number after it."""
    name = str(path)
    if row == 0:
        _require_utf8(path)
    with _open_text(path, offset) as file:
        data = file.read(PART + 1)  # a byte more than a part tells whether the text goes on
        while data or row == 0:
            starts, ends = row == 0, len(data) <= PART
            end = len(data) if ends else data.rfind(b"\n", 0, PART) + 1 or PART
            text, used = codecs.utf_8_decode(data[:end], "strict", ends)  # leaves a character cut in two to the next
            offset, row, data = offset + used, row + 1, data[used:] + file.read(used)
            text = text.removeprefix("\ufeff") if starts else text
            yield (checked(text, name) if starts and ends else Document(text, name, starts, ends)), offset, row


def _require_utf8(path: Path) -> None:
    """Read the whole text and raise what is wrong with it, so that no document breaks off after its first parts."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open_text(path) as file:
        while data := file.read(PART):
            decoder.decode(data)
            beat()
    decoder.decode(b"", final=True)


def _read_rows(path: Path, field: str, offset: int, row: int) -> Parts:
    """Yield the rows of a .jsonl file from `offset`, each with the offset and number after it."""
    with _open_text(path, offset) as file:
        while line := file.readline(LARGEST_ROW + 1):
            offset, row, where = offset + len(line), row + 1, f"{path}:{row + 1}"
            if len(line) <= LARGEST_ROW:
                yield _parse(line.removeprefix(codecs.BOM_UTF8) if row == 1 else line, field, where), offset, row
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(PART)
                offset += len(line)
                beat()
            yield Skipped("over-long", where), offset, row


def _parse(line: bytes, field: str, where: str) -> Document | Skipped:
    if line.isspace() or not line:
        return Skipped("empty", where)
    if len(line) > MOST_OPENED and line.count(b"[") + line.count(b"{") > MOST_OPENED:
        return Skipped("too many values", where)
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return Skipped("invalid UTF-8", where)
    except (ValueError, RecursionError):  # ValueError: bad JSON, or a number of more than 4300 digits
        return Skipped("invalid JSON", where)
    if not isinstance(record, dict) or field not in record:
        return Skipped("no text field", where)
    return checked(record[field], where)


def _read_table(path: Path, field: str, offset: int, row: int) -> Parts:
    with _open(path) as file:
        yield from read_table(file, str(path), field, offset, row)


_TEXTS: dict[str, Reader] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".py": _read_text,
    ".jsonl": _read_rows,
    ".ndjson": _read_rows,
}
READERS = {ending + codec: read for ending, read in _TEXTS.items() for codec in ("", *CODECS)}
READERS[".parquet"] = _read_table
ENDINGS = f"{', '.join(_TEXTS)} (each also with {', '.join(CODECS)} after it) or .parquet"


def _reader(path: Path) -> Reader:
    return next(read for ending, read in READERS.items() if path.name.endswith(ending))


def _check_fields(paths: list[Path], field: str) -> None:
    """Raise UserError when a table, or the first row of the first file of rows, has fields but not that of the text."""
    tables = [path for path in paths if _reader(path) is _read_table]
    rows = [path for path in paths if _reader(path) is _read_rows]
    for path in tables:
        with suppress(*DAMAGE), _open(path) as file:
            if field not in (names := fields_of(file)):
                raise no_field(str(path), field, names)
    for path in rows[:1]:
        with suppress(*DAMAGE), _open_text(path) as file:
            line = file.readline(LARGEST_ROW).removeprefix(codecs.BOM_UTF8)
            if _parse(line, field, "") == Skipped("no text field", "") and isinstance(record := json.loads(line), dict):
                raise no_field(f"row 1 of {path}", field, list(record))


def fingerprint_ends(settings: SourceSettings) -> str:
    """Return what checkpoints noted of files before their fingerprints had an `order`."""
    digest = hashlib.sha256(settings.text_field.encode())
    for path in _find_files(settings):
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"\0{path.name}\0{size}\0".encode() + file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def fingerprint_files(settings: SourceSettings) -> str:
    """Return what changes with names, sizes and content: all of it up to SAMPLED bytes, of more an even sample that
    holds both ends of each file."""
    paths = _find_files(settings)
    blocks = max(2, SAMPLED // SAMPLE // len(paths))  # of each file
    digest = hashlib.sha256(settings.text_field.encode())
    for path in paths:
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"\0{path.name}\0{size}\0".encode())
            whole = size <= blocks * SAMPLE
            for start in range(0, size, SAMPLE) if whole else np.linspace(0, size - SAMPLE, blocks, dtype=np.int64):
                file.seek(int(start))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def pin_files(settings: S) -> S:
    """Return the settings with absolute paths, so that the run can go on from anywhere."""
    names = [settings.files] if isinstance(settings.files, str) else settings.files or []
    return settings.model_copy(update={"files": [os.path.abspath(name) for name in names]})
