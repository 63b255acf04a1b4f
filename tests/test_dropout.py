"""Dropout with cheap random bits: its rate, its scale, its gradient, its repeatability."""

import pytest
import torch

from moelet.dropout import drop_mask, dropout


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_rate_in_every_lane(probability: float) -> None:
    """Each of the four lanes of a word drops at the rate, and neighbours are independent."""
    torch.manual_seed(0)
    mask = drop_mask(torch.Size((250_000, 4)), probability).double()
    sigma = (probability * (1 - probability) / 250_000) ** 0.5
    assert ((mask.mean(0) - probability).abs() < 5 * sigma).all()
    centred = (mask - probability) / (probability * (1 - probability)) ** 0.5
    correlation = centred.T @ centred / 250_000
    assert correlation.fill_diagonal_(0).abs().max() < 5 / 250_000**0.5


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (3, 5, 11)])
def test_odd_sizes(shape: tuple[int, ...]) -> None:
    out = dropout(torch.ones(shape), 0.5)
    assert out.shape == shape and set(out.flatten().tolist()) <= {0.0, 2.0}


def test_mean_gradient_and_repeatability() -> None:
    x = torch.randn(64, 64, dtype=torch.float64, requires_grad=True)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(dropout(x, 0.25))
    assert torch.equal(*results)
    kept = results[0] != 0
    torch.testing.assert_close(results[0][kept], x[kept] / 0.75, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(results[0].sum(), x)
    torch.testing.assert_close(gradient, kept.double() / 0.75, rtol=1e-12, atol=0)
    torch.manual_seed(4)
    assert not torch.equal(dropout(x, 0.25), results[0])


def test_nothing_is_drawn_at_probability_zero() -> None:
    x, before = torch.ones(5), torch.get_rng_state()
    assert dropout(x, 0.0) is x and torch.equal(torch.get_rng_state(), before)
