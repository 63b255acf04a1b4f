"""Finds `train.batch_size: "auto"`: the micro-batch with the fewest micro-steps a step whose memory fits.

Steps are tried in a process of their own, on throwaway state: on a CPU the peak of a process never falls, and one that
asks for too much is killed; on a card, nothing that the search leaves behind is in the run's way. What is found becomes
a setting of the run like any other, so that it stays as it is at a resume.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch

from moelet.allocator import bound_product_caches, keep_freed_memory
from moelet.console import Progress
from moelet.data import PREFETCH_WINDOWS, START, Batch, collate, windows_of_rows
from moelet.errors import UserError
from moelet.hparams import Hparams, make_hparams
from moelet.memory import free_memory, is_shortage
from moelet.metrics import peak_memory_mb
from moelet.precision import choose_device
from moelet.state import Training, build, snapshot
from moelet.step import train_step
from moelet.storage.checkpoint import serialised
from moelet.tokenizer import Tokenizer

GIB, MIB = 2**30, 2**20
FREE_SHARE = 0.9  # of the free memory is taken where no limit is given: others use the machine, too
GAPS = 0.2  # of what steps take is lost to gaps in the heap: 16% from two steps of two micro-batches to two of ten
REST_BYTES = 64 * 2**20  # of a CPU run besides its steps and its text: threads' heaps, evaluation, the drawn report
REHEARSED = 2  # steps that a size is tried for: the heap settles in the second
STEADY = 0.1  # memory grows as it will go on to, where two doublings in a row agree on a row's within this share


class Found(NamedTuple):
    rows: int  # a micro-step; 0: not even one fits
    peaks: dict[int, float]  # what was measured on the way: rows, and the bytes that their steps took


class Rehearsal:
    """A process that makes steps of given sizes and says how much memory it needed; a context manager."""

    def __init__(self, hparams: Hparams, tokenizer_file: Path) -> None:
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moelet.fit", str(tokenizer_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # Ctrl-C is for the run; this process ends with it
        )
        self._first = json.dumps(hparams.model_dump(mode="json")) + "\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._process:
            self._process.kill()

    def peak(self, rows: int) -> float:
        """Return the most bytes that steps of up to `rows` took; infinity where there weren't as many."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{self._first}{rows}\n")
            self._process.stdin.flush()
        self._first = ""
        answer = self._process.stdout.readline()
        if answer:
            return float(answer)
        code = self._process.wait()
        if code == -signal.SIGKILL:  # by the kernel, out of memory
            return math.inf
        raise RuntimeError(f"the process that tries batch sizes ended with {code}; what it said is above")


def find_batch_size(hparams: Hparams, tokenizer: Tokenizer, tokenizer_file: Path, progress: Progress) -> Hparams:
    """Return the settings with `train.batch_size` "auto" replaced by the size found, which is said in one line.

    `tokenizer_file` is where the tokenizer is saved. Settings with a size of their own come back as they are, and where
    a step's size is given as a whole, memory counts from here on. Raises UserError when not even one row fits.
    """
    settings, began = hparams.train, time.monotonic()
    if settings.global_batch_size is None:
        return hparams
    bound_product_caches()
    if settings.batch_size != "auto":
        return hparams
    device = choose_device(settings.device)
    held = 0.0 if device.type == "cuda" else REST_BYTES + _held_by_a_run(hparams, tokenizer)
    given = settings.memory_limit_gb
    limit = FREE_SHARE * _free(device) if given is None else given * GIB
    room = (limit - held) / (1 + GAPS)
    found = largest_that_fits(lambda: Rehearsal(hparams, tokenizer_file), settings.global_batch_size, room)
    there_is = f"{limit / GIB:.2f} GB {'free' if given is None else 'given'}"
    if found.rows == 0:
        raise _too_small(there_is, held + found.peaks[1] * (1 + GAPS))
    peak = (held + found.peaks[found.rows] * (1 + GAPS)) / GIB
    tried = ", ".join(map(str, sorted(found.peaks)))
    progress.say(
        f"batch size: {found.rows} of a step's {settings.global_batch_size} rows at a time, peak {peak:.2f} GB of "
        f"{there_is}; tried {tried} in {time.monotonic() - began:.0f} s"
    )
    chosen = settings.model_copy(update={"batch_size": found.rows, "memory_limit_gb": None})
    return hparams.model_copy(update={"train": chosen})


def _too_small(there_is: str, need: float) -> UserError:
    """Return the error for memory that a step of a single row doesn't fit in."""
    needed = f"{need / GIB:.2f} GB" if need < math.inf else "more than this machine has"
    return UserError(
        f'train.batch_size is "auto" and {there_is}; a step of a single row needs {needed}. Raise '
        "train.memory_limit_gb, set train.checkpoint_activations to true, lower model.max_length or "
        "data.shuffle_window, or take a smaller model."
    )


