"""How fast the arms of a study train here: whole steps in turn, on ids as frequent as text's.

It is called in a worker process. What the figures are used for is `prove`'s.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path

from moelet.data import Batch
from moelet.hparams import Hparams, read_hparams
from moelet.sections import ModelSettings
from moelet.speed.peers import AnyIds, Workload, zipf_batches
from moelet.state import build
from moelet.step import train_step
from moelet.study.arms import UNIT, active_width, full_width, twin_changes

ROUNDS = 5
TOGETHER_ROUNDS = 4  # the first ones of a new process fall into the start of its neighbours
UNSTEADY = 1.25  # between an arm's fastest and slowest round: then a study says that the machine was busy
TURN_SECONDS = 0.4  # that an arm trains for in a round, or one step if that is longer
WARM_STEPS = 2  # before the first turn: they allocate, and build kernels
WITHIN = 0.01  # throughputs that differ by less are taken for equal

Step = Callable[[], int]  # makes one optimizer step, returns its tokens


def stepper(hparams: Hparams, vocab_size: int) -> Step:
    """Return what makes a whole step of an arm: all its micro-batches, clipping, the optimizer.

    Learning rates are 0: one that is too high would end the measurement, not only its run.
    """
    training = build(hparams, AnyIds(vocab_size))
    for group in training.optimizer.param_groups:
        group["lr_scale"] = 0.0
    drawn = zipf_batches(Workload(hparams, vocab_size))

    def step() -> int:
        parts = [(next(drawn), size) for size in hparams.micro_batches]
        return train_step(training, [Batch(b.input_ids[:n], b.labels[:n], None) for b, n in parts]).tokens

    for _ in range(WARM_STEPS):
        step()
    return step


def turn(step: Step) -> float:
    """Return the tokens a second of one turn."""
    began, tokens, took = time.perf_counter(), 0, 0.0
    while took < TURN_SECONDS:
        tokens += step()  # it ends with the loss on the host, so the device is done as well
        took = time.perf_counter() - began
    return tokens / took


def in_turn(arms: Sequence[Hparams], vocab_size: int, rounds: int) -> list[list[float]]:
    """Return each arm's tokens a second in each round, in which every arm has one turn."""
    steps = [stepper(hparams, vocab_size) for hparams in arms]
    made = [[turn(step) for step in steps] for _ in range(rounds)]
    return [list(rates) for rates in zip(*made, strict=True)]


def together(pool: Executor, count: int, arm: Hparams, vocab_size: int) -> float:
    """Return the tokens a second of `count` runs of one arm side by side, all together."""
    running = [pool.submit(in_turn, [arm], vocab_size, TOGETHER_ROUNDS) for _ in range(count)]
    return sum(statistics.median(one.result()[0]) for one in running)


def steady(rates: Sequence[Sequence[float]]) -> list[float]:
    """Return each arm's tokens a second: the first's median, times the median of the arm's ratios to the first.

    A ratio is of two neighbours in time, so that what slows down a whole round changes nothing.
    """
    first, middle = rates[0], statistics.median(rates[0])
    return [middle * statistics.median(a / b for a, b in zip(arm, first, strict=True)) for arm in rates]


def equal_time_width(file: Path, changes: Sequence[str], vocab_size: int) -> int:
    """Return the width, a multiple of UNIT, of the dense twin that trains as many tokens a second as the MoE.

    Between UNIT and all experts' width, by halving; each width takes turns with the MoE.
    """
    moe = read_hparams(file, changes)
    step = stepper(moe, vocab_size)

    def speed(units: int) -> float:
        """Return the dense twin's throughput over the MoE's: the median of its rounds."""
        other = stepper(read_hparams(file, [*changes, *twin_changes(units * UNIT)]), vocab_size)
        return statistics.median(1 / turn(step) * turn(other) for _ in range(ROUNDS))

    low, high = 1, max(2, full_width(moe.model) // UNIT)
    while high - low > 1:
        middle = (low + high) // 2
        found = speed(middle)
        if abs(found - 1) < WITHIN:
            return middle * UNIT
        low, high = (middle, high) if found > 1 else (low, middle)
    return low * UNIT


def coincides(width: int, moe: ModelSettings) -> str | None:
    """Return the twin that a dense model of this width is next to, within UNIT; None if it is one of its own."""
    others = {"dense-active": active_width(moe), "dense-total": full_width(moe)}
    return next((name for name, other in others.items() if abs(other - width) <= UNIT), None)
