"""What a finished study found, as prove.json holds it: for each arm and seed its figures, the comparisons, the verdict.

Seconds are tokens over the throughput that was measured with all arms in turn; `own_seconds` are a job's own, of
training alone, and depend on what else the machine did then.
"""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from moelet.precision import choose_device
from moelet.speed.bench import machine
from moelet.study.study import Arm, Done, Job, Plan, at_edge, job_tokens
from moelet.study.verdict import Arm as Side
from moelet.study.verdict import Comparison, compare, margin, sentence, spread, verdict

Results = Mapping[Job, Done]


def findings(plan: Plan, results: Results) -> dict[str, Any]:
    """Return everything, ready for JSON."""
    comparisons = compared(plan, results)
    return {
        "verdict": verdict(comparisons),
        "arms": [entry(plan, arm, seed, results) for arm in plan.standing for seed in plan.seeds],
        "sides": [side(plan, arm, results) for arm in plan.standing],
        "comparisons": [told(found) for found in comparisons],
        "tokens": plan.tokens,
        "horizons": plan.horizons,
        "seeds": plan.seeds,
        "lr_grid": plan.grid,
        "epochs": plan.tokens / max(1, plan.text["tokens"]),
        "seconds": plan.spent,
        "time_budget": plan.budget,
        "jobs": plan.jobs,
        "threads": plan.threads,
        "notes": plan.notes,
        "request": plan.request,
        "machine": machine(choose_device(plan.base["train"]["device"])),
    }


def runs_of(plan: Plan, arm: Arm, seed: int, results: Results) -> dict[float, tuple[Job, Done]]:
    """Return an arm's runs with one seed, by horizon."""
    return {job.horizon: (job, done) for job, done in results.items() if (job.arm, job.seed) == (arm.folder, seed)}


def entry(plan: Plan, arm: Arm, seed: int, results: Results) -> dict[str, Any]:
    """Return what one arm did with one seed. `curve` is that of the longest run: [tokens, seconds, flops, bits]."""
    runs = runs_of(plan, arm, seed, results)
    longest = runs[max(runs)][1]
    return {
        "name": arm.name,
        "seed": seed,
        "curve": [[n, n / arm.tokens_per_second, n * arm.flops_per_token, bits] for n, _, bits in longest.curve],
        "horizons": [
            {
                "horizon": horizon,
                "tokens": done.tokens,
                "seconds": done.tokens / arm.tokens_per_second,
                "flops": done.tokens * arm.flops_per_token,
                "bits_per_byte": done.bits_per_byte,
                "own_seconds": done.seconds,
                "run": f"jobs/{job.folder}",
            }
            for horizon, (job, done) in sorted(runs.items())
        ],
    }


def side(plan: Plan, arm: Arm, results: Results) -> dict[str, Any]:
    """Return what is known of an arm, and its bits per byte over seeds at each horizon."""
    tried = dict(arm.sweep)
    facts = ("name", "parameters", "active_parameters", "flops_per_token", "tokens_per_second", "rates", "lr_factor")
    horizons = []
    for horizon in plan.horizons:
        bits = [runs_of(plan, arm, seed, results)[horizon][1].bits_per_byte for seed in plan.seeds]
        deviation = statistics.stdev(bits) if len(bits) > 1 else None
        horizons.append({"horizon": horizon, "mean": statistics.fmean(bits), "stdev": deviation, "bits": bits})
    return {
        **{name: getattr(arm, name) for name in facts},
        "sweep": sorted(arm.sweep),
        "at_edge": at_edge(tried) is not None,
        "tokens_per_active_parameter": plan.tokens / arm.active_parameters,
        "horizons": horizons,
    }


def compared(plan: Plan, results: Results) -> list[Comparison]:
    """Return the comparisons: of the MoE with each twin, or of each arm with the first."""
    first, *others = (
        Side(
            arm.name,
            {
                seed: [(job_tokens(plan, job), done.bits_per_byte) for job, done in runs.values()]
                for seed in plan.seeds
                if (runs := runs_of(plan, arm, seed, results))
            },
            arm.tokens_per_second,
        )
        for arm in plan.standing
    )
    return [compare(first, other) if plan.twins else compare(other, first) for other in others]


def told(found: Comparison) -> dict[str, Any]:
    """Return a comparison with its words."""
    return {
        **dataclasses.asdict(found),
        "word": found.word,
        "difference": margin(found.horizons[-1]),
        "tokens_factor": spread(found.factor(found.tokens)),
        "seconds_factor": spread(found.factor(found.seconds)),
        "sentence": sentence(found),
    }
