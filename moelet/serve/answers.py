"""What was written, as OpenAI's clients read it: whole, or in chunks of a stream."""

import json
import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

from moelet.serve.requests import Request
from moelet.serve.writing import Letter, Part, Token
from moelet.tokenizer import Tokenizer

FINISH = {"time": "length"}  # OpenAI knows no other word for it


def as_json(value: Any) -> bytes:
    """Return JSON in ASCII: half a surrogate pair, from a name that somebody sent, is no reason to fail."""
    return json.dumps(value, separators=(",", ":")).encode()


class Answer:
    """The answer to one request: letters in, chunks or the whole out."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self._request, self._tokenizer = request, tokenizer
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }
        texts = len(request.prompts) * request.fields.n
        self._parts: list[list[Part]] = [[] for _ in range(texts)]
        self._offsets, self._begun = [0] * texts, [False] * texts
        self._ended: list[str | None] = [None] * texts
        self._new = 0

    @property
    def complete(self) -> bool:
        return all(self._ended)

    @property
    def failed(self) -> bool:
        return "failed" in self._ended

    def note(self, letters: Sequence[Letter]) -> list[int]:
        """Take letters in; return which texts they are about."""
        for letter in letters:
            self._parts[letter.number].append(letter.part)
            self._new += 0 if letter.part.of_prompt else len(letter.part.tokens)
            self._ended[letter.number] = letter.ended or self._ended[letter.number]
        return sorted({letter.number for letter in letters})

    def chunk(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return what is new of these texts."""
        return self._head | {"choices": [self._choice(index) for index in indices]}

    def whole(self) -> dict[str, Any]:
        """Return everything."""
        return self.chunk(range(len(self._parts))) | {"usage": self._usage()}

    def last_chunk(self) -> dict[str, Any]:
        """Return the chunk that comes after a stream where usage was asked for."""
        return self._head | {"choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        read = sum(map(len, self._request.prompts))
        return {"prompt_tokens": read, "completion_tokens": self._new, "total_tokens": read + self._new}

    def _choice(self, index: int) -> dict[str, Any]:
        """Return what came since the last time, and forget it."""
        parts, self._parts[index] = self._parts[index], []
        fields, ended = self._request.fields, self._ended[index]
        prompt = [token for part in parts if part.of_prompt for token in part.tokens]
        new = [token for part in parts if not part.of_prompt for token in part.tokens]
        text, shown = "".join(token.text for token in new), new
        if fields.echo and not self._begun[index]:
            text, shown = self._request.texts[index // fields.n] + text, prompt + new
        self._begun[index] = True
        choice: dict[str, Any] = {"index": index, "text": text}
        choice["logprobs"] = None if fields.logprobs is None else self._logprobs(shown, index, fields.logprobs)
        choice["finish_reason"] = None if ended is None else FINISH.get(ended, ended)
        if fields.routing:
            of = {"prompt": prompt, "tokens": new}
            choice["moelet"] = {name: [self._told(token) for token in tokens] for name, tokens in of.items()}
            choice["moelet"]["ended"] = ended
        return choice

    def _logprobs(self, tokens: Sequence[Token], index: int, n_likely: int) -> dict[str, Any]:
        pieces, offsets = self._tokenizer.pieces, []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.text)
        return {
            "tokens": [pieces[token.id] for token in tokens],
            "token_logprobs": [None if token.logprob is None else _finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {pieces[i]: _finite(logprob) for i, logprob in token.likely[:n_likely]} or None for token in tokens
            ],
            "text_offset": offsets,
        }

    def _told(self, token: Token) -> dict[str, Any]:
        """Return a token as the page shows it."""
        pieces = self._tokenizer.pieces
        return {
            "id": token.id,
            "text": token.text,
            "piece": pieces[token.id],
            "p": None if token.logprob is None else round(math.exp(token.logprob), 5),
            "likely": [[i, pieces[i], round(math.exp(logprob), 5)] for i, logprob in token.likely],
            "experts": [[[expert, round(weight, 4)] for expert, weight in layer] for layer in token.routes],
        }


def _finite(value: float) -> float:
    """JSON has no infinity: a token that can't be is a very unlikely one."""
    return max(value, -1e9)
