"""A SentencePiece model looked through before the library's parser sees it: a file of ours has nothing that could hurt.

Versions of the library up to 0.2.1 end the process on hostile models: on character maps that are not what they seem.
Ours normalise nothing, so a model with such a map is refused, as is one whose fields aren't whole. What the pieces are
is checked by `moelet.tokenizer`. The format is that of sentencepiece_model.proto, in protocol buffers' encoding.
"""

import math
import struct
from collections.abc import Iterator

from moelet.errors import UserError

MOST_PIECES = 2**19  # twice the largest vocabulary in use
LONGEST_PIECE = 1024  # bytes
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
FIXED = {FIXED32: 4, FIXED64: 8}  # bytes
PIECE, TRAINER, NORMALIZER, SELF_TEST, DENORMALIZER = range(1, 6)  # fields of a model
PIECE_FIELDS = {1: BYTES, 2: FIXED32, 3: VARINT}  # the text, its score, its kind
KINDS = range(1, 7)  # normal, unknown, control, user-defined, unused, byte
ONE_BYTE_KINDS = {bytes([kind]) for kind in KINDS}
CHARACTER_MAP, RULES = 2, 6  # fields of a normalizer


Field = tuple[int, int, int | bytes]  # number, wire type, value


def check_model(data: bytes) -> None:
    """Raise UserError, saying what is wrong, for anything but a whole model that normalises nothing."""
    pieces: set[bytes] = set()
    others: set[int] = set()
    for number, _, value in _fields(data):
        if not PIECE <= number <= DENORMALIZER or not isinstance(value, bytes) or number in others:
            raise UserError(f"it has a field {number} too many")
        if number == PIECE:
            text = _plain_piece(value) or _piece(value)
            if text in pieces:
                raise UserError(f"it has the piece {text[:40]!r} twice")
            pieces.add(text)
            if len(pieces) > MOST_PIECES:
                raise UserError(f"it has over {MOST_PIECES} pieces")
            continue
        others.add(number)
        parts = list(_fields(value))  # whole
        if number in (NORMALIZER, DENORMALIZER) and any(
            part[0] in (CHARACTER_MAP, RULES) and part[2] for part in parts
        ):
            raise UserError("it changes characters, by a map")
    if not pieces:
        raise UserError("it has no pieces")
    try:
        b"\0".join(pieces).decode()
    except UnicodeDecodeError:
        raise UserError("it has a piece that is not valid Unicode") from None


def _plain_piece(data: bytes) -> bytes | None:
    """Return the text of a piece written as the library does, nothing where it isn't: a vocabulary has 256,000."""
    if len(data) < 9 or data[0] != 0x0A or (end := 2 + data[1]) + 5 > len(data) or end <= 2 or data[1] > 127:
        return None
    kind = data[end + 5 :]
    if (
        data[end] != 0x15
        or data[end + 4] & 0x7F == 0x7F
        or (kind and (kind[0] != 0x18 or kind[1:] not in ONE_BYTE_KINDS))
    ):
        return None
    return data[2:end]


def _piece(data: bytes) -> bytes:
    """Return the text of a piece."""
    text = b""
    for number, wire, value in _fields(data):
        if PIECE_FIELDS.get(number) != wire:
            raise UserError(f"a piece has a field {number} too many")
        if isinstance(value, bytes) and number == 1:
            text = value
        elif isinstance(value, bytes) and not math.isfinite(struct.unpack("<f", value)[0]):
            raise UserError(f"the piece {text[:40]!r} has no finite score")
        elif isinstance(value, int) and value not in KINDS:
            raise UserError(f"the piece {text[:40]!r} is of kind {value}")
    if not 0 < len(text) <= LONGEST_PIECE:
        raise UserError(f"a piece has {len(text)} bytes, not 1 to {LONGEST_PIECE}")
    return text


def _fields(data: bytes) -> Iterator[Field]:
    """Yield the fields of a message. Raises UserError where it isn't whole."""
    at, size = 0, len(data)
    while at < size:
        key, at = _varint(data, at)
        wire = key & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield key >> 3, wire, value
            continue
        if wire == BYTES:
            length, at = _varint(data, at)
        elif wire in FIXED:
            length = FIXED[wire]
        else:
            raise UserError(f"it is damaged at a field of type {wire}")
        if key < 8 or length > size - at:
            raise UserError("it is damaged, or cut off")
        yield key >> 3, wire, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at a place, and where it ends."""
    if at < len(data) and data[at] < 128:
        return data[at], at + 1
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            if value >= 2**64:
                break
            return value, at
    raise UserError("it is damaged, or cut off")
