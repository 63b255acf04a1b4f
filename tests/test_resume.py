"""A resumed run is the run it would have been: after kill -9, signals, damage, and in every mode, to the last bit."""

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TinySettings
from cuts import in_process, train_until  # noqa: F401  a fixture
from processes import Zygote, assert_same_run, digests, kill_and_resume, last_step, newest, rows, wait_for_step
from test_modern import EVERYTHING

from moelet.tokenizer import Tokenizer

RECIPE = Path(__file__).parent.parent / "recipes" / "cpu-tiny.json"


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    found = Zygote(tmp_path_factory.mktemp("zygote") / "out.txt")
    yield found
    found.process.kill()
    found.process.wait()


# 1. kill -9


STEPS, EVERY = 40, 5


def write_settings(path: Path, settings: dict[str, Any]) -> Path:
    settings["train"] |= {"train_steps": STEPS, "train_tokens": None, "log_steps": 1, "checkpoint_steps": EVERY}
    path.write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def uninterrupted(zygote: Zygote, tiny_settings: TinySettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of the tiny settings, whose settings file lies beside it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    zygote.run("train", write_settings(folder / "settings.json", tiny_settings()), "--run", folder / "run")
    assert [row["step"] for row in rows(folder / "run")] == list(range(1, STEPS + 1))
    return folder / "run"


@pytest.mark.parametrize(
    "settings",
    [
        None,
        pytest.param(
            RECIPE, marks=[pytest.mark.nightly, pytest.mark.skipif(not RECIPE.exists(), reason="no such recipe")]
        ),
    ],
    ids=["tiny", "recipe"],
)
def test_killed_at_five_random_steps_the_run_ends_as_if_nothing_had_happened(
    zygote: Zygote, uninterrupted: Path, tmp_path: Path, settings: Path | None
) -> None:
    draw = random.Random(1)
    expected = uninterrupted
    path = uninterrupted.parent / "settings.json"
    if settings is not None:
        path, expected = (
            write_settings(tmp_path / "settings.json", json.loads(settings.read_text())),
            tmp_path / "whole",
        )
        zygote.run("train", path, "--run", expected)
    kill_and_resume(zygote, path, tmp_path / "run", sorted(draw.sample(range(1, STEPS - 10), 5)), EVERY, draw)
    assert_same_run(tmp_path / "run", expected)
    left = {entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()}
    assert all(".tmp" not in name for name in left), "what interrupted saves left must be swept up"


def test_killed_before_the_first_step_it_starts_over(zygote: Zygote, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pid = zygote.start("train", uninterrupted.parent / "settings.json", "--run", run)
    while not (run / "hparams.json").exists():
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    assert zygote.wait() == -signal.SIGKILL
    zygote.run("train", "--resume", run)
    assert "starting over" in zygote.said()
    assert_same_run(run, uninterrupted)


# 3. signals


@pytest.mark.parametrize(
    ("number", "to_group"),
    [
        pytest.param(signal.SIGTERM, False, id="SIGTERM"),
        pytest.param(signal.SIGINT, True, id="SIGINT to the group"),
        pytest.param(signal.SIGTERM, True, id="SIGTERM to the group", marks=pytest.mark.nightly),
        pytest.param(signal.SIGINT, False, id="SIGINT", marks=pytest.mark.nightly),
    ],
)
def test_a_signal_saves_at_that_step_and_the_run_goes_on_as_if_without(
    zygote: Zygote, uninterrupted: Path, tmp_path: Path, number: signal.Signals, to_group: bool
) -> None:
    run = tmp_path / "run"
    pid = zygote.start("train", uninterrupted.parent / "settings.json", "--run", run)
    wait_for_step(run, 17, pid)
    (os.killpg if to_group else os.kill)(pid, number)
    assert zygote.wait() == 128 + number, zygote.said()
    step = last_step(run)
    assert 17 <= step < STEPS
    assert newest(run).name == f"step-{step:08}", "saved at the last step, whatever checkpoint_steps says"
    said = zygote.said()
    assert f"interrupted and saved at step {step}" in said
    assert f"--resume {run}" in said
    assert "Traceback" not in said
    assert (run / "report.html").is_file() and (run / "loss_curve.png").is_file()
    zygote.run("train", "--resume", run)
    assert f"resumed at step {step} of {STEPS}" in zygote.said()
    assert rows(run) == rows(uninterrupted)
    assert digests(run) == digests(uninterrupted)


def test_a_third_signal_ends_it_at_once(zygote: Zygote, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pid = zygote.start("train", uninterrupted.parent / "settings.json", "--run", run)
    wait_for_step(run, 7, pid)
    os.kill(pid, signal.SIGSTOP)  # so that all are there before the step ends; two of a kind would count as one
    three = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in three:
        os.kill(pid, number)
    os.kill(pid, signal.SIGCONT)
    began = time.monotonic()
    assert zygote.wait() in [-number for number in three]
    assert time.monotonic() - began < 10
    zygote.run("train", "--resume", run)
    assert_same_run(run, uninterrupted)


# 2. every mode, inside this process


@pytest.fixture
def saved_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path / "given.model")
    return tmp_path / "given.model"


DATA: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"packing": False},
    "masked": {"mask_documents": True, "piece_chars": 64},
    "modern": {"mask_documents": True, "piece_chars": 64},
}
# every pair of values once; the other four combinations at night
PAIRS = [("packed", 1, "fp32"), ("packed", 3, "fp16"), ("padded", 1, "fp16"), ("padded", 3, "fp32")]
REST = set(itertools.product(["packed", "padded"], [1, 3], ["fp32", "fp16"])) - set(PAIRS)
MODES = [*PAIRS, ("masked", 3, "fp32"), *(pytest.param(*mode, marks=pytest.mark.nightly) for mode in sorted(REST))]
MODES += [("modern", 1, "fp32"), pytest.param("modern", 2, "fp16", marks=pytest.mark.nightly)]
MODERN: dict[str, dict[str, Any]] = {  # everything that moves: Muon's momentum, the biases of choice, the shares
    "model": EVERYTHING,
    "optim": {"optimizer": "muon", "muon_every": 2, "schedule": "wsd"},
    "balance": {"bias_rate": 0.01, "z_loss": 1e-3},
}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("data", "accumulation", "precision"), MODES)
def test_cut_three_times_in_a_row_every_mode_ends_bitwise_equal(
    monkeypatch: pytest.MonkeyPatch,
    tiny_settings: TinySettings,
    saved_tokenizer: Path,
    tmp_path: Path,
    data: str,
    accumulation: int,
    precision: str,
) -> None:
    settings = tiny_settings(
        tokenizer={"file": str(saved_tokenizer)},
        data=DATA[data],
        **(MODERN if data == "modern" else {}),
        train={
            "train_steps": 12,
            "precision": precision,
            "gradient_accumulation": accumulation,
            "checkpoint_steps": 2,
            "eval_steps": 5,
            "eval_tokens": 200,
        },
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_until(monkeypatch, whole, settings, None)
    for number, step in enumerate([3, 4, 9]):
        train_until(monkeypatch, cut, None if number else settings, step)
    train_until(monkeypatch, cut, None, None)
    assert_same_run(cut, whole)
    found = rows(whole)
    assert len({row["loss"] for row in found}) == 12
    assert len({row["lr"] for row in found}) > (4 if data == "modern" else 10)
    state = json.loads((newest(cut) / "state.json").read_text())
    expected = json.loads((newest(whole) / "state.json").read_text())
    assert {**state, "seconds": 0, "elapsed": 0} == {**expected, "seconds": 0, "elapsed": 0}
    assert (state["scaler"] is not None) == (precision == "fp16")


@pytest.mark.usefixtures("in_process")
def test_skipped_fp16_steps_survive_a_cut(
    monkeypatch: pytest.MonkeyPatch, tiny_settings: TinySettings, saved_tokenizer: Path, tmp_path: Path
) -> None:
    """A scale that overflows again and again: the skipped batches and the scale are part of the state."""
    import torch

    monkeypatch.setattr(
        "moelet.state.make_scaler",
        lambda dtype, device: torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_factor=2.0**9, growth_interval=2),
    )
    settings = tiny_settings(
        tokenizer={"file": str(saved_tokenizer)},
        train={"train_steps": 8, "precision": "fp16", "checkpoint_steps": 1},
    )
    train_until(monkeypatch, tmp_path / "whole", settings, None)
    assert rows(tmp_path / "whole")[-1]["skipped_steps"] > 5
    for number, step in enumerate([0, 2, 5]):
        train_until(monkeypatch, tmp_path / "cut", None if number else settings, step)
    train_until(monkeypatch, tmp_path / "cut", None, None)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.usefixtures("in_process")
