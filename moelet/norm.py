"""The residual connection and the RMS norm after it, which every layer begins with, as one operation.

Shapes: B batch, S sequence, D model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moelet.dropout import dropout as drop
from moelet.kernels.native import Dropout
from moelet.kernels.norm import AddNorm, can_add_norm


def add_norm(
    residual_BSD: Tensor | None, branch_BSD: Tensor, weight: Tensor, eps: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return residual + dropout(branch), float32 or float64, and that over its root mean square, times `weight`.

    The second is in the precision of products: autocast's where it is on. No residual counts as zeros. Source: Zhang &
    Sennrich 2019.
    """
    device = branch_BSD.device.type
    wide = torch.promote_types(weight.dtype, torch.float32)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else wide
    if can_add_norm(residual_BSD, branch_BSD, weight, dtype):
        sum_BSD, normed_BSD = AddNorm.apply(residual_BSD, branch_BSD, weight, eps, dtype, Dropout.draw(dropout))
        return sum_BSD, normed_BSD
    sum_BSD = drop(branch_BSD.to(wide), dropout)
    sum_BSD = sum_BSD if residual_BSD is None else residual_BSD + sum_BSD
    with torch.autocast(device, enabled=False):
        return sum_BSD, F.rms_norm(sum_BSD, weight.shape, weight.to(wide), eps).to(dtype)
