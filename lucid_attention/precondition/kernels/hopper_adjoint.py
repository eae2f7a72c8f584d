"""The adjoint solve and the whole key gradient in one sweep, for Hopper's tensor cores.

Five products a pair of blocks: a program that holds block row ``p`` meets every later block ``i``,

    P = exp2(K_p K_i^T),   acc += P dV_i,   T = (Y_p dV_i^T) P,   toward_p += T K_i,

and ``O = T^T K_p`` is what block ``p`` gives to ``toward_i``; ``adjoint.py`` and ``toward.py`` say what
these are. ``O`` is added to ``Toward`` in global memory, to each block by its predecessors in order:
its own part is there first, then block ``i - 1`` adds, then ``i - 2``, each when ``Turn`` says so. Programs
sweep in the same order, so turns are there in time, and every sum has one order.

In a hurry, when blocks wait for each other, the sweep ends before the next block: first only what dV
needs of it, then dV itself, announced, and after that the key gradient's terms of the next block.
The pairs inside the block (``j < i``) come last. Nobody waits for those, except for a turn.

Twelve warps: two groups of four take 64 rows of the block each; one warp loads keys, one loads dV as
it is announced, two add to ``Toward`` by turns, because one addition takes about as long as the products of
a tile. ``S`` of the next tile is under way while a tile ends, each product runs beside the arithmetic on
the one before, and (``LATE``) the groups fill each other's gaps. Tiles have M columns: 64 for 128 features,
128 for 64. ``hopper_pairs.py`` has what a group does with a tile, ``hopper_couriers.py`` the single warps.

Shared memory (swizzled, but for the last two):

    keys (2, 64, D)   solution (2, 64, E)   key_ring (2, M, D)   grad_ring (2, M, E)
    pieces: T twice, in tiles of 64 x 64   staging: O twice, a tile of 64 x 64 a group   norms (2, 64)

Barriers, what completes a phase, and who waits; ``n`` counts loaded tiles, ``u`` those with a T, and
``q`` what the groups give to the adder, first their O, last their rows of ``toward``:

    own         bytes       once                                   both groups
    key_full    bytes       n // 2 at n % 2                        both groups
    grad_full   bytes       n // 2 at n % 2                        both groups
    empty       2 groups    n // 2 at n % 2, tile n was used       both loaders, before tile n + 2
    t_full      2 groups    u, T is in pieces                      both groups, before their O
    o_full      1 group     q // 2 at q % 2 and the group          the adder of q
    o_empty     its adder   q // 2 at q % 2 and the group          the group, before q + 2
    stored      odd adder   its stores and additions are done      the even adder, before ``toward``
    meet        2 groups    0 norms stored, 1 swept, 2 rows of dV's right side stored, 3 rows read

Storing T of tile u + 2 needs no barrier: a group that arrives at phase u + 1 has waited for its O of u,
which reads the same buffer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..numerics import KEY_EPS
from .finish import finish_kernel
from .hopper_couriers import add_up, load_grads, load_keys
from .hopper_pairs import STAGES, hand_over, last_half, similarity, sweep_tile
from .hopper_tiles import (
    accumulator,
    anew,
    exp2,
    fence_proxy,
    halves,
    operand,
    power_of_two,
    range_exponent,
    tile_descriptor,
)
from .plan import SHIFT_BACKWARD

if TYPE_CHECKING:
    from .plan import Call, Control, Prepared

LONG = 16384
"""From this length on, ``O`` comes a tile late (`hopper_pairs.py`): 4 to 21 % faster at 16K to 128K tokens.

