"""The kernel of ``kernel.py`` in its form for Hopper: a warp that loads, two groups of warps that compute.

* The loading warp copies tiles of 64 cached rows by TMA into two rings of shared memory, as far ahead as they
  reach: reading at the memory's rate takes some 100 KiB on their way to each multiprocessor at all times.
* The two groups take the tiles in turn, whatever head they belong to. A tile's products have the cached rows on the tensor core's long side,
  ``K X^T`` and ``Y^T P``, so that the few rows of X are the short side and little is computed for nothing.
  The keys go through registers, where their norms are taken as well.
* At the end of a head's tiles group 0 adds what group 1 has, and finishes as ``kernel.py`` does.

Keys and Y in half precision, rows and strides of whole 16 bytes, pages of whole tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

SMALL, LARGE = 64, 128
_SHARED = 226 * 1024
SHIFT = gl.constexpr(10.0)
UNSHIFT = gl.constexpr(2.0**-10)
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _wait_for_kernels_before():
    """A kernel may be launched while the one before it ends; nothing global is touched before that has."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _let_next_kernel_begin():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, 0;",
        "=r",
        [],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _long(x):
    return gl.to_tensor(x).to(gl.int64)


@gluon.jit
def _clamped(length, capacity):
    """Lengths within the cache: a wrong one must not read beyond it; a negative one is as a full cache."""
    return gl.where(length < 0, capacity, gl.minimum(length, capacity)).to(gl.int32)


