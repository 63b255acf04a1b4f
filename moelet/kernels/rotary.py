"""Norm and rotation of queries and keys on a CPU: `rotary.c` as an operation with a gradient.

Shapes: B batch, S sequence, H heads, C head width.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelet.kernels.native import BLOCK, LANES, address, library, threads, usable


def can_rotate(x_BSHC: Tensor, weight: Tensor | None, turned: bool) -> bool:
    """Return whether the kernel computes these heads."""
    fits = x_BSHC.shape[-1] % (2 * LANES if turned else LANES) == 0
    return fits and usable(x_BSHC.dtype, x_BSHC, weight) and (weight is None or weight.dtype == torch.float32)


class _Problem(ctypes.Structure):
    """`problem` of rotary.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "heads", "width")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("weight", "cos", "sin", "positions")),
    )


class Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BSHC: Tensor,
        weight: Tensor | None,
        eps: float,
        cos: Tensor | None,
        sin: Tensor | None,
        positions_BS: Tensor,
    ) -> Tensor:
        x_BSHC, positions_BS = x_BSHC.contiguous(), positions_BS.contiguous()
        y_BSHC = torch.empty_like(x_BSHC)
        ctx.eps = eps
        ctx.save_for_backward(x_BSHC, weight, cos, sin, positions_BS)
        problem = _problem(x_BSHC, eps, weight, cos, sin, positions_BS)
        library(x_BSHC.dtype).rotary(ctypes.byref(problem), address(x_BSHC), address(y_BSHC), threads())
        return y_BSHC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHC: Tensor) -> tuple[Tensor | None, ...]:
        x_BSHC, weight, cos, sin, positions_BS = ctx.saved_tensors
        grad_BSHC = grad_BSHC.contiguous()  # heads first as attention gives it; this name keeps the copy alive
        grad_x_BSHC, grad_weight, partial = torch.empty_like(x_BSHC), None, None
        if weight is not None:
            grad_weight = torch.empty_like(weight)
            partial = weight.new_empty(-(-positions_BS.numel() // BLOCK), weight.shape[0])
        problem = _problem(x_BSHC, ctx.eps, weight, cos, sin, positions_BS)
        library(x_BSHC.dtype).rotary_backward(
            ctypes.byref(problem),
            *map(address, (x_BSHC, grad_BSHC, grad_x_BSHC, grad_weight, partial)),
            threads(),
        )
        return grad_x_BSHC, grad_weight, None, None, None, None


def _problem(x_BSHC: Tensor, eps: float, *pointers: Tensor | None) -> _Problem:
    batch, length, heads, width = x_BSHC.shape
    return _Problem(batch * length, heads, width, eps, *map(address, pointers))
