"""The routed feed-forward network: every way to compute it, behind one signature.

What it is: y_t = sum over the K experts k chosen for token t of weight_tk * FFN_k(x_t). Dropless: every token gets
all of its K experts, however uneven the load, and experts without a token are legal, as is T = 0. What it is not:
the choice of experts, which is `moelet.moe`'s.

Shapes: T tokens, D model, E experts, F expert hidden, K chosen per token, N = T*K routed rows.
"""

import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelet.errors import UserError, pick
from moelet.kernels.experts import RoutedFFN, can_compute
from moelet.kernels.native import TILE_COLUMNS, why_not
from moelet.kernels.sorted_rows import BATCHED, Kernels, expert_mlp


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu2": _relu2,  # So et al. 2021, "Primer"
    "swiglu": F.silu,  # Shazeer 2020; the gate matrix makes the difference
}
GATED = frozenset({"swiglu"})
TRITON_CAPABILITY = (8, 0)  # for older cards Triton's products have no tensor cores, since its version 3.3
TRITON_FORMATS = (torch.float16, torch.bfloat16, torch.float32)


def hidden_activation(up: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """Return the expert's hidden values: act(up), or act(gate) * up where there is a gate."""
    function = pick(ACTIVATIONS, activation, "model.activation")
    return function(up) if gate is None else function(gate) * up


def reference(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w_in_EFD: Tensor,
    w_gate_EFD: Tensor | None,
    w_out_EDF: Tensor,
    activation: str,
) -> Tensor:
    """The definition: every expert sees every token, and its output counts where it was chosen.

    Slow (E/K times the work) and free of any gather, so that nothing can be misplaced. Source: Shazeer et al. 2017,
    eq. 1.
    """
    w_in_EFD, w_gate_EFD, w_out_EDF = _in_format(x_TD.dtype, w_in_EFD, w_gate_EFD, w_out_EDF)
    y_TD = torch.zeros_like(x_TD, dtype=weights_TK.dtype)
    for expert in range(w_in_EFD.shape[0]):
        up_TF = F.linear(x_TD, w_in_EFD[expert])
        gate_TF = None if w_gate_EFD is None else F.linear(x_TD, w_gate_EFD[expert])
        out_TD = F.linear(hidden_activation(up_TF, gate_TF, activation), w_out_EDF[expert])
        weight_T = (weights_TK * (ids_TK == expert)).sum(1)
        y_TD = y_TD + weight_T[:, None] * out_TD
    return y_TD


class _Dispatch(torch.autograd.Function):
    """Rows of x in expert order; backward gathers and sums each token's K rows instead of scattering into it."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_TK)
        return x_TD.index_select(0, token_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (slot_TK,) = ctx.saved_tensors
        return _sum_choices(grad_ND, slot_TK).to(grad_ND.dtype), None, None


class _Combine(torch.autograd.Function):
    """Each token's weighted sum over its K rows, accumulated in the weights' precision."""

    @staticmethod
    def forward(ctx: Any, out_ND: Tensor, weights_TK: Tensor, token_N: Tensor, order_N: Tensor, slot_TK: Tensor) -> Any:
        ctx.save_for_backward(out_ND, weights_TK, token_N, order_N, slot_TK)
        y_TD = torch.zeros(slot_TK.shape[0], out_ND.shape[1], dtype=weights_TK.dtype, device=out_ND.device)
        for choice in range(slot_TK.shape[1]):
            y_TD.addcmul_(out_ND[slot_TK[:, choice]].to(y_TD.dtype), weights_TK[:, choice, None])
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        out_ND, weights_TK, token_N, order_N, slot_TK = ctx.saved_tensors
        rows_ND = grad_TD.index_select(0, token_N)
        weight_N = weights_TK.flatten()[order_N]
        grad_weight_N = (rows_ND * out_ND).sum(1)
        return (rows_ND * weight_N[:, None]).to(out_ND.dtype), grad_weight_N[slot_TK], None, None, None


def _sum_choices(rows_ND: Tensor, slot_TK: Tensor) -> Tensor:
    """Return for each token the sum of its K rows, in float32 or better."""
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    sum_TD = rows_ND[slot_TK[:, 0]].to(wide)
    for choice in range(1, slot_TK.shape[1]):
        sum_TD += rows_ND[slot_TK[:, choice]]
    return sum_TD


def rows_per_expert(ids_N: Tensor, n_experts: int) -> list[int]:
    """Return how many routed rows each expert has."""
    return torch.bincount(ids_N, minlength=n_experts).tolist()


def _grouped_products(rows_NI: Tensor, weights_EOI: Tensor, counts: Sequence[int]) -> Tensor:
    """Return each expert's rows times its matrix: (N, I) x E matrices (O, I) -> (N, O)."""
    groups = rows_NI.split(list(counts))
    return torch.cat([F.linear(rows, weight) for rows, weight in zip(groups, weights_EOI.unbind(), strict=True)])


def grouped(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w_in_EFD: Tensor,
    w_gate_EFD: Tensor | None,
    w_out_EDF: Tensor,
    activation: str,
) -> Tensor:
    """Sort the routed rows by expert once, then one matrix product per expert and matrix.

    The work of K experts a token and no more. Row n of the sorted order belongs to token `token_N[n]`; the K rows of
    token t stand at `slot_TK[t]`.
    """
    w_in_EFD, w_gate_EFD, w_out_EDF = _in_format(x_TD.dtype, w_in_EFD, w_gate_EFD, w_out_EDF)
    n_experts, top_k = w_in_EFD.shape[0], ids_TK.shape[1]
    flat_N = ids_TK.flatten()
    order_N = torch.argsort(flat_N, stable=True)
    slot_N = torch.empty_like(order_N)
    slot_N[order_N] = torch.arange(flat_N.shape[0], device=flat_N.device)
    token_N, slot_TK = order_N // top_k, slot_N.view_as(ids_TK)
    counts = rows_per_expert(flat_N, n_experts)

    rows_ND = _Dispatch.apply(x_TD, token_N, slot_TK)
    up_NF = _grouped_products(rows_ND, w_in_EFD, counts)
    gate_NF = None if w_gate_EFD is None else _grouped_products(rows_ND, w_gate_EFD, counts)
    out_ND = _grouped_products(hidden_activation(up_NF, gate_NF, activation), w_out_EDF, counts)
    y_TD: Tensor = _Combine.apply(out_ND, weights_TK, token_N, order_N, slot_TK)
    return y_TD


def fused(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w_in_EFD: Tensor,
    w_gate_EFD: Tensor | None,
    w_out_EDF: Tensor,
    activation: str,
) -> Tensor:
    """Our kernel for CPUs: gather, both products and the activation on a tile of rows while it is in the cache.

    Raises UserError for what it can't compute.
    """
    if not can_compute(x_TD, w_in_EFD, activation):
        reason = why_not(x_TD.dtype) or f"x is {x_TD.dtype} on {x_TD.device.type}, widths are {w_in_EFD.shape[1:]}"
        raise UserError(
            f'model.experts is "fused" and {reason}. It needs a CPU with a C compiler, float32 or bfloat16, and widths '
            f'(d_model, d_ff / n_experts) that are multiples of {TILE_COLUMNS}. Set model.experts to "auto".'
        )
    y_TD: Tensor = RoutedFFN.apply(x_TD, ids_TK, weights_TK, w_in_EFD, w_gate_EFD, w_out_EDF, activation)
    return y_TD


def _in_format(dtype: torch.dtype, *matrices: Tensor | None) -> list[Any]:
    return [None if matrix is None else matrix.to(dtype) for matrix in matrices]


def _static(kernels: Kernels, *arguments: Any) -> Tensor:
    """Sort the rows on the device and compute them with `kernels`, in shapes that don't depend on the routing."""
    x_TD, ids_TK, weights_TK, w_in_EFD, w_gate_EFD, w_out_EDF, activation = arguments

    def activate(before: Tensor) -> Tensor:
        up, gate = (before, None) if w_gate_EFD is None else before.chunk(2, -1)
        return hidden_activation(up, gate, activation)

    w_in_EID = w_in_EFD if w_gate_EFD is None else torch.cat([w_in_EFD, w_gate_EFD], 1)  # one product for both
    w_in_EID, w_out_EDF = w_in_EID.to(x_TD.dtype), w_out_EDF.to(x_TD.dtype)
    return expert_mlp(x_TD, ids_TK, weights_TK, w_in_EID, w_out_EDF, activate, kernels)


def batched(*arguments: Any) -> Tensor:
    """Batched products of the matrix library over padded blocks: static shapes on any device; the host never waits."""
    return _static(BATCHED, *arguments)


def triton(*arguments: Any) -> Tensor:
    """Triton's products, without padding. Raises UserError where they can't be had."""
    if (reason := why_not_triton(arguments[0])) is not None:
        raise UserError(
            f'model.experts is "triton" and {reason}. It needs CUDA, compute capability 8.0 or newer, and the package '
            'triton. Set model.experts to "auto".'
        )
    from moelet.kernels.grouped_gemm import TRITON  # needs triton, which CUDA builds of torch bring along

    return _static(TRITON, *arguments)


def why_not_triton(x: Tensor) -> str | None:
    """Return why Triton's products can't be had for x, None where they can."""
    if x.device.type != "cuda":
        return f"the model is on a {x.device.type} device"
    if torch.cuda.get_device_capability(x.device) < TRITON_CAPABILITY:
        return "this card's compute capability is {}.{}".format(*torch.cuda.get_device_capability(x.device))
    if x.dtype not in TRITON_FORMATS:
        return f"the numbers are {x.dtype}"
    return None if _triton_there() else "there is no package triton"


@functools.cache
def _triton_there() -> bool:
    return find_spec("triton") is not None


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference,
    "grouped": grouped,
    "fused": fused,
    "batched": batched,
    "triton": triton,
}


