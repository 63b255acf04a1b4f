"""What this machine allows: the rate of every matrix product that a step needs, and of its memory.

The products are measured one by one, at the shapes of the settings, with inputs and outputs in place; their sum is a
time that no step made of them can beat. Nothing of our own code runs here.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelet.errors import UserError
from moelet.experts import GATED
from moelet.metrics import matrix_rate
from moelet.precision import DTYPES, choose_dtype
from moelet.sections import ModelSettings

PRODUCT_SECONDS, MIN_REPEATS = 0.1, 3
ATTENTION_BLOCKS = 4  # query blocks of a sequence: fewer make wide products and compute more of the masked half
HEAD_ROWS = (256, 1024, 4096)  # chunks of the vocabulary head: the fastest counts
MEMORY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # several times the caches


class Product(NamedTuple):
    """`batch` products (m, k) x (k, n), `times` of them in a forward pass; each has two more in the backward pass."""

    name: str
    times: float
    batch: int
    m: int
    n: int
    k: int
    wide: bool = False  # always in float32

    @property
    def flops(self) -> float:
        """Of all of them in a forward pass."""
        return 2 * self.times * self.batch * self.m * self.n * self.k


def step_products(settings: ModelSettings, vocab_size: int, batch_size: int) -> list[Product]:
    """Return the products of a step's forward pass; of several with one name the fastest counts.

    Attention as blocks of queries against half of the keys, which is their mean under a causal mask.
    """
    s, width, length = settings, settings.d_model, settings.max_length
    tokens, rank, layers = batch_size * length, settings.d_embed or settings.d_model, settings.n_layers
    block, keys = max(1, length // ATTENTION_BLOCKS), max(1, length // 2)
    blocks = layers * (length / block) * (length / 2 / keys)
    heads, head = batch_size * s.n_heads, s.head_width
    routed = tokens * s.top_k if s.n_experts > 1 else tokens
    rows = max(1, routed // s.n_experts)
    groups, ups = layers * routed / rows, 2 if s.activation in GATED else 1
    found = [
        Product("qkv", layers, 1, tokens, 3 * width, width),
        Product("scores", blocks, heads, block, keys, head),
        Product("values", blocks, heads, block, head, keys),
        Product("o", layers, 1, tokens, width, width),
        Product("experts up", groups * ups, 1, rows, s.expert_width, width),
        Product("experts down", groups, 1, rows, width, s.expert_width),
        *(Product("head", tokens / m, 1, m, vocab_size, rank) for m in sorted({min(r, tokens) for r in HEAD_ROWS})),
    ]
    if s.shared_expert:
        found.append(Product("shared expert up", layers * ups, 1, tokens, s.shared_expert, width))
        found.append(Product("shared expert down", layers, 1, tokens, width, s.shared_expert))
    if s.n_experts > 1:
        found.append(Product("router", layers, 1, tokens, s.n_experts, width, wide=True))
    if s.d_embed:
        found.append(Product("embedding", 1, 1, tokens, width, rank))
        found.append(Product("rank", 1, 1, tokens, rank, width))
    return found


def least_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the shortest time of `work` in PRODUCT_SECONDS after one run to warm up: a bound, not what is usual."""
    work()
    taken: list[float] = []
    while sum(taken) < PRODUCT_SECONDS or len(taken) < MIN_REPEATS:
        _finish(device)
        began = time.perf_counter()
        work()
        _finish(device)
        taken.append(time.perf_counter() - began)
    return min(taken)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_seconds(product: Product, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Return the seconds of one such product and of the two of its backward pass."""

    def tensor(rows: int, columns: int) -> Tensor:
        shape = (rows, columns) if product.batch == 1 else (product.batch, rows, columns)
        return torch.ones(shape, dtype=torch.float32 if product.wide else dtype, device=device)

    multiply: Any = torch.mm if product.batch == 1 else torch.bmm
    x, weight, y = tensor(product.m, product.k), tensor(product.n, product.k), tensor(product.m, product.n)
    dx, dw = torch.empty_like(x), torch.empty_like(weight)
    return {
        "forward": least_seconds(lambda: multiply(x, weight.mT, out=y), device),
        "dx": least_seconds(lambda: multiply(y, weight, out=dx), device),
        "dw": least_seconds(lambda: multiply(y.mT, x, out=dw), device),
    }


def step_bound(
    settings: ModelSettings, vocab_size: int, batch_size: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Return the rate of each product of a step, and the tokens a second that they allow together."""
    fastest: dict[str, dict[str, Any]] = {}
    for product in step_products(settings, vocab_size, batch_size):
        taken = product_seconds(product, dtype, device)
        rates = {way: product.flops / product.times / seconds / 1e9 for way, seconds in taken.items()}
        total = product.times * sum(taken.values())
        row = {**product._asdict(), "gflops": rates, "seconds": total}
        if product.name not in fastest or total < fastest[product.name]["seconds"]:
            fastest[product.name] = row
    seconds = sum(row["seconds"] for row in fastest.values())
    return {"products": list(fastest.values()), "tokens_per_second": batch_size * settings.max_length / seconds}


def memory_rates(device: torch.device) -> dict[str, float]:
    """Return GB/s of reading a large array, and of copying one: bytes read plus bytes written."""
    n_bytes = MEMORY_BYTES[device.type]
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    read = least_seconds(source.sum, device)
    copy = least_seconds(lambda: target.copy_(source), device)
    return {"read": n_bytes / read / 1e9, "copy": 2 * n_bytes / copy / 1e9}


def active_weights(settings: ModelSettings, vocab_size: int) -> int:
    """Return how many weights one new token reads: of the experts those it uses, of the input table next to none."""
    s, width, rank = settings, settings.d_model, settings.d_embed or settings.d_model
    used = s.top_k if s.n_experts > 1 else 1
    experts = (3 if s.activation in GATED else 2) * width * (used * s.expert_width + s.shared_expert)
    router = width * s.n_experts if s.n_experts > 1 else 0
    return s.n_layers * (4 * width**2 + experts + router) + (width * rank if s.d_embed else 0) + rank * vocab_size


def limits(
    settings: ModelSettings, vocab_size: int, batch_size: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Return all that is measured of the machine itself: matrix rates, memory rates, the step's bound.

    The matrix rates are those of our format and of those that peers may take: float32, and what the machine has.
    """
    formats = {torch.float32, choose_dtype("auto", device), dtype}
    with suppress(UserError):
        formats.add(choose_dtype("bf16", device))
    return {
        "precision": next(name for name, d in DTYPES.items() if d == dtype),
        "matrix_gflops": {name: matrix_rate(device, d) / 1e9 for name, d in DTYPES.items() if d in formats},
        "memory_gb_per_second": memory_rates(device),
        "step": step_bound(settings, vocab_size, batch_size, dtype, device),
    }


def higher(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the higher of two measurements of the same limits: what a machine did once, it can do."""
    best = {
        key: {name: max(rate, other[key][name]) for name, rate in one[key].items()}
        for key in ("matrix_gflops", "memory_gb_per_second")
    }
    return {**one, **best, "step": max(one["step"], other["step"], key=lambda step: step["tokens_per_second"])}


def decode_bound(settings: ModelSettings, vocab_size: int, dtype: torch.dtype, gb_per_second: float) -> float:
    """Return the tokens a second at which the active weights, in `dtype`, are read once a token."""
    return gb_per_second * 1e9 / (active_weights(settings, vocab_size) * dtype.itemsize)
