"""Checks of what only the decode operator takes; the others are `precondition.validation`'s."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from lucid_attention.precondition.validation import FLOAT_DTYPES, kind


def check_caches(
    key_cache: Tensor, y_cache: Tensor, key: Tensor, value: Tensor, block_table: Tensor | None
) -> None:
    """Caches and new tokens go together."""
    rows = "batch" if block_table is None else "pages"
    room = "capacity" if block_table is None else "page_size"
    for name, cache, width in (
        ("key_cache", key_cache, key.shape[-1]),
        ("y_cache", y_cache, value.shape[-1]),
    ):
        layout = f"({rows}, kv_heads, {room}, width)"
        if not isinstance(cache, Tensor):
            raise TypeError(f"{name} must be a tensor {layout}, got {kind(cache)}.")
        if cache.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions {layout}, got {tuple(cache.shape)}.")
        if cache.device != key.device:
            raise ValueError(
                f"{name} must be on key's device, expected {key.device}, got {cache.device}."
            )
        expected = [key.shape[0], key.shape[1], key_cache.shape[2], width]
        if block_table is not None:
            expected[0] = key_cache.shape[0]
        if list(cache.shape) != expected:
            raise ValueError(
                f"{name} must have shape {layout}, expected {tuple(expected)}, got {tuple(cache.shape)} (key "
                f"{tuple(key.shape)}, value {tuple(value.shape)}). The cache belongs to another model or batch, or "
                f"is paged and lacks its block_table."
            )
        if cache.stride(-1) != 1 and width > 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, got strides {cache.stride()}: it is written in "
                f"place."
            )
        if any(s == 0 and n > 1 for s, n in zip(cache.stride(), cache.shape, strict=True)):
            raise ValueError(
                f"{name} must have memory of its own for every row, got shape {tuple(cache.shape)} with strides "
                f"{cache.stride()} (an expanded tensor): it is written in place. Use {name}.contiguous()."
            )
    if key_cache is y_cache or (
        not torch.compiler.is_compiling()
        and key_cache.numel() > 0
        and key_cache.untyped_storage()._cdata == y_cache.untyped_storage()._cdata
        and key_cache.storage_offset() == y_cache.storage_offset()
    ):
        raise ValueError("key_cache and y_cache must be two tensors, got one: both are written.")
    if key_cache.dtype != key.dtype:
        raise TypeError(
            f"key_cache must have key's dtype, expected {key.dtype}, got {key_cache.dtype}. "
            f"Use key_cache.to({key.dtype}), or key.to({key_cache.dtype})."
        )
    if y_cache.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"y_cache must be float16, bfloat16, float32 or float64, got {y_cache.dtype}."
        )


def check_no_gradient(*operands: object) -> None:
    """The cache is written in place, so nothing can flow back."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in operands):
        raise ValueError(
            "lucid_attention_with_kvcache has no gradient, but an operand requires one. Call it under "
            "torch.no_grad(), or train with lucid_attention.precondition(..., past=...)."
        )


def check_block_table(block_table: Tensor | None, key: Tensor) -> None:
    if block_table is None:
        return
    if not isinstance(block_table, Tensor):
        raise TypeError(f"block_table must be an int32 tensor or None, got {kind(block_table)}.")
    if block_table.dtype != torch.int32:
        raise TypeError(f"block_table must be int32, got {block_table.dtype}.")
    if block_table.ndim != 2 or block_table.shape[0] != key.shape[0]:
        raise ValueError(
            f"block_table must have shape (batch, most pages), expected ({key.shape[0]}, ..), got "
            f"{tuple(block_table.shape)}."
        )
    if block_table.device != key.device:
        raise ValueError(
            f"block_table must be on key's device, expected {key.device}, got {block_table.device}."
        )


def check_y_scale(y_scale: Tensor | None, key: Tensor) -> None:
    if y_scale is None:
        return
    if not isinstance(y_scale, Tensor) or y_scale.dtype != torch.float32:
        got = y_scale.dtype if isinstance(y_scale, Tensor) else kind(y_scale)
        raise TypeError(f"y_scale must be a float32 tensor or None, got {got}.")
    if y_scale.shape != key.shape[:2] or y_scale.device != key.device:
        raise ValueError(
            f"y_scale must have shape (batch, kv_heads) on key's device, expected {tuple(key.shape[:2])} on "
            f"{key.device}, got {tuple(y_scale.shape)} on {y_scale.device}."
        )
    readable = y_scale.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not bool(((y_scale > 0) & y_scale.isfinite()).all()):
        raise ValueError("y_scale must hold finite numbers above 0 (powers of two).")


