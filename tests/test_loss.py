"""The loss equals torch's on all logits without ever holding them; balance losses equal their papers' formulas."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from moelet import loss
from moelet.loss import BALANCE, IGNORE, bits_per_byte, importance_loss, linear_cross_entropy, switch_loss

CHUNK = 7
COUNTS = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 5 * CHUNK + 3]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_ROWS", CHUNK)


def numbers(n_tokens: int, ignored: str = "some", rank: int = 5, vocabulary: int = 23) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states and table, float64 but exact in bfloat16, and labels of which some are IGNORE."""
    generator = torch.Generator().manual_seed(n_tokens)
    h = torch.randn(n_tokens, rank, generator=generator).bfloat16().double()
    table = torch.randn(vocabulary, rank, generator=generator).bfloat16().double()
    labels = torch.randint(vocabulary, (n_tokens,), generator=generator)
    if ignored != "none":
        share = 1.0 if ignored == "all" else 0.4
        labels = labels.masked_fill(torch.rand(n_tokens, generator=generator) < share, IGNORE)
    return h, table, labels


def from_all_logits(h: Tensor, table: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(h @ table.T, labels, reduction="sum")


def run(function: Any, h: Tensor, table: Tensor, labels: Tensor, scale: float = 1.0) -> list[Tensor]:
    """Return the loss and the gradients of `scale` times it."""
    h, table = h.clone().requires_grad_(), table.clone().requires_grad_()
    total = function(h, table, labels)
    (total * scale).backward()
    assert h.grad is not None and table.grad is not None
    return [total.detach(), h.grad, table.grad]


def assert_near(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert mine.shape == theirs.shape
        if theirs.numel():
            assert (mine.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=str)
def test_equals_cross_entropy_of_all_logits(count: int, ignored: str, dtype: torch.dtype, tolerance: float) -> None:
    h, table, labels = numbers(count, ignored)
    want = run(from_all_logits, h, table, labels, scale=0.3)
    got = run(linear_cross_entropy, h.to(dtype), table.to(dtype), labels, scale=0.3)
    assert all(value.dtype == dtype for value in got)
    assert_near(got, want, tolerance)
    if ignored == "all":
        assert not any(value.any() for value in got)


@pytest.mark.parametrize("count", COUNTS[1:])
def test_bf16_autocast(count: int) -> None:
    h, table, labels = numbers(count, "none")
    want = run(from_all_logits, h, table, labels)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(linear_cross_entropy, h.float(), table.float(), labels)
    assert all(value.dtype == torch.float32 for value in got)
    assert_near(got, want, 2e-2)


def test_gradcheck() -> None:
    h, table, labels = numbers(2 * CHUNK + 1)
    inputs = (h.requires_grad_(), table.requires_grad_())
    assert torch.autograd.gradcheck(lambda *pair: linear_cross_entropy(*pair, labels), inputs, atol=1e-6, rtol=1e-6)


def test_without_gradients() -> None:
    h, table, labels = numbers(20)
    with torch.no_grad():
        got = linear_cross_entropy(h.requires_grad_(), table, labels)
    torch.testing.assert_close(got, from_all_logits(h, table, labels).detach(), rtol=1e-11, atol=0)


def test_huge_logits_stay_finite() -> None:
    h, table, labels = numbers(20)
    got = run(linear_cross_entropy, h.float() * 1e4, table.float(), labels)
    assert all(value.isfinite().all() for value in got)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_never_holds_all_logits() -> None:
    count, vocabulary = 50 * CHUNK, 211
    h, table, labels = numbers(count, rank=4, vocabulary=vocabulary)
    with LargestTensor() as mode:
        run(linear_cross_entropy, h, table, labels)
    assert mode.elements == max(CHUNK * vocabulary, count * 4)
    with LargestTensor() as mode:
        run(from_all_logits, h, table, labels)
    assert mode.elements == count * vocabulary  # the meter works


def random_balance(n_layers: int = 3, n_experts: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    probability, load = torch.rand(2, n_layers, n_experts, generator=generator, dtype=torch.float64)
    return probability / probability.sum(1, keepdim=True), load / load.sum(1, keepdim=True)


def test_importance_formula() -> None:
    """Shazeer et al. 2017: the squared coefficient of variation, (deviation / mean)^2."""
    probability, load = random_balance()
    want = 0.0
    for row in probability.tolist():
        mean = sum(row) / len(row)
        want += sum((value - mean) ** 2 for value in row) / len(row) / mean**2 / len(probability)
    assert importance_loss(probability, load).item() == pytest.approx(want, rel=1e-12)
    assert importance_loss(7.0 * probability, load).item() == pytest.approx(want, rel=1e-12)


def test_switch_formula() -> None:
    """Fedus et al. 2021: experts times the sum of share of assignments times mean probability."""
    probability, load = random_balance()
    want = 0.0
    for shares, probabilities in zip(load.tolist(), probability.tolist(), strict=True):
        want += len(shares) * sum(f * p for f, p in zip(shares, probabilities, strict=True)) / len(load)
    assert switch_loss(probability, load).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("name", "balanced", "collapsed"), [("importance", 0.0, 4.0), ("switch", 1.0, 5.0)])
def test_balance_and_collapse(name: str, balanced: float, collapsed: float) -> None:
    even, one = torch.full((2, 5), 0.2, dtype=torch.float64), torch.eye(5, dtype=torch.float64)[[3, 1]]
    assert BALANCE[name](even, even).item() == pytest.approx(balanced, abs=1e-12)
    assert BALANCE[name](one, one).item() == pytest.approx(collapsed, rel=1e-12)


@pytest.mark.parametrize("name", BALANCE)
def test_balance_has_a_slope_against_the_overloaded(name: str) -> None:
    probability = torch.tensor([[0.7, 0.1, 0.2]], dtype=torch.float64, requires_grad=True)
    load = torch.tensor([[0.8, 0.1, 0.1]], dtype=torch.float64, requires_grad=True)
    BALANCE[name](probability, load).backward()
    assert probability.grad is not None and probability.grad[0].argmax() == 0
    assert load.grad is None  # how often an expert is chosen has no slope


def test_bits_per_byte() -> None:
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)  # 8 bits for 4 bytes
    assert bits_per_byte(10 * math.log(256), 10) == pytest.approx(8.0)  # uniform over bytes
    assert math.isnan(bits_per_byte(1.0, 0))
