"""Makes the golden run of a checkpoint format: once, at the commit that brings the format, never again.

    PYTHONPATH=. python tests/faults/golden/make.py tests/faults/golden/format-1
    PYTHONPATH=. torchrun --nproc-per-node 2 tests/faults/golden/make.py tests/faults/golden/format-2

The second is that of several ranks, which divide the experts; it was then said to be one rank's. The run is cut at
step CUT of STEPS; the lines of metrics.jsonl that it would go on with are in `expected.jsonl`. Its text is made by
`write_text`, not kept.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS, CUT = 8, 4
SETTINGS: dict[str, Any] = {
    "model": {"max_length": 16, "d_model": 16, "d_embed": 8, "n_layers": 1, "n_heads": 2, "d_ff": 32, "n_experts": 4},
    "tokenizer": {"vocab_size": 300, "sample_bytes": 20_000},
    "data": {"source": "files", "shuffle_window": 32, "piece_chars": 256, "validation_fraction": 0.1},
    "optim": {"lr": 0.01, "min_lr": 0.001, "warmup_steps": 2},
    "train": {
        "device": "cpu", "precision": "fp32", "batch_size": 4, "gradient_accumulation": 2, "train_steps": STEPS,
        "eval_tokens": 200, "eval_steps": 4, "log_steps": 1, "checkpoint_steps": CUT, "sample_prompt": None,
    },
}  # fmt: skip


def write_text(folder: Path) -> Path:
    """Write the run's text, the same for ever; its name and content are in the checkpoint's fingerprints."""
    words = "one two three four five six seven eight nine ten".split()
    lines = [
        f"{words[i % 10]} times {words[i // 10 % 10]} is {(i % 10 + 1) * (i // 10 % 10 + 1)}, {i}" for i in range(600)
    ]
    path = folder / "text.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main(target: Path) -> None:
    from moelet import train
    from moelet.console import Progress
    from moelet.follow import take_part
    from moelet.hparams import make_hparams
    from moelet.parallel.ranks import join

    team = join()
    if not team.leads:
        take_part(team)
        return
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        settings = {**SETTINGS, "data": {**SETTINGS["data"], "files": [str(write_text(Path(name)))]}}
        if not team.alone:  # other ranks draw other dropout
            settings |= {"model": {**SETTINGS["model"], "dropout": 0.0}, "parallel": {"expert": team.size}}
        train.start(make_hparams(settings), run, Progress(), team=team)
        target.mkdir(parents=True)
        for kept in ("hparams.json", "tokenizer.model", f"checkpoints/step-{CUT:08}"):
            (target / kept).parent.mkdir(exist_ok=True)
            (shutil.copytree if (run / kept).is_dir() else shutil.copy)(run / kept, target / kept)
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    hparams = json.loads((target / "hparams.json").read_text())
    hparams["data"]["files"] = ["text.txt"]
    hparams["parallel"]["expert"] = 1
    (target / "hparams.json").write_text(json.dumps(hparams, indent=2) + "\n")
    (target / "metrics.jsonl").write_text("".join(lines[:CUT]))
    (target / "expected.jsonl").write_text("".join(lines[CUT:]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
