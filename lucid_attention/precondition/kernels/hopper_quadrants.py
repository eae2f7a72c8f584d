"""The inverse of a diagonal block of 128 rows from its normalised keys, for ``hopper_inverse.py``.

``P`` in three quadrants of 64 x 64. The eight tiles of 16 on its diagonal are inverted by substitution in float32, a thread for
each column. Pairs merge as in ``inverse.py``, ``-(1 + X_2) P_21 (1 + X_1)``: tiles of 16 to 32, and 32 to 64, by the products of
single warps (``mma_v2``), the two quadrants by a group's. Everything is in shared memory or registers.

Products of whole quadrants in the place of the small ones, of which the new tiles were taken, were a quarter of all
instructions, and more of the traffic of shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_tiles import accumulator, exp2, operand

# P


@gluon.jit
def _coupling(s, Live, rows_at, columns_at, strength, c2, shift, MASKED: gl.constexpr):
    """``b P`` from similarities, 0 at padding (without a mask nothing has to be 0: see ``inverse.py``)."""
    p = strength * exp2(s * c2 + shift)
    if MASKED:
        row = gl.arange(0, 64, layout=gl.SliceLayout(1, accumulator(64)))
        column = gl.arange(0, 64, layout=gl.SliceLayout(0, accumulator(64)))
        live = gl.load(Live + rows_at + row)[:, None] * gl.load(Live + columns_at + column)[None, :]
        p = gl.where(live > 0, p, 0.0)
    return p


# A quadrant and its tiles of 16: columns by tiles are (64, 16), a warp's rows are those of one tile


@gluon.jit
def _by_columns(x):
    """A quadrant's columns by tiles of 16: four times (64, 16). No data moves."""
    even, odd = gl.split(gl.permute(gl.reshape(x, (64, 2, 2, 16)), (0, 1, 3, 2)))
    a, c = gl.split(gl.permute(even, (0, 2, 1)))
    b, d = gl.split(gl.permute(odd, (0, 2, 1)))
    layout: gl.constexpr = accumulator(16)
    return (
        gl.convert_layout(a, layout), gl.convert_layout(b, layout),
        gl.convert_layout(c, layout), gl.convert_layout(d, layout),
    )  # fmt: skip


@gluon.jit
def _rows_before(tile: gl.constexpr):
    """A mask of the rows of tiles before this one: (64, 16)."""
    layout: gl.constexpr = accumulator(16)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))[:, None]
    return gl.where(row + gl.zeros([64, 16], gl.int32, layout) < 16 * tile, -1, 0).to(gl.int16)


@gluon.jit
def _select(mask, x, y):
    """``x`` where the mask is set and ``y`` elsewhere, two at a time."""
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xca;", "=r,r,r,r", [mask, x, y], dtype=gl.float16, is_pure=True, pack=2
    )  # fmt: skip


@gluon.jit
def _split_quadrant(p, diagonal, under):
    """Store of a quadrant the tiles of 16 on the diagonal, and in their rows those next to it (1, 0) and (3, 2); return columns 0 to 31.

    All are rounded as they are multiplied elsewhere: of identical keys much cancels, and only what was rounded alike does.
    """
    a, b, c, d = _by_columns(p.to(gl.float16))
    upper = _rows_before(2)
    own = _select(upper, _select(_rows_before(1), a, b), _select(_rows_before(3), c, d))
    diagonal.store(own.to(gl.float32))
    under.store(_select(upper, a, c))
    return a, b


@gluon.jit
def _join_quadrant(diagonal, under, a, b):
    """The quadrant with these tiles on the diagonal, of ``under`` (1, 0) and (3, 2), and the lower half of ``a`` and ``b``."""
    x = diagonal.load(accumulator(16)).to(gl.float16)
    below = under.load(accumulator(16))
    first = _rows_before(1)
    upper = _rows_before(2)
    last = _rows_before(3)
    zero = gl.zeros([64, 16], gl.float16, accumulator(16))
    a = _select(upper, _select(first, x, below), a)
    b = _select(upper, _select(first, zero, x), b)
    c = _select(last, _select(upper, zero, x), below)
    d = _select(last, zero, x)
    x = gl.join(gl.join(a, c), gl.join(b, d))  # (row, column, upper bit of the tile, lower bit)
    x = gl.reshape(gl.permute(x, (0, 2, 3, 1)), (64, 64))
    return gl.convert_layout(x, accumulator(64))


