"""The loop around the steps: what is due when, and what a source that goes away leaves behind."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TinySettings

from moelet import train
from moelet.console import Progress
from moelet.errors import TemporaryError
from moelet.hparams import make_hparams
from moelet.speed.peers import AnyIds
from moelet.storage import checkpoint, manifest


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def settings(tiny_settings: TinySettings) -> dict[str, Any]:
    data = tiny_settings()
    data["train"] |= {
        "train_steps": 12,
        "log_steps": 5,
        "eval_steps": 4,
        "checkpoint_steps": 3,
        "keep_checkpoints": 100,
    }
    data["train"] |= {"keep_checkpoints": 100, "eval_tokens": 500, "sample_prompt": None}
    return data


def test_first_and_last_step_are_logged_and_the_last_is_evaluated_and_saved(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    train.start(make_hparams(settings), tmp_path / "run", Progress())
    made = rows(tmp_path / "run")
    assert [row["step"] for row in made] == [1, 4, 5, 8, 10, 12]
    assert [row["step"] for row in made if "val_loss" in row] == [4, 8, 12]
    better = {row["step"] for row in made if "val_loss" in row}  # a tiny model improves at each evaluation
    assert set(manifest.checkpoint_steps(tmp_path / "run")) == {3, 6, 9, 12} | better
    assert all(earlier["tokens"] < later["tokens"] for earlier, later in itertools.pairwise(made))
    assert made[-1]["documents"] > 0 and made[-1]["padding"] < 0.1


def test_masking_documents_changes_training_and_evaluation(settings: dict[str, Any], tmp_path: Path) -> None:
    """The same tokens are predicted, each without the documents before its own."""
    settings["train"] |= {"log_steps": 1, "train_steps": 4}
    for masked in (False, True):
        settings["data"] |= {"mask_documents": masked, "piece_chars": 64}
        train.start(make_hparams(settings), tmp_path / str(masked), Progress())
    for blind, masked in zip(rows(tmp_path / "False"), rows(tmp_path / "True"), strict=True):
        assert blind["tokens"] == masked["tokens"] and blind["loss"] != masked["loss"]
        assert ("val_loss" in blind) == ("val_loss" in masked)


def test_a_source_that_goes_away_leaves_a_checkpoint(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is saved at the last step made, and going on from there is as if nothing had happened."""
    train.start(make_hparams(settings), tmp_path / "whole", Progress())
    all_batches = train.training_batches

    def seven_batches(*args: Any) -> Iterator[Any]:
        yield from itertools.islice(all_batches(*args), 7)
        raise TemporaryError("the hub is away")

    monkeypatch.setattr(train, "training_batches", seven_batches)
    with pytest.raises(TemporaryError, match="the hub is away"):
        train.start(make_hparams(settings), tmp_path / "cut", Progress())
    assert checkpoint.newest(tmp_path / "cut")[0] == 7
    monkeypatch.setattr(train, "training_batches", all_batches)
    train.resume(tmp_path / "cut", [], Progress())
    losses = [{row["step"]: row["loss"] for row in rows(tmp_path / name)} for name in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_the_best_checkpoint_is_kept_beside_the_newest(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["train"] |= {"keep_checkpoints": 1, "train_steps": 24}
    settings["optim"] |= {"lr": 3.0, "min_lr": 3.0, "warmup_steps": 0}  # far too high: the loss goes up
    run = tmp_path / "run"
    train.start(make_hparams(settings), run, Progress())
    evaluated = {row["step"]: row["val_loss"] for row in rows(run) if "val_loss" in row}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert set(manifest.checkpoint_steps(run)) == {best, 24}


NEW_SETTINGS: list[dict[str, Any]] = [
    {"model": {"positions": "rope"}},
    {"model": {"zero_init": True}},
    {"model": {"shared_expert": 32}},
    {"optim": {"router_lr": 0.1}},
    {"balance": {"z_loss": 1e-3}},
]


def test_runs_from_before_the_modern_settings_go_on() -> None:
    """The fingerprints of the reference settings are those of commit 40ba2ea, which knew none of the new ones."""
    tokenizer = AnyIds(300)
    tokenizer.fingerprint = "that of any ids"

    def marks(**sections: Any) -> dict[str, str]:
        return train.identity(make_hparams({"train": {"train_steps": 3}, **sections}), tokenizer)

    before = marks()
    assert before["settings"][:16] == "9b52fb1fe6917de4" and before["model"][:16] == "d04b01a01aa3117e"
    for change in NEW_SETTINGS:
        assert marks(**change)["settings"] != before["settings"]
        assert (marks(**change)["model"] != before["model"]) == ("model" in change)
