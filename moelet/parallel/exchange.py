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


class _Trip:
    """Rows that are on their way to other ranks, or their gradients on the way back, while something else is done."""

    def __init__(self, sent: list[int], received: list[int], group: dist.ProcessGroup) -> None:
        self.sent, self.received, self.group = sent, received, group

    def set_out(self, rows: Tensor, back: bool = False) -> Tensor:
        """Return what will hold the rows that arrive."""
        sent, received = (self.received, self.sent) if back else (self.sent, self.received)
        self.arriving = rows.new_empty(sum(received), *rows.shape[1:])
        self.leaving = rows.contiguous()  # kept until they are there
        self.work = dist.all_to_all_single(self.arriving, self.leaving, received, sent, self.group, async_op=True)
        return self.arriving

    def arrive(self) -> Tensor:
        self.work.wait()
        arrived = self.arriving
        del self.work, self.leaving, self.arriving
        return arrived


class _SetOut(torch.autograd.Function):
    """Rows leave for other ranks; in the backward pass, their gradients arrive."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return trip.set_out(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.arrive(), None


class _Arrive(torch.autograd.Function):
    """Rows are here; in the backward pass, their gradients leave. What is computed between the two passes over both is
    computed while the rows travel: autograd goes back in the order in which forward came."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return trip.arrive()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.trip.set_out(grad, back=True)
        return grad, None  # of the right shape; `_SetOut` has the true ones


class Exchange:
    """The ranks among which the experts of a layer are divided evenly: rank p has those from p * n_local on."""

    def __init__(self, group: dist.ProcessGroup, n_experts: int) -> None:
        self.group, self.size = group, dist.get_world_size(group)
        self.n_local = n_experts // self.size
        self.rows_sent = 0  # to other ranks, one way, in forward passes

    def routed_ffn(
        self,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        compute: Compute,
        beside: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Return each token's weighted sum of its experts' outputs, (T, D), wherever these are; all ranks call this.

        `compute(x_MD, ids_M1, ones_M1)` gives the outputs of this rank's experts, numbered from 0. A token's row goes
        once for each expert; ranks to which or from which no row goes are legal. The weights stay here. What `beside()`
        gives is computed while the rows are on their way, and added.
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
        there, numbers = _Trip(sent, received, self.group), _Trip(sent, received, self.group)
        numbers.set_out(flat_N[order_N].to(torch.int32))
        leaving_MD = _SetOut.apply(x_TD[order_N // top_k], there)
        beside_TD = None if beside is None else beside()
        ids_M = numbers.arrive().long() % self.n_local
        x_MD = _Arrive.apply(leaving_MD, there)
        ones_M1 = torch.ones(len(ids_M), 1, dtype=weights_TK.dtype, device=x_TD.device)
        y_MD = compute(x_MD, ids_M[:, None], ones_M1)
        back = _Trip(received, sent, self.group)
        y_ND = _Arrive.apply(_SetOut.apply(y_MD, back), back)
        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
        y_TKD = y_ND[place_N].view(n_tokens, top_k, -1)
        y_TD = (y_TKD * weights_TK[..., None]).sum(1).to(y_ND.dtype)
        return y_TD if beside_TD is None else y_TD + beside_TD
