"""The findings of a study as a picture and as one page. It reads the plain result and measures nothing."""

import html
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelet.console import duration
from moelet.page import GRID, INK, MUTED, SERIES, as_section, as_svg, as_table, as_wide_table, new_figure, page, short
from moelet.storage.disk import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Findings = dict[str, Any]
AXES = (("tokens", "training tokens"), ("flops", "training FLOPs"), ("seconds", "training seconds, by throughput"))


def write(findings: Findings, folder: Path) -> list[Path]:
    """Write prove.json, prove.png and prove.html into the study's folder; return the last two."""
    write_file(folder / "prove.json", (json.dumps(findings, indent=1) + "\n").encode())
    picture, path = folder / "prove.png", folder / "prove.html"
    figure(findings).savefig(picture, format="png", dpi=160, metadata={"Software": None})
    path.write_bytes(page_of(findings, folder))
    return [path, picture]


def figure(findings: Findings) -> "Figure":
    """Draw bits per byte at the end of each run, against tokens, FLOPs and seconds: mean and range over seeds."""
    from matplotlib.ticker import LogLocator, NullFormatter

    drawn = new_figure(13, 4.6 + 0.12 * len(findings["sides"]))
    panels = drawn.subplots(1, 3, sharey=True)
    for axes, (key, label) in zip(panels, AXES, strict=True):
        for k, side in enumerate(findings["sides"]):
            entries = [entry["horizons"] for entry in findings["arms"] if entry["name"] == side["name"]]
            x = [run[key] for run in entries[0]]
            bits = [[runs[h]["bits_per_byte"] for runs in entries] for h in range(len(x))]
            mean = [sum(values) / len(values) for values in bits]
            reach = [[m - min(v) for m, v in zip(mean, bits, strict=True)]]
            reach.append([max(v) - m for m, v in zip(mean, bits, strict=True)])
            style = {"marker": "osD^v<>"[k % 7], "markersize": 5, "linewidth": 1.8, "capsize": 3}
            name = side["name"] if len(side["name"]) <= 48 else f"{side['name'][:45]}..."
            axes.errorbar(x, mean, yerr=reach, color=SERIES[k % len(SERIES)], label=name, **style)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(short)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(facecolor="none", axisbelow=True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(MUTED)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.tick_params(colors=MUTED, length=0, labelsize=9.5, pad=5)
        axes.set_xlabel(label, color=MUTED)
    panels[0].set_ylabel("held-out bits per byte", color=MUTED)
    lines, names = panels[0].get_legend_handles_labels()
    columns = 2 if max(map(len, names)) > 30 else 4
    drawn.legend(lines, names, loc="outside lower left", ncols=columns, frameon=False, labelcolor=INK, fontsize=9.5)
    return drawn


def page_of(findings: Findings, folder: Path) -> bytes:
    """Return the page."""
    sentences = "".join(f"<p>{html.escape(found['sentence'])}</p>" for found in findings["comparisons"])
    count = f"{len(findings['sides'])} arms, {short(findings['tokens'])} tokens, {len(findings['seeds'])} seeds"
    note = "Each point is the end of a run with a schedule of its own; mean and range over seeds."
    sections = (
        f'<div class="verdict">{as_section("Verdict", sentences)}</div>',
        as_section("Loss", as_svg(figure(findings), "bits per byte against tokens, FLOPs and seconds"), note),
        as_section("Arms", arms_table(findings)),
        as_section("Differences", differences_table(findings), WHAT_DIFFERENCES_ARE),
        as_section("How it was done", method_table(findings)),
        as_section("Learning rates", rates_table(findings), WHAT_RATES_ARE) if len(findings["lr_grid"]) > 1 else "",
        as_section("Notes", "".join(f"<p>{html.escape(note)}</p>" for note in findings["notes"]))
        * bool(findings["notes"]),
        as_section("Again", f"<pre>{html.escape(chr(10).join(commands(findings, folder)))}</pre>"),
    )
    pill = f'<span class="pill finished">{count}</span>'
    return page("study", folder.resolve().name, "what each arm learns, from the same text", pill, sections)


WHAT_DIFFERENCES_ARE = (
    "In bits per byte, arm less base: negative is better. The interval is that of the mean of paired seeds, 95 % by "
    "Student's t; a difference within it is a tie. Factors say what the arm needs of tokens and wall time for the same "
    "loss where the base needs 1, read off between runs; beyond them stands &lt; or &gt;, never a guess."
)
WHAT_RATES_ARE = (
    "Bits per byte after an eighth of the tokens, with all learning rates of an arm times the factor, one seed. Short "
    "runs like higher rates than long ones, so the best for the whole run may be lower."
)


def notes_of(findings: Findings) -> str:
    """Return what was left out, and what went wrong."""
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in findings["notes"])
    return as_section("Notes", notes) if notes else ""


