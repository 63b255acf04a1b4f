"""What data.mask_documents costs: seconds of a training step with and without it, for every attention backend.

Prints a Markdown table. The steps of a round are interleaved, and all see the same tokens: packed documents of random
ids. From the repository's root: `OMP_NUM_THREADS=2 PYTHONPATH=. python bench/mask_documents.py`
"""

import argparse
import statistics
import time
from itertools import product

import numpy as np
import torch

from moelet import data
from moelet.allocator import keep_freed_memory
from moelet.attention import ATTENTION, causal_mask
from moelet.data import Batch
from moelet.hparams import Hparams, make_hparams
from moelet.state import Training, build
from moelet.step import train_step
from moelet.tokenizer import Tokenizer

MEAN_TOKENS = 200  # of a document
VOCAB = 4096
SAMPLE_BYTES = 1_000_000  # the tokenizer only has to exist


def settings(backend: str, length: int, dropout: float) -> Hparams:
    """Return the reference shape with an attention backend."""
    shape = {"max_length": length, "d_model": 512, "n_layers": 4, "n_heads": 8, "n_experts": 8, "d_ff": 2048}
    model = {**shape, "attention": backend, "dropout": dropout}
    return make_hparams({"model": model, "train": {"train_steps": 1000}})


def packed_rows(batch_size: int, length: int, draw: np.random.Generator) -> list[np.ndarray]:
    """Return rows of `length` + 1 ids, filled with documents of MEAN_TOKENS on average."""
    n_documents = 2 + 4 * batch_size * length // MEAN_TOKENS  # several times enough
    lengths = 1 + draw.geometric(1 / (MEAN_TOKENS - 2), n_documents)
    documents = [np.array([Tokenizer.bos_id, *draw.integers(4, VOCAB, n), Tokenizer.eos_id]) for n in lengths]
    return list(data.packed(documents, length)[:batch_size])


def seconds(training: Training, batch: Batch) -> float:
    start = time.perf_counter()
    train_step(training, [batch])
    if training.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def mask_seconds(batch: Batch, n_layers: int) -> float:
    """Return the seconds that all layers' masks take."""
    assert batch.segments is not None
    length = batch.segments.shape[1]
    start = time.perf_counter()
    for _ in range(n_layers):
        causal_mask(length, length, batch.segments, batch.segments.device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dropout", type=float, default=0.1, help="with 0 sdpa can use its fused kernels on a CPU")
    given = parser.parse_args()
    keep_freed_memory()  # as training does
    base = settings("explicit", given.length, given.dropout)
    tokenizer = Tokenizer.train(data.training_texts(base.data, 0), VOCAB, sample_bytes=SAMPLE_BYTES)
    runs = {name: build(settings(name, given.length, given.dropout), tokenizer) for name in ATTENTION}
    taken: dict[tuple[str, bool], list[float]] = {case: [] for case in product(ATTENTION, (False, True))}
    masks: list[float] = []
    draw = np.random.default_rng(0)
    for number in range(given.rounds + 1):  # round 0 warms up
        rows = packed_rows(given.batch_size, given.length, draw)
        cases = list(taken) if number % 2 else list(taken)[::-1]
        for name, masked in cases:
            taken[name, masked].append(seconds(runs[name], data.collate(rows, masked)))
        masks.append(mask_seconds(data.collate(rows, True), base.model.n_layers))

    one = runs["explicit"]
    print(f"{one.device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}, {one.dtype},", end=" ")
    print(f"batch {given.batch_size} x {given.length}, dropout {given.dropout:g}, medians of {given.rounds} rounds\n")
    print("| attention | step, s | with mask_documents, s | ratio | of which masks |\n|---|---|---|---|---|")
    for name in ATTENTION:
        plain, masked = taken[name, False][1:], taken[name, True][1:]
        ratio = statistics.median(b / a for a, b in zip(plain, masked, strict=True))
        share = statistics.median(masks[1:]) / statistics.median(masked)
        print(
            f"| {name} | {statistics.median(plain):.2f} | {statistics.median(masked):.2f} | {ratio:.3f} | {share:.2%} |"
        )


if __name__ == "__main__":
    main()
