"""Text from a model: sampling with the KV cache, many prompts at once, streamed as it is made.

Shapes: B batch, S sequence, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moelet.decoding import Decoder, can_decode
from moelet.errors import UserError
from moelet.kv_cache import KVCache
from moelet.modelling import GPT
from moelet.tokenizer import Tokenizer

MAX_TEMPERATURE = 1e6  # all tokens are equally likely long before


class Sampling(NamedTuple):
    """How the next token is drawn."""

    temperature: float = 0.8  # 0: always the likeliest
    top_k: int | None = 50  # only the k likeliest; None: all
    top_p: float | None = None  # only the likeliest that together reach p (Holtzman et al. 2019); None: all
    seed: int = 0

    def check(self) -> None:
        """Raise UserError where a value is out of range."""
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise UserError(
                f"temperature is {self.temperature}. It must be 0 (greedy) to {MAX_TEMPERATURE:g}. Usual: 0.7 to 1."
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k is {self.top_k}. It must be at least 1. Leave it out to allow all tokens.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p}. It must be above 0 and at most 1. Usual: 0.9.")


def choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Return one token id for each row, (B,). Control tokens other than EOS are never chosen."""
    logits_BV = logits_BV.clone()
    logits_BV[:, [Tokenizer.unk_id, Tokenizer.bos_id, Tokenizer.pad_id]] = float("-inf")
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV -= logits_BV.amax(-1, keepdim=True)  # so that even the smallest temperature can't make infinities
    logits_BV /= max(sampling.temperature, torch.finfo(logits_BV.dtype).tiny)
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[1]:
        smallest_B1 = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV[logits_BV < smallest_B1] = float("-inf")
    if sampling.top_p is not None:
        sorted_BV, order_BV = logits_BV.sort(descending=True)
        probability_BV = sorted_BV.softmax(-1)
        before_BV = probability_BV.cumsum(-1) - probability_BV  # the first token to reach p is still allowed
        beyond_BV = before_BV >= sampling.top_p
        beyond_BV[:, 0] = False  # a p below what float32 can tell from 0 leaves the likeliest
        sorted_BV[beyond_BV] = float("-inf")
        logits_BV = torch.empty_like(logits_BV).scatter_(1, order_BV, sorted_BV)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def continuations(model: GPT, prompts: Sequence[Sequence[int]], n_new: int, sampling: Sampling) -> Iterator[list[int]]:
    """Yield, `n_new` times or until every row has ended, the next id of each prompt; PAD for rows that have ended.

    Prompts are ids, not empty, of any lengths (shorter ones are padded on the left). The model sees at most its
    context: when that is full, the older half is forgotten.
    """
    sampling.check()
    context, device = model.settings.max_length, model.table.device
    longest = max(map(len, prompts))
    ids_BS = torch.tensor([[Tokenizer.pad_id] * (longest - len(row)) + list(row) for row in prompts], device=device)
    ids_BS = ids_BS[:, -context:]
    generator = torch.Generator(device).manual_seed(sampling.seed)
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    cache, fresh_BS = KVCache(model.settings), ids_BS
    decoder = Decoder(model) if can_decode(model) else None
    for _ in range(n_new):
        if cache.length + fresh_BS.shape[1] > context:
            cache, fresh_BS = KVCache(model.settings), ids_BS[:, -(context // 2) :]
        if decoder is not None and cache.length and cache.segments is None:
            logits_BV = decoder.logits(fresh_BS[:, 0], cache)
        else:
            logits_BV = _next_logits(model, fresh_BS, cache)
        next_B = choose(logits_BV[:, : model.n_pieces], sampling, generator)
        next_B = next_B.where(~ended_B, Tokenizer.pad_id)
        ended_B |= next_B == Tokenizer.eos_id
        yield next_B.tolist()
        if bool(ended_B.all()):
            return
        fresh_BS = next_B[:, None]
        ids_BS = torch.cat([ids_BS, fresh_BS], 1)[:, -context:]


def _next_logits(model: GPT, fresh_BS: Tensor, cache: KVCache) -> Tensor:
    """Return the logits of the tokens that follow `fresh_BS`, (B, V), by the model itself."""
    real_BS = fresh_BS != Tokenizer.pad_id
    # a lone PAD is that of a row that has ended: real enough, nobody reads its output
    padding = fresh_BS.shape[1] > 1 and not bool(real_BS.all())
    output = model(fresh_BS, real_BS if padding else None, cache)
    return model.logits(output.hidden[:, -1:])[:, 0]


def stream_text(model: GPT, tokenizer: Tokenizer, prompt: str, n_new: int, sampling: Sampling) -> Iterator[str]:
    """Yield the continuation of one prompt piece by piece, until EOS or `n_new` tokens; characters are never split."""
    prompt_ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    ids: list[int] = []
    shown = 0
    for (next_id,) in continuations(model, [prompt_ids], n_new, sampling):
        if next_id == tokenizer.eos_id:
            break
        ids.append(next_id)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the bytes of a character are still incomplete
            yield text[shown:]
            shown = len(text)
    rest = tokenizer.decode(ids)[shown:]
    if rest:
        yield rest


def complete(model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], n_new: int, sampling: Sampling) -> list[str]:
    """Return the continuation of each prompt, all computed together."""
    prompt_ids = [[tokenizer.bos_id, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
    rows: list[list[int]] = [[] for _ in prompts]
    for next_ids in continuations(model, prompt_ids, n_new, sampling):
        for row, next_id in zip(rows, next_ids, strict=True):
            row.append(next_id)
    return [tokenizer.decode(row) for row in rows]
