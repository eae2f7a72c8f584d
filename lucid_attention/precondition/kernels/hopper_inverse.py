"""A block's rows prepared, and its inverse: `inverse` for Hopper's kernels of up to 128 columns.

What a block's steps exchange stays in shared memory. A program has one block of 128 rows, in halves of 64; four programs share
a multiprocessor, so that one computes while others wait for rows.

* Keys are normalised, put where the tensor cores take them from, and copied from there to the workspace. Of
  values the largest magnitude is looked for.
* ``P`` in three quadrants. The eight tiles of 16 on the diagonal are inverted by substitution in float32,
  a thread for each column.
* Pairs merge as in ``inverse.py``, ``-(1 + X_2) P_21 (1 + X_1)``: to tiles of 32 and then of 64 by products of whole
  quadrants, of which the new tiles are taken (what else is in them has nothing to do with these); the
  last pair is the two quadrants.

Most of a program's code is run once, and its instructions come from the second-level cache the first time: a version
with tiles of 32 to begin with, and with loops unrolled, had 1.6 times as many of them and took up to 1.9 times as long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..numerics import KEY_EPS
from .hopper_links import marks
from .hopper_tiles import accumulator, anew, exp2, operand, rows_layout, stores_done
from .prepare import INFINITY_BITS

if TYPE_CHECKING:
    from collections.abc import Callable

    from .plan import Run

REGISTERS = 128
"""Of a thread: as many as leave room for four programs on a multiprocessor."""


# Rows


@gluon.jit
def _places(Mask, Blocks, batch, block, blocks, length, index, PACKED: gl.constexpr):
    """Rows ``index`` of a block: where they are, and which hold a token. See ``tiles.place_rows``."""
    if PACKED:
        rows = gl.load(Blocks + block) + index
        live = index < gl.load(Blocks + blocks + block)
    else:
        rows = block * 128 + index
        live = rows < length
    if Mask is not None:
        live = live & (gl.load(Mask + batch * length + rows, mask=live, other=0) != 0)
    return rows, live


@gluon.jit
def _load(base, stride, width, rows, live, W: gl.constexpr, layout: gl.constexpr):
    """Rows of a user's tensor, 0 where there is no token: (rows, W)."""
    column = gl.arange(0, W, layout=gl.SliceLayout(0, layout))
    pointers = base + rows.to(gl.int64)[:, None] * stride + column[None, :]
    return gl.load(pointers, mask=live[:, None] & (column < width)[None, :], other=0.0)


@gluon.jit
def _normalise(k, width, eps, place):
    """Store ``khat``; return the sums of the squares, without eps."""
    k = k.to(gl.float32)
    square = gl.sum(k * k, axis=1)
    place.store((k * gl.rsqrt(square / width + eps)[:, None]).to(gl.float16))
    return square


@gluon.jit
def _magnitudes(x):
    """Magnitudes as bits, whose order is the same; what is not finite is largest. Of two bytes two at a time."""
    if x.dtype.primitive_bitwidth == 16:
        return gl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x7fff7fff;", "=r,r", [x], dtype=gl.int16, is_pure=True, pack=2
        )
    else:  # noqa: RET505 (what follows a return would be compiled as well)
        return x.to(gl.int32, bitcast=True) & 0x7FFFFFFF


@gluon.jit
def _larger(x, y):
    if x.dtype.primitive_bitwidth == 16:
        return gl.inline_asm_elementwise(
            "max.u16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.int16, is_pure=True, pack=2
        )
    else:  # noqa: RET505
        return gl.maximum(x, y)


