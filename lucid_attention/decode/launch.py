"""From the decode operator's arguments to its kernel. Nothing here reads the device."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lucid_attention.precondition.implementation import multiprocessors, why_no_kernels
from lucid_attention.precondition.numerics import KEY_EPS

MOST_TOKENS = 16
MOST_ROWS = 64
LARGEST_TILE = 64 * 128
"""Of sums in float32 that a program keeps in registers: rows times value width."""


def why_not_fused(
    query: Tensor, key: Tensor, value: Tensor, y_cache: Tensor, *, interpreter: bool = False
) -> str | None:
    """Why the kernels cannot take these operands, or None."""
    reason = why_no_kernels(key, value, interpreter=interpreter)
    if reason is not None:
        return reason
    if y_cache.dtype == torch.float64:
        return "the kernels take no float64 y_cache"
    return why_not_this_many(query, key, value)


def why_not_this_many(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why new tokens are too many for the kernels, or None; from shapes alone, so that it can be traced."""
    tokens = key.shape[2]
    if query.shape[1] == 0:
        return "there are no query heads"
    if tokens > MOST_TOKENS:
        return f"the kernels take up to {MOST_TOKENS} new tokens at once, got {tokens}"
    used = (query.shape[1] // max(key.shape[1], 1) + 1) * tokens
    most = min(MOST_ROWS, LARGEST_TILE // _power(value.shape[-1]))
    if used > most:
        return (
            f"the kernels take (query heads / KV heads + 1) * new tokens up to {most} at this value "
            f"width, got {used}"
        )
    return None


def counters_needed(batch: int, heads: int, device: torch.device) -> int:
    """One for every head of every row, and two for every program; twice, for two halves of the columns."""
    return 2 * (batch * heads + (2 * multiprocessors(device) if device.type == "cuda" else 0))


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    y_cache: Tensor,
    cache_seqlens: Tensor,
    y_scale: Tensor | None,
    key_mask: Tensor | None,
    block_table: Tensor | None,
    strength: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    kernel_scale: float,
    softcap: float,
    counters: Tensor,
    interpreted: bool | None = None,
) -> Tensor:
    """The output; the caches are written in place. ``interpreted``: by Triton's interpreter; None: off a GPU."""
    from lucid_attention.precondition.kernels.launch import dense, on_device_of, row_major
    from lucid_attention.precondition.kernels.plan import pieces

    from .kernel import decode_kernel

    batch, query_heads, tokens, width = query.shape
    heads, value_width = key.shape[1], value.shape[-1]
    out = query.new_empty((batch, query_heads, tokens, value_width))
    if out.numel() == 0:
        return out
    query, key, value = row_major(query), row_major(key), row_major(value)
    group = query_heads // heads
    used = (group + 1) * tokens
    rows = max(16, _power(used))
    page = 0 if block_table is None else key_cache.shape[2]
    capacity = key_cache.shape[2] if block_table is None else block_table.shape[1] * page
    if key_mask is not None:
        capacity = min(capacity, key_mask.shape[1])
    key_mask, block_table, strength, sinks, y_scale = map(
        dense, (key_mask, block_table, strength, sinks, y_scale)
    )
    ragged = cache_seqlens.numel() > 1
    operands = (
        query, key, value, key_cache, y_cache, y_scale, cache_seqlens, key_mask, block_table,
        strength, sinks, out,
    )  # fmt: skip
    strides = (
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *key_cache.stride()[:3], *y_cache.stride()[:3],
        0 if key_mask is None else key_mask.stride(0), 0 if block_table is None else block_table.stride(0),
    )  # fmt: skip
    numbers = (batch, heads, capacity, width, value_width, scale, kernel_scale, softcap, KEY_EPS)
    common = {
        "G": group, "C": tokens, "ROWS": rows, "BATCH": _power(batch) if ragged else 1, "PAGE": page,
        "RAGGED": ragged, "SOFTCAP": softcap > 0,
    }  # fmt: skip

    def parts(programs: int, rows: int, columns: int) -> Tensor:
        """Of each part: tops, weights, sums. See the kernels."""
        size = 2 * programs * rows * columns
        return torch.empty(size, dtype=torch.float32, device=query.device)

    with on_device_of(query):
        if is_hoppers(key_cache, y_cache, rows, page):
            from . import hopper

            d, e = hopper.columns_of(width), hopper.columns_of(value_width)
            tile, stages = hopper.tile_for(rows, d, e, page)
            programs, each = hopper.programs_for(
                multiprocessors(query.device),
                memory_rate(query.device),
                batch * heads,
                max(1, -(-capacity // tile)),
                ragged,
                used,
                e,
            )
            hopper.hopper_decode_kernel[(programs,)](
                hopper.tile_descriptor(key_cache, tile, d), hopper.tile_descriptor(y_cache, tile, e),
                *operands, parts(programs, used, e + 4), counters, *strides, *numbers,
                **common, D=d, E=e, EACH=each, TILE=tile, STAGES=stages, num_warps=4, launch_pdl=True,
            )  # fmt: skip
            return out
        d1, d2 = pieces(width)
        e1, e2 = pieces(value_width)
        tile, warps, stages = _tiles(key_cache, y_cache, d1 + d2, e1 + e2)
        programs = min(slots(query.device), batch * heads * max(1, -(-capacity // tile)))
        exact_key, exact_y = key_cache.dtype == torch.float32, y_cache.dtype == torch.float32
        decode_kernel[(programs,)](
            *operands, parts(programs, rows, value_width + 2), counters, *strides, *numbers,
            **common, D1=d1, D2=d2, E1=e1, E2=e2, M=tile, PROGRAMS=_power(programs), STAGES=stages,
            K_PRECISION="tf32x3" if exact_key else "tf32", Y_PRECISION="tf32x3" if exact_y else "tf32",
            INTERPRET=not query.is_cuda if interpreted is None else interpreted, num_warps=warps,
        )  # fmt: skip
    return out


def is_hoppers(key_cache: Tensor, y_cache: Tensor, rows: int, page: int) -> bool:
    """Whether Hopper's kernel takes these caches, with ``rows`` of X and pages of ``page`` rows (0: none)."""
    if not key_cache.is_cuda or not _is_hopper(key_cache.device):
        return False
    from . import hopper

    return hopper.serves(key_cache, y_cache, rows, page)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def _tiles(
    key_cache: Tensor, y_cache: Tensor, width: int, value_width: int
) -> tuple[int, int, int]:
    """Rows of a tile, warps, stages."""
    row = width * key_cache.element_size() + value_width * y_cache.element_size()
    tile = 64
    return tile, 4, max(1, min(4, 200 * 1024 // (2 * tile * row)))


@functools.cache
def memory_rate(device: torch.device) -> float:
    """GB/s that the card's memory has by its clock and width; infinite where this Triton does not know them."""
    try:
        from triton.testing import get_dram_gbps

        return float(get_dram_gbps(device.index))
    except (ImportError, AttributeError, KeyError):
        return math.inf


@functools.cache
def slots(device: torch.device) -> int:
    """Programs that run at once."""
    if device.type != "cuda":
        return 3  # the interpreter: few enough that heads are shared
    return 2 * multiprocessors(device)


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
