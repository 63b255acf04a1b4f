"""Queries and keys before they meet: turned, scores depend on distances alone; normed, on directions alone."""

import pytest
import torch
from torch import Tensor

from moelet.kernels.native import LANES
from moelet.modelling import NORM_EPS, positions_within
from moelet.rotary import Turns, prepare_heads, turns

THETA, LENGTH = 100.0, 64
WIDTHS = [2, 6, 2 * LANES]  # the last is one that the kernel takes


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turned(x: Tensor, positions: Tensor, theta: float = THETA) -> Tensor:
    return prepare_heads(x, None, NORM_EPS, turns(LENGTH, x.shape[-1], theta), positions)


@pytest.mark.parametrize("width", WIDTHS)
def test_scores_depend_on_distance_alone(width: int) -> None:
    q, k = normal(1, 9, 3, width), normal(1, 9, 3, width, seed=1)
    scores = {}
    for start in (0, 1, 40):
        positions = torch.arange(start, start + 9)[None]
        scores[start] = torch.einsum("bshc,blhc->bhsl", turned(q, positions), turned(k, positions))
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(scores[40], scores[0], rtol=0, atol=3e-5)
    ahead = torch.einsum("bshc,blhc->bhsl", turned(q, torch.arange(1, 10)[None]), turned(k, torch.arange(9)[None]))
    assert (ahead - scores[0]).abs().max() > 0.1, "a distance of one more is another score"


@pytest.mark.parametrize("width", WIDTHS)
def test_a_turn_keeps_lengths_and_the_first_position_everything(width: int) -> None:
    x = normal(2, 9, 3, width)
    assert torch.equal(turned(x, torch.zeros(2, 9, dtype=torch.int64)), x)
    found = turned(x, torch.arange(9).expand(2, 9))
    assert torch.equal(found[:, 0], x[:, 0])
    assert (found[:, 1:] - x[:, 1:]).abs().amax((0, 2, 3)).min() > 0.1
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("width", WIDTHS)
def test_pairs_are_those_of_transformers(width: int) -> None:
    """`rotate_half` of LLaMA in transformers: x cos + (-second half, first half) sin, the angles written twice."""
    x, positions = normal(2, 9, 3, width), torch.randint(LENGTH, (2, 9))
    inverse_frequency = 1.0 / THETA ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = positions[..., None].double() * inverse_frequency
    doubled = torch.cat((angles, angles), -1)[:, :, None]
    first, second = x.double().split(width // 2, -1)
    want = x * doubled.cos() + torch.cat((-second, first), -1) * doubled.sin()
    torch.testing.assert_close(turned(x, positions).double(), want, rtol=1e-5, atol=1e-5)


def test_angles_by_hand() -> None:
    """Four numbers, theta 100: the first pair turns by 1 a token, the second by a tenth."""
    table = turns(3, 4, 100.0)
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.1], [2.0, 0.2]])
    torch.testing.assert_close(table, Turns(angles.cos(), angles.sin()))
    assert table.cos.dtype == table.sin.dtype == torch.float32


@pytest.mark.parametrize("width", WIDTHS)
def test_positions_restart_with_documents(width: int) -> None:
    segments = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 3, 3], [1, 1, 1, 1, 1, 2, 2, 0, 0]])
    x, positions = normal(2, 9, 3, width), positions_within(segments)
    packed = turned(x, positions)
    for row, start, end in ((0, 0, 3), (0, 3, 5), (0, 5, 9), (1, 0, 5), (1, 5, 7)):
        alone = turned(x[row : row + 1, start:end], torch.arange(end - start)[None])
        torch.testing.assert_close(packed[row : row + 1, start:end], alone)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_norm_is_over_each_head_alone(width: int) -> None:
    x, weight = normal(2, 5, 3, width), 1 + 0.1 * normal(width, seed=1)
    positions = torch.arange(5).expand(2, 5)
    want = x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt() * weight
    torch.testing.assert_close(prepare_heads(x, weight, NORM_EPS, None, positions), want)
    both = prepare_heads(x, weight, NORM_EPS, turns(LENGTH, width, THETA), positions)
    torch.testing.assert_close(both, turned(want, positions))
    louder = x.clone()
    louder[:, :, 1] *= 5.0
    found = prepare_heads(louder, weight, NORM_EPS, None, positions)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [6, 2 * LANES])
def test_formats_are_kept(width: int) -> None:
    weight, positions = torch.ones(width), torch.arange(5)[None]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = normal(1, 5, 2, width).to(dtype)
        found = prepare_heads(x, weight.to(torch.promote_types(dtype, torch.float32)), NORM_EPS, None, positions)
        assert found.dtype == turned(x, positions).dtype == dtype
    x = normal(1, 5, 2, width)
    assert prepare_heads(x, None, NORM_EPS, None, positions) is x


def test_gradcheck() -> None:
    x, weight = normal(1, 3, 2, 4).double().requires_grad_(), (1 + 0.1 * normal(4)).double().requires_grad_()
    angles, positions = turns(LENGTH, 4, THETA), torch.tensor([[0, 1, 5]])
    assert torch.autograd.gradcheck(lambda *given: prepare_heads(*given, NORM_EPS, angles, positions), (x, weight))
