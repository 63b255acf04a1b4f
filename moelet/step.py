"""One optimizer step as a function of its inputs, and the state that it moves.

Everything random in a step comes from (seed, step, micro-step), so there is no generator state to save.
"""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moelet.checkpoint import Checkpoint
from moelet.data import START, Batch
from moelet.documents import Cursor
from moelet.errors import UserError, pick
from moelet.hparams import Hparams
from moelet.loss import BALANCE, IGNORE, linear_cross_entropy
from moelet.metrics import expert_load
from moelet.modelling import GPT
from moelet.moe import RouterStats, add_stats
from moelet.optim import OPTIMIZERS, Plan, learning_rate
from moelet.precision import autocast, choose_device, choose_dtype, make_scaler
from moelet.tokenizer import Tokenizer

MAX_SKIPS = 20  # fp16 steps skipped in a row: the scale has then fallen by 2^20, which no healthy run needs


@dataclasses.dataclass
class Training:
    """Everything a run is made of. The second half is what changes, and what a checkpoint saves."""

    hparams: Hparams
    tokenizer: Tokenizer
    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    device: torch.device
    dtype: torch.dtype
    step: int = 0  # optimizer steps made
    tokens: int = 0  # predicted tokens seen
    seconds: float = 0.0  # of training alone
    elapsed: float = 0.0  # of everything, all sessions together
    plan: Plan = dataclasses.field(default_factory=list)  # how many steps the run has
    skipped_steps: int = 0  # batches whose fp16 gradients overflowed
    skipped_in_a_row: int = 0
    cursor: Cursor = dataclasses.field(default_factory=lambda: dict(START))
    best: dict[str, float] | None = None  # step and val_loss of the best checkpoint

    @property
    def total_steps(self) -> int | None:
        """The steps after which the run ends, None before a time budget knows."""
        return self.plan[-1][1] if self.plan else None


class StepReport(NamedTuple):
    loss: float  # nats per predicted token
    tokens: int  # predicted
    bytes: int  # that they stand for
    balance_loss: float | None
    grad_norm: float  # before clipping
    lr: float
    expert_load: list[list[float]]
    skipped: bool  # fp16 only: the gradients overflowed and nothing changed


def build(hparams: Hparams, tokenizer: Tokenizer) -> Training:
    """Return a run at its first step: model, optimizer and precision. Raises UserError for what doesn't fit."""
    device = choose_device(hparams.train.device)
    dtype = choose_dtype(hparams.train.precision, device)
    torch.manual_seed(hparams.train.seed)
    model = GPT(hparams.model, tokenizer.vocab_size).to(device)
    model.checkpoint_activations = hparams.train.checkpoint_activations
    optimizer = pick(OPTIMIZERS, hparams.optim.optimizer, "optim.optimizer")(model, hparams.optim)
    plan = [] if hparams.total_steps is None else [[0, hparams.total_steps]]
    return Training(hparams, tokenizer, model, optimizer, make_scaler(dtype, device), device, dtype, plan=plan)


