"""Text encoded once: folders of memory-mapped arrays that training reads at random instead of the text itself.

A folder holds `tokenizer.model`, `manifest.json` and shards, each a folder of plain .npy files:

    ids            the ids of all pieces end to end, without BOS and EOS; uint16 where the vocabulary allows
    piece_ends     where each piece ends in ids
    digests        what decides whether a piece is held out
    item_ends      where each item's pieces end
    item_kinds     what an item is: part of a document, a document or its last part, or a row skipped for a reason

Items are what the source yielded, in the order of seed 0 and epoch 0. Read with those, they come in that order, which
makes training the same as on the source; any other seed and epoch permutes them all.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from moelet.errors import UserError
from moelet.sections import SourceSettings
from moelet.storage.disk import file_sha256, sealed, sync, sync_folder, write_file
from moelet.storage.intake import open_inside, parse_json, shown, size_of
from moelet.text.documents import Cursor, Items, Prepared, PreparedPiece, Skipped, place_in

FORMAT = 1
MANIFEST = "manifest.json"
ARRAYS = ("ids", "piece_ends", "digests", "item_ends", "item_kinds")
PART, END, FIRST_REASON = 0, 1, 2  # kinds of items; from FIRST_REASON on, places in the manifest's reasons
DTYPES = {
    "ids": ("<u2", "<u4"),
    "piece_ends": ("<i8",),
    "digests": ("<u8",),
    "item_ends": ("<i8",),
    "item_kinds": ("|u1",),
}
LARGEST_MANIFEST = 16 * 2**20  # bytes; a shard takes 600
LARGEST_ARRAY, LARGEST_HEADER = 2**36, 1000  # bytes; a shard's ids take 2**27, and a document more
DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    TokenError,  # of numpy, which reads a header as Python's words
    OverflowError,
    RecursionError,
    MemoryError,
)  # of what numpy reads
SHARD_IDS = 2**26  # after which a shard is written: 128 MB of uint16


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a prepared folder. Raises UserError when there is none, or none of ours."""
    advice = "Give the folder that `moelet prepare` wrote, or prepare the text again."
    try:
        with open_inside(folder, MANIFEST, LARGEST_MANIFEST) as file:
            raw = file.read()
        manifest: dict[str, Any] = parse_json(raw, "it")
        manifest.pop("sha256")
        if sealed(manifest) != raw or manifest["format"] != FORMAT:
            raise ValueError("its content is not what was written")
        _check(manifest)
    except OSError as error:
        raise UserError(
            f"{folder} is no prepared text: {MANIFEST} can't be read ({error.strerror}). {advice}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged or of another version ({error}). {advice}") from None
    return manifest


def _check(manifest: dict[str, Any]) -> None:
    """Raise ValueError where a manifest doesn't say what it has to, in the kind of value that ours have."""
    counts = ("vocab_size", "piece_chars", "items", "bytes", "tokens")
    lists = [manifest["shards"], manifest["reasons"]]
    dicts = [manifest["origin"], manifest["windows"], *manifest["shards"]]
    dicts += [shard[part] for shard in manifest["shards"] for part in ("lengths", "sha256")]
    lengths = [shard["lengths"][name] for shard in manifest["shards"] for name in ARRAYS]
    digests = [shard["sha256"][name] for shard in manifest["shards"] for name in ARRAYS]
    if not all(type(n) is int and 0 <= n < 2**48 for n in [*lengths, *(manifest[name] for name in counts)]):
        raise ValueError("a count is none")
    if not all(isinstance(text, str) for text in [*digests, *manifest["reasons"], manifest["tokenizer"]]):
        raise ValueError("a name is none")
    if not all(isinstance(part, list) for part in lists) or not all(isinstance(part, dict) for part in dicts):
        raise ValueError("a part is of another kind")
    if type(manifest["complete"]) is not bool or not isinstance(manifest["cursor"], dict | None):
        raise ValueError("how far it is, isn't said")