@gluon.jit
def _largest_held(x):
    """The largest magnitudes of 64 rows in the few that each thread has a part of; no data moves."""
    x = _magnitudes(x)
    for _ in gl.static_range(2 if x.shape[1] == 64 else 3):
        x = gl.reshape(x, (2, x.shape[0] // 2, x.shape[1]))
        upper, lower = gl.split(gl.permute(x, (1, 2, 0)))
        x = _larger(upper, lower)
    return x


@gluon.jit
def _float_bits(magnitudes, dtype: gl.constexpr):
    """The largest of magnitudes of this dtype, as the bits of a float32."""
    if dtype.primitive_bitwidth == 16:
        largest = gl.max(gl.max(magnitudes.to(gl.int32), axis=1), axis=0).to(gl.int16)
        largest = largest.to(dtype, bitcast=True).to(gl.float32)
        return largest.to(gl.int32, bitcast=True) & 0x7FFFFFFF
    else:  # noqa: RET505
        return gl.max(gl.max(magnitudes, axis=1), axis=0)


@gluon.jit
def _finite_rows(x):
    return gl.min((gl.abs(x.to(gl.float32)) < float("inf")).to(gl.int32), axis=1)


@gluon.jit
def _inspect(base, stride, width, rows, live, Largest, W: gl.constexpr, layout: gl.constexpr):
    """Which rows are finite; the largest magnitude of what is finite goes to ``Largest``."""
    plain: gl.constexpr = rows_layout(W)
    rows = gl.convert_layout(rows, gl.SliceLayout(1, plain))
    live = gl.convert_layout(live, gl.SliceLayout(1, plain))
    x = _load(base, stride, width, rows, live, W, plain)
    magnitude = gl.abs(x.to(gl.float32))
    magnitude = gl.where(magnitude < float("inf"), magnitude, 0.0)
    largest = gl.max(gl.max(magnitude, axis=1), axis=0)
    gl.atomic_max(Largest, largest.to(gl.int32, bitcast=True), sem="relaxed")
    return gl.convert_layout(_finite_rows(x), gl.SliceLayout(1, layout))


# The inverse


@gluon.jit
def _similarities(own):
    """Start the products of the quadrants 11, 22 and 21."""
    zero = gl.zeros([64, 64], gl.float32, accumulator(64))
    upper = own.index(0)
    lower = own.index(1)
    s11 = warpgroup_mma(upper, upper.permute((1, 0)), zero, use_acc=False, is_async=True)
    s22 = warpgroup_mma(lower, lower.permute((1, 0)), zero, use_acc=False, is_async=True)
    s21 = warpgroup_mma(lower, upper.permute((1, 0)), zero, use_acc=False, is_async=True)
    return s11, s22, s21


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


@gluon.jit
def _of_diagonal(x):
    """Of a quadrant the four tiles of 16 on the diagonal, below each other: (64, 16). No data moves."""
    even, odd = gl.split(gl.permute(gl.reshape(x, (64, 2, 2, 16)), (0, 1, 3, 2)))
    a, c = gl.split(gl.permute(even, (0, 2, 1)))
    b, d = gl.split(gl.permute(odd, (0, 2, 1)))
    layout: gl.constexpr = accumulator(16)
    a, b = gl.convert_layout(a, layout), gl.convert_layout(b, layout)
    c, d = gl.convert_layout(c, layout), gl.convert_layout(d, layout)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))[:, None]
    x = gl.where(row < 32, gl.where(row < 16, a, b), gl.where(row < 48, c, d))
    # As it is multiplied elsewhere: of identical keys much cancels, and only what was rounded alike does.
    return x.to(gl.float16).to(gl.float32)


@gluon.jit
def _as_diagonal(x):
    """The quadrant with these tiles on the diagonal and 0 elsewhere. No data moves."""
    tile = gl.arange(0, 64, layout=gl.SliceLayout(1, accumulator(16)))[:, None] // 16
    a = gl.where(tile == 0, x, 0.0)
    b = gl.where(tile == 1, x, 0.0)
    c = gl.where(tile == 2, x, 0.0)
    d = gl.where(tile == 3, x, 0.0)
    x = gl.join(gl.join(a, c), gl.join(b, d))  # (row, column, upper bit of the tile, lower bit)
    x = gl.reshape(gl.permute(x, (0, 2, 3, 1)), (64, 64))
    return gl.convert_layout(x, accumulator(64)).to(gl.float16)


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


@gluon.jit
def _from_left(C, second):
    """Start ``C + second C``; operands in shared memory."""
    return warpgroup_mma(second, C, C.load(accumulator(64)).to(gl.float32), is_async=True)


@gluon.jit
def _from_right(below, first):
    """Start ``below + below first``."""
    return warpgroup_mma(operand(below, 64), first, below, is_async=True)


