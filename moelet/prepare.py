"""Encodes a source once into a folder that training reads instead: same ids, same order, same losses.

The text ends only where a shuffle window of training and one of validation have ended, so that a run which needs no
more than was prepared meets exactly the windows that it would have met on the source.
"""

import dataclasses
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

from moelet.console import Progress
from moelet.data import START, VALIDATION_WINDOW, cut, splits
from moelet.errors import UserError, pick
from moelet.hparams import Hparams, read_hparams_inside
from moelet.sections import READING
from moelet.storage.checkpoint import HPARAMS, TOKENIZER
from moelet.storage.disk import write_file
from moelet.storage.lock import lock
from moelet.text import shards
from moelet.text.documents import Cursor, Document, Items, Prepared, PreparedPiece, Skipped
from moelet.text.sources import SOURCES
from moelet.text.tally import DOCUMENTS, Tally
from moelet.tokenizer import Tokenizer
from moelet.train import check, make_tokenizer, pinned, with_commits_of

GROUP = 256  # items encoded together
ORIGIN = "made_from.json"  # the settings that the text was prepared from, all made explicit


@dataclasses.dataclass
class Windows:
    """Counts the windows of one split, to know when whole ones hold enough."""

    size: int  # pieces of a window
    wanted: int | None  # predicted tokens; None: the whole pass
    pieces: int = 0  # in the window so far
    tokens: int = 0
    enough: bool = False

    def add(self, lengths: list[int]) -> None:
        """Count the pieces of one item, each with so many ids, BOS and EOS included."""
        self.pieces += len(lengths)
        self.tokens += sum(lengths)
        if self.pieces >= self.size:
            self.pieces = 0
            self.tokens -= 1  # the first id of a window is never predicted
            self.enough = self.enough or (self.wanted is not None and self.tokens >= self.wanted)


def prepare(hparams: Hparams, folder: Path, tokens: int | None, progress: Progress) -> dict[str, Any]:
    """Encode the text of the settings into `folder`, or go on where an earlier call was cut; return its manifest.

    A folder that is complete is verified instead.

    Enough for `tokens` training tokens; None: for the run of the settings, where its length is in steps or tokens, and
    at most one pass over the source. Raises UserError for settings that don't fit, TemporaryError when the source is
    away: what was encoded until then is kept.
    """
    check(hparams)
    if hparams.data.source == "prepared":
        raise UserError('data.source is "prepared". That text is encoded already. Set data.source to where text is.')
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ORIGIN).exists():
        raise UserError(
            f"{folder} holds files that are no prepared text. Give a folder that is empty or not there yet."
        )
    with lock(folder):
        hparams, manifest = _begin(hparams, folder, tokens, progress)
        if manifest["complete"]:
            shards.verify(folder)
        else:
            _encode_all(hparams, Tokenizer.load_inside(folder, TOKENIZER), folder, manifest, progress)
        ready = hparams.data.model_copy(update={"source": "prepared", "files": [str(folder.absolute())], "mix": None})
        tokenizer = hparams.tokenizer.model_copy(update={"file": None})  # the folder's own, wherever it is moved to
        ready_hparams = hparams.model_copy(update={"data": ready, "tokenizer": tokenizer})
        write_file(folder / HPARAMS, ready_hparams.to_json().encode())
    return manifest


def _begin(hparams: Hparams, folder: Path, tokens: int | None, progress: Progress) -> tuple[Hparams, dict[str, Any]]:
    """Return the settings, all made explicit, and the manifest to go on from: a new one for a new folder."""
    if (folder / ORIGIN).exists():
        hparams = with_commits_of(read_hparams_inside(folder, ORIGIN), hparams)
    hparams = pinned(hparams)
    origin = {
        "data": hparams.data.model_dump(mode="json", exclude={"files", *READING}),
        "text": pick(SOURCES, hparams.data.source, "data.source").fingerprint(hparams.data),
        "tokenizer": hparams.tokenizer.model_dump(mode="json", exclude={"file"}),
        "tokens": tokens or (hparams.total_steps and hparams.total_steps * hparams.tokens_per_step),
        "validation_tokens": hparams.train.eval_tokens,
    }
    origin = json.loads(json.dumps(origin))
    if (folder / shards.MANIFEST).exists():
        manifest = shards.read_manifest(folder)
        different = [name for name in origin if origin[name] != manifest["origin"].get(name)]
        if different:
            raise UserError(
                f"{folder} was prepared from other settings; these differ: {', '.join(different)}. Give another folder "
                "with --out, or the settings of the first time."
            )
        return hparams, manifest
    write_file(folder / ORIGIN, hparams.to_json().encode())
    progress.say(
        "tokenizer: reading text and learning pieces" if hparams.tokenizer.file is None else "tokenizer: given"
    )
    tokenizer = make_tokenizer(hparams)
    write_file(folder / TOKENIZER, tokenizer.model_bytes)
    windows = {
        "train": Windows(hparams.data.shuffle_window, origin["tokens"]),
        "validation": Windows(min(hparams.data.shuffle_window, VALIDATION_WINDOW), origin["validation_tokens"]),
    }
    manifest = {
        "format": shards.FORMAT,
        "origin": origin,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "piece_chars": hparams.data.piece_chars,
        "reasons": [],
        "shards": [],
        "cursor": None,
        "windows": {split: dataclasses.asdict(found) for split, found in windows.items()},
        "items": 0,
        "bytes": 0,
        "tokens": 0,
        "complete": False,
    }
    shards.ShardWriter(folder, manifest).flush()
    return hparams, manifest


