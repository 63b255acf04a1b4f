"""Sides at work, each in a process of its own, in turn with ours.

A process's peak memory never falls, so every side gets a fresh one. In each round our step is followed by the other's,
the other processes asleep: a ratio is of two steps made within seconds of each other, on one machine, with one number
of threads. What the sides are is `peers`'.
"""

import multiprocessing
import resource
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

from moelet.allocator import keep_freed_memory
from moelet.console import Progress
from moelet.metrics import peak_memory_mb
from moelet.precision import choose_device
from moelet.speed.peers import Maker, Side, Workload, decoder, trainer

MEMORY_SHARE = 0.5  # of the free memory that one side may take: it fails alone, instead of everybody being killed
TRIALS = 2  # of a precision: one that is disturbed alone would choose the slower
LONGEST_REASON = 160  # characters
MAKERS: dict[str, Callable[[str], Maker]] = {"train": trainer, "decode": decoder}
CONTEXT = multiprocessing.get_context("spawn")


class Job(NamedTuple):
    """What a process is started with."""

    kind: str  # "train" or "decode"
    variant: str
    precision: str
    allocator: str  # "kept": freed memory stays in the process, as in our own commands; "default": the system's way
    workload: Workload


class SideFailed(Exception):
    """A side can't do its work on this machine; the message says why."""


def limit_memory(device: torch.device) -> None:
    """Make this process's allocations fail where they would take more than MEMORY_SHARE of what is free."""
    meminfo = Path("/proc/meminfo")
    if device.type == "cuda" or not meminfo.exists():
        return
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    allowed = int(int(fields["MemAvailable"].split()[0]) * 1024 * MEMORY_SHARE)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))


def _timed(side: Side, device: torch.device) -> tuple[float, int]:
    began = time.perf_counter()
    tokens = side.work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, tokens


def serve(pipe: Connection, job: Job) -> None:
    """Make the side and have it work once, and again whenever the parent asks; at its last word, say the peak."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    if job.allocator == "kept":
        keep_freed_memory()
    device = choose_device(job.workload.hparams.train.device)
    limit_memory(device)
    try:
        side = MAKERS[job.kind](job.variant)(job.workload, job.precision)
        _timed(side, device)
        pipe.send(side.flops_per_token)
        while pipe.recv():
            pipe.send(_timed(side, device))
        pipe.send(peak_memory_mb(device))
    except EOFError:  # the parent is gone
        return
    except Exception as error:  # whatever ails a side is a result to report
        pipe.send(SideFailed(_reason(error)))


def _reason(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


class Worker:
    """A side at work in a process of its own. Raises SideFailed where it can't work; its process is ended at exit."""

    def __init__(self, job: Job) -> None:
        self.job, self.seconds, self.tokens = job, list[float](), 0
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=serve, args=(theirs, job), daemon=True)
        began = time.perf_counter()
        self.process.start()
        theirs.close()  # or the end of a child that dies would never be seen
        try:
            self.flops_per_token: int = self._receive()
        except BaseException:
            self.close()
            raise
        self.seconds_to_first_step = time.perf_counter() - began

    def _receive(self) -> Any:
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise SideFailed(f"its process ended with code {self.process.exitcode}") from None
        if isinstance(answer, SideFailed):
            raise answer
        return answer

    def _ask(self, more: bool) -> Any:
        try:
            self.pipe.send(more)
        except OSError:
            pass  # it is dead, and receiving says so
        return self._receive()

    def work(self) -> None:
        seconds, self.tokens = self._ask(True)
        self.seconds.append(seconds)

    def peak_memory_mb(self) -> float:
        """Return the most memory it ever used; it works no more."""
        return self._ask(False)

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `function` returns in a process of its own; raise SideFailed where that dies."""
    with ProcessPoolExecutor(1, CONTEXT, initializer=keep_freed_memory) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise SideFailed("its process was killed") from None


def try_precisions(kind: str, variant: str, formats: Sequence[str], workload: Workload) -> dict[str, Any]:
    """Return the least seconds that work took in each precision after a first time, or why there were none."""
    device = choose_device(workload.hparams.train.device)
    limit_memory(device)

    def least(precision: str) -> float | str:
        try:
            side = MAKERS[kind](variant)(workload, precision)
            _timed(side, device)
            return min(_timed(side, device)[0] for _ in range(TRIALS))
        except Exception as error:  # whatever ails a side is a result to report
            return _reason(error)

    return {precision: least(precision) for precision in formats}


def fastest(tried: dict[str, Any]) -> str:
    """Return the precision that took least time; raise SideFailed where none ran."""
    ran = {precision: result for precision, result in tried.items() if isinstance(result, float)}
    if not ran:
        reasons = dict.fromkeys(tried.values())
        raise SideFailed("; ".join(reasons))
    return min(ran, key=ran.__getitem__)


def speedup(ours: Sequence[float], theirs: Sequence[float], our_tokens: int = 1, their_tokens: int = 1) -> float:
    """Return our tokens a second over theirs: the median of the rounds' ratios, each of two neighbours in time."""
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    return statistics.median(ratios) * our_tokens / their_tokens


