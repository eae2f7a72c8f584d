"""Normalised keys and the range of the values: one pass over the inputs.

    Kh    khat (half precision) or khat - r (float32), (D1 + D2) wide, 0 at padding
    Wt    float32 only: s log2(e) (khat . r - D), the row's part of the centred exponent
    Live  1 for tokens, 0 for padding and for the rows that fill the last block

and, for the sequence that the rows belong to, the largest magnitude of the values and the first row
that is not finite. Both are maxima, so their order does not matter. A row that is not finite gets a key
of 0: the solve goes on without it and its results are marked afterwards.
"""

import triton
import triton.language as tl

from .tiles import load_row_tile, place_rows


@triton.jit
def _finite_rows(tile):
    return tl.min((tl.abs(tile) < float("inf")).to(tl.int32), axis=1)


@triton.jit
def _largest_finite(tile):
    magnitude = tl.abs(tile)
    return tl.max(tl.max(tl.where(magnitude < float("inf"), magnitude, 0.0), axis=1), axis=0)


@triton.jit
def _inspect(values, rows, stride, live, width, E1: tl.constexpr, E2: tl.constexpr):
    """Largest finite magnitude, and for each row whether it is finite and whether it is all 0."""
    tile = load_row_tile(values, rows, stride, live, width, 0, E1).to(tl.float32)
    largest = _largest_finite(tile)
    finite = _finite_rows(tile)
    empty = tl.max((tile != 0.0).to(tl.int32), axis=1) == 0
    if E2 > 0:
        tile = load_row_tile(values, rows, stride, live, width, E1, E2).to(tl.float32)
        largest = tl.maximum(largest, _largest_finite(tile))
        finite = tl.minimum(finite, _finite_rows(tile))
        empty = empty & (tl.max((tile != 0.0).to(tl.int32), axis=1) == 0)
    return largest, finite, empty


@triton.jit(do_not_specialize=["heads", "chains", "blocks", "length", "reference_c"])
def prepare_kernel(
    Key, key_b, key_h, key_n, Reference, reference_c,
    Value, value_b, value_h, value_n, Second, second_b, second_h, second_n,
    Mask, Blocks, Kh, Wt, Live, Largest, LargestSecond, Bad,
    heads, chains, blocks, length, width, value_width, c2, eps,
    D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    R: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, PAST: tl.constexpr,
    CENTRED: tl.constexpr,
):  # fmt: skip
    """Grid: ``chains * blocks * R / ROWS`` programs. ``PAST``: rows whose values are 0 are padding."""
    program = tl.program_id(0)
    chain = program % chains
    part = program // chains % (R // ROWS)
    block = program // chains // (R // ROWS)
    batch = (chain // heads).to(tl.int64)
    head = (chain % heads).to(tl.int64)
    index = part * ROWS + tl.arange(0, ROWS)
    rows, live, _, first = place_rows(Blocks, block, blocks, length, index, R, PACKED)
    slot = chain * blocks + first
    if Mask is not None:
        live = live & (tl.load(Mask + batch * length + rows, mask=live, other=0) != 0)

    values = Value + batch * value_b + head * value_h
    largest, finite, empty = _inspect(values, rows, value_n, live, value_width, E1, E2)
    tl.atomic_max(Largest + slot, largest.to(tl.int32, bitcast=True), sem="relaxed")
    if Second is not None:
        values = Second + batch * second_b + head * second_h
        largest, also, empty = _inspect(values, rows, second_n, live, value_width, E1, E2)
        finite = tl.minimum(finite, also)
        tl.atomic_max(LargestSecond + slot, largest.to(tl.int32, bitcast=True), sem="relaxed")

    keys = Key + batch * key_b + head * key_h
    k1 = load_row_tile(keys, rows, key_n, live, width, 0, D1).to(tl.float32)
    k2 = k1
    square = tl.sum(k1 * k1, axis=1)
    key_finite = _finite_rows(k1)
    if D2 > 0:
        k2 = load_row_tile(keys, rows, key_n, live, width, D1, D2).to(tl.float32)
        square += tl.sum(k2 * k2, axis=1)
        key_finite = tl.minimum(key_finite, _finite_rows(k2))
    if PAST:
        # A padded row of the past (its Y is 0) answers nothing; what its key holds must not matter.
        key_finite = tl.where(empty, 1, key_finite)
    finite = tl.minimum(finite, key_finite)
    padded = block * R + index
    bad = tl.max(tl.where(live & (finite == 0), blocks * R - padded, 0), axis=0)
    tl.atomic_max(Bad + slot, bad, mask=bad > 0, sem="relaxed")
    inverse_rms = tl.math.rsqrt(square / width + eps)
    usable = live & (finite > 0) & (square < float("inf"))
    k1 = tl.where(usable[:, None], k1 * inverse_rms[:, None], 0.0)
    if D2 > 0:
        k2 = tl.where(usable[:, None], k2 * inverse_rms[:, None], 0.0)

    place = (chain.to(tl.int64) * blocks + block) * R + index
    tl.store(Live + place, live.to(tl.int8))
    if CENTRED:
        columns = tl.arange(0, D1)
        base = Reference + (chain.to(tl.int64) * reference_c) * width
        if PACKED:
            base += (slot - chain * blocks).to(tl.int64) * width
        r1 = tl.load(base + columns, mask=columns < width, other=0.0)
        weight = tl.sum(k1 * r1[None, :], axis=1)
        k1 = tl.where(live[:, None], k1 - r1[None, :], 0.0)
        if D2 > 0:
            columns = D1 + tl.arange(0, D2)
            r2 = tl.load(base + columns, mask=columns < width, other=0.0)
            weight += tl.sum(k2 * r2[None, :], axis=1)
            k2 = tl.where(live[:, None], k2 - r2[None, :], 0.0)
        # At a row without a token the centred key is 0 and so is its weight: P is finite there.
        tl.store(Wt + place, tl.where(live, c2 * (weight - width), 0.0))
    row_pointers = Kh + place[:, None] * (D1 + D2)
    tl.store(row_pointers + tl.arange(0, D1)[None, :], k1.to(Kh.dtype.element_ty))
    if D2 > 0:
        tl.store(row_pointers + (D1 + tl.arange(0, D2))[None, :], k2.to(Kh.dtype.element_ty))
