"""One optimizer step as a function of its inputs, and of the state that it moves, which is `moelet.state`'s.

Everything random in a step comes from (seed, step, micro-step), so there is no generator state to save.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moelet.data import Batch
from moelet.errors import UserError, pick
from moelet.finite import SPIKE_WINDOW, BadStep, Trouble, wrong_with
from moelet.hparams import Hparams
from moelet.loss import BALANCE, IGNORE, bits_per_byte, linear_cross_entropy
from moelet.memory import is_shortage
from moelet.metrics import expert_load, peak_memory_mb, router_health
from moelet.moe import Router, RouterStats, add_stats
from moelet.optim import learning_rate
from moelet.parallel.layout import reduce_gradients, settle, stats_of_all
from moelet.parallel.ranks import local
from moelet.precision import autocast, make_scaler
from moelet.state import Training
from moelet.stopping import until
from moelet.trouble import look_into

MAX_SKIPS = 20  # batches passed over in a row: a scale has then fallen by 2^20, which no healthy run needs
CLIP_EPS = 1e-6  # as in torch's clip_grads_with_norm_
MIN_SCALE = 1.0  # of fp16: below, gradients larger than fp16 holds would be needed to overflow


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
    skipped: bool  # the batch was passed over and nothing changed
    trouble: Trouble | None = None  # why, unless fp16's gradients overflowed


def derived_seed(*parts: int) -> int:
    """Return a seed that is a function of `parts` alone."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def train_step(training: Training, micro_batches: list[Batch]) -> StepReport:
    """Make one optimizer step from the batches of its micro-steps: this rank's rows of them.

    Raises StopAsked before the next micro-step once `training.enough()`: nothing has changed then but the gradients.

    The loss is normalised by the predicted tokens of all micro-batches and ranks, and balance is that of all of them:
    how the global batch is cut changes nothing. The batches are on the host, as they come. Raises BadStep on a loss or
    gradient that isn't finite, or a spike, unless the settings say to pass the batch over; the weights are then as
    before. What torch says when memory runs out comes through, with the weights as before; see `forget_step`.
    """
    model, hparams = training.model.train(), training.hparams
    lr = learning_rate(hparams.optim, training.step, training.plan)
    for group in training.optimizer.param_groups:
        group |= {"lr": lr * group["lr_scale"], "step": training.step}
    targets = _targets(micro_batches)
    n_bytes = int(training.tokenizer.byte_lengths[targets].sum())
    n_targets, n_routed, n_bytes = training.team.total(len(targets), _routed_tokens(micro_batches), n_bytes)
    n_tokens, n_routed = max(1, n_targets), max(1, n_routed)
    micro_batches = [batch.to(training.device) for batch in micro_batches]

    balances, several = _balances(training), len(micro_batches) > 1
    routing = _route_ahead(training, micro_batches) if several and balances else []
    nats = torch.zeros((), dtype=torch.float64, device=training.device)
    balance: list[Tensor] = []
    totals: list[RouterStats] = []
    for index, batch in enumerate(until(training.enough, micro_batches)):
        reduce_gradients(model, training.layout, now=index == len(micro_batches) - 1)
        with _micro_step(training, index):
            output = model(batch.input_ids, batch.segments)
            features_TR = model.features(output.hidden).flatten(0, 1)
            cross_entropy = linear_cross_entropy(features_TR, model.table, batch.labels.flatten())
            loss = cross_entropy / n_tokens
            if balances:
                routing = routing or stats_of_all(training.team, output.router)
                value, slopes_LE = balance_slopes(routing, hparams)
                balance = [value]
                loss = loss + (slopes_LE * torch.stack([stats.probability for stats in output.router])).sum()
            if hparams.balance.z_loss and output.router:
                squares = torch.stack([stats.squares for stats in output.router])
                loss = loss + hparams.balance.z_loss * squares.mean() / n_routed
        (loss if training.scaler is None else training.scaler.scale(loss)).backward()
        nats += cross_entropy.detach()
        totals = add_stats(totals, output.router)
    totals = stats_of_all(training.team, totals) if several or not balances else routing
    nats = training.team.summed(nats)
    results = (nats, _clip(training), expert_load(totals), router_health(totals), *balance)
    total, grad_norm, load, (entropy, largest), *balance_loss = _to_host(*results)
    trouble = _update(training, total / n_tokens, grad_norm, micro_batches)
    skipped = trouble is not None
    if not skipped and hparams.balance.bias_rate is not None:
        _move_biases(training, totals, hparams.balance.bias_rate)
    training.step += int(not skipped)
    training.tokens += n_targets
    mean_balance = balance_loss[0] if balance_loss else None
    routing_report = (load, entropy, largest)
    counts = (total / n_tokens, n_targets, n_bytes)
    return StepReport(*counts, mean_balance, grad_norm, lr, *routing_report, skipped, trouble)


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
    """The random numbers and the precision of one micro-step; other ranks have other rows, and other dropout."""
    place = (training.hparams.train.seed, training.step, training.skipped_steps, index)
    torch.manual_seed(derived_seed(*place, *([] if training.team.leads else [training.team.rank])))
    with autocast(training.dtype, training.device):
        yield


