"""The adjoint solve and the whole key gradient in one sweep, for Hopper's tensor cores.

Five products a pair of blocks: a program that holds block row ``p`` meets every later block ``i``,

    P = exp2(K_p K_i^T),   acc += P dV_i,   T = (Y_p dV_i^T) P,   toward_p += T K_i,

and ``O = T^T K_p`` is what block ``p`` gives to ``toward_i``; ``adjoint.py`` and ``toward.py`` say what
these are. ``O`` is added to ``Toward`` in global memory, to each block by its predecessors in order:
its own part is there first, then block ``i - 1`` adds, then ``i - 2``, each when ``Turn`` says so. Programs
sweep in the same order, so turns are there in time, and every sum has one order.

With two tiles a block, or few blocks (not ``LATE``), the sweep ends before the next block: first only what dV needs of it, then dV
itself, announced, and after that the key gradient's terms of the next block; so the next program waits less.
The pairs inside the block (``j < i``) come last. Nobody waits for those, except for a turn.

A program stays on its multiprocessor and takes tickets until there are none left, as in ``hopper_solve.py``: its single warps
are ahead of or behind its groups, by up to a ticket. It takes a ticket when it has asked for all keys of the one before, and
finishes its tickets in order, so it only waits for smaller ones: no deadlock.

Twelve warps: two groups of four take 64 rows of the block each; one warp takes tickets, notes what they are and loads keys, one loads dV as
it is announced, two add to ``Toward`` by turns, because one addition takes about as long as the products of
a tile. ``S`` of the next tile is under way while a tile ends, each product runs beside the arithmetic on
the one before, and (``LATE``) the groups fill each other's gaps. Tiles have M columns: 64 for 128 features (PARTS,
tiles of a block, 2), 128 for 64 (PARTS 1). ``hopper_pairs.py`` has what a group does with a tile, ``hopper_couriers.py`` the single warps.

Shared memory (swizzled, but for the last two):

    keys (2, 64, D)   solution (2, 64, E)   key_ring (2, M, D)   grad_ring (2, M, E)
    pieces: T twice, in tiles of 64 x 64, and between sweeps the block's rows of dV
    staging: four tiles of 64 x 64 of O, two of each group   norms (2, 64)

Head sizes 65 to 96 have tiles of 128 columns, of which 48 or 32 are zeros: of O and of ``toward`` the second group's part
has the ``TAIL`` columns that are not, 16 or 32, and so have the sums in global memory.

Barriers, what completes a phase, and who waits; ``k`` counts the program's tickets, ``n`` loaded tiles, ``u`` those with a T,
``q`` what the groups give to the adders, for each block first their O, last their rows of ``toward``, and ``b = 2 q + group``:

    told        the note      k // 2 at k % 2, the note is there     all others, before they read it
    noted       5 readers     k // 2 at k % 2, have done with it     the key loader, before the note of k + 2
    own         bytes         k                                      both groups
    own_empty   2 groups      k, have done with the block's keys     the key loader, before those of k + 1
    key_full    bytes         n // 2 at n % 2                        both groups
    grad_full   bytes         n // 2 at n % 2                        both groups
    empty       2 groups      n // 4 at n % 4, tile n was used       the loaders, before tile n + 2
    t_full      2 groups      u, T is in pieces                      both groups, before their O
    o_full      1 group       b // 4 at b % 4                        the adder of q (of ``toward``: the even one)
    o_empty     that adder    b // 4 at b % 4                        the group, before b + 4
    stored      odd adder     k, its stores and additions are done,  the even adder, before ``toward``
                              and its uses of buffers, which the even one takes over
    given       even adder    k, so are the even one's uses          the odd adder, before its first of k + 1
    meet        2 groups      5 k + 0 norms stored, 1 swept, 2 rows of dV's right side stored, 3 read, 4 free again

Storing T of tile u + 2 needs no barrier: a group that arrives at phase u + 1 has waited for its O of u,
which reads the same buffer. A wait tells a phase from the next one only, not from the one after: a buffer is therefore one
group's own, which waits for each of its uses, and the adders hand buffers over (``stored``, ``given``). Four of them, because a block of two tiles owes the next but one four parts:
with three, its dV waits until the block after it has given its part to the same one, which it does after its own dV. With one tile
a block four were faster as well.
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

from ..implementation import multiprocessors
from .hopper_couriers import (
    FIELDS,
    add_up,
    load_grads,
    load_keys,
    read_note,
    wait_for_note,
)
from .hopper_pairs import (
    BUFFERS,
    STAGES,
    USED,
    hand_over,
    last_half,
    similarity,
    sweep_tile,
)
from .hopper_tiles import (
    accumulator,
    anew,
    as_long,
    exp2,
    first_columns,
    halves,
    operand,
    power_of_two,
    range_exponent,
    rows_layout,
    stores_done,
)
from .plan import SHIFT_BACKWARD, in_units, rounds

if TYPE_CHECKING:
    from .plan import Run

LATE_FROM = 1024
"""At D = 64, from this many blocks on, ``O`` comes a tile late (`hopper_pairs.py`).

