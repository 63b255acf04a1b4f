"""Each modern setting keeps what the network promises: no future, no padding, no other document, one cache."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from test_mask_documents import LENGTH, packed_batch, spans
from test_modelling import (
    CONTEXT,
    SMALL,
    VOCAB,
    assert_cache_equals_the_full_pass,
    assert_left_padding_equals_one_by_one,
    assert_no_gradient_to_the_future,
    assert_padding_changes_nothing,
    future_leak,
    lively,
    logits,
    random_ids,
)
from torch import Tensor

from moelet.kernels import native
from moelet.loss import linear_cross_entropy
from moelet.modelling import GPT, HASH, NORM_EPS, SHARES
from moelet.moe import MoE, Router
from moelet.sections import ModelSettings

EVERYTHING = {
    "positions": "rope",
    "qk_norm": True,
    "embed_norm": True,
    "shared_expert": 32,
    "selection_bias": True,
    "zero_init": True,
    "embed_residual": True,
    "value_residual": True,
    "smear": True,
    "bigram_rows": 40,
}
SETTINGS: dict[str, dict[str, object]] = {name: {name: value} for name, value in EVERYTHING.items()}
SETTINGS |= {"everything": EVERYTHING, "odd heads": {**EVERYTHING, "n_heads": 16, "activation": "swiglu"}}

each = pytest.mark.parametrize("name", SETTINGS)


def shares(model: GPT) -> Iterator[torch.nn.Parameter]:
    return (parameter for name, parameter in model.named_parameters() if name.endswith(tuple(SHARES)))


@torch.no_grad()
def modern(name: str, **changes: object) -> GPT:
    """Return a small model with that setting, in which it matters: no share is 0, no norm's weight or bias is even."""
    model = lively(**{**SETTINGS[name], **changes})
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    for share in shares(model):
        share.fill_(0.7)
    for module in model.modules():
        if isinstance(module, Router) and module.bias is not None:
            module.bias.normal_()
    return model


# --- birth ---


@each
def test_the_first_loss_is_that_of_guessing(name: str) -> None:
    torch.manual_seed(0)
    model = GPT(ModelSettings(**{**SMALL, **SETTINGS[name]}), 512).eval()
    ids = torch.randint(512, (8, CONTEXT))
    with torch.no_grad():
        features = model.features(model(ids).hidden).flatten(0, 1)
        loss = linear_cross_entropy(features, model.table, ids.roll(1).flatten()) / ids.numel()
    assert abs(loss.item() - math.log(512)) < 0.02 * math.log(512)


def test_every_parameter_and_its_shape() -> None:
    settings = ModelSettings(**{**SMALL, **EVERYTHING, "activation": "swiglu", "shared_expert": 40})
    shapes = {name: tuple(value.shape) for name, value in GPT(settings, VOCAB).state_dict().items()}
    layer = {
        "input_layernorm.weight": (96,),
        **{f"self_attn.{part}_proj.weight": (96, 96) for part in "qkvo"},
        "self_attn.q_norm.weight": (32,),
        "self_attn.k_norm.weight": (32,),
        "post_attention_layernorm.weight": (96,),
        "mlp.gate.weight": (5, 96),
        "mlp.gate.bias": (5,),
        "mlp.experts.up_proj": (5, 32, 96),
        "mlp.experts.gate_proj": (5, 32, 96),
        "mlp.experts.down_proj": (5, 96, 32),
        "mlp.shared_expert.up_proj.weight": (40, 96),
        "mlp.shared_expert.gate_proj.weight": (40, 96),
        "mlp.shared_expert.down_proj.weight": (96, 40),
    }
    assert shapes == {
        "embed.tokens.weight": (VOCAB, 8),
        "embed.proj.weight": (96, 8),
        "bigrams.table.weight": (40, 96),
        "smear.gate.weight": (1, 12),
        "smear.share": (1,),
        **{f"layers.{index}.{name}": shape for index in (0, 1) for name, shape in layer.items()},
        "layers.1.self_attn.value_share": (1,),
        "layers.1.embed_share": (1,),
        "norm.weight": (96,),
    }


