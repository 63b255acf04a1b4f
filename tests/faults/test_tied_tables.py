"""One table at both ends of the network, whatever is done with it, and a loss that goes on where it was."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinySettings
from injection import moelet, quick, write_settings
from processes import rows
from safetensors.torch import load_file, save_file
from scorecard import Trials
from test_modelling import is_tied
from test_modern import EVERYTHING

from moelet import train
from moelet.console import Progress
from moelet.data import collate
from moelet.hparams import make_hparams
from moelet.state import Training, build, restore, snapshot
from moelet.step import train_step
from moelet.storage.checkpoint import Checkpoint, load
from moelet.tokenizer import Tokenizer
from moelet.upcycle import upcycle


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


def tied_settings(trials: Trials, index: int, make: TinySettings, tokenizer_file: Path) -> dict[str, Any]:
    """Return settings of a run with tied tables: plain or with everything modern, factorised or not."""
    model = dict(EVERYTHING) if index % 3 == 2 else {}
    model |= {"d_embed": trials.random.choice([None, 16]), "tie_embeddings": True}
    balance = {"bias_rate": 0.01} if model.get("selection_bias") else {}
    steps = {"train_steps": 4, "checkpoint_steps": 2, "keep_checkpoints": 9, "eval_tokens": 300, "seed": index}
    return make(model=model, balance=balance, tokenizer={"file": str(tokenizer_file)}, train=steps)


def through_bytes(saved: Checkpoint, folder: Path) -> Checkpoint:
    """Return a checkpoint as it is after saving and loading."""
    folder.mkdir()
    for name, tensors in (("model", saved.model), ("optimizer", saved.optimizer)):
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    loaded = (load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer"))
    return Checkpoint(saved.step, *loaded, json.loads(json.dumps(saved.state)), saved.identity)


@pytest.mark.check(26)
def test_tied_tables_in_memory(
    trials: Trials, tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Born, moved to other formats, copied, trained, saved and loaded: one storage, one entry, one place that moves."""
    for index in range(trials.count(small=3, full=30)):
        settings = tied_settings(trials, index, tiny_settings, tmp_path / "unused.model")
        settings["tokenizer"]["file"] = None
        ids = torch.randint(4, tokenizer.vocab_size, (4, 33), generator=torch.Generator().manual_seed(index))
        batch = collate(list(ids.numpy()), True)
        with trials.one(f"{index}: {settings['model']}"):
            training = build(make_hparams(settings), tokenizer)
            assert is_tied(training.model) and is_tied(copy.deepcopy(training.model).to(torch.bfloat16).float())
            assert is_tied(copy.deepcopy(training.model).to("cpu", torch.float64))
            for _ in range(2):
                train_step(training, [batch])
            assert is_tied(training.model.train()), "trained"
            saved = through_bytes(snapshot(training, {}), tmp_path / str(index))
            assert sum("embed.tokens" in name or "lm_head" in name for name in saved.model) == 1
            other = build(make_hparams(settings), tokenizer)
            restore(other, saved)
            assert is_tied(other.model) and same_parameter_everywhere(other)
            losses = [train_step(each, [batch]).loss.hex() for each in (other, training)]
            assert losses[0] == losses[1], "no spike, not by a bit"


def same_parameter_everywhere(training: Training) -> bool:
    """Whether the optimizer moves the table that the network reads, and once."""
    moved = [p for group in training.optimizer.param_groups for p in group["params"]]
    return sum(parameter is training.model.table for parameter in moved) == 1


@pytest.mark.check(26)
def test_tied_tables_of_a_run(
    trials: Trials,
    tiny_settings: TinySettings,
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Loaded, resumed and upcycled they are still one, and the loss after a resume is the one it would have been."""
    tokenizer.save(tmp_path / "given.model")
    for index in range(trials.count(small=1, full=12)):
        settings = tied_settings(trials, index, tiny_settings, tmp_path / "given.model")
        given, whole, cut = (
            write_settings(tmp_path / "given.json", settings),
            tmp_path / f"whole-{index}",
            tmp_path / f"cut-{index}",
        )
        with trials.one(f"{index}: {settings['model']}"):
            assert moelet(capsys, "train", given, "--run", whole).code == 0
            assert is_tied(load(whole).model)
            assert moelet(capsys, "train", given, "--run", cut).code == 0
            (cut / "checkpoints" / "step-00000004").rename(tmp_path / f"gone-{index}")
            ended = moelet(capsys, "train", "--resume", cut)
            assert ended.code == 0 and "resumed at step 2 of 4" in ended.text, ended.text
            assert [row["loss"].hex() for row in rows(cut)] == [row["loss"].hex() for row in rows(whole)]
            assert is_tied(load(cut).model)


@pytest.mark.check(26)
def test_tied_tables_of_an_upcycled_run(
    trials: Trials, tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A Mixture of Experts made of a dense run has one table too, the dense run's, and so after its first steps."""
    tokenizer.save(tmp_path / "given.model")
    for index in range(trials.count(small=1, full=6)):
        model = {"n_experts": 1, "top_k": 1, "d_ff": 32, "d_embed": [16, None][index % 2]}
        dense = tiny_settings(
            model=model, balance={"loss": None}, tokenizer={"file": str(tmp_path / "given.model")},
            train={"train_steps": 2, "seed": index, "eval_tokens": 300},
        )  # fmt: skip
        run, made = tmp_path / f"dense-{index}", tmp_path / f"made-{index}"
        with trials.one(f"{index}: {model}"):
            train.start(make_hparams(dense), run, Progress())
            upcycle(run, made, experts=4, changes=["train.train_steps=2"])
            assert is_tied(load(made).model)
            assert torch.equal(load(made).model.table, load(run).model.table)
            train.resume(made, [], Progress())
            assert is_tied(load(made).model) and not torch.equal(load(made).model.table, load(run).model.table)
