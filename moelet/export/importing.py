"""`moelet import`: an exported folder becomes a run, at step 0 of a training of its own.

Read are JSON, safetensors and a SentencePiece model, from within the folder; its code is not looked at. What a folder
says of its shape is believed only where its tensors have that shape, before anything of that size is made.
"""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelet.errors import UserError
from moelet.export.hf import CONFIG, WEIGHTS
from moelet.export.names import hf_names
from moelet.hparams import Hparams, make_hparams, read_or_default
from moelet.memory import require_memory
from moelet.modelling import NORM_EPS, shapes_of
from moelet.sections import ModelSettings
from moelet.state import build
from moelet.storage.checkpoint import TOKENIZER
from moelet.storage.intake import LARGEST_JSON, name_parts, open_inside, parse_json, shown, size_of
from moelet.storage.tensor_file import LARGEST_FILE, TensorFile
from moelet.tokenizer import Tokenizer
from moelet.train import begin_run, check, pinned, refuse_folder

INDEX = "model.safetensors.index.json"
MOST_FILES = 200  # all open at once
FORMATS = ("F32", "F16", "BF16", "F64")
FREE_SETTINGS = {"dropout", "attention", "experts"}  # of the model: what its weights don't depend on


class Imported(NamedTuple):
    """What was made of what."""

    hparams: Hparams
    kind: str  # of the folder's model
    parameters: int


def import_hf(folder: Path, run: Path, file: Path | None, changes: Sequence[str] = ()) -> Imported:
    """Make the run folder `run` of an exported folder, to be trained by the settings in `file` with `changes`.

    Without a file they are those of hparams.json, or the defaults where there is none.

    The model's and tokenizer's settings are the folder's. Raises UserError for anything else than a model of ours or
    a Qwen3 with a tokenizer of ours; nothing is written then.
    """
    refuse_folder(run)
    config = _read_json(folder, CONFIG)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in SETTINGS_OF:
        raise UserError(
            f"{folder / CONFIG} says model_type {json.dumps(kind)}. It must be one of: {', '.join(SETTINGS_OF)}. Give "
            "a folder that `moelet export --to hf` wrote."
        )
    if not (folder / TOKENIZER).exists():
        raise UserError(
            f"{folder} holds no {TOKENIZER}, the SentencePiece model that a run needs. Copy it from the folder that "
            "`moelet export` wrote; for a model with a tokenizer of another kind there is none."
        )
    tokenizer = Tokenizer.load_inside(folder, TOKENIZER)
    with ExitStack() as files:
        return _import(folder, run, file, changes, config, tokenizer, _Tensors(folder, files))


def _import(
    folder: Path,
    run: Path,
    file: Path | None,
    changes: Sequence[str],
    config: dict[str, Any],
    tokenizer: Tokenizer,
    tensors: "_Tensors",
) -> Imported:
    kind = config["model_type"]
    model = SETTINGS_OF[kind](config, folder / CONFIG)
    rate = 0.001 if model.get("selection_bias") else None
    make_hparams({"model": model, "balance": {"bias_rate": rate}, "train": {"train_steps": 1}}, str(folder / CONFIG))
    if model.get("vocab_size") == tokenizer.vocab_size:
        model["vocab_size"] = None
    hparams = _settings(file, model, tokenizer, changes)
    weights = _weights(tensors, hparams.model, tokenizer, stacked=kind == "moelet")
    training = build(hparams, tokenizer)
    training.model.load_state_dict(weights)
    begin_run(run, training)
    return Imported(hparams, kind, sum(parameter.numel() for parameter in training.model.parameters()))


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        with open_inside(folder, name, LARGEST_JSON) as file:
            _refuse_other_names(file, path)
            data = parse_json(file.read(), str(path))
    except FileNotFoundError:
        raise UserError(f"there is no {path}. Give a folder that `moelet export --to hf` wrote.") from None
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}). Give another folder.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}. It must be a JSON object. Give another folder.")
    return data


