"""Reading ahead in a thread, and what is done when that thread dies or gets stuck.

SIGKILL can't hit a thread, only the process: that is what checkpoints are for. SIGSTOP stops the process as a whole,
its clock for silence included, and SIGCONT lets it go on as if nothing had been.
"""

import contextvars
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from time import monotonic
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from moelet.errors import TemporaryError, UserError
from moelet.text.documents import Cursor
from moelet.text.pulse import PULSE, Abandoned, Pulse

POLL_SECONDS, LEAVE_SECONDS = 0.1, 2.0  # to see a signal while waiting for data; to wait for the thread at the end
RESTARTS = 3  # of a reader, in a row
FORGIVEN = 1000  # items that come without a failure until the next one counts as the first
NAME = "moelet-data"  # of the threads
LOG = logging.getLogger("moelet")
T = TypeVar("T")
Items = Iterator[tuple[T, Cursor]]


class Stuck(Exception):
    """A reader gave no sign of life for as long as it may be silent."""


class Prefetch(Generic[T]):
    """A background thread that keeps a few items ready; the cursor that counts is that of the item handed out.

    Use as a context manager; an error in the thread is raised by the next call of `next`. Within the thread of
    another one it shares that one's pulse, and ends with it.
    """

    def __init__(self, items: Items[T], size: int) -> None:
        self._items, self._stop = items, threading.Event()
        self._outer = PULSE.get()
        self.pulse = self._outer or Pulse()
        self._queue: queue.Queue[Any] = queue.Queue(size)
        context = contextvars.copy_context()
        context.run(PULSE.set, self.pulse)
        self._thread = threading.Thread(target=context.run, args=(self._fill,), name=NAME, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abandon()
        limit = monotonic() + LEAVE_SECONDS  # a call that doesn't return may hold the thread for ever
        while self._thread.is_alive() and monotonic() < limit:
            if not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(0.05)

    def abandon(self) -> None:
        """Let the thread end at its next sign of life."""
        self._stop.set()
        if self._outer is None:
            self.pulse.abandoned = True

    def __next__(self) -> tuple[T, Cursor]:
        found = self.wait(lambda: False)
        assert found is not None
        return found

    def wait(self, enough: Callable[[], bool], patience: float | None = None) -> tuple[T, Cursor] | None:
        """Return the next item, or None as soon as `enough()` while there is none.

        Raises what the thread has raised, and Stuck after `patience` seconds of silence. A moment between two looks
        that took longer counts as one look: then this process was stopped, and the thread with it.
        """
        silent, beats, looked = 0.0, self.pulse.beats, monotonic()
        while True:
            try:
                item = self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if self._outer is not None:
                    self._outer.leave_if_abandoned()
                if enough():
                    return None
                now = monotonic()
                silent, beats, looked = self._silence(silent, beats, now - looked), self.pulse.beats, now
                if patience is not None and silent >= patience:
                    raise Stuck(f"no sign of life for {patience:g} s") from None
                continue
            if isinstance(item, BaseException):
                raise item
            found, cursor = item
            return found, cursor

    def _silence(self, silent: float, beats: int, passed: float) -> float:
        """Return the seconds without a sign of life, those that have passed since the last look included."""
        if self.pulse.beats != beats:
            return 0.0
        return silent + min(passed, 2 * POLL_SECONDS)

    def _fill(self) -> None:
        try:
            for item in self._items:
                self._queue.put(item)
                if self._stop.is_set():
                    return
            self._queue.put(StopIteration())
        except Abandoned:
            pass
        except BaseException as error:  # handed over, to be raised where the batch is missed
            self._queue.put(error)
        finally:
            getattr(self._items, "close", lambda: None)()  # ends the threads that it waits for


class Reader(Generic[T]):
    """The items of a stream, read ahead by a thread that is begun anew where it dies or gets stuck.

    It is begun with the cursor of the item handed out last, so no item is lost and none comes twice. Use as a context
    manager. What the stream says to people, UserError and TemporaryError, is passed on at once.
    """

    def __init__(self, begin: Callable[[Cursor], Items[T]], at: Cursor, size: int, patience: float) -> None:
        self._begin, self._at, self._size, self._patience = begin, at, size, patience
        self._failures = self._since = 0
        self._ahead = Prefetch(begin(at), size)

    def __enter__(self) -> Self:
        self._ahead.__enter__()
        return self

    def __exit__(self, *given: Any) -> None:
        self._ahead.__exit__(*given)

    def wait(self, enough: Callable[[], bool]) -> tuple[T, Cursor] | None:
        """Return the next item, or None as soon as `enough()` while there is none.

        Raises TemporaryError when the thread has failed once more than it is begun anew, for a reason that may pass;
        for any other reason that very error.
        """
        while True:
            try:
                found = self._ahead.wait(enough, self._patience)
            except (UserError, TemporaryError, StopIteration):
                raise
            except Exception as error:
                self._begin_anew(error)
                continue
            if found is not None:
                self._at = found[1]
                self._since += 1
            return found

    def _begin_anew(self, error: Exception) -> None:
        place = self._ahead.pulse.place
        self._ahead.abandon()
        self._failures = 1 if self._since >= FORGIVEN else self._failures + 1
        self._since = 0
        how = f"got stuck, {error}" if isinstance(error, Stuck) else f"died of {type(error).__name__}: {error}"
        words = f"the reader of the text (thread {NAME}) {how.removesuffix(': ')}; it was at {place}"
        may_pass = isinstance(error, Stuck | OSError | MemoryError)
        if self._failures > RESTARTS:
            if not may_pass:
                raise error
            raise TemporaryError(f"{words}. It was begun anew {RESTARTS} times, to no avail.") from error
        shown = None if may_pass else error  # with its traceback: a bug that comes and goes is still one
        LOG.warning(f"{words}; begun anew from there ({self._failures} of {RESTARTS})", exc_info=shown)
        self._ahead = Prefetch(self._begin(self._at), self._size)
        self._ahead.pulse.place = place  # until it has read something itself
        self._ahead.__enter__()
