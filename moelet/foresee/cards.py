"""What a training step would take on cards that this machine doesn't have: an estimate, and what it rests on.

Every operation of a simulated step takes the time of its products at an assumed share of the card's published peak, or
of its bytes at an assumed share of the published bandwidth, whichever is longer; the step takes at least the time in
which a processor can launch so many operations. None of it was measured.
"""

from typing import Any, NamedTuple

import torch

from moelet.errors import UserError, nearest
from moelet.foresee.simulate import Simulated, simulate
from moelet.hparams import Hparams

PRODUCT_SHARE = 0.5  # of the peak: what cuBLAS reaches with matrices of a few hundred columns; large ones reach 0.7-0.9
TRAFFIC_SHARE = 0.7  # of the bandwidth: usual for operations that read and write each number once
LAUNCH_SECONDS = 7e-6  # of a processor for an operation called from Python, forward or by autograd
KERNEL_SECONDS = 3e-6  # that the smallest operation takes on the card itself
UNCERTAINTY = 2.0  # the factor that the rate may be off by, in either direction
ROOM = 0.9  # of a card's memory: the rest goes to CUDA's own context, to gaps, and to what a desktop shows
MOST_SIMULATED = 2  # micro-batches: more only make the optimizer's part smaller
AUTO_ROWS = 16  # a micro-step, where batch_size is "auto"


class Card(NamedTuple):
    """What the maker publishes: dense products of 16-bit numbers summed in float32, memory, its bandwidth."""

    name: str
    tflops: float
    wide_tflops: float  # of float32 numbers, without tensor cores
    gigabytes: int  # as on the box: 2^30 bytes each
    gb_per_second: float
    capability: tuple[int, int]

    @property
    def precision(self) -> str:
        return "bf16" if self.capability >= (8, 0) else "fp16"


# NVIDIA's datasheets and, for the GeForce cards, the appendices of its GA102 and Ada whitepapers. RTX 3060: 112 tensor
# cores x 128 multiply-adds x 1.777 GHz
CARDS = {
    card.name: card
    for card in (
        Card("T4", 65.0, 8.1, 16, 320, (7, 5)),
        Card("L4", 121.0, 30.3, 24, 300, (8, 9)),
        Card("RTX3060", 51.0 / 2, 12.7, 12, 360, (8, 6)),
        Card("RTX4090", 165.2, 82.6, 24, 1008, (8, 9)),
        Card("A100", 312.0, 19.5, 40, 1555, (8, 0)),
        Card("H100", 989.4, 66.9, 80, 3350, (9, 0)),
        Card("H200", 989.4, 66.9, 141, 4800, (9, 0)),
    )
}
BASIS = (
    "estimates; nothing of them was measured. They rest on the published peaks: each operation of the step reaches "
    f"{PRODUCT_SHARE:.0%} of that of products or {TRAFFIC_SHARE:.0%} of that of memory, and takes a processor "
    f"{LAUNCH_SECONDS * 1e6:.0f} us to launch. The rate may be off by a factor of {UNCERTAINTY:.0f}."
)


def chosen(names: str | None) -> list[Card]:
    """Return the cards that a comma-separated list names, all for None. Raises UserError for an unknown name."""
    if names is None:
        return list(CARDS.values())
    known = {name.lower(): card for name, card in CARDS.items()}
    found = []
    for name in names.split(","):
        plain = "".join(name.lower().split()).replace("-", "").removeprefix("nvidia")
        if plain not in known:
            raise UserError(
                f"--gpus names {name.strip()!r}. It must be one of: {', '.join(CARDS)}, or a number of them such as "
                f"8xT4; several with commas.{nearest(plain.upper(), CARDS)}"
            )
        found.append(known[plain])
    return found


class Simulations:
    """Simulated steps, each made once: a new card's way through the code, and an old one's."""

    def __init__(self, hparams: Hparams, vocab_size: int) -> None:
        self.hparams, self.vocab_size = hparams, vocab_size
        train = hparams.train
        if train.batch_size == "auto":
            self.rows = [min(AUTO_ROWS, train.global_batch_size or AUTO_ROWS)]
        else:
            self.rows = hparams.micro_batches[:MOST_SIMULATED]
        self._made: dict[tuple[bool, torch.dtype], Simulated] = {}

    def step(self, card: Card) -> Simulated:
        new = card.capability >= (8, 0)
        wide = self.hparams.train.precision == "fp32"
        way = (new, torch.float32 if wide else torch.bfloat16)  # fp16 is as wide as bf16
        if way not in self._made:
            self._made[way] = simulate(self.hparams, self.vocab_size, self.rows, way[1], new)
        return self._made[way]


def step_seconds(card: Card, step: Simulated) -> float:
    """Return how long the card takes for a step, or the processor to launch it, whichever is longer."""
    rate = {wide: tflops * 1e12 * PRODUCT_SHARE for wide, tflops in ((False, card.tflops), (True, card.wide_tflops))}
    bandwidth = card.gb_per_second * 1e9 * TRAFFIC_SHARE
    on_card = sum(max(op.flops / rate[op.wide], op.bytes / bandwidth, KERNEL_SECONDS) for op in step.operations)
    return max(on_card, LAUNCH_SECONDS * len(step.operations))


def estimate(card: Card, simulations: Simulations) -> dict[str, Any]:
    """Return a card's row of the table."""
    step, rows = simulations.step(card), simulations.rows
    seconds = step_seconds(card, step)
    rate = sum(rows) * simulations.hparams.model.max_length / seconds
    return {
        "gpu": card.name,
        "estimate": True,
        "precision": "fp32" if simulations.hparams.train.precision == "fp32" else card.precision,
        "tokens_per_second": rate,
        "tokens_per_second_range": [rate / UNCERTAINTY, rate * UNCERTAINTY],
        "step_seconds": seconds,
        "launch_bound": seconds == LAUNCH_SECONDS * len(step.operations),
        "memory_mb": step.peak / 2**20,
        "memory_gb_of_card": card.gigabytes,
        "fits": step.peak <= ROOM * card.gigabytes * 2**30,
        "published": {"tflops": card.tflops, "gb_per_second": card.gb_per_second},
        "assumed": {"share_of_peak": PRODUCT_SHARE, "share_of_bandwidth": TRAFFIC_SHARE, "launch_s": LAUNCH_SECONDS},
    }
