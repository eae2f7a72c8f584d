"""Inverses of the diagonal blocks: ``T`` is the strictly lower part of ``L_ii^-1``.

One program inverts one block of R rows and writes three quadrants of side H = R / 2: 11, 21, 22.
Tiles of 16 are inverted by substitution; then pairs merge, in place,

    inv [A 0; C B] = [A^-1 0; -B^-1 C A^-1, B^-1]

which is stable for any keys: every block's inverse has a norm of at most 2. A Neumann series is not
(with repeated keys its powers reach binomial size). Products are in the operands' precision.
"""

import triton
import triton.language as tl

from .tiles import load_pieces, similarity


@triton.jit
def _grouped(start, GROUPS: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, FIRST: tl.constexpr):  # fmt: skip
    """Indices of ``SIZE`` rows from each of ``GROUPS`` groups ``STEP`` apart, the first at ``FIRST``."""
    group = start + FIRST + STEP * tl.arange(0, GROUPS)
    return group[:, None] + tl.arange(0, SIZE)[None, :]


@triton.jit
def _strip_product(acc, Kh, start, feature, GROUPS: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, SECOND: tl.constexpr, STRIP: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add a strip of features to the products of rows from ``SECOND`` and from 0 of each group."""
    strip = feature + tl.arange(0, STRIP)
    rows = _grouped(start, GROUPS, SIZE, STEP, SECOND)
    columns = _grouped(start, GROUPS, SIZE, STEP, 0)
    left = tl.load(Kh + rows[:, :, None] * D + strip[None, None, :])
    right = tl.load(Kh + columns[:, None, :] * D + strip[None, :, None])
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def _coupling(
    product, Wt, Live, start, strength, c2, shift,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, SECOND: tl.constexpr,
    CENTRED: tl.constexpr,
):  # fmt: skip
    """``b P`` from the keys' products: 3-D, one tile for each group."""
    rows = _grouped(start, GROUPS, SIZE, STEP, SECOND)
    columns = _grouped(start, GROUPS, SIZE, STEP, 0)
    exponent = product * c2
    if CENTRED:
        exponent += tl.load(Wt + rows)[:, :, None] + tl.load(Wt + columns)[:, None, :]
    else:
        exponent += shift
    live = tl.load(Live + rows)[:, :, None] * tl.load(Live + columns)[:, None, :]
    return tl.where(live > 0, strength * tl.math.exp2(exponent), 0.0)


@triton.jit
def _inverse_pointers(T, rows, columns, H: tl.constexpr):
    """Where the inverse's entries at (rows, columns) of a block are, quadrant by quadrant."""
    return T + (rows // H + columns // H) * (H * H) + (rows % H) * H + columns % H


@triton.jit
def _substitute(T, R: tl.constexpr, H: tl.constexpr):
    """Invert the 16 x 16 tiles on the diagonal in place: row by row, all columns at once.

    Plain substitution in float32: no product of tiles this small is worth its rearrangements.
    """
    entry = tl.arange(0, R)[:, None]  # one column of one tile
    k = tl.arange(0, 16)[None, :]
    tile = entry // 16 * 16
    column = entry % 16
    X = tl.where(k == column, 1.0, 0.0)  # (R, 16): X[entry, k] is row k of the entry's column
    for r in tl.static_range(1, 16):
        # The row's entries from r on are stored as 0, and the rows of X before r are final.
        a = tl.load(_inverse_pointers(T, tile + r, tile + k, H)).to(tl.float32)
        X = tl.where(k == r, X - tl.sum(a * X, axis=1)[:, None], X)
    tl.debug_barrier()
    X = tl.where(column < k, X, 0.0)
    tl.store(_inverse_pointers(T, tile + k, tile + column, H), X.to(T.dtype.element_ty))
    tl.debug_barrier()


@triton.jit
def _merge(
    T, C, GROUPS: tl.constexpr, SIZE: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr
):
    """Pairs of inverses of side ``SIZE`` to inverses of twice that: fill in ``-X2 C X1``."""
    group = 2 * SIZE * tl.arange(0, GROUPS)[:, None, None]
    row = tl.arange(0, SIZE)[None, :, None]
    column = tl.arange(0, SIZE)[None, None, :]
    one = row == column
    first = tl.load(_inverse_pointers(T, group + row, group + column, H))
    second = tl.load(_inverse_pointers(T, group + SIZE + row, group + SIZE + column, H))
    DTYPE: tl.constexpr = T.dtype.element_ty
    first = tl.where(one, 1.0, first).to(DTYPE)
    second = tl.where(one, 1.0, second).to(DTYPE)
    below = tl.dot(second, C, input_precision=PRECISION)
    below = -tl.dot(below.to(DTYPE), first, input_precision=PRECISION)
    tl.store(_inverse_pointers(T, group + SIZE + row, group + column, H), below.to(DTYPE))
    tl.debug_barrier()


@triton.jit(do_not_specialize=["heads", "chains", "blocks"])
def inverse_kernel(
    Kh, Wt, Live, Strength, T, heads, chains, blocks, depth, c2, shift,
    D1: tl.constexpr, D2: tl.constexpr, R: tl.constexpr, CENTRED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: ``chains * blocks`` programs; ``depth`` is ``D1 + D2``, known at run time only."""
    program = tl.program_id(0)
    chain = program % chains
    block = program // chains
    start = (chain.to(tl.int64) * blocks + block) * R
    strength = 1.0
    if Strength is not None:
        strength = tl.load(Strength + chain % heads).to(tl.float32)
    H: tl.constexpr = R // 2
    G: tl.constexpr = R // 16
    D: tl.constexpr = D1 + D2
    DTYPE: tl.constexpr = T.dtype.element_ty
    # All the keys' products first: they wait for nothing, the merges for each other. A strip of
    # features at a time, in a loop that is not unrolled: whole rows would spill registers. The last
    # pair is in two dimensions, because three would give every warp the whole tile.
    STRIP: tl.constexpr = 32 if D % 32 == 0 else 16
    A = tl.zeros([G, 16, 16], dtype=tl.float32)
    C32 = tl.zeros([G // 2, 16, 16], dtype=tl.float32)
    if H >= 64:
        C64 = tl.zeros([G // 4, 32, 32], dtype=tl.float32)
    for feature in tl.range(0, depth, STRIP, num_stages=2):
        A = _strip_product(A, Kh, start, feature, G, 16, 16, 0, STRIP, D, PRECISION)
        if H >= 32:
            C32 = _strip_product(C32, Kh, start, feature, G // 2, 16, 32, 16, STRIP, D, PRECISION)
        if H >= 64:
            C64 = _strip_product(C64, Kh, start, feature, G // 4, 32, 64, 32, STRIP, D, PRECISION)
    row = tl.arange(0, H)
    upper = start + row
    lower = upper + H
    c1, c2nd = load_pieces(Kh, start, H, D1, D2)
    l1, l2 = load_pieces(Kh, start + H, H, D1, D2)
    exponent = similarity(l1, l2, c1, c2nd, D2, PRECISION) * c2
    if CENTRED:
        exponent += tl.load(Wt + lower)[:, None] + tl.load(Wt + upper)[None, :]
    else:
        exponent += shift
    coupled = tl.load(Live + lower)[:, None] * tl.load(Live + upper)[None, :] > 0
    C = tl.where(coupled, strength * tl.math.exp2(exponent), 0.0).to(DTYPE)
    A = _coupling(A, Wt, Live, start, strength, c2, shift, G, 16, 16, 0, CENTRED)

    tile = T + start // R * (3 * H * H)
    pointers = tile + row[:, None] * H + row[None, :]
    tl.store(pointers, tl.zeros([H, H], dtype=DTYPE))
    tl.store(pointers + 2 * H * H, tl.zeros([H, H], dtype=DTYPE))
    tl.debug_barrier()
    group = 16 * tl.arange(0, G)[:, None, None]
    small_row = tl.arange(0, 16)[None, :, None]
    small_column = tl.arange(0, 16)[None, None, :]
    tl.store(
        _inverse_pointers(tile, group + small_row, group + small_column, H),
        tl.where(small_row > small_column, A, 0.0).to(DTYPE),
    )
    tl.debug_barrier()
    _substitute(tile, R, H)
    if H >= 32:
        C32 = _coupling(C32, Wt, Live, start, strength, c2, shift, G // 2, 16, 32, 16, CENTRED)
        _merge(tile, C32.to(DTYPE), G // 2, 16, H, PRECISION)
    if H >= 64:
        C64 = _coupling(C64, Wt, Live, start, strength, c2, shift, G // 4, 32, 64, 32, CENTRED)
        _merge(tile, C64.to(DTYPE), G // 4, 32, H, PRECISION)
    one = row[:, None] == row[None, :]
    first = tl.where(one, 1.0, tl.load(pointers)).to(DTYPE)
    second = tl.where(one, 1.0, tl.load(pointers + 2 * H * H)).to(DTYPE)
    below = tl.dot(second, C, input_precision=PRECISION)
    below = -tl.dot(below.to(DTYPE), first, input_precision=PRECISION)
    tl.store(pointers + H * H, below.to(DTYPE))
