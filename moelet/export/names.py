"""What others call our parameters, and the model as theirs have it.

Theirs is the Qwen3 of `transformers` and of llama.cpp, dense or with experts: rotary positions, a norm over each head
of queries and keys, gated experts, softmax routing, one embedding table of full width. `obstacles` says why a model
isn't that; `folded` makes the last of these true of any.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moelet.modelling import GPT, NORM_EPS
from moelet.sections import ModelSettings


class Name(NamedTuple):
    """One parameter, or one a layer; Qwen3 in `transformers` has one tensor an expert where ours are stacked."""

    ours: str
    hf: str
    gguf: str


TABLE = (
    Name("embed.tokens.weight", "model.embed_tokens.weight", "token_embd.weight"),
    Name("lm_head.weight", "lm_head.weight", "output.weight"),
    Name("norm.weight", "model.norm.weight", "output_norm.weight"),
    *(
        Name(f"layers.{{layer}}.{ours}", f"model.layers.{{layer}}.{hf}", f"blk.{{layer}}.{gguf}")
        for ours, hf, gguf in (
            ("input_layernorm.weight", "input_layernorm.weight", "attn_norm.weight"),
            ("self_attn.q_proj.weight", "self_attn.q_proj.weight", "attn_q.weight"),
            ("self_attn.k_proj.weight", "self_attn.k_proj.weight", "attn_k.weight"),
            ("self_attn.v_proj.weight", "self_attn.v_proj.weight", "attn_v.weight"),
            ("self_attn.o_proj.weight", "self_attn.o_proj.weight", "attn_output.weight"),
            ("self_attn.q_norm.weight", "self_attn.q_norm.weight", "attn_q_norm.weight"),
            ("self_attn.k_norm.weight", "self_attn.k_norm.weight", "attn_k_norm.weight"),
            ("post_attention_layernorm.weight", "post_attention_layernorm.weight", "ffn_norm.weight"),
            ("mlp.gate.weight", "mlp.gate.weight", "ffn_gate_inp.weight"),
            ("mlp.experts.gate_proj", "mlp.experts.{expert}.gate_proj.weight", "ffn_gate_exps.weight"),
            ("mlp.experts.up_proj", "mlp.experts.{expert}.up_proj.weight", "ffn_up_exps.weight"),
            ("mlp.experts.down_proj", "mlp.experts.{expert}.down_proj.weight", "ffn_down_exps.weight"),
            ("mlp.gate_proj.weight", "mlp.gate_proj.weight", "ffn_gate.weight"),
            ("mlp.up_proj.weight", "mlp.up_proj.weight", "ffn_up.weight"),
            ("mlp.down_proj.weight", "mlp.down_proj.weight", "ffn_down.weight"),
        )
    ),
)
BY_OURS = {name.ours: name for name in TABLE}


def obstacles(settings: ModelSettings) -> list[str]:
    """Return the settings that keep a model from being a Qwen3, each with what it would have to be; none: it is one."""
    needed = {
        "positions": "rope", "qk_norm": True, "activation": "swiglu", "router": "softmax", "shared_expert": 0,
        "selection_bias": False, "embed_residual": False, "value_residual": False, "smear": False, "bigram_rows": 0,
    }  # fmt: skip
    return [
        f"model.{name} is {getattr(settings, name)}, not {need}"
        for name, need in needed.items()
        if getattr(settings, name) != need
    ]


@torch.no_grad()
def folded(model: GPT) -> GPT:
    """Return a model that computes the same with one table of full width, not normed or scaled on its way in.

    All of this is a function of the token alone, so it can be done to the table once. A tied table stays tied where
    that is possible: a scale on the way in is taken from the final norm's weight on the way out.
    """
    old = model.settings
    tied = old.tie_embeddings and not old.embed_norm
    plain = {"d_embed": None, "embed_norm": False, "embed_scale": 1.0, "tie_embeddings": tied}
    settings = old.model_copy(update={**plain, "vocab_size": model.vocab_size})
    weights = model.state_dict()
    inward_VD, outward_VD = (table_VR.double() for table_VR in (model.embed.tokens.weight, model.table))
    if (projection_DR := weights.pop("embed.proj.weight", None)) is not None:
        inward_VD, outward_VD = (table_VR @ projection_DR.double().T for table_VR in (inward_VD, outward_VD))
    if old.embed_norm:
        inward_VD = F.rms_norm(inward_VD, inward_VD.shape[-1:], eps=NORM_EPS)
    weights["embed.tokens.weight"] = inward_VD * old.embed_scale
    if tied:
        weights["norm.weight"] = weights["norm.weight"].double() / old.embed_scale
    else:
        weights["lm_head.weight"] = outward_VD
    result = GPT(settings, model.n_pieces).to(model.embed.tokens.weight.dtype)
    result.load_state_dict(weights)
    return result.eval()


def _places(ours: str) -> tuple[Name, dict[str, int]]:
    """Return the row of the table that a parameter of ours is in, and its layer where it has one."""
    found = re.fullmatch(r"layers\.(\d+)\.(.*)", ours)
    if found is None:
        return BY_OURS[ours], {}
    return BY_OURS[f"layers.{{layer}}.{found[2]}"], {"layer": int(found[1])}


def hf_names(ours: str, n_experts: int) -> list[str]:
    """Return what `transformers` calls a parameter of ours: one name an expert where ours are stacked."""
    name, place = _places(ours)
    if "{expert}" not in name.hf:
        return [name.hf.format(**place)]
    return [name.hf.format(**place, expert=expert) for expert in range(n_experts)]


def hf_weights(model: GPT) -> dict[str, Tensor]:
    """Return the weights of a folded model by the names of `transformers`."""
    weights: dict[str, Tensor] = {}
    for ours, tensor in model.state_dict().items():
        names = hf_names(ours, model.settings.n_experts)
        weights |= dict(zip(names, tensor if len(names) > 1 else [tensor], strict=True))
    return weights


def gguf_weights(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a folded model by llama.cpp's names, which has experts stacked as we have them."""
    for ours, tensor in model.state_dict().items():
        name, place = _places(ours)
        yield name.gguf.format(**place), tensor
