"""Every way to compute the experts equals the reference, outputs and gradients; the reference equals plain loops."""

import ast
import functools
import inspect
import math
import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU_BACKENDS, HAVE_KERNELS, needs_kernels
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moelet import experts
from moelet.errors import UserError
from moelet.experts import ACTIVATIONS, GATED, routed_ffn
from moelet.kernels import native, sorted_rows
from moelet.kernels.sorted_rows import sort_by_expert

# of the largest reference value
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
KINDS = ("any", "empty experts", "all to one", "ties", "K = 1", "K = E", "T = 0", "T = 1")
CASES = 200
STEP = native.TILE_COLUMNS
PLAIN = [backend for backend in CPU_BACKENDS if backend != "fused"]  # of any widths, in any precision
# backend, what divides its widths, and precision
RUNS = [(backend, 1, dtype) for backend in PLAIN for dtype in TOLERANCE] + [
    ("fused", STEP, dtype) for dtype in (torch.float32, torch.bfloat16) if HAVE_KERNELS
]


class Case(NamedTuple):
    """The arguments of `routed_ffn`, float64, without requires_grad; `upstream` is the gradient of the output."""

    kind: str
    activation: str
    x: Tensor
    ids: Tensor
    weights: Tensor
    w_in: Tensor
    w_gate: Tensor | None
    w_out: Tensor
    upstream: Tensor


