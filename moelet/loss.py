"""What training minimises and evaluation reports: cross-entropy, balance losses, bits per byte.

Shapes: T tokens, R embedding rank, V vocabulary, L layers, E experts.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelet.kernels.cross_entropy import can_sum, cross_entropy

IGNORE = -100  # a label that is no target; torch's own convention
CHUNK_ROWS = 512  # logits held at once: on a CPU 2.7x the rate of 4096 rows at a time (docs/experiments.md, 2), and
# 512 x 100,000 of them in float32 are 200 MB


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(h W^T)[label]; the gradients are made chunk by chunk in the forward pass.

    No more than CHUNK_ROWS x V logits ever exist. The products run in `dtype`, everything else in float32 or better.
    """

    @staticmethod
    def forward(ctx: Any, h_TR: Tensor, table_VR: Tensor, labels_T: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        needs_grad = any(ctx.needs_input_grad[:2])
        weight_VR = table_VR.detach().to(dtype)
        if can_sum(h_TR, weight_VR, dtype):
            h_TR = h_TR.detach().to(dtype)
            nats, *gradients = cross_entropy(h_TR, weight_VR, labels_T, IGNORE, needs_grad)
            ctx.save_for_backward(*gradients)
            ctx.formats = h_TR.dtype, table_VR.dtype
            return torch.tensor(nats, dtype=wide)
        total = torch.zeros((), dtype=wide, device=h_TR.device)
        grad_h_TR = torch.zeros_like(h_TR, dtype=wide) if needs_grad else None
        grad_table_VR = torch.zeros_like(table_VR, dtype=wide) if needs_grad else None
        for start in range(0, h_TR.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            h_cR, labels_c = h_TR[rows].detach().to(dtype), labels_T[rows]
            target_c = labels_c != IGNORE
            index_c1 = labels_c.where(target_c, 0)[:, None]
            logits_cV = (h_cR @ weight_VR.T).to(wide)
            log_total_c1 = logits_cV.logsumexp(1, keepdim=True)
            nats_c = log_total_c1[:, 0] - logits_cV.gather(1, index_c1)[:, 0]
            total += nats_c.where(target_c, 0).sum()
            if grad_h_TR is None or grad_table_VR is None:
                continue
            slope_cV = logits_cV.sub_(log_total_c1).exp_()  # softmax minus the one-hot target
            slope_cV.scatter_add_(1, index_c1, slope_cV.new_full(index_c1.shape, -1.0))
            slope_cV = slope_cV.mul_(target_c[:, None]).to(dtype)
            grad_h_TR[rows] = slope_cV @ weight_VR
            grad_table_VR += slope_cV.T @ h_cR
        if grad_h_TR is not None and grad_table_VR is not None:
            ctx.save_for_backward(grad_h_TR, grad_table_VR)
        ctx.formats = h_TR.dtype, table_VR.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_h_TR, grad_table_VR = ctx.saved_tensors
        return (grad_h_TR * grad).to(ctx.formats[0]), (grad_table_VR * grad).to(ctx.formats[1]), None, None


def linear_cross_entropy(h_TR: Tensor, table_VR: Tensor, labels_T: Tensor) -> Tensor:
    """Return the cross-entropy of `h_TR @ table_VR.T` summed over the labels that aren't IGNORE: nats, a scalar.

    A sum, so that the caller divides by the valid tokens of the whole global batch. Never holds T x V logits.
    """
    device = h_TR.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_TR.dtype
    with torch.autocast(device, enabled=False):
        total: Tensor = _LinearCrossEntropy.apply(h_TR, table_VR, labels_T, dtype)
    return total


def importance_loss(probability_LE: Tensor, load_LE: Tensor) -> Tensor:
    """Return the squared coefficient of variation over experts of the mean router probability, averaged over layers.

    0 when balanced, E - 1 when one expert has it all. Source: Shazeer et al. 2017, eq. 6-7.
    """
    return (probability_LE.var(-1, correction=0) / probability_LE.mean(-1).square()).mean()


def switch_loss(probability_LE: Tensor, load_LE: Tensor) -> Tensor:
    """Return E * sum_e load_e * probability_e, averaged over layers; 1 when balanced.

    Source: Fedus et al. 2021, eq. 4-6; for top-k routing, load is the share of all T*K assignments.
    """
    return (load_LE.detach() * probability_LE).sum(-1).mean() * probability_LE.shape[-1]


# each takes the mean router probability and the share of assignments per layer and expert, over the global batch
BALANCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"importance": importance_loss, "switch": switch_loss}


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Return the compression of a text in bits per UTF-8 byte, given the nats of all its tokens, EOS included."""
    return nats / (math.log(2) * n_bytes) if n_bytes else math.nan
