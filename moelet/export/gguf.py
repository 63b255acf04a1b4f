"""`moelet export --to gguf`: one file that stock llama.cpp, and what is built on it, loads.

The architecture is llama.cpp's qwen3moe, or qwen3 for a dense model. It turns the halves of a head against each other,
as we do, so nothing within a head changes places; it scales the weights of a token's experts to sum to 1, whatever a
file says. The tokenizer is its "llama", SentencePiece's byte-pair encoding.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moelet.errors import UserError, pick, require
from moelet.export.names import folded, gguf_weights, obstacles
from moelet.export.parity import ROWS, Limits, Parity, check_parity, sample_text
from moelet.export.pieces import UNUSED, Piece, is_bpe, pieces_of
from moelet.generate import Sampling
from moelet.modelling import GPT, NORM_EPS
from moelet.storage.checkpoint import Loaded, load
from moelet.storage.disk import refuse_existing, sync, whole
from moelet.tokenizer import Tokenizer

# by type: how far llama.cpp may be from us; docs/export.md has what was measured
LIMITS = {
    "f32": Limits(logits=1e-3, margin=3e-5, loss=1e-4),
    "f16": Limits(logits=1e-2, margin=2e-3, loss=1e-2),
    "q8_0": Limits(logits=0.5, margin=2e-2, loss=5e-2),
}
BLOCK = 32  # numbers of a row that share a scale in Q8_0
LARGEST_F16 = 65504.0


class ExportedFile(NamedTuple):
    """What was written where, and how it compared; None: there is no llama.cpp here to compare with."""

    path: Path
    step: int
    parameters: int
    bytes: int
    context: int
    parity: Parity | None


def export_gguf(run: Path, out: Path, kind: str = "f16", rows: int = ROWS) -> ExportedFile:
    """Write the newest verified model of a run as a file of llama.cpp's, and check it.

    Matrices and tables are of the type `kind`; norms and routers stay float32. Raises UserError for what llama.cpp
    hasn't got; nothing is written then.
    """
    limits = pick(LIMITS, kind, "--type")
    require("gguf", "export")
    refuse_existing(out)
    loaded = load(run)
    refuse_others(run, loaded, kind)
    model = folded(loaded.model)
    with whole(out) as temporary:
        arrays = write(temporary, model, loaded.tokenizer, kind, run.absolute().name)
        check_written(temporary, arrays)
        parity = None
        if find_spec("llama_cpp") is not None:
            sample = sample_text(loaded.hparams, loaded.tokenizer, model.settings.max_length, rows)
            parity = check_parity("gguf", temporary, loaded, sample, limits, own_code=False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ExportedFile(out, loaded.step, parameters, out.stat().st_size, model.settings.max_length, parity)


def refuse_others(run: Path, loaded: Loaded, kind: str) -> None:
    """Raise UserError with all that llama.cpp can't do as it is in the run."""
    s = loaded.model.settings
    reasons = obstacles(s)
    if s.top_k < s.n_experts and not s.normalize_top_k:
        reasons.append("model.normalize_top_k is False, not True")
    if not is_bpe(loaded.tokenizer):
        reasons.append("tokenizer.algorithm isn't bpe")
    if reasons:
        raise UserError(
            f"{run} can't be a model of llama.cpp: {'; '.join(reasons)}. Train with other settings, such as those of "
            "recipes/modern-cpu.json, or use --to hf, which takes every model."
        )
    if kind == "q8_0" and (s.d_model % BLOCK or s.expert_width % BLOCK):
        raise UserError(
            f"--type is q8_0 and the model is {s.d_model} wide, its experts {s.expert_width}. Its rows are cut into "
            f"blocks of {BLOCK}. Use --type f16."
        )


def write(path: Path, model: GPT, tokenizer: Tokenizer, kind: str, name: str) -> dict[str, np.ndarray]:
    """Write a folded model; return what was written of each tensor."""
    import gguf

    s = model.settings
    writer = gguf.GGUFWriter(path, "qwen3moe" if s.n_experts > 1 else "qwen3")
    writer.add_name(name)
    writer.add_block_count(s.n_layers)
    writer.add_context_length(s.max_length)
    writer.add_embedding_length(s.d_model)
    writer.add_feed_forward_length(s.d_ff)
    writer.add_head_count(s.n_heads)
    writer.add_head_count_kv(s.n_heads)
    writer.add_key_length(s.head_width)
    writer.add_value_length(s.head_width)
    writer.add_rope_dimension_count(s.head_width)
    writer.add_rope_freq_base(s.rope_theta)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    if s.n_experts > 1:
        writer.add_expert_count(s.n_experts)
        writer.add_expert_used_count(s.top_k)
        writer.add_expert_feed_forward_length(s.expert_width)
    files = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[files[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, tokenizer, model.vocab_size)
    types, arrays = gguf.GGMLQuantizationType, {}
    for tensor_name, tensor in gguf_weights(model):
        array = tensor.detach().numpy()
        exact = array.ndim == 1 or tensor_name.endswith("ffn_gate_inp.weight")  # llama.cpp's own files do so too
        if kind == "f16" and not exact and np.abs(array).max() > LARGEST_F16:
            raise UserError(f"{tensor_name} holds a number too large for --type f16. Use --type f32.")
        stored = types.F32 if exact else types[kind.upper()]
        arrays[tensor_name] = gguf.quants.quantize(array, stored)
        writer.add_tensor(tensor_name, arrays[tensor_name], raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open(path, "rb") as file:
        sync(file.fileno())
    return arrays


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Write the pieces, and names without text for rows of the table beyond them."""
    pieces = pieces_of(tokenizer)
    pieces += [Piece(f"<unused{i}>", 0.0, UNUSED) for i in range(len(pieces), vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.text for piece in pieces])
    writer.add_token_scores([piece.score for piece in pieces])
    writer.add_token_types([piece.kind for piece in pieces])  # its kinds have SentencePiece's numbers
    writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def check_written(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Assert that the library reads from the file, bit for bit, what was to be written."""
    import gguf

    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes(), name


def modelfile(exported: ExportedFile) -> str:
    """Return what Ollama's `create` reads: the file, no template around the prompt, our sampling."""
    sampling = Sampling()
    parameters = {
        "num_ctx": exported.context,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": 1,
        "repeat_penalty": 1,
    }
    lines = [f"FROM {exported.path.absolute()}", 'TEMPLATE "{{ .Prompt }}"']
    return "\n".join(lines + [f"PARAMETER {name} {value:g}" for name, value in parameters.items()])
