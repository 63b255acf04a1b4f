"""What signals ask of a run, and how long work is left off when one asks to stop. Needs no torch."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a scheduler or a machine's end, a closed terminal
PATIENT = 2  # signals that ask to stop and are answered by a checkpoint: many a scheduler sends its own twice


class StopAsked(Exception):
    """A signal asked to stop in the middle of work that is to be left off."""


class Asked:
    """What signals have asked for so far."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self.save = False  # by SIGUSR1: a checkpoint after this step; the run goes on

    @property
    def stop(self) -> int | None:
        """The signal that first asked to stop."""
        return self.signals[0] if self.signals else None

    def __bool__(self) -> bool:
        return bool(self.signals)


@contextmanager
def stop_signals(aloud: bool = True) -> Iterator[Asked]:
    """Note what signals ask for, for the loop to see. The third that asks to stop ends the process at once.

    SIGHUP stays ignored where it is, as nohup has it. Not `aloud`: another process of the run says it.
    """
    asked = Asked()

    def tell(line: str) -> None:
        if aloud:
            _tell(line)

    def note_stop(number: int, frame: FrameType | None) -> None:
        if len(asked.signals) >= PATIENT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        asked.signals.append(number)
        left = PATIENT + 1 - len(asked.signals)
        tell(f"stopping, saving first; {'once' if left == 1 else 'twice'} more to stop at once, unsaved")

    def note_save(number: int, frame: FrameType | None) -> None:
        asked.save = True
        tell("saving after this step, then going on")

    handlers = {number: note_stop for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN}
    handlers |= {signal.SIGINT: note_stop, signal.SIGUSR1: note_save}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def nothing_to_save() -> Iterator[None]:
    """Have SIGUSR1, which asks for a checkpoint, do nothing before training begins and after it: unheard, it would end
    the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR1, lambda number, frame: _tell("there is nothing to save now"))
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


@contextmanager
def ctrl_c_ends_imports() -> Iterator[None]:
    """Have Ctrl-C end the process at once, with 130, while a command imports what it needs; nothing has begun by then.

    As an exception it may not get through: libraries take one in their imports for a part that is missing, and go on
    without it or make it an ImportError. Anywhere else it is the exception that it always is.
    """

    def answer(number: int, frame: FrameType | None) -> None:
        if not _imports_of_a_command(frame):
            signal.default_int_handler(number, frame)
        _tell("moelet: interrupted outside of training; run the same command again.")
        os._exit(128 + number)

    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, answer)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _imports_of_a_command(frame: FrameType | None) -> bool:
    """Return whether the outermost import that is going on is one of the command line's own."""
    importer = ""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>" and frame.f_back is not None:
            importer = frame.f_back.f_globals.get("__name__", "")
        frame = frame.f_back
    return importer == "moelet.cli" or importer.startswith("moelet.commands.")


def _tell(line: str) -> None:
    with suppress(OSError):  # the terminal may be what went away
        os.write(2, f"\n{line}\n".encode())


def never() -> bool:
    return False


def until(asked: Callable[[], bool], items: Iterable[T]) -> Iterator[T]:
    """Yield the items; raise StopAsked before the next one as soon as `asked()`."""
    for item in items:
        if asked():
            raise StopAsked
        yield item
