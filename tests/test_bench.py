"""The benchmark: is the comparison fair, is its arithmetic right, does it tell what failed. On tiny shapes."""

import json
import math
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from moelet import metrics
from moelet.cli import main
from moelet.console import Progress
from moelet.errors import UserError
from moelet.hparams import make_hparams
from moelet.loss import BALANCE, linear_cross_entropy
from moelet.modelling import GPT
from moelet.sections import ModelSettings
from moelet.speed import bench, breakdown, contest, peers, roofline
from moelet.speed import page as bench_page
from moelet.speed.naive import NaiveGPT, SdpaAttention, copy_weights
from moelet.speed.peers import Workload
from moelet.state import build
from moelet.step import train_step
from moelet.study import arms

VOCABULARY = 300
CPU = torch.device("cpu")


def workload(**model: Any) -> Workload:
    settings = {"model": TINY["model"] | model, "train": TINY["train"], "optim": TINY["optim"]}
    return Workload(make_hparams(settings), VOCABULARY)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure next to nothing, and start processes from one that has imported everything once."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["moelet.speed.bench"])
    monkeypatch.setattr(contest, "CONTEXT", server)
    for module, name in ((metrics, "RATE_SECONDS"), (roofline, "PRODUCT_SECONDS"), (breakdown, "DATA_SECONDS")):
        monkeypatch.setattr(module, name, 0.0)
    for name, value in (("DATA_VOCABULARY", 400), ("DATA_SAMPLE", 60_000), ("DATA_WINDOW", 8)):
        monkeypatch.setattr(breakdown, name, value)
    for module, name in ((metrics, "RATE_SIZE"), (roofline, "MEMORY_BYTES")):
        monkeypatch.setitem(getattr(module, name), "cpu", 64)


# the plain network is ours


def our_loss(model: GPT, ids: Tensor, labels: Tensor) -> Tensor:
    output = model(ids)
    loss = linear_cross_entropy(model.features(output.hidden).flatten(0, 1), model.table, labels.flatten())
    loss = loss / labels.numel()
    if not output.router:
        return loss
    probability = torch.stack([stats.probability / stats.tokens for stats in output.router])
    load = torch.stack([stats.assignments / stats.assignments.sum() for stats in output.router])
    return loss + 0.01 * BALANCE["switch"](probability, load)


@pytest.mark.parametrize("attention", [None, SdpaAttention])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_experts": 1, "top_k": 1},
        {"activation": "swiglu", "normalize_top_k": True, "embed_scale": 3.0},
        {"d_embed": None, "tie_embeddings": False},
        {"positions": "rope", "qk_norm": True, "embed_norm": True, "shared_expert": 16, "activation": "swiglu"},
    ],
)
def test_the_naive_network_computes_what_ours_does(changes: dict[str, Any], attention: Any) -> None:
    hparams = workload(dropout=0.0, **changes).hparams
    torch.manual_seed(0)
    ours = GPT(hparams.model, VOCABULARY).double()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # norms too: at 1 one could be missing
    naive = NaiveGPT(hparams.model, hparams.balance, VOCABULARY, **({"attention": attention} if attention else {}))
    copy_weights(ours, naive.double())
    ids, labels = torch.randint(VOCABULARY, (2, 3, 32)).unbind()
    our, their = our_loss(ours, ids, labels), naive(ids, labels)
    torch.testing.assert_close(their, our, rtol=1e-6, atol=0)  # the router's softmax is float32 in the naive one
    our.backward()
    their.backward()
    table, their_table = ours.embed.tokens.weight.grad, naive.tokens.weight.grad
    assert table is not None and their_table is not None
    torch.testing.assert_close(their_table, table, rtol=1e-4, atol=1e-7)


