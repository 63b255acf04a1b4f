"""Causal self-attention on a CPU: `attention.c` as an operation with a gradient.

Shapes: B batch, H heads, S queries and as many keys, C head width.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelet.kernels.native import Dropout, address, library, threads, usable


def can_attend(q_BHSC: Tensor, k_BHLC: Tensor, v_BHLC: Tensor) -> bool:
    """Return whether the kernel computes these: as many keys as queries, in one format."""
    return usable(q_BHSC.dtype, q_BHSC, k_BHLC, v_BHLC) and q_BHSC.shape == k_BHLC.shape == v_BHLC.shape


class _Layout(ctypes.Structure):
    _fields_ = (("batch", ctypes.c_int64), ("head", ctypes.c_int64), ("row", ctypes.c_int64))

    @classmethod
    def of(cls, tensor: Tensor) -> "_Layout":
        return cls(*tensor.stride()[:3])


class _Problem(ctypes.Structure):
    """`problem` of attention.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "length", "width")),
        ("scale", ctypes.c_float),
        ("segments", ctypes.c_void_p),
        ("drop", Dropout),
        ("inputs", _Layout * 3),
        ("out", _Layout),
    )


class CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHSC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, segments_BS: Tensor | None, drop: Dropout
    ) -> Tensor:
        inputs = [t if t.stride(-1) == 1 else t.contiguous() for t in (q_BHSC, k_BHSC, v_BHSC)]
        segments_BS = None if segments_BS is None else segments_BS.to(torch.int64).contiguous()
        out_BHSC = _rows_of_heads(q_BHSC)
        log_sums = q_BHSC.new_empty(q_BHSC.shape[:3], dtype=torch.float32)
        problem = _problem(inputs, segments_BS, out_BHSC, drop)
        library(q_BHSC.dtype).attention(ctypes.byref(problem), *map(address, (*inputs, out_BHSC, log_sums)), threads())
        ctx.save_for_backward(*inputs, segments_BS, out_BHSC, log_sums)
        ctx.drop = drop
        return out_BHSC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHSC: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, segments_BS, out_BHSC, log_sums = ctx.saved_tensors
        if grad_BHSC.stride() != out_BHSC.stride():
            grad_BHSC = _rows_of_heads(out_BHSC).copy_(grad_BHSC)
        gradients = [_rows_of_heads(out_BHSC) for _ in inputs]
        problem = _problem(inputs, segments_BS, out_BHSC, ctx.drop)
        library(out_BHSC.dtype).attention_backward(
            ctypes.byref(problem), *map(address, (*inputs, out_BHSC, grad_BHSC, log_sums, *gradients)), threads()
        )
        return *gradients, None, None


def _rows_of_heads(like_BHSC: Tensor) -> Tensor:
    """Return an empty (B, H, S, C) whose heads lie side by side in each row, as the products around it want them."""
    batch, heads, length, width = like_BHSC.shape
    return like_BHSC.new_empty(batch, length, heads, width).transpose(1, 2)


def _problem(inputs: list[Tensor], segments_BS: Tensor | None, out_BHSC: Tensor, drop: Dropout) -> _Problem:
    layouts = (_Layout * 3)(*map(_Layout.of, inputs))
    scale = out_BHSC.shape[-1] ** -0.5
    return _Problem(*out_BHSC.shape, scale, address(segments_BS), drop, layouts, _Layout.of(out_BHSC))
