"""The list of tiles, and where rows are: what all warps of Hopper's decode kernel agree on."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

SHIFT = gl.constexpr(10.0)
UNSHIFT = gl.constexpr(2.0**-10)
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def as_long(x):
    return gl.to_tensor(x).to(gl.int64)


@gluon.jit
def _clamped(length, capacity):
    """Lengths within the cache: a wrong one must not read beyond it; a negative one is as a full cache."""
    return gl.where(length < 0, capacity, gl.minimum(length, capacity)).to(gl.int32)


@gluon.jit
def list_of_tiles(Lengths, batch, heads, capacity, EACH: gl.constexpr, TILE: gl.constexpr, BATCH: gl.constexpr, RAGGED: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
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
def whose_tile(tile, tiles, cumulative, share, Lengths, heads, capacity, EACH: gl.constexpr, BATCH: gl.constexpr, RAGGED: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
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
def places_of(Table, b, rows, live, batch_stride, row_stride, table_stride, PAGE: gl.constexpr):
    """See ``kernel._places``."""
    if PAGE:
        page = gl.load(Table + as_long(b) * table_stride + rows // PAGE, mask=live, other=0)
        return page.to(gl.int64) * batch_stride + (rows % PAGE) * as_long(row_stride)
    return as_long(b) * batch_stride + rows * as_long(row_stride)