def derived_seed(*parts: int) -> int:
    """Return a seed that is a function of `parts` alone."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def train_step(training: Training, micro_batches: list[Batch]) -> StepReport:
    """Make one optimizer step from the batches of its micro-steps.

    The loss is normalised by the predicted tokens of all micro-batches, and balance is that of all of them: how the
    global batch is cut changes nothing. Raises UserError on a gradient that isn't finite; the weights are then as
    before.
    """
    model, hparams = training.model.train(), training.hparams
    lr = learning_rate(hparams.optim, training.step, training.plan)
    for group in training.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    micro_batches = [batch.to(training.device) for batch in micro_batches]
    labels = torch.cat([batch.labels.flatten() for batch in micro_batches])
    targets = labels[labels != IGNORE]
    n_tokens = max(1, len(targets))

    routing = _route_ahead(training, micro_batches) if len(micro_batches) > 1 and _balances(training) else []
    nats, balance = 0.0, None
    totals: list[RouterStats] = []
    for index, batch in enumerate(micro_batches):
        with _micro_step(training, index):
            output = model(batch.input_ids, batch.segments)
            features_TR = model.features(output.hidden).flatten(0, 1)
            cross_entropy = linear_cross_entropy(features_TR, model.table, batch.labels.flatten())
            loss = cross_entropy / n_tokens
            if _balances(training):
                balance, slopes_LE = balance_slopes(routing or add_stats([], output.router), hparams)
                loss = loss + (slopes_LE * torch.stack([stats.probability for stats in output.router])).sum()
        (loss if training.scaler is None else training.scaler.scale(loss)).backward()
        nats += cross_entropy.item()
        totals = add_stats(totals, output.router)
    grad_norm, skipped = _update(training)
    training.step += int(not skipped)
    training.tokens += len(targets)
    n_bytes = int(training.tokenizer.byte_lengths[targets.cpu().numpy()].sum())
    return StepReport(nats / n_tokens, len(targets), n_bytes, balance, grad_norm, lr, expert_load(totals), skipped)


def _balances(training: Training) -> bool:
    return training.hparams.balance.loss is not None and training.hparams.model.n_experts > 1


@contextmanager
def _micro_step(training: Training, index: int) -> Iterator[None]:
    """The random numbers and the precision of one micro-step."""
    torch.manual_seed(derived_seed(training.hparams.train.seed, training.step, training.skipped_steps, index))
    with autocast(training.dtype, training.device):
        yield


@torch.no_grad()
def _route_ahead(training: Training, micro_batches: list[Batch]) -> list[RouterStats]:
    """Return the router statistics of all micro-batches together.

    The balance loss isn't a sum over micro-batches, so its gradient needs them before the first backward pass: one
    forward pass more, without the vocabulary head. The same seeds as in the real pass give the same dropout.
    """
    totals: list[RouterStats] = []
    for index, batch in enumerate(micro_batches):
        with _micro_step(training, index):
            totals = add_stats(totals, training.model(batch.input_ids, batch.segments).router)
    return totals


def balance_slopes(totals: list[RouterStats], hparams: Hparams) -> tuple[float, Tensor]:
    """Return the balance loss of the global batch, and alpha times its slope in each layer's summed probabilities.

    The slope (L, E) times a micro-batch's own sums has exactly that micro-batch's part of the gradient.
    """
    rule = pick(BALANCE, str(hparams.balance.loss), "balance.loss")
    with torch.enable_grad():
        sums_LE = torch.stack([stats.probability for stats in totals]).detach().requires_grad_()
        load_LE = torch.stack([stats.assignments / stats.assignments.sum().clamp(min=1) for stats in totals])
        loss = rule(sums_LE / totals[0].tokens.clamp(min=1), load_LE)
        (slopes_LE,) = torch.autograd.grad(loss, sums_LE)
    return loss.item(), slopes_LE * hparams.balance.alpha


def _update(training: Training) -> tuple[float, bool]:
    """Clip and apply the gradients; return their norm and whether fp16 overflow made this step void."""
    scaler, optimizer = training.scaler, training.optimizer
    if scaler is not None:
        scaler.unscale_(optimizer)
    limit = training.hparams.optim.grad_clip or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(training.model.parameters(), limit).item()
    skipped = False
    if scaler is not None:
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped = scaler.get_scale() < before
    elif math.isfinite(grad_norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if scaler is None and not math.isfinite(grad_norm):
        raise UserError(
            f"the gradient norm is {grad_norm} at step {training.step + 1}; the weights are as before it. Training "
            "can't go on from numbers that aren't finite. Lower optim.lr, set optim.grad_clip, or lengthen "
            "optim.warmup_steps, and start anew or from the last checkpoint."
        )
    _note_skip(training, skipped)
    return grad_norm, skipped


def _note_skip(training: Training, skipped: bool) -> None:
    training.skipped_in_a_row = training.skipped_in_a_row + 1 if skipped else 0
    training.skipped_steps += int(skipped)
    if training.skipped_in_a_row >= MAX_SKIPS:
        raise UserError(
            f"fp16 overflowed {MAX_SKIPS} times in a row at step {training.step + 1}. The gradients don't fit its "
            'range. Lower optim.lr, or set train.precision to "bf16" or "fp32".'
        )


def snapshot(training: Training, marks: dict[str, str]) -> Checkpoint:
    """Return everything that the rest of the run depends on."""
    optimizer = {
        f"{name}:{key}": value
        for name, parameter in training.model.named_parameters()
        for key, value in training.optimizer.state[parameter].items()
    }
    state = {name: getattr(training, name) for name in PROGRESS}
    state["scaler"] = None if training.scaler is None else training.scaler.state_dict()
    return Checkpoint(training.step, training.model.state_dict(), optimizer, state, marks)


PROGRESS = ("step", "tokens", "seconds", "elapsed", "plan", "skipped_steps", "skipped_in_a_row", "cursor", "best")


def restore(training: Training, saved: Checkpoint) -> None:
    """Put a snapshot back; from here on the run is the one it would have been."""
    training.model.load_state_dict(saved.model)
    parameters = dict(training.model.named_parameters())
    training.optimizer.state.clear()
    for key, value in saved.optimizer.items():
        name, entry = key.rsplit(":", 1)
        training.optimizer.state[parameters[name]][entry] = value.to(training.device)
    for name in PROGRESS:
        setattr(training, name, saved.state[name])
    if training.scaler is not None and saved.state["scaler"] is not None:
        training.scaler.load_state_dict(saved.state["scaler"])
