"""What `moelet bench` found, as Markdown and as a picture. It reads the plain result and measures nothing."""

from pathlib import Path
from typing import Any

Result = dict[str, Any]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def title(result: Result) -> str:
    """Return the shape in one line."""
    s = result["shape"]
    experts = f"{s['n_experts']} experts top-{s['top_k']}" if s["n_experts"] > 1 else "dense"
    width = s["d_ff"] // s["n_experts"]
    return (
        f"{s['n_layers']} layers x {s['d_model']}, {s['n_heads']} heads, {experts} of width {width}, d_embed "
        f"{s['d_embed']}, vocabulary {s['vocab_size']}, dropout {s['dropout']}, batch {s['batch_size']} x "
        f"{s['max_length']}"
    )


def machine_line(result: Result) -> str:
    """Return what the figures were made on."""
    m, peaks = result["machine"], result["peaks"]
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in peaks["matrix_gflops"].items())
    memory = ", ".join(f"{way} {rate:.0f}" for way, rate in peaks["memory_gb_per_second"].items())
    software = f"torch {m['torch']}" + (f", transformers {m['transformers']}" if m["transformers"] else "")
    return (
        f"{m['name']} ({m['device']}), {m['cores']} cores, {m['threads']} threads, {software}. "
        f"Square products, GFLOP/s: {rates}. Memory, GB/s: {memory}."
    )


def training_table(result: Result) -> list[str]:
    """Return the sides of the comparison, ours first, and below them those that don't run."""
    head = ["variant", "allocator", "precision", "tokens/s", "moelet is x times as fast", "MFU", "peak MB"]
    head += ["MFLOP/token", "s to first step"]
    rows = [
        [
            r["variant"],
            r["allocator"],
            r["precision"],
            f"{r['tokens_per_second']:,.0f}",
            _number(r["speedup"], ".2f"),
            _number(r["mfu"], ".1%"),
            f"{r['peak_memory_mb']:,.0f}",
            f"{r['flops_per_token'] / 1e6:.1f}",
            f"{r['seconds_to_first_step']:.1f}",
        ]
        for r in result["rows"]
    ]
    failed = [f"- {name} doesn't run at this shape: {reason}" for name, reason in result["failed"].items()]
    left_out = [f"- left out: {reason}" for reason in result["left_out"]]
    tried = [
        f"- {name}, seconds a step in each precision: "
        + ", ".join(f"{p} {t:.2f}" if isinstance(t, float) else f"{p} failed ({t})" for p, t in formats.items())
        for name, formats in result["precisions"].items()
        if name not in result["failed"]
    ]
    remarks = [f"- {remark}" for remark in result["remarks"]]
    return [*_table(head, rows), "", *remarks, *failed, *left_out, *tried]


def limits_table(result: Result) -> list[str]:
    """Return the product rates, the bound they give and how near our step comes."""
    step = result["peaks"]["step"]
    rows = [
        [
            p["name"],
            f"{p['times']:g}",
            f"{p['batch']} x " * (p["batch"] > 1) + f"{p['m']} x {p['k']} x {p['n']}",
            *(f"{p['gflops'][way]:,.0f}" for way in ("forward", "dx", "dw")),
            f"{p['seconds'] * 1e3:.1f}",
        ]
        for p in step["products"]
    ]
    bound, reached = step["tokens_per_second"], result["rows"][0]["tokens_per_second"]
    head = ["product", "times", "m x k x n", "forward GFLOP/s", "dx", "dw", "ms a step"]
    sentence = (
        f"All products of a step at these rates: {bound:,.0f} tokens/s. moelet reaches {reached / bound:.0%} of it."
    )
    return [*_table(head, rows), "", sentence]


def breakdown_table(result: Result) -> list[str]:
    """Return the parts of our step."""
    found = result["breakdown"]
    rows = [
        [part, f"{ms:.1f}", f"{ms / found['profiled_ms']:.1%}"]
        for part, ms in [*found["parts_ms"].items(), ("sum", sum(found["parts_ms"].values()))]
    ]
    sentence = f"Under the profiler; without it a step takes {found['step_ms']:.1f} ms."
    return [*_table(["part", "ms", "share"], rows), "", sentence]


def decode_table(result: Result) -> list[str]:
    """Return decoding speed, and the bound of reading the weights."""
    decode, bound = result["decode"], result["peaks"]["decode_tokens_per_second"]
    rows = [
        [r["variant"], r["precision"], f"{r['tokens_per_second']:,.0f}", _number(r["speedup"], ".2f")]
        for r in decode["rows"]
    ]
    failed = [f"- {name} doesn't run: {reason}" for name, reason in decode["failed"].items()]
    reached = decode["rows"][0]["tokens_per_second"] / bound
    sentence = (
        f"Reading the active weights once a token, in {result['peaks']['precision']}: {bound:,.0f} tokens/s. "
        f"moelet reaches {reached:.0%} of it."
    )
    head = ["variant", "precision", "tokens/s", "moelet is x times as fast"]
    return [*_table(head, rows), "", sentence, "", *failed]


def page(result: Result) -> str:
    """Return everything as Markdown."""
    rounds = "One round:" if result["rounds"] == 1 else f"Medians of {result['rounds']} rounds, each"
    rounds += " our step and then the other side's."
    sections = {
        "# moelet bench": [f"{title(result)}.", "", machine_line(result)],
        "## Training": [rounds, "", *training_table(result)],
        "## The bound": limits_table(result),
        "## Where our step's time goes": breakdown_table(result),
        "## Decoding, batch 1": decode_table(result),
    }
    return "\n\n".join("\n".join([heading, "", *lines]).rstrip() for heading, lines in sections.items()) + "\n"


def write(result: Result, folder: Path) -> list[Path]:
    """Write the page and the picture into `folder`, named after the kind of device; return their paths."""
    text, picture = (folder / f"{result['machine']['device']}.{kind}" for kind in ("md", "png"))
    text.write_text(page(result), encoding="utf-8")
    draw(result, picture)
    return [text, picture]


def draw(result: Result, path: Path) -> None:
    """Write a bar for each side's tokens a second, ours in blue, and the bound as a line."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    rows = sorted(result["rows"], key=lambda r: r["tokens_per_second"])
    labels = [f"{r['variant']} ({r['precision']}, {r['allocator']} allocator)" for r in rows]
    rates = [r["tokens_per_second"] for r in rows]
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(labels, rates, color=["#0072b2" if r["variant"] == "moelet" else "#b3bac5" for r in rows])
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=8)
    bound = result["peaks"]["step"]["tokens_per_second"]
    axes.axvline(bound, color="#d55e00", linestyle="--", label=f"bound of the products: {bound:,.0f}")
    axes.set_xlabel("training tokens per second")
    axes.set_title(title(result), fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=150)
