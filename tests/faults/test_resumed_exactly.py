"""A run killed and resumed three times in a row: every loss, every batch and the final numbers, to the last bit."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinySettings
from cuts import Step, in_process, train_until  # noqa: F401  a fixture
from processes import assert_same_run, newest
from scorecard import Trials
from test_modern import EVERYTHING

from moelet.tokenizer import Tokenizer

STEPS = 8
Mode = tuple[str, int, float, bool, str]  # precision, accumulation, dropout, packing, shape
EVERY: list[Mode] = [
    (precision, accumulation, dropout, packing, "reference")
    for precision, accumulation, dropout, packing in itertools.product(
        ("fp32", "bf16", "fp16"), (1, 3), (0.0, 0.1), (True, False)
    )
] + [(precision, 3, 0.1, True, "modern") for precision in ("fp32", "bf16", "fp16")]
FEW: list[Mode] = [("fp16", 1, 0.1, False, "reference")]  # tests/test_resume.py has others
MODERN: dict[str, Any] = {
    "optim": {"optimizer": "muon", "muon_every": 2, "schedule": "wsd"},
    "balance": {"bias_rate": 0.01, "z_loss": 1e-3},
}


@pytest.mark.check(9)
@pytest.mark.usefixtures("in_process")
def test_a_run_cut_and_resumed_three_times_in_a_row(
    trials: Trials, tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the run it would have been: the same batches, losses, learning rates and gradient norms in hexadecimal, the
    same weights, moments, scaler and biases byte for byte; in fp32, bf16 and fp16, with and without dropout, packing
    and accumulation."""
    tokenizer.save(tmp_path / "given.model")
    monkeypatch.setattr(  # one that overflows now and then, and grows again
        "moelet.state.make_scaler",
        lambda dtype, device: (
            torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_factor=2.0**8, growth_interval=2)
            if dtype == torch.float16
            else None
        ),
    )
    for index, mode in enumerate(EVERY if trials.full else FEW):
        precision, accumulation, dropout, packing, shape = mode
        settings = tiny_settings(
            tokenizer={"file": str(tmp_path / "given.model")},
            data={"packing": packing, "piece_chars": 200},
            train={
                "train_steps": STEPS,
                "precision": precision,
                "gradient_accumulation": accumulation,
                "checkpoint_steps": 2,
                "eval_tokens": 50,
            },
            **(MODERN if shape == "modern" else {}),
        )
        settings["model"] |= {"dropout": dropout, **(EVERYTHING if shape == "modern" else {})}
        whole: list[Step] = []
        train_until(monkeypatch, tmp_path / f"{index}-whole", settings, None, whole)
        assert len({step.loss for step in whole}) == len(whole) >= STEPS
        cuts = sorted(trials.random.sample(range(1, STEPS), 3))
        with trials.one(f"{mode}, cut at {cuts}"):
            runs, reached = [tmp_path / f"{index}-cut", tmp_path / f"{index}-whole"], 0
            for part, cut in enumerate([*cuts, None]):
                steps: list[Step] = []
                train_until(monkeypatch, runs[0], None if part else settings, cut, steps)
                if not steps:
                    continue
                at = whole.index(steps[0])
                assert at <= reached and steps == whole[at : at + len(steps)]
                reached = at + len(steps)
            assert reached == len(whole)
            assert_same_run(*runs)
            states = [json.loads((newest(run) / "state.json").read_text()) for run in runs]
            assert {**states[0], "seconds": 0, "elapsed": 0} == {**states[1], "seconds": 0, "elapsed": 0}
            assert (states[0]["scaler"] is not None) == (precision == "fp16")
            assert (states[0]["skipped_steps"] > 0) == (precision == "fp16")
