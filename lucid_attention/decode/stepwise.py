"""The decode operator by PyTorch operations: the solve, then the softmax, on any device and for any number of tokens.

A paged cache is gathered first. Everything is float32 (float64 for float64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lucid_attention.precondition import precondition
from lucid_attention.precondition.numerics import compute_dtype

# Queries at once, so that scores stay linear in the keys.
_QUERIES = 256


def attend(
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
    impl: str,
) -> Tensor:
    """The output; writes the new rows into the caches."""
    batch, _, tokens, _ = query.shape
    dtype = compute_dtype(key)
    keys, ys = key_cache, y_cache
    if block_table is not None:
        keys, ys = _gathered(key_cache, block_table), _gathered(y_cache, block_table)
    capacity = keys.shape[2] if key_mask is None else min(keys.shape[2], key_mask.shape[1])
    keys, ys = keys[:, :, :capacity], ys[:, :, :capacity]
    # As in the kernels, a wrong length neither reads nor writes beyond the cache.
    length = cache_seqlens.long()
    length = torch.where(length < 0, capacity, length.clamp(max=capacity)).expand(batch)[:, None]
    fits = length + tokens <= capacity
    if block_table is not None:
        fits = fits & _are_there(block_table, length + tokens, key_cache)
    place = length + torch.arange(tokens, device=key.device)
    column = torch.arange(capacity, device=key.device)
    seen = column < length
    new_mask = None
    if key_mask is not None:
        seen = seen & key_mask[:, :capacity]
        new_mask = key_mask.gather(1, place.clamp(max=max(0, capacity - 1)))
    unit = 1.0 if y_scale is None else y_scale[:, :, None, None].to(dtype)

    # Whatever the keys hold where Y is 0, nobody sees it.
    past = (keys, torch.where(seen[:, None, :, None], ys, 0.0).to(dtype) * unit)
    half = key.dtype.itemsize < 4
    solved = precondition(
        key,
        value,
        kernel_scale=kernel_scale,
        strength=strength,
        key_mask=new_mask,
        past=past if capacity > 0 else None,
        out_dtype=torch.float32 if half else None,
        impl="reference" if impl == "reference" else "auto" if impl == "auto" else "blocked",
    )
    # What will be read again is what was stored.
    stored = (solved.to(dtype) / unit).to(y_cache.dtype)
    _write(key_cache, key, place, fits, block_table)
    _write(y_cache, stored, place, fits, block_table)
    if capacity == 0 or query.numel() == 0:
        return query.new_full((*query.shape[:3], value.shape[-1]), float("nan"))
    output = _softmax(query, key, solved, *past, seen, new_mask, sinks, scale, softcap, dtype)
    return torch.where(fits[:, None, :, None], output, float("nan")).to(query.dtype)


def _are_there(block_table: Tensor, ends: Tensor, cache: Tensor) -> Tensor:
    """Whether all pages that rows up to ``ends`` ``(batch, 1)`` need are the cache's: ``(batch, 1)``."""
    needed = torch.arange(block_table.shape[1], device=ends.device) * cache.shape[2] < ends
    known = (block_table >= 0) & (block_table < cache.shape[0])
    return (known | ~needed).all(1, keepdim=True)


def _gathered(cache: Tensor, block_table: Tensor) -> Tensor:
    """Pages as ``(batch, heads, rows, width)``; entries that no length reaches may be anything."""
    pages = cache[block_table.long().clamp(0, max(0, cache.shape[0] - 1))]
    return pages.transpose(1, 2).flatten(2, 3)


def _write(
    cache: Tensor, rows: Tensor, place: Tensor, fits: Tensor, block_table: Tensor | None
) -> None:
    """Rows ``(batch, heads, tokens, width)`` to their places; a row of the batch that does not fit keeps its."""
    batch, tokens = place.shape
    at = place.clamp(max=max(0, cache.shape[2] - 1))
    first = torch.arange(batch, device=place.device)[:, None].expand(-1, tokens)
    if block_table is not None:
        size = cache.shape[2]
        page = (place // size).clamp(max=block_table.shape[1] - 1)
        first, at = block_table.long().gather(1, page), place % size
        first = first.clamp(0, cache.shape[0] - 1)
    if cache.numel() == 0 or tokens == 0:
        return
    rows = rows.transpose(1, 2)
    if block_table is not None:
        # A row that does not fit may name a page that another one writes: it writes what the first that fits does.
        row = torch.arange(batch, device=place.device)
        source = torch.where(fits[:, 0], row, fits[:, 0].long().argmax())
        rows, first, at, fits = rows[source], first[source], at[source], fits[source]
    present = cache[first, :, at]
    cache[first, :, at] = torch.where(fits[..., None, None], rows.to(cache.dtype), present)


def _softmax(
    query: Tensor,
    key: Tensor,
    solved: Tensor,
    past_key: Tensor,
    past_y: Tensor,
    seen: Tensor,
    new_mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    dtype: torch.dtype,
) -> Tensor:
    """Attention over the past and, causally, over the new tokens; grouped heads are not repeated."""
    batch, heads, tokens, width = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    new = new_mask
    if new is None:
        new = torch.ones(batch, tokens, dtype=torch.bool, device=query.device)
    keys = torch.cat([past_key.to(dtype), key.to(dtype)], 2)
    ys = torch.cat([past_y, solved.to(dtype)], 2)
    outputs = []
    for low in range(0, tokens, _QUERIES):
        part = query[:, :, low : low + _QUERIES].to(dtype)
        count = part.shape[2]
        grouped = part.reshape(batch, kv_heads, group * count, width)
        scores = scale * (grouped @ keys.mT)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        row = torch.arange(low, low + count, device=query.device)
        causal = torch.arange(tokens, device=query.device) <= row[:, None]
        visible = torch.cat(
            [seen[:, None, :].expand(-1, count, -1), causal & new[:, None, :]], dim=2
        )
        visible = visible & new[:, low : low + count, None]
        visible = visible[:, None].repeat(1, 1, group, 1)
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            sink = sinks.to(dtype).view(kv_heads, group, 1).expand(-1, -1, count).flatten(1, 2)
            scores = torch.cat([scores, sink[None, :, :, None].expand(batch, -1, -1, -1)], 3)
        weights = torch.softmax(scores, dim=-1)
        # A row that sees nothing is 0, as it is in the kernels.
        weights = torch.where(visible.any(-1, keepdim=True), weights, 0.0)
        if sinks is not None:
            weights = weights[..., :-1]
        outputs.append((weights @ ys).view(batch, heads, count, ys.shape[-1]))
    return torch.cat(outputs, dim=2)
