"""From documents to batches: pieces, held-out split, shuffle window, rows, batches, prefetch.

A window is so many pieces of text, read, encoded and cut into rows as a whole; its rows are then drawn in an order
that is a function of (seed, epoch, window). So a cursor is plain data: where the source stood at the window's start,
and how many of the window's rows are used up. Nothing is buffered that a cursor would have to carry.

    {"epoch", "window", "source": the source's cursor at the window's start, "row",
     "counts": what was read before this window, by reason, "read": the same with this window, "places": of what is
     of no use, as moelet.text.tally has it,
     "positions", "padding": of all rows so far}
"""

import gzip
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moelet.errors import UserError, pick
from moelet.loss import IGNORE
from moelet.sections import DataSettings
from moelet.text.documents import Cursor, Document, Items, Prepared, Skipped
from moelet.text.prefetch import Prefetch
from moelet.text.pulse import beat
from moelet.text.sources import SOURCES, mix_shares
from moelet.text.tally import CUT, DOCUMENTS, MIX, Tally, skipped_of
from moelet.tokenizer import Tokenizer

PREFETCH_BATCHES, PREFETCH_WINDOWS = 4, 1
ENCODED = 256  # pieces between two signs of life: 2 MB of text, half a second
VALIDATION_WINDOW = 64  # held-out pieces read at once: at 2% held out, 64 take 26 MB of text to find
START: Cursor = {
    "epoch": 0,
    "window": 0,
    "source": None,
    "row": 0,
    "counts": {},
    "read": {},
    "places": {},
    "positions": 0,
    "padding": 0,
}


class Piece(NamedTuple):
    """A stretch of a document: its text, or the ids of it without BOS and EOS where it was prepared."""

    name: str
    text: str | None
    ids: np.ndarray | None
    digest: int
    ends: bool  # whether the document ends here: only then an EOS follows