def check_sinks(sinks: Tensor | None, query: Tensor) -> None:
    if sinks is None:
        return
    if not isinstance(sinks, Tensor) or not sinks.dtype.is_floating_point:
        raise TypeError(f"sinks must be a floating tensor (heads,) or None, got {kind(sinks)}.")
    if sinks.shape != (query.shape[1],) or sinks.device != query.device:
        raise ValueError(
            f"sinks must have shape (heads,) on query's device, expected ({query.shape[1]},) on {query.device}, got "
            f"{tuple(sinks.shape)} on {sinks.device}."
        )


def resolve_softcap(softcap: float | None) -> float:
    """The cap, 0 for none."""
    if softcap is None:
        return 0.0
    if isinstance(softcap, bool) or not isinstance(softcap, numbers.Real):
        raise TypeError(f"softcap must be a positive float or None, got {kind(softcap)}.")
    if not 0 < softcap < math.inf:  # comparisons alone: compiled, it may be a symbol
        raise ValueError(f"softcap must be a positive float or None, got {softcap}.")
    return float(softcap)


def check_room(
    cache_seqlens: int | Tensor,
    tokens: int,
    capacity: int,
    block_table: Tensor | None,
    key_cache: Tensor,
) -> None:
    """Check lengths and pages as far as they are in host memory: nothing is written where this raises."""
    if isinstance(cache_seqlens, Tensor):
        if cache_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
            return
        lengths = [int(n) for n in cache_seqlens.flatten().tolist()]
    else:
        lengths = [cache_seqlens]
    for length in lengths:
        if length < 0:
            raise ValueError(f"cache_seqlens must not be negative, got {length}.")
        if length + tokens > capacity:
            raise ValueError(
                f"the cache is full: {length} cached and {tokens} new tokens in a capacity of {capacity} (of key_mask "
                f"and block_table, too). Nothing was written; copy it into a larger one."
            )
    if block_table is None or torch.compiler.is_compiling():
        return
    if block_table.device.type == "cpu" and tokens > 0:
        _check_pages(block_table.tolist(), lengths, tokens, key_cache)


def _check_pages(
    table: list[list[int]], lengths: list[int], tokens: int, key_cache: Tensor
) -> None:
    """Every page that is needed is there, and one that is written is needed by one row alone."""
    pages, _, size, _ = key_cache.shape
    needed_by: dict[int, int] = {}
    written: list[tuple[int, int]] = []
    for b, row in enumerate(table):
        length = lengths[b if len(lengths) > 1 else 0]
        needed = row[: -(-(length + tokens) // size)]
        for page in needed:
            if not 0 <= page < pages:
                raise ValueError(
                    f"block_table of row {b} names page {page}, but there are {pages}."
                )
            needed_by[page] = needed_by.get(page, 0) + 1
        written += [(b, page) for page in needed[length // size :]]
    for b, page in written:
        if needed_by[page] > 1:
            raise ValueError(
                f"block_table names page {page} more than once, and new tokens of row {b} go to it: what one sequence "
                "writes another would read. Give every row pages of its own for its new tokens; only pages that are "
                "full may be shared. Nothing was written."
            )


def resolve_lengths(cache_seqlens: int | Tensor, key: Tensor) -> Tensor:
    """Lengths as ``(1,)`` or ``(batch,)`` on key's device."""
    if isinstance(cache_seqlens, bool) or not isinstance(
        cache_seqlens, (int, torch.SymInt, Tensor)
    ):
        raise TypeError(
            f"cache_seqlens must be an int or an integer tensor, got {kind(cache_seqlens)}."
        )
    if not isinstance(cache_seqlens, Tensor):
        if isinstance(cache_seqlens, int):  # what int32 does not hold does not fit either
            cache_seqlens = max(-1, min(cache_seqlens, 2**31 - 1))
        return torch.full((1,), cache_seqlens, dtype=torch.int32, device=key.device)
    if cache_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cache_seqlens must be int32 or int64, got {cache_seqlens.dtype}.")
    if cache_seqlens.device != key.device:
        raise ValueError(
            f"cache_seqlens must be on key's device, expected {key.device}, got {cache_seqlens.device}."
        )
    if cache_seqlens.ndim > 1 or cache_seqlens.numel() not in (1, key.shape[0]):
        raise ValueError(
            f"cache_seqlens must have shape (), (1,) or (batch,), expected ({key.shape[0]},), got "
            f"{tuple(cache_seqlens.shape)}."
        )
    return cache_seqlens.reshape(-1).contiguous()


def check_workspace(workspace: Tensor, size: int, key: Tensor) -> None:
    if not isinstance(workspace, Tensor) or workspace.dtype != torch.int32:
        raise TypeError(f"workspace must come from decode_workspace, got {kind(workspace)}.")
    if workspace.numel() < size or workspace.device != key.device or not workspace.is_contiguous():
        raise ValueError(
            f"workspace must come from decode_workspace for this batch, these KV heads and this device, expected "
            f"{size} counters on {key.device}, got {tuple(workspace.shape)} on {workspace.device}."
        )