The code is longer for it: 2K tokens take 15 to 45 % longer. Beside what is used there, 4K tokens are 1 to 2 %
slower and one head of 8K 6 %.
"""


@gluon.jit
def _inverse(T, quadrant, E: gl.constexpr):
    """A quadrant of the prepared inverse, transposed, as a left operand."""
    layout: gl.constexpr = gl.DotOperandLayout(0, accumulator(E), 2)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    return gl.load(T + quadrant * 4096 + column[None, :] * 64 + row[:, None])


@gluon.jit
def _group(
    everything, W: gl.constexpr, WIDTH: gl.constexpr, SHIFT: gl.constexpr, LATE: gl.constexpr
):
    """Rows ``64 W`` to ``64 W + 63`` of the block: the sweep, dV, and what follows it."""
    (
        keys, solution, key_ring, grad_ring, pieces, staging, norms,
        own, key_full, grad_full, empty, t_full, o_full, o_empty, meet,
        T, Live, Grad, grad_n, Solution, solution_n, Gh, GradValue, out_n, StrengthSum, Strength,
        Done, LargestGrad, LargestSolution, Bad,
        slot, sequence, need, late, first_row, count, headroom, c2, shift,
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
    pointers = Solution + (first_row + row).to(gl.int64)[:, None] * solution_n + column[None, :]
    mask = (row < count)[:, None] & (column < WIDTH)[None, :]
    y = gl.load(pointers, mask=mask, other=0.0).to(gl.float32)
    live = gl.load(Live + slot.to(gl.int64) * 128 + row) != 0
    y = y * power_of_two(range_exponent(gl.load(LargestSolution + sequence), 0))
    y = gl.where(live[:, None] & (gl.abs(y) < float("inf")), y, 0.0)
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
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, accumulator(M)))
    mbarrier.wait(own, 0)
    T += slot.to(gl.int64) * (3 * 4096)
    sweep = (need - late) * PARTS
    gl.thread_barrier()  # here, not in the sweep
    if sweep > 0:
        s = similarity(keys.index(W + anew()), key_ring, key_full, 0, True)
        if LATE:
            s, acc, toward, total = sweep_tile(
                s, acc, toward, total, 0, 0, sweep > 1, 0,
                keys, solution, key_ring, grad_ring, pieces, staging,
                key_full, grad_full, empty, t_full, o_full, o_empty, c2, shift, unscale,
                W, True, False, SUM, True, False,
            )  # fmt: skip
        for tile in range(LATE, sweep):
            s, acc, toward, total = sweep_tile(
                s, acc, toward, total, tile, tile, tile + 1 < sweep, 0,
                keys, solution, key_ring, grad_ring, pieces, staging,
                key_full, grad_full, empty, t_full, o_full, o_empty, c2, shift, unscale,
                W, True, False, SUM, LATE, True,
            )  # fmt: skip
        warpgroup_mma_wait(0, deps=[s])
        if LATE:
            last_half(sweep - 1, keys, pieces, staging, t_full, o_full, o_empty, unscale, M, W)
    # What the block's end needs but does not have to wait for.
    strength = 1.0
    if Strength is not None:
        strength = gl.load(Strength).to(gl.float32)
    exponent = range_exponent(gl.load(LargestGrad + sequence), headroom)
    # The pieces of T are free for the block's rows once both groups are here.
    mbarrier.arrive(meet)
    if late > 0:
        # The next block: everything is ready when its dV comes.
        stage = sweep % STAGES
        other = (sweep + 1) % STAGES
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
        left = _inverse(T, 1 + W, E)
        mbarrier.wait(grad_full.index(stage), (sweep // STAGES) & 1)
        acc = warpgroup_mma(p, grad_ring.index(stage), acc, is_async=True)
        if PARTS == 2:
            mbarrier.wait(grad_full.index(other), ((sweep + 1) // STAGES) & 1)
            acc = warpgroup_mma(p2, grad_ring.index(other), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(stage))
        if PARTS == 2:
            mbarrier.arrive(empty.index(other))
    else:
        left = _inverse(T, 1 + W, E)

    row = 64 * W + gl.arange(0, 64, layout=gl.SliceLayout(1, accumulator(E)))
    column = gl.arange(0, E, layout=gl.SliceLayout(0, accumulator(E)))
    place = (first_row + row).to(gl.int64)[:, None]
    inside = (row < count)[:, None] & (column < WIDTH)[None, :]
    live = gl.load(Live + slot.to(gl.int64) * 128 + row) != 0
    r = gl.load(Grad + place * grad_n + column[None, :], mask=inside, other=0.0).to(gl.float32)
    r *= power_of_two(exponent)
    r = gl.where(gl.abs(r) < float("inf"), r, 0.0)
    r -= acc * (strength * power_of_two(0 * exponent - SHIFT))
    r = gl.where(live[:, None], r, 0.0)
    rows = pieces._reinterpret(gl.float16, [2, 64, E], pieces.layout)
    mbarrier.wait(meet, 1)
    rows.index(W).store(r.to(gl.float16))
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
    pointers = Gh + (slot.to(gl.int64) * 128 + row)[:, None] * E + column[None, :]
    gl.store(pointers, r.to(gl.float16))
    fence_proxy(count)
    gl.thread_barrier()
    gl.atomic_add(Done + sequence, 1, sem="release")

    spoiled = gl.load(Bad + sequence) > 0
    final = gl.where(spoiled & live[:, None], float("nan"), r * power_of_two(-exponent))
    pointers = GradValue + place * out_n + column[None, :]
    gl.store(pointers, final.to(GradValue.dtype.element_ty), mask=inside)

    # The key gradient's terms of the next block, then of the block itself.
    mbarrier.wait(meet, 1)
    gl.thread_barrier()
    tile = need * PARTS
    tiles = (late + 1) * PARTS
    zero = anew()
    s = similarity(keys.index(W + zero), key_ring, key_full, tile + zero, True)
    if LATE:
        edge = gl.where(late > 0, 128, (PARTS - 1) * M - 64 * W)
        s, acc, toward, total = sweep_tile(
            s, acc, toward, total, tile, sweep, tiles > 1, edge,
            keys, solution, key_ring, grad_ring, pieces, staging,
            key_full, grad_full, empty, t_full, o_full, o_empty, c2, shift, unscale,
            W, False, True, SUM, True, False,
        )  # fmt: skip
    for step in range(LATE, tiles):
        inner = step - (tiles - PARTS)
        edge = gl.where(inner < 0, 128, (PARTS - 1 - inner) * M - 64 * W)
        s, acc, toward, total = sweep_tile(
            s, acc, toward, total, tile + step, sweep + step, step + 1 < tiles, edge,
            keys, solution, key_ring, grad_ring, pieces, staging,
            key_full, grad_full, empty, t_full, o_full, o_empty, c2, shift, unscale,
            W, False, True, SUM, LATE, True,
        )  # fmt: skip
    warpgroup_mma_wait(0, deps=[s])
    if LATE:
        last = sweep + tiles - 1
        last_half(last, keys, pieces, staging, t_full, o_full, o_empty, unscale, M, W)
    toward = toward * unscale
    if D == 64:
        hand_over(toward, staging, o_full, o_empty, sweep + tiles, W)
    else:
        first, second = halves(toward)
        hand_over(first, staging, o_full, o_empty, sweep + tiles, W)
        hand_over(second, staging, o_full, o_empty, sweep + tiles + 1, W)
    if Strength is not None:
        pairs = gl.sum(total, axis=0) * unscale * power_of_two(-exponent)
        pairs *= power_of_two(-range_exponent(gl.load(LargestSolution + sequence), 0))
        gl.store(StrengthSum + slot * 2 + W, gl.where(spoiled, float("nan"), -pairs))


@gluon.jit(do_not_specialize=["heads", "chains", "blocks", "length", "headroom", "hurry"])
def hopper_adjoint_kernel(
    KeyRows, KeyTiles, GradTiles, Toward, T, Live,
    Grad, grad_b, grad_h, grad_n, Solution, solution_b, solution_h, solution_n,
    Gh, GradValue, out_b, out_h, out_n, StrengthSum, Strength, Blocks,
    Done, LargestGrad, LargestSolution, Bad, Turn, Ticket,
    heads, chains, blocks, length, headroom, c2, shift, hurry,
    D: gl.constexpr, E: gl.constexpr, M: gl.constexpr, WIDTH: gl.constexpr, PACKED: gl.constexpr,
    SHIFT: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """Grid: ``chains * blocks`` programs."""
    ticket = gl.atomic_add(Ticket, 1, sem="relaxed")
    chain = ticket % chains
    block = blocks - 1 - ticket // chains
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
    late = gl.minimum(need, hurry)
    Grad += batch * grad_b + head * grad_h
    Solution += batch * solution_b + head * solution_h
    GradValue += batch * out_b + head * out_h
    if Strength is not None:
        Strength += head

    swizzled: gl.constexpr = KeyRows.layout
    keys = gl.allocate_shared_memory(gl.float16, [2, 64, D], swizzled)
    solution = gl.allocate_shared_memory(gl.float16, [2, 64, E], swizzled)
    key_ring = gl.allocate_shared_memory(gl.float16, [STAGES, M, D], swizzled)
    grad_ring = gl.allocate_shared_memory(gl.float16, [STAGES, M, E], swizzled)
    pieces = gl.allocate_shared_memory(gl.float16, [4 * (M // 64), 64, 64], swizzled)
    staging = gl.allocate_shared_memory(gl.float32, [4, 16, 256], Toward.layout)
    norms = gl.allocate_shared_memory(gl.float32, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    single: gl.constexpr = mbarrier.MBarrierLayout()
    own = gl.allocate_shared_memory(gl.int64, [1], single)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], single)
    grad_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], single)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], single)
    t_full = gl.allocate_shared_memory(gl.int64, [1], single)
    o_full = gl.allocate_shared_memory(gl.int64, [4, 1], single)
    o_empty = gl.allocate_shared_memory(gl.int64, [4, 1], single)
    meet = gl.allocate_shared_memory(gl.int64, [1], single)
    stored = gl.allocate_shared_memory(gl.int64, [1], single)
    mbarrier.init(own, count=1)
    mbarrier.init(t_full, count=2)
    mbarrier.init(meet, count=2)
    mbarrier.init(stored, count=1)
    for index in gl.static_range(2):
        mbarrier.init(key_full.index(index), count=1)
        mbarrier.init(grad_full.index(index), count=1)
        mbarrier.init(empty.index(index), count=2)
    for index in gl.static_range(4):
        mbarrier.init(o_full.index(index), count=1)
        mbarrier.init(o_empty.index(index), count=1)
    fence_async_shared()

    if count > 0:
        counter = Done + sequence
        last = slot + need  # of the sequence, among all chains' blocks
        right = Grad + first_row.to(gl.int64) * grad_n
        group = (
            keys, solution, key_ring, grad_ring, pieces, staging, norms,
            own, key_full, grad_full, empty, t_full, o_full, o_empty, meet,
            T, Live, Grad, grad_n, Solution, solution_n, Gh, GradValue, out_n, StrengthSum, Strength,
            Done, LargestGrad, LargestSolution, Bad,
            slot, sequence, need, late, first_row, count, headroom, c2, shift,
        )  # fmt: skip
        gl.warp_specialize(
            [
                (_group, (group, gl.constexpr(0), WIDTH, SHIFT, LATE)),
                (_group, (group, gl.constexpr(1), WIDTH, SHIFT, LATE)),
                (load_keys, (KeyRows, KeyTiles, keys, key_ring, own, key_full, empty, slot, last, need, late, right, grad_n, count, WIDTH)),
                (load_grads, (GradTiles, grad_ring, grad_full, empty, counter, last, need, late)),
                (add_up, (Toward, staging, o_full, o_empty, stored, Turn, slot, need, M, D, gl.constexpr(0))),
                (add_up, (Toward, staging, o_full, o_empty, stored, Turn, slot, need, M, D, gl.constexpr(1))),
            ],
            [4, 1, 1, 1, 1],
            [240, 24, 24, 24, 24],
        )  # fmt: skip


def hopper_adjoint(
    call: Call,
    prepared: Prepared,
    grad: Tensor,
    solution: Tensor,
    grad_value: Tensor,
    key: Tensor,
    grad_key: Tensor,
    strength: Tensor | None,
    mask: Tensor | None,
    control: Control,
    hurry: bool = True,
) -> Tensor | None:
    """Write the gradients of values and keys; return ``-sum T`` of every block if there is a strength.

    ``hurry``: dV first, then the next block's share of the key gradient, at the price of a product; it
    pays while blocks wait for each other. Memory, in units of the values': Gh 1 and Toward 2.
    """
    geometry = call.geometry
    D, E = call.key_width, call.solution_width
    done, largest_grad, largest_solution, bad, turn = control.parts
    columns = 64 if D == 128 else 128
    gh = geometry.workspace(grad, torch.float16, E)
    toward = grad.new_empty((geometry.slots * D // 2, 256), dtype=torch.float32)
    strength_sum = None
    if strength is not None:
        strength_sum = torch.zeros((geometry.slots, 2), dtype=torch.float32, device=grad.device)
    assert prepared.inverse is not None
    # Strengths and packed batches take the other order until they have been run on a card in this one.
    late = geometry.longest >= LONG and strength is None and not geometry.packed
    call.launch(
        hopper_adjoint_kernel, geometry.slots,
        tile_descriptor(prepared.keys, 64), tile_descriptor(prepared.keys, columns), tile_descriptor(gh, columns),
        tile_descriptor(toward, 16), prepared.inverse, prepared.live,
        grad, *geometry.strides(grad), solution, *geometry.strides(solution),
        gh, grad_value, *geometry.strides(grad_value), strength_sum, strength, geometry.table,
        done, largest_grad, largest_solution, bad, turn, control.ticket,
        geometry.heads, geometry.chains, geometry.blocks, geometry.length, geometry.headroom,
        call.c2, call.shift(SHIFT_BACKWARD), int(hurry),
        D=D, E=E, M=columns, WIDTH=call.value_width, PACKED=geometry.packed, SHIFT=SHIFT_BACKWARD,
        LATE=int(late), num_warps=4,
    )  # fmt: skip
    call.launch(
        finish_kernel, 2 * geometry.slots,
        toward, key, *geometry.strides(key), grad_key, *geometry.strides(grad_key),
        mask, strength, geometry.table, largest_grad, largest_solution, bad,
        geometry.heads, geometry.chains, geometry.blocks, geometry.length, geometry.headroom,
        call.width, call.kernel_scale, KEY_EPS, D=D, PACKED=geometry.packed, num_warps=8,
    )  # fmt: skip
    return None if strength_sum is None else strength_sum.sum(1)
