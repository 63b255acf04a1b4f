"""A step's rows in any parts: the same loss, balance and gradients; padding and evaluation count for nothing."""

import random
from typing import Any

import pytest
import torch
from conftest import TinySettings
from scorecard import Trials
from test_step import TEXT, make_training, pieces, relative_difference, step_and_gradients
from test_step import tokenizer as step_tokenizer  # noqa: F401  a fixture

from moelet.data import Batch, Validation, collate
from moelet.evaluate import evaluate
from moelet.loss import BALANCE, IGNORE
from moelet.metrics import expert_load
from moelet.state import Training
from moelet.step import train_step
from moelet.tokenizer import Tokenizer

SPLITS = ([8], [4, 4], [1] * 8, [5, 3], [3, 3, 2], [7, 1], [2, 6])


def ragged(tokenizer: Tokenizer, draw: random.Random, rows: int = 8) -> Batch:
    """Return rows of any lengths, some packed with documents, one of them perhaps with nothing to predict."""
    ids, found = tokenizer.encode(TEXT).tolist(), []
    for _ in range(rows):
        start, length = draw.randrange(3000), draw.choice([2, 3, 9, 17, 25])
        row = ids[start : start + length]
        if length > 9 and draw.random() < 0.5:
            row[length // 2] = tokenizer.bos_id
        found.append(torch.tensor([*row, *[tokenizer.pad_id] * (25 - length)]).numpy())
    if draw.random() < 0.4:
        found[draw.randrange(rows)][1:] = tokenizer.pad_id
    batch = collate(found, True)
    segments = torch.ones_like(batch.input_ids) if batch.segments is None else batch.segments
    return batch._replace(segments=segments)


def any_training(tokenizer: Tokenizer, changes: dict[str, Any], wide: bool) -> Training:
    training = make_training(tokenizer, **changes)
    training.model.double() if wide else training.model.float()
    return training


@pytest.mark.check(19)
def test_a_step_in_any_parts(trials: Trials, step_tokenizer: Tokenizer) -> None:  # noqa: F811
    """Loss and gradients are those of the whole, to 1e-6 in fp32 and 1e-12 in fp64; parts without a target too."""
    draw = trials.random
    for index in range(trials.count(small=6, full=120)):
        wide, rule = index % 2 == 1, draw.choice([None, *sorted(BALANCE)])
        changes = {"balance__loss": rule, "balance__z_loss": draw.choice([0.0, 0.3])}
        batch, sizes = ragged(step_tokenizer, draw), SPLITS[index % len(SPLITS)]
        with trials.one(f"{index}: {sizes}, {rule}, {'fp64' if wide else 'fp32'}"):
            whole, expected = step_and_gradients(any_training(step_tokenizer, changes, wide), [batch])
            parts = pieces(batch, sizes)
            if index % 3 == 0:
                nothing = torch.full((25,), step_tokenizer.pad_id).numpy()
                parts.insert(draw.randrange(len(parts) + 1), collate([nothing], False))
            found, actual = step_and_gradients(any_training(step_tokenizer, changes, wide), parts)
            assert relative_difference(actual, expected) < (1e-12 if wide else 1e-6)
            assert found.loss == pytest.approx(whole.loss, rel=1e-12 if wide else 1e-6)
            assert (found.tokens, found.bytes) == (whole.tokens, whole.bytes)


@pytest.mark.check(19)
def test_a_step_without_a_target(trials: Trials, step_tokenizer: Tokenizer) -> None:  # noqa: F811
    """Nothing to predict in any part: the loss is 0, no gradient is NaN, and the weights stay finite."""
    for index in range(trials.count(small=2, full=20)):
        rows = [torch.full((25,), step_tokenizer.pad_id).numpy() for _ in range(trials.random.randint(1, 4))]
        training = make_training(step_tokenizer, balance__z_loss=0.1, balance__loss=sorted(BALANCE)[index % 2])
        with trials.one(f"{index}: {len(rows)} rows"):
            report = train_step(training, [collate([row], False) for row in rows])
            assert (report.loss, report.tokens, report.skipped) == (0.0, 0, False)
            assert all(bool(value.isfinite().all()) for value in training.model.state_dict().values())


# the balance loss, the z-loss, biases


def by_formula(training: Training, batch: Batch, rule: str, alpha: float, z_loss: float) -> torch.Tensor:
    """Return balance and z-loss by their papers' formulas, over real tokens, averaged over layers; float64."""
    model, inputs = training.model, []
    hooks = [
        layer.mlp.gate.register_forward_pre_hook(lambda module, given: inputs.append((module.weight, given[0])))
        for layer in model.layers
    ]
    model(batch.input_ids, batch.segments)
    for hook in hooks:
        hook.remove()
    assert batch.segments is not None
    real, total = batch.segments.flatten() != 0, torch.zeros((), dtype=torch.float64)
    for weight, x in inputs:
        scores = (x @ weight.T)[real]
        probability = scores.exp() / scores.exp().sum(-1, keepdim=True)
        n_experts, mean = scores.shape[1], probability.mean(0)
        chosen = torch.zeros(n_experts, dtype=torch.float64)
        for row in scores.tolist():
            for e in sorted(range(n_experts), key=lambda e: (-row[e], e))[:2]:
                chosen[e] += 1
        switch = n_experts * (chosen / chosen.sum() * mean).sum()
        importance = ((mean - mean.mean()) ** 2).mean() / mean.mean() ** 2
        z = (scores.exp().sum(-1).log() ** 2).mean()
        total = total + (alpha * (switch if rule == "switch" else importance) + z_loss * z) / len(inputs)
    return total


def router_gradients(kept: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for name, value in kept.items() if name.endswith("mlp.gate.weight")])


