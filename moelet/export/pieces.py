"""A tokenizer's pieces, and the tokenizer files of `transformers`.

Byte-pair encoding merges by rank everywhere, so a tokenizer.json gives the same ids. Unigram adds up scores,
SentencePiece in single precision and `tokenizers` in double: where two ways to cut a text are equally likely, as in
runs of spaces, rounding decides, and each decides otherwise (docs/export.md). So a unigram tokenizer goes along as it
is, a SentencePiece model, with a small class that runs it.
"""

import json
import struct
from collections.abc import Iterator
from importlib import resources
from typing import Any, NamedTuple

from moelet.tokenizer import SPACE, Tokenizer

# of sentencepiece_model.proto: fields, wire types, and values of the two enumerations
PIECES, TRAINER_SPEC = 1, 2
TEXT, SCORE, KIND = 1, 2, 3
MODEL_TYPE, BPE = 3, 2
VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

TOKENIZER_CODE = "tokenization_moelet.py"
CONTROL_NAMES = {"unk_token": "unk_id", "bos_token": "bos_id", "eos_token": "eos_id", "pad_token": "pad_id"}


class Piece(NamedTuple):
    text: str  # as SentencePiece writes it, spaces as U+2581
    score: float
    kind: int


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a protocol buffer, in order."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(message):
        number, wire = divmod(varint(), 8)
        if wire == VARINT:
            yield number, varint()
            continue
        size = varint() if wire == BYTES else {FIXED_64: 8, FIXED_32: 4}[wire]
        yield number, message[place : place + size]
        place += size


def pieces_of(tokenizer: Tokenizer) -> list[Piece]:
    """Return the pieces of a tokenizer, by id."""
    pieces = []
    for number, message in _fields(tokenizer.model_bytes):
        if number == PIECES:
            piece: dict[int, Any] = {KIND: NORMAL, SCORE: bytes(4)} | dict(_fields(message))
            pieces.append(Piece(piece[TEXT].decode(), struct.unpack("<f", piece[SCORE])[0], piece[KIND]))
    assert len(pieces) == tokenizer.vocab_size
    return pieces


def is_bpe(tokenizer: Tokenizer) -> bool:
    """Return whether its ids come from merges by rank alone, which others do exactly as SentencePiece does."""
    fields = dict(_fields(tokenizer.model_bytes))
    bpe = dict(_fields(fields.get(TRAINER_SPEC, b""))).get(MODEL_TYPE) == BPE
    # unused pieces are taken apart again; a piece with a plain space is one that a user asked for
    return bpe and all(piece.kind != UNUSED and " " not in piece.text for piece in pieces_of(tokenizer))


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a byte-pair tokenizer as `tokenizers` reads it.

    Its pieces have plain spaces, and nothing is normalised or split: so the character that SentencePiece writes for a
    space is one without a piece here, and becomes its bytes, as with us.
    """
    pieces = pieces_of(tokenizer)
    texts = [piece.text.replace(SPACE, " ") for piece in pieces]
    ids = {text: i for i, text in enumerate(texts)}
    assert len(ids) == len(pieces)
    normal = {text for text, piece in zip(texts, pieces, strict=True) if piece.kind == NORMAL}
    merges = []  # of each two pieces that make one, best first: SentencePiece merges whatever two they are
    for piece, text in zip(pieces, texts, strict=True):
        if piece.kind == NORMAL:
            halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
            merges += [(-piece.score, ids[text], ids[a], a, b) for a, b in halves if a in normal and b in normal]
    added = [
        {"id": i, "content": texts[i], "special": piece.kind != USER_DEFINED}
        | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for i, piece in enumerate(pieces)
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    begin = pieces[tokenizer.bos_id].text
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {begin: {"id": begin, "ids": [tokenizer.bos_id], "tokens": [begin]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": pieces[tokenizer.unk_id].text,
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
            "ignore_merges": False, "vocab": ids, "merges": [[a, b] for *_, a, b in sorted(merges)],
        },
    }  # fmt: skip


def tokenizer_files(tokenizer: Tokenizer, max_length: int) -> dict[str, bytes]:
    """Return the tokenizer's files for `transformers`, by name; our own model is among them.

    A text with "<s>" in it has those characters, not the control piece: that is what `split_special_tokens` says.
    """
    pieces = pieces_of(tokenizer)
    config: dict[str, Any] = {name: pieces[getattr(tokenizer, ours)].text for name, ours in CONTROL_NAMES.items()}
    config |= {"model_max_length": max_length, "split_special_tokens": True, "clean_up_tokenization_spaces": False}
    config |= {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}
    files = {"tokenizer.model": tokenizer.model_bytes}
    if is_bpe(tokenizer):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        files["tokenizer.json"] = json.dumps(tokenizer_json(tokenizer), ensure_ascii=False).encode()
    else:
        name = "MoeletTokenizer"
        config |= {"tokenizer_class": name, "auto_map": {"AutoTokenizer": [f"tokenization_moelet.{name}", None]}}
        files[TOKENIZER_CODE] = resources.files("moelet.export").joinpath(TOKENIZER_CODE).read_bytes()
    files["tokenizer_config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return files
