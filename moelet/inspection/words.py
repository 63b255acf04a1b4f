"""What `moelet inspect` found of a run's experts, in sentences. It reads the plain result and measures nothing."""

from typing import Any

from moelet.health import RULES

NOTABLE = 0.03  # of an expert's tokens, below which a class isn't spoken of
STRONG = 1.5  # times its fair part, below which a preference isn't spoken of
Findings = dict[str, Any]


def chance_apart(found: Findings, pair: Findings) -> list[tuple[float, float] | None]:
    """Return for each layer how far apart random halves of either text of a pair are: the larger mean, and the largest
    of all. None where a text is too short to be halved.
    """
    halves = [found["apart"]["halves"][name] for name in pair["texts"]]
    return [
        None if a is None or b is None else (max(a[0], b[0]), max(a[1], b[1])) for a, b in zip(*halves, strict=True)
    ]


def sentences(found: Findings) -> list[str]:
    """Return what stands out, in words."""
    told = [_told_of_load(found), _told_of_tokens(found), *_told_of_classes(found)]
    told += [_told_of_texts(found, pair) for pair in found["apart"]["pairs"]]
    return [*told, *_told_of_absence(found), *_told_of_checkpoints(found)]


def _told_of_load(found: Findings) -> str:
    loads = [load for layer in found["layers"] for load in layer["load"]]
    dead, starving = (sum(len(layer[f"{kind}_experts"]) for layer in found["layers"]) for kind in ("dead", "starving"))
    if not starving:
        return f"All {len(loads)} experts are used: from {min(loads):.2f} to {max(loads):.2f} of the fair share."
    return (
        f"{starving} of {len(loads)} experts get less than {RULES['load'].alarm} of the fair share, {dead} of them "
        f"nothing; the busiest gets {max(loads):.2f} times it."
    )


def _told_of_tokens(found: Findings) -> str:
    known = [
        (layer["told_by_token"], k) for k, layer in enumerate(found["layers"]) if layer["told_by_token"] is not None
    ]
    if not known:
        return "The text is too short to say how far the token itself decides."
    (low, worst), (high, best) = min(known), max(known)
    guess = found["layers"][best]["told_by_guess"]
    return (
        f"The token itself tells its first expert in {high:.0%} of cases in layer {best} (naming the most common one: "
        f"{guess:.0%})" + (f" and in {low:.0%} in layer {worst}." if worst != best else ".")
    )


def _told_of_classes(found: Findings, most: int = 3) -> list[str]:
    """Return the strongest preferences of experts for a class of tokens, no more than one an expert."""
    best = []
    for k, layer in enumerate(found["layers"]):
        for e, expert in enumerate(layer["experts"]):
            shares = expert["class_share"]
            kinds = [(expert["class_lift"][name], name) for name in shares if shares[name] >= NOTABLE]
            best += [(times, name, k, e, shares[name]) for times, name in [max(kinds)]] if kinds else []
    ranked = [entry for entry in sorted(best, reverse=True) if entry[0] > STRONG][:most]
    told = [
        f"{name} {times:.1f}x in layer {k}'s expert {e} ({share:.0%} of its tokens)"
        for times, name, k, e, share in ranked
    ]
    return [f"Strongest preferences: {'; '.join(told)}."] if told else []


def _told_of_texts(found: Findings, pair: Findings) -> str:
    a, b = pair["texts"]
    between, layer = max((value, k) for k, value in enumerate(pair["layers"]))
    chance = chance_apart(found, pair)[layer]
    if chance is None:
        return f"{a} and {b} are {between:.4f} bits apart in layer {layer}; one is too short to say what chance does."
    said = f"{between:.4f} bits in layer {layer}, where random halves of one text differ by {chance[0]:.4f}"
    if between > chance[1]:
        return f"{a} and {b} are routed apart: {said}."
    return f"{a} and {b} are not told apart: {said}, at most {chance[1]:.4f}."


def _told_of_absence(found: Findings) -> list[str]:
    rises = [
        (rise, text["text"], k, e)
        for text in found["without"]
        for k, layer in enumerate(text["layers"])
        for e, rise in enumerate(layer["rise"])
    ]
    if not rises:
        return []
    (low, _, k, e), (high, text, most_k, most_e) = min(rises), max(rises)
    on = f" on {text}" if len(found["without"]) > 1 else ""
    return [
        f"Missed most when switched off: layer {most_k}'s expert {most_e}, {high:+.4f} bits per byte{on}; least: layer "
        f"{k}'s expert {e}, {low:+.4f}."
    ]


def _told_of_checkpoints(found: Findings) -> list[str]:
    if not found["checkpoints"]:
        return []
    last = found["checkpoints"][-1]
    (a, b), mean = last["steps"], sum(last["agreement"]) / len(last["agreement"])
    chance = sum(last["chance"]) / len(last["chance"])
    return [f"Between steps {a:,} and {b:,}, {mean:.0%} of all choices stayed the same (by chance: {chance:.0%})."]
