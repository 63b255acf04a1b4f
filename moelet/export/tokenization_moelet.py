"""The tokenizer of a model that moelet trained, for `transformers`: the SentencePiece model beside this file.

`AutoTokenizer.from_pretrained(folder, trust_remote_code=True)` takes it from here. It needs `sentencepiece`. A text
gets BOS in front; a control piece's name within a text is characters.
"""

import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

SPACE = "\u2581"  # SentencePiece writes a space as this character, so the character itself becomes its bytes
ESCAPED = [f"<0x{byte:02X}>" for byte in SPACE.encode()]
MODEL = "tokenizer.model"


class MoeletTokenizer(PreTrainedTokenizer):
    """Pieces of text, exactly as in training."""

    vocab_files_names = {"vocab_file": MODEL}  # noqa: RUF012  as transformers wants it
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.vocab_file = vocab_file
        self.model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        self.ids = {self.model.id_to_piece(i): i for i in range(self.model.get_piece_size())}
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.ids)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        pieces: list[str] = []
        for number, part in enumerate(text.split(SPACE)):
            pieces += (ESCAPED if number else []) + self.model.encode(part, out_type=str)
        return pieces

    def _convert_token_to_id(self, token: str) -> int:
        return self.ids.get(token, self.model.unk_id())

    def _convert_id_to_token(self, index: int) -> str:
        return self.model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of pieces; control pieces, where they are wanted, by their names."""
        text = ""
        ids: list[int] = []
        for i in map(self._convert_token_to_id, tokens):
            if self.model.is_control(i) or self.model.is_unknown(i):
                text, ids = text + self.model.decode(ids) + self.model.id_to_piece(i), []
            else:
                ids.append(i)
        return text + self.model.decode(ids)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [self.bos_token_id, *token_ids_0, *(token_ids_1 or [])]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        target = Path(save_directory, f"{filename_prefix}-{MODEL}" if filename_prefix else MODEL)
        if target.absolute() != Path(self.vocab_file).absolute():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