def _free(device: torch.device) -> float:
    """Return the bytes that a run can have: on a card what is free there, on a CPU with what this process has."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return free_memory() + peak_memory_mb(device) * MIB


def _held_by_a_run(hparams: Hparams, tokenizer: Tokenizer) -> float:
    """Return the bytes that a run's process takes up besides its steps: its own peak so far, and the text it holds."""
    windows = windows_of_rows(hparams.data, tokenizer, hparams.model.max_length, hparams.train.seed, START)
    [(rows, _)] = islice(windows, 1)  # which are in the peak from here on, as is the text they were made of
    return peak_memory_mb(torch.device("cpu")) * MIB + (PREFETCH_WINDOWS + 1) * rows.nbytes


def largest_that_fits(rehearse: Callable[[], Rehearsal], most: int, room: float) -> Found:
    """Return the rows a micro-step, up to `most`, whose steps take at most `room` bytes.

    Rows are doubled until their memory grows in proportion, the largest number is read off the line through the last
    two, and a fresh process has to confirm it. Memory is the largest of several terms that are linear in rows, so where
    a try turns out too large, the line from there to one that fits lies above it, and the next is smaller.
    """
    with rehearse() as rehearsal:
        peaks = _double(rehearsal.peak, most, room)
    while rows := evenly(most, _read_off(peaks, most, room)):
        with rehearse() as rehearsal:
            peaks[rows] = rehearsal.peak(rows)
        if peaks[rows] <= room:
            break
    return Found(rows, peaks)


def _double(peak: Callable[[int], float], most: int, room: float) -> dict[int, float]:
    """Return the bytes that 1, 2, 4, ... rows take, as far as needed to know where the room ends."""
    peaks, rows, slope, steady = {1: peak(1)}, 1, 0.0, False
    while rows < most and not steady and peaks[rows] + slope * rows <= room:
        more = min(2 * rows, most)
        peaks[more] = peak(more)
        before, slope = slope, (peaks[more] - peaks[rows]) / (more - rows)
        steady = before > 0 and abs(slope - before) <= STEADY * before
        rows = more
    return peaks


def _read_off(peaks: dict[int, float], most: int, room: float) -> int:
    """Return the largest number of rows that fits by the lines between measured peaks, past the last two; 0: none."""
    too_many = min((rows for rows, peak in peaks.items() if peak > room), default=None)
    fitting = sorted(rows for rows in peaks if too_many is None or rows < too_many)
    if not fitting:
        return 0
    last = fitting[-1]
    if too_many is not None:
        share = (room - peaks[last]) / (peaks[too_many] - peaks[last])  # 0 where too many was infinite
        return min(too_many - 1, last + int((too_many - last) * (share or 0.5)))
    slope = (peaks[last] - peaks[fitting[-2]]) / (last - fitting[-2]) if len(fitting) > 1 else 0.0
    return min(most, last + int((room - peaks[last]) / slope)) if slope > 0 else most


def evenly(total: int, rows: int) -> int:
    """Return the fewest rows a micro-step that need no more micro-steps than `rows` do: 8 of 9 for a total of 30."""
    return math.ceil(total / math.ceil(total / rows)) if rows else 0


def throwaway_batch(hparams: Hparams, vocab_size: int, rows: int) -> Batch:
    """Return a batch that takes as much memory as any: random pieces, and padding, so that there is a mask."""
    draw = np.random.default_rng(rows)
    ids = draw.integers(Tokenizer.pad_id + 1, vocab_size, (rows, hparams.model.max_length + 1))
    ids[-1, -2:] = Tokenizer.pad_id
    return collate(list(ids), hparams.data.mask_documents)


def warmed_up(hparams: Hparams, tokenizer: Tokenizer) -> Training:
    """Return a run whose optimizer has its state, and whose checkpoint was once made in memory."""
    training = build(hparams, tokenizer)
    while training.step == 0:  # fp16 may skip steps until its scale fits
        train_step(training, [throwaway_batch(hparams, tokenizer.vocab_size, 1)])
    serialised(snapshot(training, {}))
    return training


def try_steps(training: Training, rows: int) -> None:
    """Make steps of two micro-batches, `rows` and what may follow: from the second on, gradients take memory, too."""
    hparams, vocab_size = training.hparams, training.tokenizer.vocab_size
    rest = min(rows, (hparams.train.global_batch_size or rows) - rows)
    sizes = [rows, rest] if rest else [rows]
    for _ in range(REHEARSED):
        train_step(training, [throwaway_batch(hparams, vocab_size, size) for size in sizes])


def main() -> None:
    """Answer each number of rows on standard input with the bytes this process has grown by at most, or with inf."""
    keep_freed_memory()
    bound_product_caches()
    with suppress(OSError):  # not on Linux, or not allowed
        Path("/proc/self/oom_score_adj").write_text("1000")  # should memory run out, this is the process to end
    hparams, tokenizer = make_hparams(json.loads(sys.stdin.readline())), Tokenizer.load(sys.argv[1])
    device, training = choose_device(hparams.train.device), None
    before = 0.0 if device.type == "cuda" else peak_memory_mb(device)
    for line in sys.stdin:
        try:
            training = training or warmed_up(hparams, tokenizer)
            try_steps(training, int(line))
            peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_memory_mb(device) * MIB
            print(peak - before * MIB, flush=True)
        except Exception as error:
            if not is_shortage(error):
                raise
            print(math.inf, flush=True)


if __name__ == "__main__":
    main()
