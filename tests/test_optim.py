"""What decays and what doesn't, AdamW by its formula, and the learning rate of every step."""

import itertools

import pytest
import torch

from moelet.errors import UserError
from moelet.modelling import GPT
from moelet.optim import ADAM_EPS, OPTIMIZERS, SCHEDULES, adamw, learning_rate, parameter_groups
from moelet.sections import ModelSettings, OptimSettings

SHAPE = {"max_length": 8, "d_model": 12, "d_embed": 6, "n_layers": 2, "n_heads": 2, "d_ff": 20, "n_experts": 5}
VARIANTS = [{}, {"tie_embeddings": False}, {"d_embed": None}, {"activation": "swiglu"}, {"n_experts": 1, "top_k": 1}]
UNDECAYED = ("layernorm.weight", "norm.weight", "mlp.gate.weight", "embed.tokens.weight", "embed.positions.weight")


def tiny(**changes: object) -> GPT:
    torch.manual_seed(0)
    return GPT(ModelSettings(**{**SHAPE, **changes}), 17)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_parameter_is_in_the_right_group_once(changes: dict[str, object]) -> None:
    model = tiny(**changes)
    groups = parameter_groups(model, OptimSettings(weight_decay=0.1))
    decay_of = [(parameter, group["weight_decay"]) for group in groups for parameter in group["params"]]
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert sorted(names[parameter] for parameter, _ in decay_of) == sorted(names.values())
    for parameter, decay in decay_of:
        assert decay == (0.0 if names[parameter].endswith(UNDECAYED) else 0.1), names[parameter]
    decayed = {names[parameter] for parameter, decay in decay_of if decay}
    assert ("embed.proj.weight" in decayed) == ("d_embed" not in changes)
    assert ("layers.1.mlp.experts.up_proj" in decayed) == ("n_experts" not in changes)


def test_embed_lr_is_for_the_embedding_tables_alone() -> None:
    model = tiny()
    tables = {id(model.embed.tokens.weight), id(model.embed.positions.weight)}
    for group in parameter_groups(model, OptimSettings(lr=1e-3, embed_lr=4e-3)):
        assert all((id(parameter) in tables) == (group["lr_scale"] != 1.0) for parameter in group["params"])
        assert group["lr_scale"] in (1.0, 4.0)
    assert {group["lr_scale"] for group in parameter_groups(model, OptimSettings(lr=1e-3))} == {1.0}


