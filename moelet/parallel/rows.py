"""Which rows of a batch a rank has. The leader reads them, and deals out to each what is its own.

So which rows a step has doesn't depend on the number of ranks, a hub is asked once for each of them, and only one rank
can run out of text.
"""

import torch
from torch import Tensor

from moelet.data import Batch
from moelet.loss import IGNORE
from moelet.parallel.ranks import Team
from moelet.tokenizer import Tokenizer


def shares(batches: list[Batch], size: int) -> list[int]:
    """Return how many rows of each batch a rank has: as many as any other, with rows of padding where need be."""
    return [-(-len(batch.labels) // size) for batch in batches]


def deal(team: Team, batches: list[Batch] | None, rows: list[int], length: int) -> list[Batch]:
    """Return this rank's rows of the leader's batches, `rows` of each; all ranks call this."""
    if team.alone:
        assert batches is not None
        return batches
    hands = None
    if batches is not None:
        stacks = [_stacked(batch, count * team.size) for batch, count in zip(batches, rows, strict=True)]
        hands = [
            torch.cat([stack[:, rank * n : (rank + 1) * n] for stack, n in zip(stacks, rows, strict=True)], 1)
            for rank in range(team.size)
        ]
    mine = team.dealt(hands, [3, sum(rows), length]).long()
    return [_batch(*part) for part in mine.split(rows, 1)]


def _stacked(batch: Batch, rows: int) -> Tensor:
    """Return ids, labels and segments as one int32 tensor (3, rows, S), filled up with rows of padding."""
    segments = torch.ones_like(batch.input_ids) if batch.segments is None else batch.segments
    missing = rows - len(batch.labels)
    filled = [
        torch.cat([item, item.new_full((missing, item.shape[1]), value)])
        for item, value in ((batch.input_ids, Tokenizer.pad_id), (batch.labels, IGNORE), (segments, 0))
    ]
    return torch.stack(filled).to(torch.int32)


def _batch(input_ids: Tensor, labels: Tensor, segments: Tensor) -> Batch:
    return Batch(input_ids, labels, None if bool((segments == 1).all()) else segments)
