"""A run on several cards that aren't here: each way to divide it, estimated, and the one to take.

What a card computes is `cards`' estimate of its own rows, what travels is `layouts`' over the links that the makers
publish. Nothing of it was measured on cards; docs/scaling.md says what of the method was, and how far it goes.
"""

import math
import re
from typing import Any

import torch

from moelet.errors import UserError
from moelet.foresee.cards import ROOM, UNCERTAINTY, Card, Simulations, chosen, step_seconds
from moelet.foresee.layouts import LINK_SHARE, NODE, Link, Links, layouts, memory, rows_of, travel
from moelet.hparams import Hparams
from moelet.modelling import GPT
from moelet.parallel.layout import Sizes
from moelet.sections import MOST_RANKS

NEAR_SECONDS, FAR_SECONDS = 1e-5, 3e-5  # that a message takes within a node, and between nodes
# GB/s each way of one card. Near: PCIe 3.0 and 4.0 with 16 lanes, the cards' NVLink. Far: 400 Gb/s a card as in
# NVIDIA's DGX H100, 200 as in its DGX A100, else 100 Gb/s for eight
NEAR = {"T4": 15.8, "L4": 31.5, "RTX3060": 31.5, "RTX4090": 31.5, "A100": 300.0, "H100": 450.0, "H200": 450.0}
FAR = {"A100": 25.0, "H100": 50.0, "H200": 50.0}
FAR_OTHERS = 12.5 / 8


def parted(names: str | None) -> tuple[str | None, list[tuple[int, Card]]]:
    """Return the single cards of a list such as "T4,8xH100", None for all of them, and the clusters in it.

    Raises UserError for what is neither.
    """
    if names is None:
        return None, []
    single, clusters = [], []
    for name in names.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})\s*[xX]\s*(.+)", name)
        if found is None:
            single.append(name)
            continue
        count = int(found[1])
        if not 1 <= count <= MOST_RANKS:
            raise UserError(f"--gpus names {name.strip()!r}. It must be from 1 to {MOST_RANKS} cards, such as 8xT4.")
        clusters.append((count, chosen(found[2])[0]))
    return ",".join(single) or (clusters[0][1].name if clusters else ""), clusters


def links(card: Card) -> Links:
    """Return what a card's links reach, of what is published."""
    near, far = (rate * 1e9 * LINK_SHARE for rate in (NEAR[card.name], FAR.get(card.name, FAR_OTHERS)))
    return Links(Link(near, NEAR_SECONDS), Link(far, FAR_SECONDS))


def on_many(count: int, card: Card, hparams: Hparams, vocab_size: int, model: GPT) -> dict[str, Any]:
    """Return the estimates for `count` cards: each layout, the fastest that fits first.

    Raises UserError where the batch size isn't given.
    """
    if hparams.train.batch_size == "auto":
        raise UserError(
            f'train.batch_size is "auto", and for {count} {card.name} the rows of a micro-step over all of them are '
            "needed. Set train.batch_size."
        )
    share = rows_of(hparams, Sizes(count))
    alone = hparams.train.model_copy(
        update={"batch_size": share[0], "gradient_accumulation": len(share), "global_batch_size": None}
    )
    simulations = Simulations(hparams.model_copy(update={"train": alone}), vocab_size)
    step = simulations.step(card)
    computing = step_seconds(card, step) * len(share) / len(simulations.rows)
    activations = step.peak - step.weights - step.gradients - step.optimizer
    width = 4 if hparams.train.precision == "fp32" else torch.bfloat16.itemsize
    found = []
    for sizes in layouts(count, hparams.model.n_experts):
        way = travel(hparams, model, sizes, width, links(card))
        rate = hparams.tokens_per_step / (computing + way.seconds)
        peak = memory(hparams, model, sizes, max(0.0, activations))
        found.append(
            {
                **sizes._asdict(),
                "tokens_per_second": rate,
                "tokens_per_second_range": [rate / UNCERTAINTY, rate * UNCERTAINTY],
                "computing_seconds": computing,
                "travelling_seconds": way.seconds,
                "sent_bytes": way.gradients + way.weights + way.tokens,
                "memory_mb": peak / 2**20,
                "fits": peak <= ROOM * card.gigabytes * 2**30,
            }
        )
    found.sort(key=lambda row: (not row["fits"], -row["tokens_per_second"]))
    idle = 1 - sum(hparams.micro_batches) / (count * sum(share))
    return {
        "gpu": card.name,
        "count": count,
        "estimate": True,
        "rows_each": share[0],
        "idle_share": idle,
        "memory_gb_of_card": card.gigabytes,
        "layouts": found,
        "nodes": math.ceil(count / NODE),
    }
