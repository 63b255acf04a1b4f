"""Signs of life of a thread that reads: it gives one wherever it gets on, and whoever waits for it counts them.

A thread can't be killed, only left alone. So the same call tells one that nobody waits for any more to end.
"""

from contextvars import ContextVar


class Abandoned(BaseException):
    """Nobody waits for this thread any more. It passes every handler of errors."""


class Pulse:
    """What a reader and the threads that read for it have in common."""

    def __init__(self) -> None:
        self.beats = 0
        self.place = "its start"  # what was read last, or is waited for
        self.abandoned = False

    def leave_if_abandoned(self) -> None:
        if self.abandoned:
            raise Abandoned


PULSE: ContextVar[Pulse | None] = ContextVar("pulse", default=None)  # threads of a reader run in a copy of its context


def beat(place: str | None = None) -> None:
    """Give a sign of life, and say where the reading stands. Does nothing in a thread that nobody watches.

    Raises Abandoned in one that nobody waits for any more.
    """
    pulse = PULSE.get()
    if pulse is None:
        return
    pulse.leave_if_abandoned()
    pulse.beats += 1
    pulse.place = place or pulse.place
