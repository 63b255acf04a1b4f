"""The routed feed-forward network: every way to compute it, behind one signature.

What it is: y_t = sum over the K experts k chosen for token t of weight_tk * FFN_k(x_t). Dropless: every token gets
all of its K experts, however uneven the load, and experts without a token are legal, as is T = 0. What it is not:
the choice of experts, which is `moelet.moe`'s.

Shapes: T tokens, D model, E experts, F expert hidden, K chosen per token, N = T*K routed rows.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moelet.errors import UserError, pick
from moelet.kernels.experts import RoutedFFN, can_compute
from moelet.kernels.native import TILE_COLUMNS, why_not
from moelet.kernels.sorted_rows import BATCHED, GROUPED, Kernels, expert_mlp


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


def _sorted(kernels: Kernels, *arguments: Any) -> Tensor:
    """Sort the rows by expert and compute them with `kernels`."""
    x_TD, ids_TK, weights_TK, w_in_EFD, w_gate_EFD, w_out_EDF, activation = arguments

    def activate(before: Tensor) -> Tensor:
        up, gate = (before, None) if w_gate_EFD is None else before.chunk(2, -1)
        return hidden_activation(up, gate, activation)

    w_in_EID = w_in_EFD if w_gate_EFD is None else torch.cat([w_in_EFD, w_gate_EFD], 1)  # one product for both
    w_in_EID, w_out_EDF = w_in_EID.to(x_TD.dtype), w_out_EDF.to(x_TD.dtype)
    return expert_mlp(x_TD, ids_TK, weights_TK, w_in_EID, w_out_EDF, activate, kernels)


def grouped(*arguments: Any) -> Tensor:
    """One matrix product per expert and matrix, without padding: the host waits for the counts, a CPU for nobody."""
    return _sorted(GROUPED, *arguments)


def batched(*arguments: Any) -> Tensor:
    """Batched products of the matrix library over padded blocks: static shapes on any device; the host never waits."""
    return _sorted(BATCHED, *arguments)


def triton(*arguments: Any) -> Tensor:
    """Triton's products, without padding. Raises UserError where they can't be had."""
    if (reason := why_not_triton(arguments[0])) is not None:
        raise UserError(
            f'model.experts is "triton" and {reason}. It needs CUDA, compute capability 8.0 or newer, and the package '
            'triton. Set model.experts to "auto".'
        )
    from moelet.kernels.grouped_gemm import TRITON  # needs triton, which CUDA builds of torch bring along

    return _sorted(TRITON, *arguments)


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
