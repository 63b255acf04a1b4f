"""What the pages and pictures of a run are drawn with: colours, axes, lines, tables. What they show is others' work."""

import base64
import hashlib
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and vermilion of Okabe and Ito's palette, told apart by every kind of colour vision. In the page each becomes a
# CSS variable of this name, so that the charts follow the reader's light or dark theme.
INK, MUTED, GRID, PAPER, TRAIN, VALID = "#1d2330", "#697386", "#dfe3ea", "#fffffe", "#0072b2", "#d55e00"
# the other colours of that palette that are seen on light and dark alike, for lines beside those two
SERIES = (TRAIN, VALID, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
COLORS = {"ink": INK, "muted": MUTED, "grid": GRID, "paper": PAPER, "train": TRAIN, "valid": VALID}
LOAD_COLORS = ((0.0, 0.447, 0.698), (0.902, 0.451, 0.0))  # below and above the fair share; opacity says how far
POINTS = 1500  # of a line: more than the pixels it crosses, few enough that a week's run makes a page of 1 MB
Point = tuple[float, float]  # tokens, value


def as_number(value: Any) -> float:
    """Return a number as it is, anything else as NaN."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def short(value: float, _position: object = None) -> str:
    """Return three digits and a unit: 1_234_567 is "1.23M"."""
    rounded = float(f"{value:.3g}")
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(rounded) >= size:
            return f"{rounded / size:g}{unit}"
    return f"{rounded:g}"


def new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # not pyplot: no window, no global state; savefig picks Agg or SVG itself

    return Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)


def dress(axes: "Axes", right: float) -> None:
    """Give `axes` the look of the house and an x axis from 0 to `right`."""
    axes.set(xlim=(0, right or 1), facecolor="none", axisbelow=True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(colors=MUTED, length=0, labelsize=9.5, pad=5)
    axes.set_xlabel("training tokens", color=MUTED)
    axes.xaxis.set_major_formatter(short)


def draw_line(axes: "Axes", points: Sequence[Point], **style: Any) -> None:
    """Draw a line through about POINTS of `points`, the last included; a single one is a dot."""
    chosen = points[:: -(len(points) // POINTS + 1)][::-1]
    axes.plot(*zip(*chosen, strict=True), solid_capstyle="round", **{"marker": "o" if len(points) == 1 else ""} | style)


def as_svg(figure: "Figure", label: str) -> str:
    """Return the figure as an inline SVG whose colours are the page's variables and whose text is text."""
    import matplotlib

    buffer = io.StringIO()
    figure.set_facecolor("none")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):  # the salt makes ids repeatable
        figure.savefig(buffer, format="svg", dpi=150, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue().partition("<svg")[2]
    svg = re.sub(r' (xmlns(:\w+)?|width|height|version)="[^"]*"', "", svg, count=5)
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return f'<figure><svg role="img" aria-label="{html.escape(label)}"{svg}</figure>'


def as_table(rows: Iterable[Sequence[object]]) -> str:
    cells = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def as_wide_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of many columns, under their names."""
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = as_table(rows).removeprefix("<table>")
    return f'<div class="wide"><table><tr>{names}</tr>{body}</div>'


def as_section(title: str, body: str, note: str = "") -> str:
    return f"<section><h2>{title}</h2>{f'<p>{note}</p>' if note else ''}{body}</section>"


def page(kind: str, name: str, subtitle: str, pill: str, sections: Iterable[str], with_script: str = "") -> bytes:
    """Return a whole page; `name` and `subtitle` are plain text, the other parts HTML.

    `with_script` names a .js and a .css file, seen from this folder, for a page that can do something: that script
    alone runs, by its hash.
    """
    css, script, policy = _asset("report.css"), "", ""
    if with_script:
        css, code = css + _asset(f"{with_script}.css"), _asset(f"{with_script}.js")
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        script, policy = f"<script>{code}</script>", f"; script-src 'sha256-{digest}'"
    shown = {"name": html.escape(name), "subtitle": html.escape(subtitle), "pill": pill, "body": "".join(sections)}
    whole = PAGE.format(css=css, kind=kind, script=script, policy=policy, **shown)
    return whole.encode("utf-8", errors="replace")  # a text can hold half a surrogate pair


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; style-src 'unsafe-inline'; img-src data:{policy}">
<title>{name}: moelet {kind}</title><style>{css}</style></head><body><main>
<header><h1>{name}</h1><p>{subtitle}</p>{pill}</header>{body}</main>{script}</body></html>
"""
