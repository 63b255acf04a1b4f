"""What a run's page shows of its experts: load, how sure the routers are, how large their scores, alarms."""

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moelet.health import RULES, Alarm, advice, sentence
from moelet.hparams import Hparams
from moelet.page import (
    INK,
    LOAD_COLORS,
    MUTED,
    TRAIN,
    VALID,
    Point,
    as_number,
    as_section,
    as_svg,
    as_table,
    draw_line,
    dress,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _load_figure(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Draw for each layer every expert's load over time as a band of colour, and its last load as a bar."""
    import numpy as np

    tokens, shape = [row["tokens"] for row in rows], [len(layer) for layer in rows[-1]["expert_load"]]
    figure = new_figure(9.6, 0.6 + len(shape) * min(0.5 + 0.14 * max(shape), 3))
    grid = figure.subplots(len(shape), 2, squeeze=False, sharex="col", width_ratios=(3, 1.25))
    widest = 1.2 * np.nanmax([2.0, *(as_number(v) for layer in rows[-1]["expert_load"] for v in layer)])
    for layer, (left, right) in enumerate(grid):
        load_NE = np.array([[as_number(v) for v in row["expert_load"][layer]] for row in rows])
        last = np.nan_to_num(load_NE[-1])
        when = np.linspace(0, tokens[-1], min(len(rows), 160))
        with np.errstate(divide="ignore"):
            doublings_EN = np.log2([np.interp(when, tokens, column) for column in load_NE.T])
        image = np.empty((*doublings_EN.shape, 4))
        image[..., :3] = np.where((doublings_EN < 0)[..., None], *LOAD_COLORS)
        image[..., 3] = np.nan_to_num(np.abs(doublings_EN)).clip(0, 1)
        left.imshow(image, aspect="auto", interpolation="nearest", extent=(0, tokens[-1] or 1, len(last) - 0.5, -0.5))
        right.barh(range(len(last)), last, color=[LOAD_COLORS[int(v >= 1)] for v in last], height=0.72, alpha=0.85)
        right.axvline(1, color=INK, linewidth=1.2, linestyle="--")
        for axes, width in ((left, tokens[-1]), (right, widest)):
            dress(axes, width)
            axes.grid(False)
            axes.set(ylim=(len(last) - 0.5, -0.5), yticks=range(0, len(last), math.ceil(len(last) / 8)))
            axes.xaxis.label.set_visible(layer == len(shape) - 1)
        left.set_ylabel(f"layer {layer}", color=MUTED)
        right.set_xlabel("last load (1 = fair share)")
        for expert, value in enumerate(last if len(last) <= 16 else ()):
            right.text(widest, expert, f"{value:.2f}", color=MUTED, fontsize=8.5, ha="right", va="center")
    return figure


def _router_figure(rows: Sequence[dict[str, Any]], key: str, title: str, limit: float) -> "Figure":
    """Draw one number of each layer's router over time, deeper layers darker, and where it would alarm if near."""
    layers: dict[int, list[Point]] = {}
    for row in rows:
        for layer, value in enumerate(map(as_number, row[key])):
            if math.isfinite(value):
                layers.setdefault(layer, []).append((row["tokens"], value))
    figure = new_figure(4.6, 2.7)
    axes = figure.add_subplot()
    dress(axes, rows[-1]["tokens"] * 1.01)
    axes.set_title(title, loc="left", color=INK, fontsize=11.5, fontweight="bold")
    deepest = max(layers, default=0)
    for layer, points in layers.items():
        label = f"layer {layer}" if layer in (0, deepest) or deepest < 6 else None
        draw_line(axes, points, color=TRAIN, linewidth=1.6, alpha=0.35 + 0.65 * layer / max(1, deepest), label=label)
    highest = max((value for points in layers.values() for _, value in points), default=1.0)
    axes.set_ylim(0, 1.15 * highest or 1)
    if limit < 1.15 * highest:
        axes.axhline(limit, color=VALID, linewidth=1.2, linestyle="--")
        axes.text(0, limit, "alarm", color=VALID, fontsize=9.5, va="bottom")
    axes.locator_params(nbins=5)
    axes.legend(frameon=False, loc="best", labelcolor=INK, fontsize=8.5, ncols=2)
    return figure


def _alarms(rows: Sequence[dict[str, Any]]) -> list[tuple[int, Alarm]]:
    """Return (step, alarm) for all that the rows hold; what isn't an alarm is left out."""
    found = []
    for row in rows:
        for item in row["alarms"] if isinstance(row.get("alarms"), list) else []:
            if isinstance(item, dict) and set(Alarm._fields) <= set(item) and item["kind"] in list(RULES):
                numbers = [as_number(item[key]) for key in ("layer", "value", "since")]
                if all(map(math.isfinite, numbers)):
                    found.append((int(row["step"]), Alarm(**{key: item[key] for key in Alarm._fields})))
    return found


def _alarm_table(rows: Sequence[dict[str, Any]], hparams: Hparams) -> str:
    alarms = _alarms(rows)
    if not alarms:
        return ""
    kinds = dict.fromkeys(alarm.kind for _, alarm in alarms)
    told = "".join(f"<p>{html.escape(advice(kind, hparams))}</p>" for kind in kinds)
    return f"<h3>Alarms</h3>{told}" + as_table([(f"step {step:,}", sentence(alarm)) for step, alarm in alarms])


def experts_section(all_rows: Sequence[dict[str, Any]], hparams: Hparams, heading: str = "Experts") -> str:
    """Return the page's part on the experts, empty for a dense run."""
    shape = next(([len(layer) for layer in row["expert_load"]] for row in all_rows[::-1] if row.get("expert_load")), [])
    rows = [row for row in all_rows if shape and [len(layer) for layer in row.get("expert_load") or []] == shape]
    if not rows:
        return ""
    note = "Load over time, and the last. Clear: the fair share. Full blue: half or less. Full orange: double or more."
    starving = rows[-1].get("starving_experts")
    if isinstance(starving, list) and all(math.isfinite(as_number(count)) for count in starving):
        note += f" Starving at the end, by the alarm's average: {sum(starving)} of {sum(shape)} experts."
    panels = ""
    for kind, title in (("entropy", "router entropy, share of the highest"), ("largest", "largest router score")):
        known = [row for row in rows if isinstance(row.get(f"router_{kind}"), list)]
        if known:
            panels += as_svg(_router_figure(known, f"router_{kind}", title, RULES[kind].alarm), title)
    loads = as_svg(_load_figure(rows), "load of each expert in each layer")
    body = loads + (f'<div class="panels">{panels}</div>' if panels else "") + _alarm_table(all_rows, hparams)
    return as_section(heading, body, note)
