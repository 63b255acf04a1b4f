"""Residual connection and RMS norm in one pass on a CPU: `norm.c` as an operation with a gradient.

Shapes: T tokens, D model.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelet.kernels.native import BLOCK, LANES, Dropout, address, library, threads, usable


def can_add_norm(residual_TD: Tensor | None, branch_TD: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the kernel computes these: the sum in float32, the normed values in `dtype`."""
    plain = usable(dtype, residual_TD, branch_TD, weight) and branch_TD.dtype in (dtype, torch.float32)
    wide = all(t is None or t.dtype == torch.float32 for t in (residual_TD, weight))
    return plain and wide and branch_TD.shape[-1] % LANES == 0


class AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual_TD: Tensor | None,
        branch_TD: Tensor,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype,
        drop: Dropout,
    ) -> tuple[Tensor, Tensor]:
        branch_TD = branch_TD.contiguous()
        residual_TD = None if residual_TD is None else residual_TD.contiguous()
        width = branch_TD.shape[-1]
        rows = branch_TD.numel() // width
        sum_TD = torch.empty_like(branch_TD, dtype=torch.float32)
        normed_TD, inverse_rms = torch.empty_like(branch_TD, dtype=dtype), sum_TD.new_empty(rows)
        narrow, wide = _by_format(branch_TD, dtype)
        library(dtype).add_norm(
            *map(address, (residual_TD, narrow, wide, weight, sum_TD, normed_TD, inverse_rms)),
            *(ctypes.c_int64(rows), ctypes.c_int64(width), ctypes.c_float(eps), ctypes.byref(drop), threads()),
        )
        ctx.save_for_backward(sum_TD, inverse_rms, weight)
        ctx.branch_dtype, ctx.dtype, ctx.drop, ctx.has_residual = branch_TD.dtype, dtype, drop, residual_TD is not None
        ctx.set_materialize_grads(False)
        return sum_TD, normed_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum_TD: Tensor | None, grad_normed_TD: Tensor | None) -> tuple[Tensor | None, ...]:
        sum_TD, inverse_rms, weight = ctx.saved_tensors
        width, rows = sum_TD.shape[-1], inverse_rms.shape[0]
        grad_sum_TD = None if grad_sum_TD is None else grad_sum_TD.contiguous()
        if grad_normed_TD is None:
            grad_normed_TD = torch.zeros_like(sum_TD, dtype=ctx.dtype)
        grad_normed_TD = grad_normed_TD.contiguous()
        grad_residual_TD = torch.empty_like(sum_TD) if ctx.has_residual else None
        grad_branch_TD, grad_weight = torch.empty_like(sum_TD, dtype=ctx.branch_dtype), torch.empty_like(weight)
        partial = sum_TD.new_empty(-(-rows // BLOCK), width)
        narrow, wide = _by_format(grad_branch_TD, ctx.dtype)
        library(ctx.dtype).add_norm_backward(
            *map(address, (grad_sum_TD, grad_normed_TD, sum_TD, inverse_rms, weight)),
            *map(address, (grad_residual_TD, narrow, wide, grad_weight, partial)),
            *(ctypes.c_int64(rows), ctypes.c_int64(width), ctypes.byref(ctx.drop), threads()),
        )
        return grad_residual_TD, grad_branch_TD, grad_weight, None, None, None


def _by_format(branch_TD: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Return the branch as what the kernel takes: in its own format, or else in float."""
    return (branch_TD, None) if branch_TD.dtype == dtype else (None, branch_TD)
