"""A study: its plan, the jobs that follow from it, and how large it may be. Nothing here trains or measures.

A job is one run of an arm, with a schedule of its own over all its tokens: part of a longer run's curve would be that
of a learning rate that hasn't come down yet.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moelet.errors import UserError
from moelet.hparams import Hparams, make_hparams
from moelet.sections import LENGTHS
from moelet.storage.intake import LARGEST_JSON, open_file, parse_json

PLAN = "plan.json"
FORMAT = 1
SWEEP_SHARE = 1 / 8  # of the tokens: what learning rates are tried on
MOST_EXTENSIONS = 2  # of the grid of learning rates, where the best is its last
LONGEST_WARMUP = 10  # a job's warm-up is at most one part in this of its steps, or in proportion if that is more
EVALUATIONS = 5  # of a job over all tokens; others are evaluated at their end
LOGGED = 40  # lines that a job writes, about
CHECKPOINT_SECONDS = 300.0  # of a job between checkpoints
FORWARD_SHARE = 0.5  # of a training step's time a token, in evaluations, as in moelet.session
JOB_SECONDS = 2.0  # to start, to evaluate first, to save; 1.2 s at width 32 on 2 busy cores
ACTIVE_TOKENS = 20  # per active parameter, at least, where a time budget decides; Hoffmann et al. 2022
WIDTHS = (32, 64, 96, 128, 192, 256, 384, 512)  # of d_model, that a time budget chooses from
REPORT_SECONDS = 8.0  # to draw and write, with the imports; 4 s on 2 cores
BUDGET_SHARE = 0.85  # of the time left that a plan may fill: the pace of shared machines changes by a tenth


@dataclasses.dataclass
class Arm:
    """One side of the study, and what was found out about it before its runs."""

    name: str
    folder: str
    settings: dict[str, Any]
    parameters: int
    active_parameters: int
    flops_per_token: int
    rates: list[float] = dataclasses.field(default_factory=list)  # tokens a second, of each round
    tokens_per_second: float = 0.0  # their median
    lr_factor: float | None = None  # on all of its learning rates; None: not chosen yet
    sweep: list[tuple[float, float | None]] = dataclasses.field(default_factory=list)  # factor, bits per byte
    left_out: bool = False  # since one of its runs diverged


class Job(NamedTuple):
    """One run. `horizon` is its share of the study's tokens."""

    arm: str  # its folder
    horizon: float
    seed: int
    factor: float
    sweeps: bool = False

    @property
    def folder(self) -> str:
        kind = f"sweep-{self.factor:g}" if self.sweeps else f"{self.horizon:g}"
        return f"{self.arm}/{kind}-{self.seed}"


class Done(NamedTuple):
    """What came out of a job."""

    tokens: int
    seconds: float  # of training, by the job's own clock
    bits_per_byte: float
    curve: list[tuple[int, float, float]]  # tokens, seconds, bits per byte at its evaluations


@dataclasses.dataclass
class Plan:
    """Everything decided, as plan.json holds it: with the same text and machine it gives the same losses."""

    request: dict[str, Any]
    base: dict[str, Any]  # settings, whose text all arms read
    arms: list[Arm]
    tokens: int
    horizons: list[float]
    seeds: list[int]
    grid: list[float]
    jobs: int  # at a time
    threads: int  # of each
    side_by_side: float = 1.0  # what all runs at a time train, over what one alone does
    budget: float | None = None
    spent: float = 0.0  # seconds
    text: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    format: int = FORMAT

    @property
    def twins(self) -> bool:
        """Whether the first arm is an MoE and the others its dense twins, rather than the first what others change."""
        return not (self.request["vary"] or self.request["arms"])

    @property
    def standing(self) -> list[Arm]:
        """The arms that there is still something to say of."""
        return [arm for arm in self.arms if not arm.left_out]

    def arm(self, folder: str) -> Arm:
        return next(arm for arm in self.arms if arm.folder == folder)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def read_plan(path: Path) -> Plan:
    """Return the plan in a file. Raises UserError where it holds none of ours."""
    try:
        with open_file(path, LARGEST_JSON) as file:
            data = parse_json(file.read(), "it")
        arms = [Arm(**{**arm, "sweep": [(f, bits) for f, bits in arm["sweep"]]}) for arm in data.pop("arms")]
        plan = Plan(arms=arms, **data)
        if plan.format != FORMAT or not arms:
            raise ValueError(f"its format is {plan.format}")
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}). Give the plan.json of a study.") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is no plan of a study ({error}). Give the plan.json that `moelet prove` wrote."
        ) from None
    return plan


