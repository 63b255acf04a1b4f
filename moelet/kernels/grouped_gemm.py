"""Matrix products over rows sorted by expert, in Triton, for CUDA from capability 8.0 on.

Blocks of rows are handed to programs by the rows' map of static size, whose surplus does nothing; gathering rows is
part of loading them. Nothing is added by atomics: the same inputs give the same bits. Importing this needs triton.

Shapes: T tokens, D model, E experts, N routed rows, I and O the widths of a product's input and output.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelet.kernels.sorted_rows import Kernels, Rows

INTERPRETED = bool(triton.knobs.runtime.interpret)  # it multiplies the bit patterns of bf16: there they are widened


class Tile(NamedTuple):
    """What one program computes, and with what. Fixed, not autotuned: another depth would be another sum."""

    rows: int  # of the result
    columns: int
    depth: int  # of the sum, a step of the loop
    warps: int
    stages: int  # loads in flight; shared memory holds (rows + columns) * depth * stages numbers


HALF = Tile(128, 128, 32, 8, 3)  # not measured yet; 48 KiB, no register spills on 8.0, 8.6 and 9.0
PLAIN = Tile(32, 32, 16, 4, 2)  # float32 without TF32: no tensor cores, so the sums must fit the registers
INTERPRETER = Tile(16, 16, 16, 1, 1)  # small, so that small tests have several blocks
SUM_TOKENS, SUM_COLUMNS = 4, 256  # of the elementwise sum over K


def choose_tile(x: Tensor) -> Tile:
    """Return the tile for matrix products of x's format."""
    if INTERPRETED:
        return INTERPRETER
    return PLAIN if x.dtype == torch.float32 else HALF


def block_rows(x_TD: Tensor, n_rows: int, n_experts: int) -> int:
    """Return how many rows a block has."""
    return choose_tile(x_TD).rows


