"""A plan in words and tables, for a terminal."""

import shlex
from typing import Any

from moelet.console import table

GIB = 2**30
SHOWN = 6  # layouts of a cluster


def short(count: float) -> str:
    """Return a count as 950, 13.5K, 6.3M or 1.2B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:.0f}"


def hours(value: float | None) -> str:
    """Return hours in the unit that reads best."""
    if value is None:
        return "?"
    if value < 1:
        return f"{value * 60:.0f} min" if value >= 1 / 60 else f"{value * 3600:.0f} s"
    return f"{value:.1f} h" if value < 48 else f"{value / 24:.1f} days"


def megabytes(value: float) -> str:
    return f"{value:,.0f} MB" if value < 10_000 else f"{value / 1024:,.1f} GB"


def _sizes(found: dict[str, Any]) -> list[str]:
    parts = []
    for name, part in found["parameters_by_part"].items():
        used = f" ({short(part['active'])} active)" if part["active"] != part["parameters"] else ""
        parts.append(f"{name} {short(part['parameters'])}{used}")
    total, files = found["flops_per_token"], found["checkpoint_bytes"]
    flops = ", ".join(f"{name} {share / total:.0%}" for name, share in found["flops_by_part"].items())
    disk = {name: megabytes(count / 2**20) for name, count in files.items()}
    used = f"{found['active_parameters']:,} outside of the tables, {found['active_with_tables']:,} in all"
    rows = [
        ("parameters", f"{found['parameters']:,}"),
        ("a token uses", used),
        ("by part", ", ".join(parts)),
        ("FLOPs a token", f"{total / 1e6:,.1f}M to train on it: {flops}"),
        ("checkpoint", f"{disk['checkpoint']}, {disk['model']} of it the model; a run keeps up to {disk['run']}"),
    ]
    return table(f"{found['file']}, vocabulary {found['vocab_size']:,}", rows)


def _here(found: dict[str, Any]) -> list[str]:
    machine, rows = found["machine"], list[tuple[str, str]]()
    if found["why_not_here"] is not None:
        rows.append(("not tried", found["why_not_here"]))
    else:
        low, high = found["tokens_per_second_range"]
        made = found["calibration"]
        how = f"{low:,.0f} to {high:,.0f} in {made['steps']} steps, {made['seconds']:.0f} s, on {made['text']}"
        rows.append(("speed", f"{found['tokens_per_second']:,.0f} tokens/s ({how})"))
        rows.append(("training", f"{megabytes(found['memory_mb'])} at its most: {_parts(found['memory_by_part_mb'])}"))
    decoding, without = _parts(found["decoding_memory_by_part_mb"]), found["decoding_memory_without"]
    besides = "" if without is None else f", without {without}"
    rows.append(("decoding", f"{megabytes(found['decoding_memory_mb'])} at its most{besides}: {decoding}"))
    if found["tokens"] is not None:
        each = f"{found['tokens_per_active_parameter']:.1f} per active parameter"
        rows.append(("this run", f"{short(found['tokens'])} tokens, {each}: {hours(found['hours'])}"))
    enough = f"{short(found['enough_tokens'])} tokens, 20 per active parameter"
    rows.append(("enough", f"{enough}: {hours(found['hours_to_enough_tokens'])}"))
    return table(f"this machine: {machine['name']}, {machine['threads']} threads", rows)


def _parts(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,.0f}" for name, value in sorted(parts.items(), key=lambda part: -part[1]))


def _cards(found: dict[str, Any]) -> list[str]:
    lines = [f"{'card':<9} {'tokens/s':>22} {'this run':>10} {'memory':>9}  of"]
    for row in found["gpus"]:
        low, high = row["tokens_per_second_range"]
        rate = f"~{short(row['tokens_per_second'])} ({short(low)}-{short(high)})"
        fits = "" if row["fits"] else "  doesn't fit: lower train.batch_size"
        room = f"{megabytes(row['memory_mb']):>9}  {row['memory_gb_of_card']} GB{fits}"
        lines.append(f"{row['gpu']:<9} {rate:>22} {hours(row['hours']):>10} {room}")
    return ["other cards: " + found["gpus_rest_on"], *(f"  {line}" for line in lines)]


def _cluster(found: dict[str, Any]) -> list[str]:
    """Return one cluster's layouts, the fastest that fit first."""
    lines = []
    for row in found["layouts"][:SHOWN]:
        low, high = row["tokens_per_second_range"]
        rate = f"~{short(row['tokens_per_second'])} ({short(low)}-{short(high)})"
        step = row["computing_seconds"] + row["travelling_seconds"]
        travels = f"{row['travelling_seconds'] / step:.0%} of the time travels"
        fits = "" if row["fits"] else "  doesn't fit"
        name = f"data {row['data']}, shard {row['shard']}, expert {row['expert']}"
        lines.append(
            f"  {name:<28} {rate:>22} {hours(row['hours']):>10} {megabytes(row['memory_mb']):>9}  {travels}{fits}"
        )
    best, rows = found["layouts"][0], found["rows_each"]
    head = f"{found['count']} {found['gpu']}, an estimate: {rows} {'row' if rows == 1 else 'rows'} of a micro-step each"
    if found["idle_share"] > 0.01:
        head += f"; {found['idle_share']:.0%} of that is padding: make train.batch_size a multiple of {found['count']}"
    advice = f"  take --set parallel.shard={best['shard']} --set parallel.expert={best['expert']}"
    if not best["fits"]:
        advice = "  none fits: lower train.batch_size, or take more cards"
    return [head, *lines, advice]


def _proposals(found: dict[str, Any]) -> list[str]:
    lines = [f"for the time given, on {found['proposals_for']}:"]
    for number, row in enumerate(found["proposals"], 1):
        lines.append(
            f"  {number}. d_model {row['d_model']}: {short(row['parameters'])} parameters, "
            f"{short(row['active_parameters'])} active; {short(row['tokens'])} tokens, "
            f"{row['tokens_per_active_parameter']:.0f} per active parameter; {row['tokens_per_second']:,.0f} tokens/s, "
            f"{megabytes(row['memory_mb'])}, {hours(row['hours'])}"
        )
        sets = (part for change in (*found["changes"], *row["changes"]) for part in ("--set", change))
        if row["widest"]:
            lines.append("     (the widest that is tried: in that time a larger one would see enough tokens, too)")
        lines.append("     moelet train " + shlex.join([found["file"], *sets]))
    return lines


def _clusters(found: dict[str, Any]) -> list[str]:
    return [line for cluster in found["clusters"] for line in [*_cluster(cluster), ""]][:-1]


BLOCKS = {
    "sizes": _sizes,
    "here": _here,
    "cards": _cards,
    "clusters": _clusters,
    "proposals": _proposals,
}  # in the order of their making


def block(name: str, found: dict[str, Any]) -> str:
    """Return a part of the plan as text, given all that is known by the time it is said."""
    return "\n".join([*BLOCKS[name](found), ""])
