"""Runs in processes of their own that stop where a test wants, say so, and wait to be killed or let go.

Run by its path it is a zygote: it has imported torch and run nothing, and forks for each command. The code under test
knows nothing of the places; a child puts them around the functions it is about to run.
"""

import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 120.0  # seconds for anything a child does, on a busy machine


class Place(NamedTuple):
    """Where a child is to stop: at the n-th time that it comes to a place by this name."""

    name: str
    at: int = 1


def half_written(real: Callable[..., Any], stop: Callable[[], None]) -> Callable[..., Any]:
    def write(path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        stop()
        real(path, data)

    return write


def before(real: Callable[..., Any], stop: Callable[[], None]) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        stop()
        return real(*given, **named)

    return call


def after(real: Callable[..., Any], stop: Callable[[], None]) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        result = real(*given, **named)
        stop()
        return result

    return call


def half_a_line(real: Callable[..., Any], stop: Callable[[], None]) -> Callable[..., Any]:
    def append(run: Path, *rows: Any) -> None:
        path = run / "metrics.jsonl"
        whole = path.stat().st_size if path.exists() else 0
        with open(path, "ab") as file:
            file.write(json.dumps(rows[0]).encode()[:40])
        stop()
        os.truncate(path, whole)
        real(run, *rows)

    return append


# by name: the module and the function in it, and what is put around that
PLACES: dict[str, tuple[str, str, Any]] = {
    "half of a file": ("moelet.storage.checkpoint", "write_synced", half_written),
    "behind a file": ("moelet.storage.checkpoint", "write_synced", after),
    "before reading back": ("moelet.storage.checkpoint", "verify", before),
    "before the name": ("moelet.storage.checkpoint", "sync_folder", after),
    "behind the name": ("moelet.storage.saving", "retain", before),
    "while clearing out": ("moelet.storage.manifest", "put_aside", after),
    "behind clearing out": ("moelet.storage.saving", "retain", after),
    "half a line of metrics": ("moelet.session", "append_metrics", half_a_line),
    "settings": ("moelet.train", "write_file", before),
    "step": ("moelet.session", "train_step", before),
    "micro-step": ("moelet.step", "derived_seed", before),
    "evaluation": ("moelet.evaluate", "linear_cross_entropy", before),
    "sample": ("moelet.generate", "choose", before),
    "data": ("moelet.data", "collate", before),
}


def stop_at(place: Place, here: Path, go: Path) -> None:
    """Have this process write `here` and wait for `go` when it comes to the place."""
    module = sys.modules[PLACES[place.name][0]]
    count, guard = 0, threading.Lock()

    def stop() -> None:
        nonlocal count
        with guard:
            count += 1
            reached = count == place.at
        if reached:
            here.touch()
            while not go.exists():
                time.sleep(0.002)

    name, around = PLACES[place.name][1:]
    setattr(module, name, around(getattr(module, name), stop))


class Runs:
    """Starts `moelet` commands, each in a process and a process group of its own."""

    def __init__(self, folder: Path, waiting: str = "cpu") -> None:
        """`waiting` is the device on which training waits for its checkpoints."""
        self.folder = folder
        self.out, self.here, self.go = folder / "out.txt", folder / "here", folder / "go"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, waiting],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.running: set[int] = set()
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def start(self, *commands: list[object], place: Place | None = None) -> list[int]:
        """Start the commands at once; return the numbers of their processes. Whatever a lost trial left is killed."""
        for process in self.running.copy():
            self.send(process, signal.SIGKILL)
        while self.running:
            self.wait()
        for path in (self.here, self.go):
            path.unlink(missing_ok=True)
        self.out.write_text("")
        order = {
            "commands": [[str(word) for word in command] for command in commands],
            "out": str(self.out), "place": place, "here": str(self.here), "go": str(self.go),
        }  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        started = [int(number) for number in self._line().split()]
        self.running = set(started)
        return started

    def wait(self) -> tuple[int, int, float]:
        """Return, of the next command to end, its process, its exit code or minus a signal, and the seconds it took."""
        process, code, seconds = self._line().split()
        self.running.remove(int(process))
        return int(process), int(code), float(seconds)

    @staticmethod
    def send(process: int, number: signal.Signals) -> None:
        """Send a signal to a process and to its group, unless it has ended by itself meanwhile."""
        with suppress(ProcessLookupError):
            os.killpg(process, number)

    def come_to(self) -> None:
        """Wait until a child has come to its place."""
        limit = time.monotonic() + LIMIT
        while not self.here.exists():
            assert time.monotonic() < limit, f"it never came there: {self.said()}"
            time.sleep(0.002)

    def said(self) -> str:
        return self.out.read_text(encoding="utf-8")

    def run(self, *words: object) -> None:
        self.start(list(words))
        code = self.wait()[1]
        assert code == 0, self.said()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)

    def _line(self) -> str:
        try:
            return self._lines.get(timeout=LIMIT)
        except queue.Empty:
            raise AssertionError(f"it neither ends nor says anything: {self.said()}") from None


# torch._dynamo is what torch's optimizers load in each process: two thirds of a tiny run's time
LOADED = "torch._dynamo moelet.text.hub moelet.report moelet.train moelet.metrics"


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts with `&`
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and in what nohup does
    for name in LOADED.split():
        importlib.import_module(name)
    metrics: Any = sys.modules["moelet.metrics"]
    metrics.RATE_SECONDS, metrics.RATE_SIZE["cpu"] = 0.0, 8
    session: Any = sys.modules["moelet.session"]
    session.SAMPLE_TOKENS, session.WAITING = 12, (sys.argv[1],)
    report: Any = sys.modules["moelet.report"]  # tests/test_resume.py has it drawn; here it would be most of the time
    report.write_loss_curve = report.write_report = lambda run: run / "report.html"
    os.fsync = lambda handle: None  # a killed process's writes are in the kernel; power cuts are test_power_cut's
    for line in sys.stdin:
        order = json.loads(line)
        began: dict[int, float] = {}
        for arguments in order["commands"]:
            process = os.fork()
            if process == 0:
                run_child(order, arguments)
            with suppress(ProcessLookupError, PermissionError):  # it has ended or has done so itself
                os.setpgid(process, process)  # before anybody can send it a signal
            began[process] = time.monotonic()
        print(*began, flush=True)
        for _ in range(len(began)):
            process, status = os.wait()
            seconds = time.monotonic() - began[process]
            print(process, os.waitstatus_to_exitcode(status), seconds, flush=True)


def run_child(order: dict[str, Any], arguments: list[str]) -> None:
    import moelet.cli

    os.setpgid(0, 0)  # whichever of the two processes comes first
    out = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2), os.close(0)
    try:
        if order["place"]:
            stop_at(Place(*order["place"]), Path(order["here"]), Path(order["go"]))
        code = moelet.cli.main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
