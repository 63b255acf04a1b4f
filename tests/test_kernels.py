"""Triton's kernels against plain torch: on CUDA with -m gpu, and everywhere in Triton's interpreter.

The interpreter has to be chosen before triton is imported, so its tests are a process of their own: the last test of
this file runs the others there. What it can't show, that the kernels compile for the cards, the compiler shows
without a card.
"""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import TinySettings
from test_experts import CASES, assert_close, make_case, run
from torch import Tensor

from moelet import experts
from moelet.data import Batch, collate
from moelet.hparams import Hparams, make_hparams
from moelet.kernels.sorted_rows import Rows, sort_by_expert
from moelet.state import build
from moelet.step import train_step
from moelet.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
# of the largest value; the interpreter cuts bf16 off where cards round it, which is twice the error
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 4e-2 if INTERPRETED else 2e-2}
WIDTHS = [(16, 16), (33, 17), (5, 40)]  # in and out
COUNTS = [[16, 0, 33, 1], [7]]  # rows of each expert
# the interpreter is slow, and knows the half formats by their tiles and rounding alone
SHAPES = [
    (width_in, width_out, counts, dtype)
    for width_in, width_out in WIDTHS
    for counts in COUNTS
    for dtype in TOLERANCE
    if not INTERPRETED or dtype == torch.float32 or (width_in, len(counts)) == (33, 4)
]
IN_INTERPRETER = 6 + 2  # of SHAPES

on_device = pytest.mark.gpu
needs_triton = pytest.mark.skipif(
    not INTERPRETED and CAPABILITY < experts.TRITON_CAPABILITY, reason="no CUDA device of capability 8.0 or newer"
)
needs_cuda = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Triton backend run on the CPU where it is interpreted."""
    if INTERPRETED:
        monkeypatch.setattr(experts, "why_not_triton", lambda x: None)


def make_rows(counts: list[int], tokens: int, block_rows: int) -> Rows:
    """Return rows with one choice a token, experts in a fixed disorder."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    return sort_by_expert(ids[order][:, None].to(DEVICE), len(counts), block_rows)


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> bool:
    return bool((got.double() - want.double()).abs().max() <= TOLERANCE[dtype] * want.abs().max().clamp(min=1e-30))


@on_device
@needs_triton
@pytest.mark.parametrize(("width_in", "width_out", "counts", "dtype"), SHAPES, ids=str)
def test_each_kernel_equals_plain_torch(width_in: int, width_out: int, counts: list[int], dtype: torch.dtype) -> None:
    from moelet.kernels.grouped_gemm import TRITON, choose_tile

    tokens = sum(counts)
    x, y = normal(tokens, width_in, dtype=dtype), normal(tokens, width_out, dtype=dtype)
    w = normal(len(counts), width_out, width_in, dtype=dtype)
    weights = normal(tokens, 1, dtype=torch.float32)
    rows = make_rows(counts, tokens, choose_tile(x).rows)
    parts = list(zip(x.double().split(counts), w.double(), strict=True))  # as if x were sorted
    assert close(TRITON.products(x, w, rows, False), torch.cat([part @ one.T for part, one in parts]), dtype)
    across = w.transpose(1, 2).contiguous().transpose(1, 2)  # the same matrices, stored the other way round
    assert torch.equal(TRITON.products(x, across, rows, False), TRITON.products(x, w, rows, False))
    gathered = TRITON.products(x, w, rows, True)
    assert torch.equal(gathered, TRITON.products(x[rows.token_N], w, rows, False))
    want = torch.stack([a.T @ b for a, b in zip(y.double().split(counts), x.double().split(counts), strict=True)])
    assert close(TRITON.outer_sums(y, x, rows, False, False), want, dtype)
    for a, b in ((True, False), (False, True)):
        left, right = y[rows.token_N] if a else y, x[rows.token_N] if b else x
        assert torch.equal(TRITON.outer_sums(y, x, rows, a, b), TRITON.outer_sums(left, right, rows, False, False))
    total = TRITON.sum_choices(y, rows, weights, torch.float32)
    assert close(total, y.double()[rows.slot_TK[:, 0]] * weights.double(), torch.float32)


@on_device
@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_triton_equals_the_reference(dtype: torch.dtype) -> None:
    """In the interpreter a few cases, of every kind and activation; on a card all."""
    few = range(0, 32, 3) if dtype == torch.float32 else range(1, 64, 21)
    for number in few if INTERPRETED else range(CASES):
        case = make_case(number)
        got = run(case, "triton", dtype, DEVICE)
        assert_close(got, run(case, "reference"), TOLERANCE[dtype], f"case {number} ({case.kind})")


