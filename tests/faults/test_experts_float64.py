"""The routed layer against loops over tokens in float64: any shape, experts without tokens, ties, poisoned memory."""

import math
import random
from typing import Any, NamedTuple

import pytest
import torch
from conftest import CPU_BACKENDS
from scorecard import Trials
from test_experts import poisoned_memory  # noqa: F401  a fixture
from torch import Tensor

from moelet.experts import ACTIVATIONS, GATED
from moelet.kernels.native import TILE_COLUMNS
from moelet.moe import MoE, RouterStats
from moelet.sections import ModelSettings

KINDS = ("any", "idle experts", "all to one", "one token", "K = 1", "K = E", "no token")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}
FREE = (torch.float64, torch.float32, torch.bfloat16)  # of any widths
FAR = 50.0  # a bias that decides alone


class Layer(NamedTuple):
    kind: str
    settings: ModelSettings
    moe: MoE  # float64
    x: Tensor
    real: Tensor | None
    bias: Tensor
    upstream: Tensor


def make_layer(draw: random.Random, kind: str, backend: str) -> Layer:
    """Return a layer whose scores are exact in every format: small multiples of 1/32, so that there are true ties."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    unit = TILE_COLUMNS if backend == "fused" else 1
    n_experts = draw.randint(2, 12)
    top_k = {"K = 1": 1, "K = E": n_experts, "all to one": 1}.get(kind, draw.randint(1, n_experts))
    n_tokens = {"one token": 1, "no token": 0}.get(kind, draw.randint(2, 60))
    width, hidden = unit * draw.randint(1, 2 if unit > 1 else 12), unit * draw.randint(1, 2 if unit > 1 else 12)
    settings = ModelSettings(
        d_model=width, n_heads=1, d_ff=n_experts * hidden, n_experts=n_experts, top_k=top_k, selection_bias=True,
        activation=draw.choice(list(ACTIVATIONS)), normalize_top_k=draw.random() < 0.5, experts=backend,
        shared_expert=draw.choice([0, 3]),
    )  # fmt: skip
    moe = MoE(settings).double()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).bfloat16())
        moe.gate.weight.copy_(torch.randint(-3, 4, moe.gate.weight.shape, generator=generator) / 16)
    bias = torch.zeros(n_experts)
    if kind == "idle experts":
        bias[draw.sample(range(n_experts), n_experts - top_k)] = -FAR
    if kind == "all to one":
        bias[draw.randrange(n_experts)] = FAR
    x = torch.randint(-2, 3, (n_tokens, width), generator=generator) / 2
    real = torch.rand(n_tokens, generator=generator) < 0.7 if draw.random() < 0.4 else None
    return Layer(
        kind, settings, moe, x.double(), real, bias, torch.randn(n_tokens, width, generator=generator).double()
    )


def activation(name: str, value: Tensor) -> Tensor:
    if name == "gelu":
        return 0.5 * value * (1 + torch.erf(value / math.sqrt(2)))
    return value.clamp(min=0) ** 2 if name == "relu2" else value / (1 + torch.exp(-value))


def feed_forward(name: str, x: Tensor, up: Tensor, gate: Tensor | None, down: Tensor) -> Tensor:
    hidden = up @ x
    return down @ (activation(name, hidden) if gate is None else activation(name, gate @ x) * hidden)


def by_loops(layer: Layer, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output and the statistics by their definitions, a token after the other."""
    moe, s, rows = layer.moe, layer.settings, []
    sums = {name: torch.zeros(s.n_experts, dtype=torch.float64) for name in ("probability", "assignments")}
    sums |= {name: torch.zeros((), dtype=torch.float64) for name in ("tokens", "squares", "entropy", "largest")}
    for token, vector in enumerate(x):
        scores = moe.gate.weight @ vector
        probability = scores.exp() / scores.exp().sum()
        ranked = [
            (-(score + bias), e)
            for e, (score, bias) in enumerate(zip(scores.tolist(), layer.bias.tolist(), strict=True))
        ]
        chosen = [e for _, e in sorted(ranked)[: s.top_k]]
        total = sum(probability[e] for e in chosen) if s.normalize_top_k else 1.0
        out = torch.zeros_like(vector)
        for e in chosen:
            gate = moe.experts.gate_proj[e] if moe.experts.gate_proj is not None else None
            made = feed_forward(s.activation, vector, moe.experts.up_proj[e], gate, moe.experts.down_proj[e])
            out = out + probability[e] / total * made
        if (shared := moe.shared_expert) is not None:
            gate = shared.gate_proj.weight if s.activation in GATED else None
            out = out + feed_forward(s.activation, vector, shared.up_proj.weight, gate, shared.down_proj.weight)
        rows.append(out)
        if layer.real is None or layer.real[token]:
            sums["probability"] = sums["probability"] + probability
            sums["assignments"][chosen] += 1
            sums["tokens"] += 1
            sums["squares"] = sums["squares"] + scores.exp().sum().log() ** 2
            sums["entropy"] = sums["entropy"] - (probability * probability.log()).sum()
            sums["largest"] = sums["largest"].maximum(scores.abs().max())
    return torch.stack(rows) if rows else torch.zeros_like(x), sums