@triton.jit
def _product_kernel(
    x,
    source,
    w,
    y,
    bounds,
    block_expert,
    block_row,
    E: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    STRIDE_IN: tl.constexpr,
    GATHER: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """y[n] = w[expert of row n] @ x[source[n]] for one block of rows and one tile of columns."""
    tiles: tl.constexpr = (OUT + COLUMNS - 1) // COLUMNS
    block = tl.program_id(0) // tiles  # programs side by side share their rows
    expert = tl.load(block_expert + block)
    if expert == E:
        return
    row = tl.load(block_row + block) + tl.arange(0, ROWS)
    row_there = row < tl.load(bounds + expert + 1)
    row = row.to(tl.int64)  # 2^31 numbers are passed by 4 million rows of 512
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    column_there = column < OUT
    if GATHER:
        from_row = tl.load(source + row, mask=row_there, other=0)
    else:
        from_row = row
    w_expert = w + expert.to(tl.int64) * STRIDE_E
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, IN, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        inner_there = inner < IN
        a_there = row_there[:, None] & inner_there[None, :]
        b_there = inner_there[:, None] & column_there[None, :]
        a = tl.load(x + from_row[:, None] * IN + inner[None, :], mask=a_there, other=0.0)
        b = tl.load(w_expert + inner[:, None] * STRIDE_IN + column[None, :] * STRIDE_OUT, mask=b_there, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    y_at = y + row[:, None] * OUT + column[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=row_there[:, None] & column_there[None, :])


@triton.jit
def _outer_kernel(
    a,
    b,
    source,
    y,
    bounds,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """y[e] = sum over the rows n of expert e of a[n] b[n]^T, one tile of one expert, its rows in order."""
    tiles_in: tl.constexpr = (IN + COLUMNS - 1) // COLUMNS
    tiles: tl.constexpr = (OUT + ROWS - 1) // ROWS * tiles_in
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    out = (tile // tiles_in) * ROWS + tl.arange(0, ROWS)
    inner = (tile % tiles_in) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(bounds + expert + 1)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(tl.load(bounds + expert), end, DEPTH):
        row = start + tl.arange(0, DEPTH)
        there = row < end
        row = row.to(tl.int64)
        from_a = row
        from_b = row
        if GATHER_A:
            from_a = tl.load(source + row, mask=there, other=0)
        if GATHER_B:
            from_b = tl.load(source + row, mask=there, other=0)
        a_there = (out < OUT)[:, None] & there[None, :]
        b_there = there[:, None] & (inner < IN)[None, :]
        a_tile = tl.load(a + out[:, None] + from_a[None, :] * OUT, mask=a_there, other=0.0)
        b_tile = tl.load(b + from_b[:, None] * IN + inner[None, :], mask=b_there, other=0.0)
        if WIDEN:
            a_tile, b_tile = a_tile.to(tl.float32), b_tile.to(tl.float32)
        total = tl.dot(a_tile, b_tile, total, input_precision="ieee")
    y_at = y + expert.to(tl.int64) * OUT * IN + out[:, None] * IN + inner[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=(out < OUT)[:, None] & (inner < IN)[None, :])


@triton.jit
def _sum_kernel(
    rows,
    slot,
    weights,
    y,
    n_tokens,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """y[t] = sum over k of weights[t, k] * rows[slot[t, k]], in float32, k in order."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    token_there = token < n_tokens
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = token_there[:, None] & (column < WIDTH)[None, :]
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for choice in range(K):
        row = tl.load(slot + token * K + choice, mask=token_there, other=0)
        values = tl.load(rows + row[:, None] * WIDTH + column[None, :], mask=there, other=0.0).to(tl.float32)
        if WEIGHTED:
            values *= tl.load(weights + token * K + choice, mask=token_there, other=0.0)[:, None]
        total += values
    tl.store(y + token[:, None] * WIDTH + column[None, :], total.to(y.dtype.element_ty), mask=there)


def products(x: Tensor, w_EOI: Tensor, rows: Rows, gather: bool) -> Tensor:
    """Return each row times its expert's matrix, (N, O); x is (T, I) where `gather`, else (N, I)."""
    tile = choose_tile(x)
    n_experts, width_out, width_in = w_EOI.shape
    stride_e, stride_out, stride_in = w_EOI.stride()
    y_NO = x.new_empty(rows.choice_N.shape[0], width_out)
    grid = (rows.block_expert.shape[0] * triton.cdiv(width_out, tile.columns),)
    _product_kernel[grid](
        x.contiguous(), rows.token_N, w_EOI, y_NO, rows.bounds, rows.block_expert, rows.block_row,
        E=n_experts, OUT=width_out, IN=width_in, STRIDE_E=stride_e, STRIDE_OUT=stride_out, STRIDE_IN=stride_in,
        GATHER=gather, WIDEN=INTERPRETED,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y_NO


def outer_sums(a: Tensor, b: Tensor, rows: Rows, gather_a: bool, gather_b: bool) -> Tensor:
    """Return for each expert the sum over its rows of a[n] b[n]^T, (E, O, I), zeros where it has none.

    What is gathered has T rows, the other N.
    """
    tile = choose_tile(a)
    n_experts, width_out, width_in = rows.bounds.shape[0] - 1, a.shape[1], b.shape[1]
    y_EOI = a.new_empty(n_experts, width_out, width_in)
    grid = (n_experts * triton.cdiv(width_out, tile.rows) * triton.cdiv(width_in, tile.columns),)
    _outer_kernel[grid](
        a.contiguous(), b.contiguous(), rows.token_N, y_EOI, rows.bounds,
        OUT=width_out, IN=width_in, GATHER_A=gather_a, GATHER_B=gather_b, WIDEN=INTERPRETED,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y_EOI


def sum_choices(rows_ND: Tensor, rows: Rows, weights_TK: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return each token's sum over its K rows, weighted or not, accumulated in float32 and rounded to `dtype`."""
    (n_tokens, top_k), width = rows.slot_TK.shape, rows_ND.shape[1]
    y_TD = rows_ND.new_empty(n_tokens, width, dtype=dtype)
    grid = (triton.cdiv(n_tokens, SUM_TOKENS), triton.cdiv(width, SUM_COLUMNS))
    _sum_kernel[grid](
        rows_ND, rows.slot_TK, rows_ND if weights_TK is None else weights_TK.contiguous(), y_TD, n_tokens,
        K=top_k, WIDTH=width, WEIGHTED=weights_TK is not None, TOKENS=SUM_TOKENS, COLUMNS=SUM_COLUMNS,
    )  # fmt: skip
    return y_TD


TRITON = Kernels(block_rows, products, outer_sums, sum_choices, padded=False)
