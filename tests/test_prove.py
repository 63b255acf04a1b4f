"""Whole studies of tiny models: what they write, that they go on, and that a plan gives the same losses again."""

import html.parser
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinySettings

from moelet import metrics
from moelet.budget import Clock
from moelet.cli import main
from moelet.console import Progress
from moelet.errors import UserError
from moelet.hparams import make_hparams
from moelet.study import calibrate, planning, study, workers
from moelet.study.findings import findings as make_findings
from moelet.study.planning import Planner, Request
from moelet.study.prove import Study
from moelet.study.study import Done, Job

HORIZONS, SEEDS = [0.5, 1.0], [0, 1]
begin_worker = workers._begin


def quick_worker(threads: int) -> None:
    """A worker that measures next to nothing, and leaves syncs, which a power cut alone needs, to test_checkpoint."""
    begin_worker(threads)
    metrics.RATE_SECONDS, metrics.RATE_SIZE["cpu"] = 0.0, 8
    calibrate.TURN_SECONDS = 0.01
    os.fsync = lambda handle: None  # type: ignore[assignment]


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["moelet.study.prove"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "CONTEXT", server)
        patch.setattr(workers, "_begin", quick_worker)
        yield


@pytest.fixture(scope="module")
def file(tiny_settings: TinySettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "tiny.json"
    # four experts of width 32 beside dense twins of 64 and 128; 12 steps
    path.write_text(json.dumps(tiny_settings(model={"d_ff": 128}, train={"train_steps": 12, "batch_size": 16})))
    return path


@pytest.fixture(scope="module")
def done(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of the MoE and its twins."""
    folder = tmp_path_factory.mktemp("study") / "done"
    options = ["--seeds", "2", "--horizons", "0.5,1", "--lr-grid", "0.5,1"]
    assert main(["prove", str(file), "--run", str(folder), *options, "--json", str(folder.parent / "out.json")]) == 0
    return folder


def findings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "prove.json").read_text())


def bits(folder: Path) -> dict[tuple[str, int], list[float]]:
    return {
        (entry["name"], entry["seed"]): [run["bits_per_byte"] for run in entry["horizons"]]
        for entry in findings(folder)["arms"]
    }


# what a study writes


def test_every_arm_seed_and_horizon_is_there(done: Path) -> None:
    found, plan = findings(done), study.read_plan(done / study.PLAN)
    assert json.loads((done.parent / "out.json").read_text()) == found
    assert {"moe", "dense-active", "dense-total"} <= {arm.name for arm in plan.arms}
    assert set(bits(done)) == {(arm.name, seed) for arm in plan.arms for seed in SEEDS}
    for entry in found["arms"]:
        assert [run["horizon"] for run in entry["horizons"]] == HORIZONS
        assert [run["tokens"] for run in entry["horizons"]] == pytest.approx([6 * 16 * 32, 12 * 16 * 32], rel=1e-3)
        assert entry["curve"][-1][3] == entry["horizons"][-1]["bits_per_byte"]
        assert [len(point) for point in entry["curve"]] == [4] * len(entry["curve"])
    assert found["verdict"].count("dense-active") >= 1
    assert "tie" in found["comparisons"][0]["sentence"] or found["comparisons"][0]["word"] != "tie"


def test_rates_were_chosen_from_a_grid_that_grew_at_most_twice(done: Path) -> None:
    for arm in study.read_plan(done / study.PLAN).arms:
        assert arm.lr_factor == study.best_factor(dict(arm.sweep))
        assert 2 < len(arm.sweep) <= 4
        assert len(arm.rates) == calibrate.ROUNDS


def settings_of(folder: Path, job: str) -> dict[str, Any]:
    return json.loads((folder / "jobs" / job / "hparams.json").read_text())


def test_arms_differ_in_their_model_alone(done: Path) -> None:
    one, other = settings_of(done, "moe/1-0"), settings_of(done, "dense-total/1-0")
    assert {name for name in one if one[name] != other[name]} <= {"model", "optim", "train"}
    assert one["data"]["source"] == "prepared"
    changed = {name for name in one["train"] if one["train"][name] != other["train"][name]}
    assert changed <= {"checkpoint_steps"}  # in seconds: it follows the throughput


def test_a_jobs_schedule_is_its_own(done: Path) -> None:
    rows = [json.loads(line) for line in (done / "jobs/moe/0.5-0/metrics.jsonl").read_text().splitlines()]
    hparams = settings_of(done, "moe/0.5-0")
    assert rows[-1]["step"] == rows[-1]["total_steps"] == 6
    assert rows[-1]["lr"] == pytest.approx(hparams["optim"]["min_lr"])


class Page(html.parser.HTMLParser):
    """The tags of a page and what they link to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_page_needs_nothing_else(done: Path) -> None:
    text = (done / "prove.html").read_text()
    page = Page(text)
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    for sentence in (found["sentence"] for found in findings(done)["comparisons"]):
        assert sentence.replace("<", "&lt;").replace(">", "&gt;") in text
    assert f"moelet prove --run {done}" in text
    assert (done / "prove.png").read_bytes().startswith(b"\x89PNG")


def test_weights_are_kept_of_the_longest_runs_alone(done: Path) -> None:
    kept = {path.parent.name for path in done.glob("jobs/*/*/checkpoints")}
    assert kept == {"1-0", "1-1"}


# going on


def test_a_finished_study_is_not_trained_again(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.glob("jobs/*/*/metrics.jsonl")}
    assert main(["prove", "--run", str(done)]) == 0
    assert {path: path.stat().st_mtime_ns for path in done.glob("jobs/*/*/metrics.jsonl")} == before
    assert findings(done)["comparisons"][0]["sentence"] in capsys.readouterr().out


def when_training(folder: Path, act: Callable[[], bool]) -> threading.Thread:
    """Call `act` from a thread once a job that isn't done has made a step, until it says that it did something."""

    def watch() -> None:
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            paths = list((folder / "jobs").glob("*/*/metrics.jsonl"))
            begun = any(path.stat().st_size and workers.result_of(path.parent) is None for path in paths)
            if begun and act():
                return
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def interrupt() -> bool:
    os.kill(os.getpid(), signal.SIGINT)
    return True


def kill_workers() -> bool:
    """The job that was interrupted before has made its steps already, so there may be no worker yet."""
    processes = multiprocessing.active_children()
    for process in processes:
        process.kill()
    return bool(processes)


def test_interrupted_and_killed_a_plan_gives_the_same_losses(
    done: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, plan = tmp_path / "again", study.read_plan(done / study.PLAN)
    plan.arms = plan.arms[:2]
    (tmp_path / study.PLAN).write_text(plan.to_json())
    first = ["prove", "--plan", str(tmp_path / study.PLAN), "--run", str(folder)]
    again = ["prove", "--run", str(folder)]

    when_training(folder, interrupt)
    assert main(first) == 130
    assert f"Go on with: python -m moelet prove --run {folder}" in capfd.readouterr().err
    assert not (folder / "prove.json").exists()

    when_training(folder, kill_workers)
    assert main(first) == 75  # the line that began it goes on with it, too
    said = capfd.readouterr().err
    assert "the process of job" in said and f"moelet prove --run {folder}" in said

    assert main(again) == 0
    assert bits(folder) == {key: value for key, value in bits(done).items() if key[0] in ("moe", "dense-active")}
    assert study.read_plan(folder / study.PLAN).arms == plan.arms  # rates and sweeps are the plan's


def test_more_seeds_join_those_that_are_there(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    shutil.copytree(done, folder)
    plan = study.read_plan(folder / study.PLAN)
    plan.arms, plan.horizons = plan.arms[:2], [1.0]
    plan.budget, plan.notes = 1.0, ["seed 2 is left out: the time budget had no room for it."]
    (folder / study.PLAN).write_text(plan.to_json())
    assert main(["prove", "--run", str(folder), "--seeds", "3", "--jobs", "2"]) == 0
    assert findings(folder)["notes"] == []
    assert {seed for _, seed in bits(folder)} == {0, 1, 2}
    assert bits(folder)["moe", 0] == bits(done)["moe", 0][1:]


def study_in(folder: Path, plan: study.Plan) -> Study:
    return Study(plan, folder, {}, Progress(), Clock(0.0, time.monotonic()))


def test_a_rate_that_diverges_is_noted_and_the_study_goes_on(done: Path, tmp_path: Path) -> None:
    plan = study.read_plan(done / study.PLAN)
    arm = plan.arms[1]
    arm.sweep, arm.lr_factor = [(0.5, 3.0)], None
    going, job, ended = study_in(tmp_path, plan), Job(arm.folder, study.SWEEP_SHARE, 0, 1.0, True), Future[str | None]()
    ended.set_result("the gradient norm is nan")
    going.running[ended] = (job, 0.0)
    going._finish(ended, stopping=False)
    assert arm.sweep == [(0.5, 3.0), (1.0, None)] and f"{arm.name}, learning rates x 1: the gradient" in plan.notes[-1]
    assert [job.factor for job in study.sweep_jobs(plan, arm)] == [0.25]
    assert arm.lr_factor is None


def test_an_arm_whose_every_rate_diverges_is_named(done: Path, tmp_path: Path) -> None:
    plan = study.read_plan(done / study.PLAN)
    plan.arms[1].sweep, plan.arms[1].lr_factor = [(0.5, None), (1.0, None)], None
    with pytest.raises(UserError, match="'dense-active' diverged with every learning rate"):
        study_in(tmp_path, plan).settle()


def test_an_arm_with_a_diverged_run_is_left_out_and_the_others_go_on(done: Path, tmp_path: Path) -> None:
    plan = study.read_plan(done / study.PLAN)
    going = study_in(tmp_path, plan)

    def diverge(arm: study.Arm) -> None:
        ended = Future[str | None]()
        ended.set_result("the gradient norm is nan.")
        going.running[ended] = (Job(arm.folder, 1.0, 0, 1.0), 0.0)
        going._finish(ended, stopping=False)

    diverge(plan.arms[2])
    assert plan.arms[2] not in plan.standing and plan.arms[2].folder not in {job.arm for job in study.matrix(plan)}
    assert plan.notes[-1].startswith(f"{plan.arms[2].name} is left out: job {plan.arms[2].folder}/1-0: the gradient")
    kept = {job: Done(1, 1.0, 1.0, [(1, 1.0, 1.0)]) for job in study.matrix(plan)}
    assert {side["name"] for side in make_findings(plan, kept)["sides"]} == {arm.name for arm in plan.standing}
    with pytest.raises(UserError, match=f"no verdict without '{plan.arms[0].name}'"):
        diverge(plan.arms[0])  # with which all others are compared


# time


def test_what_trains_most_together_is_chosen(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner(Request(file), Progress(), Clock(0.0, 0.0))
    plan = planner._draft(planner.changes)
    rates = {(1, 4): 900.0, (2, 2): 1400.0, (4, 1): 1200.0}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert planner._ways() == list(rates)
    monkeypatch.setattr(planning, "together", lambda way, count, *_: rates[way] if count == way[0] else 800.0)
    planner._choose_way({way: way for way in rates}, plan)  # type: ignore[misc]
    assert (plan.jobs, plan.threads, plan.side_by_side) == (2, 2, 1400 / 800)


class Now:
    """Stands in for a pool: what is submitted is computed at once."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> "Now":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Now":
        self.value = function(*arguments)
        return self

    def result(self) -> Any:
        return self.value


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that trains 4e9 / active parameters tokens a second; the twin of equal time is 192 wide."""

    def in_turn(settings: Any, vocab_size: int, rounds: int) -> list[list[float]]:
        return [[4e9 / planning.size_of(one.model, vocab_size).active] * rounds for one in settings]

    monkeypatch.setattr(planning, "workers", Now)
    monkeypatch.setattr(planning, "in_turn", in_turn)
    monkeypatch.setattr(planning, "equal_time_width", lambda path, changes, vocab_size: 192)


def test_a_budget_chooses_a_size_that_fits_it(file: Path, paced: None) -> None:
    request = Request(file, ["model.n_experts=8", "model.d_ff=256"], budget=3600.0)
    plan = Planner(request, Progress(), Clock(0.0, time.monotonic())).make()
    widths = {arm.settings["model"]["d_model"] for arm in plan.arms}
    assert len(widths) == 1 and widths < set(study.WIDTHS)
    assert all(plan.tokens / arm.active_parameters >= study.ACTIVE_TOKENS for arm in plan.arms)
    assert study.study_seconds(plan) < study.BUDGET_SHARE * 3600
    assert [arm.name for arm in plan.arms] == ["moe", "dense-active", "dense-total", "dense-equal-time"]
    assert plan.base["train"]["train_tokens"] == plan.tokens
    shift = planning.rate_shift(make_hparams(json.loads(file.read_text())).model, widths.pop())
    assert plan.grid == [factor * shift for factor in planning.DEFAULT_GRID]


def test_a_twin_of_equal_time_next_to_another_is_left_out_with_a_word(file: Path, paced: None) -> None:
    plan = Planner(Request(file, ["model.d_ff=224", "model.n_experts=7"]), Progress(), Clock(0.0, 0.0)).make()
    assert "dense-equal-time" not in [arm.name for arm in plan.arms]
    assert "dense-equal-time is left out: its width, 192, is within 32 of that of dense-total" in plan.notes[0]


def test_seeds_are_left_out_when_the_clock_runs_ahead(done: Path) -> None:
    plan = study.read_plan(done / study.PLAN)
    plan.seeds, plan.side_by_side = [0, 1, 2, 3], 1.0
    for arm in plan.arms:
        arm.tokens_per_second = 100.0
    first = {seed: next(job for job in study.matrix(plan) if job.seed == seed) for seed in plan.seeds}
    per_seed = sum(study.job_seconds(plan, job) for job in study.matrix(plan)) / 4
    plan.budget = 2.5 * per_seed + study.REPORT_SECONDS
    late = study_in(Path("unused"), plan)
    late.results = {job: Done(1, 1.0, 1.0, []) for job in study.matrix(plan) if job.seed == 0}
    late.clock = Clock(per_seed, time.monotonic())
    late.keep_to_budget(first[1])
    assert plan.seeds == [0, 1, 2, 3]  # as far as one sees now; the last two may yet have their time
    late.results |= {job: Done(1, 1.0, 1.0, []) for job in study.matrix(plan) if job.seed == 1}
    late.clock = Clock(2 * per_seed, time.monotonic())
    late.keep_to_budget(first[2])
    assert plan.seeds == [0, 1] and "seed 2" in plan.notes[-2] and "seed 3" in plan.notes[-1]
    late.results.clear()
    late.clock = Clock(plan.budget, time.monotonic())  # all of the time is gone
    late.keep_to_budget(first[0])
    assert plan.seeds == [0, 1]
    late.keep_to_budget(first[1])
    assert plan.seeds == [0]


# what can't be asked for


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--set", "model.n_experts=1", "--set", "model.top_k=1"], ["n_experts is 1", "--vary"]),
        (["--vary", "optim.lr=1e-3"], ["only arm", "needs two"]),
        (["--vary", "optim.lr=1e-3,2e-3", "--arm", "x: optim.lr=1"], ["--vary and --arm", "Give one"]),
        (["--vary", "optim.lrr=1,2"], ["optim.lrr", "Did you mean 'lr'"]),
        (["--vary", "train.seed=1,2"], ["train.seed", "--set"]),
        (["--arm", "x: data.packing=false"], ["data.packing", "one text"]),
        (["--horizons", "0.5"], ["--horizons is 0.5", "up to 1"]),
        (["--horizons", "0,1"], ["--horizons is 0,1"]),
        (["--horizons", "a"], ["--horizons is 'a'", "numbers"]),
        (["--lr-grid", "0,1"], ["--lr-grid is 0,1", "above 0"]),
        (["--set", "train.time_budget=60"], ["train.time_budget", "train.train_tokens"]),
        (["--set", "train.global_batch_size=8", "--set", 'train.batch_size="auto"'], ["auto", "to a number"]),
        (["--time-budget", "1 hour"], ["1 hour", "5h"]),
        (["--plan", "nowhere.json"], ["--plan", "Leave out"]),
        (["--lr-grid", "nan"], ["--lr-grid is 'nan'"]),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(
    file: Path, tmp_path: Path, options: list[str], parts: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["prove", str(file), "--run", str(tmp_path / "x"), *options]) == 78
    said = capfd.readouterr().err
    assert all(part in said for part in parts), said
    assert not (tmp_path / "x" / "jobs").exists()


def test_another_study_does_not_go_on_here(file: Path, done: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", str(file), "--run", str(done), "--set", "optim.lr=0.5", "--lr-grid", "1"]) == 78
    said = capfd.readouterr().err
    assert "holds another study; these differ: lr_grid, horizons, settings" in said and "Go on with it" in said


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    assert main(["prove", str(file), "--run", str(tmp_path)]) == 78
    assert "not a study's" in capfd.readouterr().err


def test_a_plan_needs_the_text_that_it_was_made_for(
    done: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = study.read_plan(done / study.PLAN)
    plan.text["sha256"] = "0"
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert main(["prove", "--plan", str(tmp_path / "plan.json"), "--run", str(tmp_path / "x")]) == 78
    assert "isn't that of the plan" in capfd.readouterr().err
