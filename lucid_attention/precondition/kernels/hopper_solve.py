"""The forward solve for Hopper: one warp that loads, two groups of warps that compute.

The mathematics, the workspaces and the tickets are those of `solve`; this is its form for half
precision, head sizes of one piece (64 or 128) and blocks of 128 rows. What is different:

* A program stays on its multiprocessor and takes tickets until there are none left. It takes a
  ticket when everything for the one before it is loaded, and finishes its tickets in order, so that
  it still only waits for smaller tickets: no deadlock.
* The loading warp takes the tickets, waits for the chain and copies tiles into two rings of
  shared memory. Keys are copied before the wait for the solution that goes with them.
* Each group of four warps owns half of the block's rows. It never waits for the other in the loop:
  the tensor core computes the next similarities and adds up the last product while the
  exponentials are taken. Only the block's own inverse needs the other half, once, at the end.
* ``Done`` counts halves of blocks here, relative to the sequence's first block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .hopper_tiles import (
    as_long,
    fence_proxy,
    multiprocessors,
    narrow,
    power_of_two,
    range_exponent,
    tile_descriptor,
    wait_for,
    wide_layout,
    widen,
)
from .plan import SHIFT_FORWARD

if TYPE_CHECKING:
    from .plan import Call, Control, Prepared

COLUMNS = 128
"""Rows of a column tile; 64, with twice the stages, was 1 to 30 % slower on every shape."""
_SHARED = 225 * 1024  # of 227 KiB: the rest is for barriers and what the compiler needs


@gluon.jit
def _step(slot, phase, STAGES: gl.constexpr):
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def _loader(
    KhHalf, KhTile, YhTile, TTile, Blocks, Done, Ticket,
    own, keys, solution, inverse, note,
    own_full, own_empty, key_full, key_empty, solution_full, solution_empty,
    inverse_full, inverse_empty,
    chains, blocks, length,
    M: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr,
    D: gl.constexpr, E: gl.constexpr,
):  # fmt: skip
    """One warp: tickets, the wait for the chain, all copies to shared memory."""
    PER: gl.constexpr = 128 // M
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    total = chains * blocks
    key_slot = 0
    key_phase = 0
    slot = 0
    phase = 0
    turn = 0
    ticket = gl.atomic_add(Ticket, 1, sem="relaxed")
    while ticket < total:
        chain = ticket % chains
        block = ticket // chains
        first = 0
        row = block * 128
        count = length
        if PACKED:
            row = gl.load(Blocks + block)
            count = gl.load(Blocks + blocks + block)
            first = gl.load(Blocks + 2 * blocks + block)
        if count > 0:
            counter = Done + (chain * blocks + first)
            here = (chain * blocks + block) * 128
            column = (chain * blocks + first) * 128
            n = (block - first) * PER
            mbarrier.wait(own_empty, turn ^ 1)
            note.index(0).store(gl.full([1], chain, gl.int32, one))
            note.index(1).store(gl.full([1], block, gl.int32, one))
            note.index(2).store(gl.full([1], first, gl.int32, one))
            if PACKED:
                note.index(3).store(gl.full([1], row, gl.int32, one))
                note.index(4).store(gl.full([1], row + count, gl.int32, one))
            mbarrier.expect(own_full, 128 * D * 2)
            tma.async_copy_global_to_shared(KhHalf, [here, 0], own_full, own.index(0))
            tma.async_copy_global_to_shared(KhHalf, [here + 64, 0], own_full, own.index(1))
            # Step j brings the keys of tile j and the solution of tile j - 1, in the order of use.
            ready = 0
            for j in range(n + 1):
                if j < n:
                    mbarrier.wait(key_empty.index(key_slot), key_phase ^ 1)
                    bar = key_full.index(key_slot)
                    mbarrier.expect(bar, M * D * 2)
                    tma.async_copy_global_to_shared(
                        KhTile, [column + j * M, 0], bar, keys.index(key_slot)
                    )
                    key_slot, key_phase = _step(key_slot, key_phase, STAGES)
                if j == gl.maximum(n - PER + 1, 0):
                    # Everything up to the last block is under way: now what comes after it.
                    mbarrier.wait(inverse_empty, turn ^ 1)
                    mbarrier.expect(inverse_full, 3 * 64 * 64 * 2)
                    quadrant = (here // 128) * 192
                    for k in gl.static_range(3):
                        tma.async_copy_global_to_shared(
                            TTile, [quadrant + k * 64, 0], inverse_full, inverse.index(k)
                        )
                if j > 0:
                    mbarrier.wait(solution_empty.index(slot), phase ^ 1)
                    need = 2 * ((j - 1) // PER + 1)
                    if ready < need:
                        ready = wait_for(counter, need)
                    bar = solution_full.index(slot)
                    mbarrier.expect(bar, M * E * 2)
                    tma.async_copy_global_to_shared(
                        YhTile, [column + (j - 1) * M, 0], bar, solution.index(slot)
                    )
                    slot, phase = _step(slot, phase, STAGES)
            turn ^= 1
        ticket = gl.atomic_add(Ticket, 1, sem="relaxed")
    mbarrier.wait(own_empty, turn ^ 1)
    note.index(0).store(gl.full([1], -1, gl.int32, one))
    mbarrier.arrive(own_full, count=1)


@gluon.jit
def _read(note, index: gl.constexpr):
    return gl.max(note.index(index).load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)


@gluon.jit
def _compute(
    Value, value_b, value_h, value_n, Yh, Y, y_b, y_h, y_n,
    Mask, Strength, Done, Largest, Bad,
    own, keys, solution, inverse, right, note,
    own_full, own_empty, key_full, key_empty, solution_full, solution_empty,
    inverse_full, inverse_empty, right_full, right_empty,
    heads, blocks, length, value_width, headroom, c2, shift,
    GROUP: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr,
    SHIFT: gl.constexpr, E: gl.constexpr,
):  # fmt: skip
    """Four warps: rows ``64 GROUP : 64 GROUP + 64`` of every ticket's block."""
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    wide: gl.constexpr = wide_layout(E, 2)
    rows = own.index(GROUP)
    nothing = gl.zeros([64, M], gl.float32, product)
    slot = 0
    phase = 0
    turn = 0
    mbarrier.wait(own_full, 0)
    chain = _read(note, 0)
    while chain >= 0:
        block = _read(note, 1)
        first = _read(note, 2)
        at = block * 128 + 64 * GROUP
        end = length
        if PACKED:
            at = _read(note, 3) + 64 * GROUP
            end = _read(note, 4)
        n = (block - first) * (128 // M)

        # Tile i + 1's exponentials are taken while tile i's product with the solution runs. The
        # assembler moves nothing across a wait for a barrier, but much across a wait for a
        # product: the next tile's keys are therefore waited for before the product is.
        acc = gl.zeros([64, E], gl.float32, sums)
        p = gl.zeros([64, M], gl.float16, left)
        if n > 0:
            mbarrier.wait(key_full.index(slot), phase)
            s = warpgroup_mma(
                rows, keys.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(key_empty.index(slot), count=1)
            p = gl.convert_layout(gl.exp2(s * c2 + shift).to(gl.float16), left)
            key_slot, key_phase = _step(slot, phase, STAGES)
            mbarrier.wait(key_full.index(key_slot), key_phase, pred=n > 1)
            for i in range(n - 1):
                s = warpgroup_mma(
                    rows, keys.index(key_slot).permute((1, 0)), nothing,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                mbarrier.wait(solution_full.index(slot), phase)
                acc = warpgroup_mma(p, solution.index(slot), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s])
                mbarrier.arrive(key_empty.index(key_slot), count=1)
                e = gl.exp2(s * c2 + shift)
                last = slot
                slot = key_slot
                phase = key_phase
                key_slot, key_phase = _step(slot, phase, STAGES)
                mbarrier.wait(key_full.index(key_slot), key_phase, pred=i < n - 2)
                acc = warpgroup_mma_wait(0, deps=[acc])
                p = gl.convert_layout(e.to(gl.float16), left)
                mbarrier.arrive(solution_empty.index(last), count=1)
        mbarrier.arrive(own_empty, count=1)

        # What the last tile needs but does not have to wait for.
        batch = as_long(chain // heads)
        head = as_long(chain % heads)
        entry = chain * blocks + first
        wide_row = at + gl.arange(0, 64, gl.SliceLayout(1, wide))
        wide_column = gl.arange(0, E, gl.SliceLayout(0, wide))
        inside = (wide_row < end)[:, None] & (wide_column < value_width)[None, :]
        values = Value + batch * as_long(value_b) + head * as_long(value_h)
        v = gl.load(
            values + as_long(wide_row)[:, None] * as_long(value_n) + wide_column[None, :],
            mask=inside, other=0.0,
        )  # fmt: skip
        row = at + gl.arange(0, 64, gl.SliceLayout(1, sums))
        live = row < end
        if Mask is not None:
            live = live & (gl.load(Mask + batch * as_long(length) + row, mask=live, other=0) != 0)
        strength = 1.0
        if Strength is not None:
            strength = gl.load(Strength + head).to(gl.float32)
        exponent = range_exponent(gl.load(Largest + entry), headroom)
        scale = power_of_two(exponent)
        factor = gl.where(live, strength * power_of_two(0 * exponent - SHIFT), 0.0)
        bad = gl.load(Bad + entry)

        acc = warpgroup_mma_init(acc)
        if n > 0:
            mbarrier.wait(solution_full.index(slot), phase)
            acc = warpgroup_mma(p, solution.index(slot), acc, is_async=True)
        v = narrow(v, sums, E).to(gl.float32) * scale
        v = gl.where(live[:, None] & (gl.abs(v) < float("inf")), v, 0.0)
        mbarrier.wait(inverse_full, turn)
        if GROUP == 0:
            mbarrier.wait(right_empty, turn ^ 1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        y = v - acc * factor[:, None]
        mine = right.index(GROUP)
        mine.store(y.to(gl.float16))
        fence_async_shared()
        if GROUP == 0:
            mbarrier.arrive(right_full, count=1)
        gl.thread_barrier()
        y = warpgroup_mma(inverse.index(2 * GROUP), mine, y, is_async=True)
        if GROUP == 1:
            mbarrier.wait(right_full, turn)
            y = warpgroup_mma(inverse.index(1), right.index(0), y, is_async=True)
        y = warpgroup_mma_wait(0, deps=[y])

        start = as_long(chain * blocks + block) * 128 + 64 * GROUP
        wide_index = gl.arange(0, 64, gl.SliceLayout(1, wide))
        place = Yh + start * E + (wide_index * E)[:, None] + wide_column[None, :]
        gl.store(place, widen(y.to(gl.float16), E))
        fence_proxy(block)
        gl.thread_barrier()
        gl.atomic_add(Done + entry, 1, sem="release")
        if n > 0:
            mbarrier.arrive(solution_empty.index(slot), count=1)
            slot, phase = _step(slot, phase, STAGES)
        mbarrier.arrive(inverse_empty, count=1)
        if GROUP == 1:
            mbarrier.arrive(right_empty, count=1)

        # From a sequence's first row that is not finite on, results are NaN.
        padded = block * 128 + 64 * GROUP + gl.arange(0, 64, gl.SliceLayout(1, sums))
        spoiled = (padded >= blocks * 128 - bad) & live
        y = gl.where(spoiled[:, None], float("nan"), y * power_of_two(-exponent))
        out = Y + batch * as_long(y_b) + head * as_long(y_h)
        gl.store(
            out + as_long(wide_row)[:, None] * as_long(y_n) + wide_column[None, :],
            widen(y.to(Y.dtype.element_ty), E), mask=inside,
        )  # fmt: skip
        turn ^= 1
        mbarrier.wait(own_full, turn)
        chain = _read(note, 0)


@gluon.jit(do_not_specialize=["heads", "chains", "blocks", "length", "headroom"])
def hopper_solve_kernel(
    KhHalf, KhTile, YhTile, TTile, Value, value_b, value_h, value_n, Yh, Y, y_b, y_h, y_n,
    Mask, Strength, Blocks, Done, Largest, Bad, Ticket,
    heads, chains, blocks, length, value_width, headroom, c2, shift,
    D: gl.constexpr, E: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr,
    PACKED: gl.constexpr, SHIFT: gl.constexpr,
):  # fmt: skip
    """Grid: any number of programs, best one for each multiprocessor."""
    own = gl.allocate_shared_memory(gl.float16, [2, 64, D], KhHalf.layout)
    keys = gl.allocate_shared_memory(gl.float16, [STAGES, M, D], KhTile.layout)
    solution = gl.allocate_shared_memory(gl.float16, [STAGES, M, E], YhTile.layout)
    inverse = gl.allocate_shared_memory(gl.float16, [3, 64, 64], TTile.layout)
    right = gl.allocate_shared_memory(gl.float16, [2, 64, E], YhTile.layout)
    note = gl.allocate_shared_memory(gl.int32, [5, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # A phase is one use of a ring's slot, or one ticket. "full": one arrival, by the loader with
    # the bytes that it announces (right_full: by group 0); "empty": one by each group that reads.
    one: gl.constexpr = mbarrier.MBarrierLayout()
    own_full = gl.allocate_shared_memory(gl.int64, [1], one)
    own_empty = gl.allocate_shared_memory(gl.int64, [1], one)
    inverse_full = gl.allocate_shared_memory(gl.int64, [1], one)
    inverse_empty = gl.allocate_shared_memory(gl.int64, [1], one)
    right_full = gl.allocate_shared_memory(gl.int64, [1], one)
    right_empty = gl.allocate_shared_memory(gl.int64, [1], one)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    solution_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    solution_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    mbarrier.init(own_full, count=1)
    mbarrier.init(own_empty, count=2)
    mbarrier.init(inverse_full, count=1)
    mbarrier.init(inverse_empty, count=2)
    mbarrier.init(right_full, count=1)
    mbarrier.init(right_empty, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_full.index(stage), count=1)
        mbarrier.init(key_empty.index(stage), count=2)
        mbarrier.init(solution_full.index(stage), count=1)
        mbarrier.init(solution_empty.index(stage), count=2)
    fence_async_shared()
    gl.thread_barrier()

    gl.warp_specialize(
        [
            (_compute, (
                Value, value_b, value_h, value_n, Yh, Y, y_b, y_h, y_n,
                Mask, Strength, Done, Largest, Bad,
                own, keys, solution, inverse, right, note,
                own_full, own_empty, key_full, key_empty, solution_full, solution_empty,
                inverse_full, inverse_empty, right_full, right_empty,
                heads, blocks, length, value_width, headroom, c2, shift,
                0, M, STAGES, PACKED, SHIFT, E,
            )),
            (_compute, (
                Value, value_b, value_h, value_n, Yh, Y, y_b, y_h, y_n,
                Mask, Strength, Done, Largest, Bad,
                own, keys, solution, inverse, right, note,
                own_full, own_empty, key_full, key_empty, solution_full, solution_empty,
                inverse_full, inverse_empty, right_full, right_empty,
                heads, blocks, length, value_width, headroom, c2, shift,
                1, M, STAGES, PACKED, SHIFT, E,
            )),
            (_loader, (
                KhHalf, KhTile, YhTile, TTile, Blocks, Done, Ticket,
                own, keys, solution, inverse, note,
                own_full, own_empty, key_full, key_empty, solution_full, solution_empty,
                inverse_full, inverse_empty,
                chains, blocks, length,
                M, STAGES, PACKED, D, E,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def hopper_solve(
    call: Call,
    prepared: Prepared,
    value: Tensor,
    out: Tensor,
    mask: Tensor | None,
    strength: Tensor | None,
    control: Control,
) -> None:
    """``stages.solve`` for Hopper: ``Y`` into ``out``, from what `prepare` left."""
    geometry, plan = call.geometry, call.plan
    done, largest, bad = control.parts[:3]
    solved = geometry.workspace(value, plan.dtype, call.solution_width)
    D, E = call.pieces["D1"], call.value_pieces["E1"]
    fixed = 128 * D * 2 + 3 * 64 * 64 * 2 + 128 * E * 2
    stages = min(4, (_SHARED - fixed) // (COLUMNS * (D + E) * 2))
    keys = prepared.keys
    call.launch(
        hopper_solve_kernel, min(multiprocessors(value.device), geometry.slots),
        tile_descriptor(keys, 64), tile_descriptor(keys, COLUMNS), tile_descriptor(solved, COLUMNS),
        tile_descriptor(prepared.inverse.view(-1, 64), 64),
        value, *geometry.strides(value), solved, out, *geometry.strides(out),
        mask, strength, geometry.table, done, largest, bad, control.ticket,
        geometry.heads, geometry.chains, geometry.blocks, geometry.length, call.value_width,
        geometry.headroom, call.c2, call.shift(SHIFT_FORWARD),
        D=D, E=E, M=COLUMNS, STAGES=stages, PACKED=geometry.packed, SHIFT=SHIFT_FORWARD, num_warps=4,
    )  # fmt: skip
