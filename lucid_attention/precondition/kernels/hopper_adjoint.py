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

Twelve warps: two groups of four take 64 rows of the block each; one warp loads keys, one loads dV as
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

Barriers, what completes a phase, and who waits; ``n`` counts loaded tiles, ``u`` those with a T, ``q`` what the
groups give to the adders, first their O, last their rows of ``toward``, and ``b = 2 q + group``:

    own         bytes       once                                   both groups
    key_full    bytes       n // 2 at n % 2                        both groups
    grad_full   bytes       n // 2 at n % 2                        both groups
    empty       2 groups    n // 4 at n % 4, tile n was used       the loaders, before tile n + 2
    t_full      2 groups    u, T is in pieces                      both groups, before their O
    o_full      1 group     b // 4 at b % 4                        the adder of q (of ``toward``: the even one)
    o_empty     that adder  b // 4 at b % 4                        the group, before b + 4
    stored      odd adder   its stores and additions are done,     the even adder, before ``toward``
                            and its uses of buffers, which the even one takes over
    meet        2 groups    0 norms stored, 1 swept, 2 rows of dV's right side stored, 3 read, 4 free again

Storing T of tile u + 2 needs no barrier: a group that arrives at phase u + 1 has waited for its O of u,
which reads the same buffer. A wait tells a phase from the next one only, not from the one after: a buffer is therefore one
group's own, which waits for each of its uses. Four of them, because a block of two tiles owes the next but one four parts:
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

