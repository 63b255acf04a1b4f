"""Which sizes fit a time: a model and its tokens, as settings that are ready to train."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moelet.errors import UserError
from moelet.hparams import Hparams, read_hparams
from moelet.study.arms import rate_shift, scaled, size_of
from moelet.study.study import ACTIVE_TOKENS

WIDTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)  # of d_model; everything else in proportion
SHARE = 0.9  # of the time is for training: the rest for start, evaluations, checkpoints, and a pace that changes
WARMUP = 10  # a warm-up is at most one step in so many
RATES = ("lr", "min_lr", "embed_lr", "router_lr", "muon_lr")


class Pace(NamedTuple):
    """How a size trains on the machine or card in question."""

    tokens_per_second: float
    memory_mb: float


def of_width(file: Path, changes: Sequence[str], width: int) -> list[str]:
    """Return the changes that bring the model of a file to this width, with learning rates to begin from."""
    base = read_hparams(file, changes)
    shift = rate_shift(base.model, width)
    rates = {name: getattr(base.optim, name) for name in RATES}
    moved = [f"optim.{name}={rate * shift:g}" for name, rate in rates.items() if rate and shift != 1]
    return [*(scaled(base.model, width) if width != base.model.d_model else []), *moved]


class Search:
    """Sizes by width, each tried once at most."""

    def __init__(
        self, file: Path, changes: Sequence[str], vocab_size: int, hours: float, pace_of: Callable[[Hparams], Pace]
    ) -> None:
        self.file, self.vocab_size, self.hours, self.pace_of = file, vocab_size, hours, pace_of
        self.changes = [*changes, "train.train_tokens=1"]
        self._tried: dict[int, dict[str, Any]] = {}

    def proposal(self, width: int) -> dict[str, Any]:
        """Return what training this width for the time would be."""
        if width in self._tried:
            return self._tried[width]
        changes = of_width(self.file, self.changes, width)
        hparams = read_hparams(self.file, [*self.changes, *changes])
        size, pace = size_of(hparams.model, self.vocab_size), self.pace_of(hparams)
        tokens = int(pace.tokens_per_second * 3600 * self.hours * SHARE)
        steps = max(1, tokens // hparams.tokens_per_step)
        warmup = min(hparams.optim.warmup_steps, steps // WARMUP)
        changes += [f"train.train_tokens={steps * hparams.tokens_per_step}", f"optim.warmup_steps={warmup}"]
        self._tried[width] = {
            "d_model": width,
            "widest": width == WIDTHS[-1],
            "parameters": size.parameters,
            "active_parameters": size.active,
            "tokens": steps * hparams.tokens_per_step,
            "tokens_per_active_parameter": steps * hparams.tokens_per_step / size.active,
            "tokens_per_second": pace.tokens_per_second,
            "memory_mb": pace.memory_mb,
            "hours": steps * hparams.tokens_per_step / pace.tokens_per_second / 3600,
            "changes": changes,
            "settings": read_hparams(self.file, [*self.changes, *changes]).model_dump(mode="json"),
        }
        return self._tried[width]

    def guess(self, rate: float, flops: float) -> int:
        """Return the place in WIDTHS of the largest that fits if all trained at the FLOP/s of the file's own size."""
        fits = 0
        for place, width in enumerate(WIDTHS):
            hparams = read_hparams(self.file, [*self.changes, *of_width(self.file, self.changes, width)])
            size = size_of(hparams.model, self.vocab_size)
            tokens = rate * flops / size.flops_per_token * 3600 * self.hours * SHARE
            if tokens >= ACTIVE_TOKENS * size.active:
                fits = place
        return fits

    def find(self, rate: float, flops: float) -> list[dict[str, Any]]:
        """Return the largest width with enough tokens for its active parameters, and the next smaller, which has more.

        `rate` and `flops` are the tokens a second and the FLOPs a token of the file's own size. Raises UserError where
        not even the smallest has enough.
        """
        place = self.guess(rate, flops)
        while place > 0 and not self._enough(place):
            place -= 1
        while place + 1 < len(WIDTHS) and self._enough(place) and self._enough(place + 1):
            place += 1
        if not self._enough(place):
            needed = rounded_up(self._needed(self.proposal(WIDTHS[0])))
            raise UserError(
                f"--hours is {self.hours:g}. The smallest size, d_model {WIDTHS[0]}, needs {needed} hours for "
                f"{ACTIVE_TOKENS} tokens per active parameter. Give --hours {needed}."
            )
        return [self.proposal(WIDTHS[at]) for at in (place, place - 1) if at >= 0]

    def _enough(self, place: int) -> bool:
        made = self.proposal(WIDTHS[place])  # at least a step, however little the time
        return made["tokens_per_active_parameter"] >= ACTIVE_TOKENS and made["hours"] <= self.hours

    def _needed(self, made: dict[str, Any]) -> float:
        """Return the hours in which a size sees enough tokens, in whole steps."""
        hparams = read_hparams(self.file, [*self.changes, *made["changes"]])
        steps = math.ceil(ACTIVE_TOKENS * made["active_parameters"] / hparams.tokens_per_step)
        return steps * hparams.tokens_per_step / made["tokens_per_second"] / 3600 / SHARE


def rounded_up(value: float) -> str:
    """Return a positive number by its first two digits, rounded up: 0.00041 for 0.000402."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / unit) * unit:.2g}" if value < 100 else f"{math.ceil(value)}"