def test_with_zero_init_each_layer_begins_as_the_identity() -> None:
    for changes in ({}, {"n_experts": 1, "top_k": 1}, EVERYTHING):
        torch.manual_seed(0)
        model = GPT(ModelSettings(**{**SMALL, **changes, "zero_init": True}), VOCAB).eval()
        embedded: list[Tensor] = []
        model.embed.register_forward_hook(lambda module, inputs, output, seen=embedded: seen.append(output))
        hidden = model(random_ids(2, CONTEXT)).hidden
        torch.testing.assert_close(hidden, F.rms_norm(embedded[0], (96,), eps=NORM_EPS))
        ids = random_ids(2, CONTEXT)
        linear_cross_entropy(model.features(model(ids).hidden).flatten(0, 1), model.table, ids.flatten()).backward()
        down = [p.grad for name, p in model.named_parameters() if "o_proj" in name or "down_proj" in name]
        assert all(grad is not None and grad.any() for grad in down), "and yet it learns"


def test_shares_begin_so_that_nothing_is_added() -> None:
    plain, model = lively(), lively(embed_residual=True, smear=True)
    model.load_state_dict(plain.state_dict(), strict=False)
    ids = random_ids(2, CONTEXT)
    assert [share.item() for share in shares(model)] == [0.0, 0.0]
    torch.testing.assert_close(logits(model, ids), logits(plain, ids))
    for share in shares(model):
        with torch.no_grad():
            share.fill_(0.5)
        assert (logits(model, ids) - logits(plain, ids)).abs().max() > 0.01
        with torch.no_grad():
            share.zero_()


# --- what each computes, by hand ---


def test_an_embedding_is_brought_to_unit_scale() -> None:
    model = lively(embed_norm=True, embed_scale=3.0, positions="rope")
    x = model.embed(random_ids(2, CONTEXT), torch.arange(CONTEXT).expand(2, CONTEXT))
    torch.testing.assert_close(x.square().mean(-1).sqrt(), torch.full((2, CONTEXT), 3.0), rtol=1e-4, atol=0)


def test_a_shared_expert_is_added_for_every_token() -> None:
    (layer, *_), x = lively(shared_expert=48).layers, torch.randn(7, 96)
    assert isinstance(layer.mlp, MoE) and layer.mlp.shared_expert is not None
    routed = layer.mlp.experts(x, *layer.mlp.gate(x, None)[:2])
    shared = F.silu(x @ layer.mlp.shared_expert.up_proj.weight.T) @ layer.mlp.shared_expert.down_proj.weight.T
    torch.testing.assert_close(layer.mlp(x, None)[0], routed + shared, rtol=1e-4, atol=1e-5)


def test_values_are_mixed_with_the_first_layers() -> None:
    """With a share of 0 the network is the plain one, with 1 its second layer attends to the first one's values."""
    plain, model, ids = lively(), lively(value_residual=True), random_ids(2, CONTEXT)
    model.load_state_dict(plain.state_dict(), strict=False)
    (share,) = shares(model)
    assert share.item() == 0.5
    values: list[Tensor] = []
    for layer in model.layers:
        layer.self_attn.register_forward_hook(lambda module, inputs, output: values.append(output[1]))
    own = [layer.self_attn.v_proj for layer in model.layers]
    for module in own:
        module.register_forward_hook(lambda module, inputs, output: values.append(output))
    for weight in (0.0, 0.5, 1.0):
        values.clear()
        with torch.no_grad():
            share.fill_(weight)
        found = logits(model, ids)
        first, first_mixed, second, second_mixed = values
        assert torch.equal(first_mixed, first)
        torch.testing.assert_close(second_mixed, (1 - weight) * second + weight * first)
        assert (found - logits(plain, ids)).abs().max() < 1e-5 if weight == 0 else True


def test_the_embedding_is_added_again_by_its_share() -> None:
    plain, model, ids = lively(n_layers=3), modern("embed_residual", n_layers=3), random_ids(2, CONTEXT)
    model.load_state_dict(plain.state_dict(), strict=False)
    streams: list[Tensor] = []
    for layer in model.layers[1:]:
        layer.register_forward_hook(lambda module, inputs, output: streams.append(inputs[0] + inputs[1]))
    x = model.embed(ids, torch.arange(CONTEXT).expand(2, CONTEXT))
    logits(model, ids)
    place = model._place(ids, None, None)
    residual, branch, *_ = model.layers[1](streams[0] * 0, streams[0], x, None, place)
    want, want_branch, *_ = plain.layers[1](streams[0] * 0, streams[0] + 0.7 * x, x, None, place)
    torch.testing.assert_close(residual, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(branch, want_branch, rtol=1e-4, atol=1e-4)


def test_smearing_adds_the_token_before() -> None:
    model = modern("smear")
    assert model.smear is not None
    x, positions = torch.randn(2, 4, 96), torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]])
    gate = (x[..., :12] @ model.smear.gate.weight[0]).sigmoid()
    want = x.clone()
    for row, place in ((0, 1), (0, 2), (0, 3), (1, 1), (1, 3)):
        want[row, place] += 0.7 * gate[row, place] * x[row, place - 1]
    torch.testing.assert_close(model.smear(x, positions, None), want)


