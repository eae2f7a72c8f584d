"""The kernel of ``kernel.py`` in its form for Hopper: a warp that loads, two groups of warps that compute.

* The loading warp copies tiles of 64 cached rows by TMA into two rings of shared memory, 128 KiB ahead:
  reading at the memory's rate takes some 64 KiB on their way to each multiprocessor, and far more slows it.
* The two groups take the tiles in turn, whatever head they belong to. A tile's products have the cached rows on the tensor core's long side,
  ``K X^T`` and ``Y^T P``, so that the few rows of X are the short side and little is computed for nothing.
  The keys go through registers, where their norms are taken as well.
* At the end of a head's tiles group 0 adds what group 1 has, and both finish as ``kernel.py`` does, each one half
  of the value's columns.

Keys and Y in half precision, rows and strides of whole 16 bytes, pages of whole tiles.
"""

from __future__ import annotations

import math

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

from .hopper_finish import finish_head, parts_at_once
from .hopper_list import LOG2_E, SHIFT, as_long, list_of_tiles, whose_tile

SMALL, LARGE = 64, 128
_SHARED = 226 * 1024
_RINGS = 128 * 1024
"""All that shared memory holds, 192 KiB, was 3 % slower for large caches: more on its way only waits for each other."""

_EACH_READS = 55.0
"""GB/s of memory for each program, up to which half as many lose little: an H100's 64 have 52, an H200's 77,
of which they read 43 (head size 64) to 53 (128)."""


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
def _load(
    KeyTiles, YTiles, Table, Lengths, key_ring, y_ring, key_full, key_empty, y_full, y_empty,
    table_b, batch, heads, capacity,
    EACH: gl.constexpr, TILE: gl.constexpr, BATCH: gl.constexpr, RAGGED: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp."""
    tiles, cumulative, share, tile, end = list_of_tiles(
        Lengths, batch, heads, capacity, EACH, TILE, BATCH, RAGGED, 1
    )
    count = 0
    while tile < end:
        b, head, length, first, beyond = whose_tile(
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
                    Table + as_long(b) * table_b + row // PAGE, mask=row < length, other=0
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
    queries = b * query_b + (head * G + row // C) * query_h + row % C * as_long(query_n)
    keys = b * key_b + head * key_h + (row - G * C) * as_long(key_n)
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
    key_ring, y_ring, x_smem, p_smem, given_acc, given, among, key_full, key_empty, y_full, y_empty, is_given, is_summed, is_taken, is_among,
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

    tiles, cumulative, share, tile, end = list_of_tiles(
        Lengths, batch, heads, capacity, EACH, TILE, BATCH, RAGGED, 4
    )
    count = 0
    heads_done = 0
    while tile < end:
        b, head, length, first, beyond = whose_tile(
            tile, tiles, cumulative, share, Lengths, heads, capacity, EACH, BATCH, RAGGED, 4
        )
        stop = gl.minimum(beyond, end)
        wide_b = as_long(b)
        wide_head = as_long(head)
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
        begin = tile - first + ((count & 1) ^ GROUP)
        if Mask is not None:
            # One turn ahead: its way from memory would be on the critical path of every tile.
            kept = _kept_rows(Mask + wide_b * mask_b, begin * TILE + local, length)
        for i in range(begin, stop - first, 2):
            at = count + i - (tile - first)
            slot = at % STAGES
            turn = (at // STAGES) & 1
            rows = i * TILE + local
            seen = rows < length
            if Mask is not None:
                seen = seen & (kept != 0)
                kept = _kept_rows(Mask + wide_b * mask_b, rows + 2 * TILE, length)
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
                new_key = Key + wide_b * key_b + wide_head * key_h + token * as_long(key_n)
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
            mbarrier.wait(is_summed, heads_done & 1)
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
            mbarrier.arrive(is_summed, count=1)
        finish_head(
            Key, Value, KeyCache, YCache, YScale, Mask, Table, Strength, Sinks, Out, Parts, Arrivals,
            key_b, key_h, key_n, value_b, value_h, value_n,
            cached_b, cached_h, cached_n, y_b, y_h, y_n, mask_b, table_b,
            heads, capacity, width, value_width, given_acc, given, among, is_among, heads_done,
            batch * heads, b, head, length, first // share, (beyond - 1) // share, GROUP, G, C, D, E, PAGE,
        )  # fmt: skip
        gl.thread_barrier()
        if GROUP == 0:
            mbarrier.arrive(is_taken, count=1)
        heads_done += 1
        tile = stop


@gluon.jit
def _kept_rows(mask, rows, length):
    """What the key mask says of rows; 0 beyond the length."""
    return gl.load(mask + rows, mask=rows < length, other=0)


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
    is_summed = gl.allocate_shared_memory(gl.int64, [1], one)
    is_taken = gl.allocate_shared_memory(gl.int64, [1], one)
    is_among = gl.allocate_shared_memory(gl.int64, [1], one)
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_full.index(stage), count=1)
        mbarrier.init(key_empty.index(stage), count=1)
        mbarrier.init(y_full.index(stage), count=1)
        mbarrier.init(y_empty.index(stage), count=1)
    mbarrier.init(is_given, count=1)
    mbarrier.init(is_summed, count=1)
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
                key_ring, y_ring, x_smem, p_smem, given_acc, given, among, key_full, key_empty, y_full, y_empty, is_given, is_summed, is_taken, is_among,
                0, G, C, ROWS, D, E, EACH, TILE, BATCH, PAGE, RAGGED, SOFTCAP, STAGES,
            )),
            (_compute, (
                Query, Key, Value, KeyCache, YCache, YScale, Lengths, Mask, Table, Strength, Sinks, Out, Parts, Arrivals,
                query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
                cached_b, cached_h, cached_n, y_b, y_h, y_n, mask_b, table_b,
                batch, heads, capacity, width, value_width, scale, kernel_scale, softcap, eps,
                key_ring, y_ring, x_smem, p_smem, given_acc, given, among, key_full, key_empty, y_full, y_empty, is_given, is_summed, is_taken, is_among,
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
    multiprocessors: int, gb_per_s: float, chains: int, most_tiles: int, ragged: bool, used: int, e: int
) -> tuple[int, int]:  # fmt: skip
    """How many programs, and how many of them for each head; 0 if the list of tiles is cut regardless of heads.

    Two thirds of an H100's multiprocessors are enough to read at its memory's rate, and a program that goes from one
    head to the next pays for it. Multiprocessors come in pairs that share their way to the memory: either each has a program
    or one of each pair, for between the two those that are alone are done early. Half of them, 64 of 132 (their clusters
    are then filled alike), are taken where parts of ``used`` rows and ``e`` columns are then added up in fewer rounds, and
    where half of them can read at the memory's rate (``gb_per_s``).
    """
    each = multiprocessors // max(1, chains)
    if ragged or each == 0 or 10 * chains * each < 7 * multiprocessors:
        return min(multiprocessors, chains * most_tiles), 0
    each, half = min(each, most_tiles), min(multiprocessors // 16 * 8 // chains, most_tiles)
    worth = half > 1 and gb_per_s <= _EACH_READS * half * chains
    if worth and rounds_of(half, used, e) < rounds_of(each, used, e):
        each = half
    return chains * each, each


def rounds_of(parts: int, used: int, e: int) -> int:
    """How often a program waits for parts to be read, as `hopper_finish.finish_head` adds them up."""
    if parts == 1:
        return 0
    at_once = parts_at_once(used, e)
    if parts <= 3 * at_once:
        return math.ceil(parts / at_once)
    fan = max(math.isqrt(parts - 1) + 1, at_once)
    return math.ceil(fan / at_once) + math.ceil(math.ceil(parts / fan) / at_once)


def columns_of(width: int) -> int:
    return 64 if width <= 64 else 128 if width <= 128 else 256


def tile_for(rows: int, d: int, e: int, page: int) -> tuple[int, int]:
    """Rows of a tile and stages of the rings; 0 stages if they do not fit into shared memory."""
    tile = LARGE if d + e <= 128 and page % LARGE == 0 else SMALL
    fixed = 2 * rows * d * 2 + 2 * tile * rows * 2 + rows * (e + 18) * 4 + 2048
    stages = min(_RINGS, _SHARED - fixed) // (tile * (d + e) * 2)
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