def test_router_lr_is_for_the_routers_alone() -> None:
    model = tiny()
    routers = {id(layer.mlp.gate.weight) for layer in model.layers}
    for group in parameter_groups(model, OptimSettings(lr=1e-3, router_lr=5e-4)):
        assert all((id(parameter) in routers) == (group["lr_scale"] == 0.5) for parameter in group["params"])
    assert sum(group["lr_scale"] == 0.5 for group in parameter_groups(model, OptimSettings(router_lr=5e-4))) == 1


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_by_its_formula(decay: float) -> None:
    """Loshchilov & Hutter 2017, algorithm 2, with the decay times the learning rate."""
    settings = OptimSettings(lr=3e-3, weight_decay=decay, betas=(0.9, 0.95))
    model = tiny().double()
    optimizer = adamw(model, settings)
    want = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in want.items()}
    second = {name: torch.zeros_like(value) for name, value in want.items()}
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 6):
        lr = 3e-3 / step
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = gradient.clone()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.95**step)
            shrink = 1 - lr * (0.0 if name.endswith(UNDECAYED) else decay)
            want[name] = shrink * want[name] - lr * mean / (square.sqrt() + ADAM_EPS)
        optimizer.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), want[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_learn(name: str) -> None:
    model = tiny(dropout=0.0)
    optimizer = OPTIMIZERS[name](model, OptimSettings(lr=1e-2))
    ids, losses = torch.randint(17, (4, 8)), []
    for _ in range(60):
        logits = model.logits(model(ids[:, :-1]).hidden)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def rates(schedule: str, total: int, warmup: int, min_lr: float = 0.1) -> list[float]:
    settings = OptimSettings(lr=1.0, min_lr=min_lr, warmup_steps=warmup, schedule=schedule)
    return [learning_rate(settings, step, [[0, total]]) for step in range(total)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up(schedule: str) -> None:
    got = rates(schedule, 100, 4)
    assert got[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates(schedule, 100, 0)[0] > 0.99
    assert rates(schedule, 100, 1)[0] == 1.0


@pytest.mark.parametrize("warmup", [0, 1, 7, 98, 99])
@pytest.mark.parametrize("min_lr", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("schedule", sorted(set(SCHEDULES) - {"constant"}))
def test_the_last_step_has_min_lr(schedule: str, min_lr: float, warmup: int) -> None:
    assert rates(schedule, 100, warmup, min_lr)[-1] == min_lr
    assert rates(schedule, 1, 0, min_lr) == [min_lr]


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_never_rises_after_the_warm_up(schedule: str, warmup: int) -> None:
    after = rates(schedule, 100, warmup)[warmup:]
    assert all(later <= earlier for earlier, later in itertools.pairwise(after))
    assert all(0.1 <= rate <= 1.0 for rate in after)


def test_schedules_by_hand() -> None:
    assert rates("constant", 100, 10)[10:] == [1.0] * 90
    assert rates("linear", 110, 10)[59] == pytest.approx(0.55)  # half way from 1 to 0.1
    assert rates("cosine", 110, 10)[59] == pytest.approx(0.55)
    assert rates("cosine", 110, 10)[34] == pytest.approx(0.1 + 0.9 * (1 + 2**-0.5) / 2)  # a quarter of the way
    steady = rates("wsd", 110, 10)
    assert steady[9:70] == [1.0] * 61 and steady[70] < 1.0, "two fifths of the rest fall"
    assert steady[89] == pytest.approx(0.55)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warm_up_longer_than_the_run_never_ends(schedule: str) -> None:
    assert rates(schedule, 5, 10) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates(schedule, 5, 5)[-1] == 1.0


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(UserError, match=r"optim\.schedule is 'cosin'.*Did you mean 'cosine'"):
        rates("cosin", 10, 0)


# plans made on the way


def planned(plan: list[list[int]], warmup: int, schedule: str = "linear") -> list[float]:
    settings = OptimSettings(lr=1.0, min_lr=0.1, warmup_steps=warmup, schedule=schedule)
    return [learning_rate(settings, step, plan) for step in range(plan[-1][1])]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_plan_again_changes_nothing(schedule: str) -> None:
    once = planned([[0, 40]], 4, schedule)
    again = planned([[0, 40], [7, 40], [8, 40], [30, 40]], 4, schedule)
    assert again == pytest.approx(once, abs=1e-12)


@pytest.mark.parametrize("total", [11, 12, 25, 80])
def test_every_plan_ends_at_min_lr_and_never_jumps(total: int) -> None:
    found = planned([[0, 40], [10, total]], 4)
    assert found[-1] == 0.1, "exactly"
    assert found[:10] == planned([[0, 40]], 4)[:10], "what was, stays"
    falls = [before - after for before, after in itertools.pairwise(found[9:])]
    assert min(falls) >= 0 and max(falls) <= (found[9] - 0.1) / (total - 10) + 1e-12, "what is left falls evenly"


def test_before_the_first_plan_the_rate_only_warms_up() -> None:
    settings = OptimSettings(lr=1.0, min_lr=0.1, warmup_steps=4)
    assert [learning_rate(settings, step, []) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_plan_made_during_the_warm_up_cuts_it_to_a_tenth_of_the_rest() -> None:
    found = planned([[5, 45]], 1000)
    assert found[:5] == pytest.approx([(step + 1) / 9 for step in range(5)])
    assert found[8] == 1.0 and found[-1] == 0.1 and found[9] < 1.0
    assert max(planned([[0, 45]], 1000)) < 0.05, "one that was asked for never ends"
