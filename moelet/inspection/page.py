"""The page of `moelet inspect`: one file that needs no network. It reads the plain result and measures nothing.

Layers are shown one at a time by a script of its own, `page.js`; without it, all of them. What the page shows is
untrusted (texts, names): all of it is escaped, and no other script may run.
"""

import html
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelet.hparams import read_hparams_inside
from moelet.inspection.charts import experts_section
from moelet.inspection.tables import MARKS, Cell, doublings, heat_table, hue, matrix_figure, ratio, visible
from moelet.inspection.words import chance_apart
from moelet.metrics import METRICS_FILE
from moelet.page import INK, MUTED, TRAIN, VALID, as_section, as_svg, as_table, as_wide_table, dress, new_figure, page
from moelet.report import read_metrics
from moelet.storage.disk import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Findings = dict[str, Any]


def write(found: Findings, path: Path) -> Path:
    """Write the page; return its path."""
    write_file(path, page_of(found))
    return path


def page_of(found: Findings) -> bytes:
    """Return the page."""
    layers = range(found["n_layers"])
    run = Path(found["run"])
    rows = read_metrics(run) if (run / METRICS_FILE).exists() else []
    sections = (
        _tiles(found),
        f'<div class="verdict">{as_section("What stands out", _list(found["sentences"]))}</div>',
        _switch(found),
        as_section("The text, by expert", _legend(found) + _shaded(found), WHAT_SHADES_ARE),
        as_section("Load", _loads(found), WHAT_LOADS_ARE),
        as_section("What each expert takes", _each(layers, lambda k: _classes(found, k)), WHAT_CLASSES_ARE),
        as_section("The tokens of each expert", _each(layers, lambda k: _tokens(found, k)), WHAT_TOKENS_ARE),
        as_section("Texts apart", _apart(found), WHAT_APART_IS) if found["apart"]["pairs"] else "",
        as_section("Switched off", _without(found), WHAT_RISES_ARE) if found["without"] else "",
        as_section("Pairs and likeness", _each(layers, lambda k: _matrices(found, k)), WHAT_MATRICES_ARE),
        experts_section(rows, read_hparams_inside(run, "hparams.json"), "Over training"),
        as_section("Checkpoints", _checkpoints(found), WHAT_AGREEMENT_IS) if found["checkpoints"] else "",
        as_section("How it was done", _method(found)),
    )  # fmt: skip
    shape = f"{found['n_layers']} layers of {found['n_experts']} experts, {found['top_k']} chosen for each token"
    pill = f'<span class="pill finished">step {found["step"]:,}</span>'
    return page("inspect", run.resolve().name, shape, pill, sections, with_script="inspection/page")


WHAT_SHADES_ARE = (
    "The beginning of each text; a token's colour is its first expert in the chosen layer. Point at a token for all of "
    "its experts and their weights; choose an expert to see its tokens alone, underlined where it is not the first."
)
WHAT_LOADS_ARE = (
    "Each expert's share of the choices; 1 is the fair share. Entropy: how undecided the router is, of the highest "
    "possible. Told by the token: how often the token itself tells its first expert (learned on half of the rows, told "
    "on the other), and in brackets how often the most common expert is right."
)
WHAT_CLASSES_ARE = (
    "How often an expert takes tokens of a class, relative to how often it takes any: 1 is as often, 2 twice. The last "
    "row is each class's share of the text."
)
WHAT_TOKENS_ARE = (
    "Left, the tokens that an expert sees most, with their share of all it sees; right, those it prefers most, with "
    "how much more often than any token it takes them: of those that occur 20 times or more, the more frequent first."
)
WHAT_APART_IS = (
    "How different two texts' use of a layer's experts is: the Jensen-Shannon divergence, 0 where it is the same, 1 "
    "bit where they share none. Beside it, what random halves of one text's rows make: the mean and the largest of 20."
)
WHAT_RISES_ARE = (
    "What the loss rises by, in bits per byte, when one expert's score is minus infinity, so that its tokens go to the "
    "next best; nothing is trained anew. Clear where within two standard errors of 0; point at a number for its error."
)
WHAT_MATRICES_ARE = (
    "Left, how often two experts are chosen for the same token, relative to what their loads alone make of it. Right, "
    "how alike their outputs are: the mean cosine over the same tokens, which no order of their hidden units changes; "
    "1 is the same, 0 unrelated."
)
WHAT_AGREEMENT_IS = (
    "The share of choices that stayed the same from one checkpoint to the next on the same text; by chance in brackets."
)


def _list(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(sentence)}</li>' for sentence in sentences)}</ul>"


def _each(layers: Sequence[int], body: Callable[[int], str]) -> str:
    """Return a part for each layer, one of which is shown at a time."""
    return "".join(f'<div data-layer="{k}"><h3>layer {k}</h3>{body(k)}</div>' for k in layers)


