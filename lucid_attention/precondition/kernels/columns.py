"""Values of a past, or ``Y``, as columns of other kernels: in the kernels' range, and their norms."""

import triton
import triton.language as tl

from .tiles import load_row_tile, place_rows, power_of_two, range_exponent, tile_pointers


@triton.jit
def _raise_to_norm(largest, x, rest):
    """Raise ``largest`` (its bits) to the largest squared norm of rows ``x``, whose other columns add ``rest``."""
    square = tl.max(tl.sum(x * x, axis=1) + rest, axis=0)
    tl.atomic_max(largest, square.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit(do_not_specialize=["heads", "chains", "blocks", "length", "headroom"])
def range_kernel(
    Value, Live, Blocks, Out, Largest, Other, Norms,
    value_b, value_h, value_n, headroom, heads, chains, blocks, length, value_width,
    E1: tl.constexpr, E2: tl.constexpr, R: tl.constexpr, PACKED: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """Values as a column workspace: scaled, what is not finite as 0. Grid: ``chains * blocks``.

    ``Norms``, if there are any: for each sequence, the bits of the largest squared norm of a row of these, then of
    ``Other``, another workspace (``dV``'s).
    """
    program = tl.program_id(0)
    chain = program % chains
    block = program // chains
    batch = (chain // heads).to(tl.int64)
    head = (chain % heads).to(tl.int64)
    index = tl.arange(0, R)
    rows, inside, _, first = place_rows(Blocks, block, blocks, length, index, R, PACKED)
    start = (chain.to(tl.int64) * blocks + block) * R
    live = tl.load(Live + start + index, mask=inside, other=0) != 0
    sequence = chain * blocks + first
    scale = 1.0
    if not CENTRED:
        scale = power_of_two(range_exponent(tl.load(Largest + sequence), headroom))
    values = Value + batch * value_b + head * value_h
    x = load_row_tile(values, rows, value_n, live, value_width, 0, E1).to(tl.float32)
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0) * scale
    tl.store(tile_pointers(Out, start, R, E1 + E2, 0, E1), x.to(Out.dtype.element_ty))
    rest = tl.zeros([R], dtype=tl.float32)
    if E2 > 0:
        x2 = load_row_tile(values, rows, value_n, live, value_width, E1, E2).to(tl.float32)
        x2 = tl.where(tl.abs(x2) < float("inf"), x2, 0.0) * scale
        tl.store(tile_pointers(Out, start, R, E1 + E2, E1, E2), x2.to(Out.dtype.element_ty))
        rest = tl.sum(x2 * x2, axis=1)
    if Norms is not None:
        _raise_to_norm(Norms + 2 * sequence, x, rest)
        # Only rows of the sequence: a block without any was not written.
        y = tl.load(tile_pointers(Other, start, R, E1 + E2, 0, E1), mask=live[:, None], other=0.0)
        if E2 > 0:
            y2 = tl.load(
                tile_pointers(Other, start, R, E1 + E2, E1, E2), mask=live[:, None], other=0.0
            ).to(tl.float32)
            rest = tl.sum(y2 * y2, axis=1)
        _raise_to_norm(Norms + 2 * sequence + 1, y.to(tl.float32), rest)
