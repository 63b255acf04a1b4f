"""What a run measures about itself: metrics.jsonl, expert load, memory, and the machine's matrix rate for MFU."""

import json
import math
import os
import re
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelet.moe import RouterStats
from moelet.storage.disk import sync, sync_folder, write_file
from moelet.storage.intake import lines_inside

METRICS_FILE = "metrics.jsonl"
NO_ROW = (ValueError, TypeError, KeyError, OverflowError, RecursionError)  # of what a crash cut, or somebody changed
RATE_SIZE = {"cpu": 1024, "cuda": 8192}  # square products large enough to reach the device's own rate
RATE_SECONDS = 0.3


def metrics_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def append_metrics(run: Path, *rows: dict[str, Any]) -> None:
    """Append JSON objects as a line each; a crash can cut only the last line, and a full disk leaves none of them."""
    with open(run / METRICS_FILE, "ab") as file:
        before = file.tell()
        try:
            file.write(metrics_lines(rows))
            file.flush()
        except OSError:
            with suppress(OSError):
                os.ftruncate(file.fileno(), before)
            raise


def sync_metrics(run: Path) -> None:
    """Have the lines written so far on the disk before returning: a checkpoint must not outlive them."""
    if (run / METRICS_FILE).exists():
        with open(run / METRICS_FILE, "rb") as file:
            sync(file.fileno())
        sync_folder(run)


def cut_metrics(run: Path, step: int) -> None:
    """Drop the lines after `step`, and any that a crash cut short or that no report could use, so that a resumed run
    writes them anew."""
    path, kept = run / METRICS_FILE, []
    if not path.exists():
        return
    for line in lines_inside(run, METRICS_FILE):
        with suppress(*NO_ROW):
            row = json.loads(line)
            if row["step"] <= step and type(row["tokens"]) in (int, float) and math.isfinite(row["tokens"]):
                kept.append(line + "\n")
    write_file(path, "".join(kept).encode())


def read_rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows there are; each that a crash cut short is left out."""
    rows = []
    for line in lines_inside(run, METRICS_FILE):
        with suppress(*NO_ROW):
            row = json.loads(line)
            if isinstance(row, dict) and "step" in row:
                rows.append(row)
    return rows


def last_elapsed(run: Path) -> float:
    """Return the `elapsed` of the last whole line, 0 where there is none."""
    last = 0.0
    for line in lines_inside(run, METRICS_FILE):
        if '"elapsed"' in line:
            with suppress(*NO_ROW):
                elapsed = float(json.loads(line)["elapsed"])
                last = elapsed if 0 <= elapsed < math.inf else last
    return last


def expert_load(stats: Sequence[RouterStats]) -> Tensor:
    """Return for each layer every expert's share of the assignments, where 1 is the fair share: (L, E)."""
    if not stats:
        return torch.zeros(0, 0)
    assignments_LE = torch.stack([layer.assignments for layer in stats])
    return assignments_LE * (assignments_LE.shape[1] / assignments_LE.sum(1, keepdim=True).clamp(min=1))


def router_health(stats: Sequence[RouterStats]) -> Tensor:
    """Return for each layer (2, L): the mean entropy of the router's probabilities, as a share of the highest possible;
    and the largest score by size, which grows before fp16 overflows.
    """
    if not stats:
        return torch.zeros(2, 0)
    highest = math.log(max(2, stats[0].probability.shape[0]))
    entropy_L = torch.stack([layer.entropy / layer.tokens.clamp(min=1) for layer in stats]) / highest
    return torch.stack([entropy_L, torch.stack([layer.largest for layer in stats])])


def peak_memory_mb(device: torch.device) -> float:
    """Return the most memory used so far, in MB of 2^20 bytes: of the device, on a CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # for getrusage, a process begins with what the one that started it had
    if status.exists() and (found := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(found[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes on macOS, KiB elsewhere


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s that square matrix products reach here, measured for RATE_SECONDS: what MFU is relative to."""
    size = RATE_SIZE[device.type]
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best, start = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - start < RATE_SECONDS:
        before = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best
