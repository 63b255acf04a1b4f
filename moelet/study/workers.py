"""Processes that train: the jobs of a study, each an ordinary run folder, and what is to be seen of them from outside.

A worker has a process group of its own, so that Ctrl-C reaches the parent alone; the parent has it save and stop. It
ends when its parent does.
"""

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from moelet.allocator import keep_freed_memory
from moelet.console import Progress
from moelet.errors import Interrupted, UserError
from moelet.hparams import Hparams
from moelet.metrics import read_rows
from moelet.storage.manifest import checkpoint_steps
from moelet.study.study import Done
from moelet.train import resume, start

CONTEXT = multiprocessing.get_context("spawn")
STOPPED = "stopped"
_stop: list[int] = []  # signals that reached this process between its jobs


def _begin(threads: int) -> None:
    """Make a new process a worker."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: _stop.append(number))
    keep_freed_memory()
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def workers(count: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    """Give a pool of workers. They are killed where the body fails, and waited for where it ends."""
    with ProcessPoolExecutor(count, CONTEXT, initializer=_begin, initargs=(threads,)) as pool:
        try:
            yield pool
        except BaseException:
            for process in multiprocessing.active_children():
                process.kill()
            raise


def ask_to_stop() -> None:
    """Have all workers save what they train, and stop."""
    for process in multiprocessing.active_children():
        process.terminate()


@contextmanager
def _stopped_by_a_signal() -> Iterator[None]:
    """Raise Interrupted at SIGTERM, where the training loop, which saves first, has not taken over or is done."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, "interrupted before the first step")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_job(hparams: Hparams, folder: Path) -> str | None:
    """Train the job in `folder`, or go on with it; return None when it is done, STOPPED when it was asked to stop and
    is saved, else why it can't be done. What a run says goes into a file beside the folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.txt"), "a", encoding="utf-8") as output:
        progress = Progress(Console(file=output, soft_wrap=True, highlight=False))
        try:
            if _stop:
                return STOPPED
            with _stopped_by_a_signal():
                if checkpoint_steps(folder):
                    resume(folder, [f"data.files={json.dumps(hparams.data.files)}"], progress)
                else:
                    start(hparams, folder, progress)
        except Interrupted:
            return STOPPED
        except UserError as error:
            return str(error)
    return None


def progress_of(folder: Path) -> float:
    """Return the share of its steps that a job has made."""
    logged = read_rows(folder)
    return logged[-1]["step"] / logged[-1]["total_steps"] if logged else 0.0


def result_of(folder: Path) -> Done | None:
    """Return what came out of a job, None while it isn't done."""
    logged = read_rows(folder)
    if not logged or logged[-1]["step"] != logged[-1]["total_steps"] or "val_bits_per_byte" not in logged[-1]:
        return None
    last = logged[-1]
    curve = [(r["tokens"], r["seconds"], r["val_bits_per_byte"]) for r in logged if "val_bits_per_byte" in r]
    return Done(last["tokens"], last["seconds"], last["val_bits_per_byte"], curve)


def drop_checkpoints(folder: Path) -> None:
    """Remove a finished job's weights; what it has measured stays."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
