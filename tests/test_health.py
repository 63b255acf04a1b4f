"""Alarms: what raises one and what doesn't, once each, the same after a resume, and where a person sees them."""

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinySettings
from rich.console import Console

from moelet import health, metrics, state, train
from moelet.console import Progress
from moelet.health import HORIZON, RULES, SHOWN, Alarm, Health, advice, alarm_lines
from moelet.hparams import make_hparams
from moelet.parallel import orders

WELL = {"entropy": [0.8], "largest": [3.0]}


def note(found: Health, steps: range, load: list[float], **router: list[float]) -> list[tuple[int, Alarm]]:
    """Return (step, alarm) of one layer with the same measures at all `steps`."""
    measured = WELL | router
    return [(number, alarm) for number in steps for alarm in found.note(number, [load], **measured)]


def test_an_expert_without_tokens_alarms_once_and_late() -> None:
    found = Health()
    alarms = note(found, range(1, 1000), [0.0, 2.0])
    average = [(1 - 1 / HORIZON) ** steps for steps in range(1000)]
    expected = next(steps for steps in range(1000) if average[steps] < 0.1)
    since = next(steps for steps in range(1000) if average[steps] < 0.3)
    assert [(number, alarm[:3], alarm.since) for number, alarm in alarms] == [(expected, ("load", 0, 0), since)]
    assert alarms[0][1].value == pytest.approx(average[expected], rel=1e-9)
    assert expected == 230, "the figure beside HORIZON"
    assert found.starving() == [1]


def test_one_that_gets_a_twentieth_alarms_when_it_is_said_to() -> None:
    assert [number for number, _ in note(Health(), range(1, 1000), [0.05, 1.95])] == [293]


def test_between_the_levels_nothing_is_told_again() -> None:
    found = Health()
    assert len(note(found, range(1, 400), [0.0, 2.0])) == 1
    assert note(found, range(400, 900), [0.2, 1.8]) == [], "better, but not well"
    assert note(found, range(900, 1900), [0.0, 2.0]) == [], "the same alarm as before"
    assert note(found, range(1900, 2400), [0.6, 1.4]) == []
    assert found.starving() == [0]
    again = note(found, range(2400, 3000), [0.0, 2.0])
    assert len(again) == 1 and again[0][1].since > 2400


def test_steps_that_swing_around_a_fair_mean_dont_alarm() -> None:
    draw, found = random.Random(0), Health()
    for number in range(1, 3000):
        load = [3 * (draw.random() < 0.25) for _ in range(8)]  # nothing in three of four steps, 0.75 on average
        assert found.note(number, [load], [draw.uniform(0.1, 1)], [draw.uniform(0, 60)]) == []


def test_a_sure_router_and_large_scores_alarm() -> None:
    assert [alarm.kind for _, alarm in note(Health(), range(1, 500), [1.0], entropy=[0.01])] == ["entropy"]
    alarms = note(Health(), range(1, 500), [1.0], largest=[100.0])
    assert [alarm.kind for _, alarm in alarms] == ["largest"]
    assert alarms[0][1].expert is None and alarms[0][1].value > RULES["largest"].alarm


def test_many_layers_know_their_own() -> None:
    found, load = Health(), [[1.0, 1.0], [0.0, 2.0], [2.0, 0.0]]
    alarms = [alarm for number in range(1, 300) for alarm in found.note(number, load, [0.8] * 3, [3.0] * 3)]
    assert [(alarm.layer, alarm.expert) for alarm in alarms] == [(1, 0), (2, 1)]
    assert found.starving() == [0, 1, 1]


def test_a_dense_run_has_nothing_to_alarm_about() -> None:
    assert Health().note(1, [], [], []) == []
    assert Health().starving() == []


def test_through_a_checkpoint_it_is_the_same_to_the_last_bit() -> None:
    draw = random.Random(1)
    steps = [
        ([[draw.random() ** 4 for _ in range(6)]], [draw.random() / 5 * (number < 300)], [draw.uniform(0, 130)])
        for number in range(600)
    ]
    whole, parts, told = Health(), Health(), [0, 0]
    for number, measured in enumerate(steps, start=1):
        if number % 37 == 0:
            parts = Health.restored(json.loads(json.dumps(parts.state())))
        expected, found = whole.note(number, *measured), parts.note(number, *measured)
        assert found == expected
        told[bool(expected)] += len(expected)
    assert told[1] >= 2, "the case must have alarms"
    assert json.dumps(parts.state()) == json.dumps(whole.state())


