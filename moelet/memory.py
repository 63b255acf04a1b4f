"""How much memory this machine has left for a process."""

from collections.abc import Iterator
from pathlib import Path

from moelet.errors import UserError

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
    return max(0, min([machine, *_left_in_groups(root)]))


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
    return {words[0]: int(words[1]) for line in path.read_text().splitlines() if len(words := line.split()) > 1}
