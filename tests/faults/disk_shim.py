"""A file system that fails, stops or remembers: what the code under test calls to change the disk goes through here.

`Shim` counts the calls of each kind and does something at the k-th; `Recorder` writes an op log, from which `rebuild`
makes the folders that a power cut could leave. Both patch Python's own functions, so no code under test knows.
"""

import builtins
import io
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ON_FILES = ("open", "write")
KINDS = (*ON_FILES, "fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


class ShimFile:
    """A file opened for writing, each of whose writes is a call that the shim sees."""

    def __init__(self, file: Any, shim: "Shim") -> None:
        self._file, self._shim = file, shim

    def __enter__(self) -> "ShimFile":
        return self

    def __exit__(self, *about: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._shim.call("write", Path(os.fsdecode(self._file.name)), half, data)
        written: int = self._file.write(data)
        return written


class Shim:
    """Sees every call that changes something below `root`. `act` is called for the calls whose number is in `at`, after
    half of the data if it is a write; what it raises is what the call raises."""

    def __init__(
        self, root: Path, kinds: tuple[str, ...] = KINDS, at: Callable[[int], bool] = bool, act: Any = None
    ) -> None:
        self.root, self.kinds, self.at, self.act, self.count = root.resolve(), kinds, at, act, 0

    def call(self, kind: str, path: Path, half: Callable[[], None] = lambda: None, *details: Any) -> None:
        if kind not in self.kinds or not path.is_relative_to(self.root):
            return
        self.count += 1
        if self.act is not None and self.at(self.count):
            half()
            self.act()

    def done(self, kind: str, path: Path, *details: Any) -> None:
        """The call was made, and did not fail."""


def _place(path: Any, folder: int | None = None) -> Path:
    """Return the whole path that a call means; a number is an open file's."""
    if isinstance(path, int):
        return Path(os.readlink(f"/proc/self/fd/{path}"))
    base = Path.cwd() if folder is None else Path(os.readlink(f"/proc/self/fd/{folder}"))
    return base / os.fsdecode(path)


@contextmanager
def through(shim: Shim) -> Iterator[Shim]:
    """Have all calls that change the disk go through the shim."""
    real_open, real = builtins.open, {kind: getattr(os, kind) for kind in KINDS if kind not in ON_FILES}

    def open_file(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return real_open(file, mode, *rest, **named)
        path = _place(file)
        shim.call("open", path)
        opened = real_open(file, mode, *rest, **named)
        shim.done("open", path, "w" in mode)
        return ShimFile(opened, shim)

    def seen(kind: str) -> Callable[..., Any]:
        def call(path: Any, *given: Any, **named: Any) -> Any:
            where = _place(path, named.get("dir_fd", named.get("src_dir_fd")))
            more = [_place(given[0])] if kind in ("rename", "replace") else []
            shim.call(kind, where, lambda: None, *more)
            result = real[kind](path, *given, **named)
            shim.done(kind, where, *more)
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", open_file)
        patch.setattr(io, "open", open_file)  # pathlib's
        for kind in real:
            patch.setattr(os, kind, seen(kind))
        yield shim


# power cuts


class Inode:
    """A file or folder: as processes see it, and as it is on the disk."""

    def __init__(self, folder: bool) -> None:
        self.folder = folder
        self.now: Any = {} if folder else b""
        self.disk: Any = {} if folder else None  # a file that was never synced has nothing there

    def sync(self) -> None:
        self.disk = dict(self.now) if self.folder else self.now


class Recorder(Shim):
    """Keeps what is on the disk and what isn't yet, and after each call hands itself to `cut`."""

    def __init__(self, root: Path, cut: Callable[["Recorder"], None]) -> None:
        super().__init__(root)
        self.cut = cut
        self.log: list[tuple[str, Path]] = []
        self.top = self._read(self.root)

    def _read(self, path: Path) -> Inode:
        """Return what there is before the first call, all of it on the disk."""
        node = Inode(path.is_dir())
        node.now = {child.name: self._read(child) for child in path.iterdir()} if node.folder else path.read_bytes()
        node.sync()
        return node

    def _find(self, path: Path) -> Inode:
        node = self.top
        for name in path.relative_to(self.root).parts:
            node = node.now[name]
        return node

    def call(self, kind: str, path: Path, half: Callable[[], None] = lambda: None, *details: Any) -> None:
        if kind == "write" and path.is_relative_to(self.root):
            self.done(kind, path, *details)

    def done(self, kind: str, path: Path, *details: Any) -> None:
        if not path.is_relative_to(self.root):
            return
        self.log.append((kind, path.relative_to(self.root)))
        if kind == "fsync":
            self._find(path).sync()
        elif path != self.root:
            self._change(kind, path, *details)
        self.cut(self)

    def _change(self, kind: str, path: Path, *details: Any) -> None:
        names = self._find(path.parent).now
        if kind == "open":
            if path.name not in names:
                names[path.name] = Inode(False)
            elif details[0]:
                names[path.name].now = b""
        elif kind == "mkdir":
            names[path.name] = Inode(True)
        elif kind == "write":
            names[path.name].now += bytes(details[0])
        elif kind in ("unlink", "rmdir"):
            del names[path.name]
        elif kind in ("rename", "replace"):
            self._find(details[0].parent).now[details[0].name] = names.pop(path.name)


def rebuild(recorder: Recorder, target: Path, how: str, draw: random.Random) -> None:
    """Write what a power cut leaves: of what was not synced `nothing`, names with `empty` or `half` files, `all` of it,
    or for each file and folder a `mix` of these."""

    def write(node: Inode, path: Path) -> None:
        way = draw.choice(["nothing", "empty", "half", "all"]) if how == "mix" else how
        if node.folder:
            path.mkdir()
            for name, child in (node.disk if way == "nothing" else node.now).items():
                write(child, path / name)
            return
        if way == "all" or node.now == node.disk:
            path.write_bytes(node.now)
        elif way == "nothing":
            path.write_bytes(node.disk or b"")
        else:
            path.write_bytes(b"" if way == "empty" else node.now[: len(node.now) // 2])

    write(recorder.top, target)
