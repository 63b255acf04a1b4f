"""Exported folders come back as runs that compute the same; what isn't one is refused, and its code never run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import TinySettings
from test_export import SHAPES, STOCK, make_run, settings_of, write_folder

from moelet import metrics
from moelet.cli import main
from moelet.data import read_validation
from moelet.errors import UserError
from moelet.evaluate import evaluate
from moelet.export.importing import import_hf
from moelet.export.names import folded
from moelet.storage.checkpoint import load
from moelet.tokenizer import Tokenizer

NAMES = ("factorised", "dense", "extras")
Data = dict[str, Any]


@pytest.fixture(scope="module")
def runs(
    tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {name: make_run(root / name, settings_of(SHAPES[name], tiny_settings), tokenizer) for name in NAMES}


@pytest.fixture(scope="module")
def exported(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder that each run is exported to. No test changes them."""
    root = tmp_path_factory.mktemp("folders")
    return {name: write_folder(root / name, *load(run)[:2], name not in STOCK) for name, run in runs.items()}


@pytest.fixture(scope="module")
def settings(tiny_settings: TinySettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A settings file whose model is none of these."""
    path = tmp_path_factory.mktemp("settings") / "tiny.json"
    path.write_text(json.dumps(tiny_settings()))
    return path


@pytest.fixture
def folder(exported: dict[str, Path], tmp_path: Path) -> Path:
    """A stock folder that a test may change."""
    return Path(shutil.copytree(exported["factorised"], tmp_path / "folder"))


def loss_of(run: Path) -> float:
    model, tokenizer, hparams, _ = load(run)
    text = read_validation(hparams.data, tokenizer, hparams.model.max_length, 4, 2000, "validation")
    return evaluate(model, text, torch.float32).loss


@pytest.mark.parametrize("name", NAMES)
def test_an_imported_folder_is_the_run_again(
    name: str, runs: dict[str, Path], exported: dict[str, Path], settings: Path, tmp_path: Path
) -> None:
    """With a model file of ours bit for bit as in training, else as it was folded; the loss is that of the run."""
    made = import_hf(exported[name], tmp_path / "run", settings)
    ours, theirs = load(runs[name]).model, load(tmp_path / "run").model
    ours = folded(ours) if name in STOCK else ours
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert all(bool((theirs.state_dict()[key] == tensor).all()) for key, tensor in ours.state_dict().items())
    assert loss_of(tmp_path / "run") == pytest.approx(loss_of(runs[name]), abs=1e-6)
    assert made.hparams.model.vocab_size == SHAPES[name].get("vocab_size")
    assert made.hparams.train.train_steps == 6


def test_an_imported_run_is_trained_on(
    exported: dict[str, Path], settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "RATE_SECONDS", 0.0)
    monkeypatch.setitem(metrics.RATE_SIZE, "cpu", 8)
    run = tmp_path / "run"
    command = ["import", str(exported["factorised"]), str(settings), "--run", str(run)]
    assert main([*command, "--set", "train.train_steps=2", "--set", "model.dropout=0.1"]) == 0
    before = loss_of(run)
    assert main(["train", "--resume", str(run)]) == 0
    assert load(run).step == 2 and loss_of(run) != before
    assert main(command) == 78  # the folder is taken


def test_without_a_settings_file_the_defaults_train_it(
    exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["import", str(exported["factorised"]), "--run", "my run", "--set", "optim.lr=0.002"]) == 0
    told, hparams = capsys.readouterr().out, load(tmp_path / "my run").hparams
    assert "the defaults, as there is no hparams.json here" in told and "train --resume 'my run'" in told
    assert hparams.total_steps == 1000 and hparams.optim.lr == 0.002 and hparams.data.source == "embedded"
    assert main(["import", str(exported["factorised"]), "none.json", "--run", "b"]) == 78
    assert 'no settings file none.json. Give the path of one. {"train"' in capsys.readouterr().err


def test_a_folder_that_transformers_saved_again(exported: dict[str, Path], settings: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    again = tmp_path / "again"
    model = transformers.AutoModelForCausalLM.from_pretrained(exported["factorised"], dtype=torch.bfloat16)
    model.save_pretrained(again, max_shard_size="20KB")
    with pytest.raises(UserError, match=r"holds no tokenizer\.model.*Copy it from the folder"):
        import_hf(again, tmp_path / "run", settings)
    shutil.copy(exported["factorised"] / "tokenizer.model", again)
    assert len(list(again.glob("*.safetensors"))) > 1
    import_hf(again, tmp_path / "run", settings)
    import_hf(exported["factorised"], tmp_path / "whole", settings)
    weights = load(tmp_path / "whole").model.state_dict()
    for name, tensor in load(tmp_path / "run").model.state_dict().items():
        assert torch.equal(tensor, weights[name].bfloat16().float())


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        data = {name: value for name, value in (json.loads(path.read_text()) | changes).items() if value != "gone"}
        path.write_text(json.dumps(data))

    return change


def change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        change(weights)
        safetensors.torch.save_file(weights, folder / "model.safetensors")

    return save


def index(weight_map: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def linked(name: str) -> Callable[[Path], None]:
    def link(folder: Path) -> None:
        shutil.move(folder / name, folder.with_name("elsewhere"))
        (folder / name).symlink_to(folder.with_name("elsewhere"))

    return link


NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate.weight"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "there is no .*config.json"),
    "no json": (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
    "deep json": (lambda folder: (folder / "config.json").write_text("[" * 10**6), "is not valid JSON"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "holds a list"),
    "a large config": (lambda folder: (folder / "config.json").write_bytes(b" " * 2**25), "It has at most 4194304"),
    "another model": (change_config(model_type="mixtral"), 'says model_type "mixtral".*moelet, qwen3_moe, qwen3'),
    "a model type of no type": (change_config(model_type=["qwen3"]), "says model_type"),
    "shared heads": (change_config(num_key_value_heads=2), "has num_key_value_heads 2. A run's has 4"),
    "wide heads": (change_config(head_dim=16), r"head_dim \* num_attention_heads 64"),
    "no heads": (change_config(head_dim="gone"), "has head_dim null"),
    "another activation": (change_config(hidden_act="gelu"), 'has hidden_act "gelu"'),
    "dense layers": (change_config(mlp_only_layers=[0]), r"has mlp_only_layers \[0\]"),
    "stretched positions": (change_config(rope_parameters={"rope_type": "yarn"}), 'has rope_type "yarn"'),
    "half a layer": (change_config(num_hidden_layers=1.5), "has num_hidden_layers 1.5. It must be a whole number"),
    "a truth for a number": (change_config(num_hidden_layers=True), "has num_hidden_layers true"),
    "many layers": (change_config(num_hidden_layers=1000), "take more than its 44 tensors"),
    "many experts": (change_config(num_experts=1000), "take more than its 44 tensors"),
    "more layers": (change_config(num_hidden_layers=10**9), r"config\.json.*\n.*model.n_layers is 10*\. It must be"),
    "a wide model": (change_config(hidden_size=8 * 10**12, num_attention_heads=10**12, num_key_value_heads=10**12),
                     r"model.d_model is 8000000000000\. It must be"),
    "a wide layer": (change_config(moe_intermediate_size=10**5), "has shape"),
    "a huge vocabulary": (change_config(vocab_size=10**30), r"config\.json.*\n.*model.vocab_size is 10*\. It must be"),
    "a small vocabulary": (change_config(vocab_size=300), "model.vocab_size is 300 and the tokenizer has 400"),
    "a long context": (change_config(max_position_embeddings=10**9), r"model.max_length is 10*\. It must be.* 1048576"),
    "a fourth layer": (change_config(num_hidden_layers=3), "layers.2.* is missing"),
    "a layer too few": (change_config(num_hidden_layers=1), "layers.1.* is too much"),
    "a tensor too few": (change_weights(lambda w: w.pop(GATE)), f"{GATE} is missing"),
    "another shape": (change_weights(lambda w: w.update({GATE: torch.ones(4, 33)})),
                      r"has shape \[4, 33\], not \[4, 32\]"),
    "whole numbers": (change_weights(lambda w: w.update({NORM: torch.ones(32, dtype=torch.int64)})), "is I64"),
    "not a number": (change_weights(lambda w: w[NORM].fill_(float("nan"))), "aren't finite"),
    "no safetensors": (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
                       "Weights are read from safetensors alone"),
    "half of safetensors": (lambda folder: (folder / "model.safetensors").write_bytes(b"\x08" * 100), "can't be read"),
    "a way out": (index({NORM: "../../model.safetensors"}), "A folder's files lie in it"),
    "an absolute way out": (index({NORM: "/etc/passwd"}), "A folder's files lie in it"),
    "no name": (index({NORM: 5}), "names the file 5"),
    "no map": (index([]), "has no weight_map"),
    "a link out, weights": (linked("model.safetensors"), "leads out of its folder"),
    "a link out, tokenizer": (linked("tokenizer.model"), "leads out of its folder"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.model").write_bytes(b"no"), "is not a SentencePiece model"),
    "our model without settings": (change_config(model_type="moelet"), 'has no settings under "moelet"'),
    "our model with others": (change_config(model_type="moelet", moelet={"depth": 3}), "there is no such setting"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_isnt_a_run_is_refused(what: str, folder: Path, settings: Path, tmp_path: Path) -> None:
    change, words = REFUSED[what]
    change(folder)
    with pytest.raises(UserError, match=words):
        import_hf(folder, tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", ["model.d_ff=128", "model.qk_norm=false", "tokenizer.vocab_size=500"])
def test_changes_that_the_weights_dont_fit_are_refused(
    change: str, exported: dict[str, Path], settings: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"--set changes {change.partition('=')[0]} from"):
        import_hf(exported["factorised"], tmp_path / "run", settings, [change])


def test_code_of_a_folder_isnt_run(exported: dict[str, Path], settings: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported["extras"], tmp_path / "folder"))
    canary = tmp_path / "canary"
    for path in folder.glob("*.py"):
        path.write_text(f"open({str(canary)!r}, 'w').close()")
    assert (folder / "modeling_moelet.py").exists()
    import_hf(folder, tmp_path / "run", settings)
    assert not canary.exists()
