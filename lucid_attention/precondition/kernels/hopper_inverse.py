"""A block's rows prepared, and its inverse: `inverse` for Hopper's kernels of up to 128 columns.

What a block's steps exchange stays in shared memory. A program has one block of 128 rows, in halves of 64; four programs share
a multiprocessor, so that one computes while others wait for rows.

* Keys are normalised, put where the tensor cores take them from, and copied from there to the workspace. Of
  values the largest magnitude is looked for.
* What is left is in ``hopper_quadrants.py``: ``P`` in three quadrants, tiles of 16 inverted and merged by twos.

Most of a program's code is run once, and its instructions come from the second-level cache the first time: a version
with tiles of 32 to begin with, and with loops unrolled, had 1.6 times as many of them and took up to 1.9 times as long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from ..numerics import KEY_EPS
from .hopper_links import marks
from .hopper_quadrants import invert_block
from .hopper_tiles import accumulator, anew, rows_layout, stores_done
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


# Results


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

    strength = 1.0
    if Strength is not None:
        strength = gl.load(Strength + head).to(gl.float32)
    first, corner, second = invert_block(
        own, Live, start, strength, c2, shift, length, TTile, Mask is not None
    )
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