def row(worker: Worker, ratio: float | None) -> dict[str, Any]:
    """Return the figures of a side whose rounds are over."""
    rate = worker.tokens / statistics.median(worker.seconds)
    return {
        "variant": worker.job.variant,
        "allocator": worker.job.allocator,
        "precision": worker.job.precision,
        "tokens_per_second": rate,
        "speedup": ratio,
        "peak_memory_mb": worker.peak_memory_mb(),
        "flops_per_token": worker.flops_per_token,
        "seconds_to_first_step": worker.seconds_to_first_step,
        "seconds": worker.seconds,
    }


def compare(ours: Worker, job: Job, rounds: int) -> dict[str, Any]:
    """Return the row of one side: our work and its work in turn, `rounds` times."""
    before = len(ours.seconds)
    with Worker(job) as worker:
        for _ in range(rounds):
            ours.work()
            worker.work()
        ratio = speedup(ours.seconds[before:], worker.seconds, ours.tokens, worker.tokens)
        return row(worker, ratio)


class Contest(NamedTuple):
    """Who is compared with us at one kind of work."""

    kind: str
    our_precision: str
    others: Mapping[str, tuple[Sequence[str], Sequence[str]]]  # variant: precisions to choose from, allocators
    rounds: int


def run_contest(contest: Contest, workload: Workload, progress: Progress) -> dict[str, Any]:
    """Return the rows, ours first, the sides that failed with the reason, and the seconds of the precisions tried."""
    kind, rows, failed, tried = contest.kind, list[dict[str, Any]](), dict[str, str](), dict[str, Any]()
    with Worker(Job(kind, "moelet", contest.our_precision, "kept", workload)) as ours:
        for variant, (formats, allocators) in contest.others.items():
            try:
                precision = formats[0]
                if len(formats) > 1:
                    progress.say(f"{kind}: {variant}, which is fastest of {', '.join(formats)}")
                    tried[variant] = alone(try_precisions, kind, variant, formats, workload)
                    precision = fastest(tried[variant])
                for allocator in allocators:
                    job = Job(kind, variant, precision, allocator, workload)
                    rows.append(compare(ours, job, contest.rounds))
                    progress.say(f"{kind}: {told(rows[-1])}")
            except SideFailed as error:
                failed[variant] = str(error)
                progress.say(f"{kind}: {variant} doesn't run: {error}")
        if not ours.seconds:  # nobody to compare with
            for _ in range(contest.rounds):
                ours.work()
        return {"rows": [row(ours, None), *rows], "failed": failed, "precisions": tried}


def told(row: dict[str, Any]) -> str:
    """Return a row in words."""
    side = f"{row['variant']}, {row['precision']}, {row['allocator']} allocator"
    return f"{side}: {row['tokens_per_second']:,.0f} tokens/s; moelet is {row['speedup']:.2f} times as fast"
