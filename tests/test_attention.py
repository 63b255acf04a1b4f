"""Every way to compute attention equals the definition; none sees the future, padding or another document."""

import math

import pytest
import torch
from conftest import CPU_ATTENTION
from torch import Tensor

from moelet import attention
from moelet.attention import causal_attention, causal_mask
from moelet.errors import UserError

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest reference value
# batch, heads, queries, keys, width, layout of the rows
SHAPES = [
    (1, 1, 1, 1, 1, None),
    (2, 3, 7, 7, 4, None),
    (2, 1, 9, 9, 8, None),
    (2, 8, 5, 5, 2, "right"),
    (3, 2, 6, 6, 4, "left"),
    (2, 3, 4, 11, 4, None),
    (3, 2, 4, 11, 4, "left"),
    (2, 2, 4, 11, 4, "right"),
    (3, 2, 1, 11, 4, "left"),
    (2, 4, 1, 6, 3, None),
    (2, 2, 65, 65, 16, None),
    (2, 2, 65, 65, 16, "right"),
    (3, 2, 9, 9, 4, "packed"),
    (3, 2, 5, 11, 4, "packed"),
    (2, 2, 65, 65, 16, "packed"),
    (1, 3, 130, 130, 20, None),
    (2, 1, 197, 197, 33, "packed"),
]
# `blocked` has no float64
RUNS = [(name, dtype) for name in CPU_ATTENTION for dtype in TOLERANCE if (name, dtype) != ("blocked", torch.float64)]