@gluon.jit
def _merge(place, below, level):
    """Add to a quadrant what is new: minus ``below`` under every second tile of 16 (``level`` 0) or 32 (1) on the diagonal."""
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, accumulator(64)))[:, None]
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, accumulator(64)))[None, :]
    small = (row // 16 == column // 16 + 1) & (row // 16 % 2 == 1)
    large = (row >= 32) & (column < 32)
    new = (small & (level == 0)) | (large & (level > 0))
    below = gl.where(new, -below, 0.0).to(gl.float16)
    # It was 0 there.
    both = gl.inline_asm_elementwise(
        "or.b32 $0, $1, $2;", "=r,r,r", [place.load(accumulator(64)), below],
        dtype=gl.float16, is_pure=True, pack=2,
    )  # fmt: skip
    place.store(both)


@gluon.jit
def _store_as_operand(to, quadrant):
    """Store a quadrant as `hopper_adjoint` loads it: for each 16 columns of its transpose, 16 bytes a thread."""
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [1, 4], [1, 0])
    x = quadrant.permute((1, 0)).load(gl.DotOperandLayout(0, accumulator(64), 2))
    x = gl.permute(gl.reshape(x, (4, 2, 8, 4, 2, 4, 2)), (3, 0, 2, 5, 4, 1, 6))
    x = gl.convert_layout(gl.reshape(x, (4, 1024)), plain)
    step = gl.arange(0, 4, layout=gl.SliceLayout(1, plain))
    entry = gl.arange(0, 1024, layout=gl.SliceLayout(0, plain))
    gl.store(to + step[:, None] * 1024 + entry[None, :], x)


@gluon.jit
def _copy_keys(KeyRows, slot, own):
    tma.async_copy_shared_to_global(KeyRows, [slot * 128, 0], own.index(0))
    tma.async_copy_shared_to_global(KeyRows, [slot * 128 + 64, 0], own.index(1))