@pytest.mark.parametrize(
    ("changes", "kind", "parts"),
    [
        ({"balance": {"loss": None}}, "load", ['balance.loss "switch" and balance.alpha 0.1', "optim.router_lr 0.003"]),
        ({"balance": {"alpha": 0.01}}, "load", ["balance.alpha 0.1 (it is 0.01)", "optim.warmup_steps 100 (it is 2)"]),
        ({"balance": {"alpha": 0.3}}, "load", ["model.selection_bias true and balance.bias_rate 0.001"]),
        (
            {"model": {"selection_bias": True}, "balance": {"alpha": 0.3, "bias_rate": 0.001}},
            "load",
            ["balance.bias_rate 0.01 (it is 0.001)"],
        ),
        ({}, "largest", ["balance.z_loss 0.001 (it is 0)"]),
        ({"balance": {"z_loss": 0.001}}, "entropy", ["balance.z_loss 0.01 (it is 0.001)"]),
    ],
)
def test_the_advice_is_of_the_runs_settings(
    changes: dict[str, Any], kind: str, parts: list[str], tiny_settings: TinySettings
) -> None:
    told = advice(kind, make_hparams(tiny_settings(**changes)))
    assert all(part in told for part in parts), told


def test_a_hundred_alarms_are_a_short_message(tiny_settings: TinySettings) -> None:
    alarms = [Alarm("load", 0, expert, 0.05, 120) for expert in range(100)]
    lines = alarm_lines(240, alarms, make_hparams(tiny_settings()))
    assert len(lines) == SHOWN + 3
    assert lines[1] == "  layer 0, expert 0: 0.05 of the fair share on average, below 0.3 since step 120"
    assert f"and {100 - SHOWN} more" in lines[-2]
    assert alarm_lines(240, [], make_hparams(tiny_settings())) == []


# runs, with a short memory, so that they need not be long


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "HORIZON", 15)
    monkeypatch.setattr(metrics, "RATE_SECONDS", 0.0)
    monkeypatch.setitem(metrics.RATE_SIZE, "cpu", 8)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_healthy_run_has_no_alarm(seed: int, tiny_settings: TinySettings, tmp_path: Path) -> None:
    settings = tiny_settings(train={"seed": seed, "train_steps": 80, "log_steps": 20})
    train.start(make_hparams(settings), tmp_path / "run", Progress())
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [1, 20, 40, 60, 80]
    assert not any("alarms" in row for row in found)
    assert all(row["starving_experts"] == [0, 0] for row in found)


@pytest.mark.usefixtures("_quick")
def test_a_sick_run_says_so_everywhere_and_after_a_resume_too(
    tiny_settings: TinySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One expert is never chosen: the alarm comes at a step that isn't logged, and after a checkpoint that knows."""

    def build_sick(*arguments: Any) -> state.Training:
        training = state.build(*arguments)
        bias = training.model.layers[1].mlp.gate.bias
        assert isinstance(bias, torch.Tensor)
        bias[2] = -1e9
        return training

    monkeypatch.setattr(orders, "build", build_sick)
    lengths = {"train_steps": 60, "log_steps": 50, "checkpoint_steps": 20, "keep_checkpoints": 9}
    settings = tiny_settings(model={"selection_bias": True}, balance={"bias_rate": 1e-3}, train=lengths)
    out = io.StringIO()
    run = tmp_path / "run"
    train.start(make_hparams(settings), run, Progress(Console(file=out, soft_wrap=True)))
    alarms = {row["step"]: row["alarms"] for row in rows(run) if "alarms" in row}
    ((at, (alarm,)),) = alarms.items()
    assert at == 34 and alarm["since"] == 18, "15 steps' memory: (14/15)^34 < 0.1, (14/15)^18 < 0.3"
    assert (alarm["kind"], alarm["layer"], alarm["expert"]) == ("load", 1, 2)
    assert rows(run)[-1]["starving_experts"] == [0, 1]
    assert "alarm at step 34" in out.getvalue() and "layer 1, expert 2: 0.10 of the fair share" in out.getvalue()
    assert "In a new run, set balance.alpha 0.1 (it is 0.01)" in out.getvalue()
    for later in (40, 60):
        shutil.rmtree(run / "checkpoints" / f"step-{later:08}")
    out.truncate(0)
    train.resume(run, [], Progress(Console(file=out, soft_wrap=True)))
    assert {row["step"]: row["alarms"] for row in rows(run) if "alarms" in row} == alarms
    assert "resumed at step 20" in out.getvalue() and "alarm at step 34" in out.getvalue()


def test_a_checkpoint_from_before_alarms_goes_on(tiny_settings: TinySettings, tokenizer: Any) -> None:
    training = state.build(make_hparams(tiny_settings()), tokenizer)
    saved = state.snapshot(training, {})
    del saved.state["health"]
    state.restore(training, saved)
    assert training.health.state() == Health().state()
