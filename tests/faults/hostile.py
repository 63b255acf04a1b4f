"""What a stranger can do to a file, and children with limits in which it is then loaded.

The victim, victims.py, is asked for a kind of file, a folder and seeds. It loads the folder's copy once for each seed,
mutated by it, and prints `SEED survived` or what went wrong. Its children are forked from a process that has imported
everything and run nothing, a few dozen trials each; a child that dies takes one trial with it.
"""

import atexit
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BATCH = 50  # trials of one child
CPU_SECONDS = 2.0  # of a trial
PATIENCE = 60  # seconds of it by the clock, on a busy machine
MEMORY = 200 * 2**20  # bytes of a trial, besides the file's own
ADDRESSES = 8 * 2**30  # bytes; torch maps gigabytes of libraries
CANARY = 4711.0625  # stands in all tensors of a file outside of the folder, and nowhere else

NUMBERS = (
    0,
    -1,
    1,
    3,
    255,
    2**31,
    2**32 - 1,
    2**53,
    2**63,
    2**64,
    10**30,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
)
VALUES = (
    *NUMBERS,
    True,
    None,
    "",
    "x" * 5000,
    "../x",
    "/etc/passwd",
    "\0",
    "\ud800",
    [],
    [1],
    {},
    {"a": 1},
    [[[]]] * 9,
)


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """Flip, cut, double, overwrite, or lengthen; mostly near the beginning, where the sizes stand."""
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        if not data:
            return b"\0"
        at = chance.randrange(min(len(data), 4000) if chance.random() < 0.7 else len(data))
        kind = chance.randrange(7)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + data[at : at + chance.randrange(1, 200)] + data[at:]
        elif kind == 2:
            data = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        elif kind == 3:
            data = data[:at] + chance.randbytes(chance.randrange(1, 12)) + data[at + 8 :]
        elif kind == 4:
            width = chance.choice([1, 4, 8])
            data = data[:at] + chance.choice([b"\xff", b"\0", b"\x7f"]) * width + data[at + width :]
        elif kind == 5:
            data = data + chance.randbytes(chance.randrange(1, 64))
        else:
            size = chance.choice([0, 1, len(data) - 8, len(data), 2**31, 2**63, 2**64 - 1, 10**8])
            data = max(0, size).to_bytes(8, "little") + data[8:]
    return data


def mutate_json(data: bytes, chance: random.Random) -> bytes:
    """Change values, take keys out, name keys twice, nest deeply."""
    tree = json.loads(data)
    for _ in range(chance.choice([1, 1, 2, 4])):
        owner, key = _place(tree, chance)
        if owner is None:
            continue
        kind = chance.randrange(6)
        if kind == 0 and isinstance(owner, dict):
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[chance.choice(["../x", "", "__proto__", "a" * 3000, f"{key}2"])] = owner[key]
        elif kind == 2 and isinstance(owner[key], int | float) and not isinstance(owner[key], bool):
            owner[key] = owner[key] * chance.choice([-1, 2, 1000, 10**9]) + chance.choice([-1, 1])
        else:
            owner[key] = chance.choice(VALUES)
    text = json.dumps(tree)
    if chance.random() < 0.08:
        at = text.find("{") + 1
        text = text[:at] + text[at : text.find(",", at) + 1] + text[at:]  # the first key twice, if it has a plain value
    if chance.random() < 0.05:
        depth = chance.choice([100, 10_000, 200_000])
        text = text.replace("1", chance.choice("[{") * depth, 1)
    return text.encode()


def _place(tree: Any, chance: random.Random) -> tuple[Any, Any]:
    """Return a container within the tree and a key of it, any."""
    owner, key = None, None
    while isinstance(tree, dict | list) and tree:
        owner = tree
        key = chance.choice(list(tree)) if isinstance(tree, dict) else chance.randrange(len(tree))
        tree = tree[key]
        if chance.random() < 0.25:
            break
    return owner, key


def mutate_tensors(data: bytes, chance: random.Random) -> bytes:
    """Say other shapes, formats and places in the header, and keep the rest."""
    length = int.from_bytes(data[:8], "little")
    header, body = mutate_json(data[8 : 8 + length], chance), data[8 + length :]
    if chance.random() < 0.3:
        tree = json.loads(data[8 : 8 + length])
        name, other = chance.choice(list(tree)), chance.choice(list(tree))
        if isinstance(tree[other], dict) and "shape" in tree[other]:
            tree[name] = {
                **tree[other],
                "shape": chance.choice([tree[other]["shape"][::-1], [2**40, 2**40], [0], [-1, -1]]),
            }
        header = json.dumps(tree).encode()
    if chance.random() < 0.2:
        body = body[: chance.randrange(len(body) + 1)]
    return len(header).to_bytes(8, "little") + header + body


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def mutate_tokenizer(data: bytes, chance: random.Random) -> bytes:
    """Add maps of characters, pieces and settings that aren't what they seem."""
    size = chance.choice([0, 4, 100, 1024, 2**31, 2**32 - 1]).to_bytes(4, "little")
    piece = _field(1, chance.randbytes(chance.randrange(9))) + b"\x15" + chance.randbytes(4) + b"\x18"
    return data + chance.choice(
        [
            _field(3, _field(1, b"x") + _field(2, size + chance.randbytes(chance.choice([0, 8, 1024])))),
            _field(5, _field(2, chance.randbytes(chance.randrange(200)))),
            _field(1, piece + bytes([chance.randrange(8)])) * chance.choice([1, 1, 3000]),
            _field(
                2, _varint(chance.choice([3, 4, 24, 35, 40, 41, 42, 43]) << 3) + _varint(chance.choice([0, 5, 2**63]))
            ),
            _field(4, chance.randbytes(50)),
        ]
    )


