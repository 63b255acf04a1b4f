"""What a page shows experts with: hues, heat tables, matrices, pieces of text. What they show is others' work."""

import html
import math
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moelet.page import INK, LOAD_COLORS, MUTED, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GOLDEN = 137.508  # degrees: the angle that keeps any number of hues apart
FEW = 12  # experts up to which hues divide the circle evenly, and matrices show their numbers
MARKS = {"\n": "↵", "\r": "␍", "\t": "⇥", " ": "·"}  # what can't be seen
Cell = tuple[str, float, str]  # its text, how strong its colour is, what pointing at it says


def hue(expert: int, n_experts: int) -> float:
    """Return the expert's hue in degrees."""
    return round((20 + expert * (360 / n_experts if n_experts <= FEW else GOLDEN)) % 360, 1)


def visible(piece: str, in_place: bool = False) -> str:
    """Return a piece as HTML: escaped, what can't be seen as MARKS or by its number; `in_place`, spaces stay spaces and
    lines end.
    """
    parts = []
    for character in piece:
        if character in MARKS and not (in_place and character == " "):
            parts.append(f"<i>{MARKS[character]}</i>" + "\n" * (in_place and character == "\n"))
        elif unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn"):
            parts.append(f"<i>U+{ord(character):04X}</i>")
        else:
            parts.append(html.escape(character))
    return "".join(parts)


def shade(amount: float) -> str:
    """Return the colour of a cell: blue below 0, orange above; clear at 0, full at 1."""
    red, green, blue = (round(255 * part) for part in LOAD_COLORS[int(amount > 0)])
    return f"background:rgba({red},{green},{blue},{min(1.0, abs(amount)) * 0.6:.2f})"


def heat_table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """Return a table of numbers on colours; each cell is its text, how strong its colour is, and what pointing says."""
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = ""
    for name, cells in rows:
        shaded = "".join(
            f'<td style="{shade(amount)}" title="{html.escape(title)}">{html.escape(text)}</td>'
            for text, amount, title in cells
        )
        body += f"<tr><td>{html.escape(name)}</td>{shaded}</tr>"
    return f'<div class="wide heat"><table><tr>{names}</tr>{body}</table></div>'


def doublings(times: float | None) -> float:
    """Return how strongly a ratio is coloured: a doubling or a halving is half of all."""
    if times is None:
        return 0.0
    return max(-1.0, math.log2(times) / 2) if times else -1.0


def ratio(times: float | None) -> Cell:
    return "" if times is None else f"{times:.2f}" if times < 9.995 else f"{times:.0f}", doublings(times), ""


def matrix_figure(
    values: Sequence[Sequence[float | None]], strength: Sequence[Sequence[float]], title: str
) -> "Figure":
    """Draw a matrix of experts against experts, with its numbers where there is room."""
    import numpy as np

    figure = new_figure(4.6, 4.3)
    axes = figure.add_subplot()
    amount_EE = np.array(strength)
    image = np.empty((*amount_EE.shape, 4))
    image[..., :3] = np.where((amount_EE > 0)[..., None], LOAD_COLORS[1], LOAD_COLORS[0])
    image[..., 3] = np.abs(amount_EE).clip(0, 1) * 0.7
    axes.imshow(image, interpolation="nearest")
    axes.set(facecolor="none")
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=MUTED, length=0, labelsize=9.5)
    axes.locator_params(integer=True)
    axes.set_title(title, loc="left", color=INK, fontsize=11.5, fontweight="bold")
    if len(values) <= FEW:
        axes.set(xticks=range(len(values)), yticks=range(len(values)))
        for e, row in enumerate(values):
            for f, value in enumerate(row):
                told = "" if value is None else f"{value:.2f}"
                axes.text(f, e, told, color=INK, fontsize=8.5, ha="center", va="center")
    return figure
