"""Cross-entropy over the vocabulary on a CPU: `cross_entropy.c`.

Shapes: T tokens, R embedding rank, V vocabulary.
"""

import ctypes

import torch
from torch import Tensor

from moelet.kernels.native import TILE_COLUMNS, address, library, threads, usable


class _Vocabulary(ctypes.Structure):
    """`vocabulary` of cross_entropy.c."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("rows", "rank", "pieces", "ignored"))


def can_sum(h_TR: Tensor, table_VR: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the kernel computes these."""
    return h_TR.shape[1] % TILE_COLUMNS == 0 and usable(dtype, h_TR, table_VR)


def cross_entropy(
    h_TR: Tensor, table_VR: Tensor, labels_T: Tensor, ignored: int, needs_grad: bool
) -> tuple[float, Tensor | None, Tensor | None]:
    """Return the nats of all labels but `ignored`, and the gradients of h and of the table, float32, where needed."""
    h_TR, table_VR, labels_T = h_TR.contiguous(), table_VR.contiguous(), labels_T.contiguous()
    grad_h_TR = torch.empty_like(h_TR, dtype=torch.float32) if needs_grad else None
    grad_table_VR = torch.empty_like(table_VR, dtype=torch.float32) if needs_grad else None
    compute = library(h_TR.dtype).cross_entropy
    compute.restype = ctypes.c_double
    problem = _Vocabulary(*h_TR.shape, table_VR.shape[0], ignored)
    tensors = (h_TR, table_VR, labels_T, grad_h_TR, grad_table_VR)
    nats = compute(ctypes.byref(problem), *map(address, tensors), threads())
    return nats, grad_h_TR, grad_table_VR
