"""Makes the plan of a study: what is asked for, the arms, their throughput, their size within a time budget, the text.

What a plan holds is `study`'s, carrying it out `prove`'s.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moelet.budget import Clock
from moelet.console import Progress, duration
from moelet.errors import UserError
from moelet.hparams import Hparams, make_hparams, read_hparams
from moelet.precision import choose_device
from moelet.prepare import prepare
from moelet.study import study
from moelet.study.arms import (
    UNIT,
    arm_settings,
    folder_names,
    named,
    rate_shift,
    refuse_unfair,
    scaled,
    size_of,
    twin_changes,
    twins,
    varied,
)
from moelet.study.calibrate import ROUNDS, UNSTEADY, coincides, equal_time_width, in_turn, steady, together
from moelet.study.study import PLAN, REPORT_SECONDS, Arm, Plan
from moelet.study.workers import workers
from moelet.text.shards import MANIFEST, fingerprint_prepared, folder_of, read_manifest
from moelet.tokenizer import Tokenizer
from moelet.train import check, make_tokenizer, pinned

DEFAULT_FILE = Path("hparams.json")  # where no FILE is given, with a time budget of
DEFAULT_BUDGET = 3600.0  # seconds
DEFAULT_SEEDS, DEFAULT_GRID, DEFAULT_HORIZONS = 3, (0.5, 1.0, 2.0), (0.25, 0.5, 1.0)
MOST_JOBS = 8  # at a time, where nobody says how many: each has its own memory
TEXT_MARGIN = 1.02  # of the tokens: in another seed's order, windows end elsewhere and leave more over

Way = tuple[int, int]  # runs at a time, threads of each
Pools = dict[Way, ProcessPoolExecutor]


class Request(NamedTuple):
    """What a person asks for; None: as usual, or as the study that goes on has it."""

    file: Path | None = None
    changes: Sequence[str] = ()
    vary: Sequence[str] = ()
    arms: Sequence[str] = ()
    seeds: int | None = None
    grid: Sequence[float] | None = None
    horizons: Sequence[float] | None = None
    jobs: int | None = None
    budget: float | None = None  # seconds
    plan: Path | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing that would make another study; seeds and jobs may change on the way."""
        return self._replace(seeds=None, jobs=None, plan=None) == Request()


def settings_file(request: Request) -> tuple[Request, Path]:
    """Return the request with its budget, and the settings file: without a file, both have defaults.

    Raises UserError for what contradicts itself.
    """
    if request.vary and request.arms:
        raise UserError("--vary and --arm are both given. They are two ways to say which arms there are. Give one.")
    horizons = request.horizons or DEFAULT_HORIZONS
    if max(horizons) != 1 or min(horizons) <= 0:
        raise UserError(f"--horizons is {_list(horizons)}. They are shares of the tokens, up to 1. Give 0.25,0.5,1.")
    if any(factor <= 0 for factor in request.grid or ()):
        raise UserError(f"--lr-grid is {_list(request.grid or ())}. Factors are above 0. Give 0.5,1,2, or 1 for none.")
    has_length = any(change.startswith(("train.train_steps=", "train.train_tokens=")) for change in request.changes)
    if request.file is None and request.budget is None and not has_length:
        request = request._replace(budget=DEFAULT_BUDGET)
    return request, request.file or DEFAULT_FILE


def numbers(option: str, text: str | None) -> list[float] | None:
    """Return the numbers in text like "0.5,1"; raise UserError for anything else."""
    try:
        found = None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if found is not None and not all(map(math.isfinite, found)):
        raise UserError(f"{option} is {text!r}. It needs numbers with commas between. Write {option} 0.5,1.")
    return found