def job_settings(plan: Plan, job: Job, data: dict[str, Any]) -> Hparams:
    """Return the settings of a job; `data` is where the study's text lies."""
    arm, settings = plan.arm(job.arm), copy.deepcopy(plan.arm(job.arm).settings)
    settings["data"] |= data
    settings["tokenizer"] |= {"file": None} if data else {}
    for key, value in settings["optim"].items():
        if (key == "lr" or key.endswith("_lr")) and value is not None:
            settings["optim"][key] = value * job.factor
    tokens = job_tokens(plan, job)
    settings["train"] |= {**dict.fromkeys(LENGTHS), "train_tokens": tokens, "seed": job.seed, "run": None}
    hparams = make_hparams(settings, f"arm {arm.name!r}")
    steps, whole = math.ceil(tokens / hparams.tokens_per_step), math.ceil(plan.tokens / hparams.tokens_per_step)
    settings["optim"]["warmup_steps"] = warmup(hparams.optim.warmup_steps, steps, whole)
    pace = arm.tokens_per_second / hparams.tokens_per_step  # steps a second
    settings["train"] |= {
        "eval_steps": math.ceil(steps / EVALUATIONS) if job.horizon == 1 and steps > EVALUATIONS else None,
        "log_steps": math.ceil(steps / LOGGED),
        "checkpoint_steps": max(1, round(CHECKPOINT_SECONDS * pace)),
        "keep_checkpoints": 1,
        "sample_prompt": None,
        "track": None,
    }
    return make_hparams(settings, f"arm {arm.name!r}")