@pytest.mark.check(21)
def test_balance_and_z_loss(trials: Trials, step_tokenizer: Tokenizer) -> None:  # noqa: F811
    """Their gradients equal the formula's in float64 in any parts, with layers computed again or not, and grow in
    proportion to their weights."""
    draw = trials.random
    for index in range(trials.count(small=3, full=60)):
        rule, alpha, z_loss = sorted(BALANCE)[index % 2], draw.choice([0.0, 0.01, 2.0]), draw.choice([0.3, 1e-3])
        batch, sizes = ragged(step_tokenizer, draw), draw.choice(SPLITS)
        again = {"train__checkpoint_activations": draw.random() < 0.5, "balance__loss": rule}
        with trials.one(f"{index}: {rule} {alpha}, z {z_loss}, {sizes}"):
            found = {}
            for factor in (0.0, 1.0, 2.0):
                changes = again | {"balance__alpha": factor * alpha, "balance__z_loss": factor * z_loss}
                training = any_training(step_tokenizer, changes, wide=True)
                _, kept = step_and_gradients(training, pieces(batch, sizes))
                found[factor] = router_gradients(kept)
            plain = any_training(step_tokenizer, {"balance__loss": rule}, wide=True)
            value = by_formula(plain, batch, rule, alpha, z_loss)
            want = torch.cat(
                [g.flatten() for g in torch.autograd.grad(value, [r.mlp.gate.weight for r in plain.model.layers])]
            )
            one, two = found[1.0] - found[0.0], found[2.0] - found[0.0]
            assert want.norm() > 0 and (one - want).norm() <= 1e-6 * want.norm()
            assert (two - 2 * one).norm() <= 1e-6 * one.norm()


