"""What turns gradients into new weights: parameter groups, optimizers, learning-rate schedules.

A schedule is a pure function of the step, so that a resumed run needs no scheduler state.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moelet.errors import pick
from moelet.moe import Router
from moelet.muon import Muon
from moelet.parallel.ranks import is_divided
from moelet.sections import OptimSettings

ADAM_EPS = 1e-8  # Kingma & Ba 2014
WSD_DECAY = 0.4  # the share of the steps after the warm-up over which "wsd" falls


def parameter_groups(model: nn.Module, settings: OptimSettings) -> list[dict[str, Any]]:
    """Return four groups: matrices, which decay; norms and other vectors, routers and embedding tables, which don't.

    `lr_scale` is what a group's learning rate is multiplied with at every step. An output table that isn't tied counts
    as a matrix.
    """
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    routers = [module.weight for module in model.modules() if isinstance(module, Router)]
    special = {id(parameter) for parameter in (*tables, *routers)}
    matrices = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in special]
    norms = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": settings.weight_decay, "lr_scale": 1.0},
        {"params": norms, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": routers, "weight_decay": 0.0, "lr_scale": (settings.router_lr or settings.lr) / settings.lr},
        {"params": tables, "weight_decay": 0.0, "lr_scale": (settings.embed_lr or settings.lr) / settings.lr},
    ]


def adamw(model: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """Return AdamW with its update in one fused kernel. Source: Loshchilov & Hutter 2017."""
    groups = parameter_groups(model, settings)
    if any(is_divided(parameter) for parameter in model.parameters()):
        return Muon(groups, settings.lr, settings.betas, ADAM_EPS)  # no group is Muon's: the same kernel, on parts
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=ADAM_EPS, fused=True)


def muon(model: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """Return Muon for the layers' matrices and AdamW for everything else."""
    matrices, *others = parameter_groups(model, settings)
    inside = {id(parameter) for name, parameter in model.named_parameters() if name.startswith("layers.")}
    turned = [parameter for parameter in matrices["params"] if id(parameter) in inside]
    left = [parameter for parameter in matrices["params"] if id(parameter) not in inside]
    scale = (settings.muon_lr or settings.lr) / settings.lr
    groups = [{**matrices, "params": turned, "lr_scale": scale, "muon": True}, {**matrices, "params": left}, *others]
    return Muon(groups, settings.lr, settings.betas, ADAM_EPS, settings.muon_every)


OPTIMIZERS: dict[str, Callable[[nn.Module, OptimSettings], torch.optim.Optimizer]] = {"adamw": adamw, "muon": muon}

# each takes the progress from the end of the warm-up (0) to the last step (1) and returns the share of lr - min_lr
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),  # Loshchilov & Hutter 2016
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
    "wsd": lambda progress: min(1.0, (1 - progress) / WSD_DECAY),  # Hu et al. 2024, "MiniCPM"
}


# [step, total], in order of steps: from that step on, the run is to end after `total` steps. One entry, at step 0, for
# a run of given length; a time budget plans on the way, and again when the machine turns out slower or faster.
Plan = list[list[int]]

WARMUP_SHARE = 10  # a plan made during the warm-up leaves it a tenth of the steps left


def learning_rate(settings: OptimSettings, step: int, plan: Plan) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    Linear from 0 over the warm-up, so that step warmup_steps - 1 has lr; then the schedule, so that the last step has
    min_lr. A warm-up longer than the run just never ends, but for a plan made on the way. Each plan goes on from
    where the schedule stands, so that the rate never jumps but at the end of a warm-up cut short.
    """
    decay = pick(SCHEDULES, settings.schedule, "optim.schedule")
    warmup = settings.warmup_steps
    for made_at, total in plan:
        if 0 < made_at < warmup:
            warmup = min(warmup, made_at + (total - made_at) // WARMUP_SHARE)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.min_lr + (settings.lr - settings.min_lr) * decay(_progress(step, plan, warmup))


def _progress(step: int, plan: Plan, warmup: int) -> float:
    """Return how far the schedule is at `step`: 0 until the warm-up ends, 1 at the last step."""
    progress = 0.0
    for k, (made_at, total) in enumerate(plan):
        start = max(made_at, warmup)
        end = max(plan[k + 1][0], warmup) if k + 1 < len(plan) else step + 1
        made = min(step + 1, end) - start
        if made <= 0:
            continue
        if start + made >= total:
            return 1.0
        progress += (1 - progress) * made / (total - start)
    return progress
