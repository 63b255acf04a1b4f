"""Queries and keys before they meet: an RMS norm over each head, and a turn by the token's position.

Shapes: B batch, S sequence, H heads, C head width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moelet.kernels.rotary import Rotate, can_rotate


class Turns(NamedTuple):
    """Cosines and sines of every position's angles, each (positions, C/2) float32."""

    cos: Tensor
    sin: Tensor


def turns(positions: int, head_width: int, theta: float) -> Turns:
    """Return the angles of rotary position embedding: position p turns pair i by p * theta^(-2i/C).

    Source: Su et al. 2021, "RoFormer", eq. 15. Pairs are c and c + C/2, as in the Hugging Face models.
    """
    speed = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * speed
    return Turns(angles.cos().float(), angles.sin().float())


def prepare_heads(
    x_BSHC: Tensor, weight: Tensor | None, eps: float, angles: Turns | None, positions_BS: Tensor
) -> Tensor:
    """Return the heads normed, where there is a weight (C), and turned, where there are angles; in x's format."""
    if weight is None and angles is None:
        return x_BSHC
    if can_rotate(x_BSHC, weight, angles is not None):
        return Rotate.apply(x_BSHC, weight, eps, *(angles or (None, None)), positions_BS)
    wide = x_BSHC.to(torch.promote_types(x_BSHC.dtype, torch.float32))
    if weight is not None:
        wide = F.rms_norm(wide, wide.shape[-1:], weight.to(wide.dtype), eps)
    if angles is not None:
        cos, sin = (table.to(wide.dtype)[positions_BS][:, :, None] for table in angles)
        first, second = wide.chunk(2, -1)
        wide = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return wide.to(x_BSHC.dtype)
