"""How long a run takes to go on far into a shard: one of 100,000 documents on a hub on 127.0.0.1, killed at 80,000.

Trains a tiny model until its window begins past that document, kills the process, and times a new one from its start to
its first new step; says which bytes of the shard it fetched. From the repository's root, for two minutes:

    PYTHONPATH=.:tests OMP_NUM_THREADS=1 python bench/resume.py
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hub_client import hub_environment
from hub_server import HubServer
from zyda import COMPONENTS, make_zyda, zyda_documents

DOCUMENTS, PLACE, LIMIT = 100_000, 80_000, 400.0  # seconds to get there
SETTINGS = (
    "model.d_model=32 model.n_heads=2 model.d_ff=64 model.n_experts=4 model.n_layers=1 model.max_length=64 "
    "model.d_embed=16 tokenizer.vocab_size=1024 tokenizer.sample_bytes=300000 data.shuffle_window=1000 "
    "train.train_steps=100000 train.batch_size=128 train.eval_tokens=2000 train.eval_steps=null train.log_steps=1 "
    "train.checkpoint_steps=20 train.precision=fp32"
)


def newest_state(run: Path) -> dict[str, Any] | None:
    found = sorted((run / "checkpoints").glob("step-????????/state.json"))
    try:
        return json.loads(found[-1].read_text()) if found else None
    except (OSError, ValueError):  # removed while we looked
        return None


def documents_before(state: dict[str, Any] | None) -> int:
    """Return the documents of the shard that stand before the window of a checkpoint."""
    source = state["cursor"]["source"] if state else None
    return source["lanes"][0][2] if source and source["lanes"] else 0


def last_step(run: Path) -> int:
    line = (run / "metrics.jsonl").read_text().rpartition("\n")[0].rpartition("\n")[2]
    return json.loads(line)["step"] if line else 0


def wait(process: subprocess.Popen[bytes], done: Any) -> None:
    began = time.monotonic()
    while not done():
        if process.poll() is not None or time.monotonic() - began > LIMIT:
            raise SystemExit("the run ended, or never came there")
        time.sleep(0.02)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, run = Path(name), Path(name) / "run"
        texts = [text for found in zyda_documents(DOCUMENTS).values() for text in found]
        repository = make_zyda(folder / "hub", {COMPONENTS[0]: texts}, files_per_component=1)
        size = next(repository.glob("sample/100BT/*/*.parquet")).stat().st_size
        with HubServer(folder / "hub") as hub:
            environment = {**os.environ, **hub_environment(hub, folder / "home")}
            changes = [word for change in SETTINGS.split() for word in ("--set", change)]
            quiet: dict[str, Any] = {"env": environment, "stdout": subprocess.DEVNULL}
            train = [sys.executable, "train.py"]
            first = subprocess.Popen([*train, "recipes/zyda2-t4.json", "--run", str(run), *changes], **quiet)
            wait(first, lambda: documents_before(newest_state(run)) >= PLACE)
            first.kill()
            first.wait()
            hub.clear()
            state = newest_state(run)
            assert state is not None
            began = time.monotonic()
            second = subprocess.Popen([*train, "--resume", str(run)], **quiet)
            # its first act is to cut the metrics back to the checkpoint
            wait(second, lambda: last_step(run) <= state["step"])
            wait(second, lambda: last_step(run) > state["step"])
            seconds = time.monotonic() - began
            second.kill()
            second.wait()
            reads = [request for request in hub.requests if "sample/100BT" in request.path and request.range]
        print(
            f"killed at document {documents_before(state):,}; first new step after {seconds:.1f} s; of {size:,} bytes:"
        )
        for start, end in sorted({tuple(map(int, re.findall(r"\d+", str(request.range)))) for request in reads}):
            print(f"  {start / size:6.1%} to {end / size:6.1%}")


if __name__ == "__main__":
    main()
