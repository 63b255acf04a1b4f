"""How large a model and its files are, counted without making them: parameters and FLOPs by part, bytes on the disk."""

from typing import Any

import torch

from moelet.experts import GATED
from moelet.hparams import Hparams
from moelet.modelling import GPT
from moelet.optim import OPTIMIZERS
from moelet.sections import ModelSettings

PARTS = {  # what stands in a parameter's name, the first that fits
    "embed.tokens": "token table",
    "embed.positions": "positions",
    "embed.proj": "projection",
    "lm_head": "output table",
    "bigrams": "bigram table",
    "norm": "norms",  # those of queries and keys, too
    ".self_attn.": "attention",
    ".mlp.gate.": "router",
    ".mlp.experts.": "experts",
    ".mlp.shared_expert.": "shared expert",
    ".mlp.": "feed-forward",
    "": "learned shares",
}
TABLES = {"token table", "positions", "projection", "output table", "bigram table"}  # as in moelet.arms
FLOAT = 4  # bytes: weights, gradients and the optimizer's numbers are float32
HEADER = 96  # bytes of a tensor's entry in a safetensors header, about: name, shape, place


def empty_model(settings: ModelSettings, vocab_size: int) -> GPT:
    """Return the model without numbers."""
    with torch.device("meta"):
        return GPT(settings, vocab_size)


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to."""
    return next(part for key, part in PARTS.items() if key in name)


def parameters(settings: ModelSettings, model: GPT) -> dict[str, Any]:
    """Return how many parameters there are, how many of them a token uses, and both by part.

    `active_parameters` are those outside of the tables, which grow with the vocabulary, as `moelet prove` counts them;
    `active_with_tables` counts all that a token's output depends on.
    """
    parts: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        part = parts.setdefault(part_of(name), {"parameters": 0, "active": 0})
        part["parameters"] += parameter.numel()
        used = settings.top_k / settings.n_experts if ".mlp.experts." in name else 1.0
        part["active"] += round(parameter.numel() * used)
    return {
        "parameters": sum(part["parameters"] for part in parts.values()),
        "active_parameters": sum(part["active"] for name, part in parts.items() if name not in TABLES),
        "active_with_tables": sum(part["active"] for part in parts.values()),
        "parameters_by_part": parts,
    }


def flops(settings: ModelSettings, model: GPT) -> dict[str, Any]:
    """Return the FLOPs of training on a token: forward and twice that backward, in rows of max_length, by part.

    `flops_per_token` counts causal attention at the half that isn't masked, `flops_per_token_full_square` at all of it,
    which is what a counter sees that doesn't know of masks.
    """
    s, width, length = settings, settings.d_model, settings.max_length
    rank, ups = s.d_embed or width, 3 if s.activation in GATED else 2
    used = s.top_k * s.expert_width if s.n_experts > 1 else s.d_ff
    macs = {
        "attention products": s.n_layers * 4 * width**2,
        "attention scores": s.n_layers * length * width,
        "experts" if s.n_experts > 1 else "feed-forward": s.n_layers * ups * width * used,
        "shared expert": s.n_layers * ups * width * s.shared_expert,
        "router": s.n_layers * width * s.n_experts if s.n_experts > 1 else 0,
        "projection": 2 * width * rank if s.d_embed else 0,
        "vocabulary head": rank * model.vocab_size,
    }
    parts = {name: 6 * count for name, count in macs.items() if count}
    total = model.flops_per_token(length)
    return {
        "flops_per_token": total,
        "flops_per_token_full_square": total + parts["attention scores"],
        "flops_by_part": parts,
    }


def optimizer_numbers(hparams: Hparams, model: GPT) -> int:
    """Return how many numbers the optimizer keeps: two a parameter for Adam, one for a matrix that Muon turns."""
    optimizer = OPTIMIZERS[hparams.optim.optimizer](model, hparams.optim)
    return sum(
        (1 if group.get("muon") else 2) * parameter.numel() + (0 if group.get("muon") else 1)
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def files(hparams: Hparams, model: GPT) -> dict[str, int]:
    """Return the bytes of a checkpoint's files, of a checkpoint, and of all that a run keeps at most."""
    state = list(model.state_dict().values())
    weights = sum(tensor.numel() for tensor in state) * FLOAT + HEADER * len(state)
    moments = optimizer_numbers(hparams, model) * FLOAT + 2 * HEADER * len(state)
    kept = hparams.train.keep_checkpoints + (0 if hparams.train.eval_steps is None else 1)  # and the best
    whole = weights + moments
    return {
        "model": weights,
        "optimizer": moments,
        "checkpoint": whole,
        "run": (kept + 1) * whole,  # one more while it is written
    }