def _tiles(found: Findings) -> str:
    layers = found["layers"]
    loads = [load for layer in layers for load in layer["load"]]
    starving = sum(len(layer["starving_experts"]) for layer in layers)
    told = [layer["told_by_token"] for layer in layers if layer["told_by_token"] is not None]
    entropy = [layer["entropy"] for layer in layers]
    rises = [rise for text in found["without"] for layer in text["layers"] for rise in layer["rise"]]
    apart = [value for pair in found["apart"]["pairs"] for value in pair["layers"]]
    tiles = [
        ("expert load", f"{min(loads):.2f} to {max(loads):.2f}", "1 is a fair share"),
        ("starving experts", f"{starving}", f"of {len(loads)}; {sum(len(k['dead_experts']) for k in layers)} dead"),
        ("router entropy", f"{min(entropy):.2f} to {max(entropy):.2f}", "of the highest, by layer"),
        *([("told by the token", f"{min(told):.0%} to {max(told):.0%}", "its first expert, by layer")] if told else []),
        *([("texts apart", f"{max(apart):.3f} bits", "in the layer where most")] if apart else []),
        *([("missed most", f"{max(rises):+.3f}", "bits per byte without one expert")] if rises else []),
    ]
    body = "".join(f"<div><span>{name}</span><b>{value}</b><span>{note}</span></div>" for name, value, note in tiles)
    return f'<div class="tiles">{body}</div>'


def first_layer(found: Findings) -> int:
    """Return the layer to show first: where texts are furthest apart, else the first."""
    pairs = found["apart"]["pairs"]
    return max(range(found["n_layers"]), key=lambda k: max(pair["layers"][k] for pair in pairs)) if pairs else 0


def _switch(found: Findings) -> str:
    buttons = "".join(f'<button type="button">{k}</button>' for k in range(found["n_layers"]))
    return f'<nav class="layers" data-first="{first_layer(found)}" hidden><span>layer</span>{buttons}</nav>'


def _legend(found: Findings) -> str:
    n_experts = found["n_experts"]
    buttons = "".join(
        f'<button type="button" disabled style="--hue:{hue(e, n_experts)}">expert {e}</button>'
        for e in range(n_experts)
    )
    return f'<div class="legend">{buttons}</div>'


def _shaded(found: Findings) -> str:
    layer, body = first_layer(found), ""
    for shown in found["shown"]:
        spans = []
        for t, piece in enumerate(shown["pieces"]):
            experts, weights = (
                "|".join(" ".join(f"{value:g}" for value in values[t]) for values in shown[key])
                for key in ("experts", "weights")
            )
            color = hue(shown["experts"][layer][t][0], found["n_experts"])
            name = html.escape("".join(MARKS.get(character, character) for character in piece))
            spans.append(
                f'<span style="--hue:{color}" title="{name}" data-experts="{experts}" data-weights="{weights}">'
                f"{visible(piece, in_place=True)}</span>"
            )
        title = f"<h3>{html.escape(shown['text'])}</h3>" if len(found["shown"]) > 1 else ""
        body += f'{title}<pre class="shaded">{"".join(spans)}</pre>'
    return body


def _loads(found: Findings) -> str:
    rows, several = [], len(found["texts"]) > 1
    for k, layer in enumerate(found["layers"]):
        told = layer["told_by_token"]
        others = ("", "") if told is None else (f"{layer['entropy']:.2f}", f"{told:.0%} ({layer['told_by_guess']:.0%})")
        cells = [ratio(load) for load in layer["load"]]
        rows.append((f"layer {k}", [*cells, *((text, 0.0, "") for text in others)]))
        for name, loads in layer["load_by_text"].items() if several else ():
            rows.append((f"on {name}", [*map(ratio, loads), ("", 0.0, ""), ("", 0.0, "")]))
    return heat_table(["expert", *map(str, range(found["n_experts"])), "entropy", "told by the token"], rows)


def _classes(found: Findings, k: int) -> str:
    names = found["classes"]

    def cell(expert: Findings, name: str) -> Cell:
        return *ratio(expert["class_lift"][name])[:2], f"{expert['class_share'][name] or 0:.1%} of its tokens"

    experts = found["layers"][k]["experts"]
    rows = [(f"expert {e}", [cell(expert, name) for name in names]) for e, expert in enumerate(experts)]
    total = sum(text["tokens"] for text in found["texts"])
    shares = [sum(text["tokens"] * text["classes"][name] for text in found["texts"]) / total for name in names]
    return heat_table(["", *names], [*rows, ("of the text", [(f"{share:.1%}", 0.0, "") for share in shares])])


