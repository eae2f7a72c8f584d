"""One tile of the adjoint's sweep for one group of four warps; ``hopper_adjoint.py`` has the whole."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_tiles import accumulator, anew, exp2, halves, in_order, keep, operand, place_in

STAGES = gl.constexpr(2)
"""Tiles of columns whose keys or dV are held, or on their way, at a time; both are asked for a tile ahead."""
USED = gl.constexpr(4)
"""Barriers that say of a tile that it was used, in turn: no fewer than there are stages, and a power of two."""
BUFFERS = gl.constexpr(4)
"""Tiles of O on their way to the adders, two of each group: three would need the groups to meet (`hopper_adjoint.py`)."""
CHUNK = gl.constexpr(64)


@gluon.jit
def buffer_of(staging, push, W: gl.constexpr):
    """Which buffer a group's part of a push takes, and the parity of how often it was taken before."""
    return place_in(staging, 2 * push + W)


@gluon.jit
def claim(staging, o_empty, push, W: gl.constexpr):
    """The buffer for a group's part of a push, once the adder has read what was there."""
    at, phase = buffer_of(staging, push, W)
    mbarrier.wait(o_empty.index(at), phase ^ 1)
    return at


@gluon.jit
def put(x, staging, at):
    """Store a tile of 64 rows, of at most 64 columns."""
    LINES: gl.constexpr = x.shape[1] // 4
    staging.index(at).slice(0, LINES, dim=0).store(in_order(x))


@gluon.jit
def hand_over(x, staging, o_full, o_empty, push, W: gl.constexpr):
    """Give a tile of 64 rows to the adder of the push."""
    at = claim(staging, o_empty, push, W)
    put(x, staging, at)
    fence_async_shared()
    mbarrier.arrive(o_full.index(at))


@gluon.jit
def similarity(own, ring, full, tile, pred):
    """Start ``own . tile^T`` once the tile is there; with ``pred`` false it is on whatever is there."""
    stage, phase = place_in(ring, tile)
    mbarrier.wait(full.index(stage), phase, pred=pred)
    M: gl.constexpr = ring.shape[1]
    zero = gl.zeros([64, M], gl.float32, accumulator(M))
    columns = ring.index(stage).permute((1, 0))
    return warpgroup_mma(own, columns, zero, use_acc=False, is_async=True)


@gluon.jit
def _other_half(use, zero, keys, pieces, M: gl.constexpr, W: gl.constexpr, TAIL: gl.constexpr):
    """Start ``O = T^T K`` of tile ``use``: all rows of T, and of O the group's part."""
    COLUMNS: gl.constexpr = TAIL if M == 64 and W == 1 else 64
    if M == 64:
        left = (use % 2) * 2
        step: gl.constexpr = 1
        k1 = keys.index(zero).slice(CHUNK * W, COLUMNS, dim=1)
        k2 = keys.index(zero + 1).slice(CHUNK * W, COLUMNS, dim=1)
    else:
        left = (use % 2) * 4 + W
        step: gl.constexpr = 2
        k1 = keys.index(zero)
        k2 = keys.index(zero + 1)
    o = gl.zeros([64, COLUMNS], gl.float32, accumulator(COLUMNS))
    o = warpgroup_mma(pieces.index(left).permute((1, 0)), k1, o, use_acc=False, is_async=True)
    return warpgroup_mma(pieces.index(left + step).permute((1, 0)), k2, o, is_async=True)


@gluon.jit
def last_half(use, push, keys, pieces, staging, t_full, o_full, o_empty, unscale, M: gl.constexpr, W: gl.constexpr, TAIL: gl.constexpr):  # fmt: skip
    """What the last of several ``sweep_tile`` leaves to do."""
    mbarrier.wait(t_full, use & 1)
    o = warpgroup_mma_wait(0, deps=[_other_half(use, anew(), keys, pieces, M, W, TAIL)])
    hand_over(o * unscale, staging, o_full, o_empty, push, W)


