"""Causal attention: every way to compute it, behind one signature.

The mask is ours in all of them: query i of S, being the last S of L positions, sees key j when j <= i + L - S and
both are of one segment. A segment is the number of a document within its row, 1, 2, ..., and 0 on padding: so no
document sees another, and padding sees padding, whose output nothing reads.

Shapes: B batch, H heads, S queries, L keys, C head width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moelet.dropout import dropout as drop
from moelet.errors import UserError, pick
from moelet.kernels.attention import CausalAttention, can_attend
from moelet.kernels.native import Dropout, why_not


def causal_mask(n_queries: int, n_keys: int, segments_BL: Tensor | None, device: torch.device) -> Tensor:
    """Return which keys each query may see, bool: (S, L), or (B, 1, S, L) where there are `segments_BL`.

    Each layer makes its own: all of them take 0.3% of a training step (bench/mask_documents.py).
    """
    allowed_SL = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_queries)
    if segments_BL is None:
        return allowed_SL
    together_BSL = segments_BL[:, n_keys - n_queries :, None] == segments_BL[:, None, :]
    return (allowed_SL & together_BSL)[:, None]


def explicit(
    q_BHSC: Tensor, k_BHLC: Tensor, v_BHLC: Tensor, segments_BL: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """The definition: scores, mask, softmax, dropout on the weights, weighted sum.

    The softmax is computed in float32; under autocast on a CPU its result is rounded to the products' format, on CUDA
    it is not. Either way the weights enter the second product in that format.
    Source: Vaswani et al. 2017, section 3.2.1.
    """
    allowed = causal_mask(q_BHSC.shape[2], k_BHLC.shape[2], segments_BL, q_BHSC.device)
    scores_BHSL = (q_BHSC * q_BHSC.shape[-1] ** -0.5) @ k_BHLC.transpose(-2, -1)
    weights_BHSL = scores_BHSL.masked_fill_(~allowed, float("-inf")).softmax(-1)
    return drop(weights_BHSL, dropout) @ v_BHLC


def sdpa(
    q_BHSC: Tensor, k_BHLC: Tensor, v_BHLC: Tensor, segments_BL: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """torch's fused attention; it builds the causal mask itself only where queries and keys are the same positions."""
    n_queries, n_keys = q_BHSC.shape[2], k_BHLC.shape[2]
    if segments_BL is None and n_queries == n_keys:
        return F.scaled_dot_product_attention(q_BHSC, k_BHLC, v_BHLC, dropout_p=dropout, is_causal=True)
    allowed = causal_mask(n_queries, n_keys, segments_BL, q_BHSC.device)
    return F.scaled_dot_product_attention(q_BHSC, k_BHLC, v_BHLC, attn_mask=allowed, dropout_p=dropout)


def blocked(
    q_BHSC: Tensor, k_BHLC: Tensor, v_BHLC: Tensor, segments_BL: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Our kernel for CPUs: blocks of 64 queries and only the keys up to them, with a backward pass of its own.

    New queries on cached keys are left to `explicit`. Raises UserError where there is no kernel.
    """
    if q_BHSC.shape != k_BHLC.shape:
        return explicit(q_BHSC, k_BHLC, v_BHLC, segments_BL, dropout)
    if not can_attend(q_BHSC, k_BHLC, v_BHLC):
        reason = why_not(q_BHSC.dtype) or f"the numbers are {q_BHSC.dtype} on {q_BHSC.device.type}"
        raise UserError(
            f'model.attention is "blocked" and {reason}. It needs a CPU with a C compiler, and float32 or bfloat16. '
            'Set model.attention to "auto".'
        )
    return CausalAttention.apply(q_BHSC, k_BHLC, v_BHLC, segments_BL, Dropout.draw(dropout))


def fastest(
    q_BHSC: Tensor, k_BHLC: Tensor, v_BHLC: Tensor, segments_BL: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """What `auto` means: `blocked` where it can be had, else `sdpa` on CUDA and `explicit` on CPUs."""
    if can_attend(q_BHSC, k_BHLC, v_BHLC):
        return blocked(q_BHSC, k_BHLC, v_BHLC, segments_BL, dropout)
    compute = sdpa if q_BHSC.device.type == "cuda" else explicit
    return compute(q_BHSC, k_BHLC, v_BHLC, segments_BL, dropout)


ATTENTION: dict[str, Callable[..., Tensor]] = {
    "auto": fastest,
    "explicit": explicit,
    "sdpa": sdpa,
    "blocked": blocked,
}


def causal_attention(
    q_BHSC: Tensor,
    k_BHLC: Tensor,
    v_BHLC: Tensor,
    segments_BL: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Return the attention output (B, H, S, C). `dropout` is a probability, 0 in evaluation.

    Raises UserError for an unknown backend.
    """
    return pick(ATTENTION, backend, "model.attention")(q_BHSC, k_BHLC, v_BHLC, segments_BL, dropout)