def test_both_drop_as_often() -> None:
    """The same rate in the same places: the variance that dropout puts on the loss is alike."""
    hparams = workload(dropout=0.4).hparams
    torch.manual_seed(0)
    ours = GPT(hparams.model, VOCABULARY)
    naive = NaiveGPT(hparams.model, hparams.balance, VOCABULARY)
    copy_weights(ours, naive)
    rates = [module.p for module in naive.modules() if isinstance(module, nn.Dropout)]
    assert rates == [0.4] * (hparams.model.n_layers + 1)  # each layer's serves both branches; one for the embeddings
    assert all(layer.self_attn.dropout == 0.4 for layer in naive.layers)
    ids, labels = torch.randint(VOCABULARY, (2, 8, 32)).unbind()
    with torch.no_grad():
        spread = [torch.stack([loss() for _ in range(60)]).std() for loss in
                  (lambda: our_loss(ours, ids, labels), lambda: naive(ids, labels))]  # fmt: skip
    assert 0.6 < spread[0] / spread[1] < 1.6


# what is counted


def test_flops_by_hand() -> None:
    settings = ModelSettings.model_validate(TINY["model"])  # 2 layers x 32, 4 experts of 16 top-2, R 16, 32 tokens
    attention, head = 4 * 32 * 32 + 32 * 32, 2 * 32 * 16 + 16 * VOCABULARY
    routed = 2 * 2 * 32 * 16 + 32 * 4
    assert peers.flops(settings, VOCABULARY) == 6 * (2 * (attention + routed) + head)
    active = peers.twin(settings, arms.active_width)
    assert (active.n_experts, active.d_ff) == (1, 32)
    assert peers.flops(active, VOCABULARY) == 6 * (2 * (attention + 2 * 32 * 32) + head)
    assert peers.flops(peers.twin(settings, arms.full_width), VOCABULARY) == 6 * (2 * (attention + 2 * 32 * 64) + head)
    hf = 6 * (2 * (attention + 3 * 2 * 32 * 16 + 32 * 4) + 32 * VOCABULARY)
    assert peers.flops(peers.full_width_gated(settings), VOCABULARY) == hf


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_experts": 1, "top_k": 1}, {"activation": "swiglu"}, {"d_embed": None}, {"max_length": 27},
     {"shared_expert": 48, "activation": "swiglu"}],
)  # fmt: skip
def test_the_products_are_all_of_the_flops(changes: dict[str, Any]) -> None:
    given = workload(**changes)
    settings = given.hparams.model
    products = roofline.step_products(settings, VOCABULARY, 4)
    one_of_a_name = {product.name: product for product in products}.values()
    total = 3 * sum(product.flops for product in one_of_a_name)
    assert total == pytest.approx(peers.flops(settings, VOCABULARY) * 4 * settings.max_length)


