"""Exported models and tokenizers: they compute what the run does, elsewhere; and come back as runs."""

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import TinySettings

from moelet import train
from moelet.cli import main
from moelet.commands.export import ollama_name
from moelet.console import Progress
from moelet.data import training_texts
from moelet.errors import UserError
from moelet.export import gguf as gguf_export
from moelet.export import hf, parity
from moelet.export.gguf import check_written, export_gguf, modelfile, write
from moelet.export.hf import hf_files
from moelet.export.names import folded, obstacles
from moelet.export.pieces import BYTE, CONTROL, UNKNOWN, is_bpe, pieces_of, tokenizer_json
from moelet.generate import Sampling, continuations
from moelet.hparams import make_hparams
from moelet.modelling import GPT
from moelet.state import build
from moelet.storage.checkpoint import Loaded, load
from moelet.storage.disk import whole
from moelet.tokenizer import LOSSLESS, SPACES, Tokenizer
from moelet.train import begin_run

OUTSIDER = Path(__file__).with_name("outsider.py")
ROPE = {"positions": "rope", "qk_norm": True, "activation": "swiglu", "dropout": 0.0}
SHAPES: dict[str, dict[str, Any]] = {  # of the tiny model
    "factorised": {**ROPE, "normalize_top_k": True, "embed_scale": 3.0},
    "untied": {**ROPE, "d_embed": None, "embed_norm": True, "tie_embeddings": False, "top_k": 3, "vocab_size": 410},
    "dense": {**ROPE, "n_experts": 1, "top_k": 1, "embed_norm": True, "rope_theta": 500.0},
    "reference": {},
    "extras": {
        **ROPE, "activation": "relu2", "embed_norm": True, "tie_embeddings": False, "shared_expert": 8,
        "selection_bias": True, "embed_residual": True, "value_residual": True, "smear": True, "bigram_rows": 50,
        "normalize_top_k": True, "vocab_size": 410,
    },
}  # fmt: skip
STOCK = ("factorised", "untied", "dense")


def randomise(model: GPT) -> GPT:
    """Give every parameter a part in what the model computes."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in ("cos", "sin"):
                continue
            spread = 0.3 if tensor.ndim == 1 else tensor.shape[-1] ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread + (tensor.ndim == 1))
    return model.eval()


def make_run(run: Path, settings: dict[str, Any], tokenizer: Tokenizer) -> Path:
    """Make a run folder at step 0 whose weights are random."""
    training = build(make_hparams(settings), tokenizer)
    randomise(training.model)
    begin_run(run, training)
    return run


def settings_of(shape: dict[str, Any], make: TinySettings) -> dict[str, Any]:
    return make(model=shape, balance={"bias_rate": 0.01 if shape.get("selection_bias") else None})


def write_folder(folder: Path, model: GPT, tokenizer: Tokenizer, own_model: bool) -> Path:
    folder.mkdir()
    for name, data in hf_files(model if own_model else folded(model), tokenizer, own_model).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def unigram(tiny_settings: TinySettings) -> Tokenizer:
    hparams = make_hparams(tiny_settings())
    return Tokenizer.train(training_texts(hparams.data, 0), 400, "unigram", sample_bytes=60_000)


@pytest.fixture(scope="module")
def runs(
    tiny_settings: TinySettings, tokenizer: Tokenizer, unigram: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A run of each shape; the one with extras has a unigram tokenizer. No test changes them."""
    root = tmp_path_factory.mktemp("runs")
    return {
        name: make_run(root / name, settings_of(shape, tiny_settings), unigram if name == "extras" else tokenizer)
        for name, shape in SHAPES.items()
    }


