"""Experts on other ranks: each token's row goes to the rank that has its expert, and its result comes back.

Shapes: T tokens, D model, K chosen per token, N = T*K routed rows, M rows that arrive here, P ranks.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks; their gradients the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way = received, sent, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, *ctx.way), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group)
    return arrived


class Exchange:
    """The ranks among which the experts of a layer are divided evenly: rank p has those from p * n_local on."""

    def __init__(self, group: dist.ProcessGroup, n_experts: int) -> None:
        self.group, self.size = group, dist.get_world_size(group)
        self.n_local = n_experts // self.size
        self.rows_sent = 0  # to other ranks, one way, in forward passes

    def routed_ffn(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, compute: Compute) -> Tensor:
        """Return each token's weighted sum of its experts' outputs, (T, D), wherever these are; all ranks call this.

        `compute(x_MD, ids_M1, ones_M1)` gives the outputs of this rank's experts, numbered from 0. A token's row goes
        once for each expert; ranks to which or from which no row goes are legal. The weights stay here.
        """
        if torch.is_autocast_enabled(x_TD.device.type):  # half of the bytes to send
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        (n_tokens, top_k), flat_N = ids_TK.shape, ids_TK.flatten()
        order_N = torch.argsort(flat_N, stable=True)  # by expert, so by rank too
        sent_P = torch.bincount(flat_N // self.n_local, minlength=self.size)
        received_P = torch.empty_like(sent_P)
        dist.all_to_all_single(received_P, sent_P, group=self.group)
        sent, received = torch.stack([sent_P, received_P]).tolist()
        self.rows_sent += sum(sent) - sent[dist.get_rank(self.group)]
        way = (sent, received, self.group)
        x_MD = _AllToAll.apply(x_TD[order_N // top_k], *way)
        ids_M = _all_to_all(flat_N[order_N].to(torch.int32), *way).long() % self.n_local
        ones_M1 = torch.ones(len(ids_M), 1, dtype=weights_TK.dtype, device=x_TD.device)
        y_MD = compute(x_MD, ids_M[:, None], ones_M1)
        y_ND = _AllToAll.apply(y_MD, received, sent, self.group)
        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
        y_TKD = y_ND[place_N].view(n_tokens, top_k, -1)
        return (y_TKD * weights_TK[..., None]).sum(1).to(y_ND.dtype)
