"""The kernels in C equal torch's operations, gradients too, on any number of threads; without them all still works.

Experts and attention are tested with the other ways to compute them.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_kernels
from torch import Tensor

from moelet.dropout import dropout
from moelet.experts import routed_ffn
from moelet.kernels import native
from moelet.kernels.cross_entropy import can_sum
from moelet.kernels.native import LANES
from moelet.kernels.norm import can_add_norm
from moelet.kernels.rotary import can_rotate
from moelet.kernels.router import can_route
from moelet.loss import IGNORE, linear_cross_entropy
from moelet.moe import Router, RouterStats
from moelet.norm import add_norm
from moelet.rotary import prepare_heads, turns
from moelet.sections import ModelSettings

pytestmark = needs_kernels
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest reference value
EPS = 1e-6
Results = list[Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return numbers that bfloat16 holds exactly, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().double()


def assert_close(got: Results, want: Results, tolerance: float) -> None:
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        scale = max(b.abs().max().item(), 1e-3) if b.numel() else 1.0
        error = (a.double() - b.double()).abs().max().item() if b.numel() else 0.0
        assert error <= tolerance * scale, f"result {place} is off by {error:.2e} of {scale:.2e}"


def on_threads(compute: Callable[[], Results]) -> None:
    """Check that the results are the same to the last bit on 1, 2 and 3 threads."""
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(compute())
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda dtype: "a test says so")


# --- residual and norm ---


def norms(dtype: torch.dtype, residual: bool, wide_branch: bool, rows: int = 130, width: int = 48) -> Results:
    """Return sum, normed values and the gradients of residual, branch and weight."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    half = dtype == torch.bfloat16
    x = normal(rows, width, seed=1).to(wide).requires_grad_() if residual else None
    branch = normal(rows, width, seed=2).to(wide if wide_branch else dtype).requires_grad_()
    weight = (1 + 0.1 * normal(width, seed=3)).to(wide).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        assert can_add_norm(x, branch, weight, dtype) == (dtype != torch.float64)
        total, normed = add_norm(x, branch, weight, EPS)
    assert total.dtype == wide and normed.dtype == dtype
    leaves = [leaf for leaf in (x, branch, weight) if leaf is not None]
    upstream = (normal(rows, width, seed=4).to(wide), normal(rows, width, seed=5).to(dtype))
    return [total, normed, *torch.autograd.grad((total, normed), leaves, upstream)]


