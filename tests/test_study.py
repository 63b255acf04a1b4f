"""A study on paper: its arms, its jobs, its learning rates, and the size that fits a time. Nothing is trained."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY

from moelet.errors import UserError
from moelet.hparams import Hparams, make_hparams, read_hparams
from moelet.modelling import GPT
from moelet.study import arms, calibrate, study
from moelet.study.study import Arm, Job, Plan

VOCABULARY = 400


def hparams(**model: Any) -> Hparams:
    return make_hparams(TINY | {"model": TINY["model"] | model, "data": {}})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(hparams().to_json())
    return path


# arms


@pytest.mark.parametrize("shared", [0, 32])
def test_twins_have_the_widths_and_parameters_that_they_are_called_by(tmp_path: Path, shared: int) -> None:
    path = tmp_path / "moe.json"
    path.write_text(hparams(d_ff=256, n_experts=8, top_k=2, shared_expert=shared, activation="swiglu").to_json())
    changes = arms.twins(read_hparams(path).model)
    found = {name: hp.model for name, hp in arms.arm_settings(path, [], changes).items()}
    sizes = {name: arms.size_of(model, VOCABULARY) for name, model in found.items()}
    assert list(found) == ["moe", "dense-active", "dense-total"]
    assert (found["dense-active"].n_experts, found["dense-active"].d_ff) == (1, 64 + shared)
    assert found["dense-total"].d_ff == 256 + shared
    router = 2 * 8 * 32  # layers, experts, width
    assert sizes["moe"].active - router == sizes["dense-active"].active
    assert sizes["moe"].parameters - router == sizes["dense-total"].parameters
    assert sizes["moe"].flops_per_token > sizes["dense-active"].flops_per_token


def test_active_parameters_are_those_a_token_uses_outside_of_the_tables() -> None:
    model = hparams(n_layers=1, d_ff=128, n_experts=4, top_k=2).model
    attention, norms, router, experts = 4 * 32 * 32, 3 * 32, 4 * 32, 2 * 2 * 32 * 32
    assert arms.size_of(model, VOCABULARY).active == attention + norms + router + experts
    made = GPT(model, VOCABULARY)
    assert arms.size_of(model, VOCABULARY).parameters == sum(p.numel() for p in made.parameters())
    assert made.table.device == torch.device("cpu")  # sizing leaves nothing behind


def test_a_dense_file_has_no_twins() -> None:
    with pytest.raises(UserError, match="n_experts is 1.*--vary"):
        arms.twins(hparams(n_experts=1, top_k=1).model)


def test_twins_of_a_biased_router_are_plain(tmp_path: Path) -> None:
    settings = TINY | {"model": TINY["model"] | {"selection_bias": True}, "balance": {"bias_rate": 0.001}, "data": {}}
    path = tmp_path / "biased.json"
    path.write_text(json.dumps(settings))
    found = arms.arm_settings(path, [], arms.twins(read_hparams(path).model))
    assert found["dense-total"].balance.bias_rate is None


def test_varied_values_are_crossed_the_first_of_all_first() -> None:
    found = arms.varied(["optim.optimizer=adamw,muon", "optim.betas=[0.9,0.95],[0.8,0.95]"])
    assert next(iter(found)) == "optimizer=adamw, betas=[0.9,0.95]"
    assert len(found) == 4
    assert found["optimizer=muon, betas=[0.8,0.95]"] == ["optim.optimizer=muon", "optim.betas=[0.8,0.95]"]


def test_arms_are_called_by_what_differs() -> None:
    assert list(arms.varied(["optim.lr=1,2", "model.top_k=2"])) == ["lr=1", "lr=2"]
    assert list(arms.varied(["a.x=1,2", "b.x=1"])) == ["x=1", "x=2"]
    assert next(iter(arms.varied(["a.x=1,2", "b.x=1,2"]))) == "a.x=1, b.x=1"
    assert list(arms.varied(["a.x=1"])) == ["x=1"]


def test_named_arms_come_after_the_file_itself() -> None:
    found = arms.named(["hot: optim.lr=0.1 optim.min_lr=0.01", "wsd: optim.schedule=wsd"])
    assert found == {"base": [], "hot": ["optim.lr=0.1", "optim.min_lr=0.01"], "wsd": ["optim.schedule=wsd"]}


@pytest.mark.parametrize("option", ["hot optim.lr=1", "hot:", ": optim.lr=1", "hot: 'optim.lr=1", "base: optim.lr=1"])
def test_an_arm_without_name_or_changes_is_refused(option: str) -> None:
    with pytest.raises(UserError, match=r"--arm|arms are called"):
        arms.named([option])


@pytest.mark.parametrize("option", ["optim.lr", "optim.lr=", "optim.lr=1,,2"])
def test_a_variation_without_values_is_refused(option: str) -> None:
    with pytest.raises(UserError, match="--vary"):
        arms.varied([option])


@pytest.mark.parametrize(
    "change",
    [
        "data.shuffle_window=8",
        "tokenizer.vocab_size=300",
        "train.seed=1",
        "train.train_tokens=9",
        "train.time_budget=9",
    ],
)
def test_an_arm_reads_the_same_text_for_as_long(change: str) -> None:
    with pytest.raises(UserError, match=f"arm 'x' sets {change.partition('=')[0]}.*--set"):
        arms.refuse_unfair({"x": [change]}, sized=False)


def test_a_width_is_refused_where_the_budget_chooses_it() -> None:
    arms.refuse_unfair({"x": ["model.d_ff=256"], "y": ["train.batch_size=2"]}, sized=False)
    with pytest.raises(UserError, match="--time-budget chooses widths"):
        arms.refuse_unfair({"x": ["model.d_ff=256"]}, sized=True)


def test_a_wrong_change_names_its_arm(file: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)arm 'x'.*optim.lrr.*Did you mean 'lr'"):
        arms.arm_settings(file, [], {"x": ["optim.lrr=1"]})


def test_folder_names_are_plain_and_differ() -> None:
    found = arms.folder_names(["a b", "a/b", "..", "../../x", "optim.lr=0.1, model.top_k=2", "ä"])
    assert found == ["a-b", "a-b-2", "arm", "x", "optim.lr=0.1-model.top_k=2", "arm-2"]


@pytest.mark.parametrize("width", study.WIDTHS)
def test_every_width_of_the_ladder_fits_together(file: Path, width: int) -> None:
    for changes in ([], ["model.d_model=512", "model.n_heads=8", "model.d_ff=2048", "model.n_experts=8"]):
        base = read_hparams(file, changes)
        model = read_hparams(file, [*changes, *arms.scaled(base.model, width)]).model
        assert model.d_model == width and model.expert_width % 32 == 0
        assert model.head_width in (32, base.model.head_width)
        assert model.d_embed is not None and model.d_embed <= width


@pytest.mark.parametrize(("width", "shift"), [(512, 1), (256, 1), (128, 2), (64, 4), (32, 4)])
def test_rates_are_tried_higher_where_the_model_is_narrower(width: int, shift: float) -> None:
    assert arms.rate_shift(hparams(d_model=512).model, width) == shift


def test_scaling_keeps_proportions(file: Path) -> None:
    changes = ["model.d_model=512", "model.d_ff=2048", "model.n_experts=8", "model.d_embed=128"]
    model = read_hparams(file, [*changes, *arms.scaled(read_hparams(file, changes).model, 256)]).model
    assert (model.d_ff, model.expert_width, model.d_embed) == (1024, 128, 64)


def test_throughput_is_judged_round_by_round() -> None:
    assert calibrate.steady([[100.0, 50.0, 10.0], [200.0, 100.0, 20.0], [90.0, 50.0, 9.0]]) == [50.0, 100.0, 45.0]


# jobs


def plan_of(file: Path, tokens: int = 12_800, rate: float = 1000.0, **changes: Any) -> Plan:
    found = arms.arm_settings(file, [], arms.twins(read_hparams(file).model))
    made = [
        Arm(name, name, hp.model_dump(mode="json"), *arms.size_of(hp.model, VOCABULARY), [rate], rate)
        for name, hp in found.items()
    ]
    request = {"vary": [], "arms": []}
    plan = Plan(request, make_hparams(made[0].settings).model_dump(), made, tokens, [0.5, 1.0], [0, 1, 2], [1.0], 1, 1)
    return dataclasses.replace(plan, **changes)


def test_a_plan_survives_its_file(file: Path, tmp_path: Path) -> None:
    plan = plan_of(file)
    plan.arms[0].sweep = [(0.5, None), (1.0, 2.5)]
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert study.read_plan(path).to_json() == plan.to_json()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"arms": []}', '{"arms": [1]}', '{"format": 9, "arms": []}'])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(UserError, match="no plan of a study.*prove"):
        study.read_plan(path)


def test_a_job_has_its_own_length_rates_and_seed(file: Path) -> None:
    plan = plan_of(file, tokens=12_800)  # 100 steps of 4 x 32
    plan.arms[0].settings["optim"] |= {"embed_lr": 0.1, "muon_lr": None}
    found = study.job_settings(plan, Job("moe", 0.5, 7, 2.0), {"source": "prepared", "files": ["/x"], "mix": None})
    assert (found.total_steps, found.train.seed) == (50, 7)
    assert (found.optim.lr, found.optim.min_lr, found.optim.embed_lr, found.optim.muon_lr) == (0.02, 0.002, 0.2, None)
    assert (found.data.source, found.data.files, found.tokenizer.file) == ("prepared", ["/x"], None)
    assert found.train.eval_steps is None and found.train.sample_prompt is None and found.train.track is None
    whole = study.job_settings(plan, Job("moe", 1.0, 0, 1.0), {})
    assert whole.total_steps == 100 and whole.train.eval_steps == 20


def test_jobs_have_folders_of_their_own(file: Path) -> None:
    plan = plan_of(file)
    jobs = [*study.matrix(plan), Job("moe", 0.5, 0, 1.0, True), Job("moe", 0.5, 0, 2.0, True)]
    assert len({job.folder for job in jobs}) == len(jobs) == 3 * 2 * 3 + 2
    assert [job.seed for job in jobs[:-2]] == sorted(job.seed for job in jobs[:-2])  # the last seeds come last


@pytest.mark.parametrize(
    ("given", "steps", "whole", "expected"),
    [(20, 1000, 1000, 20), (20, 125, 1000, 12), (500, 250, 1000, 125), (0, 10, 100, 0), (4, 1, 100, 1), (9, 9, 9, 9)],
)
def test_a_warm_up_is_at_most_a_tenth_or_in_proportion(given: int, steps: int, whole: int, expected: int) -> None:
    assert study.warmup(given, steps, whole) == expected


def test_a_shortened_warm_up_is_said(file: Path) -> None:
    plan = plan_of(file, tokens=12_800)  # 100 steps
    assert study.warmup_note(plan) is None
    plan.arms[0].settings["optim"]["warmup_steps"] = 8
    assert study.warmup_note(plan) == "the warm-up of 8 steps (moe) is shortened: 5 in runs of 0.5 of the tokens."


# learning rates


def sweep(grid: list[float], loss: Any) -> dict[float, float | None]:
    found: dict[float, float | None] = {}
    while factors := study.next_factors(grid, found):
        found |= {factor: loss(factor) for factor in factors}
    return found


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1.0, [0.5, 1, 2]),
        (2.5, [0.5, 1, 2, 4]),
        (100.0, [0.5, 1, 2, 4, 8]),
        (0.4, [0.25, 0.5, 1, 2]),
        (0.001, [0.125, 0.25, 0.5, 1, 2]),
    ],
)
def test_the_grid_grows_where_the_best_is_at_its_edge_at_most_twice(best: float, tried: list[float]) -> None:
    found = sweep([0.5, 1.0, 2.0], lambda factor: abs(factor - best))
    assert sorted(found) == tried
    assert study.best_factor(found) == min(tried, key=lambda factor: abs(factor - best))
    assert (study.at_edge(found) is not None) == (best in (100.0, 0.001))


def test_a_rate_that_diverges_is_never_chosen() -> None:
    found = sweep([0.5, 1.0, 2.0], lambda factor: None if factor > 1 else -factor)
    assert found == {0.5: -0.5, 1.0: -1.0, 2.0: None} and study.best_factor(found) == 1.0
    assert study.best_factor({1.0: None}) is None and study.next_factors([1.0], {1.0: None}) == []


# time


def drafts(file: Path, per_width: float) -> Any:
    """Plans whose arms train `per_width` / width^2 tokens a second."""

    def draft(width: int) -> Plan:
        plan = plan_of(file, budget=3600.0)
        plan.base["model"]["d_model"] = width
        for arm in plan.arms:
            arm.tokens_per_second, arm.active_parameters = per_width / width**2, 100 * width**2
        return plan

    return draft


def test_the_largest_width_that_fits_is_taken_and_fills_the_time(file: Path) -> None:
    plan = study.choose_size(drafts(file, 2e9), lambda: 3600.0)
    seconds = study.study_seconds(plan)
    assert plan.base["model"]["d_model"] in study.WIDTHS[1:-1]
    assert plan.tokens >= study.least_tokens(plan) == 20 * 100 * plan.base["model"]["d_model"] ** 2
    assert 0.8 * 3600 < seconds <= study.BUDGET_SHARE * 3600
    larger = drafts(file, 2e9)(study.WIDTHS[study.WIDTHS.index(plan.base["model"]["d_model"]) + 1])
    larger.tokens = study.least_tokens(larger)
    assert study.study_seconds(larger) > study.BUDGET_SHARE * 3600


def test_measuring_eats_into_the_time_itself(file: Path) -> None:
    clock = iter(range(3600, 0, -600))
    slow = study.choose_size(drafts(file, 2e9), lambda: float(next(clock)))
    quick = study.choose_size(drafts(file, 2e9), lambda: 3600.0)
    assert slow.base["model"]["d_model"] <= quick.base["model"]["d_model"] and slow.tokens < quick.tokens


def test_a_time_in_which_nothing_fits_is_refused_with_one_that_would_do(file: Path) -> None:
    with pytest.raises(UserError, match=r"smallest model \(d_model 32\).*needs about [\d,]+ s.*--time-budget \d+m"):
        study.choose_size(drafts(file, 1e6), lambda: 100.0)
