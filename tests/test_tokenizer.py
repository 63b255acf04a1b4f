"""Tokenizer: nothing of a text is lost, nothing of it becomes a control id, and wrong input gets a clear answer."""

import argparse
import ast
import inspect
import io
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from moelet.errors import UserError
from moelet.tokenizer import LARGEST_FILE, Tokenizer

CORPUS = [inspect.getsource(module) for module in (argparse, ast, inspect, random, subprocess, textwrap)]
SNIPPETS = [
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "a",
    "the ",
    "  b",
    "\u00a0",
    "\u3000",
    "\u2581",
    "\u2585",
    "\ufeff",
    "\u200b",
]
SNIPPETS += ["\0", "<s>", "</s>", "<pad>", "<unk>", "<0x41>", "é", "e\u0301", "ﬁ", "①", "😀", "🏳️\u200d🌈", "한", "1234"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CORPUS, vocab_size=1000)


def random_texts(count: int) -> list[str]:
    """Unicode of all planes, awkward snippets, Latin-1 and near-words, a quarter each."""
    rng = random.Random(0)
    planes = [(0, 0x80), (0, 0x800), (0, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    kinds: list[Callable[[], str]] = [
        lambda: chr(rng.randrange(*rng.choice(planes))),
        lambda: rng.choice(SNIPPETS),
        lambda: chr(rng.randrange(256)),
        lambda: rng.choice("abc  \n"),
    ]
    return ["".join(kinds[k % 4]() for _ in range(rng.randint(0, 40))) for k in range(count)]


def sentencepiece_model(**changes: object) -> bytes:
    out = io.BytesIO()
    options: dict[str, object] = {"vocab_size": 600, "model_type": "bpe", "pad_id": 3, "byte_fallback": True}
    options |= {"minloglevel": 2, "normalization_rule_name": "identity"}
    lines = iter("\n".join(CORPUS).splitlines())
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=out, **(options | changes))
    return out.getvalue()


def test_every_text_comes_back_and_byte_lengths_add_up(tokenizer: Tokenizer) -> None:
    texts = random_texts(20_000) + [chr(byte) for byte in range(256)] + ["".join(map(chr, range(256))), *CORPUS]
    encoded = tokenizer.encode_batch(texts)
    assert tokenizer.decode_batch(encoded) == texts
    ids = np.concatenate(encoded)
    assert ids.dtype == np.int32 and ids.min() > tokenizer.pad_id and ids.max() < tokenizer.vocab_size
    sizes = [tokenizer.byte_lengths[row].sum() for row in encoded]
    assert sizes == [len(text.encode()) for text in texts]
    assert tokenizer.byte_lengths.shape == (1000,) and not tokenizer.byte_lengths[:4].any()


def test_unigram_is_lossless_too() -> None:
    tokenizer = Tokenizer.train(CORPUS, vocab_size=600, algorithm="unigram", sample_bytes=100_000)
    texts = random_texts(2000)
    encoded = tokenizer.encode_batch(texts)
    assert tokenizer.decode_batch(encoded) == texts
    assert [tokenizer.byte_lengths[row].sum() for row in encoded] == [len(text.encode()) for text in texts]


def test_one_text_encodes_as_in_a_batch(tokenizer: Tokenizer) -> None:
    texts = ["", "\u2581", "a\u2581\u2581b", *random_texts(300)]
    batch = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        np.testing.assert_array_equal(tokenizer.encode(text), ids)
        assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text
    assert tokenizer.encode_batch([]) == tokenizer.decode_batch([]) == []


def test_newlines_and_runs_of_spaces_are_pieces(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("):\n")) == 1
    assert len(tokenizer.encode("        ")) == 1


def test_a_reserved_character_does_not_drop_its_sentence() -> None:
    assert Tokenizer.train(["\u2585" + text for text in CORPUS], 600).fingerprint
    few = "\u2585zyzzyva " * 2000
    assert len(Tokenizer.train([few], 275).encode("zyzzyva")) < 7


def test_control_ids_decode_to_nothing(tokenizer: Tokenizer) -> None:
    ids = [1, *tokenizer.encode("some"), 2, 3, *tokenizer.encode(" text"), 0, 3]
    assert tokenizer.decode(ids) == "some text"
    assert tokenizer.decode([]) == tokenizer.decode([1, 2, 3]) == ""


def test_call_pads_on_the_right_and_truncation_keeps_eos(tokenizer: Tokenizer) -> None:
    short, long = tokenizer.encode("def f"), tokenizer.encode("import subprocess, sys  # and more")
    batch = tokenizer(["def f", "import subprocess, sys  # and more", ""])
    n = len(long) + 2
    expected = [[1, *short, 2], [1, *long, 2], [1, 2]]
    assert batch["input_ids"].tolist() == [row + [3] * (n - len(row)) for row in expected]
    assert batch["attention_mask"].tolist() == [[1] * len(row) + [0] * (n - len(row)) for row in expected]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == np.int64
    cut = tokenizer(["def f", "import subprocess, sys  # and more"], max_length=5)["input_ids"]
    assert cut[1].tolist() == [1, *long[:3], 2]
    assert tokenizer([])["input_ids"].shape == (0, 0)
    with pytest.raises(UserError, match="at least 2"):
        tokenizer(["a"], max_length=1)


def test_the_same_text_trains_the_same_bytes_and_no_more_is_read() -> None:
    read = []

    def texts() -> object:
        for text in CORPUS:
            read.append(text)
            yield text

    first, second = (Tokenizer.train(texts(), 600, sample_bytes=100_000) for _ in range(2))  # type: ignore[arg-type]
    assert first.model_bytes == second.model_bytes and first.fingerprint == second.fingerprint
    assert read == CORPUS[:2] * 2 and len(CORPUS[0].encode()) < 100_000 + 1024
    assert Tokenizer.train(CORPUS, 600).fingerprint != first.fingerprint


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.model")
    loaded = Tokenizer.load(tmp_path / "tokenizer.model")
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.vocab_size == 1000
    np.testing.assert_array_equal(loaded.encode(CORPUS[0]), tokenizer.encode(CORPUS[0]))


def test_training_says_nothing() -> None:
    code = "from moelet.tokenizer import Tokenizer as T; T.train(['some text to train on, a little ' * 9], 280)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_too_little_text_names_the_vocabulary_that_fits(algorithm: str) -> None:
    text = "hello world, hello text. " * 30
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size is 4096 .* at most \d+\. Set") as caught:
        Tokenizer.train([text], 4096, algorithm)
    largest = int(str(caught.value).split("at most ")[1].split(".")[0])
    assert Tokenizer.train([text], largest, algorithm).vocab_size == largest
    with pytest.raises(UserError, match=f"at most {largest}"):
        Tokenizer.train([text], largest + 1, algorithm)
    with pytest.raises(UserError, match=r"vocab_size is 260 .* at least \d+"):
        Tokenizer.train([text], 260, algorithm)


@pytest.mark.parametrize("texts", [[], [""], [" \n "]])
def test_no_text_is_an_error(texts: list[str]) -> None:
    with pytest.raises(UserError, match="no text"):
        Tokenizer.train(texts, 300)


def test_wrong_input_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"text 1 has the lone surrogate U\+D83D at character 2"):
        tokenizer.encode_batch(["fine", "ab\ud83d"])
    with pytest.raises(UserError, match=r"lone surrogate U\+DC00 at character 0"):
        Tokenizer.train(["\udc00"], 300)
    for ids in ([5, 1000], [-1], np.array([2**31])):
        with pytest.raises(UserError, match="out of range. Ids are 0 to 999"):
            tokenizer.decode(ids)
    with pytest.raises(UserError, match="must be one of: bpe, unigram"):
        Tokenizer.train(CORPUS, 300, "wordpiece")


def test_files_that_are_not_our_tokenizers_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "some.model"
    with pytest.raises(UserError, match="no tokenizer file"):
        Tokenizer.load(path)
    with pytest.raises(UserError, match="is a folder. It must be a file"):
        Tokenizer.load(tmp_path)
    with path.open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(UserError, match=f"has {LARGEST_FILE + 1} bytes"):
        Tokenizer.load(path)
    cases = {
        "is not a SentencePiece model": [b"", b"\0", b"{}", tokenizer.model_bytes[:1000]],
        "UNK, BOS, EOS, PAD at": [sentencepiece_model(pad_id=-1), sentencepiece_model(bos_id=2, eos_id=1)],
        "0 byte pieces": [sentencepiece_model(byte_fallback=False)],
        "a piece that is not valid Unicode": [tokenizer.model_bytes.replace("\u2581s".encode(), b"\xb0\x96\x81s", 1)],
        "changes characters, by a map": [sentencepiece_model(normalization_rule_name="nmt_nfkc")],
        "changes spaces or characters": [sentencepiece_model()],
    }
    for message, models in cases.items():
        for model in models:
            path.write_bytes(model)
            with pytest.raises(UserError, match=message) as caught:
                Tokenizer.load(path)
            assert str(path) in str(caught.value)
