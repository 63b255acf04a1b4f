"""`moelet plan`: what a run will cost, before it starts, from its settings alone.

Sizes are counted by `moelet.foresee.sizes`, this machine is measured by `rehearsal`, other cards are estimated by
`cards`, sizes for a time are found by `proposals`; here they become one result.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moelet.console import Progress
from moelet.decoding import decodes, decoding_dtype
from moelet.errors import UserError
from moelet.foresee.cards import BASIS, Card, Simulations, chosen, estimate
from moelet.foresee.clusters import on_many, parted
from moelet.foresee.page import block
from moelet.foresee.proposals import Pace, Search
from moelet.foresee.rehearsal import MIB, least_decoding, rehearse
from moelet.foresee.sizes import FLOAT, empty_model, files, flops, parameters
from moelet.hparams import Hparams, read_hparams
from moelet.modelling import GPT
from moelet.precision import choose_device, choose_dtype
from moelet.session import FORWARD_SHARE
from moelet.speed.bench import machine
from moelet.study.study import ACTIVE_TOKENS
from moelet.tokenizer import Tokenizer
from moelet.train import check, make_tokenizer

BRIEF_SECONDS = 4.0  # that each size of a search is tried for


class Request(NamedTuple):
    """What a person asks for."""

    file: Path
    changes: list[str]
    hours: float | None = None
    gpus: str | None = None
    seconds: float = 20.0  # of calibration; 0: none


def plan(request: Request, progress: Progress, tell: Callable[[str], None]) -> dict[str, Any]:
    """Return all that can be said of the run, and tell each part of it as soon as it is known.

    Raises UserError for what doesn't fit.
    """
    single, clusters = parted(request.gpus)
    hparams, cards = read_hparams(request.file, request.changes), chosen(single)
    if request.hours is not None and not 0 < request.hours < 1e6:
        raise UserError(f"--hours is {request.hours:g}. It must be above 0. Give hours such as 4, or 0.5.")
    anywhere = hparams.train.model_copy(update={"device": "cpu", "precision": "auto"})
    check(hparams.model_copy(update={"train": anywhere}), None)  # names; what isn't here is no fault
    vocab_size = _vocabulary(hparams)
    model = empty_model(hparams.model, vocab_size)
    found: dict[str, Any] = {"file": str(request.file), "changes": request.changes, "vocab_size": vocab_size}
    found |= parameters(hparams.model, model) | flops(hparams.model, model)
    found["checkpoint_bytes"] = files(hparams, model)
    tell(block("sizes", found))
    found |= _here(request, hparams, vocab_size, progress)
    found |= decoding_memory(hparams, model, found["why_not_here"])
    found |= _length(hparams, found)
    tell(block("here", found))
    progress.say("other cards, from a step simulated operation by operation")
    simulations = Simulations(hparams, vocab_size)
    found |= {"gpus": [_with_hours(estimate(card, simulations), found) for card in cards], "gpus_rest_on": BASIS}
    found["clusters"] = [on_many(count, card, hparams, vocab_size, model) for count, card in clusters]
    for cluster in found["clusters"]:
        cluster["layouts"] = [_with_hours(row, found) for row in cluster["layouts"]]
    tell(block("cards", found))
    if clusters:
        tell(block("clusters", found))
    found["settings"] = hparams.model_dump(mode="json")
    found["proposals"] = []
    if request.hours is not None:
        found |= _proposals(request, found, cards[0] if request.gpus else None, progress)
        tell(block("proposals", found))
    return found


def _vocabulary(hparams: Hparams) -> int:
    """Return the rows of the tables. No data is needed for that, but for a tokenizer's own file."""
    if hparams.model.vocab_size is not None:
        return hparams.model.vocab_size
    if hparams.tokenizer.file is not None:
        return Tokenizer.load(hparams.tokenizer.file).vocab_size
    if hparams.data.source == "prepared":
        with suppress(UserError):  # not prepared yet
            return make_tokenizer(hparams).vocab_size
    return hparams.tokenizer.vocab_size