@gluon.jit
def _list(Lengths, batch, heads, capacity, EACH: gl.constexpr, TILE: gl.constexpr, BATCH: gl.constexpr, RAGGED: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """The list of tiles: each batch row's count and the counts' running sum; this program's part of the list.

    Where all rows are of one length, their count and that length. ``EACH``: programs for every head, or 0
    where the list is cut regardless of heads; with it, a head's tiles are followed by some that do not exist, up
    to as many for each program.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    program = gl.program_id(0)
    if RAGGED:
        index = gl.arange(0, BATCH, layout)
        lengths = _clamped(gl.load(Lengths + index, mask=index < batch, other=0), capacity)
        tiles = gl.where(index < batch, gl.maximum((lengths + TILE - 1) // TILE, 1), 0)
        cumulative = gl.associative_scan(tiles, 0, _add)
        total = gl.sum(tiles, axis=0) * heads
        share = (total + gl.num_programs(0) - 1) // gl.num_programs(0)
        end = gl.minimum((program + 1) * share, total)
    else:
        cumulative = _clamped(gl.load(Lengths), capacity)
        tiles = gl.maximum((cumulative + TILE - 1) // TILE, 1)
        if EACH:
            share = (tiles + EACH - 1) // EACH
            end = program // EACH * (EACH * share) + gl.minimum((program % EACH + 1) * share, tiles)
        else:
            total = tiles * batch * heads
            share = (total + gl.num_programs(0) - 1) // gl.num_programs(0)
            end = gl.minimum((program + 1) * share, total)
    return tiles, cumulative, share, program * share, end


@gluon.jit
def _whose(tile, tiles, cumulative, share, Lengths, heads, capacity, EACH: gl.constexpr, BATCH: gl.constexpr, RAGGED: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """See ``kernel._whose``."""
    if RAGGED:
        index = gl.arange(0, BATCH, gl.BlockedLayout([1], [32], [WARPS], [0]))
        b = gl.sum((cumulative * heads <= tile).to(gl.int32), axis=0)
        before = gl.sum(gl.where(index < b, tiles, 0), axis=0) * heads
        own = gl.sum(gl.where(index == b, tiles, 0), axis=0)
        length = _clamped(gl.load(Lengths + b), capacity)
        exist = own
    else:
        own = share * EACH if EACH else tiles
        b = tile // (own * heads)
        before = b * own * heads
        length = cumulative
        exist = tiles
    head = (tile - before) // own
    first = before + head * own
    return b, head, length, first, first + exist


@gluon.jit
def _load(
    KeyTiles, YTiles, Table, Lengths, key_ring, y_ring, key_full, key_empty, y_full, y_empty,
    table_b, batch, heads, capacity,
    EACH: gl.constexpr, TILE: gl.constexpr, BATCH: gl.constexpr, RAGGED: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp."""
    tiles, cumulative, share, tile, end = _list(
        Lengths, batch, heads, capacity, EACH, TILE, BATCH, RAGGED, 1
    )
    count = 0
    while tile < end:
        b, head, length, first, beyond = _whose(
            tile, tiles, cumulative, share, Lengths, heads, capacity, EACH, BATCH, RAGGED, 1
        )
        stop = gl.minimum(beyond, end)
        for i in range(tile - first, stop - first):
            slot = count % STAGES
            turn = ((count // STAGES) & 1) ^ 1
            count += 1
            row = i * TILE
            where = b
            if PAGE:
                # An empty sequence has a tile, of which nothing is used, and perhaps no page.
                where = gl.load(
                    Table + _long(b) * table_b + row // PAGE, mask=row < length, other=0
                )
                row = row % PAGE
            mbarrier.wait(key_empty.index(slot), turn)
            mbarrier.expect(key_full.index(slot), KeyTiles.block_type.nbytes)
            tma.async_copy_global_to_shared(
                KeyTiles, [where, head, row, 0], key_full.index(slot), key_ring.index(slot)
            )
            mbarrier.wait(y_empty.index(slot), turn)
            mbarrier.expect(y_full.index(slot), YTiles.block_type.nbytes)
            tma.async_copy_global_to_shared(
                YTiles, [where, head, row, 0], y_full.index(slot), y_ring.index(slot)
            )
        tile = stop


@gluon.jit
def _rows_of(
    Query, Key, query_b, query_h, query_n, key_b, key_h, key_n, b, head, width,
    G: gl.constexpr, C: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """X: the queries' rows, then the new keys'."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    is_query = row < G * C
    is_key = (row >= G * C) & (row < G * C + C)
    queries = b * query_b + (head * G + row // C) * query_h + row % C * _long(query_n)
    keys = b * key_b + head * key_h + (row - G * C) * _long(key_n)
    inside = (column < width)[None, :]
    x = gl.load(
        Query + queries[:, None] + column[None, :], mask=is_query[:, None] & inside, other=0.0
    )
    k = gl.load(Key + keys[:, None] + column[None, :], mask=is_key[:, None] & inside, other=0.0)
    return gl.where(is_key[:, None], k, x)


@gluon.jit
def _compute(
    Query, Key, Value, KeyCache, YCache, YScale, Lengths, Mask, Table, Strength, Sinks, Out, Parts, Arrivals,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
    cached_b, cached_h, cached_n, y_b, y_h, y_n, mask_b, table_b,
    batch, heads, capacity, width, value_width, scale, kernel_scale, softcap, eps,
    key_ring, y_ring, x_smem, p_smem, given_acc, given, among, key_full, key_empty, y_full, y_empty, is_given, is_taken, is_among,
    GROUP: gl.constexpr, G: gl.constexpr, C: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, E: gl.constexpr,
    EACH: gl.constexpr, TILE: gl.constexpr, BATCH: gl.constexpr, PAGE: gl.constexpr, RAGGED: gl.constexpr, SOFTCAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: every second tile."""
    QUERIES: gl.constexpr = G * C
    USED: gl.constexpr = QUERIES + C
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, product, 2)
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    plain_y: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E, E // 8], [4, 1], [1, 0])
    across: gl.constexpr = gl.SliceLayout(0, product)
    own_x = x_smem.index(GROUP)
    own_p = p_smem.index(GROUP)
    is_query = gl.arange(0, ROWS, across) < QUERIES
    is_key = (gl.arange(0, ROWS, across) >= QUERIES) & (gl.arange(0, ROWS, across) < USED)
    local = gl.arange(0, TILE, gl.SliceLayout(1, product))
    shift = gl.where(is_key, kernel_scale * LOG2_E * width, 0.0)

    tiles, cumulative, share, tile, end = _list(
        Lengths, batch, heads, capacity, EACH, TILE, BATCH, RAGGED, 4
    )
    count = 0
    heads_done = 0
    while tile < end:
        b, head, length, first, beyond = _whose(
            tile, tiles, cumulative, share, Lengths, heads, capacity, EACH, BATCH, RAGGED, 4
        )
        stop = gl.minimum(beyond, end)
        wide_b = _long(b)
        wide_head = _long(head)
        x = _rows_of(
            Query, Key, query_b, query_h, query_n, key_b, key_h, key_n, wide_b, wide_head, width,
            G, C, ROWS, D, plain,
        )  # fmt: skip
        x32 = x.to(gl.float32)
        x_row = gl.arange(0, ROWS, gl.SliceLayout(1, plain))
        own_rms = gl.rsqrt(gl.sum(x32 * x32, axis=1) / width + eps)
        x_is_key = (x_row >= QUERIES) & (x_row < USED)
        x_factor = gl.where(x_is_key, kernel_scale * own_rms, scale) * LOG2_E
        factor = gl.convert_layout(x_factor, across)
        gl.thread_barrier()
        own_x.store(x)
        fence_async_shared()
        gl.thread_barrier()

        top = gl.where(is_query, -1e30, 0.0)
        weights = gl.zeros([TILE, ROWS], gl.float32, product)
        acc = gl.zeros([E, ROWS], gl.float32, product)
        nothing = gl.zeros([TILE, ROWS], gl.float32, product)
        # By the count of all tiles so far: a place in the rings stays with one group.
        for i in range(tile - first + ((count & 1) ^ GROUP), stop - first, 2):
            at = count + i - (tile - first)
            slot = at % STAGES
            turn = (at // STAGES) & 1
            rows = i * TILE + local
            seen = rows < length
            if Mask is not None:
                seen = seen & (gl.load(Mask + wide_b * mask_b + rows, mask=seen, other=0) != 0)
            mbarrier.wait(key_full.index(slot), turn)
            k = key_ring.index(slot).reshape([TILE, D]).load(left)
            s = warpgroup_mma(k, own_x.permute((1, 0)), nothing, use_acc=False, is_async=True)
            k32 = k.to(gl.float32)
            squares = gl.convert_layout(gl.sum(k32 * k32, axis=1), gl.SliceLayout(1, product))
            inverse_rms = gl.rsqrt(squares / width + eps)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(key_empty.index(slot), count=1)
            if SOFTCAP:
                grown = gl.exp2(s * (2.0 * LOG2_E * scale / softcap))
                capped = softcap * LOG2_E * (1.0 - 2.0 / (grown + 1.0))
                z = gl.where(
                    is_key[None, :],
                    s * factor[None, :] * inverse_rms[:, None] - shift[None, :],
                    capped,
                )
            else:
                z = s * factor[None, :] * gl.where(is_key[None, :], inverse_rms[:, None], 1.0) - shift[None, :]  # fmt: skip
            z = gl.where(seen[:, None], z, float("-inf"))
            new_top = gl.where(is_query, gl.maximum(top, gl.max(z, axis=0)), 0.0)
            p = gl.exp2(z - (new_top - SHIFT)[None, :])
            fade = gl.exp2(top - new_top)
            top = new_top
            weights = weights * fade[None, :] + p
            acc = acc * fade[None, :]
            own_p.store(p.to(own_p.dtype))
            mbarrier.wait(y_full.index(slot), turn)
            y_tile = y_ring.index(slot).reshape([TILE, E])
            if (i + 1) * TILE > length:
                # What was never written, or rolled back, may be NaN, and 0 * NaN is NaN.
                unused = i * TILE + gl.arange(0, TILE, gl.SliceLayout(1, plain_y)) >= length
                y = y_tile.load(plain_y)
                gl.thread_barrier()
                y_tile.store(gl.where(unused[:, None], 0.0, y).to(y_tile.dtype))
            fence_async_shared()
            gl.thread_barrier()
            acc = warpgroup_mma(y_tile.permute((1, 0)), own_p, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(y_empty.index(slot), count=1)
        count += stop - tile
        weight = gl.sum(weights, axis=0)

        if GROUP == 1:
            mbarrier.wait(is_taken, (heads_done & 1) ^ 1)
            given_acc.permute((1, 0)).store(acc)
            given.index(0).store(top)
            given.index(1).store(weight)
            gl.thread_barrier()
            mbarrier.arrive(is_given, count=1)
            # The new tokens among themselves, while group 0 adds up.
            x32 = own_x.load(plain).to(gl.float32)
            for token in range(C):
                column = gl.arange(0, D, gl.SliceLayout(0, plain))
                new_key = Key + wide_b * key_b + wide_head * key_h + token * _long(key_n)
                k = gl.load(new_key + column, mask=column < width, other=0.0).to(gl.float32)
                rms = gl.rsqrt(gl.sum(k * k, axis=0) / width + eps)
                s = gl.sum(x32 * k[None, :], axis=1)
                z = s * x_factor
                if SOFTCAP:
                    grown = gl.exp2(s * (2.0 * LOG2_E * scale / softcap))
                    z = gl.where(x_is_key, z, softcap * LOG2_E * (1.0 - 2.0 / (grown + 1.0)))
                z = gl.where(x_is_key, z * rms - kernel_scale * LOG2_E * width, z)
                among.index(token).store(z)
            gl.thread_barrier()
            mbarrier.arrive(is_among, count=1)
        else:
            mbarrier.wait(is_given, heads_done & 1)
            their_top = given.index(0).load(across)
            new_top = gl.maximum(top, their_top)
            fade = gl.exp2(top - new_top)
            their_fade = gl.exp2(their_top - new_top)
            weight = weight * fade + given.index(1).load(across) * their_fade
            their_acc = given_acc.permute((1, 0)).load(product)
            acc = acc * fade[None, :] + their_acc * their_fade[None, :]
            gl.thread_barrier()
            given_acc.permute((1, 0)).store(acc)
            given.index(0).store(new_top)
            given.index(1).store(weight)
            gl.thread_barrier()
            _finish(
                Key, Value, KeyCache, YCache, YScale, Mask, Table, Strength, Sinks, Out, Parts, Arrivals,
                key_b, key_h, key_n, value_b, value_h, value_n,
                cached_b, cached_h, cached_n, y_b, y_h, y_n, mask_b, table_b,
                heads, capacity, width, value_width, given_acc, given, among, is_among, heads_done,
                batch * heads, b, head, length, first // share, (beyond - 1) // share, G, C, D, E, PAGE,
            )  # fmt: skip
            gl.thread_barrier()
            mbarrier.arrive(is_taken, count=1)
        heads_done += 1
        tile = stop


@gluon.jit
def _add_parts(
    Parts, all_weights, all_sums, earliest, begin, end, step, value_width,
    QUERIES: gl.constexpr, USED: gl.constexpr, E: gl.constexpr, AT_ONCE: gl.constexpr, stack: gl.constexpr,
):  # fmt: skip
    """Tops, weights and sums of the parts ``begin, begin + step .. end``, in this order."""
    R: gl.constexpr = _power(USED)
    lines: gl.constexpr = gl.SliceLayout(0, stack)
    down: gl.constexpr = gl.SliceLayout(1, lines)
    pairs: gl.constexpr = gl.SliceLayout(2, stack)
    row = gl.arange(0, R, gl.SliceLayout(0, pairs))
    entry = gl.arange(0, E, gl.SliceLayout(0, gl.SliceLayout(1, stack)))
    is_query = row < QUERIES
    top = gl.where(is_query, -1e30, 0.0)
    weight = gl.zeros([R], gl.float32, gl.SliceLayout(0, pairs))
    acc = gl.zeros([R, E], gl.float32, lines)
    for start in range(begin, end + 1, step * AT_ONCE):
        part = start + step * gl.arange(0, AT_ONCE, gl.SliceLayout(1, pairs))
        places = (2 * part + (part == earliest).to(gl.int32))[:, None] * USED + row[None, :]
        live = (part <= end)[:, None] & (row < USED)[None, :]
        tops = gl.load(Parts + places, mask=live, other=-1e30)
        weights = gl.load(all_weights + places, mask=live, other=0.0)
        sums = gl.load(
            all_sums + gl.expand_dims(places.to(gl.int64) * value_width, 2) + entry[None, None, :],
            mask=gl.expand_dims(live, 2) & (entry < value_width)[None, None, :], other=0.0,
        )  # fmt: skip
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


@gluon.constexpr_function
def _power(n):
    return 1 << max(0, n - 1).bit_length()


@gluon.jit
def _finish(
    Key, Value, KeyCache, YCache, YScale, Mask, Table, Strength, Sinks, Out, Parts, Arrivals,
    key_b, key_h, key_n, value_b, value_h, value_n,
    cached_b, cached_h, cached_n, y_b, y_h, y_n, mask_b, table_b,
    heads, capacity, width, value_width, sums, tops, among, is_among, heads_done,
    all_heads, b, head, length, earliest, latest,
    G: gl.constexpr, C: gl.constexpr, D: gl.constexpr, E: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Group 0 after a head's tiles: the other programs' sums, the new tokens among themselves, the results."""
    QUERIES: gl.constexpr = G * C
    USED: gl.constexpr = QUERIES + C
    R: gl.constexpr = _power(USED)
    # Parts that are read at once: 64 registers.
    AT_ONCE: gl.constexpr = max(1, min(16, 8192 // (R * E)))
    THREADS: gl.constexpr = min(E, 128) // 4
    stack: gl.constexpr = gl.BlockedLayout(
        [AT_ONCE, 1, 4], [1, 32 // THREADS, THREADS], [1, 4, 1], [2, 1, 0]
    )
    lines: gl.constexpr = gl.SliceLayout(0, stack)
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, lines)
    row = gl.arange(0, R, down)
    entry = gl.arange(0, E, gl.SliceLayout(0, lines))
    inside = (entry < value_width)[None, :]
    used = row < USED
    is_query = row < QUERIES
    is_key = (row >= QUERIES) & used
    wide_b = _long(b)
    wide_head = _long(head)
    acc = sums.slice(0, R, dim=0).load(lines)
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
    values = wide_b * value_b + wide_head * value_h + of_token * _long(value_n)
    v = gl.load(Value + values[:, None] + entry[None, :], mask=own[:, None] & inside, other=0.0)

    complete = earliest == latest
    if not complete:
        # A program shares at most two heads: one that began before it, one that ends after it.
        programs = gl.num_programs(0)
        program = gl.program_id(0)
        all_weights = Parts + 2 * programs * USED
        all_sums = all_weights + 2 * programs * USED
        # Many parts are added up in two steps: neighbours first, each few of them by their last.
        fan = latest - earliest + 1
        root = (gl.sqrt(fan.to(gl.float32)) + 0.999).to(gl.int32)
        fan = gl.where(fan > 3 * AT_ONCE, gl.maximum(root, AT_ONCE), fan)
        leader = program - (program - earliest) % fan
        begin = leader
        end = gl.minimum(leader + fan - 1, latest)
        step = fan * 0 + 1
        counter = Arrivals + all_heads + 2 * leader + (leader == earliest).to(gl.int32)
        place = program
        waiting = step > 0
        while waiting:
            slot = 2 * place + (place == earliest).to(gl.int32)
            gl.store(Parts + slot * USED + row, top, mask=used)
            gl.store(all_weights + slot * USED + row, weight, mask=used)
            mine = all_sums + _long(slot) * (USED * value_width)
            gl.store(
                mine + row[:, None] * value_width + entry[None, :], acc, mask=used[:, None] & inside
            )
            gl.thread_barrier()
            waiting = gl.atomic_add(counter, 1, sem="acq_rel") == (end - begin) // step
            if waiting:
                gl.atomic_xchg(counter, 0, sem="relaxed")
                gl.thread_barrier()
                top, weight, acc = _add_parts(
                    Parts, all_weights, all_sums, earliest, begin, end, step, value_width, QUERIES, USED, E, AT_ONCE, stack
                )  # fmt: skip
                gl.thread_barrier()  # before the first of these parts is overwritten
                complete = (begin == earliest) & (end == latest)
                waiting = not complete
                begin = earliest
                end = latest
                step = fan
                counter = Arrivals + b * heads + head
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
        outs = Out + (wide_b * heads + wide_head) * (QUERIES * value_width)
        gl.store(
            outs + row[:, None] * value_width + entry[None, :],
            (acc * part_of[:, None]).to(Out.dtype.element_ty), mask=is_query[:, None] & inside,
        )  # fmt: skip
        added = is_key & row_fits
        places = wide_head * y_h + _places(Table, b, length + of_token, added, y_b, y_n, table_b, PAGE)  # fmt: skip
        gl.store(
            YCache + places[:, None] + entry[None, :], (acc / unit).to(YCache.dtype.element_ty),
            mask=added[:, None] & inside,
        )  # fmt: skip
        token_row = gl.arange(0, 16, gl.SliceLayout(1, plain))
        column = gl.arange(0, D, gl.SliceLayout(0, plain))
        added = (token_row < C) & (token_row * 0 + length + C <= capacity)
        places = wide_head * cached_h + _places(Table, b, length + token_row, added, cached_b, cached_n, table_b, PAGE)  # fmt: skip
        added = added[:, None] & (column < width)[None, :]
        new_keys = wide_b * key_b + wide_head * key_h + token_row * _long(key_n)
        k = gl.load(Key + new_keys[:, None] + column[None, :], mask=added, other=0.0)
        gl.store(KeyCache + places[:, None] + column[None, :], k, mask=added)


@gluon.jit
def _places(Table, b, rows, live, batch_stride, row_stride, table_stride, PAGE: gl.constexpr):
    """See ``kernel._places``."""
    if PAGE:
        page = gl.load(Table + _long(b) * table_stride + rows // PAGE, mask=live, other=0)
        return page.to(gl.int64) * batch_stride + (rows % PAGE) * _long(row_stride)
    return _long(b) * batch_stride + rows * _long(row_stride)


@gluon.jit(do_not_specialize=["batch", "heads", "capacity"])
def hopper_decode_kernel(
    KeyTiles, YTiles,
    Query, Key, Value, KeyCache, YCache, YScale, Lengths, Mask, Table, Strength, Sinks, Out, Parts, Arrivals,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
    cached_b, cached_h, cached_n, y_b, y_h, y_n, mask_b, table_b,
    batch, heads, capacity, width, value_width, scale, kernel_scale, softcap, eps,
    G: gl.constexpr, C: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, E: gl.constexpr,
    EACH: gl.constexpr, TILE: gl.constexpr, BATCH: gl.constexpr, PAGE: gl.constexpr, RAGGED: gl.constexpr, SOFTCAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: ``programs``, best one for each multiprocessor."""
    # A place in the rings belongs to one group, every second one to each: a barrier's parity cannot tell a phase from
    # the one after next, and a group that waited for a place that the other uses could take one for the other.
    gl.static_assert(STAGES % 2 == 0 and STAGES >= 2)
    key_ring = gl.allocate_shared_memory(KeyTiles.dtype, [STAGES, 1, 1, TILE, D], KeyTiles.layout)
    y_ring = gl.allocate_shared_memory(YTiles.dtype, [STAGES, 1, 1, TILE, E], YTiles.layout)
    x_smem = gl.allocate_shared_memory(
        KeyTiles.dtype, [2, ROWS, D], gl.NVMMASharedLayout(128, 16, 2)
    )
    p_smem = gl.allocate_shared_memory(
        YTiles.dtype, [2, TILE, ROWS], gl.NVMMASharedLayout(2 * ROWS, 16, 2)
    )
    given_acc = gl.allocate_shared_memory(
        gl.float32, [ROWS, E], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    among = gl.allocate_shared_memory(gl.float32, [16, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    given = gl.allocate_shared_memory(gl.float32, [2, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    one: gl.constexpr = mbarrier.MBarrierLayout()
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    y_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    y_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    is_given = gl.allocate_shared_memory(gl.int64, [1], one)
    is_taken = gl.allocate_shared_memory(gl.int64, [1], one)
    is_among = gl.allocate_shared_memory(gl.int64, [1], one)
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_full.index(stage), count=1)
        mbarrier.init(key_empty.index(stage), count=1)
        mbarrier.init(y_full.index(stage), count=1)
        mbarrier.init(y_empty.index(stage), count=1)
    mbarrier.init(is_given, count=1)
    mbarrier.init(is_taken, count=1)
    mbarrier.init(is_among, count=1)
    fence_async_shared()
    gl.thread_barrier()
    _wait_for_kernels_before()
    _let_next_kernel_begin()
    gl.warp_specialize(
        [
            (_compute, (
                Query, Key, Value, KeyCache, YCache, YScale, Lengths, Mask, Table, Strength, Sinks, Out, Parts, Arrivals,
                query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
                cached_b, cached_h, cached_n, y_b, y_h, y_n, mask_b, table_b,
                batch, heads, capacity, width, value_width, scale, kernel_scale, softcap, eps,
                key_ring, y_ring, x_smem, p_smem, given_acc, given, among, key_full, key_empty, y_full, y_empty, is_given, is_taken, is_among,
                0, G, C, ROWS, D, E, EACH, TILE, BATCH, PAGE, RAGGED, SOFTCAP, STAGES,
            )),
            (_compute, (
                Query, Key, Value, KeyCache, YCache, YScale, Lengths, Mask, Table, Strength, Sinks, Out, Parts, Arrivals,
                query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
                cached_b, cached_h, cached_n, y_b, y_h, y_n, mask_b, table_b,
                batch, heads, capacity, width, value_width, scale, kernel_scale, softcap, eps,
                key_ring, y_ring, x_smem, p_smem, given_acc, given, among, key_full, key_empty, y_full, y_empty, is_given, is_taken, is_among,
                1, G, C, ROWS, D, E, EACH, TILE, BATCH, PAGE, RAGGED, SOFTCAP, STAGES,
            )),
            (_load, (
                KeyTiles, YTiles, Table, Lengths, key_ring, y_ring, key_full, key_empty, y_full, y_empty,
                table_b, batch, heads, capacity, EACH, TILE, BATCH, RAGGED, PAGE, STAGES,
            )),
        ],
        [4, 1],
        [240, 40],
    )  # fmt: skip


def tile_descriptor(cache: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A cache as tiles that TMA copies, what is beyond its width as 0."""
    layout = gl.NVMMASharedLayout(128, 16, 4)
    return TensorDescriptor(
        cache, list(cache.shape), list(cache.stride()), [1, 1, rows, columns], layout
    )


def programs_for(
    multiprocessors: int, chains: int, most_tiles: int, ragged: bool
) -> tuple[int, int]:
    """How many programs, and how many of them for each head; 0 if the list of tiles is cut regardless of heads.

    Two thirds of the multiprocessors are enough to read at the memory's rate, and a program that goes from one
    head to the next pays for it.
    """
    each = multiprocessors // max(1, chains)
    if ragged or each == 0 or 10 * chains * each < 7 * multiprocessors:
        return min(multiprocessors, chains * most_tiles), 0
    each = min(each, most_tiles)
    return chains * each, each


def columns_of(width: int) -> int:
    return 64 if width <= 64 else 128 if width <= 128 else 256


def tile_for(rows: int, d: int, e: int, page: int) -> tuple[int, int]:
    """Rows of a tile and stages of the rings; 0 stages if they do not fit into shared memory."""
    tile = LARGE if d + e <= 128 and page % LARGE == 0 else SMALL
    fixed = 2 * rows * d * 2 + 2 * tile * rows * 2 + rows * (e + 18) * 4 + 2048
    stages = min(8, (_SHARED - fixed) // (tile * (d + e) * 2))
    return tile, stages // 2 * 2


def serves(key_cache: Tensor, y_cache: Tensor, rows: int, page: int) -> bool:
    """Whether TMA can copy these caches' tiles, and shared memory hold two of each beside ``rows`` of X."""
    for cache in (key_cache, y_cache):
        if cache.dtype not in (torch.float16, torch.bfloat16) or cache.data_ptr() % 16:
            return False
        if cache.stride(-1) != 1 or any(stride % 8 for stride in cache.stride()[:-1]):
            return False
        if cache.numel() == 0:
            return False
    if page % SMALL:
        return False
    return (
        tile_for(rows, columns_of(key_cache.shape[-1]), columns_of(y_cache.shape[-1]), page)[1] > 0
    )
