"""Where text comes from: one generator a source, each one pass over its documents.

Every source yields `(item, cursor)`: a Document, or why a row was Skipped, and where to go on after it. A cursor is
plain JSON data; a source given one yields exactly the rest of that pass. Seed and epoch permute files, not their rows.
"""

import codecs
import glob
import hashlib
import json
import logging
import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from moelet.errors import TemporaryError, UserError
from moelet.hparams import DataSettings

Cursor = dict[str, Any]

ENDINGS = (".txt", ".md", ".py", ".jsonl")
PART = 16 * 2**20  # bytes of a text file held at once
LARGEST_ROW = 256 * 2**20  # bytes of a .jsonl row; ten thousand books
SAMPLE = 64 * 2**10  # bytes at either end of a file that its fingerprint reads


class Document(NamedTuple):
    """Text, or one part of a long text: only the first part starts and only the last ends the document."""

    text: str
    name: str
    starts: bool = True
    ends: bool = True


class Skipped(NamedTuple):
    """A row without usable text: the reason, and the file and row."""

    reason: str
    where: str


Items = Iterator[tuple[Document | Skipped, Cursor]]
Parts = Iterator[tuple[Document | Skipped, int, int]]  # with the bytes, and the rows or parts, read of the file


class Source(NamedTuple):
    """`documents(settings, seed, epoch, cursor)` is one pass; `fingerprint(settings)` changes when the text does."""

    documents: Callable[[DataSettings, int, int, Cursor | None], Items]
    fingerprint: Callable[[DataSettings], str]


def _checked(text: Any, where: str) -> Document | Skipped:
    if not isinstance(text, str):
        return Skipped("not text", where)
    if not text or text.isspace():
        return Skipped("empty", where)
    try:
        text.encode()
    except UnicodeEncodeError:
        return Skipped("lone surrogate", where)
    return Document(text, where)


def _standard_library() -> dict[str, Path | str]:
    """Return the standard library's files and the topics of Python's help, by name, sorted."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    found: dict[str, Path | str] = {f"help({topic})": text for topic, text in topics.items()}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            found[path.relative_to(root).as_posix()] = path
    found.pop("pydoc_data/topics.py", None)
    return dict(sorted(found.items()))


def _read_embedded(settings: DataSettings, seed: int, epoch: int, cursor: Cursor | None) -> Items:
    found = list(_standard_library().items())
    order = np.random.default_rng([seed, epoch]).permutation(len(found))
    for k in range(cursor["next"] if cursor else 0, len(order)):
        name, text = found[order[k]]
        try:
            item = _checked(text if isinstance(text, str) else text.read_bytes().decode("utf-8-sig"), name)
        except UnicodeDecodeError:
            item = Skipped("invalid UTF-8", name)
        except OSError:
            item = Skipped("unreadable", name)
        yield item, {"next": k + 1}


def _fingerprint_embedded(settings: DataSettings) -> str:
    """It reads the text as the source does; an unreadable file counts by that."""
    digest = hashlib.sha256()
    for item, _ in _read_embedded(settings, 0, 0, None):
        digest.update("\0".join(map(str, item)).encode() + b"\0")
    return digest.hexdigest()


def _find_files(settings: DataSettings) -> list[Path]:
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


def _read_files(settings: DataSettings, seed: int, epoch: int, cursor: Cursor | None) -> Items:
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
        yield (_checked(text, name) if starts and ends else Document(text, name, starts, ends)), offset, row


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
    return _checked(record[field], where)


def _check_first_row(paths: list[Path], field: str) -> None:
    """Raise UserError when the first row of a .jsonl file has fields, but not the one that holds the text."""
    for path in paths:
        with _open(path) as file:
            line = file.readline(LARGEST_ROW).removeprefix(codecs.BOM_UTF8)
        if _parse(line, field, "") == Skipped("no text field", "") and isinstance(record := json.loads(line), dict):
            raise _no_field(f"row 1 of {path}", field, list(record))


def _no_field(where: str, field: str, fields: list[str]) -> UserError:
    known = ", ".join(map(repr, fields)) or "none"
    return UserError(f"{where} has no field {field!r}. Its fields are: {known}. Set data.text_field to one of them.")


def _fingerprint_files(settings: DataSettings) -> str:
    digest = hashlib.sha256(settings.text_field.encode())
    for path in _find_files(settings):
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"\0{path.name}\0{size}\0".encode() + file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def _read_hub(settings: DataSettings, seed: int, epoch: int, cursor: Cursor | None) -> Items:
    """A cursor is the stream's own state, exact because its shuffle buffer holds one row, and the rows read."""
    logging.getLogger("datasets.iterable_dataset").addFilter(_is_no_false_alarm)
    row = cursor["row"] if cursor else 0
    with _hub_errors(settings):
        import datasets

        rows = datasets.load_dataset(
            settings.dataset, name=settings.name, split=settings.split, revision=settings.revision, streaming=True
        )
        fields = rows.column_names or list(next(iter(rows), {settings.text_field: None}))
        if settings.text_field not in fields:
            raise _no_field(f"dataset {settings.dataset}", settings.text_field, fields)
        rows = rows.select_columns([settings.text_field])
        rows = rows.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=10)  # mixes up to 10 files, row by row
        rows.set_epoch(epoch)
        if cursor:
            rows.load_state_dict(cursor["stream"])
        for record in rows:
            row += 1
            item = _checked(record[settings.text_field], f"{settings.dataset}:{row}")
            yield item, {"stream": rows.state_dict(), "row": row}


def _is_no_false_alarm(record: logging.LogRecord) -> bool:
    """Drop the warning that a shuffle buffer's content is lost at a resume: ours holds one row, already yielded."""
    return "state dict of a shuffle buffer" not in record.getMessage()


@contextmanager
def _hub_errors(settings: DataSettings) -> Iterator[None]:
    """Turn what `datasets` raises into UserError (the settings are wrong) or TemporaryError (no connection)."""
    from huggingface_hub import errors

    http_error: type[Exception] = getattr(errors, "HTTPError")  # noqa: B009  that of whichever HTTP client it uses
    given = f"data.dataset is {settings.dataset!r}, name {settings.name!r}, split {settings.split!r}"
    try:
        yield
    except UserError:
        raise
    except (ValueError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())
        blamed = {"Bad split": "split", "BuilderConfig": "name", "Config name": "name"}
        setting = next((setting for words, setting in blamed.items() if reason.startswith(words)), "dataset")
        raise UserError(f"{given}. That doesn't fit: {reason} Set data.{setting}.") from error
    except (OSError, http_error) as error:
        raise TemporaryError(f"{given} can't be reached now ({error}). Run the same command again.") from error


def _fingerprint_hub(settings: DataSettings) -> str:
    """The names alone: the commit behind a branch is known only once the network answered. Set data.revision to pin."""
    names = [settings.dataset, settings.name, settings.split, settings.revision, settings.text_field]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


SOURCES: dict[str, Source] = {
    "embedded": Source(_read_embedded, _fingerprint_embedded),
    "files": Source(_read_files, _fingerprint_files),
    "hub": Source(_read_hub, _fingerprint_hub),
}
