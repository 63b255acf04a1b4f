"""The arms of a study: one settings file, and for each arm the changes to it. Nothing here trains or measures.

Changes are written as for --set, whatever the settings are called.
"""

import itertools
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moelet.errors import UserError
from moelet.hparams import Hparams, read_hparams
from moelet.modelling import GPT
from moelet.sections import LENGTHS, ModelSettings

TABLES = ("embed.", "bigrams.", "lm_head")  # no active parameters: they grow with the vocabulary
UNIT = 32  # what kernels need expert widths to be a multiple of
SAME_TEXT = ("data", "tokenizer")  # sections that are one for all arms
SAME_RUN = {
    "run", "seed", "device", "eval_steps", "eval_tokens", "log_steps", "checkpoint_steps", "keep_checkpoints",
    "sample_prompt", "track", "memory_limit_gb", *LENGTHS,
}  # fmt: skip
SIZES = {"model.d_model", "model.d_ff", "model.d_embed", "model.n_heads", "model.shared_expert"}


class Size(NamedTuple):
    """What a token costs. `active` are the parameters it uses outside of the embedding and the output table."""

    parameters: int
    active: int
    flops_per_token: int


def size_of(settings: ModelSettings, vocab_size: int) -> Size:
    """Return a model's size without making it."""
    with torch.device("meta"):
        model = GPT(settings, vocab_size)
    total, active = 0, 0.0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        used = settings.top_k / settings.n_experts if ".mlp.experts." in name else 1.0
        active += 0 if name.startswith(TABLES) else parameter.numel() * used
    return Size(total, round(active), model.flops_per_token(settings.max_length))


def dense_shape(width: int) -> dict[str, Any]:
    """Return what is another in a dense model of this width than in an MoE."""
    return {"n_experts": 1, "top_k": 1, "shared_expert": 0, "selection_bias": False, "d_ff": width}


def twin_changes(width: int) -> list[str]:
    """Return the changes that make an MoE's settings those of a dense model of this width."""
    shape = [f"model.{name}={json.dumps(value)}" for name, value in dense_shape(width).items()]
    return [*shape, "balance.bias_rate=null"]


def twins(model: ModelSettings) -> dict[str, list[str]]:
    """Return the MoE and its dense twins of equal active and of equal total width, as changes to its settings.

    Raises UserError where the settings are dense.
    """
    if model.n_experts == 1:
        raise UserError(
            "model.n_experts is 1. A study without --vary or --arm compares a mixture of experts with its dense twins. "
            "Set model.n_experts and model.top_k, or say what to compare with --vary or --arm."
        )
    return {
        "moe": [],
        "dense-active": twin_changes(active_width(model)),
        "dense-total": twin_changes(full_width(model)),
    }


def active_width(model: ModelSettings) -> int:
    """Return the width of the feed-forward layer that a token of the MoE uses."""
    return model.top_k * model.expert_width + model.shared_expert


def full_width(model: ModelSettings) -> int:
    """Return the width of all experts together."""
    return model.d_ff + model.shared_expert


def varied(options: Sequence[str]) -> dict[str, list[str]]:
    """Return the arms of --vary K=A,B options: all combinations, the first of all first, each with its changes.

    Their names leave out settings of one value, and sections where the rest says enough: "optimizer=muon, lr=0.01".
    """
    choices: list[list[str]] = []
    for option in options:
        name, equals, text = option.partition("=")
        values = split_values(text)
        if not equals or "" in values:
            raise UserError(f"--vary {option!r} has no setting and values. Write --vary section.key=value,value.")
        choices.append([f"{name}={value}" for value in values])
    shown = [k for k, changes in enumerate(choices) if len(changes) > 1] or range(len(choices))
    keys = [choices[k][0].partition("=")[0].rpartition(".")[2] for k in shown]
    plain = len(set(keys)) == len(keys)
    found = {}
    for changes in itertools.product(*choices):
        parts = [changes[k].partition(".")[2] if plain else changes[k] for k in shown]
        found[", ".join(parts)] = list(changes)
    return found


