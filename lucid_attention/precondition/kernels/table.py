"""Where the blocks of a packed batch are, found on the device."""

import triton
import triton.language as tl


@triton.jit
def _bounds(Offsets, index, inside, total):
    """First row and one past the last of sequences; wrong offsets give wrong rows, but none out of range."""
    start = tl.load(Offsets + index, mask=inside, other=0)
    stop = tl.load(Offsets + index + 1, mask=inside, other=0)
    start = tl.minimum(tl.maximum(start, 0), total)
    stop = tl.minimum(tl.maximum(stop, 0), total)
    return start, tl.maximum(stop - start, 0)


@triton.jit(do_not_specialize=["sequences", "total", "blocks"])
def table_kernel(Offsets, Blocks, sequences, total, blocks, R: tl.constexpr, CHUNK: tl.constexpr):
    """``Blocks`` (4, blocks): first row, number of rows, first and one past the last block of the sequence.

    Grid: a program for each sequence, and one for the blocks that are left over (they have no rows).
    """
    sequence = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    first = 0
    for before in range(0, sequence, CHUNK):
        index = before + lane
        _, count = _bounds(Offsets, index, index < sequence, total)
        first += tl.sum(tl.where(index < sequence, (count + R - 1) // R, 0))
    last = blocks
    start = 0
    count = 0
    if sequence < sequences:
        start, count = _bounds(Offsets, sequence, True, total)
        last = tl.minimum(first + (count + R - 1) // R, blocks)
    for low in range(first, last, CHUNK):
        index = low + lane
        inside = index < last
        local = (index - first) * R
        rows = tl.minimum(tl.maximum(count - local, 0), R)
        tl.store(Blocks + index, start + local, mask=inside)
        tl.store(Blocks + blocks + index, rows, mask=inside)
        tl.store(
            Blocks + 2 * blocks + index, tl.where(count > 0, first, 0) + 0 * index, mask=inside
        )
        tl.store(Blocks + 3 * blocks + index, last + 0 * index, mask=inside)
