"""The loading warp of `hopper_solve`: tickets, the wait for the chain, all copies to shared memory.

``hopper_solve.py`` says what the barriers and the note hold.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .hopper_tiles import look_at, place_ticket, wait_for


@gluon.jit
def step(slot, phase, STAGES: gl.constexpr):
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def quadrants_in(solution, slot):
    """The block's inverse in the place of a tile of the solution."""
    return solution.index(slot)._reinterpret(gl.float16, [4, 64, 64], solution.layout)


@gluon.jit
def _send_keys(KhTile, column, tile, STEP: gl.constexpr, keys, full, empty, slot, phase):
    mbarrier.wait(empty.index(slot), phase ^ 1)
    bar = full.index(slot)
    mbarrier.expect(bar, KhTile.block_type.nbytes)
    tma.async_copy_global_to_shared(KhTile, [column + tile * STEP, 0], bar, keys.index(slot))
    return step(slot, phase, keys.shape[0])


@gluon.jit
def _send_inverse(TTile, here, bar, place):
    mbarrier.expect(bar, 3 * TTile.block_type.nbytes)
    quadrant = (here // 128) * 192
    for k in gl.static_range(3):
        tma.async_copy_global_to_shared(TTile, [quadrant + k * 64, 0], bar, place.index(k))


@gluon.jit
def load(
    KhTile, YhTile, TTile, Blocks, Done, Ticket,
    own, keys, solution, inverse, note,
    own_full, own_empty, key_full, key_empty, solution_full, solution_empty,
    inverse_full, inverse_empty,
    chains, blocks, wide, deep, length,
    M: gl.constexpr, PACKED: gl.constexpr, REVERSED: gl.constexpr, TIGHT: gl.constexpr, LINKED: gl.constexpr,
    PARTS: gl.constexpr, D: gl.constexpr, E: gl.constexpr,
):  # fmt: skip
    """One warp: tickets, the wait for the chain, all copies to shared memory."""
    PER: gl.constexpr = 128 // M
    STEP: gl.constexpr = -M if REVERSED else M
    EARLY: gl.constexpr = 1 if LINKED else 0
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    total = chains * blocks
    key_slot = 0
    key_phase = 0
    slot = 0
    phase = 0
    turn = 0
    ticket = gl.atomic_add(Ticket, 1, sem="relaxed")
    while ticket < total:
        member, block = place_ticket(ticket, chains, blocks, wide, deep)
        chain = member // PARTS
        value_column = member % PARTS * E
        if REVERSED:
            block = blocks - 1 - block
        first = 0
        row = block * 128
        count = length
        if PACKED:
            row = gl.load(Blocks + block)
            count = gl.load(Blocks + blocks + block)
            first = gl.load(Blocks + 2 * blocks + block)
        if count > 0:
            counter = Done + (member * blocks + first)
            here = (chain * blocks + block) * 128
            column = (chain * blocks + first) * 128
            n = (block - first) * PER
            if REVERSED:
                end = blocks
                if PACKED:
                    end = gl.load(Blocks + 3 * blocks + block)
                column = (chain * blocks + end) * 128 - M
                n = (end - 1 - block) * PER
            mbarrier.wait(own_empty, turn ^ 1)
            note.index(0).store(gl.full([1], member, gl.int32, one))
            note.index(1).store(gl.full([1], block, gl.int32, one))
            note.index(2).store(gl.full([1], first, gl.int32, one))
            if PACKED:
                note.index(3).store(gl.full([1], row, gl.int32, one))
                note.index(4).store(gl.full([1], row + count, gl.int32, one))
            if REVERSED:
                note.index(5).store(gl.full([1], n, gl.int32, one))
            mbarrier.expect(own_full, 128 * D * 2)
            for part in gl.static_range(PER):
                tma.async_copy_global_to_shared(
                    KhTile, [here + part * M, 0], own_full, own.index(part)
                )
            # Step j brings the keys of tile j and the solution of tile j - 1, in the order of use.
            ready = 0
            if LINKED:
                # The last tile's keys come first, with the inverse: see `hopper_solve`.
                mbarrier.wait(inverse_empty, turn ^ 1)
                _send_inverse(TTile, here, inverse_full, inverse)
                if n > 0:
                    key_slot, key_phase = _send_keys(
                        KhTile, column, n - 1, STEP, keys, key_full, key_empty, key_slot, key_phase
                    )
            for j in range(n + 1):
                if j < n - EARLY:
                    key_slot, key_phase = _send_keys(
                        KhTile, column, j, STEP, keys, key_full, key_empty, key_slot, key_phase
                    )
                if not LINKED and j == gl.maximum(n - PER + 1, 0):
                    # Everything up to the last block is under way: now what comes after it.
                    if TIGHT:
                        mbarrier.wait(solution_empty.index(slot), phase ^ 1)
                        bar = solution_full.index(slot)
                        place = quadrants_in(solution, slot)
                        slot, phase = step(slot, phase, solution.shape[0])
                    else:
                        mbarrier.wait(inverse_empty, turn ^ 1)
                        bar = inverse_full
                        place = inverse
                    _send_inverse(TTile, here, bar, place)
                if j > 0:
                    mbarrier.wait(solution_empty.index(slot), phase ^ 1)
                    need = 2 * ((j - 1) // PER + 1)
                    bar = solution_full.index(slot)
                    if LINKED:
                        if ready < need:
                            if j == n:  # noqa: SIM108 (not both)
                                ready = look_at(counter)
                            else:
                                ready = wait_for(counter, need)
                        # The last one is not waited for: the other warps read it as it is written.
                        late = (ready < need).to(gl.int32)
                        note.index(6 + slot).store(gl.full([1], late, gl.int32, one))
                    else:
                        late = 0
                        if ready < need:
                            ready = wait_for(counter, need)
                    if late > 0:
                        mbarrier.arrive(bar, count=1)
                    else:
                        mbarrier.expect(bar, M * E * 2)
                        place = [column + (j - 1) * STEP, value_column]
                        tma.async_copy_global_to_shared(YhTile, place, bar, solution.index(slot))
                    slot, phase = step(slot, phase, solution.shape[0])
            turn ^= 1
        ticket = gl.atomic_add(Ticket, 1, sem="relaxed")
    mbarrier.wait(own_empty, turn ^ 1)
    note.index(0).store(gl.full([1], -1, gl.int32, one))
    mbarrier.arrive(own_full, count=1)
