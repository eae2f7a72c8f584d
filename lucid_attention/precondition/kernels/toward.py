"""The key gradient's other half, parallel over blocks, and RMS-norm's own backward.

``toward_i += sum_j T_ij khat_j`` over the blocks before ``i`` (or over a past, or, with the roles
exchanged, for a past's keys over the chunk). ``StrengthSum`` gets ``-sum T``. Then ``dkhat = -b s toward`` and

    dk_i = (dkhat_i - khat_i (khat_i . dkhat_i) / D) / rms(k_i)
"""

import triton
import triton.language as tl

from .adjoint import norm_exponent
from .solve import kernel_tile
from .tiles import (
    accumulate,
    load_pieces,
    load_row_tile,
    place_rows,
    power_of_two,
    range_exponent,
    similarity,
    store_row_tile,
    tile_pointers,
)


@triton.jit(
    do_not_specialize=[
        "heads",
        "chains",
        "blocks",
        "column_blocks",
        "length",
        "reference_c",
        "headroom_a",
        "headroom_b",
    ]
)
def toward_kernel(
    Kh, Wt, A, LargestA, ColumnKh, ColumnWt, B, LargestB, Toward, TowardSum, Key, Reference, GradKey,
    Mask, Strength, StrengthSum, Blocks, Bad,
    headroom_a, headroom_b, key_b, key_h, key_n, reference_c, out_b, out_h, out_n,
    heads, chains, blocks, column_blocks, length, width, c2, shift, scale, eps, exact_one,
    D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    R: tl.constexpr, M: tl.constexpr, STAGES: tl.constexpr, PACKED: tl.constexpr,
    CAUSAL: tl.constexpr, ADD: tl.constexpr, FINISH: tl.constexpr,
    SHIFT: tl.constexpr, CENTRED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: ``blocks * chains`` programs, the longest rows first.

    ``CAUSAL``: columns are the chain's own earlier blocks; otherwise all ``column_blocks`` of another
    workspace. ``ADD``: start from what ``Toward`` holds. ``FINISH``: write the key's gradient.
    """
    program = tl.program_id(0)
    chain = program % chains
    block = blocks - 1 - program // chains
    batch = (chain // heads).to(tl.int64)
    head = (chain % heads).to(tl.int64)
    index = tl.arange(0, R)
    rows, inside, count, first = place_rows(Blocks, block, blocks, length, index, R, PACKED)
    if PACKED and count == 0:
        return
    slot = chain * blocks + first
    start = (chain.to(tl.int64) * blocks + block) * R
    DTYPE: tl.constexpr = Kh.dtype.element_ty
    k1, k2 = load_pieces(Kh, start, R, D1, D2)
    row_weight = tl.zeros([R], dtype=tl.float32)
    if CENTRED:
        row_weight = tl.load(Wt + start + index)
    a1, a2 = load_pieces(A, start, R, E1, E2)
    exponent = 0
    if not CENTRED:
        exponent = norm_exponent(a1.to(tl.float32), a2.to(tl.float32), E1, E2, SHIFT)
        shift += exponent  # P is only part of T here: there it costs the rows no accuracy

    acc1 = tl.zeros([R, D1], dtype=tl.float32)
    acc2 = acc1
    if D2 > 0:
        acc2 = tl.zeros([R, D2], dtype=tl.float32)
    total = tl.zeros([R], dtype=tl.float32)
    if CAUSAL:
        low = first * R
        high = block * R
        base = chain.to(tl.int64) * blocks * R
        column_slot = slot
    else:
        low = 0
        high = column_blocks * R
        base = chain.to(tl.int64) * column_blocks * R
        column_slot = chain * column_blocks
    for column in tl.range(low, high, M, num_stages=STAGES):
        here = base + column
        c1, c2nd = load_pieces(ColumnKh, here, M, D1, D2)
        p = kernel_tile(k1, k2, row_weight, c1, c2nd, ColumnWt, here, c2, shift, M, D2, CENTRED, PRECISION)  # fmt: skip
        b1, b2 = load_pieces(B, here, M, E1, E2)
        t = similarity(a1, a2, b1, b2, E2, PRECISION) * p
        if CENTRED or StrengthSum is not None:
            total += tl.sum(t, axis=1)
        t = t.to(DTYPE)
        acc1 = accumulate(acc1, t, c1, exact_one, PRECISION)
        if D2 > 0:
            acc2 = accumulate(acc2, t, c2nd, exact_one, PRECISION)

    unscale = 1.0
    if not CENTRED:
        unscale = power_of_two(-exponent - SHIFT)
        unscale_a = power_of_two(-range_exponent(tl.load(LargestA + slot), headroom_a))
        unscale_b = power_of_two(-range_exponent(tl.load(LargestB + column_slot), headroom_b))
        acc1 = acc1 * unscale * unscale_a * unscale_b
        acc2 = acc2 * unscale * unscale_a * unscale_b
        total = total * unscale * unscale_a * unscale_b
    if StrengthSum is not None:
        pairs = -tl.sum(total, axis=0)
        pairs = tl.where(tl.load(Bad + slot) > 0, float("nan"), pairs)
        tl.store(StrengthSum + chain * blocks + block, pairs)
    if ADD:
        acc1 += tl.load(tile_pointers(Toward, start, R, D1 + D2, 0, D1))
        if D2 > 0:
            acc2 += tl.load(tile_pointers(Toward, start, R, D1 + D2, D1, D2))
        if CENTRED:
            total += tl.load(TowardSum + start + index)
    if not FINISH:
        tl.store(tile_pointers(Toward, start, R, D1 + D2, 0, D1), acc1)
        if D2 > 0:
            tl.store(tile_pointers(Toward, start, R, D1 + D2, D1, D2), acc2)
        if CENTRED:
            tl.store(TowardSum + start + index, total)
        return

    live = inside
    if Mask is not None:
        live = live & (tl.load(Mask + batch * length + rows, mask=live, other=0) != 0)
    if CENTRED:
        reference = Reference + (chain.to(tl.int64) * reference_c) * width
        if PACKED:
            reference += first.to(tl.int64) * width
        columns = tl.arange(0, D1)
        r1 = tl.load(reference + columns, mask=columns < width, other=0.0)
        acc1 += total[:, None] * r1[None, :]
        if D2 > 0:
            columns = D1 + tl.arange(0, D2)
            r2 = tl.load(reference + columns, mask=columns < width, other=0.0)
            acc2 += total[:, None] * r2[None, :]
    strength = 1.0
    if Strength is not None:
        strength = tl.load(Strength + head).to(tl.float32)
    factor = -strength * scale
    keys = Key + batch * key_b + head * key_h
    n1 = load_row_tile(keys, rows, key_n, live, width, 0, D1).to(tl.float32)
    n1 = tl.where(tl.abs(n1) < float("inf"), n1, 0.0)
    square = tl.sum(n1 * n1, axis=1)
    n2 = n1
    if D2 > 0:
        n2 = load_row_tile(keys, rows, key_n, live, width, D1, D2).to(tl.float32)
        n2 = tl.where(tl.abs(n2) < float("inf"), n2, 0.0)
        square += tl.sum(n2 * n2, axis=1)
    inverse_rms = tl.math.rsqrt(square / width + eps)
    n1 = n1 * inverse_rms[:, None]
    acc1 = acc1 * factor
    radial = tl.sum(n1 * acc1, axis=1)
    if D2 > 0:
        n2 = n2 * inverse_rms[:, None]
        acc2 = acc2 * factor
        radial += tl.sum(n2 * acc2, axis=1)
    radial = radial / width
    spoiled = (tl.load(Bad + slot) > 0) & live[:, None]
    out = GradKey + batch * out_b + head * out_h
    grad = inverse_rms[:, None] * (acc1 - n1 * radial[:, None])
    grad = tl.where(spoiled, float("nan"), tl.where(live[:, None], grad, 0.0))
    store_row_tile(out, rows, out_n, inside, width, grad, 0, D1)
    if D2 > 0:
        grad = inverse_rms[:, None] * (acc2 - n2 * radial[:, None])
        grad = tl.where(spoiled, float("nan"), tl.where(live[:, None], grad, 0.0))
        store_row_tile(out, rows, out_n, inside, width, grad, D1, D2)
