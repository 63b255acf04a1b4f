"""Computing layers again in backward: the same step to the last bit, dropout and router statistics included."""

from itertools import product

import pytest
import torch
from conftest import CPU_BACKENDS, TinySettings
from test_modern import EVERYTHING

from moelet.data import Batch, collate
from moelet.hparams import make_hparams
from moelet.state import build
from moelet.step import StepReport, train_step
from moelet.tokenizer import Tokenizer

RUNS = [run for run in product(CPU_BACKENDS, ["fp32", "fp16"]) if run != ("fused", "fp16")]  # there is no such kernel


def two_steps(
    settings: dict[str, dict[str, object]], tokenizer: Tokenizer, again: bool
) -> tuple[list[StepReport], list[torch.Tensor], list[int]]:
    """Return what two steps of two micro-batches reported, the weights after them, and how often each layer ran."""
    settings["train"]["checkpoint_activations"] = again
    training = build(make_hparams(settings), tokenizer)
    runs = [0] * len(training.model.layers)

    def count(index: int) -> None:
        runs[index] += 1

    for index, layer in enumerate(training.model.layers):
        layer.register_forward_pre_hook(lambda module, inputs, index=index: count(index))
    reports = [train_step(training, [batch(tokenizer, seed), batch(tokenizer, seed + 1)]) for seed in (0, 2)]
    return reports, [parameter.detach() for parameter in training.model.parameters()], runs


def batch(tokenizer: Tokenizer, seed: int) -> Batch:
    """Three rows of random pieces, the last one padded."""
    rows = torch.randint(4, tokenizer.vocab_size, (3, 33), generator=torch.Generator().manual_seed(seed))
    rows[-1, 20:] = tokenizer.pad_id
    return collate(list(rows.numpy()), False)


@pytest.mark.parametrize(("backend", "precision"), RUNS)
def test_the_step_is_the_same_to_the_last_bit(
    tiny_settings: TinySettings, tokenizer: Tokenizer, backend: str, precision: str
) -> None:
    settings = tiny_settings(model={"experts": backend, "d_ff": 128}, train={"precision": precision})
    assert settings["model"]["dropout"] > 0, "the draws are part of what must come again"
    kept, kept_weights, kept_runs = two_steps(settings, tokenizer, False)
    again, again_weights, again_runs = two_steps(settings, tokenizer, True)
    assert again == kept, "losses, balance losses, gradient norms and expert loads"
    assert all(torch.equal(one, other) for one, other in zip(again_weights, kept_weights, strict=True))
    # a step's micro-batches go forward once to collect the balance and once to learn; only the latter is repeated
    assert kept_runs == [2 * 2 * 2] * 2 and again_runs == [2 * 2 * 3] * 2


def test_the_modern_settings_come_again_too(tiny_settings: TinySettings, tokenizer: Tokenizer) -> None:
    settings = tiny_settings(model={**EVERYTHING, "n_heads": 1}, optim={"optimizer": "muon"})
    settings |= {"balance": {"bias_rate": 0.01, "z_loss": 0.01}}
    (kept, kept_weights, _), (again, again_weights, runs) = (two_steps(settings, tokenizer, on) for on in (False, True))
    assert again == kept and runs == [2 * 2 * 3] * 2
    assert all(torch.equal(one, other) for one, other in zip(again_weights, kept_weights, strict=True))