Then all multiprocessors are busy and their throughput counts; with fewer blocks it is the time from a block to
the next, which is longer so. At D = 128 the other schedule with four buffers was as fast or faster than this one
with three (16 chains of 8K and 16K: 1 to 3 % slower in one run of two), and this one with four was not tried.
"""


@gluon.jit
def _inverse(T, quadrant, E: gl.constexpr):
    """A quadrant of the prepared inverse, transposed, as a left operand: 64 bytes of a thread, as `inverse` left them."""
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [1, 4], [1, 0])
    step = gl.arange(0, 4, layout=gl.SliceLayout(1, plain))
    entry = gl.arange(0, 1024, layout=gl.SliceLayout(0, plain))
    x = gl.load(T + quadrant * 4096 + step[:, None] * 1024 + entry[None, :])
    x = gl.permute(gl.reshape(x, (4, 4, 8, 4, 2, 2, 2)), (1, 5, 2, 0, 4, 3, 6))
    return gl.convert_layout(gl.reshape(x, (64, 64)), gl.DotOperandLayout(0, accumulator(E), 2))


@gluon.jit
def _row_offsets(row, stride, UNIT: gl.constexpr, E: gl.constexpr):
    """Where rows begin. As unsigned numbers that is less code; with 64 columns it took 1.4 % longer all the same."""
    if E > 64:
        offsets = as_long(row) * (as_long(stride) * UNIT)
    else:
        offsets = row.to(gl.int64) * (stride * UNIT)
    return offsets


@gluon.jit
def _rows_at(base, stride, first_row, count, width: gl.constexpr, UNIT: gl.constexpr, W: gl.constexpr, E: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Pointers to a group's rows of a user's tensor, and which of their entries exist."""
    row = 64 * W + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, E, layout=gl.SliceLayout(0, layout))
    pointers = base + _row_offsets(first_row + row, stride, UNIT, E)[:, None] + column[None, :]
    return pointers, row, (row < count)[:, None] & (column < width)[None, :]