def _bits(horizon: dict[str, Any]) -> str:
    return f"{horizon['mean']:.4f}" + ("" if horizon["stdev"] is None else f" ± {horizon['stdev']:.4f}")


def arms_table(findings: Findings) -> str:
    """Return what each arm is, and its bits per byte: mean and standard deviation over seeds."""
    head = ["arm", "parameters", "active", "tokens per active", "MFLOP/token", "tokens/s", "learning rates"]
    head += [f"at {horizon:g} of the tokens" for horizon in findings["horizons"]]
    rows = [
        [
            side["name"],
            short(side["parameters"]),
            short(side["active_parameters"]),
            f"{side['tokens_per_active_parameter']:.1f}",
            f"{side['flops_per_token'] / 1e6:.2f}",
            f"{side['tokens_per_second']:,.0f} ({min(side['rates']):,.0f} to {max(side['rates']):,.0f})",
            f"x {side['lr_factor']:g}" + (", at the edge of what was tried" if side["at_edge"] else ""),
            *map(_bits, side["horizons"]),
        ]
        for side in findings["sides"]
    ]
    return as_wide_table(head, rows)


def differences_table(findings: Findings) -> str:
    """Return each comparison, at every horizon."""
    head = ["arm", "base", "verdict", "tokens factor", "time factor", "seconds per token"]
    head += [f"at {horizon:g}" for horizon in findings["horizons"]]

    def told(found: dict[str, Any]) -> str:
        margin = "" if found["half_width"] is None else f" ± {found['half_width']:.4f}"
        return f"{found['mean']:+.4f}{margin} ({found['word']})"

    rows = [
        [
            found["arm"],
            found["base"],
            found["word"],
            found["tokens_factor"],
            found["seconds_factor"],
            f"x {found['seconds_per_token']:.2f}",
            *map(told, found["horizons"]),
        ]
        for found in findings["comparisons"]
    ]
    return as_wide_table(head, rows)


def rates_table(findings: Findings) -> str:
    factors = sorted({factor for side in findings["sides"] for factor, _ in side["sweep"]})

    def cells(side: dict[str, Any]) -> Sequence[str]:
        tried = dict(map(tuple, side["sweep"]))
        return [("diverged" if tried[f] is None else f"{tried[f]:.4f}") if f in tried else "" for f in factors]

    head = ["arm", *(f"x {factor:g}" for factor in factors), "chosen"]
    return as_wide_table(head, [[s["name"], *cells(s), f"x {s['lr_factor']:g}"] for s in findings["sides"]])


def method_table(findings: Findings) -> str:
    """Return how the study was made."""
    machine, budget = findings["machine"], findings["time_budget"]
    tried = ", on an eighth of the tokens" if len(findings["lr_grid"]) > 1 else "; no others were tried"
    own = {
        side["name"]: [e["horizons"][-1]["own_seconds"] for e in findings["arms"] if e["name"] == side["name"]]
        for side in findings["sides"]
    }
    rows = [
        ("text", f"the same for all arms, in the same order for a seed; {findings['epochs']:.2f} epochs of it"),
        ("seeds", ", ".join(map(str, findings["seeds"]))),
        (
            "runs",
            f"one with a whole schedule for each of {', '.join(f'{h:g}' for h in findings['horizons'])} of the tokens",
        ),
        ("learning rates", f"x {', '.join(f'{f:g}' for f in findings['lr_grid'])}{tried}"),
        ("seconds", "tokens over the throughput measured before, all arms in turn"),
        ("longest run's own seconds", ", ".join(f"{n} {sum(v) / len(v):,.0f}" for n, v in own.items())),
        ("jobs at a time", f"{findings['jobs']}; threads of each: {findings['threads']}"),
        ("time", duration(findings["seconds"]) + ("" if budget is None else f" of {duration(budget)}")),
        ("machine", f"{machine['name']} ({machine['device']}), {machine['cores']} cores, torch {machine['torch']}"),
    ]
    return as_table(rows)


def commands(findings: Findings, folder: Path) -> list[str]:
    """Return the lines that go on with the study and make it again."""
    here, seeds = shlex.quote(str(folder)), len(findings["seeds"])
    plan = shlex.quote(str(folder / "plan.json"))
    return [
        f"moelet prove --run {here} --seeds {seeds + 2}    # more seeds, in the same folder",
        f"moelet prove --plan {plan} --run again    # the same runs anew: the same losses, on the same machine",
    ]
