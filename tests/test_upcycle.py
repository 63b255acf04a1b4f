"""A dense run made a Mixture of Experts: it starts at the same loss, is an ordinary run, refuses what doesn't fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinySettings

from moelet import metrics, train
from moelet.cli import main
from moelet.console import Progress
from moelet.data import Batch, collate, read_validation
from moelet.errors import UserError
from moelet.evaluate import evaluate
from moelet.hparams import make_hparams
from moelet.state import Training, build, restore
from moelet.step import train_step
from moelet.storage.checkpoint import load, load_run_settings, newest, read
from moelet.storage.manifest import checkpoint_steps
from moelet.upcycle import upcycle


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "RATE_SECONDS", 0.0)
        patch.setitem(metrics.RATE_SIZE, "cpu", 8)
        yield


SHAPES: dict[str, dict[str, Any]] = {
    "learned-silu": {"positions": "learned", "activation": "silu"},
    "rope-swiglu": {
        "positions": "rope", "activation": "swiglu", "qk_norm": True, "tie_embeddings": False, "d_embed": None,
        "value_residual": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def dense_runs(tiny_settings: TinySettings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense run of each shape, of 12 steps. No test changes them."""
    runs = {}
    for name, shape in SHAPES.items():
        runs[name] = tmp_path_factory.mktemp("dense") / name
        model = shape | {"n_experts": 1, "top_k": 1, "d_ff": 32}
        settings = tiny_settings(model=model, balance={"loss": None}, train={"train_steps": 12})
        train.start(make_hparams(settings), runs[name], Progress())
    return runs


@pytest.fixture(scope="module")
def dense(dense_runs: dict[str, Path]) -> Path:
    return dense_runs["learned-silu"]


def restored(run: Path, **changes: Any) -> Training:
    """Return the training in a folder, at its newest checkpoint."""
    hparams, tokenizer = load_run_settings(run)
    data = hparams.model_dump(mode="json")
    for section, values in changes.items():
        data[section] |= values
    training = build(make_hparams(data), tokenizer)
    step, _ = newest(run)
    assert step is not None
    restore(training, read(run, step))
    return training


def held_out_loss(run: Path) -> float:
    model, tokenizer, hparams, _ = load(run)
    text = read_validation(hparams.data, tokenizer, hparams.model.max_length, 4, 2000, "validation")
    return evaluate(model, text, torch.float32).loss


def batch_of(training: Training) -> Batch:
    ids = torch.randint(4, training.tokenizer.vocab_size, (4, 33), generator=torch.Generator().manual_seed(0))
    return collate(list(ids.numpy()), True)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_starts_at_the_dense_loss(shape: str, top_k: int, dense_runs: dict[str, Path], tmp_path: Path) -> None:
    """In evaluation, and in training, where dropout draws the same numbers."""
    dense, run = dense_runs[shape], tmp_path / "run"
    upcycle(dense, run, experts=4, top_k=top_k)
    assert checkpoint_steps(run) == [0]
    assert held_out_loss(run) == pytest.approx(held_out_loss(dense), abs=1e-5)
    before, after = restored(dense), restored(run)
    assert (after.step, after.tokens, after.seconds, after.elapsed, after.best) == (0, 0, 0.0, 0.0, None)
    assert after.hparams.model.d_ff == 4 * before.hparams.model.d_ff
    assert after.hparams.model.expert_width == before.hparams.model.d_ff and after.hparams.model.normalize_top_k
    before.step = 0  # the seed of dropout
    reports = [train_step(training, [batch_of(training)]) for training in (before, after)]
    assert reports[1].loss == pytest.approx(reports[0].loss, abs=1e-5)
    assert len(reports[1].expert_load) == 2 and sum(reports[1].expert_load[0]) == pytest.approx(4)


def test_without_renormalised_weights_it_would_not(dense: Path, tmp_path: Path) -> None:
    """What the setting is for: the same weights, with it off, are another function."""
    upcycle(dense, tmp_path / "run", experts=4)
    training = restored(tmp_path / "run", model={"normalize_top_k": False})
    dense_training = restored(dense)
    ids = batch_of(training).input_ids
    hidden, other = (item.model.eval()(ids).hidden for item in (dense_training, training))
    assert (hidden - other).abs().max() > 1e-2


def test_noise_is_relative_and_seeded(dense: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        upcycle(dense, tmp_path / name, experts=4, noise=0.25, seed=seed)
    a, b, c = (read(tmp_path / name, 0).model for name in "abc")
    original = read(dense, 12).model
    up = "layers.0.mlp.experts.up_proj"
    copied = original["layers.0.mlp.up_proj.weight"]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a[up], c[up]) and not torch.equal(
        a["layers.0.mlp.gate.weight"], c["layers.0.mlp.gate.weight"]
    )
    assert len({matrix.numpy().tobytes() for matrix in a[up]}) == 4, "no two copies are equal"
    assert (a[up] - copied).std() / copied.std() == pytest.approx(0.25, rel=0.1)
    assert torch.equal(a["embed.tokens.weight"], original["embed.tokens.weight"])
    assert a["layers.1.mlp.gate.weight"].std() == pytest.approx(0.02, rel=0.3)