@pytest.fixture(scope="module")
def folders(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder that each run is exported to, and a stock one with a model file of ours. Written, not checked."""
    root = tmp_path_factory.mktemp("folders")
    made = {name: write_folder(root / name, *load(run)[:2], name not in STOCK) for name, run in runs.items()}
    return made | {"with code": write_folder(root / "with code", *load(runs["factorised"])[:2], True)}


def odd_texts(count: int, seed: int) -> list[str]:
    """Return texts of what tokenizers trip over: any code points, runs, controls by name, stretches of real text."""
    chance = random.Random(seed)
    parts = [
        *(" ", "  ", "\n", "\t", "\r\n", "a", "the ", "  b", "\u00a0", "\u3000", "\u2581", "\ufeff", "\u200b", "\x00"),
        *("<s>", "</s>", "<pad>", "<unk>", "<0x41>", "<0xE2>", "é", "e\u0301", "ﬁ", "①", "😀", "🏳️‍🌈", "한", "1234"),
    ]
    prose = Path(__file__).read_text(encoding="utf-8")
    tops = (0x80, 0x800, 0xD800, 0x110000)

    def one() -> str:
        kind, size = chance.randrange(5), chance.randrange(40)
        if kind == 0:
            codes = [chance.randrange(chance.choice(tops)) for _ in range(size)]
            return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        if kind == 1:
            return "".join(chance.choice(parts) for _ in range(size))
        if kind == 2:
            return "".join(chance.choice(" -=_#\n") * chance.randrange(1, 9) for _ in range(size))
        if kind == 3:
            return "".join(chance.choice("abc  \n") for _ in range(size))
        start = chance.randrange(len(prose))
        return prose[start : start + 10 * size]

    return [one() for _ in range(count)]


def ask(jobs: list[dict[str, Any]], scratch: Path) -> dict[str, np.ndarray]:
    """Return what a process without moelet finds in folders."""
    (scratch / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    command = [sys.executable, "-P", str(OUTSIDER), str(scratch / "jobs.json"), str(scratch / "found.npz")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(scratch / "found.npz"))


TEXTS = odd_texts(300, seed=1)


@pytest.fixture(scope="module")
def found(
    folders: dict[str, Path], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """What an outsider finds in all folders, on rows of the context's length and two prompts, one padded."""
    pytest.importorskip("transformers")
    rows = torch.randint(4, tokenizer.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [[1, *rows[0][:7]], [3, 3, 3, 1, *rows[1][:4]]]
    jobs = [
        {"folder": str(folder), "own_code": name not in STOCK, "texts": TEXTS, "rows": rows, "prompts": prompts,
         "new_tokens": 20}
        for name, folder in folders.items()
    ]  # fmt: skip
    return {"rows": np.array(rows), **ask(jobs, tmp_path_factory.mktemp("outside"))}


def run_of(folder: str, runs: dict[str, Path]) -> Loaded:
    return load(runs["factorised" if folder == "with code" else folder])


@pytest.mark.parametrize("name", [*SHAPES, "with code"])
def test_an_outsider_gets_our_logits_and_generations(
    name: str, runs: dict[str, Path], found: dict[str, np.ndarray]
) -> None:
    model = run_of(name, runs).model
    with torch.no_grad():
        ours = model.logits(model(torch.from_numpy(found["rows"])).hidden).numpy()
    assert np.abs(ours).max() > 1  # or the next line says little
    assert np.abs(found[f"{name} logits"] - ours).max() < 1e-4
    prompts = [row[row != 3].tolist() for row in found[f"{name} greedy"][:, :8]]
    ours_made = np.array(list(continuations(model, prompts, 20, Sampling(temperature=0)))).T
    for way in ("greedy", "uncached"):
        theirs = found[f"{name} {way}"][:, 8:]
        assert (theirs == ours_made[:, : theirs.shape[1]]).all(), way
    assert (found[f"{name} beams True"] == found[f"{name} beams False"]).all()
    expected = {"dense": "Qwen3ForCausalLM"}.get(name, "Qwen3MoeForCausalLM" if name in STOCK else "MoeletForCausalLM")
    assert found[f"{name} class"][0] == expected
    assert found[f"{name} saved again"] == 0


@pytest.mark.parametrize("name", ["factorised", "extras"])
def test_an_outsider_gets_our_ids(name: str, runs: dict[str, Path], found: dict[str, np.ndarray]) -> None:
    ours = load(runs[name]).tokenizer.encode_batch(TEXTS)
    assert found[f"{name} lengths"].tolist() == [len(row) for row in ours]
    assert (found[f"{name} ids"] == np.concatenate(ours)).all()
    assert found[f"{name} decoded"].all()


@pytest.mark.parametrize(
    "shape",
    [*SHAPES.values(), {"embed_norm": True, "embed_scale": 5.0}, {"d_embed": None, "embed_scale": 0.5}],
)
def test_a_folded_model_computes_the_same(
    shape: dict[str, Any], tiny_settings: TinySettings, tokenizer: Tokenizer
) -> None:
    model = randomise(GPT(make_hparams(settings_of(shape, tiny_settings)).model, tokenizer.vocab_size))
    plain = folded(model)
    assert plain.embed.proj is None and (plain.embed.normed, plain.embed.scale) == (False, 1.0)
    tied = model.settings.tie_embeddings and not model.settings.embed_norm
    assert (plain.lm_head is None) == tied
    ids = torch.randint(4, tokenizer.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (m.logits(m(ids).hidden) for m in (model, plain))
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-5)


def test_what_keeps_a_model_from_being_a_qwen3(tiny_settings: TinySettings) -> None:
    """Each setting, changed, either is among the obstacles or is in the shapes that outsiders load as Qwen3."""
    plain = make_hparams(tiny_settings(model=SHAPES["factorised"])).model
    assert obstacles(plain) == []
    changes: dict[str, Any] = {
        "positions": "learned", "qk_norm": False, "activation": "silu", "router": "other", "shared_expert": 8,
        "selection_bias": True, "embed_residual": True, "value_residual": True, "smear": True, "bigram_rows": 9,
    }  # fmt: skip
    for name, value in changes.items():
        found = obstacles(plain.model_copy(update={name: value}))
        assert found == [f"model.{name} is {value}, not {getattr(plain, name)}"]
    expressible = {
        *("vocab_size", "max_length", "d_model", "d_embed", "embed_scale", "embed_norm", "rope_theta", "n_layers"),
        *("n_heads", "d_ff", "n_experts", "top_k", "normalize_top_k", "tie_embeddings"),
        *("dropout", "zero_init", "attention", "experts"),  # of training, or of how and not what
    }
    assert changes.keys() | expressible == set(type(plain).model_fields)


def test_pieces_are_those_of_sentencepiece(tokenizer: Tokenizer, unigram: Tokenizer) -> None:
    assert is_bpe(tokenizer) and not is_bpe(unigram)
    for ours in (tokenizer, unigram):
        model = sentencepiece.SentencePieceProcessor(model_proto=ours.model_bytes)
        for i, piece in enumerate(pieces_of(ours)):
            assert (piece.text, piece.score) == (model.id_to_piece(i), pytest.approx(model.get_score(i)))
            kinds = (model.is_unknown(i), model.is_control(i), model.is_byte(i))
            assert kinds == (piece.kind == UNKNOWN, piece.kind == CONTROL, piece.kind == BYTE)


def test_pieces_that_a_user_asked_for_are_found_first() -> None:
    """A model from elsewhere; with a piece of plain spaces it goes along as it is."""
    tokenizers = pytest.importorskip("tokenizers")
    prose = Path(__file__).read_text(encoding="utf-8")

    def train(*symbols: str) -> Tokenizer:
        model, options = io.BytesIO(), {"model_type": "bpe", "vocab_size": 600, "pad_id": 3, "minloglevel": 2}
        options |= {"user_defined_symbols": list(symbols), "control_symbols": ["<ctl>"], **LOSSLESS, **SPACES}
        texts = iter(prose.split("\n\n"))
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, **options)
        return Tokenizer(model.getvalue())

    ours = train("<|x|>", "ab", "the", "\n", "\u2581\u2581\u2581\u2581")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(ours)))
    theirs.encode_special_tokens = True
    assert is_bpe(ours) and not is_bpe(train("    "))
    for text in [*TEXTS, "<|x|> abc the<|x|>", " " * 13 + "x", "<ctl>", "abab thethe\n\n\n    a"]:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text).tolist()


