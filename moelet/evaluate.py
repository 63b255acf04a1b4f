"""How good a model is on held-out text: loss, perplexity, bits per byte, and where its experts' load lies."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from moelet.data import Validation
from moelet.loss import IGNORE, bits_per_byte, linear_cross_entropy
from moelet.metrics import expert_load
from moelet.modelling import GPT
from moelet.moe import RouterStats, add_stats
from moelet.parallel.layout import Layout, settle, stats_of_all
from moelet.precision import autocast
from moelet.stopping import never, until


class Evaluation(NamedTuple):
    loss: float  # cross-entropy alone, nats per predicted token
    bits_per_byte: float  # of the text's UTF-8 bytes; the EOS tokens' nats count, they have no bytes
    perplexity: float
    tokens: int  # predicted
    bytes: int
    expert_load: list[list[float]]  # per layer, 1 = fair share


@torch.no_grad()
def evaluate(
    model: GPT,
    validation: Validation,
    dtype: torch.dtype,
    enough: Callable[[], bool] = never,
    layout: Layout = Layout(),  # noqa: B008  a constant
) -> Evaluation:
    """Return the model's measures on all of `validation`; the model is left in the mode it was in.

    With other ranks all call this, each with its own rows of the same batches. Raises StopAsked before the next batch
    once `enough()`.
    """
    device, training = model.table.device, model.training
    model.eval()
    nats, tokens = 0.0, 0
    totals: list[RouterStats] = []
    for batch in until(enough, validation.batches):
        batch = batch.to(device)
        with autocast(dtype, device):
            output = model(batch.input_ids, batch.segments)
            features_TR = model.features(output.hidden).flatten(0, 1)
            nats += linear_cross_entropy(features_TR, model.table, batch.labels.flatten()).item()
        tokens += int((batch.labels != IGNORE).sum())
        totals = add_stats(totals, output.router)
    model.train(training)
    settle(model, layout)
    nats = layout.team.summed(torch.tensor(nats, dtype=torch.float64, device=device)).item()
    (tokens,), totals = layout.team.total(tokens), stats_of_all(layout.team, totals)
    loss = nats / tokens
    bits = bits_per_byte(nats, validation.n_bytes)
    perplexity = math.exp(min(loss, 700.0))  # exp overflows a float64 past 709
    return Evaluation(loss, bits, perplexity, tokens, validation.n_bytes, expert_load(totals).tolist())