def test_the_bound_takes_the_fastest_chunk_and_all_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "HEAD_ROWS", (32, 64))
    slow = {"forward": 1.0, "dx": 2.0, "dw": 3.0}

    def fake(product: roofline.Product, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
        quick = product.name == "head" and product.m == 64
        return {way: seconds / 10 if quick else seconds for way, seconds in slow.items()}

    monkeypatch.setattr(roofline, "product_seconds", fake)
    given = workload(n_experts=1, top_k=1, d_embed=None)
    found = roofline.step_bound(given.hparams.model, VOCABULARY, 4, torch.float32, CPU)
    # 2 each of qkv, o, up and down; 8 each of scores and values; 128 / 64 of the head
    assert found["tokens_per_second"] == pytest.approx(128 / (6 * (2 * 4 + 8 * 2) + 0.6 * 2))


def test_active_weights_by_hand() -> None:
    settings = ModelSettings.model_validate(TINY["model"])
    used = 2 * (4 * 32 * 32 + 2 * 2 * 32 * 16 + 32 * 4) + 32 * 16 + 16 * VOCABULARY
    assert roofline.active_weights(settings, VOCABULARY) == used


def test_mfu_is_of_the_rate_in_its_own_precision() -> None:
    row = {"precision": "bf16-weights", "flops_per_token": 3_000_000, "tokens_per_second": 100.0}
    assert bench.mfu(row, {"fp32": 1.0, "bf16": 3.0}) == pytest.approx(0.1)


def test_a_limit_once_reached_stands() -> None:
    def measured(fp32: float, read: float, step: float) -> dict[str, Any]:
        return {
            "matrix_gflops": {"fp32": fp32},
            "memory_gb_per_second": {"read": read},
            "step": {"tokens_per_second": step},
        }

    assert roofline.higher(measured(1, 5, 3), measured(2, 4, 9)) == measured(2, 5, 9)


def test_speedup_is_of_neighbours() -> None:
    """In the second round the machine is four times as slow, in the third only the other side is held up."""
    assert contest.speedup([1, 4, 1], [2, 8, 12]) == 2
    assert contest.speedup([1, 1, 1], [1, 1, 1], our_tokens=3, their_tokens=2) == 1.5


def test_tokens_are_the_same_on_all_sides_and_like_text() -> None:
    given = workload()
    one, other = peers.zipf_batches(given), peers.zipf_batches(given)
    first = next(one)
    assert torch.equal(first.input_ids, next(other).input_ids)
    assert torch.equal(first.input_ids[:, 1:], first.labels[:, :-1])
    ids = torch.cat([next(one).input_ids.flatten() for _ in range(peers.BATCHES)])
    assert ids.min() >= 4 and ids.max() < VOCABULARY
    assert (ids < 40).sum() > (ids >= 150).sum() > 0


# sides


@pytest.mark.parametrize("variant", [*peers.OWN, *peers.PLAIN])
def test_every_side_learns(variant: str) -> None:
    """Each work() is one optimizer step that moves every weight."""
    optimizers: list[torch.optim.Optimizer] = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: optimizers.append(optimizer))
    side = peers.trainer(variant)(workload(dropout=0.0), "fp32")
    try:
        assert side.work() == 4 * 32
        (optimizer,) = optimizers
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        before = [weight.clone() for weight in weights]
        side.work()
        assert len(optimizers) == 2
    finally:
        handle.remove()
    assert not any(torch.equal(old, new) for old, new in zip(before, weights, strict=True))


def test_variants_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'naive-bf61'.*Did you mean 'naive-bf16'"):
        peers.choose("moelet,naive-bf61")
    assert peers.choose("moelet, dense-total") == (["dense-total"], [])
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    names, left_out = peers.choose("all")
    assert "naive-fp32" in names and not any(name.startswith("hf-") for name in names)
    assert "transformers isn't installed" in left_out[0]
    with pytest.raises(UserError, match="transformers isn't installed"):
        peers.choose("hf-mixtral-eager")


def test_twins_of_a_modern_model_leave_out_what_routes() -> None:
    settings = peers.changed(workload(shared_expert=24).hparams.model, selection_bias=True)
    active, total = (peers.twin(settings, width) for width in (arms.active_width, arms.full_width))
    assert (active.d_ff, total.d_ff) == (2 * 16 + 24, 4 * 16 + 24)
    assert (active.n_experts, active.shared_expert, active.selection_bias) == (1, 0, False)
    given = workload(smear=True)
    with pytest.raises(UserError, match=r"model.smear is set, and the plain network doesn't know it"):
        peers.naive(given, "fp32")
    assert peers.nanogpt(given, "fp32").work() == given.tokens_per_step


def test_hf_models_have_our_shape() -> None:
    pytest.importorskip("transformers")
    given = workload(vocab_size=VOCABULARY)
    for family in peers.HF_FAMILIES:
        side = peers.hf(given, "fp32", family, "eager")
        assert side.work() == 4 * 32
        model = peers.hf_model(given, family, "eager")
        expert = 2 * 4 * 3 * 32 * 16
        norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
        assert sum(p.numel() for p in model.parameters()) == 32 * VOCABULARY + 2 * (4 * 32**2 + 32 * 4) + expert + norms
        assert model.config.attention_dropout == 0.1 and model.config.tie_word_embeddings


def test_a_side_that_fails_is_told() -> None:
    """Each in a process of its own: ours goes on, and every reason is in the result."""
    given, asked = workload(), {"dense-active": (["fp16-wrong"], ["kept"]), "hf-mixtal-eager": (["fp32"], ["kept"])}
    found = contest.run_contest(contest.Contest("train", "fp32", asked, 1), given, Progress())
    assert [row["variant"] for row in found["rows"]] == ["moelet"]
    assert "fp16-wrong" in found["failed"]["dense-active"]
    assert found["failed"]["hf-mixtal-eager"].startswith(("AssertionError", "ModuleNotFoundError"))
    row = found["rows"][0]
    assert row["tokens_per_second"] == pytest.approx(128 / row["seconds"][0])


