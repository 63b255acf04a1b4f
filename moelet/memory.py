"""How much memory this machine has left for a process, and which errors say that there was too little."""

import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from moelet.errors import UserError

# of a CPU's allocator and of oneDNN's, which have no exception of their own
SHORTAGE_WORDS = ("can't allocate memory", "DefaultCPUAllocator", "could not allocate memory", "out of memory")

# of control groups, versions 2 and 1: where they are mounted, and the files with limit, use, and the part of the use
# that is pages of files, which the kernel gives up when it needs them
GROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process can still take: what the machine or, if less, a control group has left.

    Raises UserError where the system doesn't say.
    """
    try:
        machine = _entries(root / "proc/meminfo")["MemAvailable:"] * 1024
    except (OSError, KeyError):
        raise UserError(
            'train.batch_size is "auto", and this system does not say how much memory is free. Say what training may '
            "use: set train.memory_limit_gb, such as 8."
        ) from None
    return max(0, min([machine, *_left_in_groups(root), *_left_of_addresses(root)]))


def require_memory(n_bytes: int, what: str) -> None:
    """Raise UserError where `what` takes more memory than is free, so that nobody tries; nothing where none can say."""
    try:
        free = free_memory()
    except UserError:
        return
    if n_bytes > free:
        raise UserError(
            f"{what} takes {n_bytes / 2**30:,.1f} GiB of memory, and {free / 2**30:,.1f} are free. Make it smaller, or "
            "use a larger machine."
        )


def _left_of_addresses(root: Path) -> Iterator[int]:
    """Yield what is left of the address space that this process may have, where `ulimit -v` limits it."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        yield limit - _entries(root / "proc/self/status").get("VmSize:", 0) * 1024


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield what is left in each control group that this process is in, up to the outermost."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, kind, path = line.split(":", 2)  # 0::/a/b in version 2, 4:memory:/a/b in version 1
        if kind not in GROUPS:
            continue
        place, limit, used, cached = GROUPS[kind]
        mounted = root / place
        inner = mounted / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if (folder / limit).exists() and (value := (folder / limit).read_text().strip()) != "max":
                yield int(value) - int((folder / used).read_text()) + _entries(folder / "memory.stat").get(cached, 0)
            if folder == mounted:
                break


def _entries(path: Path) -> dict[str, int]:
    """Return the numbers in a file of lines such as `MemAvailable:  1234 kB`."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def is_shortage(error: BaseException) -> bool:
    """Return whether the error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SHORTAGE_WORDS)


def told(error: Exception) -> str:
    """Return what a person is told of an error that says that memory ran out; raise any other again."""
    if not is_shortage(error):
        raise error
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"memory ran out ({reason}). This needs more than is free. End what else uses it, or use a smaller model or "
        "less text at a time."
    )
