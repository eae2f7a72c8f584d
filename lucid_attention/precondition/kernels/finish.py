"""RMS-norm's backward on what Hopper's kernels added up."""

import triton
import triton.language as tl

from .tiles import load_row_tile, place_rows, power_of_two, range_exponent, store_row_tile


@triton.jit(do_not_specialize=["heads", "chains", "blocks", "length", "headroom"])
def finish_kernel(
    Toward, Key, GradKey, Mask, Strength, Blocks, LargestGrad, LargestSolution, Bad,
    width, key_b, key_h, key_n, out_b, out_h, out_n,
    heads, chains, blocks, length, headroom, scale, eps,
    D: tl.constexpr, STORED: tl.constexpr, UNIT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """RMS-norm's backward, as at the end of ``toward.py``. Grid: half a block a program.

    ``STORED`` of the D columns are there, the others are 0. ``width`` and the strides are in ``UNIT``s of entries (``plan.in_units``).
    """
    width *= UNIT
    program = tl.program_id(0)
    slot = program // 2
    chain = slot // blocks
    block = slot % blocks
    batch = (chain // heads).to(tl.int64)
    head = (chain % heads).to(tl.int64)
    index = (program % 2) * 64 + tl.arange(0, 64)
    rows, inside, count, first = place_rows(Blocks, block, blocks, length, index, 128, PACKED)
    if PACKED and count == 0:
        return
    sequence = chain * blocks + first
    live = inside
    if Mask is not None:
        live = live & (tl.load(Mask + batch * length + rows, mask=live, other=0) != 0)
    strength = 1.0
    if Strength is not None:
        strength = tl.load(Strength + head).to(tl.float32)

    # From the order of the registers to rows and columns; see ``hopper_tiles.in_order``.
    entry = tl.arange(0, 64 * D)
    Toward += program.to(tl.int64) * (64 * STORED)
    if STORED == D:
        grad = tl.load(Toward + entry)
    else:
        grad = tl.load(Toward + entry, mask=entry < 64 * STORED, other=0.0)
    grad = tl.permute(tl.reshape(grad, (D // 8, 4, 8, 4, 2, 2)), (1, 4, 2, 0, 3, 5))
    grad = tl.reshape(grad, (64, D))
    grad = grad * power_of_two(-range_exponent(tl.load(LargestGrad + sequence), headroom))
    grad = grad * power_of_two(-range_exponent(tl.load(LargestSolution + sequence), 0))
    grad = grad * (-strength * scale)

    keys = Key + (batch * key_b + head * key_h) * UNIT
    k = load_row_tile(keys, rows, key_n * UNIT, live, width, 0, D).to(tl.float32)
    k = tl.where(tl.abs(k) < float("inf"), k, 0.0)
    inverse_rms = tl.math.rsqrt(tl.sum(k * k, axis=1) / width + eps)
    k = k * inverse_rms[:, None]
    radial = tl.sum(k * grad, axis=1) / width
    grad = inverse_rms[:, None] * (grad - k * radial[:, None])
    spoiled = (tl.load(Bad + sequence) > 0) & live[:, None]
    grad = tl.where(spoiled, float("nan"), tl.where(live[:, None], grad, 0.0))
    out = GradKey + (batch * out_b + head * out_h) * UNIT
    store_row_tile(out, rows, out_n * UNIT, inside, width, grad, 0, D)
