"""A dense run becomes a Mixture of Experts that computes the same: every expert a copy of the dense layer.

The new run folder holds a checkpoint at step 0, so `moelet train --resume` trains it like any other run. Since all
experts of a layer are equal and a token's weights sum to 1, it doesn't matter at first which of them a token uses.
Source: Komatsuzaki et al. 2022, "Sparse Upcycling". Their router begins at random too.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moelet.errors import UserError
from moelet.hparams import Hparams, read_hparams_inside
from moelet.modelling import GPT
from moelet.state import build
from moelet.storage.checkpoint import HPARAMS, load, load_run_settings
from moelet.storage.manifest import read_state
from moelet.storage.saved_state import check_state
from moelet.train import begin_run, check, pinned, refuse_folder, with_commits_of

# settings of the model that don't change what the first step computes, dropout apart
FREE_MODEL_SETTINGS = {"dropout", "attention", "experts", "selection_bias"}
MATRICES = ("up_proj", "gate_proj", "down_proj")


class Upcycled(NamedTuple):
    """What was made of what."""

    hparams: Hparams
    step: int  # of the dense run's checkpoint
    dense_parameters: int
    parameters: int


def upcycle(
    dense: Path,
    run: Path,
    experts: int = 8,
    top_k: int = 2,
    noise: float = 0.0,
    seed: int = 0,
    changes: Sequence[str] = (),
    continue_data: bool = False,
) -> Upcycled:
    """Make the run folder `run` from the newest checkpoint of `dense` that verifies.

    `noise` is the standard deviation of what is added to each copy, relative to that of its matrix; `seed` is that of
    noise and router. The text is read from its start, or from where the dense run stood. Raises UserError when one
    can't be made of the other; nothing is written then.
    """
    refuse_folder(run)
    if not 0 <= noise < math.inf:
        raise UserError(
            f"--noise is {noise}. It is a share of each matrix's spread. Set it to 0 or more, such as 0.01."
        )
    dense_hparams, tokenizer = load_run_settings(dense)
    hparams = _upcycled_settings(dense, dense_hparams, experts, top_k, changes, continue_data)
    model, _, _, step = load(dense)
    training = build(hparams, tokenizer)
    training.model.load_state_dict(_upcycled_weights(model, hparams, noise, seed))
    if continue_data:
        state = read_state(dense, step)
        check_state(state, dense_hparams.model.n_layers, 1)
        training.cursor = state["cursor"]
    begin_run(run, training)
    return Upcycled(hparams, step, _count(model), _count(training.model))


def _count(model: GPT) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _upcycled_settings(
    dense: Path, old: Hparams, experts: int, top_k: int, changes: Sequence[str], continue_data: bool
) -> Hparams:
    """Return the settings of the new run: the dense run's, its experts, and `changes`, where they leave it possible."""
    if old.model.n_experts > 1:
        raise UserError(
            f"{dense} has {old.model.n_experts} experts already. Upcycling begins with a dense run, whose "
            "model.n_experts is 1. Give one, or train one: python -m moelet train --set model.n_experts=1"
        )
    if experts < 2 or not 1 <= top_k <= experts:
        raise UserError(
            f"--experts is {experts} and --top-k is {top_k}. There must be 2 experts or more, and a token uses between "
            f"1 and all of them. Set --top-k to at most {max(2, experts)}."
        )
    ours = {"n_experts": experts, "top_k": top_k, "normalize_top_k": True, "d_ff": experts * old.model.d_ff}
    given = [f"model.{name}={json.dumps(value)}" for name, value in ours.items()] + ["train.run=null"]
    if old.balance.loss is None:  # said nothing about a dense model, and would let experts die
        given.append("balance.loss=switch")
    base, new = (read_hparams_inside(dense, HPARAMS, [*given, *more]) for more in ((), changes))
    _refuse_changes(base, new, continue_data)
    new = pinned(with_commits_of(base, new))
    check(new)
    return new


def _refuse_changes(base: Hparams, new: Hparams, continue_data: bool) -> None:
    """Raise UserError for changes after which the weights, the tokenizer or the place in the text wouldn't fit."""
    fixed = {f"model.{name}" for name in type(base.model).model_fields if name not in FREE_MODEL_SETTINGS}
    fixed |= {f"tokenizer.{name}" for name in type(base.tokenizer).model_fields}
    if continue_data:
        fixed |= {f"data.{name}" for name in type(base.data).model_fields} | {"train.seed"}
    old_values, new_values = base.model_dump(mode="json"), new.model_dump(mode="json")
    for name in sorted(fixed):
        section, key = name.split(".")
        old, value = (json.dumps(values[section][key]) for values in (old_values, new_values))
        if old != value:
            reason = "The place in the text is one" if section in ("data", "train") else "The dense run's weights are"
            remedy = "Leave out --continue-data, or the change." if section in ("data", "train") else "Leave it out."
            raise UserError(f"--set changes {name} from {old} to {value}. {reason} for the former. {remedy}")


@torch.no_grad()
def _upcycled_weights(dense: GPT, hparams: Hparams, noise: float, seed: int) -> dict[str, Tensor]:
    """Return the new model's weights: routers by the law of `moelet.modelling`, all else copied, with noise."""
    torch.manual_seed(seed)
    weights = GPT(hparams.model, dense.n_pieces).state_dict()
    for name, matrix in dense.state_dict().items():
        layer, mlp, part = name.partition(".mlp.")
        if not mlp:
            weights[name] = matrix
            continue
        part = part.removesuffix(".weight")
        assert part in MATRICES, f"a dense layer has {name}"
        copies = matrix.expand(hparams.model.n_experts, *matrix.shape).clone()
        if noise:
            copies += noise * matrix.std() * torch.randn(copies.shape)
        weights[f"{layer}.mlp.experts.{part}"] = copies
    return weights