@gluon.jit
def sweep_tile(
    s, acc, toward, total, tile, use, push, more, edge,
    keys, solution, key_ring, grad_ring, pieces, staging,
    key_full, grad_full, empty, t_full, o_full, o_empty, c2, shift, unscale,
    W: gl.constexpr, ADJOINT: gl.constexpr, EDGE: gl.constexpr, SUM: gl.constexpr,
    LATE: gl.constexpr, FOLLOWS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """One tile of columns; its ``S`` is under way, and so is the next one's on return.

    ``tile``, ``use`` and ``push`` count, from the program's first tile on, tiles, those with a T, and what was given to the adders.

    ``LATE``: with the next tile, or in ``last_half``, comes the tile's ``O``, for which both groups' T is
    needed: then they may be up to a tile apart and fill each other's gaps. ``FOLLOWS``: there is a
    tile before this one in the sweep.
    ``EDGE``: only pairs of a row ``j`` and a column ``i`` with ``i + edge > j`` count; with ``SUM``, the block's own
    (``edge`` below 128) are added to ``total``.
    ``TAIL``: of the keys' columns from 64 on, so many are not known to be zeros.
    """
    M: gl.constexpr = key_ring.shape[1]
    D: gl.constexpr = key_ring.shape[2]
    key_stage, _ = place_in(key_ring, tile)
    grad_stage = tile % STAGES
    used = tile % USED
    zero = anew()
    s = warpgroup_mma_wait(0, deps=[s])
    g = similarity(solution.index(W + zero), grad_ring, grad_full, tile, True)
    p = exp2(s * c2 + shift).to(gl.float16)
    if ADJOINT:
        E: gl.constexpr = grad_ring.shape[2]
        acc = warpgroup_mma(operand(p, E), grad_ring.index(grad_stage), acc, is_async=True)
        g = warpgroup_mma_wait(1, deps=[g])
    else:
        g = warpgroup_mma_wait(0, deps=[g])
    t = g * p.to(gl.float32)
    if EDGE:
        row = gl.arange(0, 64, layout=gl.SliceLayout(1, accumulator(M)))
        column = gl.arange(0, M, layout=gl.SliceLayout(0, accumulator(M)))
        t = gl.where((column + edge)[None, :] > row[:, None], t, 0.0)
        if SUM:
            total += gl.where(edge < 128, gl.sum(keep(t), axis=1), 0.0)
    t = t.to(gl.float16)

    if LATE:
        if FOLLOWS:
            # Both groups' T of the tile before is there; both have done with the one before that.
            mbarrier.wait(t_full, (use & 1) ^ 1)
            o = _other_half(use - 1, anew(), keys, pieces, M, W, TAIL)
            if ADJOINT:
                acc = warpgroup_mma_wait(1, deps=[acc])
        elif ADJOINT:
            acc = warpgroup_mma_wait(0, deps=[acc])
    toward = warpgroup_mma(operand(t, D), key_ring.index(key_stage), toward, is_async=True)
    if LATE:
        s = similarity(keys.index(W + zero), key_ring, key_full, tile + 1, more)
    # The group's part of T for the other half, while the products above run.
    if M == 64:
        pieces.index((use % 2) * 2 + W).store(t)
    else:
        place = (use % 2) * 4 + 2 * W
        t1, t2 = halves(t)
        pieces.index(place).store(t1)
        pieces.index(place + 1).store(t2)
    if LATE and FOLLOWS:
        o = warpgroup_mma_wait(2, deps=[o])
        at = claim(staging, o_empty, push - 1, W)
        put(o * unscale, staging, at)  # one fence for both: it takes a tenth of a tile's time
    fence_async_shared()
    mbarrier.arrive(t_full)
    if LATE:
        if FOLLOWS:
            mbarrier.arrive(o_full.index(at))
        toward = warpgroup_mma_wait(1, deps=[toward])
        mbarrier.arrive(empty.index(used))
    else:
        if ADJOINT:
            acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.wait(t_full, use & 1)
        o = _other_half(use, zero, keys, pieces, M, W, TAIL)
        s = similarity(keys.index(W + zero), key_ring, key_full, tile + 1, more)
        o, toward = warpgroup_mma_wait(1, deps=[o, toward])
        mbarrier.arrive(empty.index(used))
        hand_over(o * unscale, staging, o_full, o_empty, push, W)
    return s, acc, toward, total
