"""The course of an upcycled run against the dense run it came from, continued: same text, order, schedule, tokens.

    python bench/upcycling.py books.jsonl [--out DIR] [--steps 200] [--seeds 2]

All arms begin at the dense run's weights with a fresh optimizer and read on where it stood. Prints held-out bits per
byte as Markdown.
"""

import argparse
import json
import tempfile
from pathlib import Path

from moelet import train
from moelet.allocator import keep_freed_memory
from moelet.console import Progress
from moelet.hparams import Hparams, read_hparams
from moelet.state import build, snapshot
from moelet.storage import checkpoint
from moelet.storage.checkpoint import HPARAMS, TOKENIZER, load_run_settings
from moelet.storage.disk import write_file
from moelet.train import identity
from moelet.upcycle import upcycle

RECIPE = Path(__file__).parent.parent / "recipes" / "cpu-tiny.json"
ARMS = {  # experts, top-k and noise; None: dense, continued
    "dense, continued": None,
    "8 experts, top-1": (8, 1, 0.0),
    "8 experts, top-2": (8, 2, 0.0),
    "8 experts, top-2, noise 0.1": (8, 2, 0.1),
}


def dense_settings(files: str, steps: int, seed: int) -> Hparams:
    """Return a dense model of 2 layers x 128 in recipes/cpu-tiny.json's schedule, without dropout."""
    changes = {
        "data.source": "files", "data.files": files, "data.validation_fraction": 0.02, "model.n_experts": 1,
        "model.top_k": 1, "model.d_ff": 256, "model.dropout": 0.0, "train.seed": seed, "train.train_steps": steps,
        "train.batch_size": 12, "train.eval_steps": steps // 4, "train.eval_tokens": 40_000, "train.log_steps": 20,
        "train.sample_prompt": None,
    }  # fmt: skip
    return read_hparams(RECIPE, [f"{name}={json.dumps(value)}" for name, value in changes.items()])


def continue_dense(dense: Path, run: Path) -> None:
    """Make a run of the dense one's weights and place in the text, as `upcycle` does of experts."""
    hparams, tokenizer = load_run_settings(dense)
    step, _ = checkpoint.newest(dense)
    assert step is not None
    saved, training = checkpoint.read(dense, step), build(hparams, tokenizer)
    training.model.load_state_dict(saved.model)
    training.cursor = saved.state["cursor"]
    checkpoint.save(run, snapshot(training, identity(hparams, tokenizer)))
    write_file(run / TOKENIZER, tokenizer.model_bytes)
    write_file(run / HPARAMS, hparams.to_json().encode())


def curve(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["val_bits_per_byte"] for row in rows if "val_bits_per_byte" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    keep_freed_memory()
    out = options.out or Path(tempfile.mkdtemp())
    for seed in range(options.seeds):
        dense = out / f"dense-{seed}"
        train.start(dense_settings(options.files, options.steps, seed), dense, Progress())
        print(f"| seed {seed}: dense, before | {' | '.join(f'{bits:.3f}' for bits in curve(dense))} |", flush=True)
        for name, arm in ARMS.items():
            run = out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            if arm is None:
                continue_dense(dense, run)
            else:
                upcycle(dense, run, *arm, seed=seed, continue_data=True)
            train.resume(run, [], Progress())
            print(f"| seed {seed}: {name} | {' | '.join(f'{bits:.3f}' for bits in curve(run))} |", flush=True)


if __name__ == "__main__":
    main()
