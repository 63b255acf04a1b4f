"""Muon: the optimizer for matrices, expert stacks included.

The momentum of each matrix is replaced by the nearest (semi-)orthogonal one, so that a step moves all directions
alike. Sources: Jordan et al. 2024, "Muon: an optimizer for hidden layers"; for the polynomials Amsel et al. 2025, "The
Polar Express".

Shapes: M matrices of one shape, I rows and O columns of each, I <= O.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from moelet.parallel.ranks import gathered, local, rows_here
from moelet.precision import choose_dtype

MOMENTUM = 0.95  # Jordan et al. 2024, with Nesterov's look ahead
# x -> a x + b x^3 + c x^5 on singular values: the best three in a row for those from 0.01 to 1, which end within 0.27
# of 1; computed by Amsel et al. 2025, algorithm 1. Five learned no more and cost 5/3 (docs/experiments.md, 12)
POLYNOMIALS = (
    (8.093368512548258, -23.620430328824273, 17.446151749836247),
    (3.636585554259041, -2.7219267466089088, 0.5365462883273615),
    (2.661299985777098, -1.9771545218846243, 0.45261640699640104),
)
MARGIN = 1.02  # of the norm, so that rounding can't bring a singular value above 1
TINY = 1e-7  # a matrix without gradient stays 0


def orthogonalize(matrices_MIO: Tensor) -> Tensor:
    """Return each matrix with all singular values near 1 and its singular vectors as they were.

    Computed in the format of the input. All of them in one batched call, because one small product at a time leaves the
    machine idle.
    """
    norm_M11 = torch.linalg.vector_norm(matrices_MIO, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x_MIO = matrices_MIO * (1 / (norm_M11 * MARGIN + TINY)).to(matrices_MIO.dtype)
    for a, b, c in POLYNOMIALS:
        gram_MII = x_MIO @ x_MIO.mT
        poly_MII = torch.baddbmm(gram_MII, gram_MII, gram_MII, beta=b, alpha=c)
        x_MIO = torch.baddbmm(x_MIO, poly_MII, x_MIO, beta=a)
    return x_MIO


class Muon(torch.optim.Optimizer):
    """Muon for groups with `muon`, AdamW for the others; a group's `lr` counts for both.

    A matrix is (out, in); a stack of them is handled matrix by matrix. The update has the size of sqrt(out / in) where
    that is above 1, so that one rate fits all shapes.

    Of parameters that lie on several ranks each keeps the state of its part. A matrix in parts is gathered on each rank
    before it is made orthogonal; stacks of experts are divided between matrices, and stay where they are.

    With `every` above 1, a parameter is updated at one step in so many, by so much more; its momentum takes in every
    gradient. The momentum, a mean over 20 steps, turns slowly, so that this loses nothing up to 8 and saves most of the
    products (docs/experiments.md, 15). Parameters take turns by a group's `step`, which the training loop sets.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, every: int = 1
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "muon": False, "every": every, "step": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                (self._turn if group["muon"] else self._adamw)(group, parameters)

    def _turn(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        dtype = choose_dtype("auto", parameters[0].device)
        dtype = torch.float32 if dtype == torch.float16 else dtype  # its range is too small for the first polynomial
        for parameter in parameters:
            assert parameter.grad is not None
            self._state(parameter, "momentum_buffer").lerp_(local(parameter.grad), 1 - MOMENTUM)
        every, rate = group["every"], group["lr"] * group["every"]
        for members in _of_one_shape(parameters[-group["step"] % every :: every]):
            sizes = [local(parameter).shape[0] if parameter.ndim == 3 else 1 for parameter in members]
            stack_MIO = local(members[0]).new_empty(sum(sizes), *sorted(members[0].shape[-2:]), dtype=dtype)
            for parameter, place, gradient in zip(members, stack_MIO.split(sizes), _gradients(members), strict=True):
                momentum = self._state(parameter, "momentum_buffer")
                place.copy_(_flat(gathered(parameter, gradient.lerp(momentum, MOMENTUM).contiguous())))
            for parameter, turned in zip(members, orthogonalize(stack_MIO).split(sizes), strict=True):
                (out, into), here = parameter.shape[-2:], local(parameter)
                here.mul_(1 - rate * group["weight_decay"])
                step = turned.mT if out > into else turned
                rows = rows_here(parameter) if parameter.ndim == 2 else slice(None)
                (here if here.ndim == 3 else here[None]).add_(step[:, rows], alpha=-rate * max(1.0, out / into) ** 0.5)

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            self._state(parameter, "exp_avg"), self._state(parameter, "exp_avg_sq")
            self.state[parameter].setdefault("step", torch.zeros((), device=parameter.device))
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            [local(parameter) for parameter in parameters],
            _gradients(parameters),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state(self, parameter: Tensor, name: str) -> Tensor:
        if name not in self.state[parameter]:
            self.state[parameter][name] = torch.zeros_like(local(parameter))
        return self.state[parameter][name]


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]


def _flat(parameter: Tensor) -> Tensor:
    """Return a view of the matrices of a parameter, (M, I, O), lying down: no more rows than columns."""
    matrices = parameter.view(-1, *parameter.shape[-2:])
    return matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices


def _of_one_shape(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield those that can be stacked."""
    shapes: dict[tuple[int, ...], list[Tensor]] = {}
    for parameter in parameters:
        shapes.setdefault(tuple(sorted(parameter.shape[-2:])), []).append(parameter)
    yield from shapes.values()
