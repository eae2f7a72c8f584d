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
from .hopper_tiles import look_at, place_in, place_ticket, reduce_add, stores_done, wait_for

FIELDS = gl.constexpr(8)
"""Numbers that a ticket's note has room for; there are two notes, for this ticket and the next."""


@gluon.jit
def read_note(note, ticket, FIELD: gl.constexpr, WARPS: gl.constexpr):
    """A number of the program's ``ticket``-th note."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return gl.max(note.index((ticket & 1) * FIELDS + FIELD).load(layout), axis=0)


@gluon.jit
def wait_for_note(told, ticket):
    mbarrier.wait(told.index(ticket & 1), (ticket >> 1) & 1)


@gluon.jit
def _write(note, ticket, FIELD: gl.constexpr, x):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    note.index((ticket & 1) * FIELDS + FIELD).store(gl.full([1], x, gl.int32, one))


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
    KeyRows, KeyTiles, keys, key_ring, own, own_empty, key_full, empty, note, told, noted, Blocks, Ticket,
    Grad, grad_b, grad_h, grad_n, heads, chains, blocks, wide, deep, length,
    WIDTH: gl.constexpr, UNIT: gl.constexpr, PACKED: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """Tickets; for each own keys, then the column tiles' keys in the order of the sweep; dY on its way near the end.

    A ticket is taken when all keys of the one before are asked for.
    """
    M: gl.constexpr = key_ring.shape[1]
    PARTS: gl.constexpr = 128 // M
    total = chains * blocks
    taken = 0
    loaded = 0
    ticket = gl.atomic_add(Ticket, 1, sem="relaxed")
    while ticket < total:
        chain, row = place_ticket(ticket, chains, blocks, wide, deep)
        block = blocks - 1 - row
        first = 0
        end = blocks
        first_row = block * 128
        count = gl.minimum(length - first_row, 128)
        if PACKED:
            first_row = gl.load(Blocks + block)
            count = gl.load(Blocks + blocks + block)
            first = gl.load(Blocks + 2 * blocks + block)
            end = gl.load(Blocks + 3 * blocks + block)
        if count > 0:
            slot = chain * blocks + block
            need = end - 1 - block
            late = 0
            if not LATE:
                late = gl.minimum(need, 1)
            mbarrier.wait(noted.index(taken & 1), ((taken >> 1) & 1) ^ 1)
            _write(note, taken, 0, slot)
            _write(note, taken, 1, chain * blocks + first)
            _write(note, taken, 2, need)
            _write(note, taken, 3, first_row)
            _write(note, taken, 4, count)
            _write(note, taken, 5, chain // heads)
            _write(note, taken, 6, chain % heads)
            mbarrier.arrive(told.index(taken & 1), count=1)
            mbarrier.wait(own_empty, (taken & 1) ^ 1)
            mbarrier.expect(own, 2 * KeyRows.block_type.nbytes)
            for half in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    KeyRows, [slot * 128 + 64 * half, 0], own, keys.index(half)
                )
            last = slot + need  # of the sequence, among all chains' blocks
            for tile in range((need + late + 1) * PARTS):
                if tile == gl.maximum(need - 2, 0) * PARTS:
                    batch = (chain // heads).to(gl.int64)
                    head = (chain % heads).to(gl.int64)
                    rows = Grad + (batch * grad_b + head * grad_h) * UNIT
                    rows += first_row.to(gl.int64) * (grad_n * UNIT)
                    _prefetch(rows, grad_n * UNIT, count, WIDTH)
                step = tile // PARTS
                step = gl.where(step < need, step, step - late)
                stage, _ = place_in(key_ring, loaded)
                _wait_for_room(empty, loaded)
                mbarrier.expect(key_full.index(stage), KeyTiles.block_type.nbytes)
                at = (last - step) * 128 + (PARTS - 1 - tile % PARTS) * M
                tma.async_copy_global_to_shared(
                    KeyTiles, [at, 0], key_full.index(stage), key_ring.index(stage)
                )
                loaded += 1
            taken += 1
        ticket = gl.atomic_add(Ticket, 1, sem="relaxed")
    mbarrier.wait(noted.index(taken & 1), ((taken >> 1) & 1) ^ 1)
    _write(note, taken, 0, -1)
    mbarrier.arrive(told.index(taken & 1), count=1)


@gluon.jit
def load_grads(GradTiles, grad_ring, grad_full, empty, note, told, noted, Done, LATE: gl.constexpr):
    """DV of the column tiles, each once both halves of its block are announced."""
    M: gl.constexpr = grad_ring.shape[1]
    PARTS: gl.constexpr = 128 // M
    ticket = 0
    loaded = 0
    wait_for_note(told, ticket)
    slot = read_note(note, ticket, 0, 1)
    while slot >= 0:
        counter = Done + read_note(note, ticket, 1, 1)
        need = read_note(note, ticket, 2, 1)
        mbarrier.arrive(noted.index(ticket & 1), count=1)
        last = slot + need
        late = 0
        if not LATE:
            late = gl.minimum(need, 1)
        ready = 0
        for tile in range((need + late + 1) * PARTS):
            step = tile // PARTS
            step = gl.where(step < need, step, step - late)
            stage = loaded % STAGES
            _wait_for_room(empty, loaded)
            if ready < 2 * (step + 1):
                ready = wait_for(counter, 2 * (step + 1))
            mbarrier.expect(grad_full.index(stage), GradTiles.block_type.nbytes)
            at = (last - step) * 128 + (PARTS - 1 - tile % PARTS) * M
            tma.async_copy_global_to_shared(
                GradTiles, [at, 0], grad_full.index(stage), grad_ring.index(stage)
            )
            loaded += 1
        ticket += 1
        wait_for_note(told, ticket)
        slot = read_note(note, ticket, 0, 1)


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
def add_up(
    Toward, Tail, staging, o_full, o_empty, stored, given, note, told, noted, Turn,
    M: gl.constexpr, D: gl.constexpr, ODD: gl.constexpr,
):  # fmt: skip
    """What blocks give to the later ones, each in its turn; then their own ``Toward``.

    ``Tail``: the same memory, in tiles of the columns from 64 on.

    One warp for even pushes and one for odd ones: from a turn to the next program's turn takes about as
    long as the products of a tile. Which buffers are whose changes from ticket to ticket: the even one begins with none that
    the odd one has not read (``stored``), and the other way round (``given``).
    """
    PARTS: gl.constexpr = 128 // M
    # Lines of 256 numbers that 64 rows take: 64 columns, and the tail's.
    LINES: gl.constexpr = 16 if D == 64 else 16 + Tail.block_type.shape[0]
    ticket = 0
    before = 0  # pushes of earlier tickets
    wait_for_note(told, ticket)
    slot = read_note(note, ticket, 0, 1)
    while slot >= 0:
        need = read_note(note, ticket, 2, 1)
        mbarrier.arrive(noted.index(ticket & 1), count=1)
        if ODD:
            mbarrier.wait(given, (ticket & 1) ^ 1)
        # Counters of the blocks' parts in the order of the sweep, backwards; own ones last.
        turns = Turn + slot * PARTS
        tiles = (need + 1) * PARTS
        seen = 0
        for push in range(ODD, tiles, 2):
            part = tiles - 1 - push
            ahead = part // PARTS
            if seen < ahead:
                wait_for(turns + part, ahead)
            # The groups' tiles are side by side (PARTS 2) or one below the other.
            row = (slot * PARTS + part) * (M // 64 * LINES)
            if PARTS == 2:
                _give(Toward, Tail, row, 16, staging, o_full, o_empty, before + push, ahead > 0)
            else:
                _give(Toward, Toward, row, 16, staging, o_full, o_empty, before + push, ahead > 0)
            # Looked at while what was added is on its way.
            seen = look_at(turns + gl.maximum(part - 2, 0))
            stores_done(push)
            gl.thread_barrier()
            if ahead > 0:
                gl.atomic_xchg(turns + part, ahead + 1, sem="release")
        if ODD:
            mbarrier.arrive(stored)
        else:
            mbarrier.wait(stored, ticket & 1)
            row = slot * 2 * LINES
            _give(Toward, Toward, row, LINES, staging, o_full, o_empty, before + tiles, True)
            if D > 64:
                _give(
                    Tail, Tail, row + 16, LINES, staging, o_full, o_empty, before + tiles + 1, True
                )
            mbarrier.arrive(given)
            stores_done(tiles)
            gl.thread_barrier()
            for part in gl.static_range(PARTS):
                gl.atomic_xchg(turns + part, 1, sem="release")
        before += tiles + D // 64
        ticket += 1
        wait_for_note(told, ticket)
        slot = read_note(note, ticket, 0, 1)