class ShardWriter:
    """Writes items into shards; what is there after `flush` is on the disk, and a writer made later goes on from it."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self._clear()

    def _clear(self) -> None:
        self._ids: list[np.ndarray] = []
        self._digests: list[int] = []
        self._piece_counts: list[int] = []
        self._kinds: list[int] = []
        self._size = 0

    def add(self, item: Prepared | Skipped) -> None:
        reasons = self.manifest["reasons"]
        if isinstance(item, Skipped):
            if item.reason not in reasons:
                reasons.append(item.reason)
            self._kinds.append(FIRST_REASON + reasons.index(item.reason))
            self._piece_counts.append(0)
            return
        self._kinds.append(END if item.ends else PART)
        self._piece_counts.append(len(item.pieces))
        for piece in item.pieces:
            self._ids.append(piece.ids)
            self._digests.append(piece.digest)
            self._size += len(piece.ids)

    @property
    def is_full(self) -> bool:
        return self._size >= SHARD_IDS

    def flush(self, **state: Any) -> None:
        """Write the items since the last flush as a shard, and the manifest with `state`."""
        self.manifest |= state
        if self._kinds:
            self.manifest["shards"].append(self._write_shard(len(self.manifest["shards"])))
            self._clear()
        write_file(self.folder / MANIFEST, sealed(self.manifest))

    def _write_shard(self, number: int) -> dict[str, Any]:
        dtype = np.uint16 if self.manifest["vocab_size"] <= 2**16 else np.uint32
        ids = np.concatenate([np.zeros(0, dtype), *(piece.astype(dtype) for piece in self._ids)])
        arrays = {
            "ids": ids,
            "piece_ends": np.cumsum([0, *map(len, self._ids)], dtype=np.int64)[1:],
            "digests": np.array(self._digests, dtype=np.uint64),
            "item_ends": np.cumsum([0, *self._piece_counts], dtype=np.int64)[1:],
            "item_kinds": np.array(self._kinds, dtype=np.uint8),
        }
        folder = _shard(self.folder, number)
        temporary = folder.with_name(f"{folder.name}.tmp")
        for leftover in (folder, temporary):  # of a process that was killed before the manifest knew of it
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        for name, array in arrays.items():
            with open(temporary / f"{name}.npy", "wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                sync(file.fileno())
        sync_folder(temporary)
        os.rename(temporary, folder)
        lengths = {name: len(array) for name, array in arrays.items()}
        return {"lengths": lengths, "sha256": {name: file_sha256(folder / f"{name}.npy") for name in ARRAYS}}


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}"


def verify(folder: Path) -> None:
    """Raise UserError, naming the file, unless every shard has the SHA-256 that the manifest says."""
    for number, shard in enumerate(read_manifest(folder)["shards"]):
        for name in ARRAYS:
            path = _shard(folder, number) / f"{name}.npy"
            try:
                with open_inside(folder, f"{path.parent.name}/{path.name}", LARGEST_ARRAY) as file:
                    whole = hashlib.file_digest(file, "sha256").hexdigest() == shard["sha256"][name]
            except (OSError, UserError):
                whole = False
            if not whole:
                raise UserError(f"{path} is missing or damaged. Training needs it whole. Prepare the text again.")


class Shards:
    """The items of a prepared folder by their number. Nothing is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raise UserError when the folder isn't complete, or an array hasn't the length that the manifest says."""
        self.manifest = read_manifest(folder)
        if not self.manifest["complete"]:
            raise UserError(
                f"{folder} is not complete: `moelet prepare` was interrupted. Training needs the whole. Run the same "
                "command again; it goes on."
            )
        self._arrays = [self._open(folder, k, shard) for k, shard in enumerate(self.manifest["shards"])]
        self._firsts = np.cumsum([0, *(len(arrays["item_kinds"]) for arrays in self._arrays)])

    def _open(self, folder: Path, number: int, shard: dict[str, Any]) -> dict[str, np.ndarray]:
        arrays = {}
        for name in ARRAYS:
            path = _shard(folder, number) / f"{name}.npy"
            try:
                arrays[name] = _map(folder, f"{path.parent.name}/{path.name}", shard["lengths"][name], DTYPES[name])
            except DAMAGE as error:
                raise UserError(f"{path} can't be used ({error}). Prepare the text again.") from None
        for ends, whole in (("piece_ends", "ids"), ("item_ends", "piece_ends")):
            if (int(arrays[ends][-1]) if len(arrays[ends]) else 0) != len(arrays[whole]):
                raise UserError(f"{_shard(folder, number)} is damaged: {ends} end elsewhere. Prepare the text again.")
        for one, other in (("piece_ends", "digests"), ("item_ends", "item_kinds")):
            if len(arrays[one]) != len(arrays[other]):
                raise UserError(f"{_shard(folder, number)} is damaged: too few {other}. Prepare the text again.")
        return arrays

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> Prepared | Skipped:
        number = int(np.searchsorted(self._firsts, index, "right")) - 1
        arrays, item = self._arrays[number], index - int(self._firsts[number])
        kind = int(arrays["item_kinds"][item])
        if kind >= FIRST_REASON:
            if kind - FIRST_REASON >= len(self.manifest["reasons"]):
                raise _damaged(index)
            return Skipped(self.manifest["reasons"][kind - FIRST_REASON], f"item {index}")
        first, last = (int(arrays["item_ends"][k]) if k >= 0 else 0 for k in (item - 1, item))
        if not 0 <= first <= last <= len(arrays["piece_ends"]):
            raise _damaged(index)
        return Prepared(f"item {index}", [self._piece(arrays, piece) for piece in range(first, last)], kind == END)

    def _piece(self, arrays: dict[str, np.ndarray], piece: int) -> PreparedPiece:
        start = int(arrays["piece_ends"][piece - 1]) if piece else 0
        end = int(arrays["piece_ends"][piece])
        if not 0 <= start <= end <= len(arrays["ids"]):
            raise _damaged(piece, "piece")
        ids = np.array(arrays["ids"][start:end], dtype=np.int32)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.manifest["vocab_size"]:
            raise _damaged(piece, "piece")
        return PreparedPiece(ids, int(arrays["digests"][piece]))


def _map(folder: Path, name: str, length: int, dtypes: Sequence[str]) -> np.ndarray:
    """Return the array in a .npy file, read where it is used. Raises one of DAMAGE unless it is of such a length."""
    with open_inside(folder, name, LARGEST_ARRAY) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("it is of another version")
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=LARGEST_HEADER)
        if shape != (length,) or by_column or dtype.str not in dtypes:
            raise ValueError(f"it has the shape {shown(shape)} of {dtype}")
        if size_of(file) != file.tell() + length * dtype.itemsize:
            raise ValueError(f"it has {size_of(file)} bytes")
        if not length:
            return np.zeros(0, dtype)
        return np.memmap(file, dtype, "r", file.tell(), (length,))


def _damaged(number: int, what: str = "item") -> UserError:
    return UserError(f"the prepared text is damaged at {what} {number}. Training needs it whole. Prepare it again.")


def folder_of(settings: SourceSettings) -> Path:
    """Return the folder that settings of source `prepared` name. Raises UserError where they name several."""
    names = [settings.files] if isinstance(settings.files, str) else settings.files or []
    if len(names) != 1:
        raise UserError(
            f"data.files is {settings.files} and data.source prepared. It needs one folder. Set data.files."
        )
    return Path(names[0])


def read_prepared(settings: SourceSettings, seed: int, epoch: int, cursor: Cursor | None) -> Items:
    """Yield the items in an order set by seed and epoch; a cursor is the place in it."""
    shards = Shards(folder_of(settings))
    count = len(shards)
    order = range(count) if (seed, epoch) == (0, 0) else np.random.default_rng([seed, epoch]).permutation(count)
    for k in range(place_in(cursor, "next")["next"] if cursor else 0, count):
        yield shards[int(order[k])], {"next": k + 1}


def fingerprint_prepared(settings: SourceSettings) -> str:
    """Return what changes with any of the arrays: their digests stand in the manifest."""
    return hashlib.sha256(sealed(read_manifest(folder_of(settings)))).hexdigest()
