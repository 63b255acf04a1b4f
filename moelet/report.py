"""The report of a run: a loss curve fit to publish and one self-contained page.

Reads `hparams.json` and `metrics.jsonl` of a run folder and nothing else, so it works on a run that is training, was
interrupted or came from another machine, and needs no torch. What the page shows is untrusted (a model writes the
samples): every text is escaped, and the page's content policy forbids scripts and anything from outside.
"""

import errno
import html
import json
import math
import os
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelet.errors import UserError
from moelet.hparams import Hparams, read_hparams_inside
from moelet.inspection.charts import experts_section
from moelet.page import (
    INK,
    MUTED,
    PAPER,
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
    page,
    short,
)
from moelet.storage.intake import lines_inside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class _Run:
    """A run folder, read: at least one row, each with step and tokens."""

    path: Path
    hparams: Hparams
    rows: list[dict[str, Any]]
    tokens: float

    def points(self, key: str) -> list[Point]:
        """Return (tokens, value) wherever the value is finite."""
        return [(row["tokens"], v) for row in self.rows if math.isfinite(v := as_number(row.get(key)))]

    def last(self, key: str) -> Any:
        """Return the newest value that isn't null, NaN or infinite; None if there is none."""
        values = (row.get(key) for row in reversed(self.rows))
        return next((v for v in values if v is not None and (not isinstance(v, float) or math.isfinite(v))), None)

    def median(self, key: str) -> float | None:
        return statistics.median(values) if (values := [v for _, v in self.points(key)]) else None

    @property
    def shape(self) -> str:
        model = self.hparams.model
        experts = f"{model.n_experts} experts top-{model.top_k}" if model.n_experts > 1 else "dense"
        layers = f"{model.n_layers} layer{'s' * (model.n_layers > 1)} × {model.d_model}"
        return f"{layers}, {experts}, {short(self.tokens)} tokens"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the rows of the run's `metrics.jsonl`, without a last line that a crash cut short.

    Raises UserError when there is no such file, or a line before the last is damaged.
    """
    path = Path(run) / "metrics.jsonl"
    try:
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        lines = [line.rstrip("\0") for line in lines_inside(Path(run), path.name)]
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}). A run folder holds it. Give a run folder.") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # ValueError also for a number of more than 4300 digits
            row = None
        if isinstance(row, dict) and math.isfinite(as_number(row.get("step")) + as_number(row.get("tokens"))):
            rows.append(row)
        elif line.strip() and number < len(lines):
            raise UserError(f"{path}, line {number} is damaged: it isn't JSON with step and tokens. Delete that line.")
    return rows


def smooth(values: Sequence[float], beta: float = 0.98) -> list[float]:
    """Return the exponential moving average of `values`, without its bias towards 0 at the start.

    Value t is the sum of beta^(t-i) x_i over i <= t, divided by the sum of the same weights. Values that aren't finite
    are passed over; before the first finite one the average is NaN. Source: Kingma and Ba 2015, section 3.
    """
    assert 0 <= beta < 1, f"beta is {beta}"
    average = weight = 0.0
    averages = []
    for value in values:
        if math.isfinite(value):
            average = beta * average + (1 - beta) * value
            weight = beta * weight + (1 - beta)
        averages.append(average / weight if weight else math.nan)
    return averages


def write_loss_curve(run: Path) -> Path:
    """Draw the run's `loss_curve.png`, 1600 x 900 pixels; return its path. UserError if `run` isn't a run folder."""
    path = Path(run) / "loss_curve.png"
    _loss_figure(_read_run(run)).savefig(path, format="png", dpi=200, metadata={"Software": None})
    return path


def write_report(run: Path) -> Path:
    """Write the run's `report.html`, one file that needs no network; return its path. UserError if it isn't a run."""
    read = _read_run(run)
    done = read.rows[-1]["step"]
    total = read.rows[-1].get("total_steps") or read.hparams.total_steps or done
    status = "finished" if done >= total else "unfinished"
    panels = "".join(as_svg(figure, label) for figure, label in _panels(read))
    body = (
        _tiles(read),
        as_section("Loss", as_svg(_loss_figure(read), "loss against tokens")),
        as_section("Training", f'<div class="panels">{panels}</div>'),
        *(part(read) for part in (_experts, _samples, _data_table, _settings)),
    )
    pill = f'<span class="pill {status}">{status}: step {done:,} of {total:,}</span>'
    path = read.path / "report.html"
    path.write_bytes(page("run", read.path.resolve().name, read.shape, pill, body))
    return path


def _read_run(run: Path) -> _Run:
    path = Path(run)
    rows = read_metrics(path)
    if not rows:
        raise UserError(f"{path / 'metrics.jsonl'} has no logged step. A report needs one. Train first.")
    return _Run(path, read_hparams_inside(path, "hparams.json"), rows, rows[-1]["tokens"])


def _loss_figure(run: _Run) -> "Figure":
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    dress(axes, run.tokens * 1.01)
    axes.set_ylabel("loss (nats per token)", color=MUTED)
    axes.set_title(run.shape, loc="left", color=INK, fontsize=13, fontweight="bold", pad=14)
    train, valid = run.points("loss"), run.points("val_loss")
    if not train:
        axes.text(0.5, 0.5, "no finite loss was logged", transform=axes.transAxes, ha="center", color=MUTED)
        return figure
    # The average follows a trend with a lag of its window, 1 / (1 - beta) points. A 16th of the curve is a lag that
    # the eye forgives; 50 points (beta 0.98) are enough to calm any noise; under 16 none.
    window = min(max(len(train) / 16, 1), 50)
    trend = list(zip((t for t, _ in train), smooth([v for _, v in train], 1 - 1 / window), strict=True))
    if window > 1:
        draw_line(axes, train, color=TRAIN, linewidth=0.9, alpha=0.3, label="training, each logged step")
    draw_line(axes, trend, color=TRAIN, linewidth=2.2, label="training, smoothed" if window > 1 else "training")
    if valid:
        draw_line(axes, valid, color=VALID, linewidth=1.2, marker="o", markeredgecolor=PAPER, label="validation")
    losses, ends = [v for _, v in train], [points[-1][1] for points in (trend, valid) if points]
    low, high = min([*losses, *(v for _, v in valid)]), max(sorted(losses)[-1 - len(losses) // 20], *ends)
    axes.set_ylim(low - 0.16 * (high - low or 1), high + 0.06 * (high - low or 1))
    _annotate(axes, run, trend, valid)
    axes.legend(frameon=False, loc="upper right", labelcolor=INK, fontsize=9.5, borderaxespad=0.2)
    return figure


def _annotate(axes: "Axes", run: _Run, trend: Sequence[Point], valid: Sequence[Point]) -> None:
    """Write the last values at the curves' ends, where the loss began if that is cut off, and an axis in bits per byte.

    Bits per byte are loss times a constant of the text, exact for the held-out text, the batches' median before.
    """
    from matplotlib.patheffects import withStroke

    style: dict[str, Any] = {"textcoords": "offset points", "path_effects": [withStroke(linewidth=3, foreground=PAPER)]}
    kind, key = ("validation", "val_loss") if run.points("val_bits_per_byte") else ("training", "loss")
    bits_key = key.replace("loss", "bits_per_byte")
    bits_at = dict(run.points(bits_key))
    ratios = [bits_at[t] / v for t, v in run.points(key) if v > 0 and bits_at.get(t, 0) > 0]
    ends = [("training", TRAIN, trend[-1])] + ([("validation", VALID, valid[-1])] if valid else [])
    for name, color, (x, y) in ends:
        bits = f"\n{run.last(bits_key):.3f} bits per byte" if ratios and name == kind else ""
        side: Any = ("bottom", 9) if (y, name) == max((end[2][1], end[0]) for end in ends) else ("top", -9)
        place: dict[str, Any] = {"ha": "right", "va": side[0], "fontsize": 10.5, "fontweight": "bold"}
        axes.annotate(f"{name} {y:.3f}{bits}", (x, y), (0, side[1]), color=color, **place, **style)
    if (first := run.points("loss")[0][1]) > (top := axes.get_ylim()[1]):
        x = next(t for t, v in trend if v <= top)
        place = {"xycoords": axes.get_xaxis_transform(), "va": "top", "fontsize": 9.5}
        axes.annotate(f"starts at {first:.2f}", (x, 1), (9, -2), color=MUTED, **place, **style)
    if ratios:
        factor = statistics.median(ratios)
        right = axes.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))  # type: ignore
        right.tick_params(colors=MUTED, length=0, labelsize=9.5, pad=5)
        right.spines["right"].set_visible(False)
        right.set_ylabel("bits per byte", color=MUTED, labelpad=8)


def _panels(run: _Run) -> Iterable[tuple["Figure", str]]:
    """Yield the small charts, each with its name: learning rate, gradient norm, throughput, loss scale, balance."""
    names = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens per second"}
    names |= {"loss_scale": "fp16 loss scale"} if run.last("loss_scale") else {}
    for key, name in (names | ({"balance_loss": "balance loss"} if run.last("expert_load") else {})).items():
        if not (points := run.points(key)):
            continue
        clip = run.hparams.optim.grad_clip if key == "grad_norm" else None
        figure = new_figure(4.6, 2.7)
        axes = figure.add_subplot()
        dress(axes, run.tokens * 1.01)
        axes.set_title(name, loc="left", color=INK, fontsize=11.5, fontweight="bold")
        draw_line(axes, points, color=TRAIN, linewidth=1.6)
        axes.set_ylim(0, max(sorted(v for _, v in points)[-1 - len(points) // 50], clip or 0) * 1.15 or 1)
        axes.yaxis.set_major_formatter(short)
        axes.locator_params(nbins=5)
        if clip:
            axes.axhline(clip, color=VALID, linewidth=1.2, linestyle="--")
            axes.text(run.tokens, clip, f"clipped above {clip:g}", color=VALID, fontsize=9.5, ha="right", va="bottom")
        yield figure, name


def _tiles(run: _Run) -> str:
    """Return the headline numbers; one that isn't known is left out."""
    keys = ("val_loss", "loss", "val_bits_per_byte", "gzip_bits_per_byte", "seconds")
    loss, trained, bits, gzip, seconds = map(run.last, keys)
    loads = [v for layer in run.last("expert_load") or [] for v in map(as_number, layer) if math.isfinite(v)]
    minutes, left = divmod(round(seconds or 0), 60)
    time = f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {left:02} s"
    tiles = [
        ("validation loss", "{:.3f}", loss, f"nats per token; perplexity {short(math.exp(min(loss or 0, 99)))}"),
        ("training loss", "{:.3f}", trained if loss is None else None, "nats per token, last step; no evaluation yet"),
        ("bits per byte", "{:.3f}", bits, "held out" + (f"; gzip -9 needs {gzip:.3f}" if gzip else "")),
        ("tokens", "{}", short(run.tokens), f"{run.rows[-1]['step']:,} steps"),
        ("training time", "{}", None if seconds is None else time, "evaluation not counted"),
        ("throughput", "{:,.0f}", run.median("tokens_per_second"), "tokens per second, median"),
        ("MFU", "{:.1%}", run.median("mfu"), "of the matrix rate measured here"),
        ("memory", "{:,.0f} MB", max((v for _, v in run.points("memory_mb")), default=None), "peak"),
        ("expert load", "{0[0]:.2f} to {0[1]:.2f}", (min(loads), max(loads)) if loads else None, "1 is a fair share"),
    ]
    known = ((name, form.format(value), note) for name, form, value, note in tiles if value is not None)
    body = "".join(f"<div><span>{name}</span><b>{value}</b><span>{note}</span></div>" for name, value, note in known)
    return f'<div class="tiles">{body}</div>'


