"""What a source of text yields: documents, rows without usable text, and where to go on after each.

Every source is a generator of `(item, cursor)`. A cursor is plain JSON data; a source given one yields exactly the
rest of that pass.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from moelet.errors import UserError

Cursor = dict[str, Any]


class Document(NamedTuple):
    """Text, or one part of a long text: only the first part starts and only the last ends the document."""

    text: str
    name: str
    starts: bool = True
    ends: bool = True
    part: int = 0  # of a mix: which of its sources it is from


class Skipped(NamedTuple):
    """A row without usable text: the reason, and the file and row."""

    reason: str
    where: str


class PreparedPiece(NamedTuple):
    ids: np.ndarray  # int32, without BOS and EOS
    digest: int  # of its text


class Prepared(NamedTuple):
    """A document, or one part of it, that was cut and encoded before."""

    name: str
    pieces: list[PreparedPiece]
    ends: bool


Items = Iterator[tuple[Document | Prepared | Skipped, Cursor]]
Parts = Iterator[tuple[Document | Skipped, int, int]]  # of one file: with the offset to go on at, and the rows read


class Source(NamedTuple):
    """A kind of source, as functions of its settings.

    `documents(settings, seed, epoch, cursor)` is one pass; `fingerprint(settings)` changes when the text does;
    `pin(settings)` makes explicit what could mean something else tomorrow or elsewhere.
    """

    documents: Callable[[Any, int, int, Cursor | None], Items]
    fingerprint: Callable[[Any], str]
    pin: Callable[[Any], Any] = lambda settings: settings


def checked(text: Any, where: str) -> Document | Skipped:
    """Return the text as a document, or why it isn't one."""
    if not isinstance(text, str):
        return Skipped("not text", where)
    if not text or text.isspace():
        return Skipped("empty", where)
    try:
        text.encode()
    except UnicodeEncodeError:
        return Skipped("lone surrogate", where)
    return Document(text, where)


def place_in(cursor: Cursor, *names: str) -> Cursor:
    """Return the cursor of a source whose cursors have these numbers. Raises UserError for another: it was saved with
    a checkpoint, and anybody may have written that.
    """
    if not isinstance(cursor, dict) or not all(is_count(cursor.get(name)) for name in names):
        raise UserError(
            f"the saved place in the text has no {' and '.join(names)} from 0 to 2^53. The checkpoint isn't one of "
            "this run's, or is damaged. Resume from another."
        )
    return cursor


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def no_field(where: str, field: str, fields: list[str]) -> UserError:
    known = ", ".join(map(repr, fields)) or "none"
    return UserError(f"{where} has no field {field!r}. Its fields are: {known}. Set data.text_field to one of them.")
