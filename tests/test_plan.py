"""`moelet plan`: what it says of a run is what the run has, takes and needs."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinySettings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from moelet.cli import main
from moelet.errors import UserError
from moelet.foresee import plan as planned
from moelet.foresee.cards import CARDS, Card, Simulations, chosen, estimate
from moelet.foresee.page import block, hours, short
from moelet.foresee.proposals import Pace, Search, rounded_up
from moelet.foresee.rehearsal import Rehearsed, rehearse
from moelet.foresee.simulate import simulate
from moelet.foresee.sizes import empty_model, files, flops, parameters
from moelet.hparams import Hparams, make_hparams
from moelet.kernels import native
from moelet.kernels.sorted_rows import fair_shares
from moelet.kv_cache import KVCache
from moelet.loss import linear_cross_entropy
from moelet.modelling import GPT
from moelet.state import build, snapshot
from moelet.storage import checkpoint
from moelet.study.arms import size_of
from moelet.tokenizer import Tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "reference": {},
    "dense": {"n_experts": 1, "top_k": 1, "d_ff": 96},
    "swiglu, shared expert": {"activation": "swiglu", "shared_expert": 32, "d_ff": 128},
    "rope, untied, no projection": {"positions": "rope", "qk_norm": True, "tie_embeddings": False, "d_embed": None},
    "everything": {"bigram_rows": 50, "smear": True, "value_residual": True, "embed_residual": True},
    "many experts": {"n_experts": 16, "top_k": 3, "d_ff": 512, "n_layers": 3},
}
VOCABULARY = 300


def shaped(tiny_settings: TinySettings, shape: str, **changes: dict[str, Any]) -> Hparams:
    model = {"max_length": 128, **SHAPES[shape], **changes.pop("model", {})}
    return make_hparams(tiny_settings(model=model, **changes))


# sizes


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_exactly_those_of_the_model(tiny_settings: TinySettings, shape: str) -> None:
    settings = shaped(tiny_settings, shape).model
    model = GPT(settings, VOCABULARY)
    found = parameters(settings, empty_model(settings, VOCABULARY))
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = sum(
        layer.mlp.experts.up_proj[settings.top_k :].numel() * (3 if settings.activation == "swiglu" else 2)
        for layer in model.layers
        if settings.n_experts > 1
    )
    assert found["parameters"] == total
    assert found["active_with_tables"] == total - idle
    assert found["active_parameters"] == size_of(settings, VOCABULARY).active
    assert sum(part["parameters"] for part in found["parameters_by_part"].values()) == total


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_those_counted_of_forward_and_backward(tiny_settings: TinySettings, shape: str) -> None:
    """By torch's counter on the plain path; it doesn't know of the mask and counts attention's whole square."""
    settings = shaped(tiny_settings, shape, model={"attention": "explicit", "experts": "grouped", "dropout": 0.0}).model
    found = flops(settings, empty_model(settings, VOCABULARY))
    rows = 3
    with FakeTensorMode(), fair_shares():
        model, ids = GPT(settings, VOCABULARY), torch.zeros(rows, settings.max_length, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            output = model(ids)
            loss = linear_cross_entropy(model.features(output.hidden).flatten(0, 1), model.table, ids.flatten())
            (loss + sum(stats.probability.sum() for stats in output.router)).backward()
    counted = counter.get_total_flops() / ids.numel()
    assert found["flops_per_token_full_square"] == pytest.approx(counted, rel=0.01)
    assert found["flops_per_token"] == pytest.approx(counted - found["flops_by_part"]["attention scores"], rel=0.01)
    assert sum(found["flops_by_part"].values()) == found["flops_per_token"]


def test_causal_flops_are_those_of_a_text_read_token_by_token(
    tiny_settings: TinySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a cache no query meets a key behind it: what is left is the half that counts."""
    monkeypatch.setattr(native, "_load", lambda dtype: "what C multiplies can't be counted")
    settings = shaped(tiny_settings, "reference", model={"max_length": 64}).model
    model, cache = GPT(settings, VOCABULARY).eval(), KVCache(settings)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for _ in range(settings.max_length):
            model.logits(model(torch.zeros(1, 1, dtype=torch.int64), None, cache).hidden)
    forward = counter.get_total_flops() / settings.max_length
    found = flops(settings, empty_model(settings, VOCABULARY))["flops_per_token"]
    assert found == pytest.approx(3 * forward, rel=0.01)
    assert found != 3 * forward, "each token meets itself, a whole score; on average that is half of one more"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_files_are_as_large_as_foreseen(
    tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path: Path, optimizer: str
) -> None:
    hparams = make_hparams(tiny_settings(model={"d_model": 64, "d_ff": 512}, optim={"optimizer": optimizer}))
    training = build(hparams, tokenizer)
    for parameter in training.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    training.optimizer.step()
    checkpoint.save(tmp_path, snapshot(training, {}))
    foreseen = files(hparams, empty_model(hparams.model, tokenizer.vocab_size))
    for name in ("model", "optimizer"):
        (file,) = tmp_path.rglob(f"{name}.safetensors")
        assert file.stat().st_size == pytest.approx(foreseen[name], rel=0.02)


# cards


def test_a_simulated_step_holds_weights_moments_and_what_grows_with_rows(tiny_settings: TinySettings) -> None:
    hparams = shaped(tiny_settings, "reference")
    count = parameters(hparams.model, empty_model(hparams.model, VOCABULARY))["parameters"]
    few, many, more = (simulate(hparams, VOCABULARY, [rows], torch.bfloat16, True) for rows in (16, 32, 48))
    assert few.weights == 4 * count and few.optimizer == pytest.approx(8 * count, rel=0.01)
    assert many.peak - few.peak == pytest.approx(more.peak - many.peak, rel=0.05)
    assert few.peak > few.weights + few.optimizer
    counted = sum(operation.flops for operation in many.operations) / (32 * hparams.model.max_length)
    model = empty_model(hparams.model, VOCABULARY)
    # half of attention's square, but five products in its backward pass, which computes its scores again
    assert counted == pytest.approx(model.flops_per_token(hparams.model.max_length), rel=0.1)


def test_estimates_say_that_they_are_and_what_they_rest_on(tiny_settings: TinySettings) -> None:
    simulations = Simulations(shaped(tiny_settings, "reference", train={"precision": "auto"}), 300)
    rows = {name: estimate(card, simulations) for name, card in CARDS.items()}
    for name, row in rows.items():
        low, high = row["tokens_per_second_range"]
        assert row["estimate"] is True and low < row["tokens_per_second"] < high
        assert row["published"]["tflops"] == CARDS[name].tflops and row["assumed"]["share_of_peak"] == 0.5
        assert row["fits"]
    assert rows["T4"]["precision"] == "fp16" and rows["A100"]["precision"] == "bf16"


def test_a_card_is_as_fast_as_its_narrowest_part(tiny_settings: TinySettings) -> None:
    simulations = Simulations(shaped(tiny_settings, "reference", train={"batch_size": 64, "precision": "auto"}), 300)
    card = CARDS["T4"]
    usual = estimate(card, simulations)["step_seconds"]
    assert estimate(card._replace(gb_per_second=card.gb_per_second / 100), simulations)["step_seconds"] > 20 * usual
    assert estimate(card._replace(tflops=card.tflops / 1e4), simulations)["step_seconds"] > 20 * usual
    fast = estimate(Card("x", 1e9, 1e9, 1, 1e9, (7, 5)), simulations)
    assert fast["launch_bound"], "a processor has to launch it all the same"
    assert not estimate(card._replace(gigabytes=0), simulations)["fits"]


@pytest.mark.parametrize(("given", "want"), [("t4", ["T4"]), ("RTX 4090, h100", ["RTX4090", "H100"]), (None, [*CARDS])])
def test_cards_by_name(given: str | None, want: list[str]) -> None:
    assert [card.name for card in chosen(given)] == want


@pytest.mark.parametrize("given", ["T5", "8xT4", ""])
def test_an_unknown_card_is_refused(given: str) -> None:
    with pytest.raises(UserError, match=r"--gpus names .* must be one of: T4, L4"):
        chosen(given)


# this machine


def test_a_rehearsal_is_the_run_in_small(tiny_settings: TinySettings, corpus: Path) -> None:
    """Its parts add up to its peak, which is that of a process that has imported and trained; no weight moves."""
    hparams = make_hparams(tiny_settings(train={"gradient_accumulation": 6, "batch_size": 2}))
    made = rehearse(hparams, hparams.tokenizer.vocab_size, 0.1)
    assert made.text == "the run's own text" and made.batch_size == 2
    assert made.steps >= 4 and 0 < made.slowest <= made.tokens_per_second <= made.fastest
    assert sum(made.parts_mb.values()) == pytest.approx(made.peak_mb)
    assert min(made.parts_mb.values()) >= -1e-6
    assert 100 < made.parts_mb["Python and torch"] < made.peak_mb
    count = parameters(hparams.model, empty_model(hparams.model, 400))["parameters"]
    assert made.parts_mb["weights"] == pytest.approx(4 * count / 2**20)


def test_text_that_is_not_there_is_replaced(tiny_settings: TinySettings) -> None:
    """The embedded text for a hub's; and random ids where it is too small for so many pieces."""
    from moelet.foresee.rehearsal import _text

    hub = {"source": "hub", "dataset": "a/b"}
    hparams = make_hparams(tiny_settings(data=hub))
    tokenizer, used, told = _text(hparams, 400)
    assert tokenizer.vocab_size == 400 and used.data.source == "embedded" and told == "the embedded text"
    many = make_hparams(tiny_settings(data={"files": "/not/there"}, tokenizer={"vocab_size": 10**6}))
    tokenizer, _, told = _text(many, 10**6)
    assert tokenizer.vocab_size == 10**6 and told.startswith("ids drawn")


PEAK = """
import re, sys
from moelet.cli import main
assert main(sys.argv[1:]) == 0
print("PEAK", re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="the most that a process took stands in /proc")
@pytest.mark.parametrize("shape", ["reference", "many experts"])
def test_memory_foreseen_is_what_training_takes(tiny_settings: TinySettings, tmp_path: Path, shape: str) -> None:
    """Within 10 %, start, checkpoint and report included. Wide enough that most of it is the model's."""
    wide = {"d_model": 384, "d_ff": 384 * 16, "d_embed": 128, "max_length": 256}
    settings = tiny_settings(model=SHAPES[shape] | wide, train={"train_steps": 8, "batch_size": 16})
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    made = rehearse(make_hparams(settings), 400, 1.0)
    command = [sys.executable, "-c", PEAK, "train", str(tmp_path / "settings.json"), "--run", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert made.peak_mb == pytest.approx(int(done.stdout.rsplit("PEAK", 1)[1]) / 1024, rel=0.1)


# sizes for a time


def search(tiny_settings: TinySettings, tmp_path: Path, hours: float, speed: float = 1e12) -> Search:
    """A machine of `speed` FLOP/s."""
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(tiny_settings(model={"d_model": 512, "d_ff": 1024, "d_embed": 128})))
    paces: list[int] = []

    def pace(hparams: Hparams) -> Pace:
        paces.append(hparams.model.d_model)
        return Pace(speed / size_of(hparams.model, 400).flops_per_token, 100.0)

    found = Search(path, ["train.seed=7"], 400, hours, pace)
    found.paces = paces  # type: ignore[attr-defined]
    return found


def test_the_largest_size_with_enough_tokens_is_proposed(tiny_settings: TinySettings, tmp_path: Path) -> None:
    tried = search(tiny_settings, tmp_path, 1.0, 3e10)
    best, smaller = tried.find(1.0, 3e10)
    assert best["tokens_per_active_parameter"] >= 20 and best["hours"] <= 1
    assert smaller["d_model"] < best["d_model"] and smaller["tokens"] > best["tokens"]
    larger = next(width for width in planned_widths() if width > best["d_model"])
    assert tried.proposal(larger)["tokens_per_active_parameter"] < 20
    ready = make_hparams(best["settings"])
    assert ready.model.d_model == best["d_model"] and ready.train.train_tokens == best["tokens"]
    assert ready.train.seed == 7 and ready.optim.warmup_steps <= (ready.total_steps or 0) / 10
    assert len(tried.paces) <= 4, "a size that FLOPs rule out isn't tried"  # type: ignore[attr-defined]


def planned_widths() -> tuple[int, ...]:
    from moelet.foresee.proposals import WIDTHS

    return WIDTHS


def test_the_widest_is_said_to_be(tiny_settings: TinySettings, tmp_path: Path) -> None:
    proposals = search(tiny_settings, tmp_path, 1e5, 1e15).find(1.0, 1e15)
    assert [row["widest"] for row in proposals] == [True, False] and proposals[0]["d_model"] == planned_widths()[-1]
    said = block("proposals", {"file": "x.json", "changes": [], "proposals": proposals, "proposals_for": "a card"})
    assert said.count("the widest that is tried") == 1


def test_advice_is_rounded_up() -> None:
    given = (0.000402, 0.5, 9.91, 41.2, 123.4)
    assert [rounded_up(value) for value in given] == ["0.00041", "0.5", "10", "42", "124"]


def test_a_wrong_guess_is_mended_by_what_is_measured(tiny_settings: TinySettings, tmp_path: Path) -> None:
    want = search(tiny_settings, tmp_path, 1.0, 3e10).find(1.0, 3e10)[0]["d_model"]
    for guessed in (3e8, 3e12):
        assert search(tiny_settings, tmp_path, 1.0, 3e10).find(1.0, guessed)[0]["d_model"] == want


@pytest.mark.parametrize(("given", "speed"), [(0.001, 1e9), (1e-5, 1e12)])
def test_too_little_time_says_how_much_it_takes(
    given: float, speed: float, tiny_settings: TinySettings, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"--hours is {given}.*needs .* hours for 20 tokens.*Give --hours") as error:
        search(tiny_settings, tmp_path, given, speed).find(1.0, speed)
    enough = float(str(error.value).split("--hours ")[-1].rstrip("."))
    assert search(tiny_settings, tmp_path, enough, speed).find(1.0, speed)[0]["d_model"] == planned_widths()[0]
    with pytest.raises(UserError):
        search(tiny_settings, tmp_path, enough * 0.8, speed).find(1.0, speed)


def test_a_step_that_takes_longer_than_the_time_is_not_enough(tiny_settings: TinySettings, tmp_path: Path) -> None:
    """One is always planned, and with such batches it alone has enough tokens."""
    tried = search(tiny_settings, tmp_path, 1e-6, 1e9)
    tried.changes.append("train.batch_size=100000")
    with pytest.raises(UserError, match="The smallest size"):
        tried.find(1.0, 1e9)


# the command


@pytest.fixture
def settings_file(tiny_settings: TinySettings, tmp_path: Path) -> Path:
    """A run whose data isn't there yet."""
    hub = {"source": "hub", "dataset": "nobody/nothing"}
    (tmp_path / "run.json").write_text(json.dumps(tiny_settings(data=hub, train={"device": "auto"})))
    return tmp_path / "run.json"


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Hparams]:
    """In the place of the first steps: 1000 tokens a second at any size."""
    asked: list[Hparams] = []

    def instead(hparams: Hparams, vocab_size: int, seconds: float) -> Rehearsed:
        asked.append(hparams)
        return Rehearsed(4, 1000.0, 900.0, 1100.0, seconds, 9, "nothing", 500.0, {"weights": 500.0})

    monkeypatch.setattr(planned, "rehearse", instead)
    monkeypatch.setattr(planned, "least_decoding", lambda hparams: 200.0)
    return asked


def test_plan_needs_no_data(
    settings_file: Path, tried: list[Hparams], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", str(settings_file), "--set", "train.train_steps=100", "--json", str(out)]) == 0
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    assert {"parameters", "active_parameters", "flops_per_token", "memory_mb", "tokens_per_second"} <= set(found)
    assert found["tokens_per_second"] == 1000.0 and found["memory_mb"] == 500.0
    assert found["tokens"] == 100 * 4 * 32
    assert found["hours"] == pytest.approx((found["tokens"] + 0.5 * 1000) / 1000 / 3600)
    assert [row["gpu"] for row in found["gpus"]] == list(CARDS)
    assert f"{found['parameters']:,}" in said and "nothing of them was measured" in said and "1,000 tokens/s" in said


def test_plan_proposes_settings_that_train(
    settings_file: Path, tried: list[Hparams], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, made = tmp_path / "plan.json", tmp_path / "ready to go.json"
    command = ["plan", str(settings_file), "--hours", "4000", "--gpus", "L4", "--json", str(out), "--out", str(made)]
    assert main(command) == 0
    proposal, said = json.loads(out.read_text())["proposals"][0], capsys.readouterr().out
    assert proposal["tokens_per_active_parameter"] >= 20
    assert json.loads(made.read_text()) == proposal["settings"]
    assert f"--set model.d_model={proposal['d_model']}" in said and f"moelet train {shlex.quote(str(made))}" in said


def test_plan_for_a_card_that_is_not_here(settings_file: Path, tmp_path: Path, tried: list[Hparams]) -> None:
    """Settings for another machine are planned all the same; only the hours here are unknown."""
    out = tmp_path / "plan.json"
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    command = ["plan", str(settings_file), "--set", "train.device=cuda", "--gpus", "T4", "--json", str(out)]
    assert main(command) == 0
    found = json.loads(out.read_text())
    assert found["tokens_per_second"] is None and "no CUDA device" in found["why_not_here"] and not tried
    assert found["gpus"][0]["hours"] > 0


def test_plan_without_trying(
    settings_file: Path, tmp_path: Path, tried: list[Hparams], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", str(settings_file), "--seconds", "0", "--gpus", "T4", "--json", str(out)]) == 0
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    assert found["memory_mb"] is None and not tried
    assert found["decoding_memory_without"] is not None and "MB at its most, without " in said
    assert said.index("parameters") < said.index("not tried") < said.index("a step simulated")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--hours", "0"], "must be above 0"),
        (["--hours", "nan"], "must be above 0"),
        (["--hours", "1", "--seconds", "0"], "needs the speed of this machine"),
        (["--out", "x.json"], "Give --hours as well"),
        (["--gpus", "T5"], "must be one of"),
        (["--set", "model.experts=quick"], "must be one of"),
        (["--set", "model.n_expert=2"], "n_experts"),
    ],
)
def test_mistakes(
    settings_file: Path,
    tried: list[Hparams],
    arguments: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(settings_file), *arguments]) == 78
    assert told in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    assert "Example: moelet plan" in " ".join(capsys.readouterr().out.split())


def test_figures_as_people_read_them() -> None:
    assert [short(value) for value in (7, 1234, 5.6e6, 7e9)] == ["7", "1.2K", "5.6M", "7.0B"]
    assert [hours(value) for value in (0.001, 0.5, 3.14, 100, None)] == ["4 s", "30 min", "3.1 h", "4.2 days", "?"]