# llama.cpp's names, without ".weight", of ours
GGUF_NAMES = {
    "token_embd": "embed.tokens.weight", "output": "lm_head.weight", "output_norm": "norm.weight",
    "attn_norm": "input_layernorm.weight", "ffn_norm": "post_attention_layernorm.weight",
    "attn_q": "self_attn.q_proj.weight", "attn_k": "self_attn.k_proj.weight", "attn_v": "self_attn.v_proj.weight",
    "attn_output": "self_attn.o_proj.weight", "attn_q_norm": "self_attn.q_norm.weight",
    "attn_k_norm": "self_attn.k_norm.weight", "ffn_gate_inp": "mlp.gate.weight",
    "ffn_gate_exps": "mlp.experts.gate_proj", "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj", "ffn_gate": "mlp.gate_proj.weight", "ffn_up": "mlp.up_proj.weight",
    "ffn_down": "mlp.down_proj.weight",
}  # fmt: skip


def our_tensor(model: GPT, theirs: str) -> torch.Tensor:
    """Return the parameter of ours that a GGUF calls so."""
    weights, parts = model.state_dict(), theirs.removesuffix(".weight").split(".")
    return weights[GGUF_NAMES[parts[0]] if len(parts) == 1 else f"layers.{parts[1]}.{GGUF_NAMES[parts[2]]}"]