def test_a_dead_process_is_told() -> None:
    with contest.Worker(contest.Job("train", "moelet", "fp32", "kept", workload())) as worker:
        worker.process.kill()
        with pytest.raises(contest.SideFailed, match="ended with code -9"):
            worker.work()


def test_work_done_alone() -> None:
    assert contest.alone(math.sqrt, 4.0) == 2.0
    with pytest.raises(contest.SideFailed, match="killed"):
        contest.alone(os._exit, 1)


def test_the_fastest_precision() -> None:
    assert contest.fastest({"fp32": 2.0, "bf16": 1.0, "fp16": "no such thing"}) == "bf16"
    with pytest.raises(contest.SideFailed, match="no memory"):
        contest.fastest({"fp32": "no memory", "bf16": "no memory"})


# the parts of a step


class _Opaque(torch.autograd.Function):
    """As a kernel called through ctypes: no operations that the profiler could see inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        _busy(0.03)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _busy(0.05)
        return grad


def _busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def parts_of(given: Workload) -> dict[str, Any]:
    return breakdown.breakdown(build(given.hparams, peers.AnyIds(VOCABULARY)), peers.zipf_batches(given))


def test_the_parts_sum_to_the_step() -> None:
    found = parts_of(workload())
    parts = found["parts_ms"]
    assert tuple(parts) == breakdown.PARTS
    assert sum(parts.values()) == pytest.approx(found["profiled_ms"])
    assert all(taken > 0 for taken in parts.values())
    assert parts["other"] < 0.6 * found["profiled_ms"]


def slowed(output: Any) -> Any:
    """Return a module's output, that of attention with its values, by way of `_Opaque`."""
    return (_Opaque.apply(output[0]), *output[1:]) if isinstance(output, tuple) else _Opaque.apply(output)


