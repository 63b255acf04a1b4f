"""What reading costs training: rows streamed from a hub on 127.0.0.1 and encoded on the way, against batches at hand.

Prints a Markdown table. The steps of a round are interleaved; all train the same model. A window of few documents
keeps the thread that reads and encodes as busy as a long run would. From the repository's root:

    PYTHONPATH=.:tests python bench/streaming.py [--rounds 9] [--text FILE.jsonl]
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from hub_client import hub_environment
from hub_server import HubServer
from zyda import COMPONENTS, ZYDA, make_zyda, zyda_documents

from moelet.allocator import keep_freed_memory
from moelet.data import PREFETCH_BATCHES, START, Batch, Prefetch, training_batches, training_rows, training_texts
from moelet.hparams import Hparams, read_hparams
from moelet.state import Training, build
from moelet.step import train_step
from moelet.text.documents import Cursor
from moelet.tokenizer import Tokenizer

RECIPE = "recipes/zyda2-t4.json"
STEPS = 4  # of one kind, in a row
DOCUMENT = 4000  # characters of a document of --text, about a page of the web


def documents_of(path: Path | None) -> dict[str, list[str]]:
    """Return texts by component: made-up words, or the text of a file in stretches as long as a page of the web."""
    if path is None:
        return zyda_documents(20_000)
    texts = (json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines())
    parts = [text[at : at + DOCUMENT] for text in texts for at in range(0, len(text), DOCUMENT)]
    return {component: parts[k :: len(COMPONENTS)] for k, component in enumerate(COMPONENTS)}


def rows_alone(hparams: Hparams, tokenizer: Tokenizer, seconds: float) -> float:
    """Return the tokens a second that reading, encoding and packing make with nothing else to do."""
    rows = training_rows(hparams.data, tokenizer, hparams.model.max_length, 0, START)
    next(rows)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        count += len(list(islice(rows, 64)))
    return count * hparams.model.max_length / (time.perf_counter() - began)


def step_seconds(training: Training, batches: Iterator[tuple[Batch, Cursor]]) -> tuple[float, float]:
    """Return the seconds of a step, waiting for its batch included, and those of the wait."""
    began = time.perf_counter()
    batch, _ = next(batches)
    waited = time.perf_counter() - began
    train_step(training, [batch])
    if training.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, waited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--window", type=int, default=32, help="documents that are read and encoded together")
    parser.add_argument("--text", type=Path, help="a .jsonl file of real text; default: made-up words")
    given = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        make_zyda(Path(folder), documents_of(given.text))
        with HubServer(Path(folder)) as hub:
            os.environ |= hub_environment(hub, Path(folder) / "home")
            measure(given)


def measure(given: argparse.Namespace) -> None:
    changes = [f"train.batch_size={given.batch_size}", f"data.shuffle_window={given.window}", f"data.dataset={ZYDA}"]
    hparams = read_hparams(RECIPE, [*changes, "tokenizer.sample_bytes=5000000", "tokenizer.vocab_size=8192"])
    texts = training_texts(hparams.data, 0)
    tokenizer = Tokenizer.train(texts, hparams.tokenizer.vocab_size, sample_bytes=hparams.tokenizer.sample_bytes)
    alone = rows_alone(hparams, tokenizer, 5.0)
    training = build(hparams, tokenizer)
    arguments = (hparams.data, tokenizer, hparams.model.max_length, [given.batch_size], 0, START)
    at_hand = list(islice(training_batches(*arguments), STEPS))
    streamed, still, waits = [], [], []
    with Prefetch(training_batches(*arguments), PREFETCH_BATCHES) as batches:
        for number in range(given.rounds + 1):  # round 0 warms up
            for _ in range(STEPS):
                took, waited = step_seconds(training, batches)
                if number:
                    streamed.append(took)
                    waits.append(waited)
            found = [step_seconds(training, iter([item]))[0] for item in at_hand]
            still += found if number else []
    rate = given.batch_size * hparams.model.max_length
    streamed_step, step = statistics.median(streamed), statistics.median(still)
    print(f"{training.device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}, {training.dtype},")
    print(f"batch {given.batch_size} x {hparams.model.max_length}, medians of {len(still)} steps each\n")
    print("| what | figure |\n|---|---|")
    print(f"| reading, encoding and packing alone | {alone:,.0f} tokens/s |")
    print(f"| a step's tokens at that rate | {rate / alone / step:.2%} of a step |")
    print(f"| step with batches at hand | {step:.3f} s, {rate / step:,.0f} tokens/s |")
    print(f"| step with batches streamed | {streamed_step:.3f} s, {streamed_step / step:.3f} of that |")
    print(f"| of it, waiting for data | {statistics.mean(waits) / statistics.mean(streamed):.2%} |")


if __name__ == "__main__":
    main()