def make_segments(layout: str | None, batch: int, n_keys: int) -> Tensor | None:
    """Return rows with 0, 2, 4, ... padding tokens; packed ones hold documents of 1, 3, 5, 4, 4, ... tokens."""
    if layout is None:
        return None
    real = torch.tensor([max(1, n_keys - 2 * row) for row in range(batch)])[:, None]
    place = torch.arange(n_keys)[None]
    if layout == "packed":
        documents = [1, *[2] * 3, *[3] * 5, *(4 + k // 4 for k in range(n_keys))]
        return torch.tensor(documents[:n_keys]) * (place < real)
    return (place < real).long() if layout == "right" else (place >= n_keys - real).long()


def numbers(batch: int, heads: int, n_queries: int, n_keys: int, width: int) -> list[Tensor]:
    """Return queries, keys, values and a gradient of the output, float64, exact in bfloat16."""
    generator = torch.Generator().manual_seed(n_queries * 100 + n_keys)
    shapes = [(batch, heads, n, width) for n in (n_queries, n_keys, n_keys, n_queries)]
    return [torch.randn(shape, generator=generator).bfloat16().double() for shape in shapes]


def best_precision(backend: str, tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.float() for tensor in tensors] if backend == "blocked" else tensors


def plain_loops(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None) -> Tensor:
    """Return the output by the definition, one query at a time."""
    out = torch.zeros_like(q)
    batch, heads, n_queries, width = q.shape
    past = k.shape[2] - n_queries
    for b in range(batch):
        for h in range(heads):
            for i in range(n_queries):
                seen = [j for j in range(i + past + 1) if segments is None or segments[b, j] == segments[b, i + past]]
                scores = [math.exp(q[b, h, i].dot(k[b, h, j]).item() / math.sqrt(width)) for j in seen]
                for score, j in zip(scores, seen, strict=True):
                    out[b, h, i] += score / sum(scores) * v[b, h, j]
    return out


def run(backend: str, tensors: list[Tensor], segments: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Return output and gradients of q, k, v as float64; bfloat16 means under autocast."""
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    q, k, v = (tensor.to(wide, copy=True).requires_grad_() for tensor in tensors[:3])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = causal_attention(q, k, v, segments, backend=backend)
    gradients = torch.autograd.grad(out, (q, k, v), tensors[3].to(out.dtype))
    return [out.detach().double(), *(gradient.double() for gradient in gradients)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_explicit_equals_plain_loops(shape: tuple[int, int, int, int, int, str | None]) -> None:
    *sizes, layout = shape
    tensors, segments = numbers(*sizes), make_segments(layout, sizes[0], sizes[3])
    got = causal_attention(*tensors[:3], segments, backend="explicit")
    torch.testing.assert_close(got, plain_loops(*tensors[:3], segments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), RUNS, ids=str)
def test_backends_equal_the_definition(
    backend: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int, str | None]
) -> None:
    *sizes, layout = shape
    tensors, segments = numbers(*sizes), make_segments(layout, sizes[0], sizes[3])
    want = run("explicit", tensors, segments, torch.float64)
    largest_gradient = max(value.abs().max().item() for value in want[1:])  # of one alone: q's is 0 for a single key
    for name, got, value in zip("yqkv", run(backend, tensors, segments, dtype), want, strict=True):
        error = (got - value).abs().max().item()
        scale = value.abs().max().item() if name in "yv" else largest_gradient
        assert error <= TOLERANCE[dtype] * scale, f"{name} is off by {error:.2e} of {scale:.2e}"


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("layout", [None, "left", "packed"])
@pytest.mark.parametrize("backend", CPU_ATTENTION)
def test_no_query_sees_the_future(backend: str, layout: str | None, past: int) -> None:
    n_queries = 9
    q, k, v, _ = best_precision(backend, numbers(2, 3, n_queries, n_queries + past, 4))
    segments = make_segments(layout, 2, n_queries + past)
    before = causal_attention(q, k, v, segments, backend=backend)
    for place in range(n_queries):
        other_k, other_v = k.clone(), v.clone()
        other_k[:, :, place + past] += 100.0
        other_v[:, :, place + past] -= 100.0
        after = causal_attention(q, other_k, other_v, segments, backend=backend)
        assert torch.equal(after[:, :, :place], before[:, :, :place])
        assert not torch.equal(after[:, :, place], before[:, :, place])


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("backend", CPU_ATTENTION)
def test_padding_is_not_seen(backend: str, padding: str) -> None:
    q, k, v, _ = best_precision(backend, numbers(3, 2, 9, 9, 4))
    segments = make_segments(padding, 3, 9)
    assert segments is not None
    hidden = (segments == 0)[:, None, :, None]
    before = causal_attention(q, k, v, segments, backend=backend)
    after = causal_attention(q, k + 50.0 * hidden, v - 70.0 * hidden, segments, backend=backend)
    real = ~hidden.expand_as(before)
    tolerance = 1e-12 if before.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(after[real], before[real], rtol=tolerance, atol=tolerance)
    assert before.isfinite().all()
    assert not torch.allclose(causal_attention(q, k, v, None, backend=backend)[1:], before[1:])


@pytest.mark.parametrize("backend", CPU_ATTENTION)
def test_rows_of_a_batch_are_apart(backend: str) -> None:
    q, k, v, _ = best_precision(backend, numbers(2, 2, 6, 6, 4))
    before = causal_attention(q, k, v, backend=backend)
    others = [tensor.clone() for tensor in (q, k, v)]
    for tensor in others:
        tensor[1] += 3.0
    after = causal_attention(*others, backend=backend)
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


def test_masks_by_hand() -> None:
    def drawn(mask: Tensor) -> list[str]:
        return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]

    cpu = torch.device("cpu")
    assert drawn(causal_mask(3, 3, None, cpu)) == ["x..", "xx.", "xxx"]
    assert drawn(causal_mask(2, 4, None, cpu)) == ["xxx.", "xxxx"]
    segments = torch.tensor([[True, True, False, False], [False, False, True, True]])
    masks = causal_mask(4, 4, segments, cpu)
    assert masks.shape == (2, 1, 4, 4)
    assert drawn(masks[0, 0]) == ["x...", "xx..", "..x.", "..xx"]  # right padding sees padding, and nobody else does
    assert drawn(masks[1, 0]) == ["x...", "xx..", "..x.", "..xx"]  # and so it is with left padding
    assert drawn(causal_mask(2, 4, segments, cpu)[1, 0]) == ["..x.", "..xx"]
    packed = torch.tensor([[1, 1, 2, 3, 3, 0]])
    expected = ["x.....", "xx....", "..x...", "...x..", "...xx.", ".....x"]
    assert drawn(causal_mask(6, 6, packed, cpu)[0, 0]) == expected
    assert drawn(causal_mask(2, 6, packed, cpu)[0, 0]) == expected[-2:]


def test_sdpa_makes_no_mask_without_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(attention, "causal_mask")
    q, k, v, _ = numbers(2, 2, 5, 5, 4)
    assert causal_attention(q, k, v, backend="sdpa").shape == q.shape
    with pytest.raises(NameError):
        causal_attention(q, k, v, make_segments("packed", 2, 5), backend="sdpa")


@pytest.mark.parametrize("backend", CPU_ATTENTION)
def test_dropout_keeps_the_mean_and_hides_the_future(backend: str) -> None:
    torch.manual_seed(0)
    size = 6
    q, k, _, _ = (tensor.float() for tensor in numbers(1, 1, size, size, size))
    q, k = q.expand(4000, 1, size, size), k.expand(4000, 1, size, size)
    identity = torch.eye(size).expand(4000, 1, size, size)  # as values it makes the output the weights themselves
    weights = causal_attention(q, k, identity, None, 0.25, backend)
    assert not weights.triu(1).any()
    want = causal_attention(q[:1], k[:1], identity[:1], None, 0.0, backend)[0]
    past = torch.ones(size, size).tril().bool()
    assert 0.24 < (weights[:, 0, past] == 0).float().mean() < 0.26
    torch.testing.assert_close(weights.mean(0), want, rtol=0, atol=0.05)
    kept = (weights != 0).expand_as(weights)
    torch.testing.assert_close(weights[kept], (want / 0.75).expand_as(weights)[kept], rtol=1e-4, atol=1e-5)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.attention is 'sdap'.*Did you mean 'sdpa'"):
        causal_attention(*numbers(1, 1, 2, 2, 2)[:3], backend="sdap")
