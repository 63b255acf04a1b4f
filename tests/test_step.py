"""One optimizer step: normalisation, accumulation, balance over the global batch, fp16, and what must not happen."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moelet import diagnostics
from moelet.data import Batch, collate
from moelet.errors import UserError
from moelet.hparams import make_hparams
from moelet.loss import BALANCE, IGNORE
from moelet.sections import OptimSettings
from moelet.state import Training, build, restore, snapshot
from moelet.step import MAX_SKIPS, balance_slopes, train_step
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


# --- the z-loss, and biases that move ---


def z_gradients(training: Training, micro: list[Batch]) -> dict[str, torch.Tensor]:
    return step_and_gradients(training, micro)[1]


@pytest.mark.parametrize("rule", [None, "switch"])
@pytest.mark.parametrize("sizes", [[4, 4], [1] * 8, [5, 2, 1]])
def test_accumulation_is_the_whole_batch_for_the_z_loss_too(
    tokenizer: Tokenizer, rule: str | None, sizes: list[int]
) -> None:
    batch, changes = ragged_batch(tokenizer), {"balance__loss": rule, "balance__z_loss": 0.5}
    expected = z_gradients(make_training(tokenizer, **changes), [batch])
    actual = z_gradients(make_training(tokenizer, **changes), pieces(batch, sizes))
    assert relative_difference(actual, expected) < 1e-6
    without = z_gradients(make_training(tokenizer, balance__loss=rule), [batch])
    assert relative_difference(without, expected) > 1e-3


def test_the_z_loss_is_that_of_the_formula(tokenizer: Tokenizer) -> None:
    """Zoph et al. 2022, eq. 5, over real tokens, averaged over layers; what is reported stays the cross-entropy."""
    batch, gradients, reports = ragged_batch(tokenizer), {}, {}
    for weight in (0.0, 0.5):
        training = make_training(tokenizer, balance__z_loss=weight)
        training.model.double()
        reports[weight], gradients[weight] = step_and_gradients(training, [batch])
    assert reports[0.0].loss == reports[0.5].loss
    assert batch.segments is not None
    model, scores, real = make_training(tokenizer).model.double(), [], batch.segments.flatten() != 0
    for layer in model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda router, inputs, output: scores.append(inputs[0] @ router.weight.T)  # (T, E)
        )
    model(batch.input_ids, batch.segments)
    value = torch.stack([layer.logsumexp(-1)[real].square().mean() for layer in scores]).mean()
    router = model.layers[0].mlp.gate.weight
    (want,) = torch.autograd.grad(0.5 * value, router)
    name = "layers.0.mlp.gate.weight"
    torch.testing.assert_close(gradients[0.5][name] - gradients[0.0][name], want, rtol=1e-8, atol=1e-12)


def test_the_z_loss_ignores_padding(tokenizer: Tokenizer) -> None:
    bare = collate([tokenizer.encode(TEXT)[:11]], False)
    assert bare.segments is None
    bare = bare._replace(segments=torch.ones_like(bare.input_ids))
    padded = Batch(*(F.pad(part, (0, 13), value=fill) for part, fill in zip(bare, (3, IGNORE, 0), strict=True)))
    changes = {"balance__z_loss": 5.0, "balance__loss": None}
    found, want = (z_gradients(make_training(tokenizer, **changes), [batch]) for batch in (padded, bare))
    assert relative_difference(found, want) < 1e-6


def biased(tokenizer: Tokenizer, rate: float, **changes: object) -> Training:
    changes = {"balance__loss": None, "model__selection_bias": True, "balance__bias_rate": rate} | changes
    return make_training(tokenizer, **changes)


def biases(training: Training) -> list[torch.Tensor]:
    return [layer.mlp.gate.bias.clone() for layer in training.model.layers]


@pytest.mark.parametrize("sizes", [[8], [5, 2, 1]])
def test_biases_move_towards_a_fair_share(tokenizer: Tokenizer, sizes: list[int]) -> None:
    """By the rate: up where an expert had less than its share of the step's real tokens, down where it had more."""
    training, batch = biased(tokenizer, 0.25), ragged_batch(tokenizer)
    report = train_step(training, pieces(batch, sizes))
    for layer, bias in zip(report.expert_load, biases(training), strict=True):
        assert min(layer) < 1 < max(layer)
        assert bias.tolist() == [0.25 if share < 1 else -0.25 if share > 1 else 0.0 for share in layer]


def test_biases_even_the_load_out(tokenizer: Tokenizer) -> None:
    training, batch = biased(tokenizer, 0.02, optim__lr=1e-6, optim__min_lr=0.0), ragged_batch(tokenizer)
    with torch.no_grad():
        for layer in training.model.layers:
            layer.mlp.gate.weight.mul_(10)
            layer.mlp.gate.weight[0] += 0.3 * layer.mlp.gate.weight[1]
    spread = []
    for _ in range(80):
        loads = torch.tensor(train_step(training, [batch]).expert_load)
        spread.append(loads.std(1, correction=0).max().item())
    assert sum(spread[-10:]) < 0.5 * sum(spread[:10]), "the same weights, other choices"
    assert training.scaler is None and all(bias.abs().max() > 0.02 for bias in biases(training))


def test_a_skipped_step_moves_no_bias(tokenizer: Tokenizer) -> None:
    training = scaled(biased(tokenizer, 0.25, train__precision="fp16"), 2.0**30)
    assert train_step(training, [ragged_batch(tokenizer)]).skipped
    assert not any(bias.any() for bias in biases(training))


def test_biases_have_no_gradient_and_are_saved(tokenizer: Tokenizer) -> None:
    training, batch = biased(tokenizer, 0.25), ragged_batch(tokenizer)
    _, gradients = step_and_gradients(training, [batch])
    assert not any("bias" in name for name in gradients)
    again = biased(tokenizer, 0.25)
    restore(again, snapshot(training, {}))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(biases(training), biases(again), strict=True))


def test_router_health_is_reported(tokenizer: Tokenizer) -> None:
    batch = ragged_batch(tokenizer)
    whole = train_step(make_training(tokenizer), [batch])
    parts = train_step(make_training(tokenizer), pieces(batch, [5, 2, 1]))
    assert len(whole.router_entropy) == len(whole.router_largest) == 2
    assert all(0.9 < entropy <= 1 for entropy in whole.router_entropy), "near-uniform at first"
    assert parts.router_entropy == pytest.approx(whole.router_entropy, rel=1e-6)
    assert parts.router_largest == pytest.approx(whole.router_largest, rel=1e-6)
    dense = train_step(make_training(tokenizer, model__n_experts=1, model__top_k=1), [batch])
    assert dense.router_entropy == dense.router_largest == []


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
    with pytest.raises(UserError, match="overflowed 17 times in a row.*scale is down to 0.5.*bf16"):
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


@pytest.mark.parametrize(
    ("kept", "said"), [([3, 6], "The checkpoint of step 6 is untouched."), ([], "Nothing is saved")]
)
def test_what_a_bad_step_leaves(kept: list[int], said: str) -> None:
    """Also where the run's folder has gone, and no checkpoint is to be found."""
    error = diagnostics.bad_step(UserError("the loss is nan."), "It begins there.", Path("run"), kept, OptimSettings())
    assert said in str(error) and "--resume run --set train.bad_step=skip" in str(error)
