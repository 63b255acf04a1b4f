"""The network: no future, no padding, no other row; one table for both ends; a cache that changes nothing."""

import copy
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU_ATTENTION, CPU_BACKENDS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moelet import attention, modelling
from moelet.attention import ATTENTION
from moelet.errors import UserError
from moelet.kv_cache import KVCache
from moelet.loss import linear_cross_entropy
from moelet.modelling import GPT, shapes_of
from moelet.sections import ModelSettings

VOCAB, CONTEXT = 29, 12
SMALL = {"max_length": CONTEXT, "d_model": 96, "d_embed": 8, "n_layers": 2, "n_heads": 3, "d_ff": 160, "n_experts": 5}
COMBINATIONS = list(product(CPU_ATTENTION, CPU_BACKENDS))


def lively(seed: int = 0, **changes: object) -> GPT:
    """Return a small model in eval mode whose branches and logits are all of size 1, so that a leak is a big one."""
    torch.manual_seed(seed)
    model = GPT(ModelSettings(**{**SMALL, "dropout": 0.0, **changes}), VOCAB).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
        model.embed.tokens.weight.normal_()
        if model.embed.proj is not None:
            model.embed.proj.weight.normal_(0.0, model.settings.d_model**-0.5)
    return model


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(4, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: GPT, ids: Tensor, segments: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
    return model.logits(model(ids, segments, cache).hidden)


# --- birth ---


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", [{}, SMALL], ids=["reference", "small"])
def test_the_first_loss_is_that_of_guessing(shape: dict[str, int], seed: int) -> None:
    torch.manual_seed(seed)
    model = GPT(ModelSettings(**shape), 512).eval()
    ids = torch.randint(512, (8, min(64, model.settings.max_length)))
    with torch.no_grad():
        features = model.features(model(ids).hidden).flatten(0, 1)
        loss = linear_cross_entropy(features, model.table, ids.roll(1).flatten()) / ids.numel()
    assert abs(loss.item() - math.log(512)) < 0.02 * math.log(512)


def test_every_parameter_and_its_shape() -> None:
    settings = ModelSettings(**{**SMALL, "n_layers": 1, "activation": "swiglu"})
    shapes = {name: tuple(value.shape) for name, value in GPT(settings, VOCAB).state_dict().items()}
    layer = {
        "input_layernorm.weight": (96,),
        "self_attn.q_proj.weight": (96, 96),
        "self_attn.k_proj.weight": (96, 96),
        "self_attn.v_proj.weight": (96, 96),
        "self_attn.o_proj.weight": (96, 96),
        "post_attention_layernorm.weight": (96,),
        "mlp.gate.weight": (5, 96),
        "mlp.experts.up_proj": (5, 32, 96),
        "mlp.experts.gate_proj": (5, 32, 96),
        "mlp.experts.down_proj": (5, 96, 32),
    }
    assert shapes == {
        "embed.tokens.weight": (VOCAB, 8),
        "embed.positions.weight": (CONTEXT, 96),
        "embed.proj.weight": (96, 8),
        **{f"layers.0.{name}": shape for name, shape in layer.items()},
        "norm.weight": (96,),
    }


def test_one_expert_is_a_dense_layer_without_a_router() -> None:
    model = lively(n_experts=1, top_k=1)
    names = set(model.state_dict())
    assert {"layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight"} <= names
    assert not any("gate" in name or "experts" in name for name in names)
    assert model.layers[0].mlp.up_proj.weight.shape == (160, 96)
    assert model(random_ids(2, 5)).router == []


def test_without_projection_the_table_has_the_models_width() -> None:
    model = lively(d_embed=None)
    assert "embed.proj.weight" not in model.state_dict() and model.table.shape == (VOCAB, 96)
    assert logits(model, random_ids(2, 5)).shape == (2, 5, VOCAB)


def test_embed_scale_is_for_the_input_alone() -> None:
    plain, scaled = lively(embed_scale=1.0), lively(embed_scale=3.0)
    ids, hidden = random_ids(2, 5), torch.randn(2, 5, 96)
    positions = torch.arange(5).expand(2, 5)
    difference = scaled.embed(ids, positions) - plain.embed(ids, positions)
    torch.testing.assert_close(difference, 2 * plain.embed.proj(plain.embed.tokens(ids)))
    assert torch.equal(scaled.logits(hidden), plain.logits(hidden))


def test_vocabulary_may_be_larger_than_the_tokenizers_but_not_smaller() -> None:
    assert GPT(ModelSettings(**SMALL, vocab_size=40), 29).table.shape[0] == 40
    with pytest.raises(UserError, match="model.vocab_size is 20 and the tokenizer has 29"):
        GPT(ModelSettings(**SMALL, vocab_size=20), 29)


# --- tying ---


def is_tied(model: GPT) -> bool:
    """Whether one tensor serves both ends: the same memory, and writing to it moves the input and the output."""
    model = model.eval()
    ids, hidden = random_ids(1, 4), torch.ones(1, 1, model.settings.d_model, dtype=model.table.dtype)
    positions = torch.arange(4)[None]
    before = model.embed(ids, positions), model.logits(hidden)
    with torch.no_grad():
        model.table.add_(0.1)
        after = model.embed(ids, positions), model.logits(hidden)
        model.table.sub_(0.1)
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    return moved == [True, True] and model.table.data_ptr() == model.embed.tokens.weight.data_ptr()


def test_tied_at_birth_after_moving_and_after_loading(tmp_path: Path) -> None:
    model = lively()
    assert is_tied(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = lively(seed=1)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert is_tied(other)
    assert torch.equal(logits(other, random_ids(2, 9)), logits(model, random_ids(2, 9)))
    assert is_tied(copy.deepcopy(model)) and is_tied(model.to(torch.float64))
    assert sum(name.startswith(("embed.tokens", "lm_head")) for name in model.state_dict()) == 1


def test_a_step_on_the_table_moves_both_ends() -> None:
    model = lively()
    ids = random_ids(2, 8)
    ends = (lambda: model.embed(ids, torch.arange(8)[None]), lambda: model.logits(torch.ones(1, 1, 96)))
    before = [end().detach() for end in ends]
    F.cross_entropy(model.logits(model(ids).hidden).flatten(0, 1), ids.flatten()).backward()
    unused = sorted(set(range(VOCAB)) - set(ids.flatten().tolist()))
    assert model.table.grad is not None and model.table.grad[unused].any()  # from the output; no input has these
    torch.optim.SGD([model.table], lr=0.1).step()
    assert [torch.equal(end(), value) for end, value in zip(ends, before, strict=True)] == [False, False]


def test_the_projection_is_shared_by_both_ends() -> None:
    model = lively()
    hidden = torch.randn(2, 3, 96)
    want = hidden.double() @ model.embed.proj.weight.double() @ model.embed.tokens.weight.double().T
    torch.testing.assert_close(model.logits(hidden).double(), want, rtol=1e-5, atol=1e-5)


def test_untied_has_two_tables() -> None:
    model = lively(tie_embeddings=False)
    assert model.table is model.lm_head.weight and not is_tied(model)
    assert {"lm_head.weight", "embed.tokens.weight"} <= set(model.state_dict())


# --- causality ---


def future_leak(model: GPT, trials: int = 12) -> float:
    """Return how far any logit before a changed token moves."""
    ids, worst = random_ids(2, CONTEXT), 0.0
    before = logits(model, ids)
    for trial in range(trials):
        place = trial % (CONTEXT - 1) + 1
        changed = ids.clone()
        changed[:, place] = (changed[:, place] + 1 + trial % (VOCAB - 1)) % VOCAB
        after = logits(model, changed)
        assert not torch.equal(after[:, place], before[:, place])
        worst = max(worst, (after[:, :place] - before[:, :place]).abs().max().item())
    return worst


@pytest.mark.parametrize("training", [False, True])
def test_a_changed_token_leaves_earlier_logits_bitwise(training: bool) -> None:
    model = lively(attention="explicit", experts="reference").train(training)
    assert future_leak(model, trials=100) == 0.0


@pytest.mark.parametrize(("attention_name", "experts_name"), COMBINATIONS)
def test_a_changed_token_leaves_earlier_logits(attention_name: str, experts_name: str) -> None:
    assert future_leak(lively(attention=attention_name, experts=experts_name)) < 1e-5


@pytest.mark.parametrize(("attention_name", "experts_name"), COMBINATIONS)
def test_no_gradient_from_the_past_to_the_future(attention_name: str, experts_name: str) -> None:
    assert_no_gradient_to_the_future(lively(attention=attention_name, experts=experts_name))


def assert_no_gradient_to_the_future(model: GPT) -> None:
    embedded: list[Tensor] = []
    model.embed.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    ids = random_ids(2, CONTEXT)
    all_logits = model.logits(model(ids).hidden)
    for length in range(1, CONTEXT + 1):
        past = (all_logits[:, :length] * torch.randn(VOCAB)).sum()
        (gradient,) = torch.autograd.grad(past, embedded[0], retain_graph=True)
        assert not gradient[:, length:].any()
        assert gradient[:, :length].abs().sum(-1).all()
    assert all_logits.abs().mean() > 0.3  # it is alive


@pytest.mark.parametrize(("attention_name", "experts_name"), COMBINATIONS)
def test_rows_of_a_batch_are_apart(attention_name: str, experts_name: str) -> None:
    model = lively(attention=attention_name, experts=experts_name)
    ids = random_ids(3, CONTEXT)
    changed = ids.clone()
    changed[1] = random_ids(1, CONTEXT, seed=7)[0]
    before, after = logits(model, ids), logits(model, changed)
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=0, atol=1e-5)
    assert (after[1] - before[1]).abs().max() > 0.1


def heads_without_transpose(self: modelling.Attention, x: Tensor, norm: nn.Module | None, place: object) -> Tensor:
    return x.view(x.shape[0], -1, x.shape[1], self.head_width)


Mask = Callable[[int, int, Tensor | None, torch.device], Tensor]
MASK_MUTANTS: dict[str, Mask] = {
    "inverted": lambda s, n, segments, device: torch.ones(s, n).triu(n - s).bool(),
    "one too far": lambda s, n, segments, device: torch.ones(s, n).tril(n - s + 1).bool(),
    "none": lambda s, n, segments, device: torch.ones(s, n).bool(),
    "of rows": lambda s, n, segments, device: (torch.arange(s) >= 1)[:, None] | (torch.arange(n) < 1)[None],
}


@pytest.mark.parametrize("mutant", MASK_MUTANTS)
def test_a_wrong_mask_is_seen(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "causal_mask", MASK_MUTANTS[mutant])
    assert future_leak(lively(attention="explicit")) > 1e-2


def test_a_mask_that_adds_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap of +1 on allowed scores instead of minus infinity on the others."""

    def adding(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, dropout: float) -> Tensor:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        return (scores + torch.ones(q.shape[2], k.shape[2]).tril()).softmax(-1) @ v

    monkeypatch.setitem(ATTENTION, "explicit", adding)
    assert future_leak(lively(attention="explicit")) > 1e-2


def test_heads_that_slice_time_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap of making heads by `view` without a transpose."""
    monkeypatch.setattr(modelling.Attention, "_heads", heads_without_transpose)
    assert future_leak(lively()) > 1e-2


# --- padding ---


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("attention_name", "experts_name"), COMBINATIONS)
def test_padding_changes_nothing(attention_name: str, experts_name: str, side: str) -> None:
    assert_padding_changes_nothing(lively(attention=attention_name, experts=experts_name), side)


