"""How likely a model finds given text: the log-probability of continuations after contexts.

What tasks are scored by. How text becomes pairs of a context and a continuation, and what is cut where the model's
context is too short, is as in lm-eval (Gao et al.), so that figures can be compared.

Shapes: B batch, S sequence, D model, V vocabulary, c the tokens of all continuations of a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moelet.errors import UserError
from moelet.loss import CHUNK_ROWS
from moelet.modelling import GPT
from moelet.precision import autocast
from moelet.tokenizer import Tokenizer

Pair = tuple[list[int], list[int]]  # ids of a context, not empty, and of its continuation
Note = Callable[[int, int], None]  # told how many of how many are done


def silent(done: int, total: int) -> None:
    """Tell nobody."""


class Likelihood(NamedTuple):
    log_probability: float  # of the whole continuation, in nats
    greedy: bool  # whether each of its tokens is the likeliest


def encode_pairs(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> list[Pair]:
    """Return the ids of each context, BOS first, and of its continuation.

    The two are encoded as one text and parted at the length of the context's own ids; spaces that end a context count
    as the continuation's, since pieces begin with them.
    """
    trimmed = [context.rstrip() for context, _ in texts]
    whole = tokenizer.encode_batch([context + continuation for context, continuation in texts])
    alone = tokenizer.encode_batch(trimmed)
    bos = tokenizer.bos_id
    return [([bos, *context.tolist()], ids[len(context) :].tolist()) for context, ids in zip(alone, whole, strict=True)]


def windows(context: Sequence[int], continuation: Sequence[int], length: int) -> list[Pair]:
    """Return pairs that predict each id of the continuation once, for a model that sees `length` tokens.

    One pair where the continuation fits. Else the first `length` ids, then `length` more at a time, the last fewer,
    each after as many of those before as fit.
    """
    ids = list(continuation)
    pairs = [(list(context), ids[:length])]
    for start in range(length, len(ids), length):
        end = min(start + length, len(ids))
        pairs.append((ids[end - length - 1 : start], ids[start:end]))
    return pairs


def likelihoods(
    model: GPT, pairs: Sequence[Pair], batch_size: int, dtype: torch.dtype, note: Note = silent
) -> list[Likelihood]:
    """Return how likely each continuation is after its context, in the order of `pairs`.

    Computed in batches of like lengths, of up to `batch_size` whole contexts' tokens. A context that is too long loses
    its beginning; a continuation that is too long is scored in windows. Raises UserError for one without a token.
    """
    length = model.settings.max_length
    for context, continuation in pairs:
        if not continuation:
            raise UserError(
                f"a continuation has no token of its own after {len(context)} of its context: it is empty, or makes "
                "one piece with the context's end. It needs one. Begin it with a space."
            )
    parts = [windows(*pair, length) for pair in pairs]
    flat = [part for group in parts for part in group]
    inputs = [(context + continuation)[-length - 1 : -1] for context, continuation in flat]
    found: dict[int, Likelihood] = {}
    for group in _groups([len(row) for row in inputs], batch_size * length):
        rows = [(inputs[k], flat[k][1]) for k in group]
        found |= zip(group, _score(model, rows, dtype), strict=True)
        note(len(found), len(flat))
    ordered = iter(found[k] for k in range(len(flat)))
    return [_together([next(ordered) for _ in group]) for group in parts]


def _together(parts: Sequence[Likelihood]) -> Likelihood:
    return Likelihood(sum(part.log_probability for part in parts), all(part.greedy for part in parts))


def _groups(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Yield the places of rows of like lengths, longest first, no more than `budget` tokens with padding."""
    group: list[int] = []
    for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        if group and (len(group) + 1) * lengths[group[0]] > budget:
            yield group
            group = []
        group.append(k)
    if group:
        yield group


@torch.no_grad()
def _score(model: GPT, rows: Sequence[Pair], dtype: torch.dtype) -> list[Likelihood]:
    """Return the likelihood of each row: its inputs, and the continuation that the last of them predict.

    Rows are padded at the end, which causal attention never sees.
    """
    device, longest = model.table.device, max(len(ids) for ids, _ in rows)
    ids_BS = torch.tensor([ids + [Tokenizer.pad_id] * (longest - len(ids)) for ids, _ in rows], device=device)
    with autocast(dtype, device):
        hidden_BSD = model(ids_BS).hidden
    row_c = torch.tensor([k for k, (_, goal) in enumerate(rows) for _ in goal], device=device)
    place_c = torch.tensor([len(ids) - len(goal) + i for ids, goal in rows for i in range(len(goal))], device=device)
    goal_c = torch.tensor([goal for _, goals in rows for goal in goals], device=device)
    nats_c, greedy_c = _compare(model, hidden_BSD[row_c, place_c], goal_c)
    sizes = [len(goal) for _, goal in rows]
    parts = zip(nats_c.split(sizes), greedy_c.split(sizes), strict=True)
    return [Likelihood(-nats.double().sum().item(), bool(greedy.all())) for nats, greedy in parts]


def _compare(model: GPT, hidden_cD: Tensor, goal_c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nats of each goal, and whether it is the likeliest, both (c,).

    In float32, whatever the layers were computed in: 8 bits of a logit would make ties.
    """
    nats, greedy = [], []
    for at in range(0, len(goal_c), CHUNK_ROWS):
        goals = goal_c[at : at + CHUNK_ROWS]
        logits_cV = model.logits(hidden_cD[None, at : at + CHUNK_ROWS].to(model.table.dtype))[0]
        nats.append(logits_cV.logsumexp(-1) - logits_cV.gather(1, goals[:, None])[:, 0])
        greedy.append(logits_cV.argmax(-1) == goals)
    return torch.cat(nats), torch.cat(greedy)
