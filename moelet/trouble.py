"""Where a step's trouble begins: by its gradients, and by its forward pass made once more."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moelet.data import Batch
from moelet.finite import Trouble
from moelet.loss import IGNORE, linear_cross_entropy
from moelet.modelling import GPT
from moelet.parallel.ranks import Team, local


def look_into(
    model: GPT,
    team: Team,
    trouble: Trouble,
    micro_batches: list[Batch],
    micro_step: Callable[[int], AbstractContextManager[None]],
) -> Trouble:
    """Return where the trouble begins: by the gradients, and by the forward pass made again with the same numbers.

    All ranks call this, each with its rows and its part of the model; `row_losses` are those of all, in the step's
    order, without rows of padding alone.
    """
    gradients, largest = gradients_not_finite(model), largest_gradient(model)
    losses: list[list[float]] = []  # of each micro-step
    with torch.no_grad(), first_not_finite(model) as found:
        for index, batch in enumerate(micro_batches):
            with micro_step(index):
                features_BSR = model.features(model(batch.input_ids, batch.segments).hidden)
                real_B = [True] * len(batch.labels) if batch.segments is None else batch.segments.any(1).tolist()
                rows = zip(features_BSR, batch.labels, real_B, strict=True)
                losses.append([_loss_of(row, labels, model.table) for row, labels, real in rows if real])
    told = team.gathered({"gradients": gradients, "largest": largest, "found": found, "losses": losses})
    gradients = list({entry["parameter"]: entry for each in told for entry in each["gradients"]}.values())
    found = next((each["found"] for each in told if each["found"]), [])
    row_losses = [loss for step in range(len(losses)) for each in told for loss in each["losses"][step]]
    spike = math.isfinite(trouble.loss) and math.isfinite(trouble.grad_norm)
    # backward goes from the last layer to the first: where it breaks, all that comes before in the network is broken
    last = max((each["largest"] for each in told), key=lambda norm_and_name: norm_and_name[0])[1] if spike else None
    layer = found[0] if found else gradients[-1]["parameter"] if gradients else last
    again = bool(found) or not all(math.isfinite(loss) for loss in row_losses) or spike
    return trouble._replace(layer=layer, again=again, gradients=gradients, row_losses=row_losses)


def _loss_of(features_SR: Tensor, labels_S: Tensor, table_VR: Tensor) -> float:
    nats = linear_cross_entropy(features_SR, table_VR, labels_S).item()
    return nats / max(1, int((labels_S != IGNORE).sum()))


@torch.no_grad()
def gradients_not_finite(model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameters whose gradients have numbers that aren't finite, in the order of the network."""
    found = []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool((gradient := local(parameter.grad)).isfinite().all()):
            nan, inf = int(gradient.isnan().sum()), int(gradient.isinf().sum())
            found.append({"parameter": name, "nan": nan, "infinite": inf})
    return found


@torch.no_grad()
def largest_gradient(model: nn.Module) -> tuple[float, str | None]:
    """Return the largest norm of a parameter's gradient, and the parameter."""
    norms = {name: local(p.grad).norm().item() for name, p in model.named_parameters() if p.grad is not None}
    return max(((norm, name) for name, norm in norms.items()), default=(0.0, None))


@contextmanager
def first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """While this lasts, have the names of modules whose output isn't finite in a list, in the order they run."""
    found: list[str] = []

    def look(name: str, module: nn.Module, given: Any, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            found.append(name)

    hooks = [module.register_forward_hook(partial(look, name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
