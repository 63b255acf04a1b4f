"""How fast a run would be on several ranks, and what each would hold, for every way to divide it: from what one rank
computes, what travels and how fast that goes. `bench/ranks.py` holds it against measured steps.

What travels in a step isn't hidden behind what is computed: an upper bound where an engine hides it.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from moelet.foresee.sizes import FLOAT
from moelet.hparams import Hparams
from moelet.modelling import GPT
from moelet.optim import OPTIMIZERS
from moelet.parallel.layout import STACKS, Sizes

NODE = 8  # ranks that share a node's own links; more go by the network
LINK_SHARE = 0.7  # of the published rate: usual for large messages


class Link(NamedTuple):
    """What one rank can send while it receives as much."""

    bytes_per_second: float
    seconds: float  # that a message takes at least


class Links(NamedTuple):
    """Within a node, and between nodes."""

    near: Link
    far: Link

    def of(self, ranks: int, stride: int) -> Link:
        """Return the link of a group of `ranks`, `stride` apart: the slowest that it crosses."""
        return self.near if ranks * stride <= NODE else self.far


class Held(NamedTuple):
    """What one rank has: numbers of parameters, and of the optimizer's state."""

    dense: float
    experts: float
    state: float


class Travel(NamedTuple):
    """What one rank sends in a step, by what for."""

    gradients: int  # bytes, added up over replicas
    weights: int  # gathered, and their gradients scattered, over shards
    tokens: int  # rows to experts and back, and their gradients
    seconds: float


def layouts(ranks: int, n_experts: int) -> Iterator[Sizes]:
    """Yield the ways to divide a run among `ranks`, the plainest first."""
    for shard in (n for n in range(1, ranks + 1) if ranks % n == 0):
        for expert in (n for n in range(1, ranks // shard + 1) if (ranks // shard) % n == 0 and n_experts % n == 0):
            yield Sizes(ranks // shard // expert, shard, expert)


def held(hparams: Hparams, model: GPT, sizes: Sizes) -> Held:
    """Return what one rank has of the model."""
    experts = sum(p.numel() for name, p in model.named_parameters() if STACKS in name)
    dense = sum(p.numel() for p in model.parameters()) - experts
    groups = OPTIMIZERS[hparams.optim.optimizer](model, hparams.optim).param_groups
    stacks = {id(p) for name, p in model.named_parameters() if STACKS in name}
    state = sum(
        (1 if group.get("muon") else 2) * p.numel() / sizes.shard / (sizes.expert if id(p) in stacks else 1)
        for group in groups
        for p in group["params"]
    )
    return Held(dense / sizes.shard, experts / sizes.shard / sizes.expert, state)


def rows_of(hparams: Hparams, sizes: Sizes) -> list[int]:
    """Return the rows of each micro-step that one rank has."""
    world = math.prod(sizes)
    return [math.ceil(rows / world) for rows in hparams.micro_batches]


def travel(hparams: Hparams, model: GPT, sizes: Sizes, width: int, links: Links) -> Travel:
    """Return what one rank sends in a step and how long that takes; a number of a token's row has `width` bytes."""
    s, (data, shard, expert) = hparams.model, sizes
    here, micro_steps = held(hparams, model, sizes), len(hparams.micro_batches)
    layers = s.n_layers + 1  # groups of parameters that FSDP2 moves as one: the layers, and what is around them
    gradients = weights = tokens = 0
    seconds = 0.0
    for numbers, copies in ((here.dense, data * expert), (here.experts, data)):
        count = round(2 * (copies - 1) / copies * numbers * FLOAT)
        link = links.of(copies, shard * (1 if copies > data else expert))
        gradients += count
        seconds += count / link.bytes_per_second + (layers * 2 * (copies - 1) * link.seconds if count else 0)
    if shard > 1:  # gathered forward and again backward, scattered once, each micro-step
        count = round(3 * micro_steps * (shard - 1) * (here.dense + here.experts) * FLOAT)
        link = links.of(shard, expert)
        weights += count
        seconds += count / link.bytes_per_second + 3 * micro_steps * layers * (shard - 1) * link.seconds
    if expert > 1 and s.n_experts > 1:
        routed = sum(rows_of(hparams, sizes)) * s.max_length * s.top_k * s.n_layers
        count = round(4 * routed * s.d_model * width * (expert - 1) / expert)
        link = links.of(expert, 1)
        tokens += count
        seconds += count / link.bytes_per_second + 6 * micro_steps * s.n_layers * (expert - 1) * link.seconds
    return Travel(gradients, weights, tokens, seconds)


def memory(hparams: Hparams, model: GPT, sizes: Sizes, activations: float) -> float:
    """Return the bytes that one rank takes at its most; `activations` are those of its rows."""
    here = held(hparams, model, sizes)
    layer = max(sum(p.numel() for p in layer.parameters()) for layer in model.layers)
    gathered = 2 * FLOAT * layer if sizes.shard > 1 else 0  # a layer's weights and gradients, whole
    return 2 * FLOAT * (here.dense + here.experts) + FLOAT * here.state + gathered + activations
