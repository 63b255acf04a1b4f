"""Builds and loads the C kernels of this folder: with the system's compiler, once for each machine and version.

A machine without a compiler computes the same with torch's operations, slower; `why_not()` says so in a sentence.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
FORMATS = {torch.float32: (), torch.bfloat16: ("-DBF16",)}
BUILD_SECONDS = 120  # a build takes 4; one that takes this long is stuck
SWITCH = "MOELET_NATIVE"  # set to 0: use torch's operations; the mathematics is the same


# constants of numbers.h and products.h
LANES = 16  # numbers that a vector holds
BLOCK = 64  # rows that are summed before blocks are
TILE_COLUMNS = 32  # a multiple of every build's


class BuildError(Exception):
    """The kernels can't be had here; the message says why."""


def _sources() -> list[Path]:
    return sorted(Path(__file__).parent.glob("*.c"))


def _machine() -> str:
    """What -march=native depends on: a home folder may be shared by different machines."""
    try:
        flags = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()} {flags}"


def _cache() -> Path:
    """The folder that keeps what was built, made if need be; where the home can't be written to, one of this user's
    own among the temporary files.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        (base / "moelet").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=base / "moelet"):
            return base / "moelet"
    except OSError:
        own = Path(tempfile.gettempdir()) / f"moelet-{os.getuid()}"
        own.mkdir(mode=0o700, exist_ok=True)
        found = own.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return own
        return Path(tempfile.mkdtemp(prefix="moelet-"))  # another user's: what it holds would be run


def _compiler() -> str:
    for name in COMPILERS:
        if path := shutil.which(name):
            return path
    raise BuildError("there is no C compiler (cc, gcc or clang)")


def build(dtype: torch.dtype) -> Path:
    """Return the path of the shared library for `dtype`, built if it isn't there yet. Raises BuildError."""
    folder = Path(__file__).parent
    compiler, flags = _compiler(), (*FLAGS, *FORMATS[dtype])
    texts = [path.read_bytes() for path in sorted(folder.glob("*.[ch]"))]
    parts = [*texts, " ".join((compiler, *flags)).encode(), _machine().encode()]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    target = _cache() / f"kernels-{digest}.so"
    if target.exists():
        return target
    partial = target.with_suffix(f".{os.getpid()}")
    command = [compiler, *flags, *map(str, _sources()), "-o", str(partial), "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        partial.unlink(missing_ok=True)
        raise BuildError(f"{compiler} can't be run: {error}") from None
    if done.returncode:
        raise BuildError(f"{compiler} fails: {(done.stderr.strip() or 'no message').splitlines()[0]}")
    with partial.open("rb") as written:
        os.fsync(written.fileno())  # half a library, after a power cut, would end the process that loads it
    os.replace(partial, target)  # two processes may build at once: either's is whole
    return target


@functools.cache
def _load(dtype: torch.dtype) -> ctypes.CDLL | str:
    """Return the library for `dtype`, or why there is none."""
    if dtype not in FORMATS:
        return f"there are none for {dtype}"
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    try:
        path = build(dtype)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # not a library: once more, from the sources
            path.unlink()
            return ctypes.CDLL(str(build(dtype)))
    except (BuildError, OSError) as error:
        return str(error)


def library(dtype: torch.dtype) -> ctypes.CDLL:
    """Return the kernels that compute in `dtype`. Call only where `usable` says so."""
    found = _load(dtype)
    assert isinstance(found, ctypes.CDLL), found
    return found


def usable(dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    """Return whether the kernels can compute in `dtype` with these: real tensors on a CPU."""
    kinds = (Tensor, torch.nn.Parameter)
    plain = all(t is None or (type(t) in kinds and t.device.type == "cpu") for t in tensors)
    return plain and why_not(dtype) is None


_OFF = ContextVar("whether kernels are switched off", default=False)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Have torch's operations do what kernels would."""
    token = _OFF.set(True)
    try:
        yield
    finally:
        _OFF.reset(token)


def why_not(dtype: torch.dtype) -> str | None:
    """Return why there are no kernels for `dtype` on this machine, None where there are."""
    if _OFF.get():
        return "they are switched off"
    found = _load(dtype)
    return found if isinstance(found, str) else None


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Return where a tensor's first number is, for a C pointer; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def threads() -> ctypes.c_int:
    """Return how many threads torch uses: the kernels use as many, of the same pool."""
    return ctypes.c_int(torch.get_num_threads())


def per_unit(dtype: torch.dtype) -> int:
    """Return how many numbers a product's step takes at once: PER_UNIT of numbers.h."""
    return 2 if dtype == torch.bfloat16 else 1


class Dropout(ctypes.Structure):
    """`dropout` of numbers.h."""

    _fields_ = (("seed", ctypes.c_uint64), ("scale", ctypes.c_float), ("limit", ctypes.c_uint32))

    @classmethod
    def draw(cls, probability: float) -> "Dropout":
        """Return dropout with a seed from torch's global generator; none is drawn where nothing is dropped."""
        if probability == 0:
            return cls(0, 1.0, 0)
        limit = min(round(probability * 2**32), 2**32 - 1)
        seed = torch.empty((), dtype=torch.int64).random_().item()
        return cls(seed, 1 / (1 - limit / 2**32), limit)