def objective(layer: Layer, y: Tensor, stats: dict[str, Tensor]) -> Tensor:
    """A scalar whose gradient passes through the output, the balance loss's probabilities and the z-loss's squares."""
    slope = torch.linspace(-1, 1, layer.settings.n_experts, dtype=torch.float64)
    balance = (stats["probability"].double() * slope).sum() + 0.1 * stats["squares"].double()
    return (y.double() * layer.upstream).sum() + balance


def compute(layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what the layer itself makes in `dtype`: output, statistics, and all gradients, in float64."""
    half = dtype == torch.bfloat16
    wide = torch.float32 if half else dtype
    moe = MoE(layer.settings).to(wide)
    moe.load_state_dict({name: value.to(wide) for name, value in layer.moe.state_dict().items()})
    moe.gate.bias = layer.bias.to(wide)
    x = layer.x.to(wide).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        y, stats = moe(x, layer.real)
    return _all_of(layer, y, stats._asdict(), x, dict(moe.named_parameters()))


def _all_of(
    layer: Layer, y: Tensor, stats: dict[str, Tensor], x: Tensor, parameters: dict[str, Any]
) -> dict[str, Tensor]:
    leaves, value = {"x": x, **parameters}, objective(layer, y, stats)
    wanted = list(leaves.values())
    found = torch.autograd.grad(value, wanted, allow_unused=True) if value.requires_grad else [None] * len(wanted)
    slopes = {
        f"gradient of {name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
    return {n: v.detach().double() for n, v in {"y": y, **stats, **slopes}.items()}


def check_layer(layer: Layer, dtype: torch.dtype) -> None:
    x = layer.x.clone().requires_grad_()
    y, stats = by_loops(layer, x)
    want, got = _all_of(layer, y, stats, x, dict(layer.moe.named_parameters())), compute(layer, dtype)
    assert set(RouterStats._fields) < set(got)
    for name, value in want.items():
        assert bool(got[name].isfinite().all()), f"{name} isn't finite"
        if value.numel():
            error, size = (got[name] - value).abs().max().item(), value.abs().max().item()
            if name == "gradient of gate.weight" and len(
                x
            ):  # what is summed there may cancel, to 0 for a sole weight of 1
                size = max(size, ((want["y"] * layer.upstream).sum(1).abs().max() * layer.x.abs().max()).item())
            if dtype == torch.bfloat16:  # few numbers of 8 bits may cancel: by norms, each within 5%, all within 2%
                error, size = (got[name] - value).norm().item(), 2.5 * max(size, value.norm().item())
            assert error <= TOLERANCE[dtype] * size, f"{name} is off by {error:.1e} of {size:.1e}"
    if dtype == torch.bfloat16:
        off, whole = (
            torch.cat([v.flatten() for v in tensors.values()]).norm() for tensors in (differ(got, want), want)
        )
        assert off <= TOLERANCE[dtype] * whole
    assert torch.equal(got["assignments"], want["assignments"]), "ties go to the lowest id"
    used = chosen_experts(layer)
    idle = [e for e in range(layer.settings.n_experts) if e not in used]
    for name in ("up_proj", "gate_proj", "down_proj"):
        gradient = got.get(f"gradient of experts.{name}")
        assert gradient is None or not gradient[idle].any(), f"{name} of experts without a token has a gradient"


def differ(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: got[name] - value for name, value in want.items()}


def chosen_experts(layer: Layer) -> set[int]:
    """Return the experts that any token uses, padding included."""
    everybody = layer._replace(real=None)
    return set(by_loops(everybody, layer.x)[1]["assignments"].nonzero().flatten().tolist())


@pytest.mark.check(18)
@pytest.mark.usefixtures("poisoned_memory")
def test_any_shape_of_experts(trials: Trials) -> None:
    """Output, statistics and all gradients equal loops over tokens in float64; fresh memory holds NaN meanwhile."""
    for index in range(trials.count(small=14, full=200)):
        kind = KINDS[index % len(KINDS)]
        backend = CPU_BACKENDS[index // len(KINDS) % len(CPU_BACKENDS)]
        layer = make_layer(trials.random, kind, backend)
        for dtype in FREE[1:] if backend == "fused" else FREE:
            with trials.one(f"{index}: {kind}, {backend}, {dtype}"):
                check_layer(layer, dtype)