# Substitution


@gluon.jit
def _eight(tiles, r: gl.constexpr, first: gl.constexpr, layout: gl.constexpr):
    """Eight entries of row ``r`` of all tiles, a tuple; every thread has those of its tile."""
    whole: gl.constexpr = gl.BlockedLayout([1, 1, 8], [2, 16, 1], [4, 1, 1], [2, 1, 0])
    x = tiles.slice(r, 1, dim=1).slice(first, 8, dim=2).load(whole)
    a, b = gl.split(gl.reshape(x, (8, 2, 2, 2)))
    aa, ab = gl.split(a)
    ba, bb = gl.split(b)
    x0, x4 = gl.split(aa)
    x2, x6 = gl.split(ab)
    x1, x5 = gl.split(ba)
    x3, x7 = gl.split(bb)
    return (
        gl.convert_layout(x0, layout), gl.convert_layout(x1, layout), gl.convert_layout(x2, layout),
        gl.convert_layout(x3, layout), gl.convert_layout(x4, layout), gl.convert_layout(x5, layout),
        gl.convert_layout(x6, layout), gl.convert_layout(x7, layout),
    )  # fmt: skip


@gluon.jit
def _paired(parts, HALF: gl.constexpr):
    """Each of the first ``HALF`` tensors with the one that is so far behind it, in a last dimension."""
    pairs = (gl.join(parts[0], parts[HALF]),)
    for i in gl.static_range(1, HALF):
        pairs = pairs + (gl.join(parts[i], parts[HALF + i]),)  # noqa: RUF005
    return pairs


