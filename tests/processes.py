"""Runs in processes of their own that tests may kill, and what two runs must have in common to be the same.

Processes come from a zygote: one process that has imported torch and run nothing, and forks for each command.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# what measures the machine and not the run
MEASURED = {"seconds", "elapsed", "data_wait", "tokens_per_second", "mfu", "memory_mb"}

ZYGOTE = """
import json, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts with `&`
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and in what nohup does
import matplotlib.backends.backend_agg, matplotlib.figure
import torch._dynamo  # which torch's optimizers load in each process: most of a tiny run's time
import moelet.cli, moelet.evaluate, moelet.text.hub, moelet.report, moelet.train
from moelet import metrics
metrics.RATE_SECONDS, metrics.RATE_SIZE["cpu"] = 0.0, 8
moelet.text.hub.FIRST_PAUSE = 0.05
if "HF_ENDPOINT" in os.environ:  # once for all, instead of in each
    import datasets
os.fsync = lambda handle: None  # a killed process's writes are in the kernel already; power cuts are test_checkpoint's
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        out = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2), os.close(0)
        try:
            code = moelet.cli.main(order["arguments"])
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Zygote:
    """Runs `moelet` commands, one at a time, each in a process of its own."""

    def __init__(self, out: Path, variables: Mapping[str, str] | None = None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", **(variables or {})}
        self.out = out
        self.process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parent.parent,
        )

    def start(self, *arguments: object) -> int:
        """Start a command; return the number of its process."""
        self.out.write_text("")
        order = {"arguments": [str(argument) for argument in arguments], "out": str(self.out)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """Return the exit code of the command, or minus the signal that ended it."""
        return int(self._line())

    def said(self) -> str:
        return self.out.read_text(encoding="utf-8")

    def run(self, *arguments: object) -> None:
        self.start(*arguments)
        code = self.wait()
        assert code == 0, self.said()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


def rows(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, without what depends on the clock."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


def last_step(run: Path) -> int:
    found = rows(run)
    return found[-1]["step"] if found else 0


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-????????"))


def digests(run: Path) -> dict[str, str]:
    names = ("model.safetensors", "optimizer.safetensors")
    return {name: hashlib.sha256((newest(run) / name).read_bytes()).hexdigest() for name in names}


def assert_same_run(run: Path, uninterrupted: Path) -> None:
    found, expected = rows(run), rows(uninterrupted)
    for one, other in zip(found, expected, strict=False):
        assert one == other, f"step {one['step']}"
    assert len(found) == len(expected)
    assert newest(run).name == newest(uninterrupted).name
    assert digests(run) == digests(uninterrupted)


def wait_for_step(run: Path, step: int, pid: int) -> None:
    limit = time.monotonic() + 60
    while last_step(run) < step:
        assert time.monotonic() < limit, f"step {step} never came"
        if not Path(f"/proc/{pid}/stat").exists():
            return
        time.sleep(0.001)


def kill_and_resume(
    zygote: Zygote, settings: Path, run: Path, kills: Sequence[int], every: int, draw: random.Random
) -> None:
    """Train to the end, killed once at each of the steps `kills` or a little later; saved every so many steps."""
    resumed_at = 0
    for number, step in enumerate(kills):
        pid = zygote.start("train", *(["--resume", run] if number else [settings, "--run", run]))
        wait_for_step(run, step, pid)
        time.sleep(draw.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        assert zygote.wait() == -signal.SIGKILL, zygote.said()
        reached = max(last_step(run), resumed_at)
        resumed_at = max([0, *(int(path.name[5:]) for path in (run / "checkpoints").glob("step-????????"))])
        assert reached - resumed_at <= every, "more than a save interval is lost"
    zygote.run("train", "--resume", run)
