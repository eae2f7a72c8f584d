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

INFINITY_BITS = tl.constexpr(0x7F800000)


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


@triton.jit
def inspect_rows(
    values, seconds, k1, k2, rows, live, place, chain_slots, slot, Largest, LargestSecond, Bad,
    value_n, second_n, value_width,
    D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """The rows' part of the sequence's range; returns which of them are finite.

    Args:
        place: the rows' places in the workspace, of ``chain_slots`` in the chain.
    """
    largest, finite, empty = _inspect(values, rows, value_n, live, value_width, E1, E2)
    tl.atomic_max(Largest + slot, largest.to(tl.int32, bitcast=True), sem="relaxed")
    if seconds is not None:
        largest, also, empty = _inspect(seconds, rows, second_n, live, value_width, E1, E2)
        finite = tl.minimum(finite, also)
        tl.atomic_max(LargestSecond + slot, largest.to(tl.int32, bitcast=True), sem="relaxed")
    key_finite = _finite_rows(k1)
    if D2 > 0:
        key_finite = tl.minimum(key_finite, _finite_rows(k2))
    if PAST:
        # A padded row of the past (its Y is 0) answers nothing; what its key holds must not matter.
        key_finite = tl.where(empty, 1, key_finite)
    finite = tl.minimum(finite, key_finite)
    bad = tl.max(tl.where(live & (finite == 0), chain_slots - place, 0), axis=0)
    tl.atomic_max(Bad + slot, bad, mask=bad > 0, sem="relaxed")
    return finite > 0


@triton.jit
def _thread_magnitudes(tensor, rows, stride, live, width, WARPS: tl.constexpr, OFFSET: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The largest magnitude that each thread holds, as bits; those of a NaN if something is not finite."""
    tile = load_row_tile(tensor, rows, stride, live, width, OFFSET, WIDTH).to(tl.float32)
    # First and last dimension: what lies in one thread, so that three operations an entry are all it takes.
    ROWS: tl.constexpr = tile.shape[0]
    ONCE: tl.constexpr = min(ROWS, max(1, WARPS * 256 // WIDTH))
    tile = tl.reshape(tile, (ROWS // ONCE, ONCE, WIDTH // 8, 8))
    largest = tl.max(tl.max(tl.abs(tile), axis=3), axis=0)
    nothing = tl.sum(tl.sum(tile * 0.0, axis=3), axis=0)
    return (largest + nothing).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest_of_rows(
    tensor, upper, upper_live, lower, lower_live, stride, width,
    E1: tl.constexpr, E2: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The largest magnitude of two sets of rows, as bits; at least those of infinity if not all is finite."""
    largest = tl.maximum(
        _thread_magnitudes(tensor, upper, stride, upper_live, width, WARPS, 0, E1),
        _thread_magnitudes(tensor, lower, stride, lower_live, width, WARPS, 0, E1),
    )
    largest = tl.max(tl.max(largest, axis=1), axis=0)
    if E2 > 0:
        second = tl.maximum(
            _thread_magnitudes(tensor, upper, stride, upper_live, width, WARPS, E1, E2),
            _thread_magnitudes(tensor, lower, stride, lower_live, width, WARPS, E1, E2),
        )
        largest = tl.maximum(largest, tl.max(tl.max(second, axis=1), axis=0))
    return largest


@triton.jit
def load_keys(keys, rows, stride, live, width, D1: tl.constexpr, D2: tl.constexpr):
    """Keys in float32, in two pieces."""
    k1 = load_row_tile(keys, rows, stride, live, width, 0, D1).to(tl.float32)
    k2 = k1
    if D2 > 0:
        k2 = load_row_tile(keys, rows, stride, live, width, D1, D2).to(tl.float32)
    return k1, k2


@triton.jit
def live_rows(Mask, Blocks, batch, block, blocks, length, index, R: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """Where rows ``index`` of a block are, which of them hold a token, and the sequence's first block."""
    rows, live, _, first = place_rows(Blocks, block, blocks, length, index, R, PACKED)
    if Mask is not None:
        live = live & (tl.load(Mask + batch * length + rows, mask=live, other=0) != 0)
    return rows, live, first


@triton.jit
def store_keys(
    k1, k2, live, written, Reference, Kh, Wt, Live, place, reference, width, c2, eps,
    D1: tl.constexpr, D2: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """Keys normalised (and centred); returns the sums of their squares, without eps.

    Args:
        written: the rows to store.
        place: their rows in the workspace. reference: the sequence's row in ``Reference``.
    """
    square = tl.sum(k1 * k1, axis=1)
    if D2 > 0:
        square += tl.sum(k2 * k2, axis=1)
    inverse_rms = tl.math.rsqrt(square / width + eps)
    k1 *= inverse_rms[:, None]
    k2 *= inverse_rms[:, None]
    tl.store(Live + place, live.to(tl.int8))
    if CENTRED:
        columns = tl.arange(0, D1)
        base = Reference + reference * width
        r1 = tl.load(base + columns, mask=columns < width, other=0.0)
        weight = tl.sum(k1 * r1[None, :], axis=1)
        k1 = tl.where(live[:, None], k1 - r1[None, :], 0.0)
        if D2 > 0:
            columns = D1 + tl.arange(0, D2)
            r2 = tl.load(base + columns, mask=columns < width, other=0.0)
            weight += tl.sum(k2 * r2[None, :], axis=1)
            k2 = tl.where(live[:, None], k2 - r2[None, :], 0.0)
        # At a row without a token the centred key is 0 and so is its weight: P is finite there.
        tl.store(Wt + place, tl.where(live, c2 * (weight - width), 0.0), mask=written)
    row_pointers = Kh + place[:, None] * (D1 + D2)
    written = written[:, None]
    tl.store(row_pointers + tl.arange(0, D1)[None, :], k1.to(Kh.dtype.element_ty), mask=written)
    if D2 > 0:
        pointers = row_pointers + (D1 + tl.arange(0, D2))[None, :]
        tl.store(pointers, k2.to(Kh.dtype.element_ty), mask=written)
    return square


@triton.jit(do_not_specialize=["heads", "chains", "blocks", "length", "reference_c"])
def prepare_kernel(
    Key, Reference, Value, Mask, Blocks, Kh, Wt, Live, Largest, Bad,
    key_b, key_h, key_n, reference_c, value_b, value_h, value_n,
    heads, chains, blocks, length, width, value_width, c2, eps,
    D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    R: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """A past, or a chunk before its right-hand side is known: rows whose values are 0 are padding.

    Grid: ``chains * blocks * R / ROWS`` programs. Blocks that are also inverted: ``inverse.py``.
    """
    program = tl.program_id(0)
    chain = program % chains
    block = program // chains // (R // ROWS)
    batch = (chain // heads).to(tl.int64)
    head = (chain % heads).to(tl.int64)
    index = program // chains % (R // ROWS) * ROWS + tl.arange(0, ROWS)
    rows, live, first = live_rows(Mask, Blocks, batch, block, blocks, length, index, R, PACKED)
    keys = Key + batch * key_b + head * key_h
    k1, k2 = load_keys(keys, rows, key_n, live, width, D1, D2)
    values = Value + batch * value_b + head * value_h
    place = block * R + index
    finite = inspect_rows(
        values, None, k1, k2, rows, live, place, blocks * R, chain * blocks + first,
        Largest, Largest, Bad, value_n, value_n, value_width, D2, E1, E2, True,
    )  # fmt: skip
    k1 = tl.where(finite[:, None], k1, 0.0)
    k2 = tl.where(finite[:, None], k2, 0.0)
    place += chain.to(tl.int64) * blocks * R
    reference = chain.to(tl.int64) * reference_c + first
    store_keys(
        k1, k2, live, index >= 0, Reference, Kh, Wt, Live, place, reference, width, c2, eps,
        D1, D2, CENTRED,
    )  # fmt: skip