@gluon.jit
def _substitute(tiles):
    """The inverses of eight unit lower triangular tiles of 16, without the ones, below each other: (128, 16).

    Plain substitution in float32, row by row. Only what is under the diagonals is read.
    """
    columns: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, columns))[None, :]
    nothing = gl.zeros([8, 16], gl.float32, columns)
    solved = (nothing + gl.where(column == 0, 1.0, 0.0),)
    below = (nothing,)
    for r in gl.static_range(1, 16):
        # Entries of the row from r on are 0.
        x = nothing
        for part in gl.static_range((r + 7) // 8):
            entries = _eight(tiles, r, 8 * part, gl.SliceLayout(1, columns))
            for k in gl.static_range(min(r - 8 * part, 8)):
                x -= entries[k][:, None] * solved[8 * part + k]
        solved = solved + (x + gl.where(column == r, 1.0, 0.0),)  # noqa: RUF005
        below = below + (x,)  # noqa: RUF005
    for level in gl.static_range(4):
        below = _paired(below, 8 >> level)
    return gl.reshape(gl.permute(gl.reshape(below[0], (8, 16, 16)), (0, 2, 1)), (128, 16))


# Merges


@gluon.jit
def _from_left(C, second):
    """Start ``C + second C``; operands in shared memory."""
    return warpgroup_mma(second, C, C.load(accumulator(64)).to(gl.float32), is_async=True)


@gluon.jit
def _from_right(below, first):
    """Start ``below + below first``."""
    return warpgroup_mma(operand(below, 64), first, below, is_async=True)


@gluon.jit
def _merged(second, C, first, layout: gl.constexpr):
    """``-(1 + second) C (1 + first)`` of tiles in shared memory, along a first dimension: what `_from_left` and `_from_right` do for quadrants."""
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    below = C.load(layout).to(gl.float32)
    below = mma_v2(second.load(left).to(gl.float16), C.load(right), below)
    below = mma_v2(
        gl.convert_layout(below.to(gl.float16), left), first.load(right).to(gl.float16), below
    )
    return (-below).to(gl.float16)


# A block


@gluon.jit
def invert_block(own, Live, start, strength, c2, shift, length, TTile, MASKED: gl.constexpr):  # fmt: skip
    """The quadrants 11, 21 and 22 of a block's inverse, without the ones, in shared memory as ``TTile`` takes them.

    Args:
        own: khat, (2, 64, D) in shared memory, which is free for others afterwards, after what copies it by TMA is done.
        Live: which rows hold a token, from the block's first at ``start`` on; read if ``MASKED``.
    """
    zero = gl.zeros([64, 64], gl.float32, accumulator(64))
    upper = own.index(0)
    lower = own.index(1)
    s21 = warpgroup_mma(lower, upper.permute((1, 0)), zero, use_acc=False, is_async=True)
    s21 = warpgroup_mma_wait(0, deps=[s21])
    corner = gl.allocate_shared_memory(gl.float16, [64, 64], TTile.layout)
    p21 = _coupling(s21, Live, start + 64, start, strength, c2, shift, MASKED)
    corner.store(p21.to(gl.float16))
    s11 = warpgroup_mma(upper, upper.permute((1, 0)), zero, use_acc=False, is_async=True)
    s22 = warpgroup_mma(lower, lower.permute((1, 0)), zero, use_acc=False, is_async=True)
    # Into registers: the compiler would load these arguments again for every product.
    c2 = gl.where(length < 0, 0.0, c2)
    shift = gl.where(length < 0, 0.0, shift)
    s11, s22 = warpgroup_mma_wait(0, deps=[s11, s22])
    tma.store_wait(0)
    gl.thread_barrier()  # nobody reads the keys any more: what is allocated from here on may take their place

    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    cube: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    tiles = gl.allocate_shared_memory(gl.float32, [128, 16], flat)
    under = gl.allocate_shared_memory(gl.float16, [128, 16], flat)
    upper_tiles = tiles.slice(0, 64, dim=0)
    lower_tiles = tiles.slice(64, 64, dim=0)
    upper_under = under.slice(0, 64, dim=0)
    lower_under = under.slice(64, 64, dim=0)
    p11 = _coupling(s11, Live, start, start, strength, c2, shift, MASKED)
    a11, b11 = _split_quadrant(p11, upper_tiles, upper_under)
    p22 = _coupling(s22, Live, start + 64, start + 64, strength, c2, shift, MASKED)
    a22, b22 = _split_quadrant(p22, lower_tiles, lower_under)
    tiles.store(_substitute(tiles._reinterpret(gl.float32, [8, 16, 16], cube)))

    # To tiles of 32: by twos, the second below the first, a warp for each two.
    twos = tiles._reinterpret(gl.float32, [4, 32, 16], cube)
    below = under._reinterpret(gl.float16, [4, 32, 16], cube).slice(16, 16, dim=1)
    small: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8])
    below.store(_merged(twos.slice(16, 16, dim=1), below, twos.slice(0, 16, dim=1), small))
    inverse = gl.allocate_shared_memory(gl.float16, [2, 64, 64], TTile.layout)
    first = inverse.index(0)
    second = inverse.index(1)
    first.store(_join_quadrant(upper_tiles, upper_under, a11, b11))
    second.store(_join_quadrant(lower_tiles, lower_under, a22, b22))

    # To quadrants: of both the lower left quarter, where P still is, two warps for each.
    large: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [2, 2, 1], [1, 16, 8])
    both = inverse._reinterpret(gl.float16, [2, 64, 64], gl.NVMMASharedLayout(128, 16, rank=3))
    left = both.slice(0, 32, dim=2)
    below = left.slice(32, 32, dim=1)
    right = both.slice(32, 32, dim=2)
    below.store(_merged(right.slice(32, 32, dim=1), below, left.slice(0, 32, dim=1), large))
    fence_async_shared()
    gl.thread_barrier()

    below = warpgroup_mma_wait(0, deps=[_from_left(corner, second)])
    below = warpgroup_mma_wait(0, deps=[_from_right(below, first)])
    gl.thread_barrier()
    corner.store((-below).to(gl.float16))
    return first, corner, second
