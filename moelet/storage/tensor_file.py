"""Tensors in a safetensors file that a stranger may have written: the header is checked before any memory is taken.

What it says of places and sizes must be exactly the file: tensor after tensor from the header's end to the file's, each
as long as its shape and number format make it. Then a tensor is read into memory of its own size, from the file that
was checked, whatever stands under its name by then. Files are written by the library.
"""

import math
from collections.abc import Sequence
from io import BufferedReader
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelet.errors import UserError
from moelet.storage.intake import ADVICE, parse_json, shown, size_of

LARGEST_HEADER = 4 * 2**20  # bytes; 30,000 tensors take 3 MB, and in memory a header takes up to 30 times its size
LARGEST_FILE = 2**44  # bytes; what is in it is held against the model's shape and the machine's memory
MOST_DIMENSIONS = 8
ALL = slice(None)  # rows
LONGEST_NAME = 512  # characters
FORMATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Place(NamedTuple):
    """Where a tensor lies in the file, and what it is."""

    format: str
    shape: tuple[int, ...]
    start: int  # bytes from the file's beginning


class TensorFile:
    """The tensors of an open safetensors file, by name. Who opened the file closes it."""

    def __init__(self, file: BufferedReader, where: str) -> None:
        """Raise UserError, naming `where`, unless the file is whole and nothing else."""
        self._file, self._where = file, where
        size = size_of(file)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise self.damaged(f"its header would have {length} of {size} bytes, at most {LARGEST_HEADER}")
        header = parse_json(file.read(length), f"the header of {where}")
        if not isinstance(header, dict):
            raise self.damaged("its header is no JSON object")
        header.pop("__metadata__", None)
        self.places = self._checked(header, 8 + length, size)

    def _checked(self, header: dict[str, Any], start: int, size: int) -> dict[str, Place]:
        spans: list[tuple[int, int]] = []
        places = {}
        for name, entry in header.items():
            place, end = self._place(name, entry, start)
            places[name] = place
            spans.append((place.start, end))
        at = start
        for begin, end in sorted(spans):
            if begin != at:
                raise self.damaged(f"its tensors overlap, or leave a gap, at byte {min(begin, at)}")
            at = end
        if at != size:
            raise self.damaged(f"its tensors end at byte {at}, the file at {size}")
        return places

    def _place(self, name: str, entry: Any, start: int) -> tuple[Place, int]:
        """Return the place that the header says of a tensor, and its end."""
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise self.damaged(f"it names a tensor {shown(name)}")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self.damaged(f"it says of {shown(name)} something else than dtype, shape and data_offsets")
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(kind, str) or kind not in FORMATS:
            raise self.damaged(f"{name} is {shown(kind)}, not one of {', '.join(FORMATS)}")
        if not _counts(shape) or len(shape) > MOST_DIMENSIONS or not _counts(offsets) or len(offsets) != 2:
            raise self.damaged(f"{name} has the shape {shown(shape)} at {shown(offsets)}")
        if math.prod(max(1, width) for width in shape) >= 2**48:  # where one is 0, the strides are as large as these
            raise self.damaged(f"{name} has the shape {shown(shape)}")
        begin, end = offsets
        if end - begin != math.prod(shape) * FORMATS[kind].itemsize:
            raise self.damaged(f"{name} has {end - begin} bytes, not what its shape {shown(shape)} in {kind} takes")
        return Place(kind, tuple(shape), start + begin), start + end

    def read(self, name: str, rows: slice = ALL) -> Tensor:
        """Return a tensor, or some of its rows. Raises UserError where the file has become shorter meanwhile."""
        place, shape = self.places[name], self.places[name].shape
        start, stop, _ = rows.indices(shape[0]) if shape else (0, 0, 1)
        shape = (max(0, stop - start), *shape[1:]) if shape else shape
        tensor = torch.empty(shape, dtype=FORMATS[place.format])
        into = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self._file.seek(place.start + start * math.prod(shape[1:]) * tensor.itemsize)
        while into:
            count = self._file.readinto(into)
            if not count:
                raise self.damaged(f"it ends within {name}")
            into = into[count:]
        return tensor

    def read_all(self) -> dict[str, Tensor]:
        return {name: self.read(name) for name in self.places}

    def damaged(self, what: str) -> UserError:
        """Return the error for a file that isn't what it should be."""
        return UserError(f"{self._where} can't be read as safetensors: {what}. {ADVICE}")


class Tensors:
    """The tensors of several files together: whole ones, and those whose rows are divided, as `name@first row`."""

    def __init__(self, files: Sequence[TensorFile]) -> None:
        """Raise UserError unless the parts of each tensor make one: row after row, each of the same format."""
        found: dict[str, list[tuple[int, TensorFile, str]]] = {}
        for file in files:
            for name in file.places:
                whole, mark, row = name.partition("@")
                if mark and not (row.isascii() and row.isdecimal() and len(row) < 16):
                    raise file.damaged(f"it names a tensor {shown(name)}")
                found.setdefault(whole, []).append((int(row or 0), file, name))
        self._parts = {name: sorted(parts, key=lambda part: part[0]) for name, parts in found.items()}
        self.shapes = {name: self._shape(name, parts) for name, parts in self._parts.items()}

    def _shape(self, name: str, parts: list[tuple[int, TensorFile, str]]) -> tuple[int, ...]:
        first = parts[0][1].places[parts[0][2]]
        if len(parts) == 1 and "@" not in parts[0][2]:
            return first.shape
        rows = 0
        for row, file, part in parts:
            place = file.places[part]
            if row != rows or "@" not in part or place.format != first.format or place.shape[1:] != first.shape[1:]:
                raise file.damaged(f"{shown(part)} doesn't go on at row {rows} of {shown(name)}")
            rows += place.shape[0] if place.shape else 0
        return (rows, *first.shape[1:])

    def read(self, name: str, rows: slice = ALL) -> Tensor:
        """Return a tensor, or some of its rows, whichever files they are in. Raises UserError where a file has become
        shorter meanwhile."""
        if not (shape := self.shapes[name]):
            return self._parts[name][0][1].read(self._parts[name][0][2])
        start, stop, _ = rows.indices(shape[0])
        tensors = []
        for first, file, part in self._parts[name]:
            begin, end = max(start, first), min(stop, first + file.places[part].shape[0])
            if begin < end:
                tensors.append(file.read(part, slice(begin - first, end - first)))
        if not tensors:
            tensors = [self._parts[name][0][1].read(self._parts[name][0][2], slice(0, 0))]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def read_all(self) -> dict[str, Tensor]:
        return {name: self.read(name) for name in self._parts}

    def bytes_of(self, name: str, rows: slice = ALL) -> int:
        """Return how much memory a tensor takes, or some of its rows."""
        shape, (_, file, first) = self.shapes[name], self._parts[name][0]
        counted = (len(range(*rows.indices(shape[0]))), *shape[1:]) if shape else ()
        return math.prod(counted) * FORMATS[file.places[first].format].itemsize


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)
