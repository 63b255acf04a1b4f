"""Text to token ids and back without loss, by SentencePiece. It knows no documents, rows or batches of training."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import sentencepiece

from moelet.errors import UserError
from moelet.storage.intake import open_file, open_inside
from moelet.text.tokenizer_file import check_model

SPACE = "\u2581"  # SentencePiece writes a space as this character, so the character itself needs an escape
RESERVED = "\u2585"  # SentencePiece skips a whole training sentence that holds this character
SENTENCE = 4096  # characters of a training sentence; with newlines inside they join pieces, which saves 2 to 6 % tokens
LARGEST_FILE = 16 * 2**20  # bytes; a vocabulary of 256,000 pieces takes about 4 MiB
PROBE = "  \ufb01\t①\r\n\n  é\U0001f600 12 "  # what a normalising model changes
LOSSLESS = {"normalization_rule_name": "identity", "byte_fallback": True, "split_digits": True}
SPACES = {"remove_extra_whitespaces": False, "add_dummy_prefix": False, "allow_whitespace_only_pieces": True}
ADVICE = "Train one with `moelet tokenizer train`."


class Tokenizer:
    """A SentencePiece model with byte fallback: `decode(encode(text)) == text` for every valid Unicode text.

    No text encodes to the four ids here, and they decode to nothing.
    """

    unk_id, bos_id, eos_id, pad_id = range(4)

    def __init__(self, model_bytes: bytes, origin: str = "the tokenizer model") -> None:
        """Raise UserError naming `origin` unless `model_bytes` is a lossless model with our ids."""
        try:
            check_model(model_bytes)
        except UserError as error:
            raise UserError(f"{origin} is not a SentencePiece model like ours: {error}. {ADVICE}") from None
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except (RuntimeError, UnicodeDecodeError):  # the latter for a message that quotes the file's bytes
            raise UserError(f"{origin} is not a SentencePiece model. {ADVICE}") from None
        self.model_bytes = model_bytes
        self.vocab_size: int = self._model.get_piece_size()
        ids = [self._model.unk_id(), self._model.bos_id(), self._model.eos_id(), self._model.pad_id()]
        if ids != [0, 1, 2, 3]:
            raise UserError(f"{origin} has UNK, BOS, EOS, PAD at {ids}. They must be at [0, 1, 2, 3]. {ADVICE}")
        if (count := sum(map(self._model.is_byte, range(self.vocab_size)))) != 256:
            raise UserError(f"{origin} has {count} byte pieces. Byte fallback needs all 256. {ADVICE}")
        escape = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._escape = np.array(escape, dtype=np.int32)
        probe = self.encode(PROBE)
        lengths = self.byte_lengths
        if self.decode(probe) != PROBE or lengths[probe].sum() != len(PROBE.encode()):
            raise UserError(f"{origin} changes spaces or characters. The text must come back unchanged. {ADVICE}")

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, algorithm: str = "bpe", sample_bytes: int = 10_000_000
    ) -> Self:
        """Return a tokenizer trained on the first `sample_bytes` UTF-8 bytes of `texts`: same text, same model bytes.

        `algorithm` is "bpe" or "unigram". Raises UserError when there is no text or it doesn't fit `vocab_size`.
        """
        if algorithm not in ("bpe", "unigram"):
            raise UserError(f"tokenizer.algorithm is '{algorithm}'. It must be one of: bpe, unigram.")
        sample = list(_sentences(texts, sample_bytes))
        if not any(sentence.strip() for sentence in sample):
            raise UserError("there is no text to train the tokenizer on. It needs some. Check the data settings.")
        model = io.BytesIO()
        try:
            options: dict[str, Any] = {"model_type": algorithm, "vocab_size": vocab_size, **LOSSLESS, **SPACES}
            options |= {"max_sentence_length": 4 * SENTENCE, "pad_id": cls.pad_id, "minloglevel": 2}
            options |= {"num_threads": 1}  # unigram's pieces depend on the number of threads
            sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sample), model_writer=model, **options)
        except RuntimeError as error:
            raise _explain(error, vocab_size, sum(map(len, sample))) from None
        return cls(model.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the tokenizer in the file at `path`; raise UserError for anything but a tokenizer like ours."""
        try:
            with open_file(Path(path), LARGEST_FILE) as file:
                return cls(file.read(), str(path))
        except FileNotFoundError:
            raise UserError(f"there is no tokenizer file {path}. It must be a SentencePiece model. {ADVICE}") from None
        except OSError as error:
            raise UserError(f"{path} can't be read ({error.strerror}). Set tokenizer.file to another file.") from None

    @classmethod
    def load_inside(cls, folder: Path, name: str) -> Self:
        """Return the tokenizer of a folder, as `load`, from a file that lies in it."""
        try:
            with open_inside(folder, name, LARGEST_FILE) as file:
                return cls(file.read(), str(folder / name))
        except OSError as error:
            raise UserError(f"{folder / name} can't be read ({error.strerror}). {ADVICE}") from None

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.model_bytes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model, in hexadecimal."""
        return hashlib.sha256(self.model_bytes).hexdigest()

    @cached_property
    def pieces(self) -> list[str]:
        """The text that each id stands for, for people to read: a byte outside of ASCII is <0xE2>, ids 0 to 3 <unk>."""
        pieces = [self._model.id_to_piece(i) for i in range(self.vocab_size)]
        ascii_bytes = (i for i in range(self.vocab_size) if self._model.is_byte(i) and int(pieces[i][3:-1], 16) < 128)
        for i in ascii_bytes:
            pieces[i] = chr(int(pieces[i][3:-1], 16))
        return [piece.replace(SPACE, " ") for piece in pieces]

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for (0 for ids 0 to 3), int64 (vocab_size,)."""
        lengths = np.array([len(piece.encode()) for piece in self.pieces], dtype=np.int64)
        lengths[[self._model.is_byte(i) for i in range(self.vocab_size)]] = 1
        lengths[[self._model.is_control(i) or i <= self.pad_id for i in range(self.vocab_size)]] = 0
        return lengths

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, int32 (n,), without BOS and EOS. Raises UserError for lone surrogates."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode(text)` for each text, in parallel."""
        parts = [part for text in texts for part in text.split(SPACE)]
        try:
            encoded = iter(self._model.encode(parts, return_type="numpy"))
        except (RuntimeError, TypeError):
            for number, text in enumerate(texts):
                _require_utf8(text, f"text {number}")
            raise
        counts = (text.count(SPACE) + 1 for text in texts)
        escaped = ([ids for part in islice(encoded, count) for ids in (self._escape, part)] for count in counts)
        return [np.concatenate(row[1:]) for row in escaped]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises UserError for ids out of range."""
        return self.decode_batch([ids])[0]

    def decode_batch(self, rows: Sequence[Sequence[int] | np.ndarray]) -> list[str]:
        """Return `decode(ids)` for each row of ids, in parallel."""
        arrays = [np.asarray(row, dtype=np.int64) for row in rows]
        for ids in arrays:
            if (outside := ids[(ids < 0) | (ids >= self.vocab_size)]).size:
                raise UserError(f"id {outside[0]} is out of range. Ids are 0 to {self.vocab_size - 1}. Check them.")
        return list(self._model.decode([ids[ids > self.pad_id].tolist() for ids in arrays])) if arrays else []

    def __call__(self, texts: Sequence[str], max_length: int | None = None) -> dict[str, np.ndarray]:
        """Return "input_ids" and "attention_mask", int64 (B, longest): rows of BOS, cut text, EOS, then PAD."""
        if max_length is not None and max_length < 2:
            raise UserError(f"max_length is {max_length}. BOS and EOS need 2. Give at least 2.")
        room = None if max_length is None else max_length - 2
        rows = [ids[:room] for ids in self.encode_batch(texts)]
        lengths = np.array([len(ids) + 2 for ids in rows], dtype=np.int64)
        attention_mask = (np.arange(lengths.max(initial=0)) < lengths[:, None]).astype(np.int64)
        input_ids = np.full_like(attention_mask, self.pad_id)
        for row, ids in zip(input_ids, rows, strict=True):
            row[: len(ids) + 2] = [self.bos_id, *ids, self.eos_id]
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def _sentences(texts: Iterable[str], sample_bytes: int) -> Iterator[str]:
    """Yield stretches of `texts` short enough for the trainer, until they hold `sample_bytes` UTF-8 bytes."""
    size = 0
    for number, text in enumerate(texts):
        _require_utf8(text, f"text {number}")
        for start in range(0, len(text), SENTENCE):
            if size >= sample_bytes:
                return
            sentence = text[start : start + SENTENCE]
            size += len(sentence.encode())
            yield from filter(None, sentence.split(RESERVED))


def _require_utf8(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"{name} has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        raise UserError(f"{found}. Text must be valid Unicode. Remove or replace it.") from None


def _explain(error: RuntimeError, vocab_size: int, characters: int) -> Exception:
    """Return a UserError for SentencePiece's complaint about the vocabulary's size, else `error` itself."""
    given = f"tokenizer.vocab_size is {vocab_size} and the text has {characters} characters"
    for words, limit in ((r"Vocabulary size too high .*<= (\d+)", "most"), (r"required_chars\. \d+ vs (\d+)", "least")):
        if found := re.search(words, str(error)):
            return UserError(f"{given}. It must be at {limit} {found[1]}. Set tokenizer.vocab_size to {found[1]}.")
    return error
