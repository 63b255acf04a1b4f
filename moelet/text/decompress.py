"""The text of a compressed file, as a stream: gzip, bzip2 or Zstandard, however many members it is made of."""

import bz2
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO

import pyarrow as pa

from moelet.text.pulse import beat

BLOCK = 64 * 2**10  # bytes decompressed at once; with larger blocks no format was faster


class Decompressed(io.RawIOBase):
    """The text of `file`, which is closed with it. Damage raises EOFError, ArrowException,
    or OSError without errno.

    Blocks begin and end where they do however the text is read. Damage costs the block that it is in, so every pass
    over a damaged file, resumed or not, gets the same text.
    """

    def __init__(self, file: BinaryIO, ending: str) -> None:
        self._file, self._blocks, self._rest = file, CODECS[ending](file), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            beat()
            self._rest = memoryview(next(self._blocks, b""))
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _by_arrow(codec: str, file: BinaryIO) -> Iterator[bytes]:
    stream = pa.CompressedInputStream(file, codec)
    while block := stream.read(BLOCK):
        yield block


def _bzip2(file: BinaryIO) -> Iterator[bytes]:
    """Arrow fails at an empty stream among others, and `bz2.open` takes a broken one for the end of the file."""
    data = file.read(BLOCK)
    while data:
        stream = bz2.BZ2Decompressor()
        while not stream.eof:
            if stream.needs_input and not data:
                raise EOFError("the file ends in the middle of a stream")
            if block := stream.decompress(data, BLOCK):
                yield block
            data = file.read(BLOCK) if stream.needs_input else b""
        data = stream.unused_data or file.read(BLOCK)


CODECS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {
    ".gz": partial(_by_arrow, "gzip"),
    ".bz2": _bzip2,
    ".zst": partial(_by_arrow, "zstd"),
}
