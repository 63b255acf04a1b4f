"""Packed rows with masked documents: each document computes what it would alone, and none reaches another."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from conftest import CPU_ATTENTION, CPU_BACKENDS
from torch import Tensor

from moelet import data
from moelet.data import Batch
from moelet.kv_cache import KVCache
from moelet.loss import IGNORE, linear_cross_entropy
from moelet.modelling import GPT, positions_within
from moelet.moe import RouterStats, add_stats
from moelet.sections import ModelSettings
from moelet.tokenizer import Tokenizer

VOCAB, LENGTH = 29, 16
COMBINATIONS = list(product(CPU_ATTENTION, CPU_BACKENDS))


def lively(**changes: object) -> GPT:
    """Return a small model in eval mode whose branches, positions and logits are all of size 1."""
    torch.manual_seed(0)
    shape = {"d_model": 96, "d_embed": 8, "n_layers": 2, "n_heads": 3, "d_ff": 160, "n_experts": 5, "dropout": 0.0}
    model = GPT(ModelSettings(**{**shape, "max_length": LENGTH, **changes}), VOCAB).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            table = name in ("embed.tokens.weight", "embed.positions.weight")
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1.0 if table else parameter.shape[-1] ** -0.5)
        model.embed.proj.weight.normal_(0.0, model.settings.d_model**-0.5)
    return model


def packed_batch(seed: int) -> Batch:
    """Return rows of documents of 2 to 25 tokens: some go on from the row before, and the last row is padded."""
    draw = np.random.default_rng(seed)
    bodies = [draw.integers(4, VOCAB, draw.integers(0, 24)) for _ in range(12)]
    documents = [np.array([Tokenizer.bos_id, *body, Tokenizer.eos_id]) for body in bodies]
    return data.collate(list(data.packed(documents, LENGTH)), True)


def spans(batch: Batch) -> list[tuple[int, slice]]:
    """Return where each document stands: (row, columns), from one BOS, or the row's beginning, to the next."""
    found = []
    for row, ids in enumerate(batch.input_ids.tolist()):
        real = LENGTH - ids.count(Tokenizer.pad_id)
        starts = [0, *(i for i in range(1, real) if ids[i] == Tokenizer.bos_id), real]
        found += [(row, slice(*span)) for span in pairwise(starts)]
    return found


def loss_of(model: GPT, ids: Tensor, labels: Tensor, segments: Tensor | None) -> tuple[Tensor, list[RouterStats]]:
    output = model(ids, segments)
    features = model.features(output.hidden).flatten(0, 1)
    return linear_cross_entropy(features, model.table, labels.flatten()), output.router


def test_the_packings_hold_every_case() -> None:
    for seed in range(3):
        batch = packed_batch(seed)
        starts = batch.input_ids[:, 0] == Tokenizer.bos_id
        assert len(spans(batch)) > len(starts) + 5, "rows of several documents"
        assert starts.any() and not starts.all(), "rows that begin within a document, and at one"
        assert (batch.input_ids[-1] == Tokenizer.pad_id).any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("attention_name", "experts_name"), COMBINATIONS)
def test_packed_logits_are_those_of_each_document_alone(attention_name: str, experts_name: str, seed: int) -> None:
    model, batch = lively(attention=attention_name, experts=experts_name), packed_batch(seed)
    with torch.no_grad():
        packed = model.logits(model(batch.input_ids, batch.segments).hidden)
        blind = model.logits(model(batch.input_ids).hidden)
        for row, span in spans(batch):
            alone = model.logits(model(batch.input_ids[row : row + 1, span]).hidden)[0]
            torch.testing.assert_close(packed[row, span], alone, rtol=0, atol=1e-5)
            if span.start > 0:
                assert (blind[row, span] - alone).abs().max() > 0.1, "the test can't see a leak"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [(name, torch.float32, 1e-5) for name in CPU_ATTENTION]
    + [(name, torch.float64, 1e-10) for name in CPU_ATTENTION if name != "blocked"],
    ids=str,
)
def test_packed_training_is_that_of_each_document_alone(
    backend: str, dtype: torch.dtype, tolerance: float, seed: int
) -> None:
    """Loss, gradients and router statistics are the sums over the documents; padding is in none of them."""
    model, batch = lively(attention=backend).to(dtype), packed_batch(seed)
    packed, packed_router = loss_of(model, *batch)
    actual = torch.autograd.grad(packed, list(model.parameters()))

    alone, router = torch.zeros((), dtype=dtype), []
    for row, span in spans(batch):
        part, stats = loss_of(model, batch.input_ids[row : row + 1, span], batch.labels[row : row + 1, span], None)
        alone, router = alone + part, add_stats(router, stats)
    expected = torch.autograd.grad(alone, list(model.parameters()))

    torch.testing.assert_close(packed, alone, rtol=tolerance, atol=0)
    for (name, _), got, want in zip(model.named_parameters(), actual, expected, strict=True):
        assert (got - want).norm() <= tolerance * want.norm(), name
    for got, want in zip(packed_router, router, strict=True):
        torch.testing.assert_close(got.probability, want.probability, rtol=1e-5, atol=1e-5)
        assert torch.equal(got.assignments, want.assignments)
        assert got.tokens.item() == want.tokens.item() == int((batch.input_ids != Tokenizer.pad_id).sum())


