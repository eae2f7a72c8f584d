"""The adjoint's single warps: two load what the groups read, two add what they give to other blocks.

``hopper_adjoint.py`` says what they wait for.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
)

from .hopper_pairs import STAGES, USED, buffer_of
from .hopper_tiles import look_at, place_in, reduce_add, stores_done, wait_for


@gluon.jit
def _prefetch(rows, stride, count, WIDTH: gl.constexpr):
    """Bring a block's rows into the second-level cache; one warp."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    row = gl.minimum(gl.arange(0, 128, layout=layout), count - 1).to(gl.int64)
    for column in gl.static_range(0, WIDTH, 64):
        gl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [(rows + row * stride + column).to(gl.int64, bitcast=True)],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )


@gluon.jit
def _wait_for_room(empty, tile):
    """Until both groups have used the tile that was in this one's place, ``STAGES`` before."""
    before = tile + (USED - STAGES)  # plus a round, which the first ones do not wait for
    mbarrier.wait(empty.index(before % USED), ((before // USED) & 1) ^ 1)


@gluon.jit
def load_keys(
    KeyRows, KeyTiles, keys, key_ring, own, key_full, empty, slot, last, need, late,
    Grad, grad_n, count, WIDTH: gl.constexpr,
):  # fmt: skip
    """Own keys, then the column tiles' keys in the order of the sweep; dY on its way near the end."""
    M: gl.constexpr = key_ring.shape[1]
    PARTS: gl.constexpr = 128 // M
    mbarrier.expect(own, 2 * KeyRows.block_type.nbytes)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(KeyRows, [slot * 128 + 64 * half, 0], own, keys.index(half))
    for tile in range((need + late + 1) * PARTS):
        if tile == gl.maximum(need - 2, 0) * PARTS:
            _prefetch(Grad, grad_n, count, WIDTH)
        step = tile // PARTS
        step = gl.where(step < need, step, step - late)
        stage, _ = place_in(key_ring, tile)
        _wait_for_room(empty, tile)
        mbarrier.expect(key_full.index(stage), KeyTiles.block_type.nbytes)
        at = (last - step) * 128 + (PARTS - 1 - tile % PARTS) * M
        tma.async_copy_global_to_shared(
            KeyTiles, [at, 0], key_full.index(stage), key_ring.index(stage)
        )


@gluon.jit
def load_grads(GradTiles, grad_ring, grad_full, empty, Done, last, need, late):
    """DV of the column tiles, each once both halves of its block are announced."""
    M: gl.constexpr = grad_ring.shape[1]
    PARTS: gl.constexpr = 128 // M
    ready = 0
    for tile in range((need + late + 1) * PARTS):
        step = tile // PARTS
        step = gl.where(step < need, step, step - late)
        stage = tile % STAGES
        _wait_for_room(empty, tile)
        if ready < 2 * (step + 1):
            ready = wait_for(Done, 2 * (step + 1))
        mbarrier.expect(grad_full.index(stage), GradTiles.block_type.nbytes)
        at = (last - step) * 128 + (PARTS - 1 - tile % PARTS) * M
        tma.async_copy_global_to_shared(
            GradTiles, [at, 0], grad_full.index(stage), grad_ring.index(stage)
        )


@gluon.jit
def _send(Tile, row, staging, o_full, push, add, W: gl.constexpr):
    LINES: gl.constexpr = Tile.block_type.shape[0]
    at, phase = buffer_of(staging, push, W)
    given = staging.index(at).slice(0, LINES, dim=0)
    mbarrier.wait(o_full.index(at), phase)
    if add:
        reduce_add(Tile, [row, 0], given)
    else:
        tma.async_copy_shared_to_global(Tile, [row, 0], given)


@gluon.jit
def _give(First, Second, row, step, staging, o_full, o_empty, push, add):
    """Add, or store, the two groups' tiles of a push; their buffers are free on return."""
    _send(First, row, staging, o_full, push, add, 0)
    _send(Second, row + step, staging, o_full, push, add, 1)
    for w in gl.static_range(2):
        at, _ = buffer_of(staging, push, w)
        tma.store_wait(1 - w)
        mbarrier.arrive(o_empty.index(at))


@gluon.jit
def add_up(Toward, Tail, staging, o_full, o_empty, stored, Turn, slot, need, M: gl.constexpr, D: gl.constexpr, ODD: gl.constexpr):  # fmt: skip
    """What this block gives to the later ones, each in its turn; then its own ``Toward``.

    ``Tail``: the same memory, in tiles of the columns from 64 on.

    One warp for even pushes and one for odd ones: from a turn to the next program's turn takes about as
    long as the products of a tile.
    """
    PARTS: gl.constexpr = 128 // M
    # Lines of 256 numbers that 64 rows take: 64 columns, and the tail's.
    LINES: gl.constexpr = 16 if D == 64 else 16 + Tail.block_type.shape[0]
    # Counters of the blocks' parts in the order of the sweep, backwards; own ones last.
    Turn += slot * PARTS
    tiles = (need + 1) * PARTS
    seen = 0
    for push in range(ODD, tiles, 2):
        part = tiles - 1 - push
        ahead = part // PARTS
        if seen < ahead:
            wait_for(Turn + part, ahead)
        # The groups' tiles are side by side (PARTS 2) or one below the other.
        row = (slot * PARTS + part) * (M // 64 * LINES)
        if PARTS == 2:
            _give(Toward, Tail, row, 16, staging, o_full, o_empty, push, ahead > 0)
        else:
            _give(Toward, Toward, row, 16, staging, o_full, o_empty, push, ahead > 0)
        # Looked at while what was added is on its way.
        seen = look_at(Turn + gl.maximum(part - 2, 0))
        stores_done(push)
        gl.thread_barrier()
        if ahead > 0:
            gl.atomic_xchg(Turn + part, ahead + 1, sem="release")
    if ODD:
        mbarrier.arrive(stored)
    else:
        mbarrier.wait(stored, 0)
        row = slot * 2 * LINES
        _give(Toward, Toward, row, LINES, staging, o_full, o_empty, tiles, True)
        if D > 64:
            _give(Tail, Tail, row + 16, LINES, staging, o_full, o_empty, tiles + 1, True)
        stores_done(tiles)
        gl.thread_barrier()
        for part in gl.static_range(PARTS):
            gl.atomic_xchg(Turn + part, 1, sem="release")
