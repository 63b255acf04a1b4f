"""Text of every kind through the tokenizer and back."""

import argparse
import inspect
import itertools
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scorecard import Trials

from moelet import data
from moelet.errors import UserError
from moelet.sections import DataSettings
from moelet.tokenizer import Tokenizer

CONTROLS = ("<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<0xE2>", "<|endoftext|>", "\u2581", "\u2585", "\u2047")
AWKWARD = (
    *CONTROLS,
    *("\r\n", "\n\n", "\t\t", "    ", " \u00a0 ", "\u3000", "\ufeff", "\u200b", "\u200d", "\u200e", "\u202e", "\u2066"),
    *("e\u0301", "\u1e69\u0323", "ﬁ", "①", "İ", "ß", "مرحبا", "שלום", "각", "\u1100\u1161\u11a8", "नमस्ते", "𝔘𝔫𝔦"),
    *("👩\u200d👩\u200d👧", "🏳️\u200d🌈", "🇩🇪", "\x00", "\x1b[31m", "\x7f", "\x85", "\u2028", "\uffff", "\ufffd"),
    *("\U0010ffff", "\ue000"),
)
PLANES = [(plane << 16, (plane + 1) << 16) for plane in range(17)]


def some_text(draw: random.Random) -> str:
    """Return characters of all 17 planes, marks that combine, controls, awkward ones and plain words, mixed."""
    kinds: list[Callable[[], str]] = [
        lambda: chr(draw.randrange(*draw.choice(PLANES))),
        lambda: draw.choice(AWKWARD),
        lambda: draw.choice("aeiou") + "".join(chr(draw.randrange(0x300, 0x370)) for _ in range(draw.randrange(4))),
        lambda: chr(draw.randrange(0x20)),
        lambda: draw.choice(["the ", "def ", "  ", " return x", "12345 "]),
    ]
    found = "".join(draw.choice(kinds)() for _ in range(draw.randrange(1, 30)))
    return "".join(character for character in found if not 0xD800 <= ord(character) < 0xE000)  # no lone surrogates


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    corpus = [inspect.getsource(module) for module in (argparse, inspect)] + [" ".join(AWKWARD)] * 50
    return {kind: Tokenizer.train(corpus, 1000, kind, 100_000) for kind in ("bpe", "unigram")}


@pytest.mark.check(17)
def test_any_text_through_the_tokenizer(trials: Trials, tokenizers: dict[str, Tokenizer]) -> None:
    """It comes back as it was, to the last character, whatever it looks like; none of it becomes a control id."""
    texts = [some_text(trials.random) for _ in range(trials.count(small=1000, full=20_000))]
    texts += [chr(byte) for byte in range(256)]
    assert {unicodedata.category(character) for text in texts for character in text} >= {"Cc", "Cf", "Mn", "Zs", "Co"}
    for kind, tokenizer in tokenizers.items():
        encoded = tokenizer.encode_batch(texts)
        decoded = tokenizer.decode_batch(encoded)
        for text, ids, back in zip(texts, encoded, decoded, strict=True):
            with trials.one(f"{kind}: {text!r}"):
                assert back == text
                assert ids.min() > tokenizer.pad_id and ids.max() < tokenizer.vocab_size
                assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


@pytest.mark.check(17)
def test_text_that_looks_like_a_control_piece(trials: Trials, tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    """It is spelled like any other, in every batch that is trained on: control ids stand only where documents begin,
    end or are padded."""
    for kind, tokenizer in tokenizers.items():
        for mark in CONTROLS:
            with trials.one(f"{kind}: {mark}"):
                for text in (mark, mark * 3, f" {mark} ", f"x{mark}", f"{mark}\n{mark}"):
                    assert tokenizer.encode(text).min() > tokenizer.pad_id
                    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]) == text
        with trials.one(f"{kind}: a file"):
            text = "\n".join(f"{mark} and {mark}" for mark in CONTROLS)
            (tmp_path / "a.txt").write_text(text, newline="")
            settings = DataSettings(source="files", files=str(tmp_path), validation_fraction=1e-9)
            rows = data.training_rows(settings, tokenizer, 1024, 0, data.START)
            (row, _), (again, _) = itertools.islice(rows, 2)
            assert row.tolist().count(tokenizer.bos_id) == row.tolist().count(tokenizer.eos_id) == 1
            assert tokenizer.decode(row) == text
            np.testing.assert_array_equal(row, again)


@pytest.mark.check(17)
def test_half_a_character(trials: Trials, tokenizers: dict[str, Tokenizer]) -> None:
    """A lone surrogate is no text in any encoding: refused, with its place."""
    for kind, tokenizer in tokenizers.items():
        for text in ("\ud800", "ab\udfff", "\udc00\ud800"):
            with trials.one(f"{kind}: {text!r}"), pytest.raises(UserError, match=r"lone surrogate U\+D.* at character"):
                tokenizer.encode(text)