@pytest.mark.parametrize(("module", "part"), [("self_attn", "attention"), ("mlp.experts", "experts")])
def test_time_without_operations_goes_where_it_belongs(module: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward 30 ms and backward 50 ms more, in each of 2 layers, must all be found in that part alone."""
    monkeypatch.setattr(breakdown, "data_seconds", lambda hparams: 0.0)
    monkeypatch.setattr(breakdown, "STEPS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # threads of a busy machine wait long for one another
    before = parts_of(workload())["parts_ms"]
    for owner in (breakdown.Attention, breakdown.Experts):
        if module.endswith({"Attention": "self_attn", "Experts": "experts"}[owner.__name__]):
            forward = owner.forward
            monkeypatch.setattr(owner, "forward", lambda self, *a, _f=forward: slowed(_f(self, *a)))
    after = parts_of(workload())["parts_ms"]
    assert after[part] - before[part] == pytest.approx(160, abs=60)
    for other in set(breakdown.PARTS) - {part, "other", "data"}:
        assert abs(after[other] - before[other]) < 80


def test_operations_are_sorted_by_name() -> None:
    assert breakdown.own_part("aten::index_select", "experts") == "router + dispatch"
    assert breakdown.own_part("_CombineBackward", "experts") == "router + dispatch"
    assert breakdown.own_part("aten::mm", "experts") == "experts"
    assert breakdown.own_part("aten::index_select", "attention") == "attention"
    assert breakdown.own_part("moelet: experts", "router + dispatch") == "experts"


def test_hooks_are_gone_afterwards() -> None:
    given = workload()
    training = build(given.hparams, peers.AnyIds(VOCABULARY))
    with breakdown.marked(training.model):
        train_step(training, [next(peers.zipf_batches(given))])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in training.model.modules())


# the command


def test_the_command_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "alone", lambda function, *arguments: function(*arguments))  # _quick holds here alone
    settings = tmp_path / "tiny.json"
    settings.write_text(
        json.dumps({"model": TINY["model"], "tokenizer": {"vocab_size": VOCABULARY}, "train": TINY["train"]})
    )
    out, found = tmp_path / "out", tmp_path / "found.json"
    command = ["bench", str(settings), "--variants", "naive-fp32", "--rounds", "1", "--batch-size", "2"]
    assert main([*command, "--peers-allocator", "same", "--out", str(out), "--json", str(found)]) == 0
    result = json.loads(found.read_text())
    assert [row["variant"] for row in result["rows"]] == ["moelet", "naive-fp32"]
    assert (result["shape"]["batch_size"], result["shape"]["vocab_size"]) == (2, VOCABULARY)
    assert {"machine", "peaks", "rows"} <= set(result)
    ours, naive = result["rows"]
    assert naive["speedup"] == pytest.approx(naive["seconds"][0] / ours["seconds"][0])
    assert math.isfinite(result["decode"]["rows"][0]["tokens_per_second"])
    page = (out / "cpu.md").read_text()
    assert page in capsys.readouterr().out and "| naive-fp32 | kept | fp32 |" in page
    assert (out / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_failures_are_on_the_page() -> None:
    result = {"rows": [], "failed": {"hf-x": "no memory"}, "left_out": ["hf-*: not there"], "remarks": [],
              "precisions": {}}  # fmt: skip
    text = "\n".join(bench_page.training_table(result))
    assert "hf-x doesn't run at this shape: no memory" in text and "left out: hf-*: not there" in text


def test_mistakes_cost_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--variants", "dense-activ"]) == UserError.exit_code
    assert "Did you mean 'dense-active'?" in capsys.readouterr().err
    assert main(["bench", "--peers-allocator", "jemalloc"]) == UserError.exit_code
    assert "both, default, same" in capsys.readouterr().err
    assert main(["bench", "--variants", " ,"]) == UserError.exit_code
    assert "names nobody" in capsys.readouterr().err
    assert main(["bench", "--variants", "dense-active", "--out", __file__]) == UserError.exit_code
    assert "can't be a folder for results" in capsys.readouterr().err
    assert main(["bench", "--variants", "dense-active", "--json", "/proc/found.json"]) == UserError.exit_code
    assert "can't be written" in capsys.readouterr().err


def test_reasons_are_told_whole() -> None:
    with pytest.raises(ValueError) as caught:
        ModelSettings(n_experts=1, top_k=1, shared_expert=8)
    assert "n_experts is 1 and shared_expert is set" in contest._reason(caught.value)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_rate_is_measured_for_every_format_that_a_peer_takes(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "matrix_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(roofline, "memory_rates", lambda device: {})
    monkeypatch.setattr(roofline, "step_bound", lambda *arguments: {})
    given = workload()
    dtype, device = peers.DTYPES[precision], torch.device("cpu")
    found = roofline.limits(given.hparams.model, VOCABULARY, 4, dtype, device)["matrix_gflops"]
    train = given.hparams.train.model_copy(update={"precision": precision})
    given = given._replace(hparams=given.hparams.model_copy(update={"train": train}))
    for variant in (*peers.OWN, *peers.PLAIN, "hf-mixtral-eager"):
        try:
            wanted = peers.precisions(variant, given)
        except UserError:  # a format that this machine has not
            continue
        assert {name.removesuffix(peers.WEIGHTS) for name in wanted} <= set(found)


def test_decoding_is_told_with_its_format() -> None:
    assert bench._decoding_format(workload(shared_expert=16).hparams.model, torch.device("cpu")) == "fp32"
    assert bench._decoding_format(workload().hparams.model, torch.device("cuda")) == "fp32"


def test_the_default_is_the_reference_shape() -> None:
    given = bench.workload_of(None, None)
    model = given.hparams.model
    assert (model.n_layers, model.d_model, model.n_heads, model.n_experts, model.expert_width) == (4, 512, 8, 8, 256)
    assert (model.top_k, model.d_embed, model.max_length, model.dropout, given.vocab_size) == (2, 128, 512, 0.1, 32000)
    assert given.tokens_per_step == 4096 and given.hparams.optim.grad_clip == 1.0
