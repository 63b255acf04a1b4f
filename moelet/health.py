"""Whether a run's experts are well: alarms, with advice, for experts that starve and routers that go out of bounds.

Each number under watch (an expert's load, a layer's entropy and largest score) has an average that forgets over
HORIZON steps and begins where all is well, so that neither one odd step nor the beginning of a run can alarm. An alarm
is told once, and again only after the average has been well in between. What is known is a function of the steps made,
and goes into the checkpoint. Needs no torch.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

from moelet.hparams import Hparams

HORIZON = 100  # steps: an expert that gets nothing from the start alarms at step 230, one that gets 0.05 at step 293
SHOWN = 8  # alarms of a kind that one message spells out


class Rule(NamedTuple):
    start: float  # the average before the first step
    alarm: float  # an average beyond this alarms
    well: float  # and is over when it is back here

    def beyond(self, value: float, limit: float) -> bool:
        return value < limit if self.alarm < self.start else value > limit


# load: of the fair share. entropy: of the highest; at 0.02 of ln 8 the best expert of a token has about 0.993 of its
# weight; healthy runs came down to 0.2, a collapsed one to 0.001 (docs/experiments.md, 10). largest: bf16 has 8 bits,
# so a router's input is off by up to 2^-9 of itself, and a score of 64 by as much as 0.125: an eighth of the weight
# e^score is rounding (why Zoph et al. 2022, "ST-MoE", keep scores small); healthy runs stayed under 11.
RULES = {"load": Rule(1.0, 0.1, 0.3), "entropy": Rule(1.0, 0.02, 0.05), "largest": Rule(0.0, 64.0, 48.0)}


class Alarm(NamedTuple):
    kind: str  # a name in RULES
    layer: int
    expert: int | None  # None: of the whole layer
    value: float  # the average that alarmed
    since: int  # the step at which it left what is well


@dataclasses.dataclass
class Watch:
    """One number under watch."""

    average: float
    since: int | None = None
    told: bool = False


class Health:
    """What is known about the experts after the steps noted so far."""

    def __init__(self) -> None:
        self._watches: dict[str, list[list[Watch]]] = {kind: [] for kind in RULES}

    def note(self, step: int, load: list[list[float]], entropy: list[float], largest: list[float]) -> list[Alarm]:
        """Take in what one step measured, per layer, and return the alarms that it raises."""
        measured = {"load": load, "entropy": [[value] for value in entropy], "largest": [[value] for value in largest]}
        return [alarm for kind, values in measured.items() for alarm in self._note(step, kind, values)]

    def _note(self, step: int, kind: str, values: list[list[float]]) -> Iterable[Alarm]:
        rule, layers = RULES[kind], self._watches[kind]
        if not layers:
            layers += [[Watch(rule.start) for _ in layer] for layer in values]
        for layer, (watches, numbers) in enumerate(zip(layers, values, strict=True)):
            for place, (watch, number) in enumerate(zip(watches, numbers, strict=True)):
                watch.average += (number - watch.average) / HORIZON
                if not rule.beyond(watch.average, rule.well):
                    watch.since, watch.told = None, False
                    continue
                watch.since = step if watch.since is None else watch.since
                if not watch.told and rule.beyond(watch.average, rule.alarm):
                    watch.told = True
                    yield Alarm(kind, layer, place if kind == "load" else None, watch.average, watch.since)

    def starving(self) -> list[int]:
        """Return for each layer how many experts have an alarm that isn't over."""
        return [sum(watch.told for watch in layer) for layer in self._watches["load"]]

    def state(self) -> dict[str, Any]:
        """Return all of it as JSON can hold it, exactly."""
        return {
            kind: [[dataclasses.astuple(watch) for watch in layer] for layer in layers]
            for kind, layers in self._watches.items()
        }

    @classmethod
    def restored(cls, state: dict[str, Any]) -> "Health":
        """Return what `state()` was made of; anew where it is empty, as in checkpoints from before there was any."""
        health = cls()
        for kind, layers in state.items():
            health._watches[kind] = [[Watch(*watch) for watch in layer] for layer in layers]
        return health


def alarm_lines(step: int, alarms: list[Alarm], hparams: Hparams) -> list[str]:
    """Return what a person is told of the alarms of one step: what is, what is needed, what to do."""
    lines = []
    for kind in dict.fromkeys(alarm.kind for alarm in alarms):
        found = [alarm for alarm in alarms if alarm.kind == kind]
        lines.append(f"alarm at step {step}: {TITLES[kind]}")
        lines += [f"  {sentence(alarm)}" for alarm in found[:SHOWN]]
        lines += [f"  and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        lines.append(f"  {advice(kind, hparams)}")
    return lines


TITLES = {
    "load": f"experts get less than {RULES['load'].alarm} of their fair share",
    "entropy": "a router gives nearly all weight to one expert",
    "largest": "a router's scores have grown large",
}


def sentence(alarm: Alarm) -> str:
    """Return one alarm in words."""
    well = RULES[alarm.kind].well
    if alarm.kind == "load":
        return (
            f"layer {alarm.layer}, expert {alarm.expert}: {alarm.value:.2f} of the fair share on average, "
            f"below {well} since step {alarm.since}"
        )
    if alarm.kind == "entropy":
        return f"layer {alarm.layer}: entropy {alarm.value:.3f} of the highest, below {well} since step {alarm.since}"
    return f"layer {alarm.layer}: the largest score is {alarm.value:.0f}, above {well:.0f} since step {alarm.since}"


def advice(kind: str, hparams: Hparams) -> str:
    """Return what is needed, and the settings that give it; these are fixed for a run once it has begun."""
    balance, optim = hparams.balance, hparams.optim
    rate = optim.router_lr or optim.lr
    calmer = (
        f"optim.router_lr {rate / 3:.1g} (the router's rate is {rate:g}) or optim.warmup_steps "
        f"{max(100, 3 * optim.warmup_steps)} (it is {optim.warmup_steps})"
    )
    if kind == "load":
        need = "An expert that gets few tokens learns little, and its parameters are idle."
        return f"{need} In a new run, set {_more_balance(hparams)}; or {calmer}."
    if kind == "entropy":
        need = (
            "A router that is sure of everything hardly learns any more, and the other chosen experts count for little."
        )
    else:
        need = "From here on rounding decides between experts, and fp16 overflows earlier."
    weight = 1e-3 if balance.z_loss < 1e-3 else 10 * balance.z_loss  # 1e-3: Zoph et al. 2022, "ST-MoE"
    return f"{need} In a new run, set balance.z_loss {weight:g} (it is {balance.z_loss:g}); or {calmer}."


def _more_balance(hparams: Hparams) -> str:
    """Return the next stronger way to balance. From alpha 0.1 on no expert died in docs/experiments.md, 6."""
    balance = hparams.balance
    if balance.loss is None and balance.bias_rate is None:
        return 'balance.loss "switch" and balance.alpha 0.1 (there is no balance loss)'
    if balance.loss is not None and balance.alpha < 0.1:
        return f"balance.alpha 0.1 (it is {balance.alpha:g})"
    if balance.bias_rate is None:
        return f"model.selection_bias true and balance.bias_rate 0.001 (balance.alpha is {balance.alpha:g} already)"
    return f"balance.bias_rate {10 * balance.bias_rate:g} (it is {balance.bias_rate:g})"
