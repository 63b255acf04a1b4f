"""Whether a step's numbers can be used: all finite, the loss no spike.

Where it began if they can't is `moelet.trouble`'s, what a step then does `moelet.step`'s, what a run does
`moelet.session`'s.
"""

import math
import statistics
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
def require_finite(tensors: dict[str, Tensor], what: str) -> None:
    """Raise UserError naming the first of `tensors` that holds a number that isn't finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(
                f"{what} {name} holds numbers that aren't finite, though every gradient was: nothing was saved, and "
                "earlier checkpoints are untouched. A learning rate far too high does this, or broken memory. Start a "
                "new run with a lower optim.lr, or resume from the last checkpoint and see whether it comes again."
            )