def written(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metadata and tensors of a GGUF, as its library reads them."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("name", ["factorised", "dense"])
def test_a_gguf_holds_the_weights_and_says_what_they_are(
    name: str, kind: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    model, tokenizer, _, _ = load(runs[name])
    plain = folded(model)
    if kind == "q8_0":  # the tiny model's experts are 16 wide
        plain = GPT(plain.settings.model_copy(update={"d_ff": 32 * plain.settings.n_experts}), model.n_pieces)
        randomise(plain)
    write(tmp_path / "x.gguf", plain, tokenizer, kind, "tiny")
    fields, tensors = written(tmp_path / "x.gguf")
    s, arch = plain.settings, "qwen3" if name == "dense" else "qwen3moe"
    expected = {
        "block_count": 2, "context_length": 32, "embedding_length": 32, "feed_forward_length": s.d_ff,
        "attention.head_count": 4, "attention.head_count_kv": 4, "attention.key_length": 8,
        "attention.value_length": 8, "rope.dimension_count": 8, "rope.freq_base": s.rope_theta,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    }  # fmt: skip
    if name != "dense":
        expected |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": s.d_ff // 4}
    assert {key: fields[f"{arch}.{key}"] for key in expected} == expected
    assert not any("expert" in key for key in fields if name == "dense")
    ids = {f"tokenizer.ggml.{key}_token_id": i for i, key in enumerate(("unknown", "bos", "eos", "padding"))}
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": False}
    flags |= {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.model": "llama", "general.architecture": arch}
    for key, value in (ids | flags).items():
        assert fields[key] == value, key
    assert fields["tokenizer.ggml.tokens"] == [piece.text for piece in pieces_of(tokenizer)]
    assert len(tensors) == len(plain.state_dict())
    for key, stored in tensors.items():
        tensor = our_tensor(plain, key)
        exact = tensor.ndim == 1 or "ffn_gate_inp" in key
        assert stored.tensor_type.name.lower() == ("f32" if exact else kind)
        assert list(stored.shape) == list(reversed(tensor.shape)), key
        if exact or kind == "f32":
            assert stored.data.tobytes() == tensor.numpy().tobytes()
        elif kind == "f16":
            assert stored.data.tobytes() == tensor.half().numpy().tobytes()
        else:
            back = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(tensor.shape)
            assert np.abs(back - tensor.numpy()).max() <= tensor.abs().max() / 127


def test_rows_beyond_the_pieces_have_names_without_text(
    tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    shape = {**SHAPES["factorised"], "vocab_size": 403}
    model = folded(GPT(make_hparams(tiny_settings(model=shape)).model, tokenizer.vocab_size))
    arrays = write(tmp_path / "x.gguf", model, tokenizer, "f32", "tiny")
    fields, tensors = written(tmp_path / "x.gguf")
    assert fields["tokenizer.ggml.tokens"][400:] == ["<unused400>", "<unused401>", "<unused402>"]
    assert fields["tokenizer.ggml.token_type"][400:] == [gguf.TokenType.UNUSED] * 3
    assert tensors["token_embd.weight"].shape[1] == 403
    with pytest.raises(AssertionError):
        check_written(tmp_path / "x.gguf", arrays | {"token_embd.weight": arrays["token_embd.weight"] + 1})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("reference", "model.positions is learned, not rope; model.qk_norm is False"),
        ("untied", "model.normalize_top_k is False"),
        ("extras", "tokenizer.algorithm isn't bpe"),
    ],
)
def test_what_llama_cpp_lacks_is_refused_with_its_settings(
    name: str, words: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match=words):
        export_gguf(runs[name], tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_blocks_that_rows_dont_fill_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match=r"its experts 16\..*Use --type f16"):
        export_gguf(runs["factorised"], tmp_path / "x.gguf", "q8_0")


def test_without_the_packages_the_line_to_run_is_named(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moelet.errors.find_spec", lambda name: None)
    for kind, package in (("hf", "transformers"), ("gguf", "gguf")):
        assert main(["export", str(runs["dense"]), "--to", kind, "--out", str(tmp_path / "x")]) == 78
        assert f"Run pip install {package}, or, for all of it" in capsys.readouterr().err


def test_code_that_may_not_go_along_is_refused_with_the_settings(runs: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=r"model\.positions is learned, not rope; model\.qk_norm.*Leave out --code"):
        hf.export_hf(runs["reference"], tmp_path / "x", "never")
    with pytest.raises(UserError, match="--code is 'perhaps'"):
        hf.export_hf(runs["reference"], tmp_path / "x", "perhaps")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "onnx"], "--to is 'onnx'. It must be one of: hf, gguf"),
        (["--to", "gguf", "--code", "never"], "--code says nothing about --to gguf"),
        (["--to", "hf", "--type", "f32"], "--type says nothing about --to hf"),
    ],
)
def test_options_that_say_nothing_are_refused(
    options: list[str], words: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(runs["dense"]), "--out", str(tmp_path / "x"), *options]) == 78
    assert words in capsys.readouterr().err


