"""The adjoint solve ``L^T dV = dY``, from the last block row to the first, with half a key gradient.

With ``T_ij = (dV_i . y_j) P_ij`` for ``j < i`` the key gradient is ``-b s sum_j (T_ij + T_ji) khat_j``.
The block row ``p`` meets every later block ``i`` here, with ``P_pi`` and ``dV_i`` at hand: it adds up

    acc_p = sum_{i>p} P_ip^T dV_i,      toward_p = sum_{i>p} T_ip^T khat_i

in the same sweep; ``toward.py`` adds the earlier blocks' half. Pairs inside the block count here.

Half precision: see ``solve.py``; ``T`` is brought into range by a power of two for each block, from the
norms that the bound ``|dV| <= 2 |dY|`` allows.
"""

import triton
import triton.language as tl

from .solve import inverse_tile, kernel_tile
from .tiles import (
    accumulate,
    announce,
    load_pieces,
    load_row_tile,
    place_rows,
    power_of_two,
    range_exponent,
    similarity,
    store_row_tile,
    tile_pointers,
    wait_beyond,
)


@triton.jit
def norm_exponent(x1, x2, E1: tl.constexpr, E2: tl.constexpr, SHIFT: tl.constexpr):
    """The exponent ``k`` that brings rows x of norm n to ``2^k n sqrt(E) 2^SHIFT <= 1``."""
    square = tl.sum(x1 * x1, axis=1)
    if E2 > 0:
        square += tl.sum(x2 * x2, axis=1)
    largest = tl.max(square, axis=0)
    half = (((largest.to(tl.int32, bitcast=True)) >> 23) - 125) >> 1
    WIDE: tl.constexpr = 3 if E1 + E2 <= 64 else 4
    return -tl.maximum(half, -20) - WIDE - SHIFT