def _tokens(found: Findings, k: int) -> str:
    def chips(tokens: Sequence[Findings], says: Callable[[Findings], str]) -> str:
        return "".join(
            f'<code title="{token["count"]:,} times">{visible(token["piece"])}<small>{says(token)}</small></code>'
            for token in tokens
        )

    rows = []
    for e, expert in enumerate(found["layers"][k]["experts"]):
        most = chips(expert["tokens_by_share"], lambda token: f"{token['share']:.1%}")
        liked = chips(expert["tokens_by_lift"], lambda token: f"{token['lift']:.1f}x")
        rows.append(f"<tr><td>expert {e}</td><td>{most}</td><td>{liked}</td></tr>")
    head = "<tr><th></th><th>sees most</th><th>prefers</th></tr>"
    return f'<div class="wide pieces"><table>{head}{"".join(rows)}</table></div>'


def _apart(found: Findings) -> str:
    """Return the distances of texts, layer by layer, as a picture and as a table for each pair."""
    tables = []
    for pair in found["apart"]["pairs"]:
        rows = []
        for k, (between, chance) in enumerate(zip(pair["layers"], chance_apart(found, pair), strict=True)):
            told = (
                ("", "", "") if chance is None else (f"{chance[0]:.4f}", f"{chance[1]:.4f}", _times(between, chance[0]))
            )
            rows.append((f"layer {k}", f"{between:.4f}", *told))
        title = f"<h3>{html.escape(pair['texts'][0])} and {html.escape(pair['texts'][1])}</h3>"
        head = ("", "bits apart", "halves, mean", "halves, largest", "times the mean")
        tables.append(title + as_svg(_apart_figure(found, pair), "distance by layer") + as_wide_table(head, rows))
    return "".join(tables)


def _times(value: float, base: float) -> str:
    return f"{value / base:,.0f}" if base else "more than can be said"


def _apart_figure(found: Findings, pair: Findings) -> "Figure":
    """Draw the distance of two texts in each layer as bars, and that of halves as a line across."""
    figure = new_figure(9.6, 2.6)
    axes = figure.add_subplot()
    dress(axes, 1)
    layers = range(found["n_layers"])
    axes.bar(layers, pair["layers"], color=TRAIN, width=0.55, label="the two texts")
    chance = [None if pair is None else pair[1] for pair in chance_apart(found, pair)]
    known = [(k, value) for k, value in enumerate(chance) if value is not None]
    for k, value in known:
        axes.plot(
            (k - 0.4, k + 0.4), (value, value), color=VALID, linewidth=2.2, label="halves of one, largest" * (k == 0)
        )
    axes.set(xlim=(-0.6, found["n_layers"] - 0.4), xticks=layers, xlabel="layer")
    axes.set_ylabel("bits", color=MUTED)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9.5)
    return figure


def _without(found: Findings) -> str:
    experts = list(map(str, range(found["n_experts"])))
    largest = max(abs(rise) for text in found["without"] for layer in text["layers"] for rise in layer["rise"]) or 1.0
    body = ""
    for text in found["without"]:
        rows = []
        for k, layer in enumerate(text["layers"]):
            cells = []
            for rise, error in zip(layer["rise"], layer["error"], strict=True):
                sure = error is not None and abs(rise) > 2 * error
                cells.append(
                    (f"{rise:+.4f}", rise / largest if sure else 0.0, "" if error is None else f"± {error:.4f}")
                )
            rows.append((f"layer {k}", cells))
        body += (
            f"<h3>{html.escape(text['text'])}, {text['tokens']:,} tokens</h3>{heat_table(['expert', *experts], rows)}"
        )
    return body


def _matrices(found: Findings, k: int) -> str:
    layer = found["layers"][k]
    panels = ""
    if layer["together"] is not None:
        strength = [[doublings(value) for value in row] for row in layer["together"]]
        panels += as_svg(matrix_figure(layer["together"], strength, "chosen together"), f"layer {k}: chosen together")
    alike = [[None if e == f else value for f, value in enumerate(row)] for e, row in enumerate(layer["similarity"])]
    strength = [[value or 0.0 for value in row] for row in alike]
    panels += as_svg(matrix_figure(alike, strength, "alike in output"), f"layer {k}: alike in output")
    return f'<div class="panels">{panels}</div>'


def _checkpoints(found: Findings) -> str:
    rows = [
        (
            f"{pair['steps'][0]:,} to {pair['steps'][1]:,}",
            *(f"{share:.1%} ({chance:.1%})" for share, chance in zip(pair["agreement"], pair["chance"], strict=True)),
        )
        for pair in found["checkpoints"]
    ]
    return as_wide_table(("steps", *(f"layer {k}" for k in range(found["n_layers"]))), rows)


def _method(found: Findings) -> str:
    texts = [
        (
            text["name"],
            f"{text['tokens']:,} tokens, {text['bytes']:,} bytes, {text['bits_per_byte']:.4f} bits per byte",
        )
        for text in found["texts"]
    ]
    command = f"moelet inspect {shlex.quote(found['run'])} --data SRC --data OTHER --json FILE"
    return as_table(texts) + f"<h3>with other text</h3><pre>{html.escape(command)}</pre>"