@pytest.mark.parametrize("backend", CPU_ATTENTION)
def test_a_changed_token_leaves_other_documents_bitwise(backend: str) -> None:
    model, batch = lively(attention=backend, experts="reference"), packed_batch(0)
    with torch.no_grad():
        before = model.logits(model(batch.input_ids, batch.segments).hidden)
        for row, span in spans(batch):
            for place in range(span.start, span.stop):
                changed = batch.input_ids.clone()
                changed[row, place] = 4 + (changed[row, place] + place) % (VOCAB - 4)
                moved = model.logits(model(changed, batch.segments).hidden) != before
                assert moved[row, place].any() or torch.equal(changed, batch.input_ids)
                moved[row, place : span.stop] = False
                assert not moved.any(), f"token {place} of row {row} is seen outside of {span}"


@pytest.mark.parametrize(("attention_name", "experts_name"), COMBINATIONS)
def test_no_gradient_reaches_another_document(attention_name: str, experts_name: str) -> None:
    model, batch = lively(attention=attention_name, experts=experts_name), packed_batch(1)
    embedded: list[Tensor] = []
    model.embed.register_forward_hook(lambda module, given, output: embedded.append(output))
    logits = model.logits(model(batch.input_ids, batch.segments).hidden)
    for row, span in spans(batch):
        (gradient,) = torch.autograd.grad(logits[row, span].square().sum(), embedded, retain_graph=True)
        reached = gradient.abs().sum(-1) > 0
        assert reached[row, span].all()
        reached[row, span] = False
        assert not reached.any()


@pytest.mark.parametrize("sizes", [[16], [7, 9], [1] * 16, [3, 5, 1, 7]], ids=str)
@pytest.mark.parametrize("backend", CPU_ATTENTION)
def test_the_cache_keeps_documents_apart(backend: str, sizes: list[int]) -> None:
    model, batch, cache = lively(attention=backend), packed_batch(2), KVCache(ModelSettings(max_length=LENGTH))
    assert batch.segments is not None
    parts = zip(batch.input_ids.split(sizes, 1), batch.segments.split(sizes, 1), strict=True)
    with torch.no_grad():
        got = torch.cat([model(ids, segments, cache).hidden for ids, segments in parts], 1)
        want = model(batch.input_ids, batch.segments).hidden
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_positions_by_hand() -> None:
    segments = torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1], [1] * 8, [0] * 8])
    expected = [[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 2, 0, 1, 2, 3, 4], list(range(8)), list(range(8))]
    assert positions_within(segments).tolist() == expected
    assert positions_within(segments[1:] > 0).tolist() == expected[1:]
    assert positions_within(segments[:, :1]).tolist() == [[0]] * 4


def test_segments_by_hand() -> None:
    bos, eos, pad = Tokenizer.bos_id, Tokenizer.eos_id, Tokenizer.pad_id
    rows = [np.array([5, 6, eos, bos, 7, bos, 8]), np.array([bos, 5, eos, bos, eos, pad, pad])]
    batch = data.collate(rows, True)
    assert batch.segments is not None
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 3], [1, 1, 1, 2, 2, 0]]
    assert batch.labels.tolist() == [[6, eos, IGNORE, 7, IGNORE, 8], [5, eos, IGNORE, eos, IGNORE, IGNORE]]
    whole = [np.array([bos, 5, 6, 7, eos]), np.array([5, 6, 7, eos, bos])]
    assert data.collate(whole, True).segments is None, "one document a row needs no mask"
    unmasked = data.collate(rows, False)
    assert torch.equal(unmasked.segments, (unmasked.input_ids != pad).long())