@pytest.mark.check(21)
def test_padding_in_the_router(trials: Trials, step_tokenizer: Tokenizer) -> None:  # noqa: F811
    """It is in no sum: as if those tokens weren't there, with the kernels' routing and with torch's."""
    generator = torch.Generator().manual_seed(0)
    for index in range(trials.count(small=4, full=60)):
        width = [32, 20][index % 2]  # the kernel needs multiples of 16
        training = make_training(step_tokenizer, model__d_model=width)
        gate = training.model.layers[0].mlp.gate
        with trials.one(f"{index}: width {width}"):
            real = torch.rand(trials.random.randint(1, 300), generator=generator) < trials.random.random()
            x = torch.randn(len(real), width, generator=generator)
            padded, alone = gate(x, real)[2], gate(x[real], None)[2]
            assert torch.equal(padded.assignments, alone.assignments)
            assert torch.equal(padded.tokens, alone.tokens) and torch.equal(
                padded.largest, alone.largest * bool(real.any())
            )
            for name in ("probability", "squares", "entropy"):
                mine, theirs = getattr(padded, name), getattr(alone, name)
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
            junk = torch.where(real[:, None], x, 1e3 * torch.randn(x.shape, generator=generator))
            other = gate(junk, real)[2]
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(padded, other, strict=True)), "bitwise"


@pytest.mark.check(21)
def test_scores_of_ten_thousand(trials: Trials, step_tokenizer: Tokenizer) -> None:  # noqa: F811
    """Balance and z-loss stay finite, with finite gradients, in every format of products."""
    for index in range(trials.count(small=2, full=12)):
        dtype = [torch.float16, torch.bfloat16, None][index % 3]
        training = make_training(step_tokenizer)
        gate = training.model.layers[0].mlp.gate
        with trials.one(f"{index}: {dtype}"):
            x = torch.randn(50, 32, generator=torch.Generator().manual_seed(index))
            with torch.no_grad():
                gate.weight.mul_(1e4 / (x @ gate.weight.T).abs().max())
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                _, weights, stats = gate(x, None)
            loss = stats.squares.mean() + stats.probability.square().sum() + weights.sum()
            (gradient,) = torch.autograd.grad(loss, gate.weight)
            assert 9e3 < stats.largest < 1.1e4 and 1e6 < stats.squares / 50 < 2e8
            assert bool(loss.isfinite()) and bool(gradient.isfinite().all())


@pytest.mark.check(21)
def test_what_evaluations_report(trials: Trials, step_tokenizer: Tokenizer) -> None:  # noqa: F811
    """Cross-entropy alone, whatever balance weighs; biases of choice don't move in it, and once a step in training."""
    for index in range(trials.count(small=2, full=20)):
        sizes, rate = trials.random.choice(SPLITS), trials.random.choice([0.1, 0.003])
        batch = ragged(step_tokenizer, trials.random)
        changes = {"model__selection_bias": True, "balance__bias_rate": rate, "optim__lr": 0.01}
        with trials.one(f"{index}: {sizes}"):
            training = make_training(step_tokenizer, balance__alpha=trials.random.choice([0.0, 100.0]), **changes)
            biases = [torch.zeros(8) for _ in training.model.layers]
            for _ in range(3):
                report = train_step(training, pieces(batch, sizes))
                for bias, load in zip(biases, report.expert_load, strict=True):
                    bias += rate * (1 - torch.tensor(load)).sign()
                before = {name: value.clone() for name, value in training.model.state_dict().items()}
                found = evaluate(training.model, Validation([batch], 1, 1, 1.0), torch.float32)
                assert all(torch.equal(value, before[n]) for n, value in training.model.state_dict().items())
            assert found.loss == pytest.approx(plain_loss(training, batch), rel=1e-5)
            for layer, bias in zip(training.model.layers, biases, strict=True):
                assert torch.equal(layer.mlp.gate.bias, bias)
                assert bias.abs().max() > 0
    assert expert_load([]).numel() == 0


@torch.no_grad()
def plain_loss(training: Training, batch: Batch) -> float:
    model = training.model.eval()
    logits = model.logits(model(batch.input_ids, batch.segments).hidden).double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
    return loss.item()


def test_batches_hold_what_the_checks_need(tiny_settings: TinySettings, step_tokenizer: Tokenizer) -> None:  # noqa: F811
    draw = random.Random(0)
    batches = [ragged(step_tokenizer, draw) for _ in range(30)]
    assert any((batch.labels == IGNORE).all(1).any() for batch in batches), "a row without a target"
    assert any(batch.segments.max() > 1 for batch in batches), "a row with two documents"
