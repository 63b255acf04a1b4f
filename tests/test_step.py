"""One optimizer step: normalisation, accumulation, balance over the global batch, fp16, and what must not happen."""

import json
import math

import pytest
import torch

from moelet.data import Batch, collate
from moelet.errors import UserError
from moelet.hparams import make_hparams
from moelet.loss import BALANCE, IGNORE
from moelet.step import MAX_SKIPS, Training, balance_slopes, build, restore, snapshot, train_step
from moelet.tokenizer import Tokenizer

TEXT = "\n".join(f"def square_{i}(value): return value * value + {i}" for i in range(400))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 300)


def make_training(tokenizer: Tokenizer, **changes: object) -> Training:
    settings = {
        "model": {
            "max_length": 24,
            "d_model": 32,
            "d_embed": 16,
            "n_layers": 2,
            "n_heads": 4,
            "d_ff": 64,
            "dropout": 0.0,
        },
        "optim": {"warmup_steps": 2, "grad_clip": None},
        "train": {"train_steps": 10, "precision": "fp32", "device": "cpu"},
        "balance": {"alpha": 0.5},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        settings[section][key] = value
    return build(make_hparams(settings), tokenizer)


def ragged_batch(tokenizer: Tokenizer, rows: int = 8) -> Batch:
    """Rows of very different lengths, so that a mean of means would be wrong."""
    ids = tokenizer.encode(TEXT)
    lengths = [25, 3, 17, 9, 25, 2, 6, 21][:rows]
    pad = [tokenizer.pad_id]
    return collate(
        [torch.tensor([*ids[50 * i : 50 * i + n], *pad * (25 - n)]).numpy() for i, n in enumerate(lengths)], False
    )


def pieces(batch: Batch, sizes: list[int]) -> list[Batch]:
    assert batch.segments is not None
    parts = zip(*(item.split(sizes) for item in batch), strict=True)
    return [Batch(*part) for part in parts]


def step_and_gradients(training: Training, micro: list[Batch]) -> tuple[object, dict[str, torch.Tensor]]:
    kept: dict[str, torch.Tensor] = {}
    training.optimizer.step = lambda *args, **kwargs: kept.update(  # type: ignore[method-assign]
        {name: p.grad.clone() for name, p in training.model.named_parameters() if p.grad is not None}
    )
    return train_step(training, micro), kept


def relative_difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of all gradients over the norm of all gradients; nan if any is."""
    assert actual.keys() == expected.keys()
    difference = torch.cat([(actual[name] - gradient).flatten() for name, gradient in expected.items()])
    return (difference.norm() / torch.cat([gradient.flatten() for gradient in expected.values()]).norm()).item()


def scaled(training: Training, scale: float) -> Training:
    assert training.scaler is not None
    training.scaler.load_state_dict(training.scaler.state_dict() | {"scale": scale})
    return training


@pytest.mark.parametrize("rule", sorted(BALANCE))
@pytest.mark.parametrize("sizes", [[4, 4], [1] * 8, [5, 3]])
def test_accumulation_is_the_whole_batch(tokenizer: Tokenizer, rule: str, sizes: list[int]) -> None:
    batch = ragged_batch(tokenizer)
    whole, expected = step_and_gradients(make_training(tokenizer, balance__loss=rule), [batch])
    parts, actual = step_and_gradients(make_training(tokenizer, balance__loss=rule), pieces(batch, sizes))
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.balance_loss == pytest.approx(whole.balance_loss, rel=1e-6, abs=1e-6)
    assert parts.tokens == whole.tokens == int((batch.labels != IGNORE).sum())
    assert relative_difference(actual, expected) < 1e-6


@pytest.mark.parametrize("rule", sorted(BALANCE))
@pytest.mark.parametrize("sizes", [[4, 4], [1] * 8])
def test_accumulation_in_float64_differs_by_rounding_alone(tokenizer: Tokenizer, rule: str, sizes: list[int]) -> None:
    batch = ragged_batch(tokenizer)
    gradients = []
    for micro in ([batch], pieces(batch, sizes)):
        training = make_training(tokenizer, balance__loss=rule)
        training.model.double()
        gradients.append(step_and_gradients(training, micro)[1])
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() <= 1e-10 * gradient.abs().max(), name


def test_a_micro_batch_without_targets_changes_nothing(tokenizer: Tokenizer) -> None:
    batch = ragged_batch(tokenizer, 2)
    empty = collate([torch.full((25,), tokenizer.pad_id).numpy()], False)
    whole, expected = step_and_gradients(make_training(tokenizer), [batch])
    parts, actual = step_and_gradients(make_training(tokenizer), [batch, empty])
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert relative_difference(actual, expected) < 1e-6


def test_balance_gradient_reaches_the_router_and_scales_with_alpha(tokenizer: Tokenizer) -> None:
    batch = ragged_batch(tokenizer)
    gradients = {}
    for alpha in (0.0, 1.0, 2.0):
        _, kept = step_and_gradients(make_training(tokenizer, balance__alpha=alpha), [batch])
        gradients[alpha] = kept["layers.1.mlp.gate.weight"]
    one = gradients[1.0] - gradients[0.0]
    assert one.abs().max() > 1e-6
    torch.testing.assert_close(gradients[2.0] - gradients[0.0], 2 * one, rtol=1e-3, atol=1e-7)


def test_balance_ignores_padding(tokenizer: Tokenizer) -> None:
    """The balance loss of a padded row is that of its real tokens alone."""
    ids = tokenizer.encode(TEXT)[:10].tolist()
    alone = torch.tensor([ids])
    padded = torch.tensor([ids + [tokenizer.pad_id] * 14])
    training = make_training(tokenizer)
    with torch.no_grad():
        bare, _ = balance_slopes(training.model(alone).router, training.hparams)
        full, _ = balance_slopes(training.model(padded, padded != tokenizer.pad_id).router, training.hparams)
    assert full.item() == pytest.approx(bare.item(), rel=1e-6)


def test_balance_slopes_are_the_gradient_of_the_formula(tokenizer: Tokenizer) -> None:
    training = make_training(tokenizer).model.double()
    hparams = make_training(tokenizer).hparams
    batch = ragged_batch(tokenizer)
    stats = training(batch.input_ids, batch.segments).router
    value, slopes = balance_slopes(stats, hparams)
    probability = torch.stack([s.probability / s.tokens for s in stats])
    load = torch.stack([s.assignments / (s.tokens * 2) for s in stats])
    expected = 8 * (load * probability).sum(-1).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    surrogate = (slopes * torch.stack([s.probability for s in stats])).sum()
    router = training.layers[0].mlp.gate.weight
    (actual,) = torch.autograd.grad(surrogate, router, retain_graph=True)
    (wanted,) = torch.autograd.grad(0.5 * expected, router)
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-14)


def test_reported_loss_is_cross_entropy_alone(tokenizer: Tokenizer) -> None:
    batch = ragged_batch(tokenizer)
    losses = [train_step(make_training(tokenizer, balance__alpha=alpha), [batch]).loss for alpha in (0.0, 100.0)]
    assert losses[0] == losses[1]


def test_bytes_are_those_of_the_predicted_text(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("value * 3").tolist(), tokenizer.eos_id]
    row = torch.tensor(ids + [tokenizer.pad_id] * (25 - len(ids))).numpy()
    report = train_step(make_training(tokenizer), [collate([row], False)])
    assert (report.bytes, report.tokens) == (9, len(ids) - 1)


def test_fp16_overflow_is_skipped_and_moves_nothing(tokenizer: Tokenizer) -> None:
    batch = ragged_batch(tokenizer)
    training = scaled(make_training(tokenizer, train__precision="fp16"), 2.0**30)  # far past what fp16 holds
    assert training.scaler is not None
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    report = train_step(training, [batch])
    assert report.skipped and training.step == 0 and training.skipped_steps == 1
    assert training.scaler.get_scale() == 2.0**29
    assert all(torch.equal(value, before[name]) for name, value in training.model.state_dict().items())
    rates = [report.lr]
    while training.step == 0:
        rates.append(train_step(training, [batch]).lr)
    assert len(set(rates)) == 1, "the schedule moved while steps were skipped"
    assert training.skipped_in_a_row == 0 and training.skipped_steps == len(rates) - 1


def test_scaler_state_resumes(tokenizer: Tokenizer) -> None:
    batch = ragged_batch(tokenizer)
    first = scaled(make_training(tokenizer, train__precision="fp16"), 2.0**18)
    assert first.scaler is not None
    train_step(first, [batch])
    saved = snapshot(first, {})
    saved = saved._replace(
        state=json.loads(json.dumps(saved.state)),
        model={name: value.clone() for name, value in saved.model.items()},
        optimizer={name: value.clone() for name, value in saved.optimizer.items()},
    )
    second = make_training(tokenizer, train__precision="fp16")
    restore(second, saved)
    assert second.scaler is not None and second.scaler.state_dict() == first.scaler.state_dict()
    for _ in range(3):
        assert train_step(first, [batch]) == train_step(second, [batch])


def test_endless_overflow_stops_with_advice(tokenizer: Tokenizer) -> None:
    training = make_training(tokenizer, train__precision="fp16")
    training.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(UserError, match=f"overflowed {MAX_SKIPS} times in a row.*bf16"):
        for _ in range(MAX_SKIPS + 1):
            train_step(training, [ragged_batch(tokenizer)])
    assert training.step == 0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tokenizer: Tokenizer, poison: float) -> None:
    training = make_training(tokenizer, optim__grad_clip=1.0)
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    training.model.norm.weight.register_hook(lambda gradient: gradient * poison)
    with pytest.raises(UserError, match="gradient norm is .* at step 1"):
        train_step(training, [ragged_batch(tokenizer)])
    assert all(torch.equal(value, before[name]) for name, value in training.model.state_dict().items())


def test_clipping_limits_the_norm_over_all_parameters(tokenizer: Tokenizer) -> None:
    batch = ragged_batch(tokenizer)
    free, gradients = step_and_gradients(make_training(tokenizer), [batch])
    limit = free.grad_norm / 3
    clipped, smaller = step_and_gradients(make_training(tokenizer, optim__grad_clip=limit), [batch])
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in smaller.values()))
    assert clipped.grad_norm == pytest.approx(free.grad_norm) and norm == pytest.approx(limit, rel=1e-4)
    assert free.grad_norm == pytest.approx(
        math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values())), rel=1e-5
    )


def test_dropout_of_a_step_is_a_function_of_seed_and_step(tokenizer: Tokenizer) -> None:
    batch = ragged_batch(tokenizer)

    def losses(seed: int) -> list[float]:
        torch.manual_seed(torch.seed())  # whatever the global generator was before
        training = make_training(tokenizer, model__dropout=0.3, train__seed=0)
        object.__setattr__(training.hparams.train, "seed", seed)
        return [train_step(training, [batch]).loss for _ in range(3)]

    assert losses(1) == losses(1) != losses(2)


def test_a_step_learns(tokenizer: Tokenizer) -> None:
    training = make_training(tokenizer, optim__lr=1e-2, optim__min_lr=1e-2)
    batch = ragged_batch(tokenizer)
    losses = [train_step(training, [batch]).loss for _ in range(10)]
    assert losses[-1] < losses[0] - 1
