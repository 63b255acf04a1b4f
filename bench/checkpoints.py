"""What checkpoints cost: to write, verify and clear out one of the reference model, and to go on from one.

Makes one step, so that the optimizer has its state, then saves as a run does, with every sync, and takes medians. The
resume is a new process, timed from its start to its first new step. From the repository's root, for some minutes:

    PYTHONPATH=. OMP_NUM_THREADS=2 python bench/checkpoints.py recipes/zyda2-t4.json --folder runs
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moelet.fit import throwaway_batch
from moelet.hparams import read_hparams
from moelet.state import build, restore, snapshot
from moelet.step import train_step
from moelet.storage.checkpoint import Writing, read_newest
from moelet.storage.manifest import folder_of, name_run, retain, verify
from moelet.tokenizer import Tokenizer

SAVES, INTERVAL = 7, 60.0  # seconds between checkpoints that the share is of


class Took(NamedTuple):
    seconds: float
    processor: float  # seconds of it that this process computed: what is left where others share the machine


def timed(work: Callable[[], Any]) -> Took:
    began, computed = time.perf_counter(), time.process_time()
    work()
    return Took(time.perf_counter() - began, time.process_time() - computed)


def median(parts: list[Took]) -> Took:
    return Took(*map(statistics.median, zip(*parts, strict=True)))


def measure(settings: Path, folder: Path, vocab_size: int) -> None:
    changes = ["train.device=cpu", f"model.vocab_size={vocab_size}", 'data.source="embedded"']
    hparams = read_hparams(settings, changes)
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in sorted(Path("moelet").rglob("*.py")))
    tokenizer = Tokenizer.train(texts, 2000)
    training = build(hparams, tokenizer)
    train_step(training, [throwaway_batch(hparams, tokenizer.vocab_size, 2)])
    training.run_id = name_run(folder)
    writings, copies, saves, checks, clears = list[Writing](), [], [], [], []
    for step in range(1, SAVES + 1):
        training.step = step
        made, place = snapshot(training, {}), folder_of(folder, step)
        copies.append(timed(lambda: writings.append(Writing(folder, made))))  # noqa: B023  called at once
        saves.append(timed(writings.pop().finish))
        checks.append(timed(partial(verify, place, place.name)))  # is part of the save, too
        clears.append(timed(partial(retain, folder, 2, None, good=step)))
    size = sum(path.stat().st_size for path in folder_of(folder, SAVES).iterdir()) / 2**20
    reads = [timed(lambda: restore(training, read_newest(folder)[0])) for _ in range(3)]  # type: ignore[arg-type]
    copy, write, check, clear, read = map(median, (copies, saves, checks, clears, reads))
    count = sum(parameter.numel() for parameter in training.model.parameters())
    print(f"{count / 1e6:.1f}M parameters, checkpoint {size:.0f} MiB, torch {torch.__version__}, {platform.machine()}")
    for name, took in (
        ("copying, all that training waits for where it goes on meanwhile", copy),
        ("writing, read back", write),
        ("reading back alone", check),
        ("clearing out", clear),
        ("read", read),
    ):
        print(f"{name}: {took.seconds:.2f} s, of it {took.processor:.2f} s of the processor")
    wall, processor = map(sum, zip(copy, write, clear, strict=True))
    print(f"one a minute: {wall / INTERVAL:.2%} of the time, {processor / INTERVAL:.2%} of one core's")


def first_step_after_resume(settings: Path, run: Path, changes: list[str]) -> None:
    command = [sys.executable, "-m", "moelet", "train"]
    words = [word for change in changes for word in ("--set", change)]
    quiet = {"stdout": subprocess.DEVNULL}
    steps = "train.train_steps=2"
    subprocess.run([*command, str(settings), "--run", str(run), *words, "--set", steps], check=True, **quiet)  # type: ignore[call-overload]
    more = ["--set", "train.train_steps=3", "--set", "train.eval_steps=null", "--accept-changes"]
    began = time.monotonic()
    process = subprocess.Popen([*command, "--resume", str(run), *more], **quiet)  # type: ignore[call-overload]
    while json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] < 3:
        if process.poll() not in (None, 0):
            raise SystemExit("the resumed run failed")
        time.sleep(0.02)
    seconds, ticks = time.monotonic() - began, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    computed = (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")
    print(f"resume: the first new step is logged after {seconds:.1f} s, of them {computed:.1f} s of the processor")
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=Path)
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        print(f"load average before: {os.getloadavg()[0]:.1f}")
        (Path(name) / "saves").mkdir()
        measure(given.settings, Path(name) / "saves", given.vocab_size)
        changes = ["train.device=cpu", 'data.source="embedded"', "train.batch_size=2", "train.eval_tokens=2000"]
        changes += ["train.checkpoint_steps=1", "train.sample_prompt=null", "train.log_steps=1", "train.precision=auto"]
        changes += ["train.global_batch_size=null", "train.gradient_accumulation=1", "train.eval_steps=null"]
        changes += [f"model.vocab_size={given.vocab_size}", "tokenizer.vocab_size=4096"]
        first_step_after_resume(given.settings, Path(name) / "run", changes)


if __name__ == "__main__":
    main()