@torch.no_grad()
def _route_ahead(training: Training, micro_batches: list[Batch]) -> list[RouterStats]:
    """Return the router statistics of all micro-batches together.

    The balance loss isn't a sum over micro-batches, so its gradient needs them before the first backward pass: one
    forward pass more, without the vocabulary head. The same seeds as in the real pass give the same dropout.
    """
    totals: list[RouterStats] = []
    for index, batch in enumerate(until(training.enough, micro_batches)):
        with _micro_step(training, index):
            totals = add_stats(totals, training.model(batch.input_ids, batch.segments).router)
    return stats_of_all(training.team, totals)


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
    parameters = list(training.model.parameters())
    norm = training.layout.grad_norm(training.model)
    # by a norm that isn't finite all would be spoilt, and no one could tell any more which gradient it came from
    usable = norm.where(norm.isfinite(), 0)
    if training.team.alone:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, usable)
    else:
        share = (limit / (usable + CLIP_EPS)).clamp(max=1.0)
        torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], share)
    return norm


def _update(training: Training, loss: float, grad_norm: float, micro_batches: list[Batch]) -> Trouble | None:
    """Apply the gradients and return None; or leave the weights and return why, where the batch may be passed over."""
    scaler, settings, model, team = training.scaler, training.hparams.train, training.model, training.team
    what = wrong_with(loss, grad_norm, training.losses, settings.spike_deviations)
    if what is None:  # not by scaler.step: for an optimizer other than torch's fused ones it would wait for the device
        _apply(training)
        training.losses = [*training.losses, loss][-SPIKE_WINDOW:]
        training.skipped_in_a_row = 0
        if scaler is not None:
            scaler.update()
        training.optimizer.zero_grad(set_to_none=True)
        return None
    overflow = scaler is not None and not (math.isfinite(loss) and math.isfinite(grad_norm))
    training.skipped_in_a_row += 1
    last = training.skipped_in_a_row >= MAX_SKIPS
    if overflow and scaler is not None:
        _halve_scale(scaler)
        last = last or scaler.get_scale() < MIN_SCALE
    else:
        last = last or settings.bad_step == "stop"
    trouble = Trouble(what, loss, grad_norm, None, False, [], [])
    if last or not overflow:
        trouble = look_into(model, team, trouble, micro_batches, lambda index: _micro_step(training, index))
        settle(model, training.layout)
    training.optimizer.zero_grad(set_to_none=True)
    if last:
        raise BadStep(_why_stopped(training, trouble, overflow), trouble)
    training.skipped_steps += 1
    return trouble


def _apply(training: Training) -> None:
    """Make the optimizer's step. Raises UserError where memory runs out in it, as it may have done half."""
    try:
        training.optimizer.step()
    except Exception as error:
        if not is_shortage(error):
            raise
        raise UserError(
            f"memory ran out in the optimizer, at step {training.step + 1} (peak {peak_memory_mb(training.device):.0f} "
            "MiB). What it needs doesn't depend on the batch, and this process's weights may be half changed, so "
            "nothing is saved. Earlier checkpoints are untouched: give the run more memory and resume, or start a "
            "smaller model."
        ) from error


def _halve_scale(scaler: torch.amp.GradScaler) -> None:
    """Lower fp16's loss scale, as every overflow does, also where it was another rank's or the loss's alone, which this
    rank's scaler hasn't seen."""
    state = scaler.state_dict()
    state |= {"scale": state["scale"] * state["backoff_factor"], "_growth_tracker": 0}
    scaler.update()
    scaler.load_state_dict(state)


def _why_stopped(training: Training, trouble: Trouble, overflow: bool) -> str:
    """Return the message for a step that isn't passed over."""
    at, count = training.step + 1, training.skipped_in_a_row
    if overflow:
        assert training.scaler is not None
        return (
            f"fp16 overflowed {count} times in a row at step {at}, and the loss scale is down to "
            f"{training.scaler.get_scale():g}: fp16 cannot represent this model's gradients. The weights are as before "
            'that step. Start a new run with train.precision "bf16" or "fp32", or a lower optim.lr.'
        )
    if count > 1:
        return f"{trouble.what} at step {at}, for the {count}th batch in a row: it is the weights, not the text."
    return f"{trouble.what} at step {at}; the weights are as before it."


def forget_step(training: Training) -> None:
    """Forget what a step that broke off has left: gradients, and what the scaler noted of them."""
    training.optimizer.zero_grad(set_to_none=True)
    if training.scaler is not None:
        state = training.scaler.state_dict()
        training.scaler = make_scaler(training.dtype, training.device)
        assert training.scaler is not None
        training.scaler.load_state_dict(state)


def metrics_row(training: Training, report: StepReport, since: tuple[int, float], rate: float) -> dict[str, Any]:
    """Return the line of metrics.jsonl for the step just made; throughput is that since the last line."""
    tokens, seconds = training.tokens - since[0], training.seconds - since[1]
    speed = tokens / seconds
    row = {
        "step": training.step,
        "total_steps": training.total_steps,
        "tokens": training.tokens,
        "seconds": training.seconds,
        "loss": report.loss,
        "bits_per_byte": bits_per_byte(report.loss * report.tokens, report.bytes),
        "balance_loss": report.balance_loss,
        "lr": report.lr,
        "grad_norm": report.grad_norm,
        "tokens_per_second": speed,
        "mfu": training.model.flops_per_token(training.hparams.model.max_length) * speed / rate,
        "expert_load": report.expert_load,
        "router_entropy": report.router_entropy,
        "router_largest": report.router_largest,
        "starving_experts": training.health.starving(),
        "memory_mb": peak_memory_mb(training.device),
    }
    if training.scaler is not None or training.skipped_steps:
        row |= {"skipped_steps": training.skipped_steps}
    if training.scaler is not None:
        row |= {"loss_scale": training.scaler.get_scale()}
    if training.micro_rows is not None:
        row |= {"micro_rows": training.micro_rows}
    return row
