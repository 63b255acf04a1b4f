"""`moelet export --to hf`: a folder that `transformers` loads, which a process without moelet has checked.

A model in the shape of Qwen3 needs no code of ours. Any other goes with a small model file, `modeling_moelet.py`, and
its weights as they are; whoever loads it has to trust that file.
"""

import json
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from moelet.errors import UserError, pick, require
from moelet.export.names import folded, hf_weights, obstacles
from moelet.export.parity import ROWS, Limits, Parity, check_parity, sample_text, suppressed_ids
from moelet.export.pieces import tokenizer_files
from moelet.generate import Sampling
from moelet.modelling import GPT, NORM_EPS
from moelet.storage.checkpoint import load
from moelet.storage.disk import refuse_existing, sync_folder, whole, write_synced
from moelet.tokenizer import Tokenizer

CONFIG, WEIGHTS, MODEL_CODE = "config.json", "model.safetensors", "modeling_moelet.py"
LIMITS = Limits(logits=1e-4, margin=1e-5, loss=1e-4)  # float32 on both sides
CODE = ("auto", "never", "always")


class Exported(NamedTuple):
    """What was written where, and how it compared."""

    path: Path
    step: int
    parameters: int
    own_code: list[str]  # files of ours that have to be trusted to load it
    reasons: list[str]  # why the model needs one of them
    parity: Parity


def export_hf(run: Path, out: Path, code: str = "auto", rows: int = ROWS) -> Exported:
    """Write the newest verified model of a run as a folder of `transformers`, and check it.

    `code` says whether a model file of ours goes along: where there is no other way (auto), never, or always, which
    keeps the weights as in training. `rows` contexts full of text are compared. Raises UserError where one can't be
    had; nothing is written then.
    """
    pick(dict.fromkeys(CODE), code, "--code")
    require("transformers", "export")
    refuse_existing(out)
    loaded = load(run)
    reasons = obstacles(loaded.model.settings)
    if reasons and code == "never":
        raise UserError(
            f"{run} can't be a Qwen3 of transformers: {'; '.join(reasons)}. Only a model file of ours does that. Leave "
            "out --code never, or train with other settings, such as those of recipes/modern-cpu.json."
        )
    own_model = bool(reasons) or code == "always"
    model = loaded.model if own_model else folded(loaded.model)
    files = hf_files(model, loaded.tokenizer, own_model)
    own_code = [name for name in files if name.endswith(".py")]
    with whole(out) as temporary:
        temporary.mkdir(parents=True)
        for name, data in files.items():
            write_synced(temporary / name, data)
        sync_folder(temporary)
        sample = sample_text(loaded.hparams, loaded.tokenizer, loaded.model.settings.max_length, rows)
        parity = check_parity("hf", temporary, loaded, sample, LIMITS, bool(own_code))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Exported(out, loaded.step, parameters, own_code, reasons, parity)


def hf_files(model: GPT, tokenizer: Tokenizer, own_model: bool) -> dict[str, bytes]:
    """Return the folder's files by name; the model is a folded one, or any one with a model file of ours."""
    weights: dict[str, Tensor] = model.state_dict() if own_model else hf_weights(model)
    weights = {name: tensor.detach().clone() for name, tensor in weights.items()}  # experts aren't parts of one storage
    sampling = Sampling()
    generation: dict[str, Any] = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    generation |= {**ids, "suppress_tokens": suppressed_ids(model)}
    config = ids | (_own_config(model) if own_model else _qwen3_config(model))
    files = tokenizer_files(tokenizer, model.settings.max_length)
    if own_model:
        files[MODEL_CODE] = resources.files("moelet.export").joinpath(MODEL_CODE).read_bytes()
    files["generation_config.json"] = (json.dumps(generation, indent=2) + "\n").encode()
    files[WEIGHTS] = safetensors.torch.save(weights, {"format": "pt"})
    files[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    return files


def _qwen3_config(model: GPT) -> dict[str, Any]:
    """Return what `transformers` has to know of a folded model, in the names of its versions 4 and 5."""
    s = model.settings
    moe = s.n_experts > 1
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if moe else "qwen3",
        "vocab_size": model.vocab_size, "max_position_embeddings": s.max_length,
        "hidden_size": s.d_model, "intermediate_size": s.d_ff, "num_hidden_layers": s.n_layers,
        "num_attention_heads": s.n_heads, "num_key_value_heads": s.n_heads, "head_dim": s.head_width,
        "hidden_act": "silu", "rms_norm_eps": NORM_EPS, "tie_word_embeddings": s.tie_embeddings,
        "rope_theta": s.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": s.rope_theta},
        "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False, "dtype": "float32",
    }  # fmt: skip
    if moe:
        config |= {
            "num_experts": s.n_experts, "num_experts_per_tok": s.top_k, "moe_intermediate_size": s.expert_width,
            "norm_topk_prob": s.normalize_top_k, "decoder_sparse_step": 1, "mlp_only_layers": [],
        }  # fmt: skip
    return config


def _own_config(model: GPT) -> dict[str, Any]:
    s = model.settings
    module = MODEL_CODE.removesuffix(".py")
    return {
        "architectures": ["MoeletForCausalLM"],
        "model_type": "moelet",
        "auto_map": {
            "AutoConfig": f"{module}.MoeletConfig",
            "AutoModelForCausalLM": f"{module}.MoeletForCausalLM",
        },
        "moelet": s.model_dump(mode="json") | {"vocab_size": model.vocab_size},
        "dtype": "float32",
    }
