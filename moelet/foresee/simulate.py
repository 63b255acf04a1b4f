"""A training step without computing it: tensors without values go through the code that a card would take.

Where a card has a kernel of its own, what stands in for it is torch's operation of the same inputs and outputs:
Triton's products by one product an expert, each with its fair share of tokens; dropout by its masks alone.
"""

from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moelet.foresee.tally import Operation, Tally
from moelet.hparams import Hparams
from moelet.kernels.sorted_rows import fair_shares
from moelet.loss import linear_cross_entropy
from moelet.modelling import GPT
from moelet.optim import OPTIMIZERS
from moelet.sections import ModelSettings


class Simulated(NamedTuple):
    """One optimizer step, the second: the optimizer has its numbers by then."""

    weights: int  # bytes
    gradients: int  # those alive at the peak
    optimizer: int
    peak: int  # all that is alive at once, these included
    operations: list[Operation]


def on_card(settings: ModelSettings, new: bool) -> ModelSettings:
    """Return the settings that take a card's way through the code on tensors without values.

    `new`: of capability 8.0 or above, where Triton multiplies experts' rows without padding.
    """
    ways = {"attention": "sdpa", "experts": "grouped" if new else "batched", "dropout": 0.0}
    return settings.model_copy(update=ways)


def masks(hparams: Hparams, rows: int) -> int:
    """Return the bytes of the dropout masks of a micro-batch: of the embedding and of both branches of each layer."""
    s = hparams.model
    kept = 1 if hparams.train.checkpoint_activations else 2 * s.n_layers
    return (kept + 1) * rows * s.max_length * s.d_model if s.dropout else 0


def simulate(hparams: Hparams, vocab_size: int, rows: list[int], dtype: torch.dtype, new: bool) -> Simulated:
    """Return what a step of micro-batches of so many `rows` takes on a card."""
    settings = on_card(hparams.model, new)
    with FakeTensorMode(), fair_shares():
        model = GPT(settings, vocab_size)
        model.checkpoint_activations = hparams.train.checkpoint_activations
        optimizer = OPTIMIZERS[hparams.optim.optimizer](model, hparams.optim)
        with Tally(model.parameters()) as first:
            _step(hparams, model, optimizer, rows[:1], dtype)
        state = [item for entry in optimizer.state.values() for item in entry.values()]
        with Tally([*model.parameters(), *state], operations=True) as second:
            _step(hparams, model, optimizer, rows, dtype)
    weights = sum(parameter.numel() * parameter.dtype.itemsize for parameter in model.parameters())
    moments = sum(tensor.numel() * tensor.dtype.itemsize for tensor in state)
    peak = max(first.peak, second.peak) + masks(hparams, max(rows))
    assert second.operations is not None
    return Simulated(weights, second.gradients, moments, peak, second.operations)


def _step(hparams: Hparams, model: GPT, optimizer: torch.optim.Optimizer, rows: list[int], dtype: torch.dtype) -> None:
    """Make one optimizer step as `moelet.step` does, but for what looks at values."""
    balances = hparams.balance.loss is not None and hparams.model.n_experts > 1
    batches = [torch.zeros(count, hparams.model.max_length, dtype=torch.int64) for count in rows]
    if balances and len(batches) > 1:
        for ids in batches:
            with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                model(ids)
    for ids in batches:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = model(ids)
            features_TR = model.features(output.hidden).flatten(0, 1)
            loss = linear_cross_entropy(features_TR, model.table, ids.flatten())
            for stats in output.router if balances or hparams.balance.z_loss else []:
                loss = loss + stats.probability.sum() + stats.squares
        loss.backward()
        del output, features_TR, loss
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
