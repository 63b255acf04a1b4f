"""What an optimizer's step costs beside the gradients it is for: Muon against AdamW, by tokens a step.

    OMP_NUM_THREADS=2 PYTHONPATH=. python bench/optimizer.py [recipes/modern-cpu.json ...]

Gradients' time grows with the tokens of a step, the optimizer's doesn't: measured for one micro-batch, the shares of
larger steps follow. Rounds are interleaved, each of as many steps as all matrices need for their turn; prints a
Markdown table of medians.
"""

import argparse
import statistics
import time
from pathlib import Path

from moelet.allocator import keep_freed_memory
from moelet.hparams import Hparams, read_hparams
from moelet.speed.peers import AnyIds, Workload, zipf_batches
from moelet.state import Training, build
from moelet.step import train_step
from moelet.study.calibrate import WARM_STEPS

EVERY = 8
SIDES = {
    "AdamW": ["optim.optimizer=adamw"],
    "Muon": ["optim.optimizer=muon", "optim.muon_every=1"],
    f"Muon, one step in {EVERY}": ["optim.optimizer=muon", f"optim.muon_every={EVERY}"],
}
VOCAB = 4096
TOKENS = (1024, 2048, 8192, 32_768)


def prepared(hparams: Hparams) -> Training:
    """Return a training whose optimizer has its state, and whose parameters have gradients."""
    training, batches = build(hparams, AnyIds(VOCAB)), zipf_batches(Workload(hparams, VOCAB))
    training.plan = [[0, 1_000_000]]
    for _ in range(WARM_STEPS):
        train_step(training, [next(batches)])
    return training


def seconds(hparams: Hparams, training: Training) -> tuple[float, float]:
    """Return what the gradients of a step take and what the optimizer takes, means over EVERY steps."""
    batch, step, took = next(zipf_batches(Workload(hparams, VOCAB))), training.optimizer.step, 0.0

    def timed() -> None:
        nonlocal took
        began = time.perf_counter()
        step()
        took += time.perf_counter() - began

    training.optimizer.step = timed  # type: ignore[method-assign]
    began = time.perf_counter()
    for _ in range(EVERY):
        train_step(training, [batch])
    whole = time.perf_counter() - began
    training.optimizer.step = step  # type: ignore[method-assign]
    return (whole - took) / EVERY, took / EVERY


def rows(file: Path, rounds: int) -> list[list[str]]:
    settings = {name: read_hparams(file, [*changes, "train.batch_size=4"]) for name, changes in SIDES.items()}
    trainings = {name: prepared(hparams) for name, hparams in settings.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name, hparams in settings.items():
            found[name].append(seconds(hparams, trainings[name]))
    tokens = next(iter(settings.values())).tokens_per_step
    gradients = statistics.median(one for times in found.values() for one, _ in times) / tokens
    table = []
    for name, times in found.items():
        own = statistics.median(optimizer for _, optimizer in times)
        shares = [f"{own / (own + gradients * n):.1%}" for n in TOKENS]
        table.append([file.name, f"{1e6 * gradients:.0f}", name, f"{1000 * own:.1f}", *shares])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=[Path("recipes/modern-cpu.json")])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    keep_freed_memory()
    head = ["file", "gradients, us a token", "optimizer", "ms a step", *(f"share at {n:,} tokens" for n in TOKENS)]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for file in arguments.files:
        for row in rows(file, arguments.rounds):
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
