"""One optimizer step as a function of its inputs, and the state that it moves.

Everything random in a step comes from (seed, step, micro-step), so there is no generator state to save.
"""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moelet.checkpoint import Checkpoint
from moelet.data import START, Batch
from moelet.documents import Cursor
from moelet.errors import UserError, pick
from moelet.hparams import Hparams
from moelet.loss import BALANCE, IGNORE, linear_cross_entropy
from moelet.metrics import expert_load, router_health
from moelet.modelling import GPT
from moelet.moe import Router, RouterStats, add_stats
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
    router_entropy: list[float]  # per layer, mean over tokens: 1 is a router without preference
    router_largest: list[float]  # per layer, the largest score by size
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
    global batch is cut changes nothing. The batches are on the host, as they come. Raises UserError on a gradient that
    isn't finite; the weights are then as before.
    """
    model, hparams = training.model.train(), training.hparams
    lr = learning_rate(hparams.optim, training.step, training.plan)
    for group in training.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    targets = _targets(micro_batches)
    n_tokens, n_routed = max(1, len(targets)), max(1, _routed_tokens(micro_batches))
    micro_batches = [batch.to(training.device) for batch in micro_batches]

    routing = _route_ahead(training, micro_batches) if len(micro_batches) > 1 and _balances(training) else []
    nats = torch.zeros((), dtype=torch.float64, device=training.device)
    balance: list[Tensor] = []
    totals: list[RouterStats] = []
    for index, batch in enumerate(micro_batches):
        with _micro_step(training, index):
            output = model(batch.input_ids, batch.segments)
            features_TR = model.features(output.hidden).flatten(0, 1)
            cross_entropy = linear_cross_entropy(features_TR, model.table, batch.labels.flatten())
            loss = cross_entropy / n_tokens
            if _balances(training):
                value, slopes_LE = balance_slopes(routing or add_stats([], output.router), hparams)
                balance = [value]
                loss = loss + (slopes_LE * torch.stack([stats.probability for stats in output.router])).sum()
            if hparams.balance.z_loss and output.router:
                squares = torch.stack([stats.squares for stats in output.router])
                loss = loss + hparams.balance.z_loss * squares.mean() / n_routed
        (loss if training.scaler is None else training.scaler.scale(loss)).backward()
        nats += cross_entropy.detach()
        totals = add_stats(totals, output.router)
    results = (nats, _clip(training), expert_load(totals), router_health(totals), *balance)
    total, grad_norm, load, (entropy, largest), *balance_loss = _to_host(*results)
    skipped = _update(training, grad_norm)
    if not skipped and hparams.balance.bias_rate is not None:
        _move_biases(training, totals, hparams.balance.bias_rate)
    training.step += int(not skipped)
    training.tokens += len(targets)
    n_bytes = int(training.tokenizer.byte_lengths[targets].sum())
    mean_balance = balance_loss[0] if balance_loss else None
    routing_report = (load, entropy, largest)
    return StepReport(total / n_tokens, len(targets), n_bytes, mean_balance, grad_norm, lr, *routing_report, skipped)


def _targets(micro_batches: list[Batch]) -> np.ndarray:
    """Return all labels that are to be predicted; read while they are on the host, where that makes nobody wait."""
    labels = np.concatenate([batch.labels.numpy().ravel() for batch in micro_batches])
    return labels[labels != IGNORE]


def _routed_tokens(micro_batches: list[Batch]) -> int:
    """Return how many tokens of the step aren't padding."""
    return sum(
        batch.input_ids.numel() if batch.segments is None else int((batch.segments != 0).sum())
        for batch in micro_batches
    )


def _to_host(*tensors: Tensor) -> list[Any]:
    """Return the tensors' values in one transfer: the only moment of a step in which the host waits for the device."""
    device = tensors[0].device
    values = torch.cat([tensor.detach().double().flatten().to(device) for tensor in tensors]).cpu()
    parts = values.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).tolist() for part, tensor in zip(parts, tensors, strict=True)]


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


def balance_slopes(totals: list[RouterStats], hparams: Hparams) -> tuple[Tensor, Tensor]:
    """Return the balance loss of the global batch, and alpha times its slope in each layer's summed probabilities.

    The slope (L, E) times a micro-batch's own sums has exactly that micro-batch's part of the gradient.
    """
    rule = pick(BALANCE, str(hparams.balance.loss), "balance.loss")
    with torch.enable_grad():
        sums_LE = torch.stack([stats.probability for stats in totals]).detach().requires_grad_()
        load_LE = torch.stack([stats.assignments / stats.assignments.sum().clamp(min=1) for stats in totals])
        loss = rule(sums_LE / totals[0].tokens.clamp(min=1), load_LE)
        (slopes_LE,) = torch.autograd.grad(loss, sums_LE)
    return loss.detach(), slopes_LE * hparams.balance.alpha


@torch.no_grad()
def _move_biases(training: Training, totals: list[RouterStats], rate: float) -> None:
    """Move each expert's bias towards a fair share of the step's assignments.

    Source: Wang et al. 2024, "Auxiliary-loss-free load balancing", algorithm 1.
    """
    routers = [module for module in training.model.modules() if isinstance(module, Router)]
    for router, load in zip(routers, expert_load(totals), strict=True):
        assert router.bias is not None
        router.bias += rate * (1 - load).sign()


def _clip(training: Training) -> Tensor:
    """Clip the gradients, once they are those of the loss itself; return their norm before that."""
    if training.scaler is not None:
        training.scaler.unscale_(training.optimizer)
    limit = training.hparams.optim.grad_clip or math.inf
    return torch.nn.utils.clip_grad_norm_(training.model.parameters(), limit)


def _update(training: Training, grad_norm: float) -> bool:
    """Apply the gradients; return whether fp16 overflow made this step void."""
    scaler, optimizer = training.scaler, training.optimizer
    finite = math.isfinite(grad_norm)
    if finite:  # not by scaler.step: for an optimizer other than torch's fused ones it would wait for the device again
        optimizer.step()
    if scaler is not None:
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if scaler is None and not finite:
        raise UserError(
            f"the gradient norm is {grad_norm} at step {training.step + 1}; the weights are as before it. Training "
            "can't go on from numbers that aren't finite. Lower optim.lr, set optim.grad_clip, or lengthen "
            "optim.warmup_steps, and start anew or from the last checkpoint."
        )
    skipped = not finite
    _note_skip(training, skipped)
    return skipped


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
