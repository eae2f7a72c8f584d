"""What a past answers to a chunk's keys."""

import triton
import triton.language as tl

from .solve import kernel_tile
from .tiles import (
    accumulate,
    load_pieces,
    load_row_tile,
    power_of_two,
    range_exponent,
    store_row_tile,
)


@triton.jit(
    do_not_specialize=["heads", "chains", "blocks", "column_blocks", "length", "headroom_x"]
)
def answer_kernel(
    Kh, Wt, ColumnKh, ColumnWt, X, LargestX, Value, Out, Strength, Bad,
    value_b, value_h, value_n, headroom_x, heads, chains, blocks, column_blocks, length, value_width, c2, shift, exact_one,
    D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    R: tl.constexpr, M: tl.constexpr, STAGES: tl.constexpr,
    SHIFT: tl.constexpr, CENTRED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``Out = Value - b P X``, float32 and contiguous; ``Value`` None is 0. Grid: ``blocks * chains``."""
    program = tl.program_id(0)
    chain = program % chains
    block = program // chains
    batch = (chain // heads).to(tl.int64)
    head = (chain % heads).to(tl.int64)
    index = tl.arange(0, R)
    rows = block * R + index
    live = rows < length
    start = (chain.to(tl.int64) * blocks + block) * R
    base = chain.to(tl.int64) * column_blocks * R
    k1, k2 = load_pieces(Kh, start, R, D1, D2)
    row_weight = tl.zeros([R], dtype=tl.float32)
    if CENTRED:
        row_weight = tl.load(Wt + start + index)
    acc1 = tl.zeros([R, E1], dtype=tl.float32)
    acc2 = acc1
    if E2 > 0:
        acc2 = tl.zeros([R, E2], dtype=tl.float32)
    for column in tl.range(0, column_blocks * R, M, num_stages=STAGES):
        here = base + column
        c1, c2nd = load_pieces(ColumnKh, here, M, D1, D2)
        p = kernel_tile(k1, k2, row_weight, c1, c2nd, ColumnWt, here, c2, shift, M, D2, CENTRED, PRECISION)  # fmt: skip
        x1, x2 = load_pieces(X, here, M, E1, E2)
        p = p.to(x1.dtype)
        acc1 = accumulate(acc1, p, x1, exact_one, PRECISION)
        if E2 > 0:
            acc2 = accumulate(acc2, p, x2, exact_one, PRECISION)
    factor = 1.0
    if Strength is not None:
        factor = tl.load(Strength + head).to(tl.float32)
    if not CENTRED:
        exponent = range_exponent(tl.load(LargestX + chain * column_blocks), headroom_x)
        factor = factor * power_of_two(-exponent) * power_of_two(0 * exponent - SHIFT)
    spoiled = tl.load(Bad + chain * column_blocks) > 0
    v1 = -acc1 * factor
    v2 = -acc2 * factor
    if Value is not None:
        values = Value + batch * value_b + head * value_h
        v1 += load_row_tile(values, rows, value_n, live, value_width, 0, E1).to(tl.float32)
        if E2 > 0:
            v2 += load_row_tile(values, rows, value_n, live, value_width, E1, E2).to(tl.float32)
    v1 = tl.where(spoiled, float("nan"), v1)
    v2 = tl.where(spoiled, float("nan"), v2)
    out = Out + chain.to(tl.int64) * length * value_width
    store_row_tile(out, rows, value_width, live, value_width, v1, 0, E1)
    if E2 > 0:
        store_row_tile(out, rows, value_width, live, value_width, v2, E1, E2)
