"""The key gradient from finished ``Y`` and ``dV``, for Hopper; every block by itself.

With ``T_ji = (y_j . dV_i) P_ji`` for ``j < i`` a block's rows meet every block of their sequence: as ``j``
the later ones with their own ``y`` at hand, then as ``i`` the earlier ones with their own ``dV``,

    toward_r = sum_{i>r} T_ri k_i + sum_{j<r} T_jr k_j

and both directions end with the block itself, of which each counts one half. That is six products for a pair of
blocks and two more for ``dV`` (`hopper_solve`), where one sweep that has ``P`` once (`hopper_adjoint`) takes five; but
no sums go through memory in turns, nobody waits, and a tile's two sums of 64 x 256 need not be in
registers together.

Eight warps compute, four for each half of the rows; one loads. The products of the next tile with the block's rows are under
way behind the sum of this one, while its exponentials are taken in the other group.

Shared memory (swizzled):

    own (2, 64, D)   rows (2, 64, E): first y, then dV   keys (STAGES, or 2, M, D)   columns (STAGES, M, E)

Barriers: ``own_full`` and ``rows_full`` (bytes; the latter once for each direction), ``rows_empty`` (both groups: the first
direction is through); of each slot ``key_full``, ``column_full`` (bytes), ``key_empty``, ``column_empty`` (both groups).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_tiles import (
    accumulator,
    anew,
    exp2,
    in_order,
    operand,
    place_in,
    power_of_two,
    range_exponent,
    rows_layout,
)

if TYPE_CHECKING:
    from .plan import Run

COLUMNS = 64
"""Rows of a column tile."""
_SHARED = 225 * 1024


@gluon.jit
def _send(Tile, at, ring, full, empty, tile):
    slot, phase = place_in(ring, tile)
    mbarrier.wait(empty.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), Tile.block_type.nbytes)
    tma.async_copy_global_to_shared(Tile, [at, 0], full.index(slot), ring.index(slot))


@gluon.jit
def _loader(
    KeyTile, GradTile, SolutionTile, own, rows, keys, columns,
    own_full, rows_full, rows_empty, key_full, key_empty, column_full, column_empty,
    here, low, high, later, earlier, M: gl.constexpr,
):  # fmt: skip
    """One warp. The far ends come first: programs of a chain read the same tiles at about the same time."""
    mbarrier.expect(own_full, 2 * KeyTile.block_type.nbytes)
    mbarrier.expect(rows_full, 2 * SolutionTile.block_type.nbytes)
    for half in gl.static_range(2):
        at = here + 64 * half
        tma.async_copy_global_to_shared(KeyTile, [at, 0], own_full, own.index(half))
        tma.async_copy_global_to_shared(SolutionTile, [at, 0], rows_full, rows.index(half))
    for tile in range(later):
        at = high - (tile + 1) * M
        _send(KeyTile, at, keys, key_full, key_empty, tile)
        _send(GradTile, at, columns, column_full, column_empty, tile)
    for step in range(earlier):
        tile = later + step
        at = low + step * M
        _send(KeyTile, at, keys, key_full, key_empty, tile)
        if step == 0:
            mbarrier.wait(rows_empty, 0)
            mbarrier.expect(rows_full, 2 * GradTile.block_type.nbytes)
            for half in gl.static_range(2):
                own_rows = rows.index(half)
                tma.async_copy_global_to_shared(
                    GradTile, [here + 64 * half, 0], rows_full, own_rows
                )
        _send(SolutionTile, at, columns, column_full, column_empty, tile)


@gluon.jit
def _above(square):
    """A ``k`` with ``2^k >= sqrt(square)``, at most twice too large unless it is -20, the least."""
    half = ((square.to(gl.int32, bitcast=True) >> 23) - 125) >> 1
    return gl.maximum(half, -20)


@gluon.jit
def _exponent(rows, columns_norm, E: gl.constexpr):
    """The power of two that brings ``T`` of 64 rows into float16's range, from norms: ``|T| <= |row| |column|``.

    The bounds of rows that are not yet known, which the other kernels go by, are ``2 sqrt(N)`` times larger:
    of unrelated keys with 256 features, whose ``P`` is near 1e-7, they would leave two bits.
    """
    plain: gl.constexpr = rows_layout(E)
    x = rows.load(plain).to(gl.float32)
    largest = gl.max(gl.sum(x * x, axis=1), axis=0)
    return 15 - _above(largest) - _above(columns_norm)


@gluon.jit
def _products(own, rows, keys, columns, key_full, column_full, tile, pred, GROUP: gl.constexpr):
    """Start a tile's ``S`` and ``G`` once it is there; with ``pred`` false on whatever is there."""
    half = GROUP + anew()
    M: gl.constexpr = keys.shape[1]
    slot, phase = place_in(keys, tile)
    zero = gl.zeros([64, M], gl.float32, accumulator(M))
    mbarrier.wait(key_full.index(slot), phase, pred=pred)
    s = warpgroup_mma(
        own.index(half), keys.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True
    )
    slot, phase = place_in(columns, tile)
    mbarrier.wait(column_full.index(slot), phase, pred=pred)
    g = warpgroup_mma(
        rows.index(half), columns.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True
    )
    return s, g