def assert_padding_changes_nothing(model: GPT, side: str) -> None:
    for length in (1, 5, CONTEXT - 1):
        ids = random_ids(1, length, seed=length)
        pad = torch.full((1, CONTEXT - length), 3)
        padded = torch.cat([ids, pad] if side == "right" else [pad, ids], 1)
        real = torch.cat([ids >= 0, pad < 0] if side == "right" else [pad < 0, ids >= 0], 1)
        with torch.no_grad():
            alone, among = model(ids), model(padded, real)
        torch.testing.assert_close(model.logits(among.hidden)[real], model.logits(alone.hidden)[0], rtol=0, atol=1e-5)
        assert len(alone.router) == len(among.router) == 2
        for mine, theirs in zip(among.router, alone.router, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
            assert torch.equal(mine.assignments, theirs.assignments)
            assert mine.tokens.item() == theirs.tokens.item() == length
            assert mine.assignments.sum().item() == length * model.settings.top_k


# --- the cache ---


@pytest.mark.parametrize(("attention_name", "experts_name"), COMBINATIONS)
def test_cache_equals_the_full_pass(attention_name: str, experts_name: str) -> None:
    assert_cache_equals_the_full_pass(lively(attention=attention_name, experts=experts_name))


def assert_cache_equals_the_full_pass(model: GPT) -> None:
    ids = random_ids(2, CONTEXT)
    want = logits(model, ids)
    for prompt in range(1, CONTEXT + 1):
        cache = KVCache(model.settings)
        parts = [ids[:, :prompt], *ids[:, prompt:].split(1, 1)]
        got = torch.cat([logits(model, part, None, cache) for part in parts], 1)
        torch.testing.assert_close(got, want, rtol=5e-7, atol=1e-5)  # four roundings of float32, where logits are large
        assert torch.equal(got.argmax(-1), want.argmax(-1))
        assert cache.length == CONTEXT


@pytest.mark.parametrize("sizes", [[5, 7], [1, 4, 4, 3], [3, 1, 8], [11, 1]])
@pytest.mark.parametrize("backend", CPU_ATTENTION)
def test_cache_takes_prompts_in_chunks(backend: str, sizes: list[int]) -> None:
    model = lively(attention=backend)
    ids, cache = random_ids(2, CONTEXT), KVCache(model.settings)
    got = torch.cat([logits(model, part, None, cache) for part in ids.split(sizes, 1)], 1)
    torch.testing.assert_close(got, logits(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [[8, 1, 1], [4, 4, 1, 1], [1, 7, 2]])
@pytest.mark.parametrize("backend", CPU_ATTENTION)
def test_cache_with_left_padding_equals_one_by_one(backend: str, sizes: list[int]) -> None:
    assert_left_padding_equals_one_by_one(lively(attention=backend), sizes)


def assert_left_padding_equals_one_by_one(model: GPT, sizes: list[int]) -> None:
    lengths, total = (10, 7, 3), 10
    rows = [random_ids(1, length, seed=length) for length in lengths]
    ids = torch.cat([F.pad(row, (total - row.shape[1], 0), value=3) for row in rows])
    real = torch.arange(total) >= total - torch.tensor(lengths)[:, None]
    cache, got = KVCache(model.settings), []
    for part, mask in zip(ids.split(sizes, 1), real.split(sizes, 1), strict=True):
        got.append(logits(model, part, None if bool(mask.all()) and cache.length == 0 else mask, cache))
    together = torch.cat(got, 1)
    for row, length in enumerate(lengths):
        alone = logits(model, rows[row])[0]
        torch.testing.assert_close(together[row, -length:], alone, rtol=0, atol=1e-5)
        assert torch.equal(together[row, -length:].argmax(-1), alone.argmax(-1))


def test_cache_takes_new_tokens_without_a_mask_after_padding() -> None:
    model = lively()
    ids = random_ids(1, 9)
    cache = KVCache(model.settings)
    padded = F.pad(ids[:, :5], (2, 0), value=3)
    logits(model, padded, torch.arange(7)[None] >= 2, cache)
    got = torch.cat([logits(model, part, None, cache) for part in ids[:, 5:].split(1, 1)], 1)
    torch.testing.assert_close(got, logits(model, ids)[:, 5:], rtol=0, atol=1e-5)


def test_beyond_the_context_is_refused() -> None:
    model, cache = lively(), KVCache(ModelSettings(**SMALL))
    with pytest.raises(ValueError, match="13 tokens don't fit the context of 12"):
        model(random_ids(1, CONTEXT + 1))
    model(random_ids(1, CONTEXT), None, cache)
    with pytest.raises(ValueError, match="13 tokens don't fit"):
        model(random_ids(1, 1), None, cache)


# --- precision and cost ---


def test_autocast_keeps_router_residual_and_logits_wide() -> None:
    model = lively()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(random_ids(2, 8))
        assert output.hidden.dtype == torch.bfloat16 and model.logits(output.hidden).dtype == torch.float32
        embedded, place = torch.randn(2, 8, 96), model._place(random_ids(2, 8), None, None)
        residual, branch, values, _ = model.layers[0](None, embedded, embedded, None, place)
        assert residual.dtype == torch.float32 and branch.dtype == values.dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for stats in output.router for value in stats)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"activation": "swiglu", "top_k": 3},
        {"n_experts": 1, "top_k": 1},
        {"shared_expert": 48},
        {"shared_expert": 24, "activation": "swiglu", "positions": "rope", "qk_norm": True},
    ],
    ids=str,
)
def test_flops_equal_the_counted_ones(shape: dict[str, object]) -> None:
    """Exact: the explicit attention computes the whole square, of which the formula counts the causal half."""
    model = lively(**{**shape, "attention": "explicit", "experts": "grouped"}).double()  # in torch's own operations
    ids = random_ids(3, CONTEXT)
    with FlopCounterMode(display=False) as counter:
        features = model.features(model(ids).hidden).flatten(0, 1)
        linear_cross_entropy(features, model.table, ids.flatten()).backward()
    settings = model.settings
    upper_half = 3 * 2 * settings.n_layers * CONTEXT * settings.d_model
    assert counter.get_total_flops() == ids.numel() * (model.flops_per_token(CONTEXT) + upper_half)


EVERYTHING = {
    "positions": "rope", "qk_norm": True, "activation": "swiglu", "shared_expert": 64, "value_residual": True,
    "smear": True, "embed_residual": True, "bigram_rows": 100, "tie_embeddings": False, "selection_bias": True,
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, EVERYTHING, {"n_experts": 1, "top_k": 1}], ids=["reference", "all", "dense"])
@pytest.mark.parametrize("n_layers", [1, 2, 5])
def test_shapes_are_known_without_the_network(options: dict[str, Any], n_layers: int) -> None:
    settings = ModelSettings(n_layers=n_layers, d_model=64, **options)
    made = {name: tuple(tensor.shape) for name, tensor in GPT(settings, 400).state_dict().items()}
    assert shapes_of(settings, 400) == made


def test_shapes_of_a_network_that_no_machine_holds() -> None:
    settings = ModelSettings(n_layers=1000, d_model=2**20, d_ff=2**22, vocab_size=2**26)
    assert len(shapes_of(settings, 400)) > 5000
