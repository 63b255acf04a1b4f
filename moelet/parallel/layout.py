"""Which part of a model lies on which rank: replicas, shards, experts. Torch's own engine moves the parts.

World = data x shard x expert, and every rank reads rows of its own. A matrix lies in `shard` parts (FSDP2); of each
layer's experts a rank has every `expert`-th share, whole. What several ranks have alike is kept equal by sums of its
gradients. A part is always a stretch of a tensor's first dimension, so that it can be saved and read as one.
"""

import math
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moelet.errors import UserError
from moelet.hparams import Hparams
from moelet.modelling import GPT, shapes_of, without_numbers
from moelet.moe import MoE, RouterStats, add_stats
from moelet.parallel.exchange import Exchange
from moelet.parallel.ranks import ALONE, Team, local
from moelet.sections import ModelSettings, ParallelSettings

STACKS = ".mlp.experts."  # in the names of parameters that are divided by experts
ALIKE = ".mlp.gate.bias"  # how the names of those end that every rank has all of


class Sizes(NamedTuple):
    """How many ranks each way of dividing the work has."""

    data: int = 1
    shard: int = 1
    expert: int = 1


def sizes_for(settings: ParallelSettings, model: ModelSettings, world: int) -> Sizes:
    """Return how `world` ranks divide the work. Raises UserError, with what would fit, where they can't."""
    shard, expert = settings.shard, settings.expert
    if model.n_experts % expert:
        fitting = [n for n in range(1, model.n_experts + 1) if model.n_experts % n == 0]
        raise UserError(
            f"parallel.expert is {expert} and model.n_experts is {model.n_experts}. Experts are divided evenly. Set "
            f"parallel.expert to one of {', '.join(map(str, fitting))}."
        )
    data = world // (shard * expert) if settings.data == "auto" else settings.data
    if data * shard * expert != world or data < 1:
        fixed = shard * expert * (1 if settings.data == "auto" else settings.data)
        raise UserError(
            f"parallel.data, shard and expert are {settings.data}, {shard} and {expert}, and there "
            f"{'is 1 process' if world == 1 else f'are {world} ranks'}. Their product must be the number of ranks. "
            f"Start {'a multiple of ' if settings.data == 'auto' else ''}{fixed} (torchrun --nproc-per-node {fixed}), "
            f"or set them to one of {', '.join(_fitting(model.n_experts, world))}."
        )
    return Sizes(data, shard, expert)


def _fitting(n_experts: int, world: int) -> list[str]:
    """Return the ways to divide the work of `world` ranks, in words."""
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    return [
        f"{world // shard // expert}, {shard} and {expert}"
        for shard in divisors
        for expert in divisors
        if world % (shard * expert) == 0 and n_experts % expert == 0
    ]