def test_what_is_only_looked_at_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, tiny_settings: TinySettings, saved_tokenizer: Path, tmp_path: Path
) -> None:
    """Evaluating, sampling, logging and saving more often leaves the weights as they would have been."""
    seldom = {"train_steps": 8, "log_steps": 8, "sample_prompt": None}
    often = {"train_steps": 8, "log_steps": 1, "sample_prompt": "def", "eval_steps": 2, "checkpoint_steps": 3}
    for name, changes in (("seldom", seldom), ("often", often)):
        settings = tiny_settings(tokenizer={"file": str(saved_tokenizer)}, train=changes)
        train_until(monkeypatch, tmp_path / name, settings, None)
    assert digests(tmp_path / "seldom") == digests(tmp_path / "often")
    assert [row["step"] for row in rows(tmp_path / "seldom")] == [1, 8]


# 4. damage


@pytest.mark.usefixtures("in_process")
def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(
    monkeypatch: pytest.MonkeyPatch,
    tiny_settings: TinySettings,
    saved_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = tiny_settings(tokenizer={"file": str(saved_tokenizer)}, train={"train_steps": 12, "checkpoint_steps": 3})
    train_until(monkeypatch, tmp_path / "whole", settings, None)
    train_until(monkeypatch, tmp_path / "cut", settings, 8)
    damaged = newest(tmp_path / "cut") / "model.safetensors"
    assert damaged.parent.name == "step-00000006"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    train_until(monkeypatch, tmp_path / "cut", None, None)
    said = capsys.readouterr().out
    assert "checkpoint of step 6 passed over: model.safetensors has SHA-256" in said
    assert "resumed at step 3 of 12" in said
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
