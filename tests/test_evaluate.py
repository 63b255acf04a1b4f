"""Evaluation against the plainest formula: full logits, cross-entropy alone, bits over the bytes of the text."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moelet.data import Validation, read_validation
from moelet.evaluate import evaluate
from moelet.hparams import Hparams, make_hparams
from moelet.loss import IGNORE
from moelet.modelling import GPT
from moelet.tokenizer import Tokenizer

DATA = {"packed": {}, "masked": {"mask_documents": True, "piece_chars": 100}, "padded": {"packing": False}}


@pytest.fixture(params=DATA)
def run(
    request: pytest.FixtureRequest, tiny_settings: Callable[..., dict[str, Any]], tokenizer: Tokenizer
) -> tuple[GPT, Validation, Hparams]:
    hparams = make_hparams(tiny_settings(data=DATA[request.param]))
    torch.manual_seed(0)
    model = GPT(hparams.model, tokenizer.vocab_size)
    return model, read_validation(hparams.data, tokenizer, hparams.model.max_length, 4, 3000, "validation"), hparams


def test_loss_is_cross_entropy_alone(run: tuple[GPT, Validation, Hparams]) -> None:
    model, validation, _ = run
    result = evaluate(model, validation, torch.float32)
    model.eval()
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for batch in validation.batches:
            logits = model.logits(model(batch.input_ids, batch.segments).hidden).double()
            nats += F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum").item()
            tokens += int((batch.labels != IGNORE).sum())
    assert result.tokens == tokens == validation.n_tokens
    assert result.loss == pytest.approx(nats / tokens, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / validation.n_bytes, rel=1e-6)


def test_evaluation_leaves_no_trace(run: tuple[GPT, Validation, Hparams]) -> None:
    """No dropout, no randomness used up, the mode put back, the weights untouched."""
    model, validation, _ = run
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    first, second = (evaluate(model, validation, torch.float32) for _ in range(2))
    assert first == second
    assert model.training and torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batch_size_changes_nothing(run: tuple[GPT, Validation, Hparams], tokenizer: Tokenizer) -> None:
    model, validation, hparams = run
    one = read_validation(hparams.data, tokenizer, hparams.model.max_length, 1, 3000, "validation")
    a, b = (evaluate(model, item, torch.float32) for item in (validation, one))
    assert a.loss == pytest.approx(b.loss, rel=1e-6)
    assert (a.tokens, a.bytes) == (b.tokens, b.bytes)
    for layer_a, layer_b in zip(a.expert_load, b.expert_load, strict=True):
        assert layer_a == pytest.approx(layer_b, abs=1e-3)
        assert sum(layer_a) / len(layer_a) == pytest.approx(1.0)
