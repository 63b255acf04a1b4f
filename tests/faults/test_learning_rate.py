"""Steps that fp16 skips and resumes in between: the learning rate and every counter are what the formula says."""

import json
import math

import pytest
import torch
from conftest import TinySettings
from scorecard import Trials

from moelet import data, state, step
from moelet.hparams import make_hparams
from moelet.state import Training, build, restore, snapshot
from moelet.step import train_step
from moelet.storage.checkpoint import Checkpoint
from moelet.tokenizer import Tokenizer

LR, MIN_LR, ATTEMPTS = 0.01, 0.001, 7
SHAPES = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
    "wsd": lambda progress: min(1.0, (1 - progress) / 0.4),
}


def formula(schedule: str, step: int, total: int, warmup: int) -> float:
    """The learning rate of a step, counted from 0, of a run of so many: a line to LR, then a curve to MIN_LR."""
    if step < warmup:
        return LR * (step + 1) / warmup
    return MIN_LR + (LR - MIN_LR) * SHAPES[schedule]((step + 1 - warmup) / (total - warmup))


def through_json(saved: Checkpoint) -> Checkpoint:
    return saved._replace(
        model={name: tensor.clone() for name, tensor in saved.model.items()},
        optimizer={name: tensor.clone() for name, tensor in saved.optimizer.items()},
        state=json.loads(json.dumps(saved.state)),
    )


@pytest.mark.check(11)
def test_skipped_steps_and_resumes_in_any_order(
    trials: Trials, tiny_settings: TinySettings, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A skipped step doesn't advance the schedule; the learning rate is a function of the steps made and of the plan
    alone, and steps, skipped batches and tokens are counted once each."""
    shape = {"d_model": 8, "d_embed": 4, "n_heads": 2, "n_layers": 1, "d_ff": 8, "n_experts": 2, "top_k": 1}
    shape["max_length"] = 8
    hparams = make_hparams(tiny_settings(model=shape, train={"precision": "fp16", "batch_size": 1}))
    monkeypatch.setattr(
        state, "make_scaler", lambda *given: torch.amp.GradScaler("cpu", init_scale=2.0**10)
    )  # far from overflow, and from 1 after all that is passed over
    trainings = [build(hparams, tokenizer) for _ in range(2)]
    begun = through_json(snapshot(trainings[0], {}))
    batch = data.collate([tokenizer.encode("def function(argument):")[:9]], False)
    skips = False
    clip = step._clip

    def overflowing(training: Training) -> torch.Tensor:
        norm = clip(training)
        return norm * math.inf if skips else norm

    monkeypatch.setattr(step, "_clip", overflowing)
    draw = trials.random
    for index in range(trials.count(small=15, full=1000)):
        pattern = [draw.random() < 0.4 for _ in range(ATTEMPTS)]
        resumes = {k for k in range(ATTEMPTS) if draw.random() < 0.3}
        schedule, total = draw.choice(list(SHAPES)), draw.randrange(ATTEMPTS, 30)
        warmup = draw.choice([0, 1, 3, total - 1, total, total + 5])
        with trials.one(f"{index}: {schedule}, {warmup} of {total}, {pattern}, {resumes}"):
            optim = hparams.optim.model_copy(update={"schedule": schedule, "warmup_steps": warmup})
            for training in trainings:
                training.hparams = hparams.model_copy(update={"optim": optim})
            now, other = trainings
            restore(now, begun)
            now.plan = [[0, total]]
            made = 0
            for k, skips in enumerate(pattern):
                if k in resumes:
                    restore(other, through_json(snapshot(now, {})))
                    now, other = other, now
                before = {name: tensor.clone() for name, tensor in now.model.state_dict().items()}
                report = train_step(now, [batch])
                expected = formula(schedule, made, total, warmup)
                assert report.lr == pytest.approx(expected, rel=1e-12) and report.skipped == skips
                used = {group["lr"] / group["lr_scale"] for group in now.optimizer.param_groups}
                assert used == {report.lr}
                changed = any(not torch.equal(before[name], tensor) for name, tensor in now.model.state_dict().items())
                assert changed != skips
                made += not skips
                assert (now.step, now.skipped_steps) == (made, k + 1 - made)
                assert now.tokens == (k + 1) * report.tokens