def auto(*arguments: Any) -> Tensor:
    """The fastest backend for the device: where the host would have to wait for a device, one that needs no waiting."""
    x = arguments[0]
    if x.device.type == "cpu":
        return (fused if can_compute(x, arguments[3], arguments[6]) else grouped)(*arguments)
    return (batched if why_not_triton(x) else triton)(*arguments)


def routed_ffn(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w_in_EFD: Tensor,
    w_gate_EFD: Tensor | None,
    w_out_EDF: Tensor,
    activation: str,
    backend: str = "auto",
) -> Tensor:
    """Return each token's weighted sum of its experts' outputs, (T, D), in the precision of products.

    `ids_TK` are expert ids in [0, E), distinct within a token; `weights_TK` their weights, float32 or float64.
    Matrices follow nn.Linear, (out, in) per expert. Under autocast the products run in its dtype; the sum over K is
    made in the weights' and then rounded once. Raises UserError for an unknown backend or activation, and for a
    backend that can't be had.
    """
    compute = pick({**BACKENDS, "auto": auto}, backend, "model.experts")
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        x_TD = x_TD.to(torch.get_autocast_dtype(device))
    y_TD = compute(x_TD, ids_TK, weights_TK, w_in_EFD, w_gate_EFD, w_out_EDF, activation)
    return y_TD.to(x_TD.dtype)