def _encode_all(
    hparams: Hparams, tokenizer: Tokenizer, folder: Path, manifest: dict[str, Any], progress: Progress
) -> None:
    """Encode items from the manifest's cursor on until there are enough, or the pass ends; then it is complete.

    The manifest in memory may run ahead of the one on the disk, which only ever tells of whole groups.
    """
    settings, cursor = hparams.data, manifest["cursor"]
    windows = {split: Windows(**found) for split, found in manifest["windows"].items()}
    keeps = splits(settings)
    writer = shards.ShardWriter(folder, manifest)
    items = pick(SOURCES, settings.source, "data.source").documents(settings, 0, 0, cursor)

    def flush(complete: bool) -> None:
        state = {split: dataclasses.asdict(found) for split, found in windows.items()}
        writer.flush(cursor=cursor, windows=state, complete=complete)

    tally, began, before = Tally(START), time.monotonic(), manifest["bytes"]
    while not all(found.enough for found in windows.values()):
        try:
            group, after = _encode_group(items, settings.piece_chars, tokenizer)
        except BaseException:  # Ctrl-C, too: what was encoded and counted until here is kept
            flush(complete=False)
            raise
        if not group:
            break
        for item, n_bytes in group:
            writer.add(item)
            manifest["items"] += 1
            manifest["bytes"] += n_bytes
            if isinstance(item, Skipped):
                tally.skip(item)
                continue
            tally.counts[DOCUMENTS] += int(item.ends)
            for split, found in windows.items():
                kept = [piece for piece in item.pieces if keeps[split](piece.digest)]
                ends = [item.ends and piece is item.pieces[-1] for piece in kept]
                found.add([len(piece.ids) + 1 + end for piece, end in zip(kept, ends, strict=True)])
            manifest["tokens"] += sum(len(piece.ids) + 1 for piece in item.pieces) + item.ends
        tally.require_mostly_good(settings.bad_rows, passes=1)
        cursor = after
        if writer.is_full:
            flush(complete=False)
        rate = (manifest["bytes"] - before) / 2**20 / (time.monotonic() - began)
        progress.show(
            f"{manifest['items']:,} documents and rows, {manifest['tokens']:,} tokens, {rate:.1f} MB/s", False
        )
    if not manifest["tokens"]:
        raise UserError("the data holds no text. Training needs some. Set data.files or data.source.")
    flush(complete=True)


def _encode_group(
    items: Items, piece_chars: int, tokenizer: Tokenizer
) -> tuple[list[tuple[Prepared | Skipped, int]], Cursor | None]:
    """Return up to GROUP items encoded, each with its bytes of text, and the cursor after them."""
    found = list(islice(items, GROUP))
    pieces = [cut(item, piece_chars) if isinstance(item, Document) else [] for item, _ in found]
    bodies = iter(tokenizer.encode_batch([piece.text or "" for whole in pieces for piece in whole]))
    group: list[tuple[Prepared | Skipped, int]] = []
    for (item, _), whole in zip(found, pieces, strict=True):
        if isinstance(item, Document):
            prepared = [PreparedPiece(next(bodies), piece.digest) for piece in whole]
            group.append((Prepared(item.name, prepared, item.ends), len(item.text.encode())))
        else:
            assert isinstance(item, Skipped)  # text that is prepared already was refused
            group.append((item, 0))
    return group, found[-1][1] if found else None