def test_export_on_the_command_line(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checked by the stranger; what is there already stays as it is."""
    pytest.importorskip("transformers")
    out, result = tmp_path / 'my "out', tmp_path / "x.json"
    command = ["export", str(runs["extras"]), "--to", "hf", "--out", str(out), "--rows", "2"]
    assert main([*command, "--json", str(result)]) == 0
    shown, made = capsys.readouterr().out, json.loads(result.read_text())
    assert f"from_pretrained({json.dumps(str(out))}, trust_remote_code=True)" in shown
    assert "MoeletForCausalLM" in shown and "model.smear is True, not False" in shown
    assert made["own_code"] == ["tokenization_moelet.py", "modeling_moelet.py"]
    assert made["parity"]["logits"] < 1e-4 and made["parity"]["same"] == made["parity"]["prompts"] == 20
    assert made["parity"]["origin"] == "held-out text" and made["parity"]["tokens"] > 16
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(command) == 78
    assert 'my "out is there already' in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ['my "out', "x.json"]


class Stranger:
    """Answers for the stranger what our own model computes, with one thing changed."""

    def __init__(self, model: GPT, change: Callable[[dict[str, Any], list[np.ndarray]], None]) -> None:
        self.model, self.change = model, change

    def __call__(self, kind: str, job: dict[str, Any], scratch: Path) -> dict[str, Any]:
        made, logits = [], []
        for prompt in job["prompts"]:
            steps = continuations(self.model, [prompt], job["new_tokens"], Sampling(temperature=0))
            made.append([id for (id,) in steps])
            logits_SV, _ = parity.our_logits(self.model, prompt + made[-1], 0.0)
            logits.append(logits_SV[len(prompt) - 1 : -1].numpy())
        found = {
            "software": "theirs 1.0", "class": "X", "wrong_ids": [], "made": made,
            "differences": [[0.0] * len(row) for row in job["rows"]],
            "losses": [parity._loss(parity.our_logits(self.model, row, 0.0)[0], row) for row in job["rows"]],
        }  # fmt: skip
        self.change(found, logits)
        for file, array in zip(job["made_logits"], logits, strict=True):
            np.save(file, array)
        return found


def add(array: Any, at: Any, amount: float) -> None:
    array[at] += amount


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found, logits: None, None),
        (lambda found, logits: found["wrong_ids"].append(3), "1 of .* texts get other ids, such as"),
        (lambda found, logits: add(found["differences"][0], 0, 2e-4), "logits are up to 0.0002 apart"),
        (lambda found, logits: add(found["differences"][1], 3, float("inf")), "logits are up to inf apart"),
        (lambda found, logits: add(found["losses"], 1, 2e-4), "the loss of a row 0.0002"),
        (lambda found, logits: add(logits[0], (0, 5), 2e-4), "generation goes another way"),
        (lambda found, logits: add(found["made"][0], 0, 1), "generation goes another way"),
    ],
)
def test_an_export_that_computes_something_else_leaves_nothing(
    change: Any, words: str | None, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moelet.errors.find_spec", lambda name: True)
    monkeypatch.setattr(parity, "_ask_stranger", Stranger(load(runs["dense"]).model, change))
    if words is None:
        found = hf.export_hf(runs["dense"], tmp_path / "out").parity
        assert found.logits == 0 and found.same == found.prompts
        return
    with pytest.raises(UserError, match=words):
        hf.export_hf(runs["dense"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_logits_count_up_to_the_first_close_choice(runs: dict[str, Path]) -> None:
    """A router whose second and third expert are equally good at one token."""
    model = load(runs["factorised"]).model
    row = list(range(10, 30))
    _, end = parity.our_logits(model, row, 0.0)
    assert end == len(row)
    router = model.layers[1].mlp.gate
    seen: list[torch.Tensor] = []
    handle = router.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    parity.our_logits(model, row, 0.0)
    handle.remove()
    scores_E = seen[0][7] @ router.weight.T
    second, third = scores_E.topk(3).indices[1:]
    with torch.no_grad():  # moves one expert's score of the 8th token to that of another
        router.weight[third] += seen[0][7] * (scores_E[second] - scores_E[third]) / seen[0][7].square().sum()
    assert parity.our_logits(model, row, 1e-5)[1] <= 7


def test_a_place_is_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "a") as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("half")
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="is there already"), whole(tmp_path / "a") as temporary:
        temporary.write_text("ours")
        (tmp_path / "a").write_text("somebody else's")
    assert (tmp_path / "a").read_text() == "somebody else's" and len(list(tmp_path.iterdir())) == 1
    with whole(tmp_path / "new" / "b") as temporary:
        temporary.write_text("all")
    assert (tmp_path / "new" / "b").read_text() == "all" and len(list((tmp_path / "new").iterdir())) == 1


def test_the_text_to_compare_on(runs: dict[str, Path], tiny_settings: TinySettings, tokenizer: Tokenizer) -> None:
    """The run's held-out text; where it has gone, the embedded one."""
    hparams = make_hparams(tiny_settings())
    here = parity.sample_text(hparams, tokenizer, 32)
    assert here.origin == "held-out text" and {len(row) for row in here.rows} == {32}
    assert here.rows[0][0] == tokenizer.bos_id
    gone = parity.sample_text(make_hparams(tiny_settings(data={"files": "nowhere/*.txt"})), tokenizer, 32, 3)
    assert gone.origin == "the embedded corpus" and len(gone.rows) == 3
    for sample in (here, gone):  # where the text is long enough, what contexts begin with
        assert [len(prompt) for prompt in sample.prompts] == [16] * 20
        assert sample.prompts[0] == sample.rows[0][:16]
    assert gone.prompts[:3] == [row[:16] for row in gone.rows]
    assert parity._prompts([1, 2, 3], 32) == [[1, 2], [2, 3]] and parity._prompts([1] * 99, 8) == [[1] * 7] * 20


@pytest.mark.parametrize(
    ("file", "name"),
    [("first.gguf", "first"), ("My Model (v2).gguf", "my-model-v2"), ("$(x);\n.gguf", "x"), ("日本.gguf", "moelet")],
)
def test_ollamas_name_needs_no_quotes(file: str, name: str) -> None:
    assert ollama_name(Path(file)) == name


def test_the_modelfile_runs_the_model_as_we_do(runs: dict[str, Path]) -> None:
    made = gguf_export.ExportedFile(Path("/a/b.gguf"), 1, 1, 1, 512, None)
    lines = modelfile(made).splitlines()
    assert lines[:3] == ["FROM /a/b.gguf", 'TEMPLATE "{{ .Prompt }}"', "PARAMETER num_ctx 512"]
    assert f"PARAMETER temperature {Sampling().temperature}" in lines and "PARAMETER repeat_penalty 1" in lines


@pytest.mark.nightly
def test_ten_thousand_texts_have_our_ids(folders: dict[str, Path], runs: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    texts = odd_texts(10_000, seed=2)
    names = ("factorised", "extras")  # byte-pair encoding and unigram
    jobs = [{"folder": str(folders[name]), "own_code": name not in STOCK, "texts": texts, "rows": []} for name in names]
    found = ask(jobs, tmp_path)
    for name in names:
        ours = load(runs[name]).tokenizer.encode_batch(texts)
        assert found[f"{name} lengths"].tolist() == [len(row) for row in ours]
        assert (found[f"{name} ids"] == np.concatenate(ours)).all() and found[f"{name} decoded"].all()


@pytest.fixture(scope="module")
def trained(tiny_settings: TinySettings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that have learned a little, wide enough for llama.cpp's blocks: of experts, dense, of the reference."""
    root = tmp_path_factory.mktemp("trained")
    wide = {"d_model": 64, "d_ff": 256, "max_length": 128}
    length = {"train_steps": 150, "batch_size": 8, "log_steps": 50}
    for name in ("factorised", "dense", "reference"):
        settings = tiny_settings(model=SHAPES[name] | wide, train=length, data={"validation_fraction": 0.2})
        train.start(make_hparams(settings), root / name, Progress())
    return {path.name: path for path in root.iterdir()}


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["factorised", "dense", "reference"])
def test_fifty_texts_in_transformers(name: str, trained: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    made = hf.export_hf(trained[name], tmp_path / "out", rows=50).parity
    assert made.of_tokens == 50 * 128 and made.tokens > 0.9 * made.of_tokens
    assert made.logits_of_all <= 1e-4 and made.same == made.prompts == 20


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("name", ["factorised", "dense"])
def test_fifty_texts_in_llama_cpp(name: str, kind: str, trained: dict[str, Path], tmp_path: Path) -> None:
    """At f32 also: what it makes of 20 prompts is what we make of them, token for token."""
    pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("llama_cpp")
    made = export_gguf(trained[name], tmp_path / "x.gguf", kind, rows=50)
    assert made.parity is not None and made.parity.logits <= gguf_export.LIMITS[kind].logits
    assert made.parity.tokens > (0.9 if name == "dense" or kind == "f32" else 0.02) * made.parity.of_tokens
    if kind != "f32":
        return
    model, tokenizer, hparams, _ = load(trained[name])
    options = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "verbose": False}
    theirs = llama_cpp.Llama(str(tmp_path / "x.gguf"), n_ctx=128, logits_all=True, **options)
    for row in parity.sample_text(hparams, tokenizer, 128, 20).rows:
        ours = [id for (id,) in continuations(model, [row[:16]], 64, Sampling(temperature=0))]
        tokens = theirs.generate(row[:16], temp=0.0, repeat_penalty=1.0)
        assert [next(tokens) for _ in ours] == ours