def _refuse_other_names(file: BufferedReader, path: Path) -> None:
    """Raise UserError for a file that has another name as well: nothing says that this one lies outside of the folder,
    and nothing vouches for its content, as a checkpoint's manifest does.
    """
    if os.fstat(file.fileno()).st_nlink > 1:
        raise UserError(f"{path} is a hard link: the file has other names. Copy the folder: cp -r.")


def _moelet_settings(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the model's settings as our own export wrote them."""
    settings = config.get("moelet")
    if not isinstance(settings, dict):
        raise UserError(f'{path} has no settings under "moelet". Give a folder that `moelet export --to hf` wrote.')
    return dict(settings)


def _qwen3_settings(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the settings of a Qwen3, under the names of any version of `transformers`."""

    def number(*names: str) -> int:
        value = next((config[name] for name in names if name in config), None)
        if type(value) is not int or value < 1:
            raise UserError(f"{path} has {names[0]} {json.dumps(value)}. It must be a whole number from 1.")
        return value

    width, heads = number("hidden_size"), number("num_attention_heads")
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta")}
    rope = rope if isinstance(rope, dict) else {}
    needed = {
        "hidden_act": "silu", "rms_norm_eps": NORM_EPS, "attention_bias": False, "use_sliding_window": False,
        "rope_scaling": None, "mlp_only_layers": [], "decoder_sparse_step": 1,
    }  # fmt: skip
    given = {name: config.get(name, need) for name, need in needed.items()}
    given |= {"num_key_value_heads": number("num_key_value_heads"), "rope_type": rope.get("rope_type", "default")}
    given |= {"head_dim * num_attention_heads": number("head_dim") * heads}
    needed |= {"num_key_value_heads": heads, "rope_type": "default", "head_dim * num_attention_heads": width}
    for name, need in needed.items():
        if given[name] != need:
            raise UserError(
                f"{path} has {name} {json.dumps(given[name])}. A run's has {json.dumps(need)}. Give another folder."
            )
    experts = number("num_experts", "num_local_experts") if config["model_type"] == "qwen3_moe" else 1
    return {
        "vocab_size": number("vocab_size"), "max_length": number("max_position_embeddings"),
        "d_model": width, "d_embed": None, "embed_scale": 1.0, "embed_norm": False,
        "positions": "rope", "rope_theta": rope.get("rope_theta"), "qk_norm": True, "activation": "swiglu",
        "n_layers": number("num_hidden_layers"), "n_heads": heads, "n_experts": experts,
        "d_ff": number("moe_intermediate_size") * experts if experts > 1 else number("intermediate_size"),
        "top_k": number("num_experts_per_tok") if experts > 1 else 1, "router": "softmax", "shared_expert": 0,
        "normalize_top_k": config.get("norm_topk_prob", False), "selection_bias": False, "dropout": 0.0,
        "tie_embeddings": config.get("tie_word_embeddings", False), "embed_residual": False, "value_residual": False,
        "smear": False, "bigram_rows": 0,
    }  # fmt: skip


SETTINGS_OF: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "moelet": _moelet_settings,
    "qwen3_moe": _qwen3_settings,
    "qwen3": _qwen3_settings,
}


def _settings(file: Path | None, model: dict[str, Any], tokenizer: Tokenizer, changes: Sequence[str]) -> Hparams:
    """Return the settings of the new run: of `file`, but for model and tokenizer, with changes that leave these."""
    given = [f"model.{name}={json.dumps(value)}" for name, value in model.items()]
    given += ["tokenizer.file=null", f"tokenizer.vocab_size={tokenizer.vocab_size}", "train.run=null"]
    given.append(f"balance.bias_rate={0.001 if model.get('selection_bias') else 'null'}")
    base, new = read_or_default(file, given), read_or_default(file, [*given, *changes])
    for section in ("model", "tokenizer"):
        old, now = (getattr(hparams, section).model_dump(mode="json") for hparams in (base, new))
        for name in old.keys() - FREE_SETTINGS:
            if old[name] != now[name]:
                raise UserError(
                    f"--set changes {section}.{name} from {json.dumps(old[name])} to {json.dumps(now[name])}. The "
                    "folder's weights are for the former. Leave it out."
                )
    new = pinned(new)
    check(new)
    return new


class _Tensors:
    """The tensors of a folder's safetensors files, by name; `files` closes them."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        self.folder = folder
        names = {WEIGHTS}
        if (folder / INDEX).exists():
            places = _read_json(folder, INDEX).get("weight_map")
            if not isinstance(places, dict) or not places:
                raise UserError(f"{folder / INDEX} has no weight_map. Give another folder.")
            for name in places.values():
                if len(name_parts(folder, name)) != 1:
                    raise UserError(
                        f"{folder} names the file {shown(name)}. A folder's files lie in it. Don't trust it."
                    )
            names = set(places.values())
            if len(names) > MOST_FILES:
                raise UserError(f"{folder / INDEX} names {len(names)} files. It names at most {MOST_FILES}.")
        self.places: dict[str, TensorFile] = {}
        total = 0
        for name in sorted(names):
            file = files.enter_context(self._opened(name))
            found = TensorFile(file, str(folder / name))
            self.places |= dict.fromkeys(found.places, found)
            total += size_of(file)
        require_memory(total, f"the model of {folder}")

    def _opened(self, name: str) -> BufferedReader:
        path = self.folder / name
        try:
            file = open_inside(self.folder, name, LARGEST_FILE)
        except FileNotFoundError:
            raise UserError(
                f"there is no {path}. Weights are read from safetensors alone; other files can hold code. Give a "
                "folder that `moelet export --to hf` wrote."
            ) from None
        except OSError as error:
            raise UserError(f"{path} can't be read ({error.strerror}). Give another folder.") from None
        _refuse_other_names(file, path)
        return file

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises UserError for one of another format than numbers have."""
        place = self.places[name].places[name]
        if place.format not in FORMATS:
            raise UserError(f"{name} in {self.folder} is {place.format}. It must be one of: {', '.join(FORMATS)}.")
        return place.shape

    def read(self, name: str) -> Tensor:
        return self.places[name].read(name).float()


def _weights(tensors: _Tensors, settings: ModelSettings, tokenizer: Tokenizer, stacked: bool) -> dict[str, Tensor]:
    """Return the folder's weights by our names, of the shapes that the settings say."""
    mismatch = f"{tensors.folder} doesn't fit its {CONFIG}"
    parts = max(settings.n_layers, 1 if stacked else settings.n_experts)
    if parts > len(tensors.places):
        raise UserError(
            f"{mismatch}: {parts} layers or experts take more than its {len(tensors.places)} tensors. Give another one."
        )
    shapes = shapes_of(settings, tokenizer.vocab_size)
    theirs = {ours: [ours] if stacked else hf_names(ours, settings.n_experts) for ours in shapes}
    named = {name for names in theirs.values() for name in names}
    if named != tensors.places.keys():
        odd = min(named ^ tensors.places.keys())
        raise UserError(f"{mismatch}: {odd} is {'missing' if odd in named else 'too much'}. Give another folder.")
    weights = {}
    for ours, names in theirs.items():
        want = shapes[ours] if len(names) == 1 else shapes[ours][1:]
        for name in names:
            if (shape := tensors.shape(name)) != want:
                raise UserError(f"{mismatch}: {name} has shape {list(shape)}, not {list(want)}. Give another folder.")
        read = [tensors.read(name) for name in names]
        weights[ours] = read[0] if len(read) == 1 else torch.stack(read)
        if not bool(weights[ours].isfinite().all()):
            raise UserError(f"{ours} in {tensors.folder} holds numbers that aren't finite. Give another folder.")
    return weights
