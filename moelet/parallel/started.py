"""Which rank of a run this process was started as. Needs no torch."""

import os


def started_ranks() -> int:
    """Return how many processes torchrun, or whoever, started together; 1: this one alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def started_rank() -> int:
    """Return this process's number among them."""
    return int(os.environ.get("RANK", "0")) if started_ranks() > 1 else 0