def split_values(text: str) -> list[str]:
    """Return the parts of `text` between commas, but for commas inside of brackets or quotes.

    "[0.9,0.95],[0.9,0.99]" has two parts.
    """
    parts, depth, quoted = [""], 0, False
    for character in text:
        quoted ^= character == '"'
        if not quoted:
            depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def named(options: Sequence[str]) -> dict[str, list[str]]:
    """Return the arms of --arm "NAME: K=V K=V" options, after `base`, which changes nothing."""
    arms: dict[str, list[str]] = {"base": []}
    for option in options:
        name, colon, text = (part.strip() for part in option.partition(":"))
        try:
            changes = shlex.split(text)
        except ValueError as error:
            raise UserError(f"--arm {option!r} can't be split into changes ({error}). Close the quotes.") from None
        if not (colon and name and changes):
            raise UserError(
                f'--arm {option!r} has no name and changes. Write --arm "name: section.key=value section.key=value".'
            )
        if name in arms:
            raise UserError(
                f"two arms are called {name!r}. Each needs a name of its own ('base' is the file as it is)."
            )
        arms[name] = changes
    return arms


def refuse_unfair(arms: Mapping[str, Sequence[str]], sized: bool) -> None:
    """Raise UserError for an arm that would read another text, be another run, or, where `sized`, another size than
    the time budget chooses.
    """
    for name, changes in arms.items():
        for change in changes:
            setting = change.partition("=")[0]
            section, _, key = setting.partition(".")
            why = None
            if section in SAME_TEXT or (section == "train" and key in SAME_RUN):
                why = "all arms read one text, in one order, for the same tokens. Set it for all, with --set"
            elif sized and setting in SIZES:
                why = "--time-budget chooses widths itself. Leave it out, or give the length in train.train_tokens"
            if why is not None:
                raise UserError(f"arm {name!r} sets {setting}, but {why}.")


def arm_settings(file: Path, changes: Sequence[str], arms: Mapping[str, Sequence[str]]) -> dict[str, Hparams]:
    """Return each arm's settings. Raises UserError naming the arm whose changes don't fit."""
    found = {}
    for name, own in arms.items():
        try:
            found[name] = read_hparams(file, [*changes, *own])
        except UserError as error:
            raise UserError(f"arm {name!r}: {error}" if own else str(error)) from None
    return found


def folder_names(names: Sequence[str]) -> list[str]:
    """Return a name for each arm's folder, made of plain characters, all different."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^\w.=-]+", "-", name, flags=re.ASCII).strip(".-")[:60] or "arm"
        numbered = (f"{plain}-{k}" for k in itertools.count(2))
        found.append(next(folder for folder in itertools.chain([plain], numbered) if folder not in found))
    return found


def rate_shift(model: ModelSettings, width: int) -> float:
    """Return the power of 2 that a model's learning rates are tried around when it is brought to d_model `width`.

    About the root of the ratio: between the 1 of tables and norms and the whole ratio of matrices under Adam (Yang et
    al. 2022). From 512 to 32 the best was 8 or more after 0.2M tokens (docs/prove.md), so it is no more than a start.
    """
    return 2.0 ** round(math.log2(model.d_model / width) / 2)


def scaled(model: ModelSettings, width: int) -> list[str]:
    """Return the changes that bring a model to d_model `width`, everything else in proportion.

    Expert widths stay multiples of what kernels need, heads as wide as they were, or 32.
    """

    def share(value: int) -> int:
        return max(1, round(value * width / model.d_model / UNIT)) * UNIT

    head = model.head_width if width % model.head_width == 0 else UNIT
    changes = {
        "d_model": width,
        "n_heads": width // head,
        "d_ff": share(model.expert_width) * model.n_experts,
        "d_embed": None if model.d_embed is None else min(share(model.d_embed), width),
        "shared_expert": share(model.shared_expert) if model.shared_expert else 0,
    }
    return [f"model.{name}={json.dumps(value)}" for name, value in changes.items()]