def _here(request: Request, hparams: Hparams, vocab_size: int, progress: Progress) -> dict[str, Any]:
    """Return what the run's first steps were like on this machine; without them, why."""
    found = ("tokens_per_second", "tokens_per_second_range", "memory_mb", "memory_by_part_mb", "calibration")
    nothing = dict.fromkeys(found)
    try:
        device = choose_device(hparams.train.device)
        choose_dtype(hparams.train.precision, device)
    except UserError as error:
        return {**nothing, "machine": machine(torch.device("cpu")), "why_not_here": str(error)}
    if request.seconds == 0:
        return {**nothing, "machine": machine(device), "why_not_here": "--seconds is 0"}
    progress.say(f"this machine: the run's first steps, {request.seconds:g} s of them")
    made = rehearse(hparams, vocab_size, request.seconds)
    return {
        "tokens_per_second": made.tokens_per_second,
        "tokens_per_second_range": [made.slowest, made.fastest],
        "memory_mb": made.peak_mb,
        "memory_by_part_mb": made.parts_mb,
        "calibration": {name: getattr(made, name) for name in ("batch_size", "seconds", "steps", "text")},
        "machine": machine(device),
        "why_not_here": None,
    }


def decoding_memory(hparams: Hparams, model: GPT, why_not_here: str | None) -> dict[str, Any]:
    """Return the memory of `moelet generate` with one prompt: at its most while weights are read, or in a long text.

    `decoding_memory_without` says what isn't in it.
    """
    s, count = hparams.model, sum(parameter.numel() for parameter in model.parameters())
    weights, cache = count * FLOAT / MIB, 2 * s.n_layers * s.d_model * s.max_length * FLOAT / MIB
    parts = {"weights": weights, "keys and values": cache}
    without: str | None = "CUDA's own context"
    if choose_device("auto").type == "cpu":
        copied = decodes(s) and decoding_dtype() == torch.bfloat16
        copy = weights / 2 if copied else 0.0
        parts["weights once more: read from the file, then in the format of decoding"] = max(weights - cache, copy)
        without = None if why_not_here is None else "Python, torch and buffers, which weren't tried"
        if without is None:
            parts["Python, torch, buffers"] = least_decoding(hparams)
    found = {"decoding_memory_mb": sum(parts.values()), "decoding_memory_by_part_mb": parts}
    return {**found, "decoding_memory_without": without}


def _length(hparams: Hparams, found: dict[str, Any]) -> dict[str, Any]:
    """Return the tokens of the run, and the hours that they take here with its evaluations."""
    train, rate = hparams.train, found["tokens_per_second"]
    a_step = (train.global_batch_size or sum(hparams.micro_batches)) * hparams.model.max_length
    tokens = train.train_tokens
    if train.time_budget is not None:
        tokens = None if rate is None else int(rate * train.time_budget)
    elif train.train_steps is not None:
        tokens = train.train_steps * a_step
    evaluated = 0
    if tokens is not None:
        steps = -(-tokens // a_step)
        evaluated = -(-steps // (train.eval_steps or steps)) * train.eval_tokens
    enough = ACTIVE_TOKENS * found["active_parameters"]
    return {
        "tokens": tokens,
        "evaluated_tokens": evaluated,
        "hours": _hours(rate, tokens, evaluated),
        "tokens_per_active_parameter": None if tokens is None else tokens / found["active_parameters"],
        "enough_tokens": enough,
        "hours_to_enough_tokens": _hours(rate, enough, 0),
    }


def _hours(rate: float | None, tokens: int | None, evaluated: int) -> float | None:
    return None if rate is None or tokens is None else (tokens + FORWARD_SHARE * evaluated) / rate / 3600


def _with_hours(row: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Return a card's row with the hours of the whole run there."""
    return row | {"hours": _hours(row["tokens_per_second"], found["tokens"], found["evaluated_tokens"])}


def _proposals(request: Request, found: dict[str, Any], card: Card | None, progress: Progress) -> dict[str, Any]:
    """Return sizes for the hours asked for, here or on the card named first."""

    def here(hparams: Hparams) -> Pace:
        made = rehearse(hparams, found["vocab_size"], BRIEF_SECONDS)
        progress.say(f"  d_model {hparams.model.d_model}: {made.tokens_per_second:,.0f} tokens/s")
        return Pace(made.tokens_per_second, made.peak_mb)

    def there(hparams: Hparams) -> Pace:
        assert card is not None
        row = estimate(card, Simulations(hparams, found["vocab_size"]))
        return Pace(row["tokens_per_second"], row["memory_mb"])

    rate = found["tokens_per_second"] if card is None else found["gpus"][0]["tokens_per_second"]
    if rate is None:
        raise UserError(
            f"--hours needs the speed of this machine, and there is none ({found['why_not_here']}). Give --seconds 20, "
            "or a card with --gpus."
        )
    where = "this machine" if card is None else f"{card.name}, an estimate"
    progress.say(f"sizes for {request.hours:g} hours on {where}")
    assert request.hours is not None
    search = Search(request.file, request.changes, found["vocab_size"], request.hours, there if card else here)
    return {"proposals": search.find(rate, found["flops_per_token"]), "proposals_for": where}