@gluon.jit(do_not_specialize=["heads", "chains", "blocks", "length"])
def hopper_inverse_kernel(
    KeyRows, TTile, Key, Value, Second, Mask, Blocks, Live, Largest, LargestSecond, Bad, Strength, T, Rows,
    width, value_width, key_b, key_h, key_n, value_b, value_h, value_n, second_b, second_h, second_n,
    heads, chains, blocks, length, c2, shift, eps,
    D: gl.constexpr, E: gl.constexpr, STORED: gl.constexpr, PACKED: gl.constexpr, OPERAND: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """Grid: ``chains * blocks`` programs. Widths and strides are in ``UNIT``s of entries (``plan.in_units``).

    ``OPERAND``: quadrants are written as the fused adjoint loads them, not as tiles. ``Rows``: what is marked (`hopper_links`), with ``STORED`` columns.
    """
    width *= UNIT
    value_width *= UNIT
    key_n *= UNIT
    value_n *= UNIT
    second_n *= UNIT
    program = gl.program_id(0)
    chain = program % chains
    block = program // chains
    batch = (chain // heads).to(gl.int64)
    head = (chain % heads).to(gl.int64)
    slot = chain * blocks + block
    start = slot.to(gl.int64) * 128
    first_block = 0
    if PACKED:
        first_block = gl.load(Blocks + 2 * blocks + block)
    entry = chain * blocks + first_block
    keys = Key + (batch * key_b + head * key_h) * UNIT
    values = Value + (batch * value_b + head * value_h) * UNIT
    seconds = None
    if Second is not None:
        seconds = Second + (batch * second_b + head * second_h) * UNIT
    twice = 2 + anew()  # a loop that is not unrolled

    plain: gl.constexpr = rows_layout(D)
    value_plain: gl.constexpr = rows_layout(E)
    ROWS: gl.constexpr = 4096 // D  # in float32 at a time
    # Registers hold all rows of a half at once if there are no others, and addresses are few.
    AHEAD: gl.constexpr = ROWS < 64 and Second is None and UNIT == 1
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, plain))
    value_row = gl.arange(0, 64, layout=gl.SliceLayout(1, value_plain))
    own = gl.allocate_shared_memory(gl.float16, [2, 64, D], KeyRows.layout)
    squares = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, plain))
    largest = _largest_held(gl.zeros([64, E], Value.dtype.element_ty, value_plain))
    if Second is not None:
        largest_second = _largest_held(gl.zeros([64, E], Second.dtype.element_ty, value_plain))
    if Rows is not None:
        column = gl.arange(0, E, layout=gl.SliceLayout(0, value_plain))[None, :]
        for half in range(twice):
            marked = (start + half * 64 + value_row)[:, None] * STORED + column
            gl.store(Rows + marked, marks(64, E, value_plain), mask=column < STORED)
    for half in range(twice):
        rows, live = _places(
            Mask, Blocks, batch, block, blocks, length, half * 64 + value_row, PACKED
        )
        v = _load(values, value_n, value_width, rows, live, E, value_plain)
        index = half * 64 + row
        key_rows, key_live = _places(Mask, Blocks, batch, block, blocks, length, index, PACKED)
        k = _load(keys, key_n, width, key_rows, key_live, D, plain)
        if ROWS < 64:
            others, others_live = _places(
                Mask, Blocks, batch, block, blocks, length, index + ROWS, PACKED
            )
            if AHEAD:
                k2 = _load(keys, key_n, width, others, others_live, D, plain)
        if AHEAD:
            largest = _larger(largest, _largest_held(v))
        gl.store(Live + start + index, key_live.to(gl.int8))
        squares += _normalise(k, width, eps, own.index(half).slice(0, ROWS, dim=0))
        if ROWS < 64:
            if not AHEAD:
                k2 = _load(keys, key_n, width, others, others_live, D, plain)
            gl.store(Live + start + ROWS + index, others_live.to(gl.int8))
            squares += _normalise(k2, width, eps, own.index(half).slice(ROWS, ROWS, dim=0))
        if not AHEAD:
            largest = _larger(largest, _largest_held(v))
        if Second is not None:
            v = _load(seconds, second_n, value_width, rows, live, E, value_plain)
            largest_second = _larger(largest_second, _largest_held(v))
    fence_async_shared()
    gl.thread_barrier()
    _copy_keys(KeyRows, slot, own)
    s11, s22, s21 = _similarities(own)

    bits = _float_bits(largest, Value.dtype.element_ty)
    worst = bits
    if Second is not None:
        bits_second = _float_bits(largest_second, Second.dtype.element_ty)
        worst = gl.maximum(bits, bits_second)
    # The sum is not finite either where only a square is not; such a key is 0, as it should be.
    if (worst < INFINITY_BITS) & (gl.sum(squares, axis=0) < float("inf")):
        gl.atomic_max(Largest + entry, bits, sem="relaxed")
        if Second is not None:
            gl.atomic_max(LargestSecond + entry, bits_second, sem="relaxed")
    else:
        s11, s22, s21 = warpgroup_mma_wait(0, deps=[s11, s22, s21])
        stores_done(block)  # of the keys, which are stored again
        gl.thread_barrier()
        near = gl.arange(0, 64, layout=gl.SliceLayout(1, plain))
        for half in range(twice):
            index = half * 64 + near
            near_rows, near_live = _places(
                Mask, Blocks, batch, block, blocks, length, index, PACKED
            )
            finite = _finite_rows(_load(keys, key_n, width, near_rows, near_live, D, plain))
            finite &= _inspect(
                values, value_n, value_width, near_rows, near_live, Largest + entry, E, plain
            )
            if Second is not None:
                finite &= _inspect(
                    seconds, second_n, value_width, near_rows, near_live, LargestSecond + entry, E, plain
                )  # fmt: skip
            bad = gl.where(near_live & (finite == 0), (blocks - block) * 128 - index, 0)
            bad = gl.max(bad, axis=0)
            gl.atomic_max(Bad + entry, bad, mask=bad > 0, sem="relaxed")
            # Only what is not finite is overwritten: other rows keep every bit.
            kept = own.index(half).load(plain)
            own.index(half).store(gl.where(finite[:, None] != 0, kept, 0.0).to(gl.float16))
        fence_async_shared()
        gl.thread_barrier()
        _copy_keys(KeyRows, slot, own)
        s11, s22, s21 = _similarities(own)

    strength = 1.0
    if Strength is not None:
        strength = gl.load(Strength + head).to(gl.float32)
    MASKED: gl.constexpr = Mask is not None
    s11, s22, s21 = warpgroup_mma_wait(0, deps=[s11, s22, s21])
    tma.store_wait(0)
    gl.thread_barrier()  # nobody reads the keys any more: what is allocated from here on may take their place
    p11 = _coupling(s11, Live, start, start, strength, c2, shift, MASKED)
    p22 = _coupling(s22, Live, start + 64, start + 64, strength, c2, shift, MASKED)
    p21 = _coupling(s21, Live, start + 64, start, strength, c2, shift, MASKED)
    coupling = gl.allocate_shared_memory(gl.float16, [3, 64, 64], TTile.layout)
    coupling.index(0).store(p11.to(gl.float16))
    coupling.index(1).store(p22.to(gl.float16))
    coupling.index(2).store(p21.to(gl.float16))
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    cube: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    tiles = gl.allocate_shared_memory(gl.float32, [128, 16], flat)
    upper_tiles = tiles.slice(0, 64, dim=0)
    lower_tiles = tiles.slice(64, 64, dim=0)
    upper_tiles.store(_of_diagonal(p11))
    lower_tiles.store(_of_diagonal(p22))
    tiles.store(_substitute(tiles._reinterpret(gl.float32, [8, 16, 16], cube)))
    inverse = gl.allocate_shared_memory(gl.float16, [2, 64, 64], TTile.layout)
    first = inverse.index(0)
    second = inverse.index(1)
    first.store(_as_diagonal(upper_tiles.load(accumulator(16))))
    second.store(_as_diagonal(lower_tiles.load(accumulator(16))))
    fence_async_shared()
    gl.thread_barrier()
    for level in range(twice):
        below = _from_left(coupling.index(0), first)
        below2 = _from_left(coupling.index(1), second)
        below, below2 = warpgroup_mma_wait(0, deps=[below, below2])
        below = _from_right(below, first)
        below2 = _from_right(below2, second)
        below, below2 = warpgroup_mma_wait(0, deps=[below, below2])
        gl.thread_barrier()
        _merge(first, below, level)
        _merge(second, below2, level)
        fence_async_shared()
        gl.thread_barrier()
    corner = coupling.index(2)
    below = warpgroup_mma_wait(0, deps=[_from_left(corner, second)])
    below = warpgroup_mma_wait(0, deps=[_from_right(below, first)])
    gl.thread_barrier()
    corner.store((-below).to(gl.float16))
    if OPERAND:
        gl.thread_barrier()
        T += slot.to(gl.int64) * (3 * 4096)
        _store_as_operand(T, first)
        _store_as_operand(T + 4096, corner)
        _store_as_operand(T + 2 * 4096, second)
    else:
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(TTile, [slot * 192, 0], first)
        tma.async_copy_shared_to_global(TTile, [slot * 192 + 64, 0], corner)
        tma.async_copy_shared_to_global(TTile, [slot * 192 + 128, 0], second)
        tma.store_wait(0)


def hopper_inverse(
    run: Run, key: Any, value: Any, second: Any, mask: Any, strength: Any,
    units: Callable[[], tuple[int, list[int]]], *, marked: Any, fused: bool,
) -> None:  # fmt: skip
    """What `stages.prepare` does, for calls of up to 128 columns. ``units``: `plan.in_units` of widths and strides;
    ``marked``: rows that are given marks (`hopper_links`).
    """
    call, at, geometry = run.call, run.at, run.call.geometry
    kernel = hopper_inverse_kernel

    run.launch(
        kernel, geometry.slots,
        (
            *run.tiles(kernel, lambda: (
                (at.keys, call.key_width, 64, call.key_tile), (at.inverse, 64, 64, 64),
            )),
            key, value, second, mask, at.table, at.live, at.largest,
            None if second is None else at.largest_second, at.bad, strength, at.inverse, marked,
        ),
        lambda: (*units()[1], *geometry.sizes, call.c2, call.shift(0), KEY_EPS),
        lambda: {
            "D": call.key_tile, "E": call.solution_tile, "STORED": call.solution_width, "PACKED": geometry.packed, "OPERAND": fused,
            "UNIT": units()[0], "num_warps": 4, "maxnreg": REGISTERS,
        },
    )  # fmt: skip
