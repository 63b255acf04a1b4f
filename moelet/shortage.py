"""Memory that runs out in the middle of a step: the same step again, in smaller parts.

A step is the same rows, normalised by all their tokens and balanced over all of them, however it is cut. What cutting
changes: the order of sums in floating point, and, where there is dropout, which numbers it drops, since these come from
(seed, step, micro-step). So from here on the run is, to the last bit, the one whose batches were cut like this at this
step; the cut is saved with it.
"""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from moelet.data import Batch
from moelet.errors import UserError
from moelet.memory import is_shortage

T = TypeVar("T")


class OutOfMemory(UserError):
    """Not even one row fits; what was there before is as it was."""


def cut(batches: list[Batch], rows: int) -> list[Batch]:
    """Return the batches' rows in their order, `rows` a batch, what is left in the last: as they'd have been read."""
    whole = Batch(
        torch.cat([batch.input_ids for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.cat([_segments(batch) for batch in batches]),
    )
    parts = zip(*(item.split(rows) for item in whole), strict=True)  # type: ignore[union-attr]
    return [Batch(ids, labels, None if bool((segments == 1).all()) else segments) for ids, labels, segments in parts]


def _segments(batch: Batch) -> Tensor:
    return torch.ones_like(batch.input_ids) if batch.segments is None else batch.segments


def smaller(batches: list[Batch]) -> int:
    """Return half of the rows of the largest batch, rounded up."""
    return -(-max(len(batch.labels) for batch in batches) // 2)


def within_memory(
    work: Callable[[list[Batch]], T], batches: list[Batch], rows: int | None, clear: Callable[[], None]
) -> tuple[T, int | None]:
    """Return what `work` makes of the batches, and the rows of the largest part that it could do that in.

    The parts are halved, and all the work is done anew, each time memory runs out; `clear` forgets what it had done.
    Raises OutOfMemory when it runs out with one row.
    """
    while True:
        parts = batches if rows is None else cut(batches, rows)
        try:
            return work(parts), rows
        except Exception as error:
            if not is_shortage(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        clear()  # outside of the handler: until it ends, the error holds the frames that hold the step's tensors
        free()
        if smaller(parts) == max(len(batch.labels) for batch in parts):
            raise OutOfMemory(f"memory ran out with a single row at a time ({reason})")
        rows = smaller(parts)


def free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
