"""The forward solve: block rows of a chain in order, many chains and rows at once.

A program takes a ticket and with it a block row. It adds up what the blocks before it answer,

    acc_p = sum_{j<p} P_pj Y_j,      Y_p = L_pp^-1 (V_p - b acc_p)

reading each ``Y_j`` once the program that makes it has announced it. Tickets count rows of blocks
upwards, so whatever a program waits for was begun before it and never waits for it: no deadlock,
whatever else runs on the device. Every sum has one order: results repeat bit for bit.

Half precision: ``P`` carries a factor ``2^SHIFT`` (P <= 1, and small entries stay normal numbers), ``Y`` the
power of two that its chain's range allows; accumulators are float32.
"""

import triton
import triton.language as tl

from .tiles import (
    accumulate,
    announce,
    load_pieces,
    load_row_tile,
    place_rows,
    power_of_two,
    range_exponent,
    similarity,
    store_row_tile,
    tile_pointers,
    wait_beyond,
    wait_for,
)


@triton.jit
def kernel_tile(rows1, rows2, row_weight, columns1, columns2, Wt, start, c2, shift, M: tl.constexpr, D2: tl.constexpr, CENTRED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``P`` between rows (R, D) and the columns (M, D) from ``start``, times 2^SHIFT unless centred."""
    exponent = similarity(rows1, rows2, columns1, columns2, D2, PRECISION) * c2
    if CENTRED:
        weight = tl.load(Wt + start + tl.arange(0, M))
        exponent += row_weight[:, None] + weight[None, :]
    else:
        exponent += shift
    return tl.math.exp2(exponent)


@triton.jit
def inverse_tile(T, R: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The strictly lower part of a diagonal block's inverse (R, R), put together from quadrants."""
    H: tl.constexpr = R // 2
    index = tl.arange(0, R)
    if TRANSPOSED:
        row = index[None, :]
        column = index[:, None]
    else:
        row = index[:, None]
        column = index[None, :]
    quadrant = row // H + column // H
    pointers = T + quadrant * (H * H) + (row % H) * H + column % H
    return tl.load(pointers, mask=(row >= H) | (column < H), other=0.0)


@triton.jit(do_not_specialize=["heads", "chains", "blocks", "length", "headroom"])
def solve_kernel(
    Kh, Wt, T, Value, Yh, Y, Mask, Strength, Blocks, Done, Largest, Bad, Ticket,
    value_b, value_h, value_n, y_b, y_h, y_n,
    heads, chains, blocks, length, value_width, headroom, c2, shift, exact_one,
    D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    R: tl.constexpr, M: tl.constexpr, STAGES: tl.constexpr, PACKED: tl.constexpr,
    SHIFT: tl.constexpr, CENTRED: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid: ``chains * blocks`` programs."""
    ticket = tl.atomic_add(Ticket, 1, sem="relaxed")
    chain = ticket % chains
    block = ticket // chains
    batch = (chain // heads).to(tl.int64)
    head = (chain % heads).to(tl.int64)
    index = tl.arange(0, R)
    rows, inside, count, first = place_rows(Blocks, block, blocks, length, index, R, PACKED)
    if PACKED and count == 0:
        return
    live = inside
    if Mask is not None:
        live = live & (tl.load(Mask + batch * length + rows, mask=live, other=0) != 0)

    slot = chain * blocks + first
    counter = Done + slot
    base = chain.to(tl.int64) * blocks * R
    start = base + block * R
    k1, k2 = load_pieces(Kh, start, R, D1, D2)
    row_weight = tl.zeros([R], dtype=tl.float32)
    if CENTRED:
        row_weight = tl.load(Wt + start + index)
    acc1 = tl.zeros([R, E1], dtype=tl.float32)
    acc2 = acc1
    if E2 > 0:
        acc2 = tl.zeros([R, E2], dtype=tl.float32)

    # Everything that is announced when this program looks, up to the last block.
    at = first
    while at < block - 1:
        ready = wait_beyond(counter, at, INTERPRET)
        stop = tl.minimum(ready, block - 1)
        for column in tl.range(at * R, stop * R, M, num_stages=STAGES):
            here = base + column
            c1, c2nd = load_pieces(Kh, here, M, D1, D2)
            p = kernel_tile(k1, k2, row_weight, c1, c2nd, Wt, here, c2, shift, M, D2, CENTRED, PRECISION)  # fmt: skip
            y1, y2 = load_pieces(Yh, here, M, E1, E2)
            p = p.to(y1.dtype)
            acc1 = accumulate(acc1, p, y1, exact_one, PRECISION)
            if E2 > 0:
                acc2 = accumulate(acc2, p, y2, exact_one, PRECISION)
        at = stop

    # What the last block needs but does not have to wait for.
    strength = 1.0
    if Strength is not None:
        strength = tl.load(Strength + head).to(tl.float32)
    scale = 1.0
    unscale = 1.0
    factor = strength
    if not CENTRED:
        exponent = range_exponent(tl.load(Largest + slot), headroom)
        scale = power_of_two(exponent)
        unscale = power_of_two(-exponent)
        factor = strength * power_of_two(0 * exponent - SHIFT)
    values = Value + batch * value_b + head * value_h
    v1 = load_row_tile(values, rows, value_n, live, value_width, 0, E1).to(tl.float32) * scale
    v1 = tl.where(tl.abs(v1) < float("inf"), v1, 0.0)
    v2 = v1
    if E2 > 0:
        v2 = load_row_tile(values, rows, value_n, live, value_width, E1, E2).to(tl.float32) * scale
        v2 = tl.where(tl.abs(v2) < float("inf"), v2, 0.0)
    H: tl.constexpr = R // 2
    inverse = inverse_tile(T + (start // R) * (3 * H * H), R, False)

    if block > first:
        last = start - R
        c1, c2nd = load_pieces(Kh, last, R, D1, D2)
        p = kernel_tile(k1, k2, row_weight, c1, c2nd, Wt, last, c2, shift, R, D2, CENTRED, PRECISION)  # fmt: skip
        p = p.to(Yh.dtype.element_ty)
        ready = wait_for(counter, block, INTERPRET)
        # The address depends on what was waited for, so that no load moves ahead of it.
        last = base + ready.to(tl.int64) * R - R
        y1, y2 = load_pieces(Yh, last, R, E1, E2)
        acc1 = accumulate(acc1, p, y1, exact_one, PRECISION)
        if E2 > 0:
            acc2 = accumulate(acc2, p, y2, exact_one, PRECISION)

    v1 -= acc1 * factor
    v1 = tl.where(live[:, None], v1, 0.0)
    v1 = accumulate(v1, inverse, v1.to(inverse.dtype), exact_one, PRECISION)
    tl.store(tile_pointers(Yh, start, R, E1 + E2, 0, E1), v1.to(Yh.dtype.element_ty))
    if E2 > 0:
        v2 -= acc2 * factor
        v2 = tl.where(live[:, None], v2, 0.0)
        v2 = accumulate(v2, inverse, v2.to(inverse.dtype), exact_one, PRECISION)
        tl.store(tile_pointers(Yh, start, R, E1 + E2, E1, E2), v2.to(Yh.dtype.element_ty))
    announce(counter, block + 1)

    # From a sequence's first row that is not finite on, results are NaN.
    spoiled = block * R + index >= blocks * R - tl.load(Bad + slot)
    spoiled = spoiled & live
    out = Y + batch * y_b + head * y_h
    v1 = tl.where(spoiled[:, None], float("nan"), v1 * unscale)
    store_row_tile(out, rows, y_n, inside, value_width, v1, 0, E1)
    if E2 > 0:
        v2 = tl.where(spoiled[:, None], float("nan"), v2 * unscale)
        store_row_tile(out, rows, y_n, inside, value_width, v2, E1, E2)
