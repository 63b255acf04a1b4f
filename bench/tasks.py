"""Whether lm-eval and our own scorer agree on tasks in files: both score the same rows with the same model.

Needs lm-eval (pip install lm-eval), no network. From the repository's root:

    PYTHONPATH=. python bench/tasks.py RUN TASK.jsonl [TASK.jsonl ...]
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from moelet.choices import KINDS
from moelet.harness import Subject, adapter, examine, figures_of
from moelet.precision import choose_dtype
from moelet.storage.checkpoint import load

COMPARED = ("acc", "acc_bytes", "perplexity")


def lm_eval_task(path: Path) -> dict[str, Any]:
    """Return a file of ours as a task of lm-eval's."""
    fields = set(json.loads(path.open(encoding="utf-8").readline()))
    kind = next(kind for kind, needed in KINDS.items() if fields >= set(needed))
    asked: dict[str, dict[str, Any]] = {
        "choices": {"doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"},
        "contexts": {
            "doc_to_text": lambda row: row["gold"],
            "doc_to_choice": lambda row: row["context_options"],
            "doc_to_target": lambda row: row["continuation"],
        },
        "guess": {"doc_to_text": "{{context}}", "doc_to_target": " {{continuation}}", "output_type": "loglikelihood"},
    }
    metrics = {"choices": ["acc", "acc_bytes"], "contexts": ["acc"], "guess": ["perplexity", "acc"]}[kind]
    return {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(path)},
        "test_split": "train",
        "output_type": "multiple_choice",
        "metadata": {"version": 1},
        "metric_list": [{"metric": metric} for metric in metrics],
        **asked[kind],
    }


def main(run: str, *files: str) -> int:
    from lm_eval.evaluator import simple_evaluate

    loaded = load(run)
    dtype = choose_dtype(loaded.hparams.train.precision, next(loaded.model.parameters()).device)
    subject = Subject(loaded.model, loaded.tokenizer, loaded.hparams.batch_size, dtype)
    began = time.perf_counter()
    ours = examine(subject, ",".join(files))
    middle = time.perf_counter()
    tasks = [lm_eval_task(Path(file)) for file in files]
    theirs = figures_of(simple_evaluate(adapter(subject), tasks=tasks, bootstrap_iters=2, log_samples=False))
    took = middle - began, time.perf_counter() - middle
    print("| task | questions | figure | moelet | lm-eval |\n|---|---|---|---|---|")
    differ = 0
    for file in files:
        for name in COMPARED:
            if name in ours[file]:
                mine, yours = ours[file][name], theirs[Path(file).stem][name]
                differ += abs(mine - yours) > 1e-9 * abs(yours)
                print(f"| {Path(file).stem} | {ours[file]['n']:,} | `{name}` | {mine:.6g} | {yours:.6g} |")
    print(f"{differ} differ by more than 1e-9 of themselves; {took[0]:.0f} s here, {took[1]:.0f} s through lm-eval")
    return min(differ, 1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["HF_DATASETS_CACHE"] = cache
        sys.exit(main(*sys.argv[1:]))
