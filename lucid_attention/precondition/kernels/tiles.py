"""Device functions that the kernels share: two-piece rows, powers of two, waiting for a block.

A head size is held as two pieces, each a power of two of at least 16 (68 is 64 + 16), because a
tile's sides are powers of two: one padded piece of 128 would double the work (Hopper's kernels do that, and are faster still). ``D2 = 0`` means that
there is no second piece; its tiles are then stand-ins that nothing reads.

Tiles: R rows of a block, M columns (rows of another block), D head size, E value size.
"""

import triton
import triton.language as tl

LANE = 16
"""Side of the smallest tile that a tensor core takes."""


@triton.jit
def place_rows(Blocks, block, blocks, length, index, R: tl.constexpr, PACKED: tl.constexpr):
    """Rows ``index`` of a block: where they are, which of them exist; and about the block's sequence.

    Returns: rows, whether each exists, how many do in the block (packed), the sequence's first block. See
    ``table.py``.
    """
    if PACKED:
        rows = tl.load(Blocks + block) + index
        count = tl.load(Blocks + blocks + block)
        inside = index < count
        first = tl.load(Blocks + 2 * blocks + block)
    else:
        rows = block * R + index
        count = R + 0 * block
        inside = rows < length
        first = 0 * block
    return rows, inside, count, first


@triton.jit
def place_ticket(ticket, chains, blocks, wide, deep):
    """A ticket's chain and its row of blocks, from the end that is solved first; see ``plan.rounds``."""
    low = 0 * ticket
    high = low + deep
    group = low + wide
    while ticket >= high * chains:
        low = high
        high = 2 * high
        group = tl.maximum(group // 2, 1)
    rows = tl.minimum(high, blocks) - low
    rest = ticket - low * chains
    first = rest // (group * rows) * group
    rest -= first * rows
    members = tl.minimum(group, chains - first)
    return first + rest % members, low + rest // members


@triton.jit
def load_row_tile(base, rows, stride, valid, width, OFFSET: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a user's tensor, columns ``OFFSET : OFFSET + WIDTH``, 0 where not valid: (R, WIDTH)."""
    columns = OFFSET + tl.arange(0, WIDTH)
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=valid[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def store_row_tile(
    base, rows, stride, valid, width, tile, OFFSET: tl.constexpr, WIDTH: tl.constexpr
):
    columns = OFFSET + tl.arange(0, WIDTH)
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    mask = valid[:, None] & (columns < width)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def tile_pointers(base, start, ROWS: tl.constexpr, TOTAL: tl.constexpr, OFFSET: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Pointers to ``ROWS`` rows from ``start`` of a workspace whose rows are ``TOTAL`` wide."""
    rows = start + tl.arange(0, ROWS)
    return base + rows.to(tl.int64)[:, None] * TOTAL + (OFFSET + tl.arange(0, WIDTH))[None, :]


@triton.jit
def load_pieces(base, start, ROWS: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr):
    """``ROWS`` workspace rows as their two pieces (the second is the first where there is none)."""
    first = tl.load(tile_pointers(base, start, ROWS, W1 + W2, 0, W1))
    second = first
    if W2 > 0:
        second = tl.load(tile_pointers(base, start, ROWS, W1 + W2, W1, W2))
    return first, second


@triton.jit
def similarity(a1, a2, b1, b2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """``A B^T`` over both pieces."""
    product = tl.dot(a1, tl.trans(b1), input_precision=PRECISION)
    if D2 > 0:
        product = tl.dot(a2, tl.trans(b2), product, input_precision=PRECISION)
    return product


@triton.jit
def accumulate(acc, left, right, exact_one, PRECISION: tl.constexpr):
    """``acc + left @ right``.

    In float32 the tile's product starts at 0 and is added outside the tensor core, which truncates
    its sums: a bias that would grow with the length. ``exact_one`` is 1.0 at run time, which
    keeps the compiler from folding the addition back.
    """
    if PRECISION == "ieee" or PRECISION == "tf32x3":
        return acc + exact_one * tl.dot(left, right, input_precision=PRECISION)
    return tl.dot(left, right, acc)


@triton.jit
def power_of_two(exponent):
    """``2.0 ** exponent`` for -126 <= exponent <= 127, exactly."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def range_exponent(largest_bits, headroom):
    """The exponent ``e`` with ``2^e * (largest value) * 2^headroom <= 2^15``, from its bits."""
    exponent = 15 - headroom - ((largest_bits >> 23) - 126)
    return tl.minimum(tl.maximum(exponent, -126), 100)


@triton.jit
def wait_for(counter, need, INTERPRET: tl.constexpr):
    """Return ``need`` once ``counter`` is at least that; what was stored before is then visible.

    Every thread polls for itself, which is cheaper than an atomic and a broadcast. What a thread reads
    beyond ``need`` is not returned: threads may read different values, and loops must not.
    """
    if INTERPRET:
        ready = tl.load(counter)
    else:
        ready = tl.inline_asm_elementwise(
            """
            {
            .reg .pred behind;
            AGAIN:
            ld.acquire.gpu.global.b32 $0, [$1];
            setp.lt.s32 behind, $0, $2;
            @behind bra AGAIN;
            }
            """,
            "=&r,l,r",
            [counter.to(tl.int64, bitcast=True), need],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    return tl.minimum(ready, need)


@triton.jit
def wait_beyond(counter, count, INTERPRET: tl.constexpr):
    """Return how far ``counter`` is, once that is more than ``count``; the same in every thread."""
    ready = tl.atomic_add(counter, 0, sem="acquire")
    if ready <= count:
        ready = wait_for(counter, count + 1, INTERPRET)
    return ready


@triton.jit
def announce(counter, value):
    """Raise ``counter`` to ``value`` after everything this program stored before."""
    tl.debug_barrier()
    tl.atomic_xchg(counter, value, sem="release")
