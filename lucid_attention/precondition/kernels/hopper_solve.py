"""The solve for Hopper, forward and transposed: one warp that loads, two groups of warps that compute.

The mathematics, the workspaces and the tickets are those of `solve`; this is its form for half
precision, tiles of 64, 128 or 256 columns (`family.HOPPER_WIDTHS`) and blocks of 128 rows. What is different:

* A program stays on its multiprocessor and takes tickets until there are none left. It takes a
  ticket when everything for the one before it is loaded, and finishes its tickets in order, so that
  it still only waits for smaller tickets: no deadlock.
* The loading warp (`hopper_feed`) takes the tickets, waits for the chain and copies tiles into two rings of
  shared memory. Keys are copied before the wait for the solution that goes with them.
* Values of two bytes go to shared memory while the sweep runs, without registers (``ASYNC``), if rows come in words of four bytes.
* Each group of four warps owns half of the block's rows. It never waits for the other in the loop:
  the tensor core computes the next similarities and adds up the last product while the
  exponentials are taken. Only the block's own inverse needs the other half, once, at the end (``LINKED``: once more before the
  loop, and for what was read by halves).
* ``Done`` counts halves of blocks here, from the block of the sequence that is solved first.

``REVERSED`` solves ``L^T dV = dY`` instead, from a sequence's last block to its first, where the key
gradient does not fit in the same sweep (`hopper_adjoint` has both): ``P`` is symmetric, the inverse is
read transposed, and it is the upper half of a block that needs the lower one.

``HALVES`` multiplies the solution by ``P`` in two halves, for half of the products more (``precision="high"``); the inverses,
keys and solutions are rounded to float16 as ever.

``LINKED`` makes the steps of few chains shorter (`hopper_links`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ..implementation import multiprocessors
from .hopper_feed import load, quadrants_in, step
from .hopper_links import as_link, once_written, write_rows
from .hopper_rows import factors, store_rows, values_at
from .hopper_tiles import (
    as_long,
    power_of_two,
    range_exponent,
    rows_layout,
    stores_done,
)
from .plan import ROUND, SHIFT_FORWARD, WIDE_ROUND, in_units, in_words, rounds

if TYPE_CHECKING:
    from .plan import Run

COLUMNS = {64: 128, 128: 128, 256: 64}
"""Rows of a column tile, by the wider of keys' and values' tiles; up to 128, 64 of them with twice the stages
were 1 to 30 % slower on every shape. At 256 there is no room for more."""
HALVES_COLUMNS = 64
"""The same with ``P`` in two halves: with 128 columns there are no registers for more; with 64, 128 rows take
0 to 4 % less time forward and -1 to 3 % more backward."""
_SHARED = 225 * 1024  # of 227 KiB: the rest is for barriers and what the compiler needs


@gluon.jit
def _halves(e, left: gl.constexpr, HALVES: gl.constexpr):
    """A tile of ``P`` as an operand, and what that leaves of it: with ``HALVES`` its first 11 bits and the next 11,
    or what float16 has of them (below 2^-18 the second half ends 2^-39 below 1).

    Bits are cut off, not rounded: a rounded number that is taken from float16 back to float32 costs the assembler the order
    of the products ("serialized").
    """
    first = e
    if HALVES:
        first = (e.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)
    p = gl.convert_layout(first.to(gl.float16), left)
    rest = p
    if HALVES:
        rest = gl.convert_layout((e - first).to(gl.float16), left)
    return p, rest


@gluon.jit
def _read(note, index):
    return gl.max(note.index(index).load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)


@gluon.jit
def _times_inverse(x, right, quadrants, right_full, right_empty, phase, GROUP: gl.constexpr, AFTER: gl.constexpr, REVERSED: gl.constexpr):  # fmt: skip
    """The block's inverse times both groups' ``x``, this group's rows; ``AFTER``: those that need the other's."""
    mine = right.index(GROUP)
    mine.store(x.to(gl.float16))
    fence_async_shared()
    if not AFTER:
        mbarrier.arrive(right_full, count=1)
    gl.thread_barrier()
    diagonal = quadrants.index(2 * GROUP)
    corner = quadrants.index(1)
    if REVERSED:
        diagonal = diagonal.permute((1, 0))
        corner = corner.permute((1, 0))
    x = warpgroup_mma(diagonal, mine, x, is_async=True)
    if AFTER:
        mbarrier.wait(right_full, phase)
        x = warpgroup_mma(corner, right.index(1 - GROUP), x, is_async=True)
    x = warpgroup_mma_wait(0, deps=[x])
    if AFTER:
        mbarrier.arrive(right_empty, count=1)
    else:
        mbarrier.wait(right_empty, phase)
    return x


@gluon.jit
def _compute(
    Value, value_b, value_h, value_n, YhHalf, Yh, Y, y_b, y_h, y_n,
    Mask, Strength, Done, Largest, Bad,
    own, keys, solution, inverse, right, coupled, note,
    own_full, own_empty, key_full, key_empty, solution_full, solution_empty,
    inverse_full, inverse_empty, right_full, right_empty, came,
    heads, blocks, length, value_width, headroom, c2, shift,
    GROUP: gl.constexpr, M: gl.constexpr, PACKED: gl.constexpr,
    REVERSED: gl.constexpr, TIGHT: gl.constexpr, HALVES: gl.constexpr, LINKED: gl.constexpr, SHIFT: gl.constexpr,
    UNIT: gl.constexpr, ASYNC: gl.constexpr, STORED: gl.constexpr, PARTS: gl.constexpr, E: gl.constexpr,
):  # fmt: skip
    """Four warps: rows ``64 GROUP : 64 GROUP + 64`` of every ticket's block.

    ``TIGHT``: ``right`` is where the block's keys were, which the next block's wait for; the inverse comes in the place of a
    tile of the solution, before the last two.

    ``LINKED`` (`hopper_links`): the last tile's keys come first, and its solution last; ``coupled`` holds ``P_last``, and may be ``right``.
    A ticket is then one of ``PARTS`` parts of the columns of a block's values, of which workspaces have ``STORED``.
    """
    PER: gl.constexpr = 128 // M
    LAST: gl.constexpr = 0 if REVERSED else 1
    AFTER: gl.constexpr = GROUP == LAST  # this half's solution needs the other's
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    plain: gl.constexpr = rows_layout(E)
    if M == 64:  # noqa: SIM108 (constant expressions are not chosen between in Gluon)
        rows = own.index(GROUP)
    else:
        rows = own.index(0).slice(64 * GROUP, 64, dim=0)
    mine = right.index(GROUP)
    # Two bytes an entry go through shared memory, so that threads move 16 bytes of a row; four go as they are.
    PACKED_IN: gl.constexpr = Value.dtype.element_ty.primitive_bitwidth == 16
    PACKED_OUT: gl.constexpr = Y.dtype.element_ty.primitive_bitwidth == 16
    # There are no registers then to hold values while the last products run: they wait in shared memory.
    DELAYED: gl.constexpr = PACKED_IN and TIGHT
    given = mine._reinterpret(Value.dtype.element_ty, [64, E], right.layout) if PACKED_IN else mine
    nothing = gl.zeros([64, M], gl.float32, product)
    came_phase = 0
    right_phase = 0
    key_slot = 0
    key_phase = 0
    slot = 0
    phase = 0
    turn = 0
    mbarrier.wait(own_full, 0)
    member = _read(note, 0)
    while member >= 0:
        chain = member // PARTS
        value_column = member % PARTS * E
        block = _read(note, 1)
        first = _read(note, 2)
        at = block * 128 + 64 * GROUP
        end = length
        if PACKED:
            at = _read(note, 3) + 64 * GROUP
            end = _read(note, 4)
        if REVERSED:  # noqa: SIM108
            n = _read(note, 5)
        else:
            n = (block - first) * PER

        batch = as_long(chain // heads)
        head = as_long(chain % heads)
        entry = chain * blocks + first
        values = Value + (batch * as_long(value_b) + head * as_long(value_h)) * UNIT + value_column
        width = value_width - value_column // UNIT
        given_strength = 1.0
        if Strength is not None:
            given_strength = gl.load(Strength + head)
        if LINKED:
            mbarrier.wait(inverse_full, turn)
            link = gl.zeros([64, M], gl.float16, left)
            carried = gl.full([64], 0, gl.int32, gl.SliceLayout(1, sums))
            if n > 0:
                live, factor = factors(Mask, given_strength, batch, length, at, end, SHIFT, product)
                mbarrier.wait(key_full.index(key_slot), key_phase)
                s = warpgroup_mma(
                    rows, keys.index(key_slot).permute((1, 0)), nothing,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                s = warpgroup_mma_wait(0, deps=[s])
                mbarrier.arrive(key_empty.index(key_slot), count=1)
                key_slot, key_phase = step(key_slot, key_phase, keys.shape[0])
                # As it is multiplied: what is rounded alike cancels.
                s = gl.where(live[:, None], gl.exp2(s * c2 + shift), 0.0).to(gl.float16)
                s = _times_inverse(
                    s.to(gl.float32), coupled, inverse, right_full, right_empty, right_phase,
                    GROUP, AFTER, REVERSED,
                )  # fmt: skip
                right_phase ^= 1
                link, carried = as_link(-factor[:, None] * s, left)
                gl.thread_barrier()  # all warps' products are done: ``right`` may be the same memory
        bad = gl.load(Bad + entry)
        largest = gl.load(Largest + entry)
        if ASYNC:
            # What the last product's sum is taken from. In its place each thread still reads results of the block before, at most
            # those that it overwrites itself; the compiler puts a barrier between, too.
            pointers, there = values_at(
                values, value_n, width, Mask, batch, length, at, end, UNIT, E, plain
            )
            async_copy.async_copy_global_to_shared(given, pointers, there)
            async_copy.commit_group()

        # Tile i + 1's exponentials are taken while tile i's product with the solution runs. The
        # assembler moves nothing across a wait for a barrier, but much across a wait for a
        # product: the next tile's keys are therefore waited for before the product is. The last block's
        # tiles are left to do: of them all but the products is done before their solution is waited for.
        acc = gl.zeros([64, E], gl.float32, sums)
        p = gl.zeros([64, M], gl.float16, left)
        p2 = p
        rest = p
        rest2 = p
        follows = n > 0
        if LINKED:  # the last tile is the link's
            n = gl.maximum(n - 1, 0)
        if n > 0:
            mbarrier.wait(key_full.index(key_slot), key_phase)
            s = warpgroup_mma(
                rows, keys.index(key_slot).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(key_empty.index(key_slot), count=1)
            p, rest = _halves(gl.exp2(s * c2 + shift), left, HALVES)
            key_slot, key_phase = step(key_slot, key_phase, keys.shape[0])
            mbarrier.wait(key_full.index(key_slot), key_phase, pred=n > 1)
            for i in range(n - PER):
                s = warpgroup_mma(
                    rows, keys.index(key_slot).permute((1, 0)), nothing,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                mbarrier.wait(solution_full.index(slot), phase)
                acc = warpgroup_mma(p, solution.index(slot), acc, is_async=True)
                if HALVES:
                    acc = warpgroup_mma(rest, solution.index(slot), acc, is_async=True)
                    s = warpgroup_mma_wait(2, deps=[s])
                else:
                    s = warpgroup_mma_wait(1, deps=[s])
                mbarrier.arrive(key_empty.index(key_slot), count=1)
                e = gl.exp2(s * c2 + shift)
                last = slot
                slot, phase = step(slot, phase, solution.shape[0])
                key_slot, key_phase = step(key_slot, key_phase, keys.shape[0])
                mbarrier.wait(key_full.index(key_slot), key_phase, pred=i < n - 2)
                acc = warpgroup_mma_wait(0, deps=[acc])
                p, rest = _halves(e, left, HALVES)
                mbarrier.arrive(solution_empty.index(last), count=1)
            if PER == 2:
                s = warpgroup_mma(
                    rows, keys.index(key_slot).permute((1, 0)), nothing,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                s = warpgroup_mma_wait(0, deps=[s])
                mbarrier.arrive(key_empty.index(key_slot), count=1)
                key_slot, key_phase = step(key_slot, key_phase, keys.shape[0])
                p2, rest2 = _halves(gl.exp2(s * c2 + shift), left, HALVES)
        if TIGHT:
            gl.thread_barrier()  # all warps' products with the keys are done: now other rows take their place
        else:
            mbarrier.arrive(own_empty, count=1)

        # What the last tile needs but does not have to wait for.
        if PACKED_IN:
            if ASYNC:
                async_copy.wait_group(0)
                gl.thread_barrier()  # what other threads copied
            else:
                pointers, there = values_at(
                    values, value_n, width, Mask, batch, length, at, end, UNIT, E, plain
                )
                v = gl.load(pointers, mask=there, other=0.0)
                if DELAYED:  # noqa: SIM102 (one is known to the compiler, the other is not)
                    if bad > 0:
                        v = gl.where(gl.abs(v.to(gl.float32)) < float("inf"), v, 0.0)
                given.store(v)
            if not DELAYED:
                v = given.load(sums)
        else:
            pointers, there = values_at(
                values, value_n, width, Mask, batch, length, at, end, UNIT, E, sums
            )
            v = gl.load(pointers, mask=there, other=0.0)
        live, factor = factors(Mask, given_strength, batch, length, at, end, SHIFT, sums)
        exponent = range_exponent(largest, headroom)

        quadrants = inverse
        if TIGHT:
            quadrants = quadrants_in(solution, slot)
            mbarrier.wait(solution_full.index(slot), phase)
            held = slot
            slot, phase = step(slot, phase, solution.shape[0])
        acc = warpgroup_mma_init(acc)
        if n > 0:
            mbarrier.wait(solution_full.index(slot), phase)
            acc = warpgroup_mma(p, solution.index(slot), acc, is_async=True)
            if HALVES:
                acc = warpgroup_mma(rest, solution.index(slot), acc, is_async=True)
            if PER == 2:
                other, other_phase = step(slot, phase, solution.shape[0])
                mbarrier.wait(solution_full.index(other), other_phase)
                acc = warpgroup_mma(p2, solution.index(other), acc, is_async=True)
                if HALVES:
                    acc = warpgroup_mma(rest2, solution.index(other), acc, is_async=True)
        if not DELAYED:
            v = v.to(gl.float32) * power_of_two(exponent)
            if bad > 0:
                v = gl.where(gl.abs(v) < float("inf"), v, 0.0)
        if not TIGHT:
            mbarrier.wait(inverse_full, turn)
        acc = warpgroup_mma_wait(0, deps=[acc])
        if DELAYED:
            v = given.load(sums).to(gl.float32) * power_of_two(exponent)
        y = v - acc * factor[:, None]
        y = _times_inverse(
            y, right, quadrants, right_full, right_empty, right_phase, GROUP, AFTER, REVERSED
        )
        right_phase ^= 1
        if LINKED:
            if n > 0:
                mbarrier.arrive(solution_empty.index(slot), count=1)
                slot, phase = step(slot, phase, solution.shape[0])
            if follows:
                y *= power_of_two(carried)[:, None]
                mbarrier.wait(solution_full.index(slot), phase)
                if _read(note, 6 + slot) > 0:  # it was not there yet: see `hopper_feed`
                    NEXT: gl.constexpr = 1 if REVERSED else -1
                    before = (chain * blocks + block + NEXT) * 128 + 64 * GROUP
                    x = once_written(Yh, before, value_column, E, STORED)
                    solution.index(slot).slice(64 * GROUP, 64, dim=0).store(x)
                    fence_async_shared()
                    mbarrier.arrive(came, count=1)
                    mbarrier.wait(came, came_phase)
                    came_phase ^= 1
                y = warpgroup_mma(link, solution.index(slot), y, is_async=True)
                y = warpgroup_mma_wait(0, deps=[y])
                y *= power_of_two(-carried)[:, None]

        mine.store(y.to(gl.float16))
        start = (chain * blocks + block) * 128 + 64 * GROUP
        if LINKED:
            write_rows(Yh, start, value_column, mine.load(plain), STORED)
        else:
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(YhHalf, [start, 0], mine)
            stores_done(block)
        gl.thread_barrier()
        gl.atomic_add(Done + member * blocks + first, 1, sem="release")
        if TIGHT:
            mbarrier.arrive(solution_empty.index(held), count=1)
        if LINKED:
            if follows:
                mbarrier.arrive(solution_empty.index(slot), count=1)
                slot, phase = step(slot, phase, solution.shape[0])
        elif n > 0:
            for _ in gl.static_range(PER):
                mbarrier.arrive(solution_empty.index(slot), count=1)
                slot, phase = step(slot, phase, solution.shape[0])
        if not TIGHT:
            mbarrier.arrive(inverse_empty, count=1)

        y = y * power_of_two(-exponent)
        if bad > 0:
            # From a sequence's first row that is not finite on, results are NaN; all gradients are.
            spoiled = live
            if not REVERSED:
                padded = block * 128 + 64 * GROUP + gl.arange(0, 64, gl.SliceLayout(1, sums))
                spoiled = (padded >= blocks * 128 - bad) & live
            y = gl.where(spoiled[:, None], float("nan"), y)
        y = y.to(Y.dtype.element_ty)
        out = Y + (batch * as_long(y_b) + head * as_long(y_h)) * UNIT + value_column
        if PACKED_OUT:
            place = mine._reinterpret(Y.dtype.element_ty, [64, E], right.layout)
            place.store(y)
            store_rows(out, y_n, width, at, end, place.load(plain), UNIT, E, plain)
        else:
            store_rows(out, y_n, width, at, end, y, UNIT, E, sums)
        if TIGHT:
            fence_async_shared()
            mbarrier.arrive(own_empty, count=1)
        turn ^= 1
        mbarrier.wait(own_full, turn)
        member = _read(note, 0)


@gluon.jit(do_not_specialize=["heads", "chains", "blocks", "wide", "deep", "length", "headroom"])
def hopper_solve_kernel(
    KhTile, YhTile, YhHalf, TTile, Yh, Value, Y, Mask, Strength, Blocks, Done, Largest, Bad, Ticket,
    value_width, value_b, value_h, value_n, y_b, y_h, y_n, heads, chains, blocks, wide, deep, length, headroom, c2, shift,
    D: gl.constexpr, E: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr,
    PACKED: gl.constexpr, REVERSED: gl.constexpr, TIGHT: gl.constexpr, HALVES: gl.constexpr, LINKED: gl.constexpr,
    SHIFT: gl.constexpr, UNIT: gl.constexpr, ASYNC: gl.constexpr, STORED: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Grid: any number of programs, best one for each multiprocessor.

    ``value_width`` and the strides are in ``UNIT``s of entries (``plan.in_units``).
    """
    own = gl.allocate_shared_memory(gl.float16, [128 // M, M, D], KhTile.layout)
    keys = gl.allocate_shared_memory(gl.float16, [STAGES, M, D], KhTile.layout)
    # A tight block's inverse comes before the last tiles of the solution, all of which are then held.
    MORE: gl.constexpr = 1 if TIGHT else 0
    solution = gl.allocate_shared_memory(gl.float16, [STAGES + MORE, M, E], YhTile.layout)
    if TIGHT:
        gl.static_assert(M == 64 and D == E)
        right = own
        inverse = solution
    else:
        inverse = gl.allocate_shared_memory(gl.float16, [3, 64, 64], TTile.layout)
        right = gl.allocate_shared_memory(gl.float16, [2, 64, E], YhTile.layout)
    coupled = right
    if LINKED and E < M:
        coupled = gl.allocate_shared_memory(gl.float16, [2, 64, M], YhTile.layout)
    note = gl.allocate_shared_memory(
        gl.int32, [6 + STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    # A phase is one use of a ring's slot, or one ticket. "full": one arrival, by the loader with
    # the bytes that it announces (right_full: by the half that is solved first; solution_full, of a tile that the groups
    # read themselves: without bytes); "empty": one by each group that reads; came: both groups have read their half of it.
    # The note: member, block, first block, first row, end of the rows, tiles; from 6 on, for each slot, whether its tile is late.
    one: gl.constexpr = mbarrier.MBarrierLayout()
    own_full = gl.allocate_shared_memory(gl.int64, [1], one)
    own_empty = gl.allocate_shared_memory(gl.int64, [1], one)
    inverse_full = gl.allocate_shared_memory(gl.int64, [1], one)
    inverse_empty = gl.allocate_shared_memory(gl.int64, [1], one)
    right_full = gl.allocate_shared_memory(gl.int64, [1], one)
    right_empty = gl.allocate_shared_memory(gl.int64, [1], one)
    came = gl.allocate_shared_memory(gl.int64, [1], one)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    solution_full = gl.allocate_shared_memory(gl.int64, [STAGES + MORE, 1], one)
    solution_empty = gl.allocate_shared_memory(gl.int64, [STAGES + MORE, 1], one)
    mbarrier.init(own_full, count=1)
    mbarrier.init(own_empty, count=2)
    mbarrier.init(inverse_full, count=1)
    mbarrier.init(inverse_empty, count=2)
    mbarrier.init(right_full, count=1)
    mbarrier.init(right_empty, count=1)
    mbarrier.init(came, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_full.index(stage), count=1)
        mbarrier.init(key_empty.index(stage), count=2)
    for stage in gl.static_range(STAGES + MORE):
        mbarrier.init(solution_full.index(stage), count=1)
        mbarrier.init(solution_empty.index(stage), count=2)
    fence_async_shared()
    gl.thread_barrier()

    gl.warp_specialize(
        [
            (_compute, (
                Value, value_b, value_h, value_n, YhHalf, Yh, Y, y_b, y_h, y_n,
                Mask, Strength, Done, Largest, Bad,
                own, keys, solution, inverse, right, coupled, note,
                own_full, own_empty, key_full, key_empty, solution_full, solution_empty,
                inverse_full, inverse_empty, right_full, right_empty, came,
                heads, blocks, length, value_width, headroom, c2, shift,
                0, M, PACKED, REVERSED, TIGHT, HALVES, LINKED, SHIFT, UNIT, ASYNC, STORED, PARTS, E,
            )),
            (_compute, (
                Value, value_b, value_h, value_n, YhHalf, Yh, Y, y_b, y_h, y_n,
                Mask, Strength, Done, Largest, Bad,
                own, keys, solution, inverse, right, coupled, note,
                own_full, own_empty, key_full, key_empty, solution_full, solution_empty,
                inverse_full, inverse_empty, right_full, right_empty, came,
                heads, blocks, length, value_width, headroom, c2, shift,
                1, M, PACKED, REVERSED, TIGHT, HALVES, LINKED, SHIFT, UNIT, ASYNC, STORED, PARTS, E,
            )),
            (load, (
                KhTile, YhTile, TTile, Blocks, Done, Ticket,
                own, keys, solution, inverse, note,
                own_full, own_empty, key_full, key_empty, solution_full, solution_empty,
                inverse_full, inverse_empty,
                chains, blocks, wide, deep, length,
                M, PACKED, REVERSED, TIGHT, LINKED, PARTS, D, E,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def hopper_solve(
    run: Run, value: Any, out: Any, rows: Any, mask: Any, strength: Any, *, transposed: bool = False
) -> None:
    """``Y`` into ``out`` and ``rows`` from what `prepare` left, or, ``transposed``, ``dV`` from ``dY``."""
    call, at, geometry = run.call, run.at, run.call.geometry
    D, E = call.key_tile, call.solution_tile // call.value_parts
    columns = HALVES_COLUMNS if call.halves else COLUMNS[max(D, E)]
    keys, solution = call.key_width, call.solution_width
    kernel = hopper_solve_kernel

    def units() -> tuple[int, list[int]]:
        return in_units(call.value_width, *geometry.strides(value), *geometry.strides(out))

    # Keys, rows, the inverse and two stages of tiles by themselves would take 64 + 64 + 24 + 2 * 64 KiB.
    tight = D == E == 256
    fixed = 128 * D * 2 + (columns * E * 2 if tight else 128 * E * 2 + 3 * 64 * 64 * 2)
    if call.linked and columns > E:
        fixed += 128 * columns * 2
    run.launch(
        kernel, min(multiprocessors(call.device), geometry.slots * call.value_parts),
        (
            *run.tiles(kernel, lambda: (
                (at.keys, keys, columns, D), (rows, solution, columns, E), (rows, solution, 64, E),
                (at.inverse, 64, 64, 64),
            )),
            rows, value, out, mask, strength, at.table, at.done, at.largest, at.bad, at.ticket,
        ),
        lambda: (
            *units()[1], geometry.heads, geometry.chains * call.value_parts, geometry.blocks,
            *rounds(geometry, WIDE_ROUND if tight else ROUND, call.value_parts), geometry.length, geometry.headroom,
            call.c2, call.shift(SHIFT_FORWARD),
        ),
        lambda: {
            "D": D, "E": E, "M": columns, "STAGES": min(4, (_SHARED - fixed) // (columns * (D + E) * 2)),
            "PACKED": geometry.packed, "REVERSED": transposed, "TIGHT": tight,
            "HALVES": call.halves, "LINKED": call.linked, "STORED": solution, "PARTS": call.value_parts, "SHIFT": SHIFT_FORWARD, "UNIT": units()[0], "ASYNC": not tight and in_words(value, call.value_width, units()[0]), "num_warps": 4,
        },
    )  # fmt: skip