from .hopper_couriers import add_up, load_grads, load_keys
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
    exp2,
    first_columns,
    halves,
    operand,
    place_ticket,
    power_of_two,
    range_exponent,
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
def _rows_at(base, stride, first_row, count, width: gl.constexpr, UNIT: gl.constexpr, W: gl.constexpr, E: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Pointers to a group's rows of a user's tensor, and which of their entries exist."""
    row = 64 * W + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, E, layout=gl.SliceLayout(0, layout))
    pointers = base + (first_row + row).to(gl.int64)[:, None] * (stride * UNIT) + column[None, :]
    return pointers, row, (row < count)[:, None] & (column < width)[None, :]


@gluon.jit
def _load_rows(base, stride, WIDTH: gl.constexpr, UNIT: gl.constexpr, Live, slot, first_row, count, W: gl.constexpr, E: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """A group's rows, 0 where there is no token."""
    pointers, row, inside = _rows_at(base, stride, first_row, count, WIDTH, UNIT, W, E, layout)
    live = gl.load(Live + slot.to(gl.int64) * 128 + row) != 0
    return gl.load(pointers, mask=inside & live[:, None], other=0.0)


@gluon.jit
def _finite(x, spoiled):
    """``x`` with 0 for what is not finite.

    With 128 columns the kernel's code is all that the instruction cache holds (128 KiB), and a block waits for what it runs
    once: there this is run where something is not finite only. With 64 it takes less time than to skip it.
    """
    if x.shape[1] > 64:
        if spoiled:
            x = gl.where(gl.abs(x) < float("inf"), x, 0.0)
    else:
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
    """Rows ``64 W`` to ``64 W + 63`` of the block: the sweep, dV, and what follows it."""
    (
        keys, solution, key_ring, grad_ring, pieces, staging, norms,
        own, key_full, grad_full, empty, t_full, o_full, o_empty, meet,
        T, Live, Grad, grad_n, Solution, solution_n, GradRows, GradValue, out_n, StrengthSum, Strength,
        Done, LargestGrad, LargestSolution, Bad,
        slot, sequence, need, first_row, count, headroom, c2, shift,
    ) = everything  # fmt: skip
    M: gl.constexpr = key_ring.shape[1]
    D: gl.constexpr = key_ring.shape[2]
    E: gl.constexpr = grad_ring.shape[2]
    PARTS: gl.constexpr = 128 // M
    SUM: gl.constexpr = Strength is not None
    # The block's own Y, in range for T: one power of two for the block, so both groups' rows count.
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E, E // 8], [4, 1], [1, 0])
    row = 64 * W + gl.arange(0, 64, layout=gl.SliceLayout(1, plain))
    column = gl.arange(0, E, layout=gl.SliceLayout(0, plain))
    pointers = (
        Solution + (first_row + row).to(gl.int64)[:, None] * (solution_n * UNIT) + column[None, :]
    )
    mask = (row < count)[:, None] & (column < WIDTH)[None, :]
    y = gl.load(pointers, mask=mask, other=0.0).to(gl.float32)
    live = gl.load(Live + slot.to(gl.int64) * 128 + row) != 0
    scale = power_of_two(range_exponent(gl.load(LargestSolution + sequence), 0))
    y = _finite(y, gl.load(Bad + sequence) > 0)
    # Where there is no token, the solve wrote 0.
    y = y * gl.where(live, scale, 0.0)[:, None]
    norms.index(W).store(gl.sum(y * y, axis=1))
    mbarrier.arrive(meet)
    mbarrier.wait(meet, 0)
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
    mbarrier.wait(own, 0)
    late = 0
    if not LATE:
        late = gl.minimum(need, 1)
    sweep = (need - late) * PARTS
    gl.thread_barrier()  # here, not in the sweep
    total = 0.0
    if sweep > 0:
        s = similarity(keys.index(W + anew()), key_ring, key_full, 0, True)
        if LATE:
            s, acc, toward, total = sweep_tile(
                s, acc, toward, total, 0, 0, sweep > 1, 0,
                keys, solution, key_ring, grad_ring, pieces, staging,
                key_full, grad_full, empty, t_full, o_full, o_empty, c2, shift, unscale,
                W, True, False, False, True, False, TAIL,
            )  # fmt: skip
        for tile in range(LATE, sweep):
            s, acc, toward, total = sweep_tile(
                s, acc, toward, total, tile, tile, tile + 1 < sweep, 0,
                keys, solution, key_ring, grad_ring, pieces, staging,
                key_full, grad_full, empty, t_full, o_full, o_empty, c2, shift, unscale,
                W, True, False, False, LATE, True, TAIL,
            )  # fmt: skip
        warpgroup_mma_wait(0, deps=[s])
        if LATE:
            last_half(
                sweep - 1, keys, pieces, staging, t_full, o_full, o_empty, unscale, M, W, TAIL
            )
    # What the block's end needs but does not have to wait for.
    # The block's place is found once more from here on: the sweep has no registers for what it does not need.
    slot += anew()
    T += slot.to(gl.int64) * (3 * 4096)
    strength = 1.0
    if Strength is not None:
        strength = gl.load(Strength).to(gl.float32)
    exponent = range_exponent(gl.load(LargestGrad + sequence), headroom)
    # The pieces of T are free for the block's rows once both groups are here.
    mbarrier.arrive(meet)
    rows = pieces._reinterpret(gl.float16, [2, 64, E], pieces.layout)
    mine = rows.index(W)
    # Two bytes an entry go through shared memory, so that threads move 16 bytes of a row; four go as they are.
    NARROW: gl.constexpr = Grad.dtype.element_ty.primitive_bitwidth == 16
    EXCHANGE: gl.constexpr = NARROW and E <= 64  # or there are no registers to load so early
    if EXCHANGE:
        r = _load_rows(Grad, grad_n, WIDTH, UNIT, Live, slot, first_row, count, W, E, plain)
    spoiled = gl.load(Bad + sequence) > 0
    left = _inverse(T, 1 + W, E)
    if not LATE:  # noqa: SIM102 (one is known to the compiler, the other is not)
        # The next block: everything is ready when its dV comes.
        if late > 0:
            s = similarity(keys.index(W + anew()), key_ring, key_full, sweep, True)
            if PARTS == 2:
                s2 = similarity(keys.index(W + anew()), key_ring, key_full, sweep + 1, True)
                s = warpgroup_mma_wait(1, deps=[s])
            else:
                s = warpgroup_mma_wait(0, deps=[s])
            p = operand(exp2(s * c2 + shift), E)
            if PARTS == 2:
                s2 = warpgroup_mma_wait(0, deps=[s2])
                p2 = operand(exp2(s2 * c2 + shift), E)
            stage = sweep % STAGES
            mbarrier.wait(grad_full.index(stage), (sweep // STAGES) & 1)
            acc = warpgroup_mma(p, grad_ring.index(stage), acc, is_async=True)
            if PARTS == 2:
                other = (sweep + 1) % STAGES
                mbarrier.wait(grad_full.index(other), ((sweep + 1) // STAGES) & 1)
                acc = warpgroup_mma(p2, grad_ring.index(other), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(sweep % USED))
            if PARTS == 2:
                mbarrier.arrive(empty.index((sweep + 1) % USED))

    pairs = 0.0
    if SUM:  # of all pairs with later blocks: sum_ji y_j . P_ij dV_i
        y = solution.index(W).load(accumulator(E)).to(gl.float32)
        pairs = gl.sum(gl.sum(acc * y, axis=1), axis=0)
    mbarrier.wait(meet, 1)
    if EXCHANGE:
        place = mine._reinterpret(Grad.dtype.element_ty, [64, E], pieces.layout)
        place.store(r)
        r = place.load(accumulator(E))
    else:
        r = _load_rows(
            Grad, grad_n, WIDTH, UNIT, Live, slot, first_row, count, W, E, accumulator(E)
        )
    r = r.to(gl.float32) * power_of_two(exponent)
    r = _finite(r, spoiled)
    row = 64 * W + gl.arange(0, 64, layout=gl.SliceLayout(1, accumulator(E)))
    live = gl.load(Live + slot.to(gl.int64) * 128 + row) != 0
    factor = gl.where(live, strength * power_of_two(0 * exponent - SHIFT), 0.0)
    r -= acc * factor[:, None]
    mine.store(r.to(gl.float16))
    if W == 0:
        first = _inverse(T, 0, E)
    fence_async_shared()
    mbarrier.arrive(meet)
    mbarrier.wait(meet, 0)
    r = warpgroup_mma(left, rows.index(1), r, is_async=True)
    if W == 0:
        r = warpgroup_mma(first, rows.index(0), r, is_async=True)
    r = warpgroup_mma_wait(0, deps=[r])
    mbarrier.arrive(meet)
    mbarrier.wait(meet, 1)
    mine.store(r.to(gl.float16))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(GradRows, [slot * 128 + 64 * W, 0], mine)
    stores_done(count)
    gl.thread_barrier()
    gl.atomic_add(Done + sequence, 1, sem="release")

    r = r * power_of_two(-exponent)
    if spoiled:
        r = gl.where(live[:, None], float("nan"), 0.0 * r)
    if NARROW:
        place = mine._reinterpret(GradValue.dtype.element_ty, [64, E], pieces.layout)
        place.store(r.to(GradValue.dtype.element_ty))
        _store_rows(GradValue, out_n, WIDTH, UNIT, first_row, count, place.load(plain), W, E, plain)
    else:
        _store_rows(GradValue, out_n, WIDTH, UNIT, first_row, count, r, W, E, accumulator(E))
    mbarrier.arrive(meet)

    # The key gradient's terms of the next block, then of the block itself.
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, accumulator(M)))
    mbarrier.wait(meet, 0)
    gl.thread_barrier()
    tile = need * PARTS
    tiles = (late + 1) * PARTS
    zero = anew()
    s = similarity(keys.index(W + zero), key_ring, key_full, tile + zero, True)
    if LATE:  # one tile, the block's own
        edge = gl.to_tensor(-64 * W)
        if SUM:  # not a constant: products that are known to count would be added unrounded, other than below
            edge += anew()
        s, acc, toward, total = sweep_tile(
            s, acc, toward, total, tile, sweep, False, edge,
            keys, solution, key_ring, grad_ring, pieces, staging,
            key_full, grad_full, empty, t_full, o_full, o_empty, c2, shift, unscale,
            W, False, True, SUM, True, False, TAIL,
        )  # fmt: skip
    else:
        for step in range(tiles):
            inner = step - (tiles - PARTS)
            edge = gl.where(inner < 0, 128, (PARTS - 1 - inner) * M - 64 * W)
            s, acc, toward, total = sweep_tile(
                s, acc, toward, total, tile + step, sweep + step, step + 1 < tiles, edge,
                keys, solution, key_ring, grad_ring, pieces, staging,
                key_full, grad_full, empty, t_full, o_full, o_empty, c2, shift, unscale,
                W, False, True, SUM, False, True, TAIL,
            )  # fmt: skip
    warpgroup_mma_wait(0, deps=[s])
    if LATE:
        last_half(sweep, keys, pieces, staging, t_full, o_full, o_empty, unscale, M, W, TAIL)
    toward = toward * unscale
    if D == 64:
        hand_over(toward, staging, o_full, o_empty, sweep + tiles, W)
    else:
        first, second = halves(toward)
        hand_over(first, staging, o_full, o_empty, sweep + tiles, W)
        hand_over(first_columns(second, TAIL), staging, o_full, o_empty, sweep + tiles + 1, W)
    if Strength is not None:
        pairs = (pairs + gl.sum(total, axis=0)) * unscale * power_of_two(-exponent)
        pairs *= power_of_two(-range_exponent(gl.load(LargestSolution + sequence), 0))
        gl.store(StrengthSum + slot * 2 + W, gl.where(spoiled, float("nan"), -pairs))


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
    """Grid: ``chains * blocks`` programs. Strides are in ``UNIT``s of entries (``plan.in_units``)."""
    ticket = gl.atomic_add(Ticket, 1, sem="relaxed")
    chain, row = place_ticket(ticket, chains, blocks, wide, deep)
    block = blocks - 1 - row
    batch = (chain // heads).to(gl.int64)
    head = (chain % heads).to(gl.int64)
    first = 0
    end = blocks
    first_row = block * 128
    count = gl.minimum(length - first_row, 128)
    if PACKED:
        first_row = gl.load(Blocks + block)
        count = gl.load(Blocks + blocks + block)
        first = gl.load(Blocks + 2 * blocks + block)
        end = gl.load(Blocks + 3 * blocks + block)
    slot = chain * blocks + block
    sequence = chain * blocks + first
    need = end - 1 - block
    late = 0
    if not LATE:
        late = gl.minimum(need, 1)
    Grad += (batch * grad_b + head * grad_h) * UNIT
    Solution += (batch * solution_b + head * solution_h) * UNIT
    GradValue += (batch * out_b + head * out_h) * UNIT
    if Strength is not None:
        Strength += head

    swizzled: gl.constexpr = KeyRows.layout
    keys = gl.allocate_shared_memory(gl.float16, [2, 64, D], swizzled)
    solution = gl.allocate_shared_memory(gl.float16, [2, 64, E], swizzled)
    key_ring = gl.allocate_shared_memory(gl.float16, [STAGES, M, D], swizzled)
    grad_ring = gl.allocate_shared_memory(gl.float16, [STAGES, M, E], swizzled)
    pieces = gl.allocate_shared_memory(gl.float16, [4 * (M // 64), 64, 64], swizzled)
    staging = gl.allocate_shared_memory(gl.float32, [BUFFERS, 16, 256], Toward.layout)
    norms = gl.allocate_shared_memory(gl.float32, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    single: gl.constexpr = mbarrier.MBarrierLayout()
    own = gl.allocate_shared_memory(gl.int64, [1], single)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], single)
    grad_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], single)
    empty = gl.allocate_shared_memory(gl.int64, [USED, 1], single)
    t_full = gl.allocate_shared_memory(gl.int64, [1], single)
    o_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], single)
    o_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], single)
    meet = gl.allocate_shared_memory(gl.int64, [1], single)
    stored = gl.allocate_shared_memory(gl.int64, [1], single)
    mbarrier.init(own, count=1)
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

    if count > 0:
        counter = Done + sequence
        last = slot + need  # of the sequence, among all chains' blocks
        right = Grad + first_row.to(gl.int64) * (grad_n * UNIT)
        group = (
            keys, solution, key_ring, grad_ring, pieces, staging, norms,
            own, key_full, grad_full, empty, t_full, o_full, o_empty, meet,
            T, Live, Grad, grad_n, Solution, solution_n, GradRows, GradValue, out_n, StrengthSum, Strength,
            Done, LargestGrad, LargestSolution, Bad,
            slot, sequence, need, first_row, count, headroom, c2, shift,
        )  # fmt: skip
        gl.warp_specialize(
            [
                (_group, (group, gl.constexpr(0), WIDTH, TAIL, UNIT, SHIFT, LATE)),
                (_group, (group, gl.constexpr(1), WIDTH, TAIL, UNIT, SHIFT, LATE)),
                (load_keys, (KeyRows, KeyTiles, keys, key_ring, own, key_full, empty, slot, last, need, late, right, grad_n * UNIT, count, WIDTH)),
                (load_grads, (GradTiles, grad_ring, grad_full, empty, counter, last, need, late)),
                (add_up, (Toward, Tail, staging, o_full, o_empty, stored, Turn, slot, need, M, D, gl.constexpr(0))),
                (add_up, (Toward, Tail, staging, o_full, o_empty, stored, Turn, slot, need, M, D, gl.constexpr(1))),
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
        kernel, geometry.slots,
        (
            *run.tiles(kernel, lambda: (
                (at.keys, keys, 64, D), (at.keys, keys, columns, D), (at.gh, values, 64, E), (at.gh, values, columns, E),
                (at.toward, 256, 16, 256), (at.toward, 256, tail // 4, 256),
            )),
            at.inverse, at.live, grad, solution, grad_value, None if strength is None else at.pairs,
            strength, at.table, at.done, at.largest, at.largest_second, at.bad, at.turn, at.ticket,
        ),
        lambda: (
            *units()[1], geometry.heads, geometry.chains, geometry.blocks, *rounds(geometry),
            geometry.length, geometry.headroom, call.c2, call.shift(SHIFT_BACKWARD),
        ),
        lambda: {
            "D": D, "E": E, "M": columns, "WIDTH": call.value_width, "TAIL": tail, "UNIT": units()[0], "PACKED": geometry.packed,
            "SHIFT": SHIFT_BACKWARD, "LATE": int(late), "num_warps": 4,
        },
    )  # fmt: skip