@gluon.jit
def _sweep(
    toward, total, own, rows, keys, columns, key_full, key_empty, column_full, column_empty,
    first, tiles, edge, c2, shift, GROUP: gl.constexpr, LATER: gl.constexpr, SUM: gl.constexpr,
):  # fmt: skip
    """Add what ``tiles`` tiles from the ``first`` on give; ``edge``: column less row of the first tile's corner."""
    M: gl.constexpr = keys.shape[1]
    D: gl.constexpr = keys.shape[2]
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, accumulator(M)))[:, None]
    column = gl.arange(0, M, layout=gl.SliceLayout(0, accumulator(M)))[None, :]
    s, g = _products(own, rows, keys, columns, key_full, column_full, first, True, GROUP)
    s, g = warpgroup_mma_wait(0, deps=[s, g])
    for step in range(tiles):
        tile = first + step
        slot, _ = place_in(columns, tile)
        mbarrier.arrive(column_empty.index(slot))
        t = g * exp2(s * c2 + shift)
        # Of the block itself either direction counts one half; everything else lies on one side.
        if LATER:
            t = gl.where(column + edge > row, t, 0.0)
            edge -= M
            if SUM:
                total += gl.sum(t, axis=1)
        else:
            t = gl.where(column + edge < row, t, 0.0)
            edge += M
        slot, _ = place_in(keys, tile)
        toward = warpgroup_mma(operand(t, D), keys.index(slot), toward, is_async=True)
        more = step + 1 < tiles
        s, g = _products(own, rows, keys, columns, key_full, column_full, tile + 1, more, GROUP)
        s, g, toward = warpgroup_mma_wait(0, deps=[s, g, toward])
        mbarrier.arrive(key_empty.index(slot))
    return toward, total


