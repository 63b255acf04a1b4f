"""What a training step costs as one thing grows: context, vocabulary, or experts at a constant active width.

Prints a Markdown table: seconds and FLOPs against the smallest of each axis, and peak memory. All else is the reference
model, 4,096 tokens a step. Each point has a process of its own, since a process's peak never falls; they step in turn.

    PYTHONPATH=. python bench/growth.py [--rounds 5] [--json FILE]
"""

import argparse
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from moelet.allocator import keep_freed_memory
from moelet.data import Batch
from moelet.hparams import make_hparams
from moelet.metrics import peak_memory_mb
from moelet.state import Training, build
from moelet.step import train_step
from moelet.tokenizer import Tokenizer

TOKENS = 4096  # of a step
WIDTH = 256  # of an expert
REFERENCE: dict[str, Any] = {"max_length": 512, "d_model": 512, "n_layers": 4, "n_heads": 8, "n_experts": 8}
AXES: dict[str, dict[str, dict[str, int]]] = {
    "context": {str(n): {"max_length": n} for n in (512, 1024, 2048)},
    "vocabulary": {f"{n // 1000}k": {"vocab_size": n} for n in (8_000, 32_000, 100_000)},
    "experts": {str(n): {"n_experts": n} for n in (8, 16, 32, 64)},
}
TEXT = "\n".join(f"def square_{i}(value): return value * value + {i}" for i in range(400))
Point = dict[str, Any]


def training_of(change: dict[str, int]) -> Training:
    """Return the reference model with one change, at its first step. Its tokenizer only has to exist."""
    model = {**REFERENCE, "vocab_size": 32_000, "d_embed": 128, "top_k": 2, "dropout": 0.1, **change}
    model["d_ff"] = WIDTH * model["n_experts"]
    return build(make_hparams({"model": model, "train": {"train_steps": 1000}}), Tokenizer.train([TEXT], 300))


def seconds(training: Training, draw: torch.Generator) -> float:
    """Return the seconds of a step on random tokens."""
    length = training.hparams.model.max_length
    ids = torch.randint(4, training.tokenizer.vocab_size, (TOKENS // length, length), generator=draw)
    labels = torch.randint(4, training.tokenizer.vocab_size, ids.shape, generator=draw)
    began = time.perf_counter()
    train_step(training, [Batch(ids, labels, None)])
    if training.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def serve(pipe: Connection, change: dict[str, int]) -> None:
    """Make a step whenever the parent asks for one, and at its last word say what they took."""
    keep_freed_memory()
    training, draw, taken = training_of(change), torch.Generator().manual_seed(0), []
    flops = TOKENS * training.model.flops_per_token(training.hparams.model.max_length)
    where = f"{training.device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}, {training.dtype}"
    pipe.send(None)
    while pipe.recv():
        taken.append(seconds(training, draw))
        pipe.send(None)
    peak = peak_memory_mb(training.device) / 1024
    pipe.send({"seconds": taken[1:], "flops": flops, "peak_gib": peak, "where": where})  # the first warms up


def measure(points: dict[str, dict[str, int]], rounds: int) -> dict[str, Point]:
    """Return what each point took, one process each, their steps in turn."""
    context, pipes, found = multiprocessing.get_context("spawn"), {}, {}
    for value, change in points.items():
        pipes[value], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, change), daemon=True).start()
        theirs.close()  # or a child that dies would be waited for without end
        pipes[value].recv()
    for _ in range(rounds + 1):
        for pipe in pipes.values():
            pipe.send(True)
            pipe.recv()
    for value, pipe in pipes.items():
        pipe.send(False)
        found[value] = pipe.recv()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write every step's seconds here")
    options = parser.parse_args()
    print("| axis | value | s a step | time | FLOPs | time / FLOPs | peak, GiB |\n|---|---|---|---|---|---|---|")
    found: dict[str, dict[str, Point]] = {}
    for axis, points in AXES.items():
        found[axis] = measure(points, options.rounds)
        first = next(iter(found[axis].values()))
        for value, point in found[axis].items():
            took = statistics.median(point["seconds"])
            grown, flops = took / statistics.median(first["seconds"]), point["flops"] / first["flops"]
            ratios = f"{grown:.2f} | {flops:.2f} | {grown / flops:.2f}"
            print(f"| {axis} | {value} | {took:.3f} | {ratios} | {point['peak_gib']:.1f} |", flush=True)
    print(f"\n{first['where']}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