def warmup(given: int, steps: int, whole: int) -> int:
    """Return the warm-up of a job of `steps`, where one of `whole` steps has the `given` one.

    As given where that is at most a tenth of the job, else that tenth, or the share it has of the whole if that's more.
    """
    return min(given, max(steps // LONGEST_WARMUP, math.ceil(given * steps / whole)))


def warmup_note(plan: Plan) -> str | None:
    """Return which runs of the first arm have a shorter warm-up than its settings say, in words; None: none."""
    arm, given = plan.arms[0], plan.arms[0].settings["optim"]["warmup_steps"]
    shares = sorted({SWEEP_SHARE, *plan.horizons} if len(plan.grid) > 1 else plan.horizons)
    found = {h: job_settings(plan, Job(arm.folder, h, plan.seeds[0], 1.0), {}).optim.warmup_steps for h in shares}
    short = [f"{steps} in runs of {share:g} of the tokens" for share, steps in found.items() if steps < given]
    return f"the warm-up of {given} steps ({arm.name}) is shortened: {', '.join(short)}." if short else None


def job_tokens(plan: Plan, job: Job) -> int:
    return max(1, round(plan.tokens * job.horizon))


def next_factors(grid: Sequence[float], found: Mapping[float, float | None]) -> list[float]:
    """Return the factors on the learning rates still to be tried, given the bits per byte of those that were.

    First the grid; then, while the best is the first or last of all tried, one more on that side, at most twice. None
    stands for a run that diverged.
    """
    missing = [factor for factor in grid if factor not in found]
    if missing or len(found) >= len(grid) + MOST_EXTENSIONS or at_edge(found) is None:
        return missing
    ordered = sorted(found)
    lower = at_edge(found) == ordered[0]
    neighbours = (ordered[1], ordered[0]) if lower else (ordered[-2], ordered[-1])
    return [neighbours[1] * neighbours[1] / neighbours[0]]


def best_factor(found: Mapping[float, float | None]) -> float | None:
    """Return the factor with the lowest bits per byte; None where all diverged."""
    known = {factor: bits for factor, bits in found.items() if bits is not None}
    return min(known, key=known.__getitem__) if known else None


def at_edge(found: Mapping[float, float | None]) -> float | None:
    """Return the best factor where it is the lowest or highest tried; None where it isn't, or is the only one."""
    best = best_factor(found)
    return best if len(found) > 1 and best in (min(found), max(found)) else None


def sweep_jobs(plan: Plan, arm: Arm) -> list[Job]:
    """Return the runs of an arm that its learning rate waits for."""
    if arm.lr_factor is not None:
        return []
    factors = next_factors(plan.grid, dict(arm.sweep))
    return [Job(arm.folder, SWEEP_SHARE, plan.seeds[0], factor, True) for factor in factors]


def matrix(plan: Plan) -> Iterator[Job]:
    """Yield the runs that the verdict is made of, seed by seed, so that the last seeds can be left out."""
    for seed in plan.seeds:
        for horizon in plan.horizons:
            for arm in plan.standing:
                yield Job(arm.folder, horizon, seed, arm.lr_factor or 1.0)


def job_seconds(plan: Plan, job: Job) -> float:
    """Return how long a job takes, by the measured throughput."""
    arm = plan.arm(job.arm)
    evaluations = EVALUATIONS if job.horizon == 1 else 1
    evaluated = FORWARD_SHARE * evaluations * arm.settings["train"]["eval_tokens"]
    return (job_tokens(plan, job) + evaluated) / arm.tokens_per_second + JOB_SECONDS


def study_seconds(plan: Plan) -> float:
    """Return how long all jobs take, so many at a time, with one extension of each arm's grid."""
    tried = len(plan.grid) + 1 if len(plan.grid) > 1 else 0
    sweeps = [Job(arm.folder, SWEEP_SHARE, 0, 1.0, True) for arm in plan.arms if arm.lr_factor is None]
    alone = sum(job_seconds(plan, job) for job in matrix(plan)) + tried * sum(job_seconds(plan, job) for job in sweeps)
    return alone / plan.side_by_side


def least_tokens(plan: Plan) -> int:
    """Return the tokens that give every arm ACTIVE_TOKENS per active parameter."""
    return ACTIVE_TOKENS * max(arm.active_parameters for arm in plan.arms)


def fit(plan: Plan, seconds: float) -> int:
    """Return the tokens with which all jobs fit into the time, which may be fewer than there should be."""
    probe = 10**9
    fixed = study_seconds(dataclasses.replace(plan, tokens=0))
    each = (study_seconds(dataclasses.replace(plan, tokens=probe)) - fixed) / probe
    return int((seconds - fixed) / each)


def choose_size(draft: Callable[[int], Plan], left: Callable[[], float]) -> Plan:
    """Return the plan of the largest width whose whole study fits into the time left, with the tokens that fill it.

    `draft` measures a width and returns its plan; `left` is the seconds left by then. Raises UserError where not even
    the smallest fits.
    """
    best: Plan | None = None
    for width in WIDTHS:
        plan = draft(width)
        tokens = fit(plan, BUDGET_SHARE * left())
        if tokens < least_tokens(plan):
            break
        best = dataclasses.replace(plan, tokens=tokens)
    if best is not None:
        return best
    needed = study_seconds(dataclasses.replace(plan, tokens=least_tokens(plan))) / BUDGET_SHARE
    have = left()
    raise UserError(
        f"{have:,.0f} s are left of the time budget. The smallest model (d_model {WIDTHS[0]}) with {ACTIVE_TOKENS} "
        f"tokens per active parameter in all {len(plan.arms)} arms needs about {needed:,.0f} s. Give --time-budget "
        f"{math.ceil((needed + (plan.budget or have) - have) / 60)}m, or fewer --seeds, --horizons or arms."
    )
