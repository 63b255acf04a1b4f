"""Experts that get no tokens, routers that are sure of everything: an alarm within as many steps as are said."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinySettings
from injection import Said, infect, moelet, quick, write_settings
from processes import rows
from scorecard import Trials

from moelet import health
from moelet.state import Training
from moelet.tokenizer import Tokenizer

KINDS = ("a bias of +50", "one of -1e9", "a router of zeros", "a learning rate 100 times as high")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, trials: Trials) -> None:
    quick(monkeypatch)
    if not trials.full:
        monkeypatch.setattr(health, "HORIZON", 12)


def limit(load: float) -> int:
    """The step by which an expert with this share of the fair load alarms, from the first on: by the average alone."""
    average, steps = 1.0, 0
    while average >= health.RULES["load"].alarm:
        average, steps = average + (load - average) / health.HORIZON, steps + 1
    return steps


@pytest.fixture
def settings(tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path: Path) -> dict[str, Any]:
    tokenizer.save(tmp_path / "given.model")
    given: dict[str, Any] = tiny_settings(
        model={"max_length": 16, "selection_bias": True},
        tokenizer={"file": str(tmp_path / "given.model")},
        balance={"bias_rate": 1e-6, "alpha": 0.1},
        train={"train_steps": limit(0.0) + 2, "log_steps": 10_000, "eval_tokens": 100},
    )
    return given


def sicken(kind: str, training: Training) -> None:
    gate = training.model.layers[1].mlp.gate
    if kind == "a bias of +50":
        gate.bias[1] = 50.0
    elif kind == "one of -1e9":
        gate.bias[2] = -1e9
    elif kind == "a router of zeros":  # ties go to the lowest ids, and without a gradient that stays
        with torch.no_grad():
            gate.weight.zero_()
        gate.weight.requires_grad_(False)


def start(
    settings: dict[str, Any], kind: str, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch, run: Path
) -> Said:
    changed = json.loads(json.dumps(settings))
    if kind == "a bias of +50":
        changed["model"]["top_k"] = 1
    if kind == "a router of zeros":  # moved biases would find those ties
        changed["model"]["selection_bias"], changed["balance"]["bias_rate"] = False, None
    if kind == "a learning rate 100 times as high":
        changed["optim"]["router_lr"] = 100 * changed["optim"]["lr"]
    infect(patch, lambda training: sicken(kind, training))
    return moelet(capsys, "train", write_settings(run.with_suffix(".json"), changed), "--run", run)


@pytest.mark.check(23)
def test_experts_that_starve(
    trials: Trials,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """The run says which, in which layer, since when and what to do, as soon as the average is under a tenth."""
    for index in range(trials.count(small=4, full=12)):
        kind, run = KINDS[index % len(KINDS)], tmp_path / f"run-{index}"
        settings["train"]["seed"] = index
        with trials.one(f"{index}: {kind}"), monkeypatch.context() as patch:
            ended = start(settings, kind, capsys, patch, run)
            assert ended.code == 0, ended.text
            found = [(row["step"], alarm) for row in rows(run) for alarm in row.get("alarms", [])]
            assert found and found[0][0] <= limit(0.0), "within the steps that it is said to take"
            assert "alarm at step" in ended.text and "In a new run, set" in ended.text
            if kind == KINDS[3]:
                continue
            starved = {KINDS[0]: {0, 2, 3}, KINDS[1]: {2}, KINDS[2]: {2, 3}}[kind]
            told = {alarm["expert"] for _, alarm in found if (alarm["kind"], alarm["layer"]) == ("load", 1)}
            assert told == starved and all(f"layer 1, expert {expert}:" in ended.text for expert in starved)
            assert {step for step, alarm in found if alarm["kind"] == "load"} == {limit(0.0)}
            assert rows(run)[-1]["starving_experts"][1] == len(starved)


@pytest.mark.check(23)
def test_experts_that_are_well(
    trials: Trials,
    settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """No alarm in a healthy run, whatever its seed; every line of metrics.jsonl has load, entropy and largest score."""
    settings["balance"]["bias_rate"] = 1e-3
    settings["train"] |= {"train_steps": trials.count(small=40, full=600), "log_steps": 20}
    for seed in range(trials.count(small=2, full=3)):
        run = tmp_path / f"run-{seed}"
        settings["train"]["seed"] = seed
        with trials.one(f"seed {seed}"):
            ended = moelet(capsys, "train", write_settings(tmp_path / "given.json", settings), "--run", run)
            assert ended.code == 0 and "alarm" not in ended.text
            for row in rows(run):
                assert "alarms" not in row and row["starving_experts"] == [0, 0]
                for loads in row["expert_load"]:
                    assert sum(loads) == pytest.approx(4) and math.isfinite(sum(loads))
                assert all(0 < entropy <= 1.000001 for entropy in row["router_entropy"])
                assert all(0 < largest < 64 for largest in row["router_largest"])