def _experts(run: _Run) -> str:
    return experts_section(run.rows, run.hparams)


def _samples(run: _Run) -> str:
    items = []
    for row in (row for row in run.rows if isinstance(row.get("sample"), str)):
        loss = f"<br>validation loss {row['val_loss']:.3f}" if math.isfinite(as_number(row.get("val_loss"))) else ""
        head = f"<b>step {int(row['step']):,}</b><br>{short(row['tokens'])} tokens{loss}"
        items.append(f"<article><div>{head}</div><pre>{html.escape(row['sample'])}</pre></article>")
    prompt = run.hparams.train.sample_prompt
    note = f"Continuing <code>{html.escape(prompt)}</code>." if prompt else "Written from nothing, at each evaluation."
    return as_section("Samples", "".join(items), note) if items else ""


def _data_table(run: _Run) -> str:
    rows = [
        ("documents read, whole windows of all epochs", "{:,}", run.last("documents")),
        ("cut in pieces", "{:,}", run.last("documents_cut")),
    ]
    rows += [(f"skipped: {reason}", "{:,}", count) for reason, count in (run.last("skipped") or {}).items()]
    rows += [("padding", "{:.2%}", run.last("padding")), ("steps skipped", "{:,}", run.last("skipped_steps"))]
    known = [(name, form.format(value)) for name, form, value in rows if value is not None]
    form = "{:.1%} of documents, {:.1%} of characters; asked {:.1%}"
    for share in run.last("mix") or []:
        got = form.format(*(as_number(share.get(key)) for key in ("documents", "characters", "asked")))
        known.append((f"from {share.get('source')}", got))
    return as_section("Data", as_table(known)) if known else ""


def _settings(run: _Run) -> str:
    """Return the command lines to go on with, and every setting by section."""
    path = shlex.quote(str(run.path))
    lines = (f'moelet generate {path} --prompt "Once"', f"moelet evaluate {path}", f"moelet train --resume {path}")
    body = ""
    for name, values in run.hparams.model_dump(mode="json").items():
        fields = type(getattr(run.hparams, name)).model_fields
        rows = [(k, json.dumps(v, ensure_ascii=False), fields[k].description or "") for k, v in values.items()]
        body += f"<h3>{html.escape(name)}</h3>{as_table(rows)}"
    return as_section("Go on", f"<pre>{html.escape(chr(10).join(lines))}</pre>") + as_section("Settings", body)