@triton.jit(do_not_specialize=["heads", "chains", "blocks", "length", "headroom"])
def adjoint_kernel(
    Kh, Wt, T, Live, Grad, Solution, Gh, Yh, GradValue, Toward, TowardSum, StrengthSum,
    Strength, Blocks, Done, LargestGrad, LargestSolution, Bad, Ticket,
    grad_b, grad_h, grad_n, solution_b, solution_h, solution_n, out_b, out_h, out_n,
    heads, chains, blocks, length, value_width, headroom, c2, shift, exact_one,
    D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    R: tl.constexpr, M: tl.constexpr, STAGES: tl.constexpr, PACKED: tl.constexpr,
    SHIFT: tl.constexpr, CENTRED: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid: ``chains * blocks`` programs."""
    ticket = tl.atomic_add(Ticket, 1, sem="relaxed")
    chain = ticket % chains
    block = blocks - 1 - ticket // chains
    batch = (chain // heads).to(tl.int64)
    head = (chain % heads).to(tl.int64)
    index = tl.arange(0, R)
    rows, inside, count, first = place_rows(Blocks, block, blocks, length, index, R, PACKED)
    end = blocks
    if PACKED:
        end = tl.load(Blocks + 3 * blocks + block)
        if count == 0:
            return

    slot = chain * blocks + first
    counter = Done + slot
    base = chain.to(tl.int64) * blocks * R
    start = base + block * R
    live = tl.load(Live + start + index) != 0
    k1, k2 = load_pieces(Kh, start, R, D1, D2)
    row_weight = tl.zeros([R], dtype=tl.float32)
    if CENTRED:
        row_weight = tl.load(Wt + start + index)
    strength = 1.0
    if Strength is not None:
        strength = tl.load(Strength + head).to(tl.float32)
    DTYPE: tl.constexpr = Kh.dtype.element_ty

    # The block's own Y, as the operand of T and as a column block for toward.py.
    y_exponent = 0
    g_exponent = 0
    if not CENTRED:
        y_exponent = range_exponent(tl.load(LargestSolution + slot), 0)
        g_exponent = range_exponent(tl.load(LargestGrad + slot), headroom)
    scale = power_of_two(y_exponent)
    solution = Solution + batch * solution_b + head * solution_h
    y1 = load_row_tile(solution, rows, solution_n, live, value_width, 0, E1).to(tl.float32) * scale
    y1 = tl.where(tl.abs(y1) < float("inf"), y1, 0.0)
    y2 = y1
    tl.store(tile_pointers(Yh, start, R, E1 + E2, 0, E1), y1.to(DTYPE))
    if E2 > 0:
        y2 = load_row_tile(solution, rows, solution_n, live, value_width, E1, E2).to(tl.float32)
        y2 = y2 * scale
        y2 = tl.where(tl.abs(y2) < float("inf"), y2, 0.0)
        tl.store(tile_pointers(Yh, start, R, E1 + E2, E1, E2), y2.to(DTYPE))
    t_exponent = 0
    t_scale = 1.0
    if not CENTRED:
        # Of T, not of y: entries of wide rows would leave float16's normal range.
        t_exponent = norm_exponent(y1, y2, E1, E2, SHIFT)
        t_scale = power_of_two(t_exponent)
    y1 = y1.to(DTYPE)
    y2 = y2.to(DTYPE)

    acc1 = tl.zeros([R, E1], dtype=tl.float32)
    acc2 = acc1
    toward1 = tl.zeros([R, D1], dtype=tl.float32)
    toward2 = toward1
    if E2 > 0:
        acc2 = tl.zeros([R, E2], dtype=tl.float32)
    if D2 > 0:
        toward2 = tl.zeros([R, D2], dtype=tl.float32)
    total = tl.zeros([R], dtype=tl.float32)

    done = 0
    need = end - 1 - block
    while done < need:
        ready = wait_beyond(counter, done, INTERPRET)
        stop = tl.minimum(ready, need)
        for step in tl.range(done * R, stop * R, M, num_stages=STAGES):
            here = base + (end * R - M - step)
            c1, c2nd = load_pieces(Kh, here, M, D1, D2)
            p = kernel_tile(k1, k2, row_weight, c1, c2nd, Wt, here, c2, shift, M, D2, CENTRED, PRECISION)  # fmt: skip
            g1, g2 = load_pieces(Gh, here, M, E1, E2)
            acc1 = accumulate(acc1, p.to(DTYPE), g1, exact_one, PRECISION)
            if E2 > 0:
                acc2 = accumulate(acc2, p.to(DTYPE), g2, exact_one, PRECISION)
            t = similarity(y1, y2, g1, g2, E2, PRECISION) * (p * t_scale)
            if CENTRED or Strength is not None:
                total += tl.sum(t, axis=1)
            t = t.to(DTYPE)
            toward1 = accumulate(toward1, t, c1, exact_one, PRECISION)
            if D2 > 0:
                toward2 = accumulate(toward2, t, c2nd, exact_one, PRECISION)
        done = stop

    factor = strength
    scale = 1.0
    unscale = 1.0
    if not CENTRED:
        scale = power_of_two(g_exponent)
        unscale = power_of_two(-g_exponent)
        factor = strength * power_of_two(0 * g_exponent - SHIFT)
    H: tl.constexpr = R // 2
    inverse = inverse_tile(T + (start // R) * (3 * H * H), R, True)
    grads = Grad + batch * grad_b + head * grad_h
    g1 = load_row_tile(grads, rows, grad_n, live, value_width, 0, E1).to(tl.float32) * scale
    g1 = tl.where(tl.abs(g1) < float("inf"), g1, 0.0)
    g1 -= acc1 * factor
    g1 = tl.where(live[:, None], g1, 0.0)
    g1 = accumulate(g1, inverse, g1.to(DTYPE), exact_one, PRECISION)
    tl.store(tile_pointers(Gh, start, R, E1 + E2, 0, E1), g1.to(DTYPE))
    g2 = g1
    if E2 > 0:
        g2 = load_row_tile(grads, rows, grad_n, live, value_width, E1, E2).to(tl.float32) * scale
        g2 = tl.where(tl.abs(g2) < float("inf"), g2, 0.0)
        g2 -= acc2 * factor
        g2 = tl.where(live[:, None], g2, 0.0)
        g2 = accumulate(g2, inverse, g2.to(DTYPE), exact_one, PRECISION)
        tl.store(tile_pointers(Gh, start, R, E1 + E2, E1, E2), g2.to(DTYPE))
    announce(counter, end - block)

    spoiled = tl.load(Bad + slot) > 0
    out = GradValue + batch * out_b + head * out_h
    final = tl.where(spoiled & live[:, None], float("nan"), g1 * unscale)
    store_row_tile(out, rows, out_n, inside, value_width, final, 0, E1)
    if E2 > 0:
        final = tl.where(spoiled & live[:, None], float("nan"), g2 * unscale)
        store_row_tile(out, rows, out_n, inside, value_width, final, E1, E2)

    # The pairs inside the block: T is strictly upper in (j, i) here, and acts both ways.
    p = kernel_tile(k1, k2, row_weight, k1, k2, Wt, start, c2, shift, R, D2, CENTRED, PRECISION)
    t = similarity(y1, y2, g1.to(DTYPE), g2.to(DTYPE), E2, PRECISION) * (p * t_scale)
    t = tl.where(index[:, None] < index[None, :], t, 0.0)
    if CENTRED or Strength is not None:
        total += tl.sum(t, axis=1)
    if Strength is not None:
        pairs = tl.sum(total, axis=0)
        if not CENTRED:
            pairs *= power_of_two(-t_exponent - SHIFT) * unscale * power_of_two(-y_exponent)
        tl.store(StrengthSum + chain * blocks + block, tl.where(spoiled, float("nan"), -pairs))
    if CENTRED:
        total += tl.sum(t, axis=0)
        tl.store(TowardSum + start + index, total)
    t = t.to(DTYPE)
    t = t + tl.trans(t)
    toward1 = accumulate(toward1, t, k1, exact_one, PRECISION)
    if not CENTRED:
        toward1 = toward1 * power_of_two(-t_exponent - SHIFT) * unscale * power_of_two(-y_exponent)
    tl.store(tile_pointers(Toward, start, R, D1 + D2, 0, D1), toward1)
    if D2 > 0:
        toward2 = accumulate(toward2, t, k2, exact_one, PRECISION)
        if not CENTRED:
            toward2 = toward2 * power_of_two(-t_exponent - SHIFT) * unscale
            toward2 = toward2 * power_of_two(-y_exponent)
        tl.store(tile_pointers(Toward, start, R, D1 + D2, D1, D2), toward2)
