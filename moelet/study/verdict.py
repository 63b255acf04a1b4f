"""What a study's figures say, and what they don't: differences beyond what seeds do, crossings, the words for both.

Pure: figures in, figures and sentences out. Nothing is extrapolated, and what may be chance is called a tie.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

BETTER, WORSE, TIE = "better", "worse", "tie"
# Student's t for 95 % on both sides, by degrees of freedom from 1; beyond the table its last entry, which is wider
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

Curve = Sequence[tuple[float, float]]  # (tokens, bits per byte) at the ends of runs that each had a whole schedule


class Crossing(NamedTuple):
    """Where a curve comes down to a target, as a share of what the target took."""

    share: float
    bound: str = ""  # "<": the shortest run was there already; ">": the longest run doesn't reach it

    def times(self, factor: float) -> "Crossing":
        return Crossing(self.share * factor, self.bound)

    def inverse(self) -> "Crossing":
        return Crossing(1 / self.share, {"<": ">", ">": "<", "": ""}[self.bound])


@dataclass(frozen=True)
class Outcome:
    """How much lower one arm's bits per byte are than another's, by pairs of equal seed; negative: lower."""

    tokens: float
    differences: list[float]
    mean: float
    half_width: float | None  # of the 95 % interval around the mean; None: one seed has none
    word: str  # BETTER, WORSE or TIE


@dataclass(frozen=True)
class Comparison:
    """One arm against another. Crossings are those of `leader`, the arm with the lower mean at the end."""

    arm: str
    base: str
    horizons: list[Outcome]  # by tokens; the last is the verdict's
    leader: str
    tokens: list[Crossing]  # a seed each: at which share of the other's tokens the leader has its final loss
    seconds: list[Crossing]  # likewise of its wall time
    seconds_per_token: float  # the arm's over the base's

    @property
    def word(self) -> str:
        return self.horizons[-1].word

    def factor(self, shares: Sequence[Crossing]) -> list[Crossing]:
        """Return what the arm needs for what the base needs 1 of: above 1 it costs, below it saves."""
        return list(shares) if self.leader == self.arm else [share.inverse() for share in shares]


class Arm(NamedTuple):
    """What the verdict needs of an arm."""

    name: str
    curves: Mapping[int, Curve]  # by seed
    tokens_per_second: float


def crossing(curve: Curve, target: float, tokens: float) -> Crossing:
    """Return where `curve` first is at `target` bits per byte, as a share of `tokens`.

    Between two runs it is read off linearly in the logarithm of the tokens.
    """
    points = sorted(curve)
    before, bits_before = points[0]
    if bits_before <= target:
        return Crossing(before / tokens, "<" if bits_before < target else "")
    for after, bits_after in points[1:]:
        if bits_after <= target:
            way = (bits_before - target) / (bits_before - bits_after)
            return Crossing(before * (after / before) ** way / tokens)
        before, bits_before = after, bits_after
    return Crossing(before / tokens, ">")


def outcome(tokens: float, differences: Sequence[float]) -> Outcome:
    """Return the mean difference with its 95 % interval, and the word for it: a tie where 0 lies within."""
    mean, half_width = statistics.fmean(differences), None
    if (n := len(differences)) > 1:
        half_width = T_95[min(n - 1, len(T_95)) - 1] * statistics.stdev(differences) / math.sqrt(n)
    certain = half_width is not None and abs(mean) > half_width
    word = TIE if not certain else BETTER if mean < 0 else WORSE
    return Outcome(tokens, list(differences), mean, half_width, word)


def compare(arm: Arm, base: Arm) -> Comparison:
    """Compare two arms on the seeds and horizons that both have; there must be one."""
    seeds = sorted(arm.curves.keys() & base.curves.keys())
    ours, theirs = [dict(arm.curves[s]) for s in seeds], [dict(base.curves[s]) for s in seeds]
    shared = sorted(set.intersection(*(set(curve) for curve in (*ours, *theirs))))
    horizons = [outcome(n, [a[n] - b[n] for a, b in zip(ours, theirs, strict=True)]) for n in shared]
    leads = horizons[-1].mean <= 0
    (leader, other), (lower, higher) = ((arm, base), (ours, theirs)) if leads else ((base, arm), (theirs, ours))
    end, slowness = shared[-1], other.tokens_per_second / leader.tokens_per_second
    shares = [crossing(list(a.items()), b[end], end) for a, b in zip(lower, higher, strict=True)]
    seconds = [share.times(slowness) for share in shares]
    per_token = base.tokens_per_second / arm.tokens_per_second
    return Comparison(arm.name, base.name, horizons, leader.name, shares, seconds, per_token)


def spread(shares: Sequence[Crossing]) -> str:
    """Return shares in words: "0.45 (0.42 to 0.50)", with < and > where a run didn't go as far as the answer."""
    low, high = min(shares), max(shares)
    bounds = {share.bound for share in shares} - {""}
    mean = f"{statistics.fmean(share.share for share in shares):.2f}"
    ends = f"{low.bound}{low.share:.2f} to {high.bound}{high.share:.2f}"
    if len(bounds) > 1:
        return ends
    middle = f"{''.join(bounds)}{mean}"
    return middle if len(shares) == 1 or low == high else f"{middle} ({ends})"


def margin(found: Outcome) -> str:
    """Return a difference in words: "-0.012 ± 0.004"."""
    return f"{found.mean:+.4f}" + ("" if found.half_width is None else f" ± {found.half_width:.4f}")


def sentence(found: Comparison) -> str:
    """Return the verdict on one comparison in plain words."""
    last, n = found.horizons[-1], len(found.tokens)
    seeds = f"{n} seeds" if n > 1 else "a single seed"
    if found.word == TIE:
        why = (
            f"which is within what seeds do (± {last.half_width:.4f} at 95 % over {seeds})"
            if last.half_width is not None
            else "and a single seed can't tell that from chance"
        )
        return (
            f"{found.arm} and {found.base} tie: after the same tokens they differ by {last.mean:+.4f} bits per byte, "
            f"{why}. A token of {found.arm} takes {found.seconds_per_token:.2f} times as long."
        )
    leader, other = (found.arm, found.base) if found.leader == found.arm else (found.base, found.arm)
    start = "" if leader == found.arm else f"{found.arm} does not reach the final loss of {found.base}: "
    but = "but" if all(share.share > 1 or share.bound == ">" for share in found.seconds) else "and"
    return (
        f"{start}{leader} reaches the final loss of {other} in {spread(found.tokens)} of its tokens {but} "
        f"{spread(found.seconds)} of its wall time (over {seeds}; at the same tokens {margin(last)} bits per byte)."
    )


def verdict(comparisons: Sequence[Comparison]) -> str:
    """Return the verdict of a study, a sentence for each comparison."""
    return " ".join(sentence(found) for found in comparisons)
