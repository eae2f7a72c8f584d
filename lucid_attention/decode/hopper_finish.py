"""The end of a head in Hopper's decode kernel: other programs' sums, the new tokens among themselves, the results."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .hopper_list import LOG2_E, SHIFT, UNSHIFT, as_long, places_of


@gluon.jit
def _add_parts(
    all_tops, all_weights, all_sums, earliest, begin, end, step,
    QUERIES: gl.constexpr, USED: gl.constexpr, HALF: gl.constexpr, AT_ONCE: gl.constexpr, stack: gl.constexpr,
):  # fmt: skip
    """Tops, weights and sums of the parts ``begin, begin + step .. end``, in this order."""
    R: gl.constexpr = _power(USED)
    lines: gl.constexpr = gl.SliceLayout(0, stack)
    down: gl.constexpr = gl.SliceLayout(1, lines)
    pairs: gl.constexpr = gl.SliceLayout(2, stack)
    row = gl.arange(0, R, gl.SliceLayout(0, pairs))
    entry = gl.arange(0, HALF, gl.SliceLayout(0, gl.SliceLayout(1, stack)))
    is_query = row < QUERIES
    top = gl.where(is_query, -1e30, 0.0)
    weight = gl.zeros([R], gl.float32, gl.SliceLayout(0, pairs))
    acc = gl.zeros([R, HALF], gl.float32, lines)
    for start in range(begin, end + 1, step * AT_ONCE):
        part = start + step * gl.arange(0, AT_ONCE, gl.SliceLayout(1, pairs))
        places = (2 * part + (part == earliest).to(gl.int32))[:, None] * USED + row[None, :]
        live = (part <= end)[:, None] & (row < USED)[None, :]
        tops = gl.load(all_tops + places, mask=live, other=-1e30)
        weights = gl.load(all_weights + places, mask=live, other=0.0)
        sums = gl.load(
            all_sums + gl.expand_dims(places * HALF, 2) + entry[None, None, :],
            mask=gl.expand_dims(live, 2),
            other=0.0,
        )
        tops = gl.where(is_query[None, :], tops, 0.0)
        new_top = gl.maximum(top, gl.max(tops, axis=0))
        fades = gl.exp2(tops - new_top[None, :])
        fade = gl.exp2(top - new_top)
        weight = weight * fade + gl.sum(weights * fades, axis=0)
        acc = acc * gl.convert_layout(fade, down)[:, None] + gl.sum(
            sums * gl.expand_dims(fades, 2), axis=0
        )
        top = new_top
    return gl.convert_layout(top, down), gl.convert_layout(weight, down), acc


def parts_at_once(used: int, e: int) -> int:
    """How many parts of ``used`` rows and ``e`` columns are read at once: 64 registers."""
    return max(1, min(16, 16384 // ((1 << max(0, used - 1).bit_length()) * e)))


_parts_at_once = gluon.constexpr_function(parts_at_once)


@gluon.constexpr_function
def _power(n):
    return 1 << max(0, n - 1).bit_length()


@gluon.jit
def finish_head(
    Key, Value, KeyCache, YCache, YScale, Mask, Table, Strength, Sinks, Out, Parts, Arrivals,
    key_b, key_h, key_n, value_b, value_h, value_n,
    cached_b, cached_h, cached_n, y_b, y_h, y_n, mask_b, table_b,
    heads, capacity, width, value_width, sums, tops, among, is_among, heads_done,
    all_heads, b, head, length, earliest, latest,
    GROUP: gl.constexpr, G: gl.constexpr, C: gl.constexpr, D: gl.constexpr, E: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """A group after a head's tiles: the other programs' sums, the new tokens among themselves, the results.

    Each group does this for its half of the value's columns, without a word to the other: parts, counters and the
    last to arrive are each half's own.
    """
    QUERIES: gl.constexpr = G * C
    USED: gl.constexpr = QUERIES + C
    R: gl.constexpr = _power(USED)
    HALF: gl.constexpr = E // 2
    AT_ONCE: gl.constexpr = _parts_at_once(USED, E)
    THREADS: gl.constexpr = HALF // 4
    stack: gl.constexpr = gl.BlockedLayout(
        [AT_ONCE, 1, 4], [1, 32 // THREADS, THREADS], [1, 4, 1], [2, 1, 0]
    )
    lines: gl.constexpr = gl.SliceLayout(0, stack)
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, lines)
    row = gl.arange(0, R, down)
    entry = gl.arange(0, HALF, gl.SliceLayout(0, lines))
    first_column: gl.constexpr = GROUP * HALF
    inside = (first_column + entry < value_width)[None, :]
    used = row < USED
    is_query = row < QUERIES
    is_key = (row >= QUERIES) & used
    wide_b = as_long(b)
    wide_head = as_long(head)
    acc = sums.slice(0, R, dim=0).slice(first_column, HALF, dim=1).load(lines)
    top = tops.index(0).slice(0, R, dim=0).load(down)
    weight = tops.index(1).slice(0, R, dim=0).load(down)

    # What only the head's last program needs, on its way while that is found out.
    fits = length + C <= capacity
    row_fits = row * 0 + length + C <= capacity
    of_token = gl.where(is_query, row % C, row - QUERIES)
    real = used
    new_mask = Mask
    if Mask is not None:
        new_mask = Mask + wide_b * mask_b + length
        real = gl.load(new_mask + of_token, mask=used & row_fits, other=0) != 0
    strength = 1.0
    if Strength is not None:
        strength = gl.load(Strength + head).to(gl.float32)
    unit = 1.0
    if YScale is not None:
        unit = gl.load(YScale + b * heads + head)
    own = is_key & real
    values = wide_b * value_b + wide_head * value_h + of_token * as_long(value_n) + first_column
    v = gl.load(Value + values[:, None] + entry[None, :], mask=own[:, None] & inside, other=0.0)

    complete = earliest == latest
    if not complete:
        # A program shares at most two heads: one that began before it, one that ends after it.
        programs = gl.num_programs(0)
        program = gl.program_id(0)
        all_tops = Parts + GROUP * (2 * programs * USED * (HALF + 2))
        all_weights = all_tops + 2 * programs * USED
        all_sums = all_weights + 2 * programs * USED
        counters = Arrivals + GROUP * (all_heads + 2 * programs)
        # Many parts are added up in two steps: neighbours first, each few of them by their last.
        fan = latest - earliest + 1
        root = (gl.sqrt(fan.to(gl.float32)) + 0.999).to(gl.int32)
        fan = gl.where(fan > 3 * AT_ONCE, gl.maximum(root, AT_ONCE), fan)
        leader = program - (program - earliest) % fan
        begin = leader
        end = gl.minimum(leader + fan - 1, latest)
        step = fan * 0 + 1
        counter = counters + all_heads + 2 * leader + (leader == earliest).to(gl.int32)
        place = program
        waiting = step > 0
        while waiting:
            slot = 2 * place + (place == earliest).to(gl.int32)
            gl.store(all_tops + slot * USED + row, top, mask=used)
            gl.store(all_weights + slot * USED + row, weight, mask=used)
            mine = all_sums + slot * (USED * HALF)
            gl.store(mine + row[:, None] * HALF + entry[None, :], acc, mask=used[:, None])
            gl.thread_barrier()
            waiting = gl.atomic_add(counter, 1, sem="acq_rel") == (end - begin) // step
            if waiting:
                gl.atomic_xchg(counter, 0, sem="relaxed")
                gl.thread_barrier()
                top, weight, acc = _add_parts(
                    all_tops, all_weights, all_sums, earliest, begin, end, step, QUERIES, USED, HALF, AT_ONCE, stack
                )  # fmt: skip
                gl.thread_barrier()  # before the first of these parts is overwritten
                complete = (begin == earliest) & (end == latest)
                waiting = not complete
                begin = earliest
                end = latest
                step = fan
                counter = counters + b * heads + head
                place = leader
    if complete:
        # From here on the rows of keys hold y, and all rows its own units.
        acc = acc * (gl.where(is_key, -strength * UNSHIFT, 1.0) * unit)[:, None] + v.to(gl.float32)
        acc = gl.where(real[:, None], acc, 0.0)
        mbarrier.wait(is_among, heads_done & 1)
        for token in range(C):
            z = among.index(token).slice(0, R, dim=0).load(down)
            seen = token < C
            if Mask is not None:
                seen = gl.load(new_mask + token, mask=fits, other=0) != 0
            reach = gl.where(is_query, of_token, of_token - 1)
            z = gl.where(real & (token <= reach) & seen, z, float("-inf"))
            new_top = gl.where(is_query, gl.maximum(top, z), 0.0)
            w = gl.exp2(z - new_top) * gl.where(is_key, -strength, 1.0 / UNSHIFT)
            fade = gl.exp2(top - new_top)
            weight = weight * fade + w
            y = gl.sum(gl.where((row == QUERIES + token)[:, None], acc, 0.0), axis=0)
            acc = acc * fade[:, None] + w[:, None] * y[None, :]
            top = new_top
        if Sinks is not None:
            sink = gl.load(Sinks + head * G + row // C, mask=is_query, other=0.0).to(gl.float32)
            new_top = gl.where(is_query, gl.maximum(top, sink * LOG2_E), 0.0)
            fade = gl.exp2(top - new_top)
            weight = weight * fade + gl.exp2(sink * LOG2_E - new_top + SHIFT)
            acc = acc * fade[:, None]
        part_of = gl.where(real, gl.where(weight > 0, 1.0 / weight, 0.0), 0.0)
        part_of = gl.where(row_fits, part_of, float("nan"))
        outs = Out + (wide_b * heads + wide_head) * (QUERIES * value_width) + first_column
        gl.store(
            outs + row[:, None] * value_width + entry[None, :],
            (acc * part_of[:, None]).to(Out.dtype.element_ty), mask=is_query[:, None] & inside,
        )  # fmt: skip
        added = is_key & row_fits
        places = wide_head * y_h + first_column + places_of(Table, b, length + of_token, added, y_b, y_n, table_b, PAGE)  # fmt: skip
        gl.store(
            YCache + places[:, None] + entry[None, :], (acc / unit).to(YCache.dtype.element_ty),
            mask=added[:, None] & inside,
        )  # fmt: skip
        if GROUP == 0:
            token_row = gl.arange(0, 16, gl.SliceLayout(1, plain))
            column = gl.arange(0, D, gl.SliceLayout(0, plain))
            added = (token_row < C) & (token_row * 0 + length + C <= capacity)
            places = wide_head * cached_h + places_of(Table, b, length + token_row, added, cached_b, cached_n, table_b, PAGE)  # fmt: skip
            added = added[:, None] & (column < width)[None, :]
            new_keys = wide_b * key_b + wide_head * key_h + token_row * as_long(key_n)
            k = gl.load(Key + new_keys[:, None] + column[None, :], mask=added, other=0.0)
            gl.store(KeyCache + places[:, None] + column[None, :], k, mask=added)
