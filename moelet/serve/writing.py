"""One text being written: the tokens of its prompt, then the new ones, each with what the model thought and where it
went. It knows no server.

Shapes: S sequence, V vocabulary, L layers, K chosen per token.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelet.decoding import Decoder, can_decode
from moelet.generate import Sampling, choose
from moelet.inspection.routing import mixtures, watched
from moelet.kv_cache import KVCache
from moelet.modelling import GPT
from moelet.tokenizer import Tokenizer

ROWS = 64  # of a prompt, whose logits are held at a time
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how the bytes of half a character end

Routes = list[list[tuple[int, float]]]  # of one token: each layer's experts, best first, with their weights


class Wish(NamedTuple):
    """What is asked for, of each text."""

    tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    likely: int | None  # alternatives of each token; None: not even its own probability
    prompt: bool  # whether the prompt's tokens are wanted too
    routing: bool


class Token(NamedTuple):
    """A token of the prompt, or a new one."""

    id: int
    text: str  # empty where it is but a part of a character, which the last part has
    logprob: float | None  # None: not asked for, or nothing came before it
    likely: list[tuple[int, float]]  # the likeliest ids in its place, with their logarithms
    routes: Routes  # empty where not asked for, or in a dense model


class Part(NamedTuple):
    """What there is to tell so far."""

    tokens: list[Token]
    of_prompt: bool = False


class Letter(NamedTuple):
    """What is told of one text of an order."""

    number: int  # which of the order's
    part: Part
    ended: str | None = None  # stop, length, time; failed: a bug, in the log


class Read(NamedTuple):
    """What the model made of the tokens it was given."""

    logits_V: Tensor  # of what follows the last
    hidden_SD: Tensor | None  # of each; None after a single one
    routes_LSK: list[tuple[Tensor, Tensor]]  # ids and weights, one pair a layer

    def routes(self, place: int) -> Routes:
        """Return where the token at `place` went."""
        pairs = [(ids_SK[place].tolist(), weights_SK[place].tolist()) for ids_SK, weights_SK in self.routes_LSK]
        return [list(zip(ids, weights, strict=True)) for ids, weights in pairs]


class Reader:
    """A model in evaluation mode, ready to read anybody's tokens. It is one thread's alone."""

    def __init__(self, model: GPT) -> None:
        self.model, self.decoder = model, Decoder(model) if can_decode(model) else None
        self.context, self.device = model.settings.max_length, model.table.device
        self._routers = [moe.gate for moe in mixtures(model)]

    def read(self, ids: Sequence[int], cache: KVCache) -> Read:
        """Return what the model makes of `ids`, which come after what the cache holds; they fit its context."""
        if self.decoder is not None and cache.length and len(ids) == 1:
            made = self.decoder.decode(torch.tensor(ids), cache)
            pairs = zip(made.ids_LBK, made.weights_LBK, strict=True) if self._routers else ()
            return Read(made.logits_BV[0], None, list(pairs))
        seen: list[tuple[Tensor, Tensor]] = []

        def note(layer: int, router: Any, given: Any, output: Any) -> None:
            seen.append((output[0], output[1]))

        with watched(self._routers, note):
            hidden_SD = self.model(torch.tensor([ids], device=self.device), None, cache).hidden[0]
        return Read(self.model.logits(hidden_SD[None, -1:])[0, 0], hidden_SD, seen)


class Writing:
    """A text to be written; `parts` writes it, a token a step, and `ended` says why it ended."""

    def __init__(self, reader: Reader, tokenizer: Tokenizer, prompt: Sequence[int], wish: Wish, seed: int) -> None:
        self._reader, self._tokenizer, self._wish = reader, tokenizer, wish
        self._ids, self._n_prompt = list(prompt), len(prompt)
        self._cache, self._random = KVCache(reader.model.settings), torch.Generator(reader.device)
        self._random.manual_seed(seed)
        self._text = Unfolding(tokenizer, wish.stops)
        self.ended: str | None = None  # stop: the end of the document, or a stop text; length: all that was asked for

    @property
    def n_new(self) -> int:
        return len(self._ids) - self._n_prompt

    @torch.no_grad()
    def parts(self) -> Iterator[Part]:
        """Yield after each step what it added; often nothing, while a character or a stop text is incomplete."""
        read = self._reader.read(self._ids, self._cache)
        if self._wish.prompt:
            yield Part(list(self._told_prompt(read)), of_prompt=True)
        for left in reversed(range(self._wish.tokens)):
            logits_V = read.logits_V[: self._reader.model.n_pieces]
            new_id = int(choose(logits_V[None], self._wish.sampling, self._random))
            if new_id == Tokenizer.eos_id:
                self.ended = "stop"
                break
            self._ids.append(new_id)
            token = self._scored(new_id, logits_V)
            if left or self._wish.routing:  # the last is read only to know where it goes
                read = self._read_on()
                token = token._replace(routes=read.routes(-1) if self._wish.routing else [])
            yield Part(self._text.add(token))
            if self._text.stopped:
                self.ended = "stop"
                return
        self.ended = self.ended or "length"
        yield Part(self._text.rest())

    def cut(self) -> Part:
        """Return what was still waiting, where `parts` is not asked for more."""
        return Part(self._text.rest())

    def _read_on(self) -> Read:
        """Read the newest token; where the context is full, forget the older half of it, as `moelet generate` does."""
        context = self._reader.context
        if self._cache.length + 1 > context:
            self._cache = KVCache(self._reader.model.settings)
            return self._reader.read(self._ids[-(context // 2) :], self._cache)
        return self._reader.read(self._ids[-1:], self._cache)

    def _scored(self, token_id: int, logits_V: Tensor | None) -> Token:
        """Return a token without its text and routes, as likely as the model has it: before temperature and cuts."""
        n_likely = self._wish.likely
        if n_likely is None or logits_V is None:
            return Token(token_id, "", None, [], [])
        logprob_V = logits_V.float().log_softmax(-1)
        best = logprob_V.topk(min(n_likely, len(logprob_V)))
        likely = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Token(token_id, "", logprob_V[token_id].item(), likely, [])

    def _told_prompt(self, read: Read) -> Iterator[Token]:
        """Yield the prompt's tokens, but the mark of a document's beginning."""
        assert read.hidden_SD is not None
        text, before_V = Unfolding(self._tokenizer, ()), None
        for start in range(0, self._n_prompt, ROWS):
            logits_cV = self._reader.model.logits(read.hidden_SD[None, start : start + ROWS])[0]
            for place, token_id in enumerate(self._ids[start : start + ROWS], start):
                token = self._scored(token_id, before_V)
                if self._wish.routing:
                    token = token._replace(routes=read.routes(place))
                if place or token_id != Tokenizer.bos_id:
                    yield from text.add(token)
                before_V = logits_cV[place - start, : self._reader.model.n_pieces]
        yield from text.rest()


class Unfolding:
    """Tokens in, tokens with their text out, once that can't change any more.

    A character of several tokens is its last one's text. What may be the beginning of a stop text waits; a stop text,
    and all that follows it, never comes out.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._parts: list[Token] = []  # of a character, still without text
        self._held: list[Token] = []  # with text, which may begin a stop text
        self.stopped = False

    def add(self, token: Token) -> list[Token]:
        """Return the tokens that are ready."""
        self._parts.append(token)
        text = self._tokenizer.decode([part.id for part in self._parts])
        return [] if text.endswith(UNFINISHED) else self._release(text, final=False)

    def rest(self) -> list[Token]:
        """Return the tokens that were waiting, at the end."""
        return self._release(self._tokenizer.decode([part.id for part in self._parts]), final=True)

    def _release(self, text: str, final: bool) -> list[Token]:
        if self._parts:
            *parts, last = self._parts
            self._held += [*parts, last._replace(text=text)]
            self._parts = []
        whole = "".join(token.text for token in self._held)
        found = [at for stop in self._stops if (at := whole.find(stop)) >= 0]
        if found:
            self.stopped = True
            ready, self._held = _cut(self._held, min(found)), []
            return ready
        waiting = 0 if final else max((_overlap(whole, stop) for stop in self._stops), default=0)
        ready, free = [], len(whole) - waiting
        while self._held and len(self._held[0].text) <= free:
            free -= len(self._held[0].text)
            ready.append(self._held.pop(0))
        return ready


def _cut(tokens: Sequence[Token], length: int) -> list[Token]:
    """Return the tokens of the first `length` characters."""
    kept = []
    for token in tokens:
        if length <= 0:
            break
        kept.append(token._replace(text=token.text[:length]))
        length -= len(token.text)
    return kept


def _overlap(text: str, stop: str) -> int:
    """Return how much of the end of `text` is the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
