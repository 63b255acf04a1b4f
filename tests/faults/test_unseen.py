"""What a token must not see: the future, other documents of its row, other rows. Bit by bit, in training too."""

from itertools import product

import pytest
import torch
from conftest import CPU_ATTENTION, CPU_BACKENDS
from scorecard import Trials
from test_mask_documents import lively as lively_packed
from test_mask_documents import packed_batch, spans
from test_modelling import CONTEXT, MASK_MUTANTS, VOCAB, future_leak, heads_without_transpose, lively, random_ids
from test_modern import EVERYTHING
from torch import Tensor

from moelet import attention, modelling
from moelet.attention import ATTENTION
from moelet.modelling import GPT

# an expert's product over other rows is another product of the library: "grouped" is equal to rounding alone
BITWISE = [("auto", "fused" if "fused" in CPU_BACKENDS else "batched")]
BITWISE += [pair for pair in product(CPU_ATTENTION, CPU_BACKENDS) if pair[1] != "grouped" and pair[0] != "auto"]
MODES = [(False, 0.0), (True, 0.0), (True, 0.1)]  # whether in training, and dropout


@torch.no_grad()
def logits(model: GPT, ids: Tensor, segments: Tensor | None = None) -> Tensor:
    torch.manual_seed(5)  # the same dropout each time
    return model.logits(model(ids, segments).hidden)


@pytest.mark.check(20)
def test_a_changed_token(trials: Trials) -> None:
    """No logit before it and none of another row moves by a bit, in training, with dropout, and in evaluation."""
    for index in range(trials.count(small=12, full=120)):
        names, (training, dropout) = BITWISE[index % len(BITWISE)], MODES[index % len(MODES)]
        changes = EVERYTHING | {"d_ff": 160, "n_experts": 5, "n_heads": 3} if index % 4 == 3 else {}
        changes |= {"attention": names[0], "experts": names[1], "dropout": dropout}
        with trials.one(f"{index}: {names}, {'training' if training else 'evaluation'}, dropout {dropout}"):
            model = lively(seed=index, **changes).train(training)
            ids, place = random_ids(3, CONTEXT, seed=index), trials.random.randrange(CONTEXT)
            changed = ids.clone()
            changed[1, place] = 4 + (ids[1, place] - 4 + trials.random.randrange(1, VOCAB - 4)) % (VOCAB - 4)
            before, after = logits(model, ids), logits(model, changed)
            assert not torch.equal(after[1, place], before[1, place])
            assert torch.equal(after[1, :place], before[1, :place]), "the past has changed"
            assert torch.equal(after[[0, 2]], before[[0, 2]]), "another row has changed"


@pytest.mark.check(20)
def test_a_changed_token_among_packed_documents(trials: Trials) -> None:
    """No logit of another document moves by a bit; without the mask it would."""
    for index in range(trials.count(small=6, full=100)):
        names, (training, dropout) = BITWISE[index % len(BITWISE)], MODES[index % len(MODES)]
        with trials.one(f"{index}: {names}, {'training' if training else 'evaluation'}, dropout {dropout}"):
            model = lively_packed(attention=names[0], experts=names[1], dropout=dropout).train(training)
            batch = packed_batch(index)
            row, span = trials.random.choice([found for found in spans(batch) if found[1].stop < 16])
            place, changed = trials.random.randrange(span.start, span.stop), batch.input_ids.clone()
            changed[row, place] = 4 + (changed[row, place] + trials.random.randrange(20)) % (VOCAB - 4)
            moved = logits(model, changed, batch.segments) != logits(model, batch.input_ids, batch.segments)
            moved[row, place : span.stop] = False
            assert not moved.any()
            blind = logits(model, changed) != logits(model, batch.input_ids)
            assert torch.equal(changed, batch.input_ids) or blind[row, span.stop :].any(), "the test can't see a leak"


@pytest.mark.check(20)
def test_the_gradient_to_later_tokens(trials: Trials) -> None:
    """It is exactly 0 from every logit to the embedding of each later token, on every way to compute the network."""
    for index in range(trials.count(small=5, full=50)):
        name, experts = list(product(CPU_ATTENTION, CPU_BACKENDS))[7 * index % (len(CPU_ATTENTION) * len(CPU_BACKENDS))]
        with trials.one(f"{index}: {name}, {experts}"):
            model, embedded = lively(seed=index, attention=name, experts=experts).train(index % 2 == 0), list[Tensor]()
            model.embed.register_forward_hook(lambda module, given, output: embedded.append(output))  # noqa: B023
            scores = model.logits(model(random_ids(2, CONTEXT, seed=index)).hidden)
            place = trials.random.randrange(CONTEXT)
            (gradient,) = torch.autograd.grad((scores[0, place] * torch.randn(VOCAB)).sum(), embedded)
            assert gradient[0, : place + 1].abs().sum(-1).all()
            assert not gradient[0, place + 1 :].any() and not gradient[1].any()


def adding(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, dropout: float) -> Tensor:
    """The trap of +1 on allowed scores instead of minus infinity on the others."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores + torch.ones(q.shape[2], k.shape[2]).tril()).softmax(-1) @ v


@pytest.mark.check(20)
def test_a_network_that_sees_the_future(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """These checks fail for each of six known mistakes: they can see."""
    for index, name in enumerate([*MASK_MUTANTS, "heads by view", "a mask that adds"]):
        with trials.one(name), monkeypatch.context() as patch:
            if name in MASK_MUTANTS:
                patch.setattr(attention, "causal_mask", MASK_MUTANTS[name])
            elif name == "heads by view":
                patch.setattr(modelling.Attention, "_heads", heads_without_transpose)
            else:
                patch.setitem(ATTENTION, "explicit", adding)
            assert future_leak(lively(seed=index, attention="explicit")) > 1e-2
    assert index == 5