def test_it_is_an_ordinary_run(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command line: it trains on, ends with a report, generates, and its experts grow apart."""
    run = tmp_path / "a run"
    command = ["upcycle", str(dense), "--run", str(run), "--experts", "4", "--noise", "0.01"]
    assert main([*command, "--set", "train.train_steps=8"]) == 0
    told = capsys.readouterr().out
    assert "at step 12" in told and f"train --resume '{run}'" in told and "from its start" in told
    assert main(["generate", str(run), "--prompt", "def", "--tokens", "5"]) == 0
    first = read(run, 0).model["layers.0.mlp.experts.up_proj"]
    assert main(["train", "--resume", str(run)]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9)) and (run / "report.html").exists()
    assert rows[0]["lr"] == pytest.approx(0.005), "a schedule of its own, from the warm-up on"
    assert rows[0]["tokens"] == 4 * 32
    last = read(run, 8).model["layers.0.mlp.experts.up_proj"]
    assert (last[0] - last[1]).std() > 2 * (first[0] - first[1]).std()
    assert main(["generate", str(run), "--prompt", "def", "--tokens", "5"]) == 0
    assert json.loads((run / "hparams.json").read_text())["balance"]["loss"] == "switch", "the dense run had none"


def test_the_text_is_read_from_its_start_or_on(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "start")
    upcycle(dense, tmp_path / "on", continue_data=True)
    upcycle(dense, tmp_path / "longer", changes=["train.train_steps=24"])
    cursor = restored(dense).cursor
    assert restored(tmp_path / "on").cursor == cursor != restored(tmp_path / "start").cursor
    for name in ("start", "on"):
        train.resume(tmp_path / name, [], Progress())
    rows = {
        name: [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for name, run in (("start", tmp_path / "start"), ("on", tmp_path / "on"), ("dense", dense))
    }
    assert rows["start"] != rows["on"] and len(rows["on"]) == 12
    assert restored(tmp_path / "longer").total_steps == 24


def test_resumed_it_is_the_run_it_would_have_been(dense: Path, tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        upcycle(dense, tmp_path / name, changes=["train.checkpoint_steps=4", "train.keep_checkpoints=9"])
        train.resume(tmp_path / name, [], Progress())
    for step in (8, 12):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step:08}")
    train.resume(tmp_path / "cut", [], Progress())
    whole, cut = (read(tmp_path / name, 12).model for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_an_attempt_cut_short_is_made_again(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "run")
    (tmp_path / "run" / "hparams.json").unlink()
    upcycle(dense, tmp_path / "run", experts=4)
    assert restored(tmp_path / "run").hparams.model.n_experts == 4


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"top_k": 9}, ["--experts is 8 and --top-k is 9", "at most 8"]),
        ({"experts": 1, "top_k": 1}, ["--experts is 1", "2 experts or more"]),
        ({"noise": -1.0}, ["--noise is -1.0"]),
        ({"noise": float("nan")}, ["--noise is nan"]),
        ({"changes": ["model.d_model=64"]}, ["model.d_model from 32 to 64", "weights"]),
        ({"changes": ["model.normalize_top_k=false"]}, ["model.normalize_top_k from true to false"]),
        ({"changes": ["tokenizer.vocab_size=500"]}, ["tokenizer.vocab_size from 400 to 500"]),
        ({"changes": ["train.seed=1"], "continue_data": True}, ["train.seed from 0 to 1", "--continue-data"]),
        ({"changes": ["data.shuffle_window=9"], "continue_data": True}, ["data.shuffle_window", "--continue-data"]),
        ({"changes": ["optim.lr=-1"]}, ["optim.lr is -1"]),
        ({"changes": ["balance.loss=swich"]}, ["swich", "switch"]),
    ],
)
def test_what_doesnt_fit_is_refused_unwritten(
    arguments: dict[str, Any], parts: list[str], dense: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        upcycle(dense, tmp_path / "run", **arguments)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert not (tmp_path / "run").exists()


def test_folders_that_dont_fit_are_refused(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    upcycle(dense, tmp_path / "moe")
    (tmp_path / "begun").mkdir()
    for name in ("hparams.json", "tokenizer.model"):
        shutil.copy(dense / name, tmp_path / "begun")
    (tmp_path / "file").write_text("")
    for source, target, part in (
        (tmp_path / "moe", "new", "has 8 experts already"),
        (tmp_path / "begun", "new", "no checkpoint yet"),
        (tmp_path / "nothing", "new", "is not a run folder"),
        (dense, "moe", "is there already"),
        (dense, "file", "is there already"),
        (dense, "begun", "is there already"),
    ):
        assert main(["upcycle", str(source), "--run", str(tmp_path / target)]) == 78
        assert part in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    assert main(["upcycle", str(dense), "--run", str(tmp_path / "empty")]) == 0
