"""A checkpoint's state and optimizer: those of the run are taken, those of no run refused before they are used."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TinySettings

from moelet.errors import UserError
from moelet.hparams import make_hparams
from moelet.state import build, snapshot
from moelet.storage.saved_state import check_optimizer, check_state
from moelet.tokenizer import Tokenizer

SHAPES = {"a": (2, 3), "b": (4,)}
OPTIMIZER = {f"a:{name}": torch.zeros(2, 3) for name in ("exp_avg", "exp_avg_sq")} | {"a:step": torch.zeros(())}


@pytest.fixture(scope="module")
def state(tiny_settings: TinySettings, tokenizer: Tokenizer) -> dict[str, Any]:
    """That of a run at its first step, as JSON gives it back, with experts under watch."""
    saved: dict[str, Any] = snapshot(build(make_hparams(tiny_settings()), tokenizer), {}).state
    saved["health"] = {"load": [[[0.5, None, False]] * 4] * 2, "entropy": [[[1.0, 3, True]]] * 2, "largest": []}
    return dict(json.loads(json.dumps(saved)))


def test_the_state_of_a_run_is_taken(state: dict[str, Any]) -> None:
    check_state(state, 2, 4)
    check_state({**state, "best": {"step": 1, "val_loss": float("nan")}, "scaler": {"scale": 2.0}, "more": "x"}, 2, 4)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no step": lambda s: s.pop("step"),
    "a negative step": lambda s: s.update(step=-1),
    "a huge number": lambda s: s.update(tokens=2**70),
    "a truth for a number": lambda s: s.update(skipped_steps=True),
    "no end of time": lambda s: s.update(seconds=float("inf")),
    "a plan that goes back": lambda s: s.update(plan=[[5, 9], [2, 9]]),
    "a plan that is over": lambda s: s.update(plan=[[0, 3]], step=4),
    "a plan of texts": lambda s: s.update(plan=[["a", "b"]]),
    "no cursor": lambda s: s.update(cursor=None),
    "a negative place": lambda s: s["cursor"].update(row=-1),
    "a source that is a list": lambda s: s["cursor"].update(source=[1]),
    "counts of texts": lambda s: s["cursor"].update(counts={"a": "b"}),
    "another best": lambda s: s.update(best={"step": 1}),
    "a scaler of texts": lambda s: s.update(scaler={"scale": "x"}),
    "other layers": lambda s: s["health"]["load"].pop(),
    "other experts": lambda s: s["health"].update(load=[[[0.5, None, False]] * 3] * 2),
    "an unknown alarm": lambda s: s["health"].update(other=[]),
    "an alarm of texts": lambda s: s["health"].update(load="x"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_state_of_no_run_is_refused(what: str, state: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(state))
    CHANGES[what](changed)
    with pytest.raises(UserError, match="isn't one that this run saved"):
        check_state(changed, 2, 4)


def test_the_optimizer_of_a_run_is_taken() -> None:
    check_optimizer({}, SHAPES, "adamw")
    check_optimizer(OPTIMIZER, SHAPES, "adamw")
    check_optimizer(OPTIMIZER | {"b:momentum_buffer": torch.zeros(4)}, SHAPES, "muon")


@pytest.mark.parametrize(
    "change",
    [
        {"c:exp_avg": torch.zeros(2)},
        {"a:other": torch.zeros(2, 3)},
        {"nothing": torch.zeros(2)},
        {"a:exp_avg": torch.zeros(3, 2)},
        {"a:exp_avg": torch.zeros(2, 3, dtype=torch.int64)},
        {"a:step": torch.zeros(1)},
        {"b:exp_avg": torch.zeros(4)},
        {"b:momentum_buffer": torch.zeros(4)},
    ],
)
def test_the_optimizer_of_no_run_is_refused(change: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UserError, match="isn't one that this run saved"):
        check_optimizer(OPTIMIZER | change, SHAPES, "adamw")
