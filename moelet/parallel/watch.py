"""Ranks that die or hang: noticed by the others, named, and the end of the run.

A rank that waits for another waits in a collective, which can't be told apart from a leader that waits for a hub. So
each rank has a thread that shows it is alive, in the store where the ranks met, and looks at the next rank. Who sees
that one silent for too long says so to all, and all end: with what happened, and how to go on.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from moelet.errors import Interrupted, TemporaryError
from moelet.parallel.ranks import LOST, Team, is_lost, meeting_place

LOOK_SECONDS = 1.0  # between two signs of life, and two looks
SILENT_SECONDS = 15.0  # without one, a rank is lost: after that all have half of torchrun's 30 s left to end in


def host() -> str:
    """Return whose process has the store where the ranks met."""
    return "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"


class Watch:
    """Shows that this rank is alive and watches the next one, while it lasts. Alone it does nothing."""

    def __init__(self, team: Team, advice: str, end: Callable[[int], None] = os._exit) -> None:
        """`advice` is how to go on; `end` ends the process where its work hangs, with an exit code."""
        self.team, self.advice, self._end = team, advice, end
        self._ended = threading.Event()
        self._found = threading.Event()
        self._words = ""
        self._rounds = 0  # of looks made
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._guard)]

    def __enter__(self) -> Self:
        if not self.team.alone:
            self._store = meeting_place()  # again: that of the collectives may be waiting for somebody
            self._store.set(f"beat/{self.team.rank}", "0")  # at once: from here on it is missed
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the watch. Of an error in this rank the others are told; one that is theirs gets its reason."""
        if self.team.alone:
            return
        if is_lost(error):
            self._found.wait(SILENT_SECONDS + 3 * LOOK_SECONDS)
            self._ended.set()
            self._stay()
            raise TemporaryError(f"{self._words or error} {self.advice}") from None
        self._ended.set()
        with suppress(Exception):
            if error is not None and not isinstance(error, Interrupted):
                self.team.give_up(error)
                self._stay()
            else:
                self._store.set(f"beat/{self.team.rank}", "done")

    def _stay(self) -> None:
        """Give the others time to read why this rank ends, where the store may be in its process."""
        if self.team.leads:
            time.sleep(2 * LOOK_SECONDS)

    def _watch(self) -> None:
        beats, seen, silent, looked = 0, "", 0.0, time.monotonic()
        other = (self.team.rank + 1) % self.team.size
        while not self._ended.wait(LOOK_SECONDS):
            self._rounds += 1
            now = time.monotonic()
            passed, looked = min(now - looked, 2 * LOOK_SECONDS), now  # a longer one: this process was stopped itself
            beats += 1
            try:
                self._store.set(f"beat/{self.team.rank}", str(beats))
                if self._store.check([LOST]):
                    self._lose(self._store.get(LOST).decode())
                    return
                beat = self._store.get(f"beat/{other}").decode() if self._store.check([f"beat/{other}"]) else ""
            except Exception as error:
                if not self._ended.is_set():
                    self._lose(f"{host()} is gone, where the ranks met ({str(error).splitlines()[0]}).")
                return
            watched = beat not in ("", "done")  # a leader may still read held-out text; another may have ended
            silent = silent + passed if watched and beat == seen else 0.0
            seen = beat
            if silent >= SILENT_SECONDS:
                words = f"rank {other} hasn't shown any sign of life for {silent:.0f} s."
                with suppress(Exception):
                    self._store.set(LOST, words)
                self._lose(words)
                return

    def _guard(self) -> None:
        """Notice where the store itself doesn't answer: its process is stopped, and the look waits for ever."""
        seen, silent, looked = 0, 0.0, time.monotonic()
        while not self._ended.wait(LOOK_SECONDS):
            now = time.monotonic()
            passed, looked = min(now - looked, 2 * LOOK_SECONDS), now
            silent = silent + passed if self._rounds == seen else 0.0
            seen = self._rounds
            if silent >= SILENT_SECONDS and not self._found.is_set():
                self._lose(f"{host()} hasn't answered for {silent:.0f} s, where the ranks met.")
                return

    def _lose(self, words: str) -> None:
        """End the process, where its own work doesn't notice by itself that a rank is gone."""
        self._words = words
        self._found.set()
        if not self._ended.wait(2 * LOOK_SECONDS):
            sys.stderr.write(f"\n{words} {self.advice}\n")
            sys.stderr.flush()
            self._end(TemporaryError.exit_code)