def test_bigrams_add_a_vector_of_the_pair() -> None:
    model = modern("bigram_rows")
    assert model.bigrams is not None
    ids, positions = torch.tensor([[7, 8, 7, 8], [8, 7, 8, 7]]), torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]])
    found, table = model.bigrams(ids, positions, None), model.bigrams.table.weight
    rows = [int(((found[row, place] - table) == 0).all(1).nonzero()) for row, place in ((0, 1), (0, 2), (1, 0), (1, 2))]
    assert rows[0] != rows[1] and 0 not in rows[:2] and rows[2:] == [0, 0]
    torch.testing.assert_close(found[0, 1], found[0, 3])
    torch.testing.assert_close(found[0, 2], found[1, 1])
    pairs = torch.cartesian_prod(torch.arange(4, VOCAB), torch.arange(4, VOCAB))
    used = model.bigrams.table.num_embeddings - 1
    spread = torch.bincount((pairs[:, 0] * HASH[0] + pairs[:, 1] * HASH[1]) % HASH[2] % used, minlength=used)
    assert spread.max() < 3 * spread.float().mean()


# --- what all keep ---


@each
@pytest.mark.parametrize("training", [False, True])
def test_a_changed_token_leaves_earlier_logits_bitwise(name: str, training: bool) -> None:
    assert future_leak(modern(name, attention="explicit", experts="reference").train(training), trials=22) == 0.0


@each
def test_no_gradient_from_the_past_to_the_future(name: str) -> None:
    assert future_leak(modern(name)) < 1e-5
    assert_no_gradient_to_the_future(modern(name))


@each
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(name: str, side: str) -> None:
    assert_padding_changes_nothing(modern(name), side)


@each
def test_cache_equals_the_full_pass(name: str) -> None:
    assert_cache_equals_the_full_pass(modern(name))
    for sizes in ([8, 1, 1], [4, 4, 1, 1]):
        assert_left_padding_equals_one_by_one(modern(name), sizes)


@each
def test_documents_of_a_packed_row_are_apart(name: str) -> None:
    """Each computes what it would alone: positions restart, nothing is smeared from the one before."""
    model = modern(name, max_length=LENGTH)
    for batch in map(packed_batch, range(2)):
        packed = logits(model, batch.input_ids, batch.segments)
        for row, span in spans(batch):
            alone = logits(model, batch.input_ids[row : row + 1, span])[0]
            torch.testing.assert_close(packed[row, span], alone, rtol=0, atol=2e-5)


@each
@pytest.mark.parametrize("kernels", [True, False])
def test_autocast_keeps_the_residual_stream_wide(name: str, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        monkeypatch.setattr(native, "_load", lambda dtype: "a test says so")
    model, streams = modern(name), []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, inputs, output: streams.append(output))
    ids = random_ids(2, CONTEXT)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids)
        narrow = model.logits(output.hidden)
    assert output.hidden.dtype == torch.bfloat16 and narrow.dtype == torch.float32
    assert all(value.dtype == torch.float32 for stats in output.router for value in stats)
    for residual, branch, values, _ in streams:
        assert residual.dtype == torch.float32 and branch.dtype == values.dtype == torch.bfloat16


@each
def test_kernels_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states, statistics and gradients with the kernels in C and without, on packed and padded rows."""
    model, batch = modern(name, max_length=LENGTH), packed_batch(0)
    weights = torch.randn(len(batch.input_ids), LENGTH, 96)
    results = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(native, "_load", lambda dtype: "a test says so")
        output = model(batch.input_ids, batch.segments)
        value = (output.hidden * weights).sum()
        value = value + sum((stats.probability[1] + 0.01 * stats.squares).sum() for stats in output.router)
        gradients = torch.autograd.grad(value, list(model.parameters()))
        results.append([output.hidden, *(item for stats in output.router for item in stats), *gradients])
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()
