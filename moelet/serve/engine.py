"""Who is written for, and in what order: texts take turns, a token each, in one thread; the others wait in a line.

A model's products use all cores for one token, so texts in turns are as fast as texts in threads, and nothing is shared
between threads but the line and the letters that go out.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

from moelet.serve.limits import Limits, Refusal
from moelet.serve.writing import Letter, Part, Writing

LOG = logging.getLogger("moelet")


class Order:
    """Texts that somebody waits for, and the letters about them, for a single reader in the loop that made it."""

    def __init__(self, writings: Sequence[Writing]) -> None:
        self.writings, self.cancelled = list(writings), False
        self._letters: deque[Letter] = deque()
        self._loop, self._arrived, self._called = asyncio.get_running_loop(), asyncio.Event(), False

    def post(self, letter: Letter) -> None:
        """Send a letter, from the engine's thread. One call wakes the reader for all that are there by then."""
        self._letters.append(letter)
        if not self._called:
            self._called = True
            try:
                self._loop.call_soon_threadsafe(self._arrived.set)
            except RuntimeError:  # the loop has ended, and with it whoever waited
                self.cancelled = True

    async def letters(self) -> list[Letter]:
        """Return all that have come since, at least one."""
        await self._arrived.wait()
        self._arrived.clear()
        self._called = False  # before the letters are taken: one that comes now wakes the reader once more
        taken = []
        while self._letters:
            taken.append(self._letters.popleft())
        return taken or await self.letters()


class Turn:
    """One text's place among those being written."""

    def __init__(self, order: Order, index: int, seconds: float) -> None:
        self.order, self.index = order, index
        self._writing, self._seconds = order.writings[index], seconds
        self._parts, self._until = self._writing.parts(), 0.0

    def step(self) -> bool:
        """Write one token; return whether there is more to do."""
        if self.order.cancelled:
            return False
        self._until = self._until or time.monotonic() + self._seconds
        try:
            part = next(self._parts, None)
        except Exception:  # a bug ends this text, not the server
            LOG.exception("a text could not be written")
            self.order.post(Letter(self.index, Part([]), "failed"))
            return False
        if part is None:
            self.order.post(Letter(self.index, Part([]), self._writing.ended))
            return False
        if part.tokens:
            self.order.post(Letter(self.index, part))
        if time.monotonic() < self._until:
            return True
        self.order.post(Letter(self.index, self._writing.cut(), "time"))
        return False


class Engine:
    """The thread that writes. Orders are taken from any thread."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._active: list[Turn] = []
        self._waiting: deque[Turn] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="moelet-writer", daemon=True)
        self._thread.start()

    def counts(self) -> tuple[int, int]:
        """Return how many texts are being written, and how many wait."""
        with self._changed:
            self._forget_cancelled()
            return len(self._active), len(self._waiting)

    def take(self, order: Order) -> None:
        """Put an order's texts into the line. Raises Refusal (429) when the line has no room for them."""
        with self._changed:
            self._forget_cancelled()
            room = self.limits.at_once + self.limits.waiting - len(self._active) - len(self._waiting)
            if len(order.writings) > room:
                raise Refusal(429, f"{len(self._waiting)} texts are waiting already. Try again soon.")
            self._waiting += [Turn(order, index, self.limits.seconds) for index in range(len(order.writings))]
            self._changed.notify()

    def cancel(self, order: Order) -> None:
        """Stop writing for an order: whoever waited has gone, or has all."""
        with self._changed:
            order.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """Stop writing for everybody."""
        with self._changed:
            self._closed = True
            for turn in [*self._active, *self._waiting]:
                turn.order.post(Letter(turn.index, Part([]), "time"))
            self._changed.notify()
        self._thread.join(5)

    def _forget_cancelled(self) -> None:
        self._waiting = deque(turn for turn in self._waiting if not turn.order.cancelled)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not self._active and not self._waiting:
                    self._changed.wait()
                if self._closed:
                    return
                self._forget_cancelled()
                while self._waiting and len(self._active) < self.limits.at_once:
                    self._active.append(self._waiting.popleft())
                turns = list(self._active)
            going = {id(turn) for turn in turns if turn.step()}
            with self._changed:
                self._active = [turn for turn in self._active if id(turn) in going]
