"""Several ranks of a run, each a process of its own, as torchrun starts them; but when one dies, the others live on.

Processes come from a zygote, as in `processes`: one that has imported torch and run nothing.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

ZYGOTE = """
import json, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import matplotlib.backends.backend_agg, matplotlib.figure
import torch._dynamo, torch.distributed.fsdp, torch.distributed.device_mesh, torch.distributed.tensor
import moelet.cli, moelet.follow, moelet.report, moelet.train
import rank_jobs
from moelet import metrics
from moelet.parallel import watch
metrics.RATE_SECONDS, metrics.RATE_SIZE["cpu"] = 0.0, 8
os.fsync = lambda handle: None
for line in sys.stdin:
    order = json.loads(line)
    pids = []
    for rank in range(order["size"]):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.setpgid(0, 0)
            out = os.open(order["out"] + f".{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2), os.close(0)
            size = str(order["size"])
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(order["port"])}
            watch.SILENT_SECONDS = order["silent"]
            try:
                code = rank_jobs.work(order["job"], order["arguments"])
            except BaseException:
                import traceback
                traceback.print_exc()
                code = 1
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(json.dumps(pids), flush=True)
    codes = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        print(json.dumps([pid, codes[pid]]), flush=True)
"""


class Crew:
    """Starts the ranks of one job after the other."""

    def __init__(self, out: Path, silent: float = 15.0) -> None:
        """`out` is where ranks write what they say; `silent` when a rank without a sign of life is lost, in seconds."""
        self.out, self.silent, self.size = out, silent, 0
        here = Path(__file__).parent
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONPATH": f"{here}:{here.parent}"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=here.parent,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *given: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)

    def start(self, size: int, job: str, *arguments: Any) -> list[int]:
        """Start `size` ranks that each do a job of `rank_jobs`; return their processes."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        order = {"size": size, "job": job, "port": port, "out": str(self.out), "silent": self.silent}
        order["arguments"] = [str(item) if isinstance(item, Path) else item for item in arguments]
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        self.size = size
        pids: list[int] = self._heard()
        self.pids = pids
        return pids

    def wait(self) -> list[int]:
        """Return the exit code of each rank, or minus the signal that ended it."""
        codes = dict(self._heard() for _ in range(self.size))
        return [codes[pid] for pid in self.pids]

    def wait_for(self, pids: list[int], seconds: float) -> bool:
        """Return whether these ranks have ended by then."""
        limit = time.monotonic() + seconds
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            if time.monotonic() > limit:
                return False
            time.sleep(0.05)
        return True

    def kill(self, pid: int) -> None:
        """End a rank, if it hasn't ended; one that is stopped, too."""
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def run(self, size: int, job: str, *arguments: Any) -> None:
        """Have `size` ranks do a job to its end."""
        self.start(size, job, *arguments)
        codes = self.wait()
        assert codes == [0] * size, self.said()

    def train(self, size: int, *arguments: Any) -> None:
        self.run(size, "train", *arguments)

    def said(self) -> str:
        """Return what all ranks have said."""
        return "\n".join(f"rank {rank}:\n{text}" for rank, text in enumerate(self.texts()))

    def texts(self) -> list[str]:
        """Return what each rank has said."""
        return [self.out.with_name(f"{self.out.name}.{rank}").read_text("utf-8") for rank in range(self.size)]

    def _heard(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


class Ranks(NamedTuple):
    """A layout of ranks."""

    data: int
    shard: int
    expert: int

    @property
    def count(self) -> int:
        return self.data * self.shard * self.expert

    @property
    def settings(self) -> dict[str, int]:
        return self._asdict()

    @property
    def changes(self) -> list[str]:
        """What makes a command use it."""
        return [word for name, size in self._asdict().items() for word in ("--set", f"parallel.{name}={size}")]

    def __str__(self) -> str:
        return " x ".join(f"{size} {name}" for name, size in self._asdict().items() if size > 1) or "alone"


def ranks(data: int = 1, shard: int = 1, expert: int = 1) -> Ranks:
    return Ranks(data, shard, expert)
