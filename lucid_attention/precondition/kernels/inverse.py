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
def _coupling(
    a1, a2, b1, b2, Wt, Live, rows, columns, strength, c2, shift,
    D2: tl.constexpr, CENTRED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``b P`` between rows a and columns b of the block, 0 at padding."""
    exponent = similarity(a1, a2, b1, b2, D2, PRECISION) * c2
    if CENTRED:
        exponent += tl.load(Wt + rows)[:, None] + tl.load(Wt + columns)[None, :]
    else:
        exponent += shift
    live = tl.load(Live + rows)[:, None] * tl.load(Live + columns)[None, :]
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
        # The row's entries from r on are 0 in T, and the rows of X before r are final.
        a = tl.load(_inverse_pointers(T, tile + r, tile + k, H)).to(tl.float32)
        X = tl.where(k == r, X - tl.sum(a * X, axis=1)[:, None], X)
    tl.debug_barrier()
    X = tl.where(column < k, X, 0.0)
    tl.store(_inverse_pointers(T, tile + k, tile + column, H), X.to(T.dtype.element_ty))
    tl.debug_barrier()


@triton.jit
def _merge(T, GROUPS: tl.constexpr, SIZE: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr):
    """Pairs of inverses of side ``SIZE`` to inverses of twice that: ``-X2 C X1`` in the place of C."""
    group = 2 * SIZE * tl.arange(0, GROUPS)[:, None, None]
    row = tl.arange(0, SIZE)[None, :, None]
    column = tl.arange(0, SIZE)[None, None, :]
    one = row == column
    first = tl.load(_inverse_pointers(T, group + row, group + column, H))
    second = tl.load(_inverse_pointers(T, group + SIZE + row, group + SIZE + column, H))
    place = _inverse_pointers(T, group + SIZE + row, group + column, H)
    DTYPE: tl.constexpr = T.dtype.element_ty
    first = tl.where(one, 1.0, first).to(DTYPE)
    second = tl.where(one, 1.0, second).to(DTYPE)
    below = tl.dot(second, tl.load(place), input_precision=PRECISION)
    below = -tl.dot(below.to(DTYPE), first, input_precision=PRECISION)
    tl.debug_barrier()
    tl.store(place, below.to(DTYPE))
    tl.debug_barrier()


@triton.jit(do_not_specialize=["heads", "chains", "blocks"])
def inverse_kernel(
    Kh, Wt, Live, Strength, T, heads, chains, blocks, c2, shift,
    D1: tl.constexpr, D2: tl.constexpr, R: tl.constexpr, CENTRED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: ``chains * blocks`` programs. What they exchange between steps lies in ``T`` itself."""
    program = tl.program_id(0)
    chain = program % chains
    block = program // chains
    start = (chain.to(tl.int64) * blocks + block) * R
    strength = 1.0
    if Strength is not None:
        strength = tl.load(Strength + chain % heads).to(tl.float32)
    H: tl.constexpr = R // 2
    DTYPE: tl.constexpr = T.dtype.element_ty
    row = tl.arange(0, H)
    upper = start + row
    lower = upper + H
    T += start // R * (3 * H * H)
    corner = T + row[:, None] * H + row[None, :]
    below_one = row[:, None] > row[None, :]
    u1, u2 = load_pieces(Kh, start, H, D1, D2)
    l1, l2 = load_pieces(Kh, start + H, H, D1, D2)
    P = _coupling(u1, u2, u1, u2, Wt, Live, upper, upper, strength, c2, shift, D2, CENTRED, PRECISION)  # fmt: skip
    tl.store(corner, tl.where(below_one, P, 0.0).to(DTYPE))
    P = _coupling(l1, l2, l1, l2, Wt, Live, lower, lower, strength, c2, shift, D2, CENTRED, PRECISION)  # fmt: skip
    tl.store(corner + 2 * H * H, tl.where(below_one, P, 0.0).to(DTYPE))
    P = _coupling(l1, l2, u1, u2, Wt, Live, lower, upper, strength, c2, shift, D2, CENTRED, PRECISION)  # fmt: skip
    P = P.to(DTYPE)
    tl.debug_barrier()
    _substitute(T, R, H)
    if H >= 32:
        _merge(T, R // 32, 16, H, PRECISION)
    if H >= 64:
        _merge(T, R // 64, 32, H, PRECISION)
    # The last pair in two dimensions: three would give every warp the whole tile.
    one = row[:, None] == row[None, :]
    first = tl.where(one, 1.0, tl.load(corner)).to(DTYPE)
    second = tl.where(one, 1.0, tl.load(corner + 2 * H * H)).to(DTYPE)
    below = tl.dot(second, P, input_precision=PRECISION)
    below = -tl.dot(below.to(DTYPE), first, input_precision=PRECISION)
    tl.store(corner + H * H, below.to(DTYPE))
