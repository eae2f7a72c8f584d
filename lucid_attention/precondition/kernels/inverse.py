"""A block's rows prepared, and its inverse: ``T`` is the strictly lower part of ``L_ii^-1``.

One program prepares one block of R rows, inverts it and writes three quadrants of side H = R / 2: 11, 21, 22.
While one program waits for memory, others of its multiprocessor multiply.
Tiles of 16 are inverted by substitution; then pairs merge, in place,

    inv [A 0; C B] = [A^-1 0; -B^-1 C A^-1, B^-1]

which is stable for any keys: every block's inverse has a norm of at most 2. A Neumann series is not
(with repeated keys its powers reach binomial size). Products are in the operands' precision.
"""

import triton
import triton.language as tl

from .prepare import (
    INFINITY_BITS,
    inspect_rows,
    largest_of_rows,
    live_rows,
    load_keys,
    store_keys,
)
from .tiles import accumulate, load_pieces, similarity


@triton.jit
def _coupling(
    a1, a2, b1, b2, Wt, Live, rows, columns, strength, c2, shift,
    MASKED: tl.constexpr, D2: tl.constexpr, CENTRED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``b P`` between rows a and columns b of the block, 0 at padding.

    Without a mask nothing has to be 0: rows without a token are the last of their sequence then.
    """
    exponent = similarity(a1, a2, b1, b2, D2, PRECISION) * c2
    if CENTRED:
        exponent += tl.load(Wt + rows)[:, None] + tl.load(Wt + columns)[None, :]
    else:
        exponent += shift
    P = strength * tl.math.exp2(exponent)
    if MASKED:
        live = tl.load(Live + rows)[:, None] * tl.load(Live + columns)[None, :]
        P = tl.where(live > 0, P, 0.0)
    return P


@triton.jit
def _inverse_pointers(T, rows, columns, H: tl.constexpr):
    """Where the inverse's entries at (rows, columns) of a block are, quadrant by quadrant."""
    return T + (rows // H + columns // H) * (H * H) + (rows % H) * H + columns % H


@triton.jit
def _load_eight(pointers):
    """Eight entries from each pointer, a tuple; a thread has all that come from one."""
    x = tl.load(pointers[:, None] + tl.arange(0, 8)[None, :]).to(tl.float32)
    x = tl.reshape(x, (pointers.shape[0], 2, 2, 2))
    a, b = tl.split(x)
    aa, ab = tl.split(a)
    ba, bb = tl.split(b)
    x0, x4 = tl.split(aa)
    x2, x6 = tl.split(ab)
    x1, x5 = tl.split(ba)
    x3, x7 = tl.split(bb)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _substitute(T, R: tl.constexpr, H: tl.constexpr):
    """Invert the 16 x 16 tiles on the diagonal in place: row by row, a thread for each of the R columns.

    Plain substitution in float32: no product of tiles this small is worth its rearrangements.
    """
    entry = tl.arange(0, R)
    tile = entry // 16 * 16
    column = entry % 16
    corner = T + tl.multiple_of(tile // H * (2 * H * H) + tile % H * (H + 1), 16)
    column_rows = (tl.where(column == 0, 1.0, 0.0),)
    for r in tl.static_range(1, 16):
        # Entries of the row from r on are 0.
        x = tl.where(column == r, 1.0, 0.0)
        left = _load_eight(corner + r * H)
        for k in tl.static_range(min(r, 8)):
            x -= left[k] * column_rows[k]
        if r > 8:
            right = _load_eight(corner + r * H + 8)
            for k in tl.static_range(8, r):
                x -= right[k - 8] * column_rows[k]
        column_rows = column_rows + (x,)  # noqa: RUF005
    tl.debug_barrier()
    for r in tl.static_range(1, 16):
        x = tl.where(column < r, column_rows[r], 0.0)
        tl.store(corner + r * H + column, x.to(T.dtype.element_ty))
    tl.debug_barrier()


@triton.jit
def _merge(
    T, exact_one, GROUPS: tl.constexpr, SIZE: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Pairs of inverses of side ``SIZE`` to inverses of twice that: ``-X2 C X1`` in the place of C."""
    group = 2 * SIZE * tl.arange(0, GROUPS)[:, None, None]
    row = tl.arange(0, SIZE)[None, :, None]
    column = tl.arange(0, SIZE)[None, None, :]
    first = tl.load(_inverse_pointers(T, group + row, group + column, H))
    second = tl.load(_inverse_pointers(T, group + SIZE + row, group + SIZE + column, H))
    place = _inverse_pointers(T, group + SIZE + row, group + column, H)
    below = _merged(tl.load(place), first, second, exact_one, PRECISION)
    tl.debug_barrier()
    tl.store(place, below)
    tl.debug_barrier()


@triton.jit
def _merged(C, first, second, exact_one, PRECISION: tl.constexpr):
    """``-(1 + second) C (1 + first)``; the ones are not multiplied."""
    below = accumulate(C.to(tl.float32), second, C, exact_one, PRECISION)
    return -accumulate(below, below.to(C.dtype), first, exact_one, PRECISION).to(C.dtype)


@triton.jit(do_not_specialize=["heads", "chains", "blocks", "length", "reference_c"])
def inverse_kernel(
    Key, Reference, Value, Second, Mask, Blocks, Kh, Wt, Live, Largest, LargestSecond, Bad, Strength, T,
    width, value_width, key_b, key_h, key_n, value_b, value_h, value_n, second_b, second_h, second_n,
    reference_c, heads, chains, blocks, length, c2, shift, eps, exact_one,
    D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    R: tl.constexpr, WARPS: tl.constexpr, PACKED: tl.constexpr,
    CENTRED: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Grid: ``chains * blocks`` programs. What they exchange between steps lies in ``Kh`` and ``T``.

    Widths and strides are in ``UNIT``s of entries (``plan.in_units``).
    """
    width *= UNIT
    value_width *= UNIT
    key_n *= UNIT
    value_n *= UNIT
    second_n *= UNIT
    program = tl.program_id(0)
    chain = program % chains
    block = program // chains
    batch = (chain // heads).to(tl.int64)
    head = (chain % heads).to(tl.int64)
    H: tl.constexpr = R // 2
    row = tl.arange(0, H)
    upper, upper_live, first_block = live_rows(Mask, Blocks, batch, block, blocks, length, row, R, PACKED)  # fmt: skip
    lower, lower_live, _ = live_rows(Mask, Blocks, batch, block, blocks, length, H + row, R, PACKED)
    keys = Key + (batch * key_b + head * key_h) * UNIT
    start = (chain.to(tl.int64) * blocks + block) * R
    reference = chain.to(tl.int64) * reference_c + first_block
    k1, k2 = load_keys(keys, upper, key_n, upper_live, width, D1, D2)
    squares = store_keys(
        k1, k2, upper_live, row >= 0, Reference, Kh, Wt, Live, start + row, reference, width, c2, eps,
        D1, D2, CENTRED,
    )  # fmt: skip
    k1, k2 = load_keys(keys, lower, key_n, lower_live, width, D1, D2)
    squares += store_keys(
        k1, k2, lower_live, row >= 0, Reference, Kh, Wt, Live, start + H + row, reference, width, c2, eps,
        D1, D2, CENTRED,
    )  # fmt: skip
    values = Value + (batch * value_b + head * value_h) * UNIT
    seconds = None
    largest = largest_of_rows(
        values, upper, upper_live, lower, lower_live, value_n, value_width, E1, E2, WARPS
    )
    worst = largest
    if Second is not None:
        seconds = Second + (batch * second_b + head * second_h) * UNIT
        largest_second = largest_of_rows(
            seconds, upper, upper_live, lower, lower_live, second_n, value_width, E1, E2, WARPS
        )
        worst = tl.maximum(largest, largest_second)
    slot = chain * blocks + first_block
    # The sum is not finite either where only a square is not; such a key is 0, as it should be.
    if (worst < INFINITY_BITS) & (tl.sum(squares, axis=0) < float("inf")):
        tl.atomic_max(Largest + slot, largest, sem="relaxed")
        if Second is not None:
            tl.atomic_max(LargestSecond + slot, largest_second, sem="relaxed")
    else:
        for half in range(2):
            index = half * H + row
            rows, live, _ = live_rows(Mask, Blocks, batch, block, blocks, length, index, R, PACKED)
            k1, k2 = load_keys(keys, rows, key_n, live, width, D1, D2)
            finite = inspect_rows(
                values, seconds, k1, k2, rows, live, block * R + index, blocks * R, slot,
                Largest, LargestSecond, Bad, value_n, second_n, value_width, D2, E1, E2, False,
            )  # fmt: skip
            # Only what is not finite is overwritten: other rows keep every bit.
            store_keys(
                tl.zeros_like(k1), tl.zeros_like(k2), live, finite == 0,
                Reference, Kh, Wt, Live, start + index, reference, width, c2, eps, D1, D2, CENTRED,
            )  # fmt: skip
    tl.debug_barrier()
    strength = 1.0
    if Strength is not None:
        strength = tl.load(Strength + chain % heads).to(tl.float32)
    DTYPE: tl.constexpr = T.dtype.element_ty
    upper = start + row
    lower = upper + H
    T += start // R * (3 * H * H)
    corner = T + row[:, None] * H + row[None, :]
    below_one = row[:, None] > row[None, :]
    MASKED: tl.constexpr = Mask is not None
    u1, u2 = load_pieces(Kh, start, H, D1, D2)
    l1, l2 = load_pieces(Kh, start + H, H, D1, D2)
    P = _coupling(u1, u2, u1, u2, Wt, Live, upper, upper, strength, c2, shift, MASKED, D2, CENTRED, PRECISION)  # fmt: skip
    tl.store(corner, tl.where(below_one, P, 0.0).to(DTYPE))
    P = _coupling(l1, l2, l1, l2, Wt, Live, lower, lower, strength, c2, shift, MASKED, D2, CENTRED, PRECISION)  # fmt: skip
    tl.store(corner + 2 * H * H, tl.where(below_one, P, 0.0).to(DTYPE))
    P = _coupling(l1, l2, u1, u2, Wt, Live, lower, upper, strength, c2, shift, MASKED, D2, CENTRED, PRECISION)  # fmt: skip
    P = P.to(DTYPE)
    tl.debug_barrier()
    _substitute(T, R, H)
    if H >= 32:
        _merge(T, exact_one, R // 32, 16, H, PRECISION)
    if H >= 64:
        _merge(T, exact_one, R // 64, 32, H, PRECISION)
    # The last pair in two dimensions: three would give every warp the whole tile.
    first, second = tl.load(corner), tl.load(corner + 2 * H * H)
    below = _merged(P, first, second, exact_one, PRECISION)
    tl.store(corner + H * H, below)
