"""Muon turns matrices, and nothing else: against singular value decompositions, torch's AdamW, its own formula."""

import itertools

import pytest
import torch
from test_optim import tiny
from torch import Tensor, nn

from moelet import muon
from moelet.modelling import GPT
from moelet.muon import MOMENTUM, POLYNOMIALS, Muon, orthogonalize
from moelet.optim import ADAM_EPS, OPTIMIZERS
from moelet.sections import OptimSettings

FORMATS = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (1, 9), (8, 8), (16, 40), (48, 64)]
# what may stand inside a layer and belong to AdamW, and every part whose matrices are Muon's
MODERN = {"d_model": 24, "qk_norm": True, "shared_expert": 10, "embed_residual": True, "value_residual": True}
MODERN |= {"smear": True, "bigram_rows": 50, "activation": "swiglu", "tie_embeddings": False}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioned(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a matrix whose singular values are 1 to 1/20 of the largest, and the orthogonal one nearest to it."""
    u, _, v = torch.linalg.svd(normal(rows, columns, seed=seed).double(), full_matrices=False)
    values = torch.logspace(0, -1.3, min(rows, columns), dtype=torch.float64)
    return (u * values @ v).float(), (u @ v).float()


def one_group(*matrices: Tensor, lr: float = 0.1, decay: float = 0.0, turned: bool = True) -> Muon:
    group = {"params": list(matrices), "weight_decay": decay, "muon": turned}
    return Muon([group], lr, (0.9, 0.95), ADAM_EPS)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the products be in float32 on any machine."""
    monkeypatch.setattr(muon, "choose_dtype", lambda name, device: torch.float32)


# --- the orthogonal matrix ---


def test_the_polynomials_end_near_1_for_values_from_a_hundredth_on() -> None:
    values = torch.logspace(-2, 0, 2001, dtype=torch.float64)
    for a, b, c in POLYNOMIALS:
        values = a * values + b * values**3 + c * values**5
    assert (values - 1).abs().max() < 0.27


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_singular_values_come_near_1(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix, _ = conditioned(*shape)
    for scale in (1e-4, 1.0, 1e4):
        values = torch.linalg.svdvals(orthogonalize((scale * matrix)[None].to(dtype))[0].float())
        assert 0.7 < values.min() and values.max() < 1.3, f"{values.min():.3f} to {values.max():.3f} at {scale}"


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_singular_vectors_stay(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """In the bases of the given matrix the result is diagonal: u^T y v."""
    matrix, _ = conditioned(*shape)
    matrix = matrix.to(dtype)
    u, _, v = torch.linalg.svd(matrix.float(), full_matrices=False)
    found = u.T @ orthogonalize(matrix[None])[0].float() @ v.T
    beside = found - torch.diag(found.diagonal())
    assert beside.abs().max() < (1e-3 if dtype == torch.float32 else 0.1)
    assert found.diagonal().min() > 0.7


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_stack_is_each_matrix_alone(dtype: torch.dtype) -> None:
    """However different their sizes are: no matrix is scaled by another's norm."""
    stack = torch.stack([10.0**power * normal(12, 20, seed=power + 9) for power in (-3, 0, 4)]).to(dtype)
    for alone, together in zip(stack, orthogonalize(stack), strict=True):
        torch.testing.assert_close(together, orthogonalize(alone[None])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_no_gradient_is_no_turn(dtype: torch.dtype) -> None:
    assert not orthogonalize(torch.zeros(2, 3, 5, dtype=dtype)).any()


# --- a step ---


@pytest.mark.parametrize("shape", [(40, 16), (8, 8), (16, 40), (3, 40, 16), (3, 16, 40)], ids=str)
def test_steps_by_the_formula(exact: None, shape: tuple[int, ...]) -> None:
    """Momentum with Nesterov's look ahead, decay, sqrt(out / in) where that is above 1; each of a stack alone."""
    weight, rate, decay = nn.Parameter(normal(*shape)), 0.1, 0.5
    optimizer = one_group(weight, lr=rate, decay=decay)
    want, momentum = weight.detach().clone(), torch.zeros(shape)
    for step in range(3):
        weight.grad = normal(*shape, seed=step + 1)
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * weight.grad
        ahead = (MOMENTUM * momentum + (1 - MOMENTUM) * weight.grad).reshape(-1, *shape[-2:])
        tall = shape[-2] > shape[-1]
        turned = torch.stack([orthogonalize(m.T[None])[0].T if tall else orthogonalize(m[None])[0] for m in ahead])
        size = max(1.0, shape[-2] / shape[-1]) ** 0.5
        want = (1 - rate * decay) * want - rate * size * turned.reshape(shape)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), want, rtol=1e-5, atol=1e-5)


def test_every_third_step_a_matrix_moves_as_in_three(exact: None) -> None:
    """They take turns, keep the momentum of all gradients, and a group's step says whose turn it is."""
    matrices = [nn.Parameter(normal(16, 40, seed=k)) for k in range(4)]
    optimizer = one_group(*matrices, lr=0.1, decay=0.5)
    (group,) = optimizer.param_groups
    group["every"] = 3
    momentum = torch.zeros(16, 40)
    for step in range(5, 11):
        group["step"] = step
        before = [matrix.detach().clone() for matrix in matrices]
        gradient = normal(16, 40, seed=step)
        for matrix in matrices:
            matrix.grad = gradient.clone()
        optimizer.step()
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        turned = orthogonalize((MOMENTUM * momentum + (1 - MOMENTUM) * gradient)[None])[0]
        for k, (matrix, old) in enumerate(zip(matrices, before, strict=True)):
            moved = (k + step) % 3 == 0
            torch.testing.assert_close(matrix.detach(), 0.85 * old - 0.3 * turned if moved else old)


def test_the_first_step_is_the_nearest_orthogonal_matrix(exact: None) -> None:
    """Against the singular value decomposition itself, tall and flat."""
    for shape in ((12, 30), (30, 12)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad, want = conditioned(*shape)
        one_group(weight, lr=1.0).step()
        update = -weight.detach() / max(1.0, shape[0] / shape[1]) ** 0.5
        assert (update - want).norm() < 0.27 * want.norm()


def test_matrices_of_one_shape_lying_and_standing_do_not_mix(exact: None) -> None:
    weights = [nn.Parameter(torch.zeros(shape)) for shape in ((6, 10), (10, 6), (2, 6, 10), (6, 10), (7, 7))]
    for place, weight in enumerate(weights):
        weight.grad = normal(*weight.shape, seed=place)
    one_group(*weights).step()
    for weight in weights:
        alone = nn.Parameter(torch.zeros_like(weight))
        alone.grad = weight.grad
        one_group(alone).step()
        torch.testing.assert_close(weight.detach(), alone.detach(), rtol=1e-5, atol=1e-6)


def test_without_a_gradient_a_matrix_only_decays() -> None:
    still, left = nn.Parameter(normal(4, 6)), nn.Parameter(normal(4, 6))
    before = still.detach().clone()
    still.grad = torch.zeros(4, 6)
    one_group(still, left, decay=0.5).step()
    torch.testing.assert_close(still.detach(), 0.95 * before)
    assert torch.equal(left.detach(), before), "None is no gradient at all"


@pytest.mark.parametrize(
    ("device_takes", "products_are"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)],
    ids=str,
)
def test_products_are_never_in_fp16(
    monkeypatch: pytest.MonkeyPatch, device_takes: torch.dtype, products_are: torch.dtype
) -> None:
    seen: list[torch.dtype] = []

    def noting(matrices: Tensor) -> Tensor:
        seen.append(matrices.dtype)
        return orthogonalize(matrices)

    monkeypatch.setattr(muon, "choose_dtype", lambda name, device: device_takes)
    monkeypatch.setattr(muon, "orthogonalize", noting)
    weight = nn.Parameter(torch.zeros(4, 6))
    weight.grad = normal(4, 6)
    one_group(weight).step()
    assert seen == [products_are] and weight.dtype == torch.float32


# --- AdamW, and who gets which ---


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_other_groups_are_torchs_adamw_to_the_last_bit(decay: float) -> None:
    mine, theirs = ([nn.Parameter(normal(*shape)) for shape in ((5, 7), (9,), (2, 3, 4))] for _ in range(2))
    optimizer = one_group(*mine, lr=1e-2, decay=decay, turned=False)
    torchs = torch.optim.AdamW(theirs, 1e-2, (0.9, 0.95), ADAM_EPS, decay, fused=True)
    for step in range(4):
        for group in (*optimizer.param_groups, *torchs.param_groups):
            group["lr"] = 1e-2 / (step + 1)
        for place, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            one.grad = normal(*one.shape, seed=10 * step + place)
            other.grad = one.grad.clone()
        optimizer.step(), torchs.step()
        assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("changes", [{}, MODERN, {"n_experts": 1, "top_k": 1}, {"d_embed": None}], ids=str)
def test_muon_gets_the_matrices_of_layers_alone(changes: dict[str, object]) -> None:
    model = tiny(**changes)
    groups = OPTIMIZERS["muon"](model, OptimSettings(lr=1e-3, muon_lr=2e-2, router_lr=3e-3, embed_lr=4e-3)).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [names[parameter] for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(names.values()), "each once"
    turned = {names[p]: p for group in groups if group.get("muon") for p in group["params"]}
    want = {name for name in names.values() if name.startswith("layers.") and "_proj" in name}
    assert set(turned) == want
    assert all(parameter.ndim in (2, 3) for parameter in turned.values())
    for group in groups:
        for parameter in group["params"]:
            name = names[parameter]
            special = {"mlp.gate.weight": 3.0, "embed.tokens.weight": 4.0, "embed.positions.weight": 4.0,
                       "bigrams.table.weight": 4.0}  # fmt: skip
            scale = next((s for ending, s in special.items() if name.endswith(ending)), 20.0 if name in turned else 1.0)
            assert group["lr_scale"] == pytest.approx(scale), name
            kept = name in turned or name in ("embed.proj.weight", "lm_head.weight", "smear.gate.weight")
            assert group["weight_decay"] == (0.1 if kept else 0.0), name


def steps(model: GPT, name: str, scaler: torch.amp.GradScaler | None) -> list[dict[str, Tensor]]:
    """Return the weights after each of four steps, of which the second has a gradient that isn't finite."""
    optimizer, found = OPTIMIZERS[name](model, OptimSettings(lr=1e-2)), []
    for step in range(4):
        for place, parameter in enumerate(model.parameters()):
            parameter.grad = normal(*parameter.shape, seed=100 * step + place)
            if scaler is not None:
                parameter.grad *= scaler.scale(torch.ones(())).item()
        if step == 1:
            next(model.parameters()).grad[0, 0] = torch.inf
        if scaler is not None:
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        elif step != 1:
            optimizer.step()
        found.append({key: value.clone() for key, value in model.state_dict().items()})
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_scaler_unscales_and_skips(name: str) -> None:
    plain = steps(tiny(), name, None)
    scaled = steps(tiny(), name, torch.amp.GradScaler("cpu", init_scale=2.0**12))
    for mine, theirs in zip(scaled, plain, strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert all(torch.equal(scaled[0][key], scaled[1][key]) for key in scaled[0])
    for earlier, later in itertools.pairwise(scaled[1:]):
        assert not any(torch.equal(earlier[key], later[key]) for key in earlier)