def special(path: Path, outside: Path, chance: random.Random) -> str:
    """Put something in the place of a file that is no file, or not there; return what."""
    what = chance.choice(
        ["gone", "link", "folder", "pipe", "device", "hard link", "sparse", "empty", "link in", "loop"]
    )
    content = path.read_bytes()
    path.unlink()
    if what == "link":
        path.symlink_to(os.path.relpath(outside, path.parent) if chance.random() < 0.5 else outside)
    elif what == "link in":
        path.with_name("real").write_bytes(content)
        path.symlink_to("real")
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        try:
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            path.symlink_to("/dev/zero")
    elif what == "hard link":
        os.link(outside, path)
    elif what == "sparse":
        with path.open("wb") as file:
            file.write(content[: chance.choice([0, 8, len(content)])])
            file.truncate(2**40)
    elif what == "empty":
        path.write_bytes(b"")
    return what


def mutate_file(path: Path, outside: Path, chance: random.Random) -> str:
    """Change a file as a stranger might; return how."""
    if chance.random() < 0.08:
        return special(path, outside, chance)
    own: dict[str, Callable[[bytes, random.Random], bytes]] = {
        ".json": mutate_json, ".safetensors": mutate_tensors, ".model": mutate_tokenizer,
    }  # fmt: skip
    change = own.get(path.suffix, mutate_bytes) if chance.random() < 0.7 else mutate_bytes
    path.write_bytes(change(path.read_bytes(), chance))
    return change.__name__


# --- the victim's side ---


def attempt(work: Callable[[], None], size: Callable[[], int]) -> str:
    """Return "survived" where the work ends well, or in a UserError, within its time and memory."""
    from moelet.errors import UserError

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started, words = _memory("VmRSS:"), time.process_time(), ""
    try:
        work()
    except UserError as error:
        words = str(error)
    except BaseException as error:
        import traceback

        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:200]!r}"
    took, grew = time.process_time() - started, _memory("VmHWM:") - before
    if took > CPU_SECONDS:
        return f"took {took:.1f} s of the processor ({words[:80]!r})"
    if grew > MEMORY + size():
        return f"took {grew / 2**20:.0f} MiB of memory ({words[:80]!r})"
    return "survived"


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


def serve(seeds: Sequence[int], trial: Callable[[int], str], limited: bool = True) -> None:
    """Make the trials of all seeds in children, a batch each, and print what became of each."""
    at = 0
    while at < len(seeds):
        batch = seeds[at : at + BATCH]
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _child(batch, trial, writer, limited)
        os.close(writer)
        with os.fdopen(reader, encoding="utf-8", errors="replace") as answers:
            lines = answers.read().splitlines()
        _, status = os.waitpid(pid, 0)
        for line in lines:
            print(line, flush=True)
        at += len(lines)
        if len(lines) < len(batch):  # the child died in this one
            print(batch[len(lines)], f"ended with {os.waitstatus_to_exitcode(status)}", flush=True)
            at += 1


def _child(seeds: Sequence[int], trial: Callable[[int], str], writer: int, limited: bool) -> None:
    if limited:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for seed in seeds:
        signal.alarm(PATIENCE)  # kills the child that waits for what never comes
        limit = int(time.process_time() + 3 * CPU_SECONDS) + 1
        if limited:
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            how = trial(seed)
        except BaseException as error:
            how = f"the test itself: {type(error).__name__}: {error}"
        os.write(writer, f"{seed} {how}".replace("\n", " ").encode(errors="replace") + b"\n")
    os._exit(0)


class Victim:
    """The process that everything is loaded in: one for all tests, since it takes seconds to begin."""

    process: subprocess.Popen[str] | None = None

    @classmethod
    def begin(cls) -> subprocess.Popen[str]:
        if cls.process is None or cls.process.poll() is not None:
            tests = Path(__file__).parents[1]
            places = os.environ | {"PYTHONPATH": f"{tests.parent}:{tests}", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, str(Path(__file__).with_name("victims.py"))]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": places}
            cls.process = subprocess.Popen(command, **pipes)
            atexit.register(cls.process.kill)
        return cls.process


def ask(kind: str, folder: Path, seeds: Sequence[int]) -> dict[int, str]:
    """Return what became of each seed."""
    victim = Victim.begin()
    assert victim.stdin is not None and victim.stdout is not None
    patience = threading.Timer(120 + 6 * len(seeds), victim.kill)
    patience.start()
    told: dict[str, str] = {}
    try:
        victim.stdin.write(json.dumps([kind, str(folder), list(seeds)]) + "\n")
        victim.stdin.flush()
        while (line := victim.stdout.readline().rstrip("\n")) not in ("", "done"):
            told |= [line.split(" ", 1)]
    finally:
        patience.cancel()
    return {seed: told.get(str(seed), "no answer: the victim is gone") for seed in seeds}


def fresh(folder: Path, place: Path) -> Path:
    """Return a copy of the folder to be spoilt, in place of the one before."""
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(folder, place))