def _list(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def base_settings(request: Request, file: Path) -> tuple[list[str], Hparams]:
    """Return the changes made to the file for all arms, and the settings with them. Raises UserError as they do."""
    changes = [*request.changes, *([] if request.budget is None else ["train.train_tokens=1"])]
    base = read_hparams(file, changes)
    check(base)
    if base.total_steps is None:
        raise UserError(
            f"{file} has train.time_budget. A study needs the tokens of its runs. Set train.train_tokens, or give "
            "--time-budget for the whole study."
        )
    if base.train.batch_size == "auto":
        raise UserError('train.batch_size is "auto". All arms take the same batches. Set train.batch_size to a number.')
    return changes, base


def arms_of(request: Request, base: Hparams) -> dict[str, list[str]]:
    """Return the arms, each with its changes to the file."""
    if request.vary:
        arms = varied(request.vary)
    elif request.arms:
        arms = named(request.arms)
    else:
        arms = twins(base.model)
    if request.vary or request.arms:
        refuse_unfair(arms, request.budget is not None)
    if len(arms) < 2:
        raise UserError(f"the only arm is {next(iter(arms))!r}. A comparison needs two. Give --vary a second value.")
    return arms


def vocabulary(hparams: Hparams) -> int:
    """Return the size of the vocabulary, as far as it is known before a tokenizer is trained."""
    if hparams.data.source == "prepared":
        return make_tokenizer(hparams).vocab_size
    return Tokenizer.load(hparams.tokenizer.file).vocab_size if hparams.tokenizer.file else hparams.tokenizer.vocab_size


class Planner:
    """Makes the plan of a new study: arms, their throughput, and, within a time budget, their size."""

    def __init__(self, request: Request, progress: Progress, clock: Clock) -> None:
        self.request, self.file = settings_file(request)
        self.changes, self.base = base_settings(self.request, self.file)
        arms_of(self.request, self.base)  # what is wrong with them is said before any work
        arm_settings(self.file, self.changes, arms_of(self.request, self.base))
        self.progress, self.clock = progress, clock
        self.vocab_size = vocabulary(self.base)

    @property
    def asked(self) -> dict[str, Any]:
        """What the study is, so that another can't go on in its folder."""
        r = self.request
        options = {"vary": list(r.vary), "arms": list(r.arms), "lr_grid": list(r.grid or DEFAULT_GRID)}
        options |= {"horizons": sorted(set(r.horizons or DEFAULT_HORIZONS)), "time_budget": r.budget}
        return options | {"settings": self.base.model_dump(mode="json", exclude={"train": {"run"}})}

    def make(self) -> Plan:
        with ExitStack() as hold:
            pools = {way: hold.enter_context(workers(*way)) for way in self._ways()}
            if self.request.budget is None:
                plan = self._draft(self.changes)
            else:
                self.progress.say(
                    f"choosing a size for {duration(self.request.budget)}: each width is tried for a moment"
                )
                left = self._left
                plan = study.choose_size(lambda width: self._measured(pools, self._draft_of_width(width), 1), left)
                width = plan.base["model"]["d_model"]
                self.changes += scaled(self.base.model, width)
                if self.request.grid is None and (shift := rate_shift(self.base.model, width)) != 1:
                    plan.grid = [factor * shift for factor in plan.grid]
                    was = self.base.model.d_model
                    plan.notes.append(f"learning rates are tried around x {shift:g}: the file's are for d_model {was}.")
            if not (self.request.vary or self.request.arms):
                self._choose_way(pools, plan)
                self._add_equal_time(pools[plan.jobs, plan.threads], plan)
            self.progress.say("measuring the throughput of all arms, in turn")
            plan = self._measured(pools, plan, ROUNDS)
        if self.request.budget is not None:
            least = study.least_tokens(plan)
            plan.tokens = max(least, min(plan.tokens, study.fit(plan, study.BUDGET_SHARE * self._left())))
            plan.base["train"]["train_tokens"] = plan.tokens
        plan.notes += filter(None, [study.warmup_note(plan), busy_note(plan)])
        return plan

    def _left(self) -> float:
        assert self.request.budget is not None
        return self.request.budget - self.clock.now() - REPORT_SECONDS

    def _draft_of_width(self, width: int) -> Plan:
        return self._draft([*self.changes, *scaled(self.base.model, width)])

    def _draft(self, changes: Sequence[str]) -> Plan:
        """Return the plan with these changes for all arms, unmeasured."""
        base = read_hparams(self.file, changes)
        settings = arm_settings(self.file, changes, arms_of(self.request, base))
        grid = sorted(set(self.request.grid or DEFAULT_GRID))
        assert base.total_steps is not None
        first = base.train.seed
        plan = Plan(
            request=self.asked,
            base=pinned(base).model_dump(mode="json"),
            arms=self._arms(settings),
            tokens=base.train.train_tokens or base.total_steps * base.tokens_per_step,
            horizons=sorted(set(self.request.horizons or DEFAULT_HORIZONS)),
            seeds=list(range(first, first + (self.request.seeds or DEFAULT_SEEDS))),
            grid=grid,
            jobs=1,
            threads=1,
            budget=self.request.budget,
        )
        for arm in plan.arms:
            arm.lr_factor = grid[0] if len(grid) == 1 else None
        return plan

    def _arms(self, settings: dict[str, Hparams]) -> list[Arm]:
        return [
            Arm(name, folder, hparams.model_dump(mode="json"), *size_of(hparams.model, self.vocab_size))
            for folder, (name, hparams) in zip(folder_names(list(settings)), settings.items(), strict=True)
        ]

    def _ways(self) -> list[Way]:
        """Return what to try: how many runs at a time, and with how many threads each."""
        threads, jobs = torch.get_num_threads(), self.request.jobs
        if jobs is None and choose_device(self.base.train.device).type != "cpu":
            jobs = 1
        if jobs is None:
            at_once = {max(1, threads // parts) for parts in (1, 2, 4, threads)}
            return [(count, threads // count) for count in sorted(at_once) if count <= MOST_JOBS]
        return sorted({(jobs, max(1, threads // jobs)), (jobs, 1)}, reverse=True)

    def _choose_way(self, pools: Pools, plan: Plan) -> None:
        """Put into the plan how many runs at a time, with how many threads each, train most tokens a second.

        A small model's many small loops leave threads waiting for each other, above all where other work has a core:
        at width 32 on 2 busy cores, two threads make 1,130 tokens a second and one 30,000.
        """
        first = make_hparams(plan.arms[0].settings)
        rates = {way: together(pool, way[0], first, self.vocab_size) for way, pool in pools.items()}
        plan.jobs, plan.threads = way = max(rates, key=lambda way: rates[way])
        alone = together(pools[way], 1, first, self.vocab_size)
        plan.side_by_side = max(1.0, rates[way] / alone)

    def _measured(self, pools: Pools, plan: Plan, rounds: int) -> Plan:
        self._choose_way(pools, plan)
        pool = pools[plan.jobs, plan.threads]
        arms = [make_hparams(arm.settings, f"arm {arm.name!r}") for arm in plan.arms]
        rates = pool.submit(in_turn, arms, self.vocab_size, rounds).result()
        for arm, own, rate in zip(plan.arms, rates, steady(rates), strict=True):
            arm.rates, arm.tokens_per_second = own, rate
        d_model = plan.base["model"]["d_model"]
        found = ", ".join(f"{arm.name} {arm.tokens_per_second:,.0f}" for arm in plan.arms)
        at_once = f"{plan.jobs} at a time" if plan.jobs > 1 else "one at a time"
        self.progress.say(f"  width {d_model}, {at_once}, threads {plan.threads}, tokens/s: {found}")
        return plan

    def _add_equal_time(self, pool: ProcessPoolExecutor, plan: Plan) -> None:
        """Add the dense twin of equal time, or a note that it is one of the others."""
        self.progress.say("looking for the dense width that trains as fast")
        width = pool.submit(equal_time_width, self.file, self.changes, self.vocab_size).result()
        moe, name = read_hparams(self.file, self.changes).model, "dense-equal-time"
        if (other := coincides(width, moe)) is not None:
            plan.notes.append(f"{name} is left out: its width, {width}, is within {UNIT} of that of {other}.")
            return
        settings = arm_settings(self.file, self.changes, {name: twin_changes(width)})
        (arm,) = self._arms(settings)
        arm.lr_factor = plan.arms[0].lr_factor
        plan.arms.append(arm)


def busy_note(plan: Plan) -> str | None:
    """Return what is to be said where an arm's rounds were of very different speed; None: nothing."""
    worst = max(plan.arms, key=lambda arm: max(arm.rates) / min(arm.rates))
    if max(worst.rates) / min(worst.rates) <= UNSTEADY:
        return None
    return (
        f"the machine was busy when throughput was measured ({worst.name}: {min(worst.rates):,.0f} to "
        f"{max(worst.rates):,.0f} tokens/s): what is said of time is uncertain by as much."
    )


def prepare_text(plan: Plan, folder: Path, progress: Progress) -> dict[str, Any]:
    """Encode the text of the study, unless it is encoded already; return where jobs read it, and note what it is.

    Raises UserError where a plan made before had another text.
    """
    base = make_hparams(plan.base)
    if base.data.source == "prepared":
        data = base.data.model_dump(mode="json")
    else:
        if not (plan.text and (folder / "data" / MANIFEST).exists()):  # else the source may be gone by now
            prepare(base, folder / "data", math.ceil(plan.tokens * TEXT_MARGIN), progress)
        data = {"source": "prepared", "files": [str((folder / "data").absolute())], "mix": None}
    ready = base.data.model_copy(update=data)
    manifest = read_manifest(folder_of(ready))
    text = {"tokens": manifest["windows"]["train"]["tokens"], "sha256": fingerprint_prepared(ready)}
    if plan.text not in ({}, text):
        raise UserError(
            f"the text in {folder_of(ready)} isn't that of the plan ({text} instead of {plan.text}). The same runs "
            "need the same text. Give the files as they were, or make a new study."
        )
    plan.text = text
    return data


def begin(request: Request, folder: Path, progress: Progress, clock: Clock) -> Plan:
    """Return the plan of the study in `folder`, or that of a new one. Raises UserError where the two differ."""
    if (folder / PLAN).exists():
        plan = read_plan_again(request, folder, progress)
        clock.spent = plan.spent
        return plan
    if request.plan is not None:
        if request != Request(plan=request.plan):
            raise UserError(
                "--plan says all of what the study is. Leave out the file and the other options, or --plan."
            )
        plan = study.read_plan(request.plan)
        return dataclasses.replace(plan, budget=None, spent=0.0)
    return Planner(request, progress, clock).make()


def read_plan_again(request: Request, folder: Path, progress: Progress) -> Plan:
    """Return the plan of a study that goes on, with more seeds if they are asked for."""
    plan = study.read_plan(folder / PLAN)
    if not request.is_empty:
        asked = Planner(request, progress, Clock(0.0, time.monotonic())).asked
        if different := [name for name, value in asked.items() if plan.request.get(name) != value]:
            raise UserError(
                f"{folder} holds another study; these differ: {', '.join(different)}. Go on with it by --run {folder} "
                "alone, or give a new folder."
            )
    if request.seeds is not None:
        plan.seeds = list(range(plan.seeds[0], plan.seeds[0] + request.seeds))
        plan.notes = [note for note in plan.notes if not note.startswith("seed ")]  # left out, and now wanted
        plan.budget = None if request.is_empty else plan.budget  # it was for the seeds that there are
    if request.jobs is not None and request.jobs != plan.jobs:
        plan.threads = max(1, plan.threads * plan.jobs // request.jobs)
        plan.jobs = request.jobs
    return plan
