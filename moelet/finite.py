"""Whether a step's numbers can be used: all finite, the loss no spike; and where it began if they can't.

What a step then does is `moelet.step`'s, what a run does `moelet.session`'s.
"""

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moelet.errors import UserError

SPIKE_WINDOW = 128  # steps that a loss is compared with, as in OLMo-core's skip-step optimizer; from half of it on


class Trouble(NamedTuple):
    """What is wrong with a step that wasn't made, and where it began."""

    what: str
    loss: float
    grad_norm: float
    layer: str | None  # where numbers first weren't finite; of a spike, the parameter with the largest gradient
    again: bool  # whether the same forward pass, made once more, has it too
    gradients: list[dict[str, Any]]  # not finite: the parameter's name, and how many numbers are NaN or infinite
    row_losses: list[float]  # of each row of the step, nats a token, as the second forward pass has them


class BadStep(UserError):
    """A step that the settings don't allow to be passed over; the weights are as before it."""

    def __init__(self, message: str, trouble: Trouble) -> None:
        super().__init__(message)
        self.trouble = trouble


def is_spike(losses: list[float], loss: float, deviations: float | None) -> bool:
    """Return whether `loss` is more than so many standard deviations above the mean of the `losses` before it."""
    if deviations is None or len(losses) < SPIKE_WINDOW // 2:
        return False
    return loss > statistics.fmean(losses) + deviations * statistics.stdev(losses)


def wrong_with(loss: float, grad_norm: float, losses: list[float], deviations: float | None) -> str | None:
    """Return in words why a step must not be made, None where it may be."""
    if not math.isfinite(loss):
        return f"the loss is {loss} and the gradient norm is {grad_norm}"
    if not math.isfinite(grad_norm):
        return f"the gradient norm is {grad_norm}"
    if is_spike(losses, loss, deviations):
        mean, deviation = statistics.fmean(losses), statistics.stdev(losses)
        return (
            f"the loss is {loss:.3f}, {(loss - mean) / max(deviation, 1e-9):.1f} deviations above the mean of the last "
            f"{len(losses)} steps, {mean:.3f}"
        )
    return None


@torch.no_grad()
def gradients_not_finite(model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameters whose gradients have numbers that aren't finite, in the order of the network."""
    found = []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            nan, inf = int(parameter.grad.isnan().sum()), int(parameter.grad.isinf().sum())
            found.append({"parameter": name, "nan": nan, "infinite": inf})
    return found


@torch.no_grad()
def largest_gradient(model: nn.Module) -> str | None:
    """Return the parameter whose gradient has the largest norm."""
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    return max(norms, key=lambda name: norms[name]) if norms else None


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


@torch.no_grad()
def require_finite(tensors: dict[str, Tensor], what: str) -> None:
    """Raise UserError naming the first of `tensors` that holds a number that isn't finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(
                f"{what} {name} holds numbers that aren't finite, though every gradient was: nothing was saved, and "
                "earlier checkpoints are untouched. A learning rate far too high does this, or broken memory. Start a "
                "new run with a lower optim.lr, or resume from the last checkpoint and see whether it comes again."
            )
