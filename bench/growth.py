"""What a training step costs as one thing grows: context, vocabulary, or experts at a constant active width.

Prints a Markdown table: seconds and FLOPs against the smallest of each axis. All else is the reference model, with
4,096 tokens a step. The points of an axis are interleaved. From the repository's root:

    PYTHONPATH=. python bench/growth.py [--rounds 5]
"""

import argparse
import statistics
import time
from typing import Any

import torch

from moelet.allocator import keep_freed_memory
from moelet.data import Batch, training_texts
from moelet.hparams import make_hparams
from moelet.step import Training, build, train_step
from moelet.tokenizer import Tokenizer

TOKENS = 4096  # of a step
WIDTH = 256  # of an expert
REFERENCE: dict[str, Any] = {"max_length": 512, "d_model": 512, "n_layers": 4, "n_heads": 8, "n_experts": 8}
AXES: dict[str, dict[str, dict[str, int]]] = {
    "context": {str(n): {"max_length": n} for n in (512, 1024, 2048)},
    "vocabulary": {f"{n // 1000}k": {"vocab_size": n} for n in (8_000, 32_000, 100_000)},
    "experts": {str(n): {"n_experts": n} for n in (8, 16, 32, 64)},
}


def training_of(change: dict[str, int], tokenizer: Tokenizer) -> Training:
    model = {**REFERENCE, "vocab_size": 32_000, **change}
    model["d_ff"] = WIDTH * model["n_experts"]
    return build(make_hparams({"model": model, "train": {"train_steps": 1000}}), tokenizer)


def seconds(training: Training, draw: torch.Generator) -> float:
    """Return the seconds of a step on random tokens."""
    length = training.hparams.model.max_length
    ids = torch.randint(4, training.tokenizer.vocab_size, (TOKENS // length, length), generator=draw)
    began = time.perf_counter()
    train_step(training, [Batch(ids, ids, None)])
    if training.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    keep_freed_memory()
    data = make_hparams({"train": {"train_steps": 1}}).data
    tokenizer = Tokenizer.train(training_texts(data, 0), 4096, sample_bytes=1_000_000)  # it only has to exist
    draw = torch.Generator().manual_seed(0)
    print("| axis | value | s a step | time | FLOPs | time / FLOPs |\n|---|---|---|---|---|---|")
    for axis, points in AXES.items():
        runs = {value: training_of(change, tokenizer) for value, change in points.items()}
        taken: dict[str, list[float]] = {value: [] for value in runs}
        for number in range(rounds + 1):  # round 0 warms up
            for value, training in runs.items():
                took = seconds(training, draw)
                taken[value] += [took] if number else []
        first = next(iter(runs))
        smallest = statistics.median(taken[first])
        flops = {v: training.model.flops_per_token(training.hparams.model.max_length) for v, training in runs.items()}
        for value, found in taken.items():
            time_ratio, flop_ratio = statistics.median(found) / smallest, flops[value] / flops[first]
            print(
                f"| {axis} | {value} | {statistics.median(found):.3f} | {time_ratio:.2f} | {flop_ratio:.2f} | "
                f"{time_ratio / flop_ratio:.2f} |",
                flush=True,
            )
    one = next(iter(runs.values()))
    print(f"\n{one.device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}, {one.dtype}")


if __name__ == "__main__":
    main()
