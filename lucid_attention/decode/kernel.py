"""One pass over a cache of (K, Y): the queries' softmax, the new tokens' solve, both finished and appended.

A new key is one more query. For one KV head, ``G`` query heads and ``C`` new tokens, the rows of a tile X are

    r < G C            query r // C of token r % C      z = scale q . k_j
    G C <= r < G C + C the new key of token r - G C     z = kernel_scale (khat . khat_j - D)

and ``acc = sum_j exp(z_j) y_j`` is what both need: divided by the sum of its weights it is attention over
the past, and subtracted from the new value it is the right-hand side of the new tokens' own small solve.

The work is cut evenly, not by heads: all tiles of ``M`` cached rows of all heads make one list, and each
program takes as many neighbours of it. A head whose tiles lie with several programs is finished by the last
of them to arrive. The parts are added in the order of the list, so results repeat bit for bit.
"""

import triton
import triton.language as tl

SHIFT = tl.constexpr(10.0)
"""Weights are held 2^10 times as large: those below 2^-14 would lose bits in float16."""
UNSHIFT = tl.constexpr(2.0**-10)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _places(Table, b, rows, live, batch_stride, row_stride, table_stride, PAGE: tl.constexpr):
    """Where rows of a sequence start in a cache, apart from the head's offset."""
    if PAGE:
        page = tl.load(Table + b * table_stride + rows // PAGE, mask=live, other=0).to(tl.int64)
        return page * batch_stride + (rows % PAGE).to(tl.int64) * row_stride
    return b * batch_stride + rows.to(tl.int64) * row_stride


@triton.jit
def _piece(base, places, live, width, OFFSET: tl.constexpr, WIDTH: tl.constexpr):
    columns = OFFSET + tl.arange(0, WIDTH)
    pointers = base + places[:, None] + columns[None, :]
    return tl.load(pointers, mask=live[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def _store(base, places, live, width, tile, OFFSET: tl.constexpr, WIDTH: tl.constexpr):
    columns = OFFSET + tl.arange(0, WIDTH)
    pointers = base + places[:, None] + columns[None, :]
    mask = live[:, None] & (columns < width)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    if INTERPRET and a.dtype == tl.bfloat16:  # which the interpreter multiplies as integers
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _squares(k1, k2, D2: tl.constexpr):
    x = k1.to(tl.float32)
    total = tl.sum(x * x, axis=1)
    if D2 > 0:
        x = k2.to(tl.float32)
        total += tl.sum(x * x, axis=1)
    return total


@triton.jit
def _exponents(x1, x2, k1, k2, factor, is_key, scale, softcap, width, shift, eps,
    D2: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """``z log2(e)`` of all rows with a tile of keys."""
    s = tl.zeros([x1.shape[0], k1.shape[0]], dtype=tl.float32)
    s = _dot(x1, tl.trans(k1), s, PRECISION, INTERPRET)
    if D2 > 0:
        s = _dot(x2, tl.trans(k2), s, PRECISION, INTERPRET)
    inverse_rms = tl.math.rsqrt(_squares(k1, k2, D2) / width + eps)
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        grown = tl.math.exp2(s * (2.0 * LOG2_E * scale / softcap))
        capped = softcap * LOG2_E * (1.0 - 2.0 / (grown + 1.0))
    else:
        capped = s * factor[:, None]
    return tl.where(is_key[:, None], s * factor[:, None] * inverse_rms[None, :] - shift, capped)


@triton.jit
def _length(pointers, capacity, exists):
    """Lengths within the cache: a wrong one must not read beyond it; a negative one is as a full cache."""
    length = tl.load(pointers, mask=exists, other=0)
    return tl.where(length < 0, capacity, tl.minimum(length, capacity)).to(tl.int32)


@triton.jit
def _whose(tile, tiles, cumulative, index, Lengths, heads, capacity, RAGGED: tl.constexpr):  # fmt: skip
    """The batch row, the head and the length that a tile of the list belongs to; the head's first tile and its end."""
    if RAGGED:
        b = tl.sum((cumulative * heads <= tile).to(tl.int32), axis=0)
        before = tl.sum(tl.where(index < b, tiles, 0), axis=0) * heads
        own = tl.sum(tl.where(index == b, tiles, 0), axis=0)
        length = _length(Lengths + b, capacity, True)
    else:
        own = tiles
        b = tile // (own * heads)
        before = b * own * heads
        length = cumulative
    head = (tile - before) // own
    first = before + head * own
    return b, head, length, first, first + own


@triton.jit(do_not_specialize=["batch", "heads", "capacity"])
def decode_kernel(
    Query, Key, Value, KeyCache, YCache, YScale, Lengths, Mask, Table, Strength, Sinks, Out, Parts, Arrivals,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
    cached_b, cached_h, cached_n, y_b, y_h, y_n, mask_b, table_b,
    batch, heads, capacity, width, value_width, scale, kernel_scale, softcap, eps,
    G: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    E1: tl.constexpr, E2: tl.constexpr, M: tl.constexpr, BATCH: tl.constexpr, PROGRAMS: tl.constexpr,
    PAGE: tl.constexpr, RAGGED: tl.constexpr, SOFTCAP: tl.constexpr, STAGES: tl.constexpr,
    K_PRECISION: tl.constexpr, Y_PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid: ``programs``. Arrivals: a counter for every head of every row of the batch, 0 before and after."""
    QUERIES: tl.constexpr = G * C
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    row = tl.arange(0, ROWS)
    is_query = row < QUERIES
    is_key = (row >= QUERIES) & (row < QUERIES + C)
    of_token = tl.where(is_query, row % C, row - QUERIES).to(tl.int64)
    shift = kernel_scale * LOG2_E * width

    index = tl.arange(0, BATCH)
    if RAGGED:
        lengths = _length(Lengths + index, capacity, index < batch)
        tiles = tl.where(index < batch, tl.maximum(tl.cdiv(lengths, M), 1), 0)
        cumulative = tl.cumsum(tiles, axis=0)
        total = tl.sum(tiles, axis=0) * heads
    else:
        cumulative = _length(Lengths, capacity, True)  # of all rows: their one length
        tiles = tl.maximum(tl.cdiv(cumulative, M), 1)
        total = tiles * batch * heads
    share = tl.cdiv(total, programs)
    tile = program * share
    end = tl.minimum(tile + share, total)
    while tile < end:
        b, head, length, first, beyond = _whose(
            tile, tiles, cumulative, index, Lengths, heads, capacity, RAGGED
        )
        stop = tl.minimum(beyond, end)
        wide_b = b.to(tl.int64)
        wide_head = head.to(tl.int64)
        query_places = wide_b * query_b + (wide_head * G + row // C) * query_h + of_token * query_n
        key_places = wide_b * key_b + wide_head * key_h + of_token * key_n
        value_places = wide_b * value_b + wide_head * value_h + of_token * value_n
        x1 = _piece(Query, query_places, is_query, width, 0, D1)
        x1 = tl.where(is_key[:, None], _piece(Key, key_places, is_key, width, 0, D1), x1)
        x2 = x1
        if D2 > 0:
            x2 = _piece(Query, query_places, is_query, width, D1, D2)
            x2 = tl.where(is_key[:, None], _piece(Key, key_places, is_key, width, D1, D2), x2)
        own_rms = tl.math.rsqrt(_squares(x1, x2, D2) / width + eps)
        factor = tl.where(is_key, kernel_scale * own_rms, scale) * LOG2_E

        top = tl.where(is_query, -1e30, 0.0)
        weight = tl.zeros([ROWS], dtype=tl.float32)
        acc1 = tl.zeros([ROWS, E1], dtype=tl.float32)
        acc2 = acc1
        if E2 > 0:
            acc2 = tl.zeros([ROWS, E2], dtype=tl.float32)
        keys = KeyCache + wide_head * cached_h
        ys = YCache + wide_head * y_h
        for start in tl.range((tile - first) * M, (stop - first) * M, M, num_stages=STAGES):
            rows = start + tl.arange(0, M)
            live = rows < length
            places = _places(Table, wide_b, rows, live, cached_b, cached_n, table_b, PAGE)
            k1 = _piece(keys, places, live, width, 0, D1)
            k2 = k1
            if D2 > 0:
                k2 = _piece(keys, places, live, width, D1, D2)
            z = _exponents(
                x1, x2, k1, k2, factor, is_key, scale, softcap, width, shift, eps, D2, SOFTCAP, K_PRECISION, INTERPRET,
            )  # fmt: skip
            seen = live
            if Mask is not None:
                seen = seen & (tl.load(Mask + wide_b * mask_b + rows, mask=live, other=0) != 0)
            z = tl.where(seen[None, :], z, float("-inf"))
            new_top = tl.where(is_query, tl.maximum(top, tl.max(z, axis=1)), 0.0)
            p = tl.math.exp2(z - new_top[:, None] + SHIFT)
            fade = tl.math.exp2(top - new_top)
            weight = weight * fade + tl.sum(p, axis=1)
            top = new_top
            places = _places(Table, wide_b, rows, live, y_b, y_n, table_b, PAGE)
            y1 = _piece(ys, places, live, value_width, 0, E1)
            p = p.to(y1.dtype)
            acc1 = _dot(p, y1, acc1 * fade[:, None], Y_PRECISION, INTERPRET)
            if E2 > 0:
                y2 = _piece(ys, places, live, value_width, E1, E2)
                acc2 = _dot(p, y2, acc2 * fade[:, None], Y_PRECISION, INTERPRET)

        earliest = first // share
        latest = (beyond - 1) // share
        complete = earliest == latest
        if not complete:
            # A program shares at most two heads: one that began before it, one that ends after it.
            slot = 2 * program + (earliest == program).to(tl.int32)
            place = slot.to(tl.int64) * ROWS + row
            used = row < QUERIES + C
            weights = Parts + 2 * programs * ROWS
            sums = weights + 2 * programs * ROWS
            tl.store(Parts + place, top, mask=used)
            tl.store(weights + place, weight, mask=used)
            _store(sums, place * value_width, used, value_width, acc1, 0, E1)
            if E2 > 0:
                _store(sums, place * value_width, used, value_width, acc2, E1, E2)
            counter = Arrivals + b * heads + head
            tl.debug_barrier()
            arrived = tl.atomic_add(counter, 1, sem="acq_rel")
            complete = arrived == latest - earliest
            if complete:
                tl.atomic_xchg(counter, 0, sem="relaxed")
                tl.debug_barrier()
                parts = earliest + tl.arange(0, PROGRAMS)
                slots = (2 * parts + (parts == earliest).to(tl.int32)).to(tl.int64)
                tops = tl.load(
                    Parts + slots[:, None] * ROWS + row[None, :],
                    mask=(parts <= latest)[:, None] & used[None, :],
                    other=-1e30,
                )
                top = tl.where(is_query, tl.max(tops, axis=0), 0.0)
                weight = tl.zeros([ROWS], dtype=tl.float32)
                acc1 = tl.zeros([ROWS, E1], dtype=tl.float32)
                if E2 > 0:
                    acc2 = tl.zeros([ROWS, E2], dtype=tl.float32)
                for part in tl.range(earliest, latest + 1, loop_unroll_factor=8):
                    theirs = 2 * part + (part == earliest).to(tl.int32)
                    theirs = theirs.to(tl.int64) * ROWS + row
                    fade = tl.math.exp2(tl.load(Parts + theirs, mask=used, other=0.0) - top)
                    weight += fade * tl.load(weights + theirs, mask=used, other=0.0)
                    theirs *= value_width
                    acc1 += fade[:, None] * _piece(sums, theirs, used, value_width, 0, E1)
                    if E2 > 0:
                        acc2 += fade[:, None] * _piece(sums, theirs, used, value_width, E1, E2)
        if complete:
            # The new tokens among themselves.
            token = tl.arange(0, 16)  # as many as there may be
            exists = token < C
            token_places = wide_b * key_b + wide_head * key_h + token.to(tl.int64) * key_n
            k1 = _piece(Key, token_places, exists, width, 0, D1)
            k2 = k1
            if D2 > 0:
                k2 = _piece(Key, token_places, exists, width, D1, D2)
            # The same of all rows, as a tensor: the interpreter's masks are no scalars.
            fits = length + C + 0 * row <= capacity
            token_fits = length + C + 0 * token <= capacity
            real = is_query | is_key
            seen = exists
            if Mask is not None:
                new_mask = Mask + wide_b * mask_b + length
                real = tl.load(new_mask + of_token, mask=real & fits, other=0) != 0
                seen = tl.load(new_mask + token, mask=seen & token_fits, other=0) != 0
            z = _exponents(
                x1, x2, k1, k2, factor, is_key, scale, softcap, width, shift, eps, D2, SOFTCAP, K_PRECISION, INTERPRET,
            )  # fmt: skip
            reach = tl.where(is_query, of_token, of_token - 1)
            visible = seen[None, :] & real[:, None] & (token[None, :] <= reach[:, None])
            z = tl.where(visible, z, float("-inf"))
            new_top = tl.where(is_query, tl.maximum(top, tl.max(z, axis=1)), 0.0)
            sink = tl.full([ROWS], float("-inf"), dtype=tl.float32)
            if Sinks is not None:
                sink = tl.load(Sinks + head * G + row // C, mask=is_query, other=0.0).to(tl.float32)
                sink = tl.where(is_query, sink * LOG2_E, float("-inf"))
                new_top = tl.where(is_query, tl.maximum(new_top, sink), 0.0)
            fade = tl.math.exp2(top - new_top)
            w = tl.math.exp2(z - new_top[:, None] + SHIFT)
            weight = weight * fade + tl.sum(w, axis=1) + tl.math.exp2(sink - new_top + SHIFT)
            strength = 1.0
            if Strength is not None:
                strength = tl.load(Strength + head).to(tl.float32)
            unit = 1.0
            if YScale is not None:
                unit = tl.load(YScale + b * heads + head)
            # From here on the rows of keys hold y, and all rows its own units.
            answered = -strength * UNSHIFT
            w = tl.where(is_key[:, None], w * answered, w)
            fade = tl.where(is_key, answered, fade) * unit
            own = is_key & real
            v = _piece(Value, value_places, own, value_width, 0, E1).to(tl.float32)
            acc1 = tl.where(real[:, None], acc1 * fade[:, None] + v, 0.0)
            if E2 > 0:
                v = _piece(Value, value_places, own, value_width, E1, E2).to(tl.float32)
                acc2 = tl.where(real[:, None], acc2 * fade[:, None] + v, 0.0)
            for solved in range(C):
                y_row = (row == QUERIES + solved)[:, None]
                column = tl.sum(tl.where((token == solved)[None, :], w, 0.0), axis=1)[:, None]
                acc1 += column * tl.sum(tl.where(y_row, acc1, 0.0), axis=0)[None, :]
                if E2 > 0:
                    acc2 += column * tl.sum(tl.where(y_row, acc2, 0.0), axis=0)[None, :]
            share_of = tl.where(weight > 0, 1.0 / weight, 0.0)
            share_of = tl.where(fits, tl.where(real, share_of, 0.0), float("nan"))[:, None]
            out = Out + (wide_b * heads + wide_head) * QUERIES * value_width
            out_places = row.to(tl.int64) * value_width
            _store(out, out_places, is_query, value_width, acc1 * share_of, 0, E1)
            if E2 > 0:
                _store(out, out_places, is_query, value_width, acc2 * share_of, E1, E2)
            added = is_key & fits
            y_places = _places(Table, wide_b, length + of_token, added, y_b, y_n, table_b, PAGE)
            _store(ys, y_places, added, value_width, acc1 / unit, 0, E1)
            if E2 > 0:
                _store(ys, y_places, added, value_width, acc2 / unit, E1, E2)
            added = exists & token_fits
            k_places = _places(Table, wide_b, length + token, added, cached_b, cached_n, table_b, PAGE)  # fmt: skip
            _store(keys, k_places, added, width, k1, 0, D1)
            if D2 > 0:
                _store(keys, k_places, added, width, k2, D1, D2)
        tile = stop
