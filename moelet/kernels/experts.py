"""The routed feed-forward network on a CPU: `experts.c` as an operation with a gradient.

Shapes: T tokens, D model, E experts, F expert hidden, K chosen per token, N = T*K choices, P their rows, sorted by
expert: N and at most one row of zeros an expert.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelet.kernels.native import TILE_COLUMNS, address, library, per_unit, threads, usable

ACTIVATIONS = {"silu": (0, False), "gelu": (1, False), "relu2": (2, False), "swiglu": (0, True)}  # number, gated


def can_compute(x_TD: Tensor, w_in_EFD: Tensor, activation: str) -> bool:
    """Return whether the kernel computes these: float32 matrices of sizes that its tiles divide."""
    even = all(size % TILE_COLUMNS == 0 for size in w_in_EFD.shape[1:])
    return even and activation in ACTIVATIONS and w_in_EFD.dtype == torch.float32 and usable(x_TD.dtype, x_TD, w_in_EFD)


class _Routed(ctypes.Structure):
    """`routed` of experts.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "chosen", "experts", "width", "hidden")),
        *((name, ctypes.c_int) for name in ("activation", "gated")),
        *((name, ctypes.c_void_p) for name in ("first", "tile", "entry", "slot")),
    )


def _sort(x_TD: Tensor, ids_TK: Tensor, n_experts: int) -> tuple[int, list[Tensor]]:
    """Return how many rows the sorted choices take, and where they are: `first`, `tile`, `entry`, `slot`."""
    n_choices = ids_TK.numel()
    longest = n_choices + n_experts * (per_unit(x_TD.dtype) - 1)
    places = [ids_TK.new_empty(size) for size in (n_experts + 1, n_experts + 1, longest, n_choices)]
    sort = library(x_TD.dtype).sort_choices
    sort.restype = ctypes.c_int64
    n_rows = sort(address(ids_TK), ctypes.c_int64(n_choices), ctypes.c_int64(n_experts), *map(address, places))
    return n_rows, places


def _packed(matrices: Tensor | None, dtype: torch.dtype, transposed: bool) -> Tensor | None:
    """Return float32 matrices rounded to `dtype`, in the order in which the products read them."""
    if matrices is None:
        return None
    n_experts, rows, columns = matrices.shape
    packed = matrices.new_empty(matrices.shape, dtype=dtype)
    sizes = map(ctypes.c_int64, (n_experts, rows, columns))
    library(dtype).pack_matrices(address(matrices), *sizes, int(transposed), address(packed), threads())
    return packed


class RoutedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        w_in_EFD: Tensor,
        w_gate_EFD: Tensor | None,
        w_out_EDF: Tensor,
        activation: str,
    ) -> Tensor:
        x_TD, ids_TK, weights_TK = x_TD.contiguous(), ids_TK.contiguous(), weights_TK.contiguous()
        matrices = [None if w is None else w.contiguous() for w in (w_in_EFD, w_gate_EFD, w_out_EDF)]
        n_experts, hidden, _ = w_in_EFD.shape
        n_rows, places = _sort(x_TD, ids_TK, n_experts)
        sizes = (*ids_TK.shape, n_experts, x_TD.shape[1], hidden, *ACTIVATIONS[activation])
        problem = _Routed(*sizes, *map(address, places))
        up_PF = x_TD.new_empty(n_rows, hidden)
        gate_PF = None if w_gate_EFD is None else torch.empty_like(up_PF)
        out_PD, y_TD = x_TD.new_empty(n_rows, x_TD.shape[1]), torch.empty_like(x_TD)
        packed = [_packed(w, x_TD.dtype, True) for w in matrices]
        library(x_TD.dtype).experts(
            ctypes.byref(problem), *map(address, (x_TD, weights_TK, *packed, up_PF, gate_PF, out_PD, y_TD)), threads()
        )
        ctx.save_for_backward(x_TD, weights_TK, *matrices, up_PF, gate_PF, *places)
        ctx.sizes = sizes
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, w_in_EFD, w_gate_EFD, w_out_EDF, up_PF, gate_PF, *places = ctx.saved_tensors
        problem = _Routed(*ctx.sizes, *map(address, places))
        matrices = (w_in_EFD, w_gate_EFD, w_out_EDF)
        packed = [_packed(w, x_TD.dtype, False) for w in matrices]
        n_rows, (width, hidden) = up_PF.shape[0], (x_TD.shape[1], up_PF.shape[1])
        grad_TD = grad_TD.contiguous()  # a name of its own: C is given an address, which doesn't keep a copy alive
        grad_rows_PD = x_TD.new_empty(n_rows, width)
        scratch = x_TD.new_empty(n_rows * (2 * width + (2 if w_gate_EFD is None else 3) * hidden))
        gradients = [None if t is None else torch.empty_like(t) for t in (x_TD, weights_TK, *matrices)]
        library(x_TD.dtype).experts_backward(
            ctypes.byref(problem),
            *map(address, (x_TD, grad_TD, weights_TK, *packed, up_PF, gate_PF, grad_rows_PD, scratch)),
            *map(address, gradients),
            threads(),
        )
        grad_x_TD, grad_weights_TK, *grad_matrices = gradients
        return grad_x_TD, None, grad_weights_TK, *grad_matrices, None