@pytest.mark.parametrize("wide_branch", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_norms_equal_torchs(dtype: torch.dtype, residual: bool, wide_branch: bool) -> None:
    want = norms(torch.float64, residual, wide_branch)
    assert_close(norms(dtype, residual, wide_branch), want, TOLERANCE[dtype])
    on_threads(lambda: norms(dtype, residual, wide_branch))


def test_a_norm_that_nothing_uses_has_a_gradient() -> None:
    branch, weight = torch.randn(3, 16, requires_grad=True), torch.ones(16, requires_grad=True)
    total, normed = add_norm(None, branch, weight, EPS)
    (gradient,) = torch.autograd.grad(total.sum(), branch, retain_graph=True)
    assert torch.equal(gradient, torch.ones(3, 16))
    (gradient,) = torch.autograd.grad(normed.square().sum(), branch)
    assert gradient.abs().max() < 1e-3  # the sum of squares of normed values is constant


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_in_the_norm(probability: float) -> None:
    """What is kept is scaled, as often as it should be, and backward drops the same elements."""
    branch, weight = torch.ones(400, 256, requires_grad=True), torch.ones(256)
    torch.manual_seed(1)
    total, _ = add_norm(None, branch, weight, EPS, probability)
    kept = total != 0
    deviation = (probability * (1 - probability) / kept.numel()) ** 0.5
    assert abs(kept.float().mean().item() - (1 - probability)) < 4 * deviation
    assert torch.allclose(total[kept], torch.tensor(1 / (1 - probability)))
    (gradient,) = torch.autograd.grad(total.sum(), branch)
    assert torch.equal(gradient, total.detach())
    # rows, columns and neighbours don't share a pattern
    centred = kept.float() - kept.float().mean()
    for shift in ((0, 1), (1, 0), (1, 1)):
        correlation = (centred * centred.roll(shift, (0, 1))).mean() / centred.square().mean()
        assert abs(correlation) < 5 / kept.numel() ** 0.5
    torch.manual_seed(1)
    assert torch.equal(add_norm(None, branch, weight, EPS, probability)[0], total)
    assert not torch.equal(add_norm(None, branch, weight, EPS, probability)[0], total)


# --- norm and turn of heads ---


def prepared(dtype: torch.dtype, normed: bool, heads: int = 3, width: int = 2 * LANES) -> Callable[[bool], Results]:
    """Return what gives, turned or not, the heads and the gradients of x and weight; positions restart in a row."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    positions = torch.tensor([[*range(50), *range(15), *range(10)], [*range(70), *[0] * 5]])  # 150: past two blocks
    weight = (1 + 0.1 * normal(width, seed=3)).to(wide).requires_grad_() if normed else None
    x = normal(2, 75, heads, width, seed=1).to(dtype).requires_grad_()
    upstream = normal(2, heads, 75, width, seed=4).to(dtype).transpose(1, 2)  # as attention gives it, heads first

    def compute(turned: bool) -> Results:
        assert can_rotate(x, weight, turned) == (dtype != torch.float64)
        y = prepare_heads(x, weight, EPS, turns(75, width, 100.0) if turned else None, positions)
        assert y.dtype == dtype
        return [y, *torch.autograd.grad(y, [x] if weight is None else [x, weight], upstream)]

    return compute


@pytest.mark.parametrize(("heads", "width"), [(3, 2 * LANES), (1, 6 * LANES), (8, 4 * LANES)])
@pytest.mark.parametrize(("normed", "turned"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_prepared_heads_equal_torchs(dtype: torch.dtype, normed: bool, turned: bool, heads: int, width: int) -> None:
    want = prepared(torch.float64, normed, heads, width)(turned)
    assert len(want) == 2 + normed
    compute = prepared(dtype, normed, heads, width)
    assert_close(compute(turned), want, TOLERANCE[dtype])
    on_threads(lambda: compute(turned))


def test_heads_that_vectors_do_not_divide_are_left_to_torch() -> None:
    """A turn needs two vectors a head, a norm alone one."""
    for width, taken in ((LANES, (True, False)), (2 * LANES, (True, True)), (LANES + 8, (False, False))):
        x, weight = torch.ones(1, 2, 3, width), torch.ones(width)
        assert (can_rotate(x, weight, False), can_rotate(x, weight, True)) == taken
        angles, positions = turns(2, width, 100.0), torch.tensor([[0, 1]])
        assert prepare_heads(x, weight, EPS, angles, positions).shape == x.shape
    assert not can_rotate(torch.ones(1, 2, 3, 32), torch.ones(32, dtype=torch.bfloat16), True)
    assert not can_rotate(torch.ones(1, 2, 3, 32, dtype=torch.float16), None, True)


# --- router ---


def routed(dtype: torch.dtype, settings: ModelSettings, padded: bool, tokens: int = 150) -> Results:
    """Return ids, weights, statistics and the gradients of x and of the router's matrix."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    router = Router(settings).to(wide)
    with torch.no_grad():
        router.weight.copy_(normal(*router.weight.shape, seed=6) / 4)
        router.weight[1] = router.weight[0]  # ties
    x = normal(tokens, settings.d_model, seed=7).to(dtype).requires_grad_()
    real = (torch.arange(tokens) % 5 != 0) if padded else None
    assert can_route(x, router.weight) == (dtype != torch.float64)
    if router.bias is not None:
        router.bias.copy_(normal(*router.bias.shape, seed=13) / 2)
    ids, weights, stats = router(x, real)
    upstream = (normal(*weights.shape, seed=8).to(wide), normal(*stats.probability.shape, seed=9).to(wide))
    upstream = (*upstream, torch.tensor(0.01, dtype=wide))
    gradients = torch.autograd.grad((weights, stats.probability, stats.squares), (x, router.weight), upstream)
    return [ids, weights, *stats, *gradients]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"normalize_top_k": True},
        {"top_k": 1},
        {"top_k": 6, "normalize_top_k": True},
        {"selection_bias": True},
        {"selection_bias": True, "normalize_top_k": True, "top_k": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_routes_equal_torchs(dtype: torch.dtype, change: dict[str, object], padded: bool) -> None:
    settings = ModelSettings(d_model=64, n_heads=2, n_experts=6, d_ff=192, **{"top_k": 2, **change})
    got, want = routed(dtype, settings, padded), routed(torch.float64, settings, padded)
    assert torch.equal(got[0], want[0])
    assert_close(got[1:], want[1:], TOLERANCE[dtype])
    on_threads(lambda: routed(dtype, settings, padded))


def test_a_router_may_have_no_tokens() -> None:
    settings = ModelSettings(d_model=64, n_heads=2, n_experts=6, d_ff=192)
    ids, weights, *stats = routed(torch.float32, settings, False, 0)[: 2 + len(RouterStats._fields)]
    assert ids.shape == weights.shape == (0, 2) and not any(value.any() for value in stats)


def linear_scores(x: Tensor, router: Router) -> Tensor:
    return x.double() @ router.weight.double().T


@pytest.mark.parametrize("kernels", [True, False])
def test_router_statistics_are_those_of_the_plain_formula(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over real tokens alone: the largest score and the largest log-sum stand on padding."""
    if not kernels:
        monkeypatch.setattr(native, "_load", lambda dtype: "a test says so")
    router = Router(ModelSettings(d_model=64, n_heads=2, n_experts=6, d_ff=192, top_k=2, selection_bias=True))
    with torch.no_grad():
        router.weight.copy_(normal(6, 64, seed=6) / 4)
    assert router.bias is not None
    router.bias[4] = 1.5
    x, real = normal(150, 64, seed=7).float(), torch.arange(150) % 5 != 0
    x[~real] *= 10
    ids, weights, stats = router(x, real)
    scores = linear_scores(x, router)
    probability, log_total = scores.softmax(-1), scores.logsumexp(-1)
    entropy = -(probability * probability.log()).sum(-1)
    chosen = F.one_hot(ids[real], 6).sum((0, 1))
    want = [probability[real].sum(0), chosen, torch.tensor(120), log_total[real].square().sum(), entropy[real].sum()]
    assert_close(list(stats), [*want, scores[real].abs().max()], 1e-5)
    assert scores.abs().max() > 2 * stats.largest
    assert torch.equal(ids, (scores + router.bias).topk(2).indices), "the bias counts in the choice"
    assert not torch.equal(ids, scores.topk(2).indices)
    assert_close([weights], [probability.gather(1, ids)], 1e-5)  # and in nothing else


# --- experts ---


def test_a_gradient_in_any_layout_is_read_where_it_lies() -> None:
    """A transposed one is copied; the copy must outlive the call."""
    x, matrices = normal(70, 64).float().requires_grad_(), [normal(4, 64, 64, seed=s).float() / 8 for s in (1, 2)]
    ids, weights = torch.arange(70)[:, None] % 4, torch.ones(70, 1)
    y = routed_ffn(x, ids, weights, matrices[0], None, matrices[1], "silu", "fused")
    upstream = normal(64, 70, seed=3).to(y.dtype)
    got, want = (torch.autograd.grad(y, x, g, retain_graph=True) for g in (upstream.T, upstream.T.contiguous()))
    assert torch.equal(got[0], want[0])


# --- cross-entropy ---


def loss_and_gradients(rows: int, rank: int, pieces: int, dtype: torch.dtype) -> Results:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    h = normal(rows, rank, seed=10).to(wide).requires_grad_()
    table = normal(pieces, rank, seed=11).to(wide).requires_grad_()
    labels = torch.randint(pieces, (rows,), generator=torch.Generator().manual_seed(12))
    labels[::3] = IGNORE
    assert can_sum(h, table, dtype) == (dtype != torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        total = linear_cross_entropy(h, table, labels)
        with torch.no_grad():
            assert torch.equal(linear_cross_entropy(h, table, labels), total)
    return [total, *torch.autograd.grad(total, (h, table), torch.tensor(0.5, dtype=total.dtype))]


SIZES = [(1, 32, 4), (2, 32, 255), (511, 32, 256), (513, 64, 257), (1030, 32, 700), (0, 32, 9), (3, 96, 8300)]


@pytest.mark.parametrize(("rows", "rank", "pieces"), SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cross_entropy_equals_torchs(rows: int, rank: int, pieces: int, dtype: torch.dtype) -> None:
    want = loss_and_gradients(rows, rank, pieces, torch.float64)
    assert_close(loss_and_gradients(rows, rank, pieces, dtype), want, TOLERANCE[dtype])
    on_threads(lambda: loss_and_gradients(rows, rank, pieces, dtype))


def test_the_loss_of_a_label_alone_is_its_own() -> None:
    """A tile, a chunk and a pair further on, nothing of one row is in another's."""
    h, table = normal(600, 32).float(), normal(600, 32, seed=1).float()
    labels = torch.full((600,), IGNORE)
    for place, label in ((0, 0), (301, 299), (599, 599)):
        labels[:] = IGNORE
        labels[place] = label
        want = F.cross_entropy(h[place : place + 1] @ table.T, labels[place : place + 1])
        assert linear_cross_entropy(h, table, labels).item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    """Training ends on gradients that aren't finite: no kernel may hide them."""
    h, table = torch.randn(8, 32), torch.randn(40, 32)
    h[3, 5] = value
    assert not linear_cross_entropy(h, table, torch.zeros(8, dtype=torch.int64)).isfinite()
    total, normed = add_norm(None, h, torch.ones(32), EPS)
    assert not total[3].isfinite().all() and not normed[3].isfinite().all()
    ids, weights = torch.zeros(8, 1, dtype=torch.int64), torch.ones(8, 1)
    y = routed_ffn(h, ids, weights, torch.randn(2, 32, 32), None, torch.randn(2, 32, 32), "silu")
    assert not y[3].isfinite().all()


# --- building them ---


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and nothing remembered of what was built before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._load.cache_clear()
    yield tmp_path
    native._load.cache_clear()


def test_kernels_are_built_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.why_not(torch.float32) is None
    (built,) = (fresh / "moelet").iterdir()
    before = built.stat().st_mtime_ns
    native._load.cache_clear()
    assert native.why_not(torch.float32) is None and built.stat().st_mtime_ns == before
    assert native.why_not(torch.float64) == "there are none for torch.float64"


def test_a_library_that_is_none_is_built_again(fresh: Path) -> None:
    built = native.build(torch.float32)
    whole = built.read_bytes()
    built.unlink()  # not written over: it may be loaded
    built.write_bytes(b"no library")
    assert native.why_not(torch.float32) is None and built.stat().st_size == len(whole)


def test_a_home_that_cant_be_written_has_a_place_among_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same in each process; but never what somebody else may have put there."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = native._cache()
    assert own == native._cache() and own.parent == tmp_path and own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)
    assert native._cache() != own


def test_no_compiler_is_no_end(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert native.why_not(torch.float32) == "there is no C compiler (cc, gcc or clang)"
    total, _ = add_norm(None, torch.ones(2, 16), torch.ones(16), EPS)
    assert torch.equal(total, torch.ones(2, 16))


def test_a_compiler_that_fails_is_told(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = fresh / "cc"
    compiler.write_text("#!/bin/sh\necho 'cc: no room' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fresh}:/usr/bin:/bin")
    assert native.why_not(torch.bfloat16) == f"{compiler} fails: cc: no room"


def test_the_switch_turns_them_off(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.why_not(torch.float32) == "MOELET_NATIVE is 0"


def test_torch_computes_the_same(without_kernels: None) -> None:
    x, weight = normal(40, 32).float(), torch.ones(32)
    total, normed = add_norm(x, x, weight, EPS)
    torch.testing.assert_close(normed, F.rms_norm(2 * x, (32,), weight, EPS))
    assert torch.equal(total, 2 * x)
    assert torch.equal(dropout(x, 0.0), x)
