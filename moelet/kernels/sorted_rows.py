"""The routed feed-forward network over rows sorted by expert, with shapes that don't depend on the routing.

Which rows an expert has stays on the device, so that the host never waits for it: blocks of rows of one expert are
listed in a map of static size, ceil(N / rows of a block) + E blocks, of which the surplus stands for nothing. How the
products are computed comes as `Kernels`: those of this file are batched products of the matrix library, which need
whole blocks, for any device, and for a CPU, where nobody waits, a product an expert, which need none;
`moelet.kernels.grouped_gemm` has Triton's. The activation comes as a function.

Shapes: T tokens, D model, E experts, F expert hidden, K chosen per token, N routed rows: T*K, or more where blocks are
padded; I and O the widths of a product's input and output.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BATCHED_ROWS = (16, 1024)  # the fewest and the most of a block
BLOCKS_PER_EXPERT = 8  # when balanced; so padding is up to an eighth of the rows, and a matrix is copied 9 times


class Rows(NamedTuple):
    """Rows in expert order, and the blocks they are computed in, all on the device."""

    choice_N: Tensor  # row n is choice choice_N[n] of the flattened (T, K); T*K where it is padding
    token_N: Tensor  # and belongs to this token; any where it is padding
    slot_TK: Tensor  # where the K rows of each token stand
    bounds: Tensor  # (E + 1,) int32: before padding, expert e has rows bounds[e] to bounds[e + 1]
    block_expert: Tensor  # (blocks,) int32; E for a block without rows
    block_row: Tensor  # (blocks,) int32: before padding, the first row of each block


class Kernels(NamedTuple):
    """One way to compute the products."""

    block_rows: Callable[[Tensor, int, int], int]  # of x, T*K and E
    products: Callable[[Tensor, Tensor, Rows, bool], Tensor]
    outer_sums: Callable[[Tensor, Tensor, Rows, bool, bool], Tensor]
    sum_choices: Callable[[Tensor, Rows, Tensor | None, torch.dtype], Tensor]
    padded: bool  # whether blocks must be whole


def sort_by_expert(ids_TK: Tensor, n_experts: int, block_rows: int) -> Rows:
    """Return the choices in expert order, without padding, in blocks of up to `block_rows` rows of one expert.

    With block_rows = 4, counts 5, 0, 3 give blocks (expert 0, row 0), (0, 4), (2, 5), and then blocks of expert 3,
    which isn't there.
    """
    n_rows, device = ids_TK.numel(), ids_TK.device
    sorted_N, choice_N = torch.sort(ids_TK.flatten().int(), stable=True)  # 32 bits halve the passes of a radix sort
    slot_N = torch.empty_like(choice_N).scatter_(0, choice_N, torch.arange(n_rows, device=device))
    edges = torch.arange(n_experts + 1, device=device, dtype=torch.int32)
    bounds = torch.searchsorted(sorted_N, edges, out_int32=True)
    ends = ((bounds.diff() + (block_rows - 1)) // block_rows).cumsum(0)  # of each expert's blocks
    block = torch.arange(-(-n_rows // block_rows) + n_experts if n_rows else 0, device=device)
    block_expert = torch.searchsorted(ends, block, right=True, out_int32=True)
    first_block = F.pad(ends, (1, 0))[block_expert]  # of the same expert
    block_row = bounds[block_expert] + (block - first_block).int() * block_rows
    return Rows(choice_N, choice_N // ids_TK.shape[1], slot_N.view_as(ids_TK), bounds, block_expert, block_row)


def pad_blocks(rows: Rows, block_rows: int) -> Rows:
    """Return `rows` with every block whole: the rest of its expert's last block, and blocks of no expert, are padding.

    With block_rows = 4, counts 5, 0, 3 give rows 0123 4... 567. and then padding alone.
    """
    n_choices, (n_tokens, top_k) = rows.choice_N.shape[0], rows.slot_TK.shape
    row = rows.block_row[:, None] + torch.arange(block_rows, device=rows.block_row.device)
    end = rows.bounds[(rows.block_expert + 1).clamp(max=rows.bounds.shape[0] - 1)]
    row = row.where(row < end[:, None], n_choices).flatten()
    choice_N = F.pad(rows.choice_N, (0, 1), value=n_choices)[row]
    place = torch.arange(choice_N.shape[0], device=row.device)
    slot = choice_N.new_empty(n_choices + 1).scatter_(0, choice_N, place)  # all padding goes to the last, nobody's
    token_N = (choice_N // top_k).clamp(max=n_tokens - 1)
    return rows._replace(choice_N=choice_N, token_N=token_N, slot_TK=slot[:-1].view_as(rows.slot_TK))


class _ExpertMLP(torch.autograd.Function):
    """y_t = sum_k weight_tk * W_out act(W_in x_t); keeps x and what enters the activation, N x I numbers.

    The outputs of the experts aren't kept: with G the gradient of y, that of a weight is G_t . (W_out h) =
    (W_out^T G_t) . h, whose first factor the gradient of h needs anyway.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        w_in_EID: Tensor,
        w_out_EDF: Tensor,
        rows: Rows,
        activate: Callable[[Tensor], Tensor],
        kernels: Kernels,
    ) -> Tensor:
        before_NI = kernels.products(x_TD, w_in_EID, rows, True)
        out_ND = kernels.products(activate(before_NI), w_out_EDF, rows, False)
        ctx.activate, ctx.kernels = activate, kernels
        ctx.save_for_backward(x_TD, weights_TK, w_in_EID, w_out_EDF, before_NI, *rows)
        return kernels.sum_choices(out_ND, rows, weights_TK, weights_TK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, w_in_EID, w_out_EDF, before_NI, *saved = ctx.saved_tensors
        rows, kernels, dtype = Rows(*saved), ctx.kernels, x_TD.dtype
        grad_TD = grad_TD.to(dtype)
        weight_N1 = F.pad(weights_TK.flatten(), (0, 1))[rows.choice_N, None]  # padding weighs nothing
        back_NF = kernels.products(grad_TD, w_out_EDF.transpose(1, 2), rows, True)
        with torch.enable_grad():
            before_NI = before_NI.detach().requires_grad_()
            hidden_NF = ctx.activate(before_NI)
        (grad_before_NI,) = torch.autograd.grad(hidden_NF, before_NI, (back_NF * weight_N1).to(dtype))
        hidden_NF = hidden_NF.detach().to(weights_TK.dtype)
        grad_weight_N = (back_NF * hidden_NF).sum(1)
        grad_out_EDF = kernels.outer_sums(grad_TD, (hidden_NF * weight_N1).to(dtype), rows, True, False)
        grad_in_EID = kernels.outer_sums(grad_before_NI, x_TD, rows, False, True)
        grad_rows_ND = kernels.products(grad_before_NI, w_in_EID.transpose(1, 2), rows, False)
        grad_x_TD = kernels.sum_choices(grad_rows_ND, rows, None, dtype)
        return grad_x_TD, grad_weight_N[rows.slot_TK], grad_in_EID, grad_out_EDF, None, None, None


def expert_mlp(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w_in_EID: Tensor,
    w_out_EDF: Tensor,
    activate: Callable[[Tensor], Tensor],
    kernels: Kernels,
) -> Tensor:
    """Return each token's weighted sum of its experts' outputs, (T, D), in the weights' dtype.

    `activate` maps (N, I) to (N, F): I is F, or 2F where half of it is a gate. x and the matrices are of one format.
    """
    block_rows = kernels.block_rows(x_TD, ids_TK.numel(), w_in_EID.shape[0])
    rows = sort_by_expert(ids_TK, w_in_EID.shape[0], block_rows)
    if kernels.padded:
        rows = pad_blocks(rows, block_rows)
    y_TD: Tensor = _ExpertMLP.apply(x_TD, weights_TK, w_in_EID, w_out_EDF, rows, activate, kernels)
    return y_TD


def _batched_block_rows(x_TD: Tensor, n_rows: int, n_experts: int) -> int:
    """Return a power of two near N / 8E: large enough to copy few matrices, small enough to pad little."""
    least, most = BATCHED_ROWS
    return min(max(1 << (n_rows // (BLOCKS_PER_EXPERT * n_experts)).bit_length() >> 1, least), most)


def _batched_products(x: Tensor, w_EOI: Tensor, rows: Rows, gather: bool) -> Tensor:
    """Return each row times its expert's matrix: one product a block, with a copy of the matrix each."""
    x_NI = x.index_select(0, rows.token_N) if gather else x
    matrices = w_EOI.index_select(0, rows.block_expert.clamp(max=w_EOI.shape[0] - 1))
    return torch.bmm(_in_blocks(x_NI, rows), matrices.transpose(1, 2)).flatten(0, 1)


def _batched_outer_sums(a: Tensor, b: Tensor, rows: Rows, gather_a: bool, gather_b: bool) -> Tensor:
    """Return each expert's sum of a[n] b[n]^T: a product a block, then the sum of each expert's blocks as a product.

    a or b must be zero where a row is padding.
    """
    a_NO = a.index_select(0, rows.token_N) if gather_a else a
    b_NI = b.index_select(0, rows.token_N) if gather_b else b
    parts = torch.bmm(_in_blocks(a_NO, rows).transpose(1, 2), _in_blocks(b_NI, rows))
    experts = torch.arange(rows.bounds.shape[0] - 1, device=a.device)
    belongs = (experts[:, None] == rows.block_expert).to(parts.dtype)
    return (belongs @ parts.flatten(1)).unflatten(1, parts.shape[1:])


def _in_blocks(x_NI: Tensor, rows: Rows) -> Tensor:
    n_blocks = rows.block_expert.shape[0]
    return x_NI.view(n_blocks, x_NI.shape[0] // max(1, n_blocks), x_NI.shape[1])


def _sum_choices(rows_ND: Tensor, rows: Rows, weights_TK: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return each token's sum over its K rows, weighted or not, accumulated in float32 or better."""
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    y_TD = torch.zeros(rows.slot_TK.shape[0], rows_ND.shape[1], dtype=wide, device=rows_ND.device)
    for choice in range(rows.slot_TK.shape[1]):
        chosen_TD = rows_ND.index_select(0, rows.slot_TK[:, choice]).to(wide)
        if weights_TK is None:
            y_TD += chosen_TD
        else:
            y_TD.addcmul_(chosen_TD, weights_TK[:, choice, None])
    return y_TD.to(dtype)


BATCHED = Kernels(_batched_block_rows, _batched_products, _batched_outer_sums, _sum_choices, padded=True)


_FAIR = ContextVar("whether every expert counts as having as many rows as any other", default=False)


@contextmanager
def fair_shares() -> Iterator[None]:
    """Have every expert get as many rows as any other: tensors without values leave nothing to count."""
    token = _FAIR.set(True)
    try:
        yield
    finally:
        _FAIR.reset(token)


def rows_per_expert(rows: Rows) -> list[int]:
    """Return how many rows each expert has; the host waits for it."""
    if not _FAIR.get():
        return rows.bounds.diff().tolist()
    n_experts = rows.bounds.shape[0] - 1
    each, over = divmod(rows.choice_N.shape[0], n_experts)
    return [each + (expert < over) for expert in range(n_experts)]


def _grouped_block_rows(x_TD: Tensor, n_rows: int, n_experts: int) -> int:
    """Return all: nobody looks at the blocks."""
    return max(1, n_rows)


def _grouped_products(x: Tensor, w_EOI: Tensor, rows: Rows, gather: bool) -> Tensor:
    """Return each row times its expert's matrix: one product an expert, gathered when its turn comes."""
    y_NO = x.new_empty(rows.token_N.shape[0], w_EOI.shape[1])
    products = y_NO.split(rows_per_expert(rows))
    for part, w_OI, product in zip(_parts(x, rows, gather), w_EOI, products, strict=True):
        torch.mm(part, w_OI.T, out=product)
    return y_NO


def _grouped_outer_sums(a: Tensor, b: Tensor, rows: Rows, gather_a: bool, gather_b: bool) -> Tensor:
    """Return each expert's sum of a[n] b[n]^T: one product an expert."""
    y_EOI = a.new_empty(rows.bounds.shape[0] - 1, a.shape[1], b.shape[1])
    for one, other, y_OI in zip(_parts(a, rows, gather_a), _parts(b, rows, gather_b), y_EOI, strict=True):
        torch.mm(one.T, other, out=y_OI)
    return y_EOI


def _parts(x: Tensor, rows: Rows, gather: bool) -> Iterator[Tensor]:
    """Yield each expert's rows of x: of tokens where they are to be gathered."""
    counts = rows_per_expert(rows)
    if not gather:
        return iter(x.split(counts))
    return (x.index_select(0, tokens) for tokens in rows.token_N.split(counts))


GROUPED = Kernels(_grouped_block_rows, _grouped_products, _grouped_outer_sums, _sum_choices, padded=False)
