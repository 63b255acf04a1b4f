"""Training for a given time: how much of it is gone, what each part costs, and how many steps fit into the rest.

The time is a person's: from the start of the command to its end, over all sessions of a run, start-up, evaluation and
report included. What the schedule makes of a number of steps is `moelet.optim`'s.
"""

import re
import time
from bisect import bisect_right
from collections import deque

from moelet.errors import UserError

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
CALIBRATION_STEPS = 3  # after one that warms up; and as many as fit into
CALIBRATION_SHARE, CALIBRATION_SECONDS = 0.02, 20.0  # this share of the time, or these seconds if they are less
RECENT_STEPS = 64  # that the pace is the mean of
MARGIN = 0.015  # share of the time to leave over
REPORT_SECONDS = 4.0  # to draw the curve and the page, with the imports that takes; 2.5 s on 2 cores


def parse_duration(text: str) -> float:
    """Return the seconds in text like "5h", "90m" or "1h30m". Raises UserError for anything else."""
    if not re.fullmatch(rf"(\d+(\.\d+)?[{''.join(UNITS)}])+", text):
        raise UserError(f"the time budget is {text!r}. It needs numbers with units. Write it like 5h, 90m or 1h30m.")
    seconds = sum(float(n) * UNITS[unit] for n, _, unit in re.findall(r"(\d+(\.\d+)?)(\w)", text))
    if seconds <= 0:
        raise UserError(f"the time budget is {text!r}. Training needs some time. Write it like 5h, 90m or 1h30m.")
    return seconds


class Clock:
    """The time spent on a run: that of earlier sessions, and since this one began."""

    def __init__(self, spent: float, began: float) -> None:
        """`spent` is in seconds; `began` is what time.monotonic() was when the process started."""
        self.spent, self.began = spent, began

    def now(self) -> float:
        return self.spent + time.monotonic() - self.began


class Pace:
    """What this session's steps, evaluations and checkpoints take, in seconds."""

    def __init__(self, clock: Clock, budget: float, evaluation: float) -> None:
        """`evaluation` is that of an evaluation in steps, which holds until one was measured."""
        self.clock, self.budget, self.evaluation = clock, budget, evaluation
        self.steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self.costs = {"evaluation": 0.0, "checkpoint": 0.0}
        self.made = 0
        self.next_planned = 0  # look again when the plan leaves no more steps than this
        self.next_look = clock.now() + min(CALIBRATION_SHARE * budget, CALIBRATION_SECONDS)

    def note_step(self, seconds: float) -> None:
        self.made += 1
        if self.made > 1:  # the first allocates and compiles
            self.steps.append(seconds)

    def is_due(self, planned: int | None) -> bool:
        """Return whether to plan now: after the calibration, then when half of the time or of the planned steps left
        has passed, whichever comes first: the first steps may have been far slower than the rest.

        `planned` is how many steps the plan so far leaves; None: there is none.
        """
        half_made = planned is not None and planned <= self.next_planned
        if len(self.steps) < CALIBRATION_STEPS or (self.clock.now() < self.next_look and not half_made):
            return False
        self.next_look = self.clock.now() + (self.budget - self.clock.now()) / 2
        return True

    def steps_left(self, made: int, eval_steps: int | None, checkpoint_steps: int | None) -> int:
        """Return how many steps still fit after the `made` ones, at least 1, with what is due among and after them."""
        step = sum(self.steps) / len(self.steps)
        evaluation = self.costs["evaluation"] or self.evaluation * step
        extras = ((evaluation, eval_steps), (self.costs["checkpoint"], checkpoint_steps))

        def seconds(steps: int) -> float:
            last = made + steps  # after which everything is due
            dues = (1 + ((last - 1) // every - made // every if every else 0) for _, every in extras)
            return steps * step + sum(cost * due for (cost, _), due in zip(extras, dues, strict=True))

        left = self.budget * (1 - MARGIN) - self.clock.now() - REPORT_SECONDS
        return max(1, bisect_right(range(1, max(1, int(left / step)) + 1), left, key=seconds))