@functools.cache
def make_case(number: int, step: int = 1) -> Case:
    """Return case `number`: numbers that bfloat16 holds exactly, so that every precision gets the same ones.

    `step` divides the widths D and F.
    """
    draw, generator = random.Random(number), torch.Generator().manual_seed(number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().double()

    kind = KINDS[number % len(KINDS)]
    activation = list(ACTIVATIONS)[number // len(KINDS) % len(ACTIVATIONS)]
    widest = max(3, 16 // step)
    d, f, e = step * draw.randint(1, widest), step * draw.randint(1, widest), draw.randint(1, 16)
    t = {"T = 0": 0, "T = 1": 1}.get(kind, draw.randint(0, 70))
    k = {"K = 1": 1, "K = E": e}.get(kind, draw.randint(1, e))
    allowed = max(k, e // 2) if kind == "empty experts" else k if kind == "all to one" else e
    experts_in_use = draw.sample(range(e), allowed)
    ids = torch.tensor([draw.sample(experts_in_use, k) for _ in range(t)], dtype=torch.int64).view(t, k)
    weights = torch.rand(t, k, generator=generator).bfloat16().double()
    if kind == "ties":
        weights = torch.full_like(weights, 0.25)
    w_gate = normal(e, f, d) if activation in GATED else None
    x, w_in, w_out = normal(t, d), normal(e, f, d), normal(e, d, f)
    return Case(kind, activation, x, ids, weights, w_in, w_gate, w_out, normal(t, d))


def run(case: Case, backend: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Tensor]:
    """Return the output and every gradient, float64, computed in `dtype`; the half formats mean under autocast."""
    half = dtype in (torch.bfloat16, torch.float16)
    wide = torch.float32 if half else dtype
    tensors = {name: getattr(case, name) for name in ("x", "weights", "w_in", "w_gate", "w_out")}
    leaves = {n: t.to(device, wide, copy=True).requires_grad_() for n, t in tensors.items() if t is not None}
    gate, ids = leaves.get("w_gate"), case.ids.to(device)
    with torch.autocast(device, dtype if half else None, enabled=half):
        y = routed_ffn(
            leaves["x"], ids, leaves["weights"], leaves["w_in"], gate, leaves["w_out"], case.activation, backend
        )
    assert y.dtype == dtype
    gradients = torch.autograd.grad(y, list(leaves.values()), case.upstream.to(device, dtype))
    return {"y": y.detach().cpu().double()} | {n: g.cpu().double() for n, g in zip(leaves, gradients, strict=True)}


@functools.cache
def expected(number: int, step: int = 1) -> dict[str, Tensor]:
    """Return the reference's output and gradients of a case."""
    return run(make_case(number, step), "reference")


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, about: str) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape
        if value.numel():
            error = (got[name] - value).abs().max().item()
            assert error <= tolerance * value.abs().max().item(), f"{about}: {name} is off by {error:.2e}"


@pytest.mark.parametrize(("backend", "step", "dtype"), RUNS, ids=str)
def test_backends_equal_the_reference(backend: str, step: int, dtype: torch.dtype) -> None:
    for number in range(0, CASES, 3 if dtype == torch.float16 else 1):  # CPUs are slow at it
        case = make_case(number, step)
        assert_close(
            run(case, backend, dtype), expected(number, step), TOLERANCE[dtype], f"case {number} ({case.kind})"
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("step", [1, STEP])
def test_auto_is_the_kernel_where_it_can_compute_and_else_grouped(step: int, dtype: torch.dtype) -> None:
    fused = HAVE_KERNELS and step == STEP and dtype in (torch.float32, torch.bfloat16)
    for number in range(0, CASES, 9):  # of every kind and activation
        case = make_case(number, step)
        got, want = run(case, "auto", dtype), run(case, "fused" if fused else "grouped", dtype)
        assert all(torch.equal(got[name], want[name]) for name in want), f"case {number} ({case.kind})"


def test_cases_are_what_they_say() -> None:
    cases = [make_case(number) for number in range(CASES)]
    assert {case.activation for case in cases} == set(ACTIVATIONS)
    assert all(len(set(row)) == len(row) for case in cases for row in case.ids.tolist())
    unused = [len(case.w_in) - len(case.ids.unique()) for case in cases if case.kind == "empty experts"]
    assert sum(count > 0 for count in unused) > CASES // len(KINDS) // 2
    assert any(case.kind == "all to one" and case.ids.shape[1] == 1 and len(case.ids) > 9 for case in cases)


def plain_activation(name: str, value: float) -> float:
    if name == "gelu":
        return 0.5 * value * (1 + math.erf(value / math.sqrt(2)))
    return max(value, 0.0) ** 2 if name == "relu2" else value / (1 + math.exp(-value))


def plain_loops(case: Case) -> list[list[float]]:
    """Return the output by the definition, one number at a time."""
    x, w_in, w_out = case.x.tolist(), case.w_in.tolist(), case.w_out.tolist()
    result = [[0.0] * case.x.shape[1] for _ in x]
    for token, ids in enumerate(case.ids.tolist()):
        for choice, expert in enumerate(ids):
            for unit, row in enumerate(w_in[expert]):
                hidden = sum(a * b for a, b in zip(row, x[token], strict=True))
                if case.w_gate is None:
                    hidden = plain_activation(case.activation, hidden)
                else:
                    gate_row = case.w_gate[expert, unit].tolist()
                    gate = sum(a * b for a, b in zip(gate_row, x[token], strict=True))
                    hidden *= plain_activation(case.activation, gate)
                for place in range(len(x[token])):
                    part = w_out[expert][place][unit] * hidden
                    result[token][place] += case.weights[token, choice].item() * part
    return result


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_equals_plain_loops(activation: str) -> None:
    numbers = [n for n in range(CASES) if (c := make_case(n)).activation == activation and 1 <= len(c.x) <= 25]
    assert len(numbers) >= 4
    for number in numbers[:4]:
        case = make_case(number)
        want = torch.tensor(plain_loops(case), dtype=torch.float64)
        got = run(case, "reference")["y"]
        assert (got - want).abs().max() <= 1e-12 * want.abs().max()


@pytest.mark.parametrize("backend", [*PLAIN, "auto"])
def test_all_experts_are_the_dense_mixture(backend: str) -> None:
    cases = (make_case(number) for number in range(CASES))
    case = next(c for c in cases if (c.kind, c.activation) == ("K = E", "gelu") and len(c.x) > 9)
    weight_of = torch.zeros(case.weights.shape, dtype=torch.float64).scatter(1, case.ids, case.weights)
    hidden = F.gelu(torch.einsum("td,efd->tef", case.x, case.w_in))
    want = torch.einsum("te,tef,edf->td", weight_of, hidden, case.w_out)
    torch.testing.assert_close(run(case, backend)["y"], want, rtol=1e-11, atol=1e-11)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN, so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize(("backend", "step", "dtype"), RUNS, ids=str)
def test_an_expert_without_tokens_has_zero_gradient(
    backend: str, step: int, dtype: torch.dtype, poisoned_memory: None
) -> None:
    assert torch.empty(3).isnan().all()
    checked = 0
    for number in range(CASES):
        case = make_case(number, step)
        result = run(case, backend, dtype)
        assert all(value.isfinite().all() for value in result.values())
        idle = [expert for expert in range(len(case.w_in)) if not (case.ids == expert).any()]
        checked += len(idle)
        for name in {"w_in", "w_gate", "w_out"} & result.keys():
            assert not result[name][idle].any(), f"case {number}: {name} of experts {idle}"
    assert checked > CASES


@pytest.mark.parametrize("activation", ["silu", "gelu", "swiglu"])  # relu2 has a kink in its slope
def test_gradcheck(activation: str) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(5, 3), (5, 2), (4, 2, 3), (4, 2, 3), (4, 3, 2)]
    x, weights, w_in, w_gate, w_out = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    )
    ids = torch.tensor([[0, 1], [1, 0], [3, 1], [0, 3], [1, 3]])  # nothing for expert 2
    gate = w_gate if activation in GATED else None
    inputs = [tensor for tensor in (x, weights, w_in, gate, w_out) if tensor is not None]

    def compute(*_: Tensor) -> Tensor:
        return routed_ffn(x, ids, weights, w_in, gate, w_out, activation, "grouped")

    assert torch.autograd.gradcheck(compute, inputs, atol=1e-7, rtol=1e-6)


def test_bf16_rows_are_summed_in_float32() -> None:
    rows = torch.tensor([[256.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)  # in bfloat16, 256 + 1 is 256
    places = sort_by_expert(torch.tensor([[0, 1, 2, 3]]), 4, 1)
    assert sorted_rows.GROUPED.sum_choices(rows, places, None, torch.float32).item() == 259.0
    x, w = torch.ones(1, 1), torch.ones(4, 1, 1)
    weights = torch.tensor([[256.0, 1.0, 1.0, 1.0]])
    with torch.autocast("cpu", torch.bfloat16):
        y = routed_ffn(x, torch.tensor([[0, 1, 2, 3]]), weights, w, None, w, "relu2", "grouped")
    assert y.item() == 260.0  # 259, rounded to bfloat16 once; rounded after every addition it would be 256


@pytest.mark.parametrize(("backend", "step", "dtype"), RUNS, ids=str)
def test_the_same_inputs_give_the_same_bits(backend: str, step: int, dtype: torch.dtype) -> None:
    for number in range(0, CASES, 5):
        first, second = (run(make_case(number, step), backend, dtype) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", PLAIN)
def test_a_single_numbers_place(backend: str) -> None:
    """A worked example: token 0 goes to expert 1 with 0.5, token 1 to experts 0 and 1."""
    x = torch.tensor([[1.0], [2.0]])
    w_in, w_out = torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[[10.0]], [[100.0]]])
    ids, weights = torch.tensor([[1, 0], [0, 1]]), torch.tensor([[0.5, 0.0], [1.0, 2.0]])
    y = routed_ffn(x, ids, weights, w_in, None, w_out, "relu2", backend)
    assert y.tolist() == [[0.5 * 100 * 9], [10 * 4 + 2 * 100 * 36]]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_gives_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    for number in range(0, CASES, 20):
        results = []
        for torch_threads in (1, 3):
            torch.set_num_threads(torch_threads)
            results.append(run(make_case(number, STEP), "fused", dtype))
        torch.set_num_threads(threads)
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@needs_kernels
def test_the_kernel_refuses_what_it_cannot_compute() -> None:
    case = make_case(0)
    tensors = (case.x.float(), case.ids, case.weights.float(), case.w_in.float(), None, case.w_out.float())
    with pytest.raises(UserError, match=r'model\.experts is "fused".*multiples of 32'):
        routed_ffn(*tensors, "silu", "fused")


def test_unknown_names_are_refused() -> None:
    case = make_case(0)
    arguments = (case.x, case.ids, case.weights, case.w_in, case.w_gate, case.w_out)
    with pytest.raises(UserError, match=r"model\.experts is 'groped'.*Did you mean 'grouped'"):
        routed_ffn(*arguments, case.activation, "groped")
    with pytest.raises(UserError, match=r"model\.activation is 'sillu'"):
        routed_ffn(*arguments, "sillu")


def test_nothing_is_scattered_by_addition() -> None:
    """Adding floats at repeated places gives other bits on every run on a GPU."""
    source = inspect.getsource(experts) + inspect.getsource(sorted_rows)
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = {node.func.attr for node in calls if isinstance(node.func, ast.Attribute)}
    assert "index_select" in names
    assert not names & {"index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"}
    assert not names & {"index_put", "index_put_", "put_", "index_reduce", "index_reduce_"}


@pytest.mark.parametrize(
    ("capability", "dtype", "there", "reason"),
    [
        ((9, 0), torch.bfloat16, True, None),
        ((8, 0), torch.float32, True, None),
        ((7, 5), torch.float16, True, "capability is 7.5"),
        ((9, 0), torch.float64, True, "float64"),
        ((9, 0), torch.bfloat16, False, "no package triton"),
    ],
)
def test_triton_is_for_cards_it_has_tensor_cores_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, there: bool, reason: str | None
) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, dtype=dtype, device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(experts, "_triton_there", lambda: there)
    monkeypatch.setattr(experts, "batched", lambda *_: "batched")
    monkeypatch.setattr(experts, "triton", lambda *_: "triton")
    assert experts.auto(x) == ("triton" if reason is None else "batched")
    found = experts.why_not_triton(x)
    assert found is None if reason is None else reason in str(found)


def test_triton_is_refused_on_a_cpu() -> None:
    case = make_case(0)
    with pytest.raises(UserError, match=r'model\.experts is "triton" and .* cpu device.*Set model\.experts to "auto"'):
        run(case, "triton", torch.float32)
