"""Decoding in one call of C gives the logits that the model gives, for every shape it takes."""

import pytest
import torch
from conftest import needs_kernels

from moelet import generate
from moelet.decoding import Decoded, Decoder, can_decode
from moelet.generate import Sampling, continuations
from moelet.inspection.routing import mixtures, watched
from moelet.kv_cache import KVCache
from moelet.modelling import GPT
from moelet.moe import Router
from moelet.sections import ModelSettings

pytestmark = needs_kernels
VOCAB = 67
SHAPE = {"max_length": 24, "d_model": 64, "d_embed": 16, "n_layers": 2, "n_heads": 4, "d_ff": 128, "n_experts": 4}
CHANGES = [
    {},
    {"activation": "swiglu", "top_k": 3, "normalize_top_k": True},
    {"activation": "gelu", "n_heads": 2},
    {"activation": "relu2", "top_k": 1, "embed_scale": 5.0},
    {"n_experts": 1, "top_k": 1},
    {"n_experts": 1, "top_k": 1, "activation": "swiglu"},
    {"d_embed": None},
    {"tie_embeddings": False},
    {"positions": "rope", "n_heads": 2},
    {"qk_norm": True},
    {"positions": "rope", "qk_norm": True, "n_heads": 1, "activation": "swiglu", "normalize_top_k": True},
    {"embed_norm": True, "embed_scale": 3.0, "d_embed": None},
    {"selection_bias": True, "zero_init": True},
]
NOT_TAKEN = [
    {"d_embed": 8},
    {"positions": "rope", "n_heads": 4},
    {"shared_expert": 32},
    {"embed_residual": True},
    {"value_residual": True},
    {"smear": True},
    {"bigram_rows": 50},
]


def lively(**changes: object) -> GPT:
    torch.manual_seed(0)
    model = GPT(ModelSettings(**{**SHAPE, **changes}), VOCAB).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
        for router in (module for module in model.modules() if isinstance(module, Router)):
            if router.bias is not None:
                router.bias.normal_()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", CHANGES, ids=str)
@torch.no_grad()
def test_logits_are_the_models(changes: dict[str, object], dtype: torch.dtype) -> None:
    model = lively(**changes)
    if dtype == torch.bfloat16:
        for parameter in model.parameters():  # rounded on both sides, so that no router's choice differs
            parameter.copy_(parameter.bfloat16())
    assert can_decode(model)
    decoder, cache, same = Decoder(model, dtype), KVCache(model.settings), KVCache(model.settings)
    ids = torch.randint(VOCAB, (3, 20), generator=torch.Generator().manual_seed(1))
    model(ids[:, :5], None, cache), model(ids[:, :5], None, same)
    for place in range(5, 20):
        want = model.logits(model(ids[:, place : place + 1], None, same).hidden)[:, 0]
        torch.testing.assert_close(decoder.logits(ids[:, place], cache), want, rtol=1e-4, atol=1e-4)
    assert cache.length == same.length == 20


@pytest.mark.parametrize("changes", [{}, {"top_k": 3, "normalize_top_k": True}, {"selection_bias": True}], ids=str)
@torch.no_grad()
def test_the_experts_are_the_routers(changes: dict[str, object]) -> None:
    model = lively(**changes)
    decoder, cache, same = Decoder(model, torch.float32), KVCache(model.settings), KVCache(model.settings)
    ids = torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    model(ids[:, :8], None, cache), model(ids[:, :8], None, same)
    made, want = decoder.decode(ids[:, 8], cache), []
    with watched([moe.gate for moe in mixtures(model)], lambda layer, router, given, output: want.append(output[:2])):
        model(ids[:, 8:], None, same)
    assert made.ids_LBK.tolist() == [ids_BK.tolist() for ids_BK, _ in want]
    torch.testing.assert_close(made.weights_LBK, torch.stack([weights_BK for _, weights_BK in want]))


def test_generation_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = lively(), []

    class Counted(Decoder):
        def decode(self, *arguments: object) -> Decoded:
            made.append(1)
            return super().decode(*arguments)

    monkeypatch.setattr(generate, "Decoder", Counted)
    prompt = [[4, 5, 6]]
    fast = [row for (row,) in continuations(model, prompt, 8, Sampling(temperature=0))]
    assert len(made) == len(fast) - 1  # all but the first, which is the prompt's
    monkeypatch.setattr(generate, "can_decode", lambda model: False)
    assert [row for (row,) in continuations(model, prompt, 8, Sampling(temperature=0))] == fast


def test_other_models_are_left_to_the_model() -> None:
    assert not can_decode(lively().double())
    assert not any(can_decode(lively(**changes)) for changes in NOT_TAKEN)