class Batch(NamedTuple):
    input_ids: Tensor  # (B, S) int64
    labels: Tensor  # (B, S) int64, IGNORE where nothing is to be predicted: padding and BOS
    segments: Tensor | None  # (B, S) int64, 0 on padding, else the document's number in its row; None: all are 1

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`; to CUDA from pinned memory, so that the host needn't wait for the copy."""

        def move(item: Tensor) -> Tensor:
            return (item.pin_memory() if device.type == "cuda" else item).to(device, non_blocking=True)

        return Batch(move(self.input_ids), move(self.labels), None if self.segments is None else move(self.segments))


class Validation(NamedTuple):
    """Held-out text, whole pieces, in batches."""

    batches: list[Batch]
    n_tokens: int
    n_bytes: int
    gzip_bits_per_byte: float  # of the same bytes at level 9, the plainest model of text there is


def cut(document: Document, piece_chars: int) -> list[Piece]:
    """Return the document in pieces of at most `piece_chars` characters, cut behind a line end or else a space."""
    text, pieces, start = document.text, [], 0
    while start < len(text):
        end = start + piece_chars
        if end < len(text):
            for mark in ("\n", " "):
                found = text.rfind(mark, start + piece_chars // 2, end)
                if found >= 0:
                    end = found + 1
                    break
        last = end >= len(text)
        part, name = text[start:end], f"{document.name}#{start}"
        pieces.append(Piece(name, part, None, text_digest(part), last and document.ends))
        start = end
    return pieces


def text_digest(text: str) -> int:
    """Return a number below 2^64 that only the text decides: the first 8 bytes of its BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def pieces_of(item: Document | Prepared, piece_chars: int) -> list[Piece]:
    """Return the pieces of a document, cut now or before."""
    if isinstance(item, Document):
        return cut(item, piece_chars)
    last = len(item.pieces) - 1
    return [
        Piece(f"{item.name}#{k}", None, piece.ids, piece.digest, item.ends and k == last)
        for k, piece in enumerate(item.pieces)
    ]


def held_out(digest: int, fraction: float) -> bool:
    """Return whether a piece of text is for validation: a property of its content, so equal texts never part."""
    return digest < fraction * 2**64


def splits(settings: DataSettings) -> dict[str, Callable[[int], bool]]:
    """Return which digests of pieces belong to each split."""
    return {
        "train": lambda digest: not held_out(digest, settings.validation_fraction),
        "validation": lambda digest: held_out(digest, settings.validation_fraction),
        "all": lambda digest: True,
    }


def one_epoch(settings: DataSettings, seed: int, split: str, at: Cursor) -> Iterator[tuple[list[Piece], Cursor]]:
    """Yield the shuffled windows of one pass over the source, each with the cursor of its start, then (`[]`, the
    cursor of the next epoch)."""
    keep = splits(settings)[split]
    source = pick(SOURCES, settings.source, "data.source")
    items = source.documents(settings, seed, at["epoch"], at["source"])
    while True:
        tally = Tally(at)
        pieces, after = _read_window(items, settings, keep, tally)
        if split != "all":  # which is somebody's text to be measured, not to be trained on
            tally.require_mostly_good(settings.bad_rows, at["epoch"] + 1)
        order = np.random.default_rng([seed, at["epoch"], at["window"]]).permutation(len(pieces))
        if pieces:
            yield [pieces[i] for i in order], {**at, "read": dict(tally.counts), "places": tally.places}
        fresh = {"row": 0, "counts": dict(tally.counts), "read": dict(tally.counts), "places": tally.places}
        if after is None:
            yield [], {**at, **fresh, "epoch": at["epoch"] + 1, "window": 0, "source": None}
            return
        at = {**at, **fresh, "window": at["window"] + 1, "source": after}


def _read_window(
    items: Items,
    settings: DataSettings,
    keep: Callable[[int], bool],
    tally: Tally,
) -> tuple[list[Piece], Cursor | None]:
    """Return pieces of whole documents until the window is full, and the source's cursor then; None at its end."""
    pieces, counts = list[Piece](), tally.counts
    for item, cursor in items:
        beat(item.where if isinstance(item, Skipped) else item.name)
        if isinstance(item, Skipped):
            tally.skip(item)
        else:
            whole = pieces_of(item, settings.piece_chars)
            counts[DOCUMENTS] += 1 if item.ends else 0
            counts[CUT] += 1 if len(whole) > 1 and item.ends else 0
            if settings.parts and isinstance(item, Document):
                counts[f"{MIX}{item.part} documents"] += int(item.ends)
                counts[f"{MIX}{item.part} characters"] += len(item.text)
            pieces += [piece for piece in whole if keep(piece.digest)]
        if len(pieces) >= settings.shuffle_window:
            return pieces, cursor
    return pieces, None


def reading_report(settings: DataSettings, cursor: Cursor) -> dict[str, Any]:
    """Return what was read up to the cursor: documents, those cut, rows skipped by reason and the
    first of each, padding, shares of a mix."""
    counts = cursor["read"]
    report = {"documents": counts.get(DOCUMENTS, 0), "documents_cut": counts.get(CUT, 0)}
    if settings.parts:
        units = ("documents", "characters")
        read = ([counts.get(f"{MIX}{k} {unit}", 0) for k in range(len(settings.parts))] for unit in units)
        report["mix"] = mix_shares(settings, *read)
    report |= {"skipped": skipped_of(counts), "skipped_first": cursor.get("places", {})}
    return {**report, "padding": cursor["padding"] / max(1, cursor["positions"])}


def epochs(settings: DataSettings, seed: int, at: Cursor) -> Iterator[tuple[list[Piece], Cursor]]:
    """Yield the training windows of epoch after epoch, each epoch in an order of its own."""
    while True:
        found = at["source"] is not None
        for pieces, window in one_epoch(settings, seed, "train", at):
            if pieces:
                found = True
                yield pieces, window
            else:
                at = window
        if not found:
            raise no_text("train", settings, at["counts"])


def no_text(split: str, settings: DataSettings, counts: dict[str, int]) -> UserError:
    """Return the error for a source without any text of a split: what it held instead, and what to do."""
    held = ", ".join(f"{reason}: {count}" for reason, count in sorted(counts.items())) or "no documents at all"
    if split == "all" or not counts.get("documents"):
        return UserError(
            f"the data holds no text ({held}). It needs a document that isn't empty. Set data.files or data.source."
        )
    return UserError(
        f"the {split} split holds no text ({held}; pieces of up to {settings.piece_chars} characters, "
        f"{settings.validation_fraction:.1%} of them held out). Training and validation need a piece each. Lower "
        "data.piece_chars to cut this text into more pieces, change data.validation_fraction, or add text."
    )


def encoded(pieces: list[Piece], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Return the ids of each piece, BOS first, and EOS last where its document ends."""
    fresh = _encode(tokenizer, [piece.text for piece in pieces if piece.text is not None])
    bos, eos = (np.array([mark], dtype=np.int32) for mark in (tokenizer.bos_id, tokenizer.eos_id))
    bodies = (next(fresh) if piece.ids is None else piece.ids for piece in pieces)
    return [
        np.concatenate([bos, ids, eos] if piece.ends else [bos, ids]) for piece, ids in zip(pieces, bodies, strict=True)
    ]


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[np.ndarray]:
    for start in range(0, len(texts), ENCODED):
        yield from tokenizer.encode_batch(texts[start : start + ENCODED])
        beat()


def packed(pieces: list[np.ndarray], length: int) -> np.ndarray:
    """Return rows of `length` + 1 ids (n, length + 1) that hold the pieces end to end; the last one is padded.

    A row starts with the last id of the one before it, so that every id but the first is predicted exactly once.
    """
    stream = np.concatenate(pieces)
    n_rows = -(-(len(stream) - 1) // length)
    stream = np.pad(stream, (0, n_rows * length + 1 - len(stream)), constant_values=Tokenizer.pad_id)
    return stream[np.arange(n_rows)[:, None] * length + np.arange(length + 1)]


def padded(pieces: list[np.ndarray], length: int) -> np.ndarray:
    """Return rows of `length` + 1 ids that hold one piece each, padded; a piece too long goes on in the next row."""
    return np.concatenate([packed([piece], length) for piece in pieces])


def windows_of_rows(
    settings: DataSettings, tokenizer: Tokenizer, length: int, seed: int, at: Cursor
) -> Iterator[tuple[np.ndarray, Cursor]]:
    """Yield the rows of window after window without end, each with the cursor of its start."""
    rows_of = packed if settings.packing else padded
    return ((rows_of(encoded(pieces, tokenizer), length), at) for pieces, at in epochs(settings, seed, at))


def training_rows(
    settings: DataSettings, tokenizer: Tokenizer, length: int, seed: int, at: Cursor
) -> Iterator[tuple[np.ndarray, Cursor]]:
    """Yield rows without end. Those of a window come in random order, so that a batch isn't one document.

    While one window is used up, a thread reads and encodes the next.
    """
    windows = windows_of_rows(settings, tokenizer, length, seed, at)
    positions, padding = at["positions"], at["padding"]
    with Prefetch(windows, PREFETCH_WINDOWS) as ahead:
        while True:
            rows, window = next(ahead)
            order = np.random.default_rng([seed, window["epoch"], window["window"]]).permutation(len(rows))
            for index in range(window["row"], len(rows)):
                row = rows[order[index]]
                positions += length
                padding += int((row[:-1] == Tokenizer.pad_id).sum())
                yield row, {**window, "row": index + 1, "positions": positions, "padding": padding}


def collate(rows: list[np.ndarray], mask_documents: bool) -> Batch:
    """Return rows of S + 1 ids as a batch of inputs and, shifted by one, labels.

    With `mask_documents` a document begins at each BOS, and the first of a row may go on from the row before; without,
    a row is one document.
    """
    ids = torch.from_numpy(np.stack(rows).astype(np.int64))
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].clone()
    labels[(labels == Tokenizer.pad_id) | (labels == Tokenizer.bos_id)] = IGNORE
    segments = torch.ones_like(inputs)
    if mask_documents:
        segments[:, 1:] += (inputs[:, 1:] == Tokenizer.bos_id).cumsum(1)
    segments[inputs == Tokenizer.pad_id] = 0
    return Batch(inputs, labels, None if bool((segments == 1).all()) else segments)


def batches(
    rows: Iterator[tuple[np.ndarray, Cursor]], sizes: Sequence[int], mask_documents: bool
) -> Iterator[tuple[Batch, Cursor]]:
    """Yield batches of as many rows as `sizes` say, over and over, each with its last row's cursor."""
    for size in itertools.cycle(sizes):
        group = list(itertools.islice(rows, size))
        yield collate([row for row, _ in group], mask_documents), group[-1][1]


def training_batches(
    settings: DataSettings, tokenizer: Tokenizer, length: int, sizes: Sequence[int], seed: int, at: Cursor
) -> Iterator[tuple[Batch, Cursor]]:
    """Yield batches without end, from cursor `at` on: those of one step after the other, `sizes` rows each.

    How a step is cut doesn't change which rows it has. Raises UserError when the data holds no text.
    """
    return batches(training_rows(settings, tokenizer, length, seed, at), sizes, settings.mask_documents)


def training_texts(settings: DataSettings, seed: int) -> Iterator[str]:
    """Yield the pieces of text of the first epoch's training split, in training order."""
    found = False
    for pieces, _ in one_epoch(settings, seed, "train", START):
        found = found or bool(pieces)
        yield from (piece.text for piece in pieces if piece.text is not None)
        if not pieces and not found:
            next(epochs(settings, seed, START))  # raises the error that says what the source held instead


def read_validation(
    settings: DataSettings, tokenizer: Tokenizer, length: int, size: int, n_tokens: int | None, split: str
) -> Validation:
    """Return about `n_tokens` tokens (None: all) of the split, in an order that no seed changes.

    Raises UserError when the split is empty.
    """
    taken: list[Piece] = []
    ids: list[np.ndarray] = []
    counts: dict[str, int] = {}
    total = 0
    nearby = settings.model_copy(update={"shuffle_window": min(settings.shuffle_window, VALIDATION_WINDOW)})
    for pieces, at in one_epoch(nearby, 0, split, START):
        counts = at["read"]
        for piece, piece_ids in zip(pieces, encoded(pieces, tokenizer), strict=True):
            if n_tokens is None or total < n_tokens:
                taken.append(piece)
                ids.append(piece_ids)
                total += len(piece_ids)
        if n_tokens is not None and total >= n_tokens:
            break
    if not taken:
        raise no_text(split, settings, counts)
    rows = (packed if settings.packing else padded)(ids, length)
    groups = [collate(list(rows[at : at + size]), settings.mask_documents) for at in range(0, len(rows), size)]
    texts = (tokenizer.decode(piece.ids) if piece.ids is not None else piece.text for piece in taken)
    raw = "".join(filter(None, texts)).encode()
    gzip_bits = 8 * len(gzip.compress(raw, 9)) / max(1, len(raw))
    n_predicted = sum(int((batch.labels != IGNORE).sum()) for batch in groups)
    return Validation(groups, n_predicted, len(raw), gzip_bits)