@on_device
@needs_triton
def test_triton_gives_the_same_bits() -> None:
    for number in (0, 21) if INTERPRETED else range(CASES):
        first, second = (run(make_case(number), "triton", torch.float16, DEVICE) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@on_device
@needs_cuda
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["reference", "grouped", "batched", "auto"])
def test_backends_equal_the_reference_on_cuda(backend: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and CAPABILITY < (8, 0):
        pytest.skip("bf16 needs capability 8.0")
    for number in range(CASES):
        case = make_case(number)
        got = run(case, backend, dtype, "cuda")
        assert_close(got, run(case, "reference"), TOLERANCE[dtype], f"case {number} ({case.kind})")
        again = run(case, backend, dtype, "cuda")
        assert all(torch.equal(again[name], got[name]) for name in got)


@on_device
@needs_cuda
@pytest.mark.parametrize("backend", ["batched", "auto"])
def test_large_shapes_on_cuda(backend: str) -> None:
    """The reference layer on 4096 tokens, unevenly routed: full tiles, many blocks."""
    generator = torch.Generator().manual_seed(0)
    t, d, f, e = 4096, 512, 256, 8
    x, w_in, w_out = (torch.randn(*shape, generator=generator) for shape in ((t, d), (e, f, d), (e, d, f)))
    scores = torch.randn(t, e, generator=generator) + torch.linspace(0, 3, e)
    weights, ids = scores.softmax(-1).topk(2)
    half = torch.bfloat16 if CAPABILITY >= (8, 0) else torch.float16
    leaves = [tensor.to("cuda").requires_grad_() for tensor in (x, weights, w_in * d**-0.5, w_out * f**-0.5)]
    results = []
    for name, dtype in ((backend, half), ("reference", None)):
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            y = experts.routed_ffn(leaves[0], ids.cuda(), leaves[1], leaves[2], None, leaves[3], "silu", name)
        results.append([y, *torch.autograd.grad(y, leaves, y.detach().sign())])
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 2e-2 * want.norm()


@on_device
@needs_cuda
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
def test_a_short_training_on_cuda(
    precision: str, attention: str, tiny_settings: TinySettings, tokenizer: Tokenizer
) -> None:
    """It learns as the CPU does in float32."""
    if precision == "bf16" and CAPABILITY < (8, 0):
        pytest.skip("bf16 needs capability 8.0")
    losses = {}
    for device, chosen in (("cpu", "fp32"), ("cuda", precision)):
        changes = {"device": device, "precision": chosen, "train_steps": 20}
        hparams = make_hparams(tiny_settings(model={"attention": attention, "dropout": 0.0}, train=changes))
        losses[device] = train_on(hparams, tokenizer)
    assert losses["cuda"][0] == pytest.approx(losses["cpu"][0], rel=1e-2)
    assert losses["cuda"][-1] == pytest.approx(losses["cpu"][-1], rel=5e-2)
    assert losses["cuda"][-1] < losses["cuda"][0] - 1


def batch_of_text(tokenizer: Tokenizer) -> Batch:
    ids = tokenizer.encode((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    return collate([ids[start : start + 33] for start in range(0, 32 * 33, 33)], False)


def train_on(hparams: Hparams, tokenizer: Tokenizer) -> list[float]:
    """Return the losses of a run's steps, all on one batch; those that fp16 skipped are left out."""
    training, batch, losses = build(hparams, tokenizer), batch_of_text(tokenizer), []
    while training.step < hparams.train.train_steps:
        report = train_step(training, [batch])
        losses += [] if report.skipped else [report.loss]
    return losses


@on_device
@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("micro_steps", [1, 2])
def test_a_step_waits_once_on_cuda(
    precision: str, micro_steps: int, tiny_settings: TinySettings, tokenizer: Tokenizer
) -> None:
    """torch itself says so; tests/test_host_waits.py says it without a card."""
    if precision == "bf16" and CAPABILITY < (8, 0):
        pytest.skip("bf16 needs capability 8.0")
    hparams = make_hparams(tiny_settings(model={"attention": "sdpa"}, train={"device": "cuda", "precision": precision}))
    training, batch = build(hparams, tokenizer), batch_of_text(tokenizer)
    train_step(training, [batch] * micro_steps)  # the first compiles kernels and makes the optimizer's state
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            train_step(training, [batch] * micro_steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in seen if "synchronizing CUDA" in str(warning.message)]
    assert len(waits) == 1, [f"{warning.filename}:{warning.lineno}" for warning in waits]


# what each kernel is given in training, besides sizes: pointers to numbers, to int32 and to int64
NUMBERS, INT32, INT64 = ("x", "w", "y", "a", "b", "rows"), ("bounds", "block_expert", "block_row"), ("source", "slot")
SIZES = {
    "_product_kernel": {"E": 8, "OUT": 256, "IN": 512, "STRIDE_E": 131072, "STRIDE_OUT": 512, "STRIDE_IN": 1},
    "_outer_kernel": {"OUT": 256, "IN": 512, "GATHER_A": False, "GATHER_B": True},
    "_sum_kernel": {"K": 2, "WIDTH": 512, "WEIGHTED": True, "TOKENS": 4, "COLUMNS": 256},
}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("capability", "dtype"), [(80, "bf16"), (86, "fp16"), (90, "bf16"), (90, "fp16")])
@pytest.mark.parametrize("kernel", SIZES)
def test_kernels_compile_for_cards(kernel: str, capability: int, dtype: str) -> None:
    """Triton's compiler makes tensor-core code of the products for cards that needn't be there."""
    triton = pytest.importorskip("triton", reason="there is no triton for this system")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moelet.kernels import grouped_gemm

    function, tile = getattr(grouped_gemm, kernel), grouped_gemm.HALF
    kinds = {**dict.fromkeys(NUMBERS, f"*{dtype}"), **dict.fromkeys(INT32, "*i32"), **dict.fromkeys(INT64, "*i64")}
    kinds |= {"weights": "*fp32", "n_tokens": "i32"}
    sizes = {"GATHER": True, "WIDEN": False, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    sizes |= SIZES[kernel]
    names = function.arg_names
    signature = {name: kinds.get(name, "constexpr") for name in names}
    constants = {(place,): sizes[name] for place, name in enumerate(names) if name not in kinds}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in kinds}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    source = ASTSource(function, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= 99 * 1024  # of an 8.6 card, which has the least
    if kernel != "_sum_kernel":
        assert re.search(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"])


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_the_interpreter_agrees() -> None:
    pytest.importorskip("triton", reason="there is no triton for this system")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) == IN_INTERPRETER + len(TOLERANCE) + 1