@gluon.jit
def _group(
    own, rows, keys, columns,
    own_full, rows_full, rows_empty, key_full, key_empty, column_full, column_empty,
    Toward, StrengthSum, Strength, Norms, LargestGrad, LargestSolution, Bad,
    slot, sequence, later, earlier, headroom, c2, shift, STORED: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Four warps: rows ``64 GROUP`` to ``64 GROUP + 63`` of the block."""
    M: gl.constexpr = keys.shape[1]
    D: gl.constexpr = keys.shape[2]
    E: gl.constexpr = columns.shape[2]
    SUM: gl.constexpr = Strength is not None
    toward = gl.zeros([64, D], gl.float32, accumulator(D))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, accumulator(M)))
    mbarrier.wait(own_full, 0)
    mbarrier.wait(rows_full, 0)
    Norms += 2 * sequence
    exponent = _exponent(rows.index(GROUP), gl.load(Norms + 1), E)
    toward, total = _sweep(
        toward, total, own, rows, keys, columns, key_full, key_empty, column_full, column_empty,
        0, later, later * M - M - 64 * GROUP, c2, shift + exponent, GROUP, True, SUM,
    )  # fmt: skip
    if SUM:
        bad = gl.load(Bad + sequence) > 0
        pairs = gl.sum(total, axis=0) * power_of_two(-exponent)
        pairs *= power_of_two(-range_exponent(gl.load(LargestGrad + sequence), headroom))
        pairs *= power_of_two(-range_exponent(gl.load(LargestSolution + sequence), 0))
        gl.store(StrengthSum + slot * 2 + GROUP, gl.where(bad, float("nan"), -pairs))
    mbarrier.arrive(rows_empty)
    mbarrier.wait(rows_full, 1)
    before = exponent
    exponent = _exponent(rows.index(GROUP), gl.load(Norms), E)
    toward = toward * power_of_two(exponent - before)
    toward, total = _sweep(
        toward, total, own, rows, keys, columns, key_full, key_empty, column_full, column_empty,
        later, earlier, 128 - earlier * M - 64 * GROUP, c2, shift + exponent, GROUP, False, False,
    )  # fmt: skip
    toward = toward * power_of_two(-exponent)
    toward = in_order(toward)
    line = gl.arange(0, D // 4, layout=gl.SliceLayout(1, toward.type.layout))[:, None]
    entry = gl.arange(0, 256, layout=gl.SliceLayout(0, toward.type.layout))[None, :]
    Toward += (slot * 2 + GROUP).to(gl.int64) * (64 * STORED)
    gl.store(Toward + line * 256 + entry, toward, mask=line < STORED // 4)


@gluon.jit(do_not_specialize=["heads", "blocks", "length", "headroom"])
def hopper_toward_kernel(
    KeyTile, GradTile, SolutionTile, Toward, StrengthSum, Strength, Blocks, Norms, LargestGrad, LargestSolution, Bad,
    heads, blocks, length, headroom, c2, shift,
    D: gl.constexpr, E: gl.constexpr, STORED: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Grid: ``chains * blocks`` programs, a chain's one after another. ``STORED`` of the D columns of sums are not known to be zeros."""
    slot = gl.program_id(0)
    chain = slot // blocks
    block = slot % blocks
    first = 0
    end = blocks
    count = length
    if PACKED:
        count = gl.load(Blocks + blocks + block)
        first = gl.load(Blocks + 2 * blocks + block)
        end = gl.load(Blocks + 3 * blocks + block)
    if Strength is not None:
        Strength += chain % heads

    own = gl.allocate_shared_memory(gl.float16, [2, 64, D], KeyTile.layout)
    rows = gl.allocate_shared_memory(gl.float16, [2, 64, E], GradTile.layout)
    # A tile's keys are needed again when its other rows have been used: they take the room that is left.
    KEY_STAGES: gl.constexpr = max(STAGES, 2)
    keys = gl.allocate_shared_memory(gl.float16, [KEY_STAGES, M, D], KeyTile.layout)
    columns = gl.allocate_shared_memory(gl.float16, [STAGES, M, E], GradTile.layout)
    single: gl.constexpr = mbarrier.MBarrierLayout()
    own_full = gl.allocate_shared_memory(gl.int64, [1], single)
    rows_full = gl.allocate_shared_memory(gl.int64, [1], single)
    rows_empty = gl.allocate_shared_memory(gl.int64, [1], single)
    key_full = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], single)
    key_empty = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], single)
    column_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], single)
    column_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], single)
    mbarrier.init(own_full, count=1)
    mbarrier.init(rows_full, count=1)
    mbarrier.init(rows_empty, count=2)
    for stage in gl.static_range(KEY_STAGES):
        mbarrier.init(key_full.index(stage), count=1)
        mbarrier.init(key_empty.index(stage), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(column_full.index(stage), count=1)
        mbarrier.init(column_empty.index(stage), count=2)
    fence_async_shared()
    gl.thread_barrier()

    if count > 0:
        PARTS: gl.constexpr = 128 // M
        later = (end - block) * PARTS
        earlier = (block - first + 1) * PARTS
        sequence = chain * blocks + first
        low = sequence * 128
        high = (chain * blocks + end) * 128
        gl.warp_specialize(
            [
                (_group, (
                    own, rows, keys, columns,
                    own_full, rows_full, rows_empty, key_full, key_empty, column_full, column_empty,
                    Toward, StrengthSum, Strength, Norms, LargestGrad, LargestSolution, Bad,
                    slot, sequence, later, earlier, headroom, c2, shift, STORED, 0,
                )),
                (_group, (
                    own, rows, keys, columns,
                    own_full, rows_full, rows_empty, key_full, key_empty, column_full, column_empty,
                    Toward, StrengthSum, Strength, Norms, LargestGrad, LargestSolution, Bad,
                    slot, sequence, later, earlier, headroom, c2, shift, STORED, 1,
                )),
                (_loader, (
                    KeyTile, GradTile, SolutionTile, own, rows, keys, columns,
                    own_full, rows_full, rows_empty, key_full, key_empty, column_full, column_empty,
                    slot * 128, low, high, later, earlier, M,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


def hopper_toward(run: Run, strength: Any) -> None:
    """``Toward`` and ``-sum T`` of every block's halves, from the workspaces of keys, ``dV`` and ``Y``."""
    call, at, geometry = run.call, run.at, run.call.geometry
    D, E = call.key_tile, call.solution_tile
    keys, values = call.key_width, call.solution_width
    kernel = hopper_toward_kernel
    room = (_SHARED - 128 * (D + E) * 2) // (COLUMNS * (D + E) * 2)
    run.launch(
        kernel, geometry.slots,
        (
            *run.tiles(kernel, lambda: (
                (at.keys, keys, COLUMNS, D), (at.gh, values, COLUMNS, E), (at.yh, values, COLUMNS, E),
            )),
            at.toward, None if strength is None else at.pairs, strength, at.table, at.norms,
            at.largest, at.largest_second, at.bad,
        ),
        lambda: (
            geometry.heads, geometry.blocks, geometry.length, geometry.headroom, call.c2, call.shift(0),
        ),
        lambda: {
            "D": D, "E": E, "STORED": keys, "M": COLUMNS,
            "STAGES": 4 if room >= 4 else min(room, 2),  # powers of two: `place_in`
            "PACKED": geometry.packed, "num_warps": 4,
        },
    )  # fmt: skip
