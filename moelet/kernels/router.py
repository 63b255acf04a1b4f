"""The router on a CPU: `router.c` as an operation with a gradient.

Shapes: T tokens, D model, E experts, K chosen per token.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelet.kernels.native import BLOCK, LANES, address, library, threads, usable


def can_route(x_TD: Tensor, matrix_ED: Tensor) -> bool:
    """Return whether the kernel routes these tokens."""
    return usable(x_TD.dtype, x_TD, matrix_ED) and matrix_ED.dtype == torch.float32 and x_TD.shape[1] % LANES == 0


class _Routing(ctypes.Structure):
    """`routing` of router.c."""

    _fields_ = (*((n, ctypes.c_int64) for n in ("tokens", "width", "experts", "chosen")), ("normalize", ctypes.c_int))


class Route(torch.autograd.Function):
    """Expert ids (T, K), their weights (T, K), and of the real tokens: the summed probabilities and choices (E), the
    summed squares of the scores' log-sum, and (2): the summed entropy, the largest score by size.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        matrix_ED: Tensor,
        bias_E: Tensor | None,
        real_T: Tensor | None,
        top_k: int,
        normalize: bool,
    ) -> tuple[Tensor, ...]:
        x_TD, matrix_ED = x_TD.contiguous(), matrix_ED.contiguous()
        real_T = None if real_T is None else real_T.contiguous()
        n_tokens, n_experts = x_TD.shape[0], matrix_ED.shape[0]
        ids_TK = torch.empty(n_tokens, top_k, dtype=torch.int64)
        weights_TK, probability_TE = matrix_ED.new_empty(n_tokens, top_k), matrix_ED.new_empty(n_tokens, n_experts)
        log_totals_T = matrix_ED.new_empty(n_tokens)
        sums = matrix_ED.new_empty(2 * n_experts + 3)
        partial = matrix_ED.new_empty(-(-n_tokens // BLOCK), len(sums))
        columns = matrix_ED.new_empty(x_TD.shape[1], -(-n_experts // LANES) * LANES)
        problem = _Routing(*x_TD.shape, n_experts, top_k, normalize)
        results = (ids_TK, weights_TK, probability_TE, log_totals_T, sums, partial, columns)
        library(x_TD.dtype).route(
            ctypes.byref(problem), *map(address, (x_TD, matrix_ED, bias_E, real_T, *results)), threads()
        )
        ctx.save_for_backward(x_TD, matrix_ED, real_T, ids_TK, weights_TK, probability_TE, log_totals_T)
        ctx.problem = problem
        probability_E, choices_E, (entropy, squares, largest) = sums.split((n_experts, n_experts, 3))
        others = torch.stack((entropy, largest))
        ctx.mark_non_differentiable(ids_TK, choices_E, others)
        ctx.set_materialize_grads(False)
        return ids_TK, weights_TK, probability_E, choices_E, squares, others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x_TD, matrix_ED, *saved = ctx.saved_tensors
        grad_weights_TK, grad_sum_E = (None if g is None else g.contiguous() for g in gradients[1:3])
        grad_squares = 0.0 if gradients[4] is None else gradients[4].item()
        grad_x_TD, grad_matrix_ED = torch.empty_like(x_TD), torch.empty_like(matrix_ED)
        partial = matrix_ED.new_empty(-(-x_TD.shape[0] // BLOCK), *matrix_ED.shape)
        library(x_TD.dtype).route_backward(
            ctypes.byref(ctx.problem),
            *map(address, (x_TD, matrix_ED, *saved, grad_weights_TK, grad_sum_E)),
            ctypes.c_float(grad_squares),
            *map(address, (grad_x_TD, grad_matrix_ED, partial)),
            threads(),
        )
        return grad_x_TD, grad_matrix_ED, None, None, None, None