class Layout:
    """Where the parts of a model lie, seen by one rank. Alone, everything is here."""

    def __init__(self, team: Team = ALONE, sizes: Sizes = Sizes()) -> None:  # noqa: B008  a constant
        self.team, self.sizes = team, sizes
        expert_rank, rest = team.rank % sizes.expert, team.rank // sizes.expert
        self.at = Sizes(rest // sizes.shard, rest % sizes.shard, expert_rank)

    @property
    def divided(self) -> bool:
        """Whether no rank has all of the model."""
        return self.sizes.shard * self.sizes.expert > 1

    def part(self, name: str, rows: int) -> slice:
        """Return the stretch of the `rows` of the model's tensor `name` that lies here."""
        start, stop = 0, rows
        if name.endswith(ALIKE):
            return slice(0, rows)
        if STACKS in name:
            each = rows // self.sizes.expert
            start, stop = self.at.expert * each, (self.at.expert + 1) * each
        chunk = math.ceil((stop - start) / self.sizes.shard)  # torch.chunk's, which FSDP2 divides by
        begin = min(stop, start + self.at.shard * chunk)
        return slice(begin, min(stop, begin + chunk))

    def place(self, name: str, parameter: Tensor) -> str | None:
        """Return what a checkpoint adds to a parameter's name for this rank's part: "@" and its first row, or "" for
        all of it; None where another rank gives it, or there is none."""
        if self.at.data > 0 or (self.at.expert > 0 and STACKS not in name):
            return None
        rows = parameter.shape[0] * (self.sizes.expert if STACKS in name else 1)
        part = self.part(name, rows)
        if part == slice(0, rows):
            return ""
        return f"@{part.start}" if part.stop > part.start else None

    def count(self, shapes: dict[str, tuple[int, ...]]) -> int:
        """Return how many of the numbers of tensors with these names and shapes lie here."""
        parts = ((self.part(name, shape[0]), shape) for name, shape in shapes.items())
        return sum((part.stop - part.start) * math.prod(shape[1:]) for part, shape in parts)

    def copies(self, name: str) -> int:
        """Return how many ranks have the same part of parameter `name`."""
        return self.sizes.data * (1 if STACKS in name else self.sizes.expert)

    def grad_norm(self, model: nn.Module) -> Tensor:
        """Return the norm of all gradients, whole; equal on all ranks."""
        if self.team.alone:
            return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        squares = [
            torch.linalg.vector_norm(local(p.grad), dtype=torch.float64).square() / self.copies(name)
            for name, p in model.named_parameters()
            if p.grad is not None
        ]
        return self.team.summed(torch.stack(squares).sum()).sqrt().float()


def layout_of(hparams: Hparams, team: Team) -> Layout:
    """Return where the parts of a run's model lie. Raises UserError where its ranks can't divide the work so."""
    return Layout() if team.alone else Layout(team, sizes_for(hparams.parallel, hparams.model, team.size))


def new_model(settings: ModelSettings, vocab_size: int, layout: Layout, device: torch.device) -> GPT:
    """Return a new model, of which only the parts that lie here take memory; all ranks call this.

    Its numbers are those that one process alone would draw from torch's generator, tensor by tensor.
    """
    if layout.team.alone:
        return GPT(settings, vocab_size).to(device)
    model = without_numbers(settings, vocab_size)
    _spread(model, layout, device.type)
    model.to_empty(device=device)
    model.set_constants()
    shapes = shapes_of(settings, vocab_size)
    for name, parameter in model.named_parameters():
        whole = torch.empty(shapes[name])
        model.draw(name, whole)
        local(parameter.detach()).copy_(whole[layout.part(name, len(whole))])
    return model


def _spread(model: GPT, layout: Layout, device: str) -> None:
    """Leave on this rank what the layout says lies here, and have torch keep it together with the other ranks'.

    Afterwards parameters are DTensors, and forward and backward passes are made by all ranks together. Gradients are
    sums over ranks, not means.
    """
    from torch.distributed.device_mesh import DeviceMesh  # a second that nobody alone waits for

    data, shard, expert = layout.sizes
    ranks = torch.arange(layout.team.size).view(data, shard, expert)
    names = ("replicate", "shard")
    everyone = DeviceMesh(device, ranks.permute(0, 2, 1).reshape(data * expert, shard), mesh_dim_names=names)
    alike = DeviceMesh(device, ranks.permute(2, 0, 1), mesh_dim_names=("expert", *names))[names]
    group = DeviceMesh(device, ranks, mesh_dim_names=("data", "shard", "expert"))["expert"].get_group()
    for layer in model.layers:
        if expert > 1 and isinstance(layer.mlp, MoE):
            _keep_experts(layer.mlp, layout, group)
            _shard(layer.mlp.experts, alike)
        _shard(layer, everyone)
    _shard(model, everyone, root=True)


def _keep_experts(moe: MoE, layout: Layout, group: dist.ProcessGroup) -> None:
    """Drop the experts that lie on other ranks; those here are found by exchange."""
    experts = moe.experts
    each = experts.up_proj.shape[0] // layout.sizes.expert
    own = slice(layout.at.expert * each, (layout.at.expert + 1) * each)
    experts.exchange = Exchange(group, experts.up_proj.shape[0])
    for name, stack in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(stack.detach()[own].clone()))


def _shard(module: nn.Module, mesh: "dist.device_mesh.DeviceMesh", root: bool = False) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    # layers return their branch as a view, and nobody adds to it in place
    warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)
    # the root's parameters are those of the loss, too, which comes after its forward pass
    fully_shard(module, mesh=mesh, reshard_after_forward=None if root else mesh["shard"].size() > 1)
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)  # the loss is a sum over all ranks' tokens, divided by their number
    module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums


def settle(model: GPT, layout: Layout) -> None:
    """Have parameters be this rank's parts again after a forward pass that no backward pass followed."""
    if not layout.team.alone:
        parts: Iterable[Any] = model.modules()
        for module in parts:
            if hasattr(module, "reshard"):
                module.reshard()


def reduce_gradients(model: GPT, layout: Layout, now: bool) -> None:
    """Say whether the coming backward pass is the step's last: then replicas' gradients are added up, not before."""
    if not layout.team.alone:
        root: Any = model
        (root.set_requires_all_reduce if layout.divided else root.set_requires_gradient_sync)(now)
        root.set_is_last_backward(now)


def stats_of_all(team: Team, stats: list[RouterStats]) -> list[RouterStats]:
    """Return router statistics of all ranks together, detached."""
    stats = add_stats([], stats)
    if team.alone or not stats:
        return stats
    sums = [item.double() for layer in stats for item in layer[:-1]]  # counts are exact then, in whatever order
    flat = team.summed(torch.cat([item.flatten() for item in sums]))
    largest = team.largest(torch.stack([layer.largest for layer in stats]))
    given = iter(flat.split([item.numel() for item in sums]))
    return [
        RouterStats._make([*(next(given).view_as(item).to(item.dtype) for item in layer[:-1]), top])
        for layer, top in zip(stats, largest, strict=True)
    ]