@gluon.jit
def _load_rows(base, stride, WIDTH: gl.constexpr, UNIT: gl.constexpr, Live, slot, first_row, count, W: gl.constexpr, E: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """A group's rows, 0 where there is no token."""
    pointers, row, inside = _rows_at(base, stride, first_row, count, WIDTH, UNIT, W, E, layout)
    live = gl.load(Live + slot.to(gl.int64) * 128 + row) != 0
    return gl.load(pointers, mask=inside & live[:, None], other=0.0)


@gluon.jit
def _finite(x):
    """``x``, of 64 columns with 0 for what is not finite.

    Nothing needs that: all gradients of such a sequence are overwritten. But without it 64 columns take about 2 % longer, and with it
    128 have more code than the instruction cache holds (128 KiB).
    """
    if x.shape[1] <= 64:
        x = gl.where(gl.abs(x) < float("inf"), x, 0.0)
    return x


@gluon.jit
def _store_rows(base, stride, WIDTH: gl.constexpr, UNIT: gl.constexpr, first_row, count, x, W: gl.constexpr, E: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    pointers, _, inside = _rows_at(base, stride, first_row, count, WIDTH, UNIT, W, E, layout)
    gl.store(pointers, x, mask=inside)


@gluon.jit
def _group(
    everything, W: gl.constexpr, WIDTH: gl.constexpr, TAIL: gl.constexpr, UNIT: gl.constexpr,
    SHIFT: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """Rows ``64 W`` to ``64 W + 63`` of every ticket's block: the sweep, dV, and what follows it."""
    (
        keys, solution, key_ring, grad_ring, pieces, staging, norms,
        own, own_empty, key_full, grad_full, empty, t_full, o_full, o_empty, meet, note, told, noted,
        T, Live, Grad, grad_b, grad_h, grad_n, Solution, solution_b, solution_h, solution_n,
        GradRows, GradValue, out_b, out_h, out_n, StrengthSum, Strength,
        Done, LargestGrad, LargestSolution, Bad, headroom, c2, shift,
    ) = everything  # fmt: skip
    M: gl.constexpr = key_ring.shape[1]
    D: gl.constexpr = key_ring.shape[2]
    E: gl.constexpr = grad_ring.shape[2]
    PARTS: gl.constexpr = 128 // M
    SUM: gl.constexpr = Strength is not None
    ticket = 0
    tile = 0
    use = 0
    push = 0
    wait_for_note(told, ticket)
    slot = read_note(note, ticket, 0, 4)
    while slot >= 0:
        sequence = read_note(note, ticket, 1, 4)
        need = read_note(note, ticket, 2, 4)
        first_row = read_note(note, ticket, 3, 4)
        count = read_note(note, ticket, 4, 4)
        # The block's own Y, in range for T: one power of two for the block, so both groups' rows count.
        plain: gl.constexpr = rows_layout(E)
        row = 64 * W + gl.arange(0, 64, layout=gl.SliceLayout(1, plain))
        column = gl.arange(0, E, layout=gl.SliceLayout(0, plain))
        batch = read_note(note, ticket, 5, 4).to(gl.int64)
        head = read_note(note, ticket, 6, 4).to(gl.int64)
        pointers = Solution + (batch * solution_b + head * solution_h) * UNIT
        pointers += _row_offsets(first_row + row, solution_n, UNIT, E)[:, None]
        pointers += column[None, :]
        mask = (row < count)[:, None] & (column < WIDTH)[None, :]
        y = gl.load(pointers, mask=mask, other=0.0).to(gl.float32)
        live = gl.load(Live + slot.to(gl.int64) * 128 + row) != 0
        scale = power_of_two(range_exponent(gl.load(LargestSolution + sequence), 0))
        y = _finite(y)
        # Where there is no token, the solve wrote 0.
        y = y * gl.where(live, scale, 0.0)[:, None]
        norms.index(W).store(gl.sum(y * y, axis=1))
        mbarrier.arrive(meet)
        mbarrier.wait(meet, ticket & 1)
        flat: gl.constexpr = gl.SliceLayout(1, plain)
        largest = gl.max(gl.maximum(norms.index(0).load(flat), norms.index(1).load(flat)), axis=0)
        half = ((largest.to(gl.int32, bitcast=True) >> 23) - 125) >> 1
        WIDE: gl.constexpr = 3 if E <= 64 else 4
        t_exponent = -gl.maximum(half, -20) - WIDE - SHIFT
        solution.index(W).store((y * power_of_two(t_exponent)).to(gl.float16))
        fence_async_shared()
        unscale = power_of_two(-t_exponent - SHIFT)

        acc = gl.zeros([64, E], gl.float32, accumulator(E))
        toward = gl.zeros([64, D], gl.float32, accumulator(D))
        mbarrier.wait(own, ticket & 1)
        late = 0
        if not LATE:
            late = gl.minimum(need, 1)
        sweep = (need - late) * PARTS
        gl.thread_barrier()  # here, not in the sweep
        total = 0.0
        if sweep > 0:
            s = similarity(keys.index(W + anew()), key_ring, key_full, tile, True)
            if LATE:
                s, acc, toward, total = sweep_tile(
                    s, acc, toward, total, tile, use, push, sweep > 1, 0,
                    keys, solution, key_ring, grad_ring, pieces, staging,
                    key_full, grad_full, empty, t_full, o_full, o_empty, c2, shift, unscale,
                    W, True, False, False, True, False, TAIL,
                )  # fmt: skip
            for step in range(LATE, sweep):
                s, acc, toward, total = sweep_tile(
                    s, acc, toward, total, tile + step, use + step, push + step, step + 1 < sweep, 0,
                    keys, solution, key_ring, grad_ring, pieces, staging,
                    key_full, grad_full, empty, t_full, o_full, o_empty, c2, shift, unscale,
                    W, True, False, False, LATE, True, TAIL,
                )  # fmt: skip
            warpgroup_mma_wait(0, deps=[s])
            if LATE:
                last_half(
                    use + sweep - 1, push + sweep - 1, keys, pieces, staging,
                    t_full, o_full, o_empty, unscale, M, W, TAIL,
                )  # fmt: skip
        # What the block's end needs but does not have to wait for.
        # The block's place is found once more from here on: the sweep has no registers for what it does not need.
        tile += sweep
        use += sweep
        push += sweep
        slot = read_note(note, ticket + anew(), 0, 4)
        sequence = read_note(note, ticket + anew(), 1, 4)
        first_row = read_note(note, ticket + anew(), 3, 4)
        count = read_note(note, ticket + anew(), 4, 4)
        batch = read_note(note, ticket + anew(), 5, 4).to(gl.int64)
        head = read_note(note, ticket + anew(), 6, 4).to(gl.int64)
        inverse = T + slot.to(gl.int64) * (3 * 4096)
        grad = Grad + (batch * grad_b + head * grad_h) * UNIT
        out = GradValue + (batch * out_b + head * out_h) * UNIT
        strength = 1.0
        if Strength is not None:
            strength = gl.load(Strength + head).to(gl.float32)
        exponent = range_exponent(gl.load(LargestGrad + sequence), headroom)
        # The pieces of T are free for the block's rows once both groups are here.
        mbarrier.arrive(meet)
        rows = pieces._reinterpret(gl.float16, [2, 64, E], pieces.layout)
        mine = rows.index(W)
        # Two bytes an entry go through shared memory, so that threads move 16 bytes of a row; four go as they are.
        NARROW: gl.constexpr = Grad.dtype.element_ty.primitive_bitwidth == 16
        EXCHANGE: gl.constexpr = NARROW and E <= 64  # or there are no registers to load so early
        if EXCHANGE:
            r = _load_rows(grad, grad_n, WIDTH, UNIT, Live, slot, first_row, count, W, E, plain)
        spoiled = gl.load(Bad + sequence) > 0
        left = _inverse(inverse, 1 + W, E)
        if not LATE:  # noqa: SIM102 (one is known to the compiler, the other is not)
            # The next block: everything is ready when its dV comes.
            if late > 0:
                s = similarity(keys.index(W + anew()), key_ring, key_full, tile, True)
                if PARTS == 2:
                    s2 = similarity(keys.index(W + anew()), key_ring, key_full, tile + 1, True)
                    s = warpgroup_mma_wait(1, deps=[s])
                else:
                    s = warpgroup_mma_wait(0, deps=[s])
                p = operand(exp2(s * c2 + shift), E)
                if PARTS == 2:
                    s2 = warpgroup_mma_wait(0, deps=[s2])
                    p2 = operand(exp2(s2 * c2 + shift), E)
                stage = tile % STAGES
                mbarrier.wait(grad_full.index(stage), (tile // STAGES) & 1)
                acc = warpgroup_mma(p, grad_ring.index(stage), acc, is_async=True)
                if PARTS == 2:
                    other = (tile + 1) % STAGES
                    mbarrier.wait(grad_full.index(other), ((tile + 1) // STAGES) & 1)
                    acc = warpgroup_mma(p2, grad_ring.index(other), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(empty.index(tile % USED))
                if PARTS == 2:
                    mbarrier.arrive(empty.index((tile + 1) % USED))
                tile += PARTS

        pairs = 0.0
        if SUM:  # of all pairs with later blocks: sum_ji y_j . P_ij dV_i
            y = solution.index(W).load(accumulator(E)).to(gl.float32)
            pairs = gl.sum(gl.sum(acc * y, axis=1), axis=0)
        mbarrier.wait(meet, (ticket & 1) ^ 1)
        if EXCHANGE:
            place = mine._reinterpret(Grad.dtype.element_ty, [64, E], pieces.layout)
            place.store(r)
            r = place.load(accumulator(E))
        else:
            r = _load_rows(
                grad, grad_n, WIDTH, UNIT, Live, slot, first_row, count, W, E, accumulator(E)
            )
        r = r.to(gl.float32) * power_of_two(exponent)
        r = _finite(r)
        row = 64 * W + gl.arange(0, 64, layout=gl.SliceLayout(1, accumulator(E)))
        live = gl.load(Live + slot.to(gl.int64) * 128 + row) != 0
        factor = gl.where(live, strength * power_of_two(0 * exponent - SHIFT), 0.0)
        r -= acc * factor[:, None]
        mine.store(r.to(gl.float16))
        if W == 0:
            first = _inverse(inverse, 0, E)
        fence_async_shared()
        mbarrier.arrive(meet)
        mbarrier.wait(meet, ticket & 1)
        r = warpgroup_mma(left, rows.index(1), r, is_async=True)
        if W == 0:
            r = warpgroup_mma(first, rows.index(0), r, is_async=True)
        r = warpgroup_mma_wait(0, deps=[r])
        mbarrier.arrive(meet)
        mbarrier.wait(meet, (ticket & 1) ^ 1)
        mine.store(r.to(gl.float16))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(GradRows, [slot * 128 + 64 * W, 0], mine)
        stores_done(count)
        gl.thread_barrier()
        gl.atomic_add(Done + sequence, 1, sem="release")

        r = r * power_of_two(-exponent)
        if spoiled:
            # Whatever became of what is not finite, here and in the sums, which `finish` overwrites: nothing else reads it.
            r = gl.zeros([64, E], gl.float32, accumulator(E))
            r += gl.where(live, float("nan"), 0.0)[:, None]
        if NARROW:
            place = mine._reinterpret(GradValue.dtype.element_ty, [64, E], pieces.layout)
            place.store(r.to(GradValue.dtype.element_ty))
            _store_rows(out, out_n, WIDTH, UNIT, first_row, count, place.load(plain), W, E, plain)
        else:
            _store_rows(out, out_n, WIDTH, UNIT, first_row, count, r, W, E, accumulator(E))
        mbarrier.arrive(meet)

        # The key gradient's terms of the next block, then of the block itself.
        total = gl.zeros([64], gl.float32, gl.SliceLayout(1, accumulator(M)))
        mbarrier.wait(meet, ticket & 1)
        gl.thread_barrier()
        tiles = (late + 1) * PARTS
        zero = anew()
        s = similarity(keys.index(W + zero), key_ring, key_full, tile + zero, True)
        if LATE:  # one tile, the block's own
            edge = gl.to_tensor(-64 * W)
            s, acc, toward, total = sweep_tile(
                s, acc, toward, total, tile, use, push, False, edge,
                keys, solution, key_ring, grad_ring, pieces, staging,
                key_full, grad_full, empty, t_full, o_full, o_empty, c2, shift, unscale,
                W, False, True, SUM, True, False, TAIL,
            )  # fmt: skip
        else:
            for step in range(tiles):
                inner = step - (tiles - PARTS)
                edge = gl.where(inner < 0, 128, (PARTS - 1 - inner) * M - 64 * W)
                s, acc, toward, total = sweep_tile(
                    s, acc, toward, total, tile + step, use + step, push + step, step + 1 < tiles, edge,
                    keys, solution, key_ring, grad_ring, pieces, staging,
                    key_full, grad_full, empty, t_full, o_full, o_empty, c2, shift, unscale,
                    W, False, True, SUM, False, True, TAIL,
                )  # fmt: skip
        warpgroup_mma_wait(0, deps=[s])
        if LATE:
            last_half(
                use, push, keys, pieces, staging, t_full, o_full, o_empty, unscale, M, W, TAIL
            )
        mbarrier.arrive(own_empty)
        tile += tiles
        use += tiles
        push += tiles
        toward = toward * unscale
        if D == 64:
            hand_over(toward, staging, o_full, o_empty, push, W)
        else:
            first, second = halves(toward)
            hand_over(first, staging, o_full, o_empty, push, W)
            hand_over(first_columns(second, TAIL), staging, o_full, o_empty, push + 1, W)
        if Strength is not None:
            pairs = (pairs + gl.sum(total, axis=0)) * unscale * power_of_two(-exponent)
            pairs *= power_of_two(-range_exponent(gl.load(LargestSolution + sequence), 0))
            gl.store(StrengthSum + slot * 2 + W, gl.where(spoiled, float("nan"), -pairs))
        mbarrier.arrive(noted.index(ticket & 1))
        push += D // 64
        ticket += 1
        wait_for_note(told, ticket)
        slot = read_note(note, ticket, 0, 4)


@gluon.jit(do_not_specialize=["heads", "chains", "blocks", "wide", "deep", "length", "headroom"])
def hopper_adjoint_kernel(
    KeyRows, KeyTiles, GradRows, GradTiles, Toward, Tail, T, Live,
    Grad, Solution, GradValue, StrengthSum, Strength, Blocks,
    Done, LargestGrad, LargestSolution, Bad, Turn, Ticket,
    grad_b, grad_h, grad_n, solution_b, solution_h, solution_n, out_b, out_h, out_n,
    heads, chains, blocks, wide, deep, length, headroom, c2, shift,
    D: gl.constexpr, E: gl.constexpr, M: gl.constexpr, WIDTH: gl.constexpr, TAIL: gl.constexpr, UNIT: gl.constexpr,
    PACKED: gl.constexpr, SHIFT: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """Grid: any number of programs, best one for each multiprocessor. Strides are in ``UNIT``s of entries (``plan.in_units``)."""
    swizzled: gl.constexpr = KeyRows.layout
    keys = gl.allocate_shared_memory(gl.float16, [2, 64, D], swizzled)
    solution = gl.allocate_shared_memory(gl.float16, [2, 64, E], swizzled)
    key_ring = gl.allocate_shared_memory(gl.float16, [STAGES, M, D], swizzled)
    grad_ring = gl.allocate_shared_memory(gl.float16, [STAGES, M, E], swizzled)
    pieces = gl.allocate_shared_memory(gl.float16, [4 * (M // 64), 64, 64], swizzled)
    staging = gl.allocate_shared_memory(gl.float32, [BUFFERS, 16, 256], Toward.layout)
    norms = gl.allocate_shared_memory(gl.float32, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    single: gl.constexpr = mbarrier.MBarrierLayout()
    note = gl.allocate_shared_memory(
        gl.int32, [2 * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    told = gl.allocate_shared_memory(gl.int64, [2, 1], single)
    noted = gl.allocate_shared_memory(gl.int64, [2, 1], single)
    own = gl.allocate_shared_memory(gl.int64, [1], single)
    own_empty = gl.allocate_shared_memory(gl.int64, [1], single)
    given = gl.allocate_shared_memory(gl.int64, [1], single)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], single)
    grad_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], single)
    empty = gl.allocate_shared_memory(gl.int64, [USED, 1], single)
    t_full = gl.allocate_shared_memory(gl.int64, [1], single)
    o_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], single)
    o_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], single)
    meet = gl.allocate_shared_memory(gl.int64, [1], single)
    stored = gl.allocate_shared_memory(gl.int64, [1], single)
    for index in gl.static_range(2):
        mbarrier.init(told.index(index), count=1)
        mbarrier.init(noted.index(index), count=5)
    mbarrier.init(own, count=1)
    mbarrier.init(own_empty, count=2)
    mbarrier.init(given, count=1)
    mbarrier.init(t_full, count=2)
    mbarrier.init(meet, count=2)
    mbarrier.init(stored, count=1)
    for index in gl.static_range(STAGES):
        mbarrier.init(key_full.index(index), count=1)
        mbarrier.init(grad_full.index(index), count=1)
    for index in gl.static_range(USED):
        mbarrier.init(empty.index(index), count=2)
    for index in gl.static_range(BUFFERS):
        mbarrier.init(o_full.index(index), count=1)
        mbarrier.init(o_empty.index(index), count=1)
    fence_async_shared()

    gl.thread_barrier()

    group = (
        keys, solution, key_ring, grad_ring, pieces, staging, norms,
        own, own_empty, key_full, grad_full, empty, t_full, o_full, o_empty, meet, note, told, noted,
        T, Live, Grad, grad_b, grad_h, grad_n, Solution, solution_b, solution_h, solution_n,
        GradRows, GradValue, out_b, out_h, out_n, StrengthSum, Strength,
        Done, LargestGrad, LargestSolution, Bad, headroom, c2, shift,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_group, (group, gl.constexpr(0), WIDTH, TAIL, UNIT, SHIFT, LATE)),
            (_group, (group, gl.constexpr(1), WIDTH, TAIL, UNIT, SHIFT, LATE)),
            (load_keys, (
                KeyRows, KeyTiles, keys, key_ring, own, own_empty, key_full, empty, note, told, noted, Blocks, Ticket,
                Grad, grad_b, grad_h, grad_n, heads, chains, blocks, wide, deep, length, WIDTH, UNIT, PACKED, LATE,
            )),
            (load_grads, (GradTiles, grad_ring, grad_full, empty, note, told, noted, Done, LATE)),
            (add_up, (Toward, Tail, staging, o_full, o_empty, stored, given, note, told, noted, Turn, M, D, gl.constexpr(0))),
            (add_up, (Toward, Tail, staging, o_full, o_empty, stored, given, note, told, noted, Turn, M, D, gl.constexpr(1))),
        ],
        [4, 1, 1, 1, 1],
        [240, 24, 24, 24, 24],
    )  # fmt: skip


def hopper_adjoint(run: Run, grad: Any, solution: Any, grad_value: Any, strength: Any) -> None:
    """Write the gradients of values and keys, and ``-sum T`` of every block's halves if there is a strength."""
    call, at, geometry = run.call, run.at, run.call.geometry
    D, E = call.key_tile, call.solution_tile
    keys, values = call.key_width, call.solution_width
    columns = 64 if D == 128 else 128
    tail = 64 if D == 64 else keys - 64  # the columns of the second half that are no zeros
    kernel = hopper_adjoint_kernel
    late = D == 64 and geometry.slots >= LATE_FROM

    def units() -> tuple[int, list[int]]:
        strides = (geometry.strides(x) for x in (grad, solution, grad_value))
        return in_units(*(stride for tensor in strides for stride in tensor))

    run.launch(
        kernel, min(multiprocessors(call.device), geometry.slots),
        (
            *run.tiles(kernel, lambda: (
                (at.keys, keys, 64, D), (at.keys, keys, columns, D), (at.gh, values, 64, E), (at.gh, values, columns, E),
                (at.toward, 256, 16, 256), (at.toward, 256, tail // 4, 256),
            )),
            at.inverse, at.live, grad, solution, grad_value, None if strength is None else at.pairs,
            strength, at.table, at.done, at.largest, at.largest_second, at.bad, at.turn, at.ticket,
        ),
        lambda: (
            *units()[1], geometry.heads, geometry.chains, geometry.blocks,
            *rounds(geometry, call.adjoint_round),
            geometry.length, geometry.headroom, call.c2, call.shift(SHIFT_BACKWARD),
        ),
        lambda: {
            "D": D, "E": E, "M": columns, "WIDTH": call.value_width, "TAIL": tail, "UNIT": units()[0], "PACKED": geometry.packed,
            "SHIFT": SHIFT_BACKWARD, "LATE": int(late), "num_warps": 4,
        },
    )  # fmt: skip
