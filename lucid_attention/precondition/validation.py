"""Argument checks of the public operators: every user error is raised here.

Messages name the argument, what was expected, what came, and the remedy. Shapes, dtypes and devices
are checked always; the *contents* of a tensor (offsets, strengths) only where they lie in host
memory, because reading them from an accelerator would synchronise it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "reference", "blocked", "triton")
PRECISIONS = ("default", "high")
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_DENSE = "(batch, heads, seq, head_dim)"
_PACKED = "(total, heads, head_dim)"


def resolve_impl(impl: str) -> str:
    """Return ``impl`` if it names an implementation; `implementation.choose` decides what it means."""
    if not isinstance(impl, str):
        raise TypeError(f"impl must be a string, one of {IMPLEMENTATIONS}, got {kind(impl)}.")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}.")
    return impl


def resolve_precision(precision: str) -> str:
    """Return ``precision`` if it is one of the two there are."""
    if not isinstance(precision, str):
        raise TypeError(f"precision must be a string, one of {PRECISIONS}, got {kind(precision)}.")
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision must be one of {PRECISIONS}, got {precision!r}. For more than 'high' give the inputs in float32."
        )
    return precision


def check_key_value(key: Tensor, value: Tensor, *, packed: bool = False) -> None:
    """Check the operands of the solve: same layout, heads, length, dtype and device."""
    layout, dims = (_PACKED, 3) if packed else (_DENSE, 4)
    for name, tensor in (("key", key), ("value", value)):
        _check_float_tensor(name, tensor, layout, dims)
    _check_same("value", value, "key", key)
    leading = ("total", "heads") if packed else ("batch", "heads", "seq")
    for axis, what in enumerate(leading):
        if key.shape[axis] != value.shape[axis]:
            remedy = (
                " Key and value share their KV heads; only the query may have more (GQA)."
                if what == "heads"
                else ""
            )
            raise ValueError(
                f"value must have key's {what}, expected {key.shape[axis]}, got "
                f"{value.shape[axis]} (key {tuple(key.shape)}, value {tuple(value.shape)})."
                f"{remedy}"
            )


def check_query(query: Tensor, key: Tensor, *, packed: bool = False) -> None:
    """Check the query of causal self-attention against an already checked key."""
    layout, dims = (_PACKED, 3) if packed else (_DENSE, 4)
    _check_float_tensor("query", query, layout, dims)
    _check_same("query", query, "key", key)
    shapes = f"(query {tuple(query.shape)}, key {tuple(key.shape)})"
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query must have key's head_dim, expected {key.shape[-1]}, got {query.shape[-1]} "
            f"{shapes}."
        )
    sizes = ((0, "total"),) if packed else ((0, "batch"), (2, "seq"))
    for axis, what in sizes:
        if query.shape[axis] != key.shape[axis]:
            raise ValueError(
                f"query must have key's {what}, expected {key.shape[axis]}, got "
                f"{query.shape[axis]} {shapes}. This is self-attention: for new tokens after a "
                f"cached past, use precondition(..., past=...) and attend to its result."
            )
    if query.shape[1] % max(key.shape[1], 1) != 0 or (key.shape[1] == 0 and query.shape[1] > 0):
        raise ValueError(
            f"query heads must be a multiple of key's heads (GQA), got {query.shape[1]} query "
            f"heads for {key.shape[1]} KV heads."
        )


def resolve_scale(name: str, scale: float | None, head_dim: int, *, positive: bool) -> float:
    """Return ``scale``, or its default ``1/sqrt(head_dim)``."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(
            f"{name} must be a Python float or None (1/sqrt(head_dim)), got {kind(scale)}. "
            f"Convert a one-element tensor with float(...)."
        )
    # Not by math.isfinite: in a compiled function that met two scales it is a symbol, which can only be compared.
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{name} must be finite, got {scale}.")
    if positive and scale <= 0:
        raise ValueError(
            f"{name} must be positive, got {scale}: with a non-positive scale the inverse of L is "
            f"unbounded. Leave it at None for 1/sqrt(head_dim)."
        )
    return float(scale)


def resolve_out_dtype(out_dtype: torch.dtype | None, value: Tensor) -> torch.dtype:
    """Return the result's dtype: value's, or float32 where value is narrower."""
    if out_dtype is None:
        return value.dtype
    if not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"out_dtype must be a torch.dtype or None, got {kind(out_dtype)}.")
    if out_dtype != value.dtype and (out_dtype != torch.float32 or value.dtype.itemsize > 4):
        raise ValueError(
            f"out_dtype must be value's dtype ({value.dtype}) or float32 where that is wider, got {out_dtype}. "
            f"Use .to({out_dtype}) on the result."
        )
    return out_dtype


def resolve_strength(strength: float | Tensor | None, key: Tensor, heads: int) -> Tensor | None:
    """Return the strength as a ``(heads,)`` tensor, or None where it is 1 everywhere."""
    device = key.device
    if strength is None:
        return None
    if isinstance(strength, Tensor):
        if strength.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"strength must be float32 (or float64), got {strength.dtype}: half precision "
                f"cannot hold a schedule's small steps. Use strength.float()."
            )
        if strength.shape != (heads,):
            raise ValueError(
                f"strength must be a float or a tensor of shape (kv_heads,), expected ({heads},), "
                f"got {tuple(strength.shape)}."
            )
        if strength.device != device:
            raise ValueError(
                f"strength must be on key's device, expected {device}, got {strength.device}. "
                f"Use strength.to(key.device)."
            )
        return strength
    if isinstance(strength, bool) or not isinstance(strength, numbers.Real):
        raise TypeError(
            f"strength must be None, a float in [0, 1] or a tensor of shape (kv_heads,), got "
            f"{kind(strength)}."
        )
    if not 0.0 <= strength <= 1.0:
        raise ValueError(
            f"strength must lie in [0, 1] (0: softmax attention, 1: LUCID), got {strength}."
        )
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    return torch.full((heads,), float(strength), dtype=dtype, device=device)


def check_key_mask(key_mask: Tensor | None, batch: int, seq: int, device: torch.device) -> None:
    """Check a padding mask: bool ``(batch, seq)``, True for tokens, False for padding."""
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor):
        raise TypeError(f"key_mask must be a bool tensor or None, got {kind(key_mask)}.")
    if key_mask.dtype != torch.bool:
        raise TypeError(
            f"key_mask must be bool (True: token, False: padding), got {key_mask.dtype}. "
            f"For a 0/1 attention mask use attention_mask.bool()."
        )
    if key_mask.shape != (batch, seq):
        raise ValueError(
            f"key_mask must have shape (batch, seq), expected ({batch}, {seq}), got "
            f"{tuple(key_mask.shape)}. With a past it covers the new chunk only; a 4-D mask has no "
            f"bounded solve and is not supported."
        )
    if key_mask.device != device:
        raise ValueError(
            f"key_mask must be on key's device, expected {device}, got {key_mask.device}."
        )


def check_past(
    past: Sequence[Tensor] | None, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Check ``(past_key, past_preconditioned)`` against an already checked chunk."""
    if past is None:
        return None
    if not isinstance(past, (tuple, list)) or len(past) != 2:
        got = f"{len(past)} items" if isinstance(past, (tuple, list)) else kind(past)
        raise TypeError(f"past must be None or a pair (past_key, past_preconditioned), got {got}.")
    past_key, past_preconditioned = past
    pairs = (
        ("past[0] (past_key)", past_key, "key", key),
        ("past[1] (past_preconditioned)", past_preconditioned, "value", value),
    )
    for name, tensor, of, like in pairs:
        _check_float_tensor(name, tensor, _DENSE, 4)
        if tensor.device != like.device:
            raise ValueError(
                f"{name} must be on {of}'s device, expected {like.device}, got {tensor.device}."
            )
        for axis, what in ((0, "batch"), (1, "heads"), (3, "head_dim")):
            if tensor.shape[axis] != like.shape[axis]:
                raise ValueError(
                    f"{name} must have {of}'s {what}, expected {like.shape[axis]}, got "
                    f"{tensor.shape[axis]} ({name} {tuple(tensor.shape)}, {of} "
                    f"{tuple(like.shape)})."
                )
    if past_key.shape[2] != past_preconditioned.shape[2]:
        raise ValueError(
            f"past must hold as many keys as preconditioned values, got {past_key.shape[2]} keys "
            f"and {past_preconditioned.shape[2]} values."
        )
    if past_key.dtype != key.dtype:
        raise TypeError(
            f"past[0] (past_key) must have key's dtype, expected {key.dtype}, got "
            f"{past_key.dtype}. (past[1] may be kept in a wider dtype than value.)"
        )
    return past_key, past_preconditioned


def check_cu_seqlens(cu_seqlens: Tensor, max_seqlen: int | None, packed: Tensor) -> None:
    """Check the offsets' type, shape and device; `check_offsets` checks what they say.

    Args:
        packed: the packed tokens, ``(total, ..)``.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be an int32 tensor, got {kind(cu_seqlens)}.")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(
            f"cu_seqlens must be int32, got {cu_seqlens.dtype}. Use cu_seqlens.to(torch.int32)."
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}."
        )
    if cu_seqlens.device != packed.device:
        raise ValueError(
            f"cu_seqlens must be on key's device, expected {packed.device}, got "
            f"{cu_seqlens.device}."
        )
    if cu_seqlens.shape[0] == 1 and packed.shape[0] > 0:
        raise ValueError(
            f"cu_seqlens of one offset holds no sequence, but there are {packed.shape[0]} packed "
            f"tokens. One sequence is [0, {packed.shape[0]}]."
        )
    if max_seqlen is None:
        return
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
        raise TypeError(
            f"max_seqlen must be an int or None, got {kind(max_seqlen)}. Convert a tensor with "
            f"int(...)."
        )
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen must not be negative, got {max_seqlen}.")


def check_offsets(offsets: list[int], total: int, max_seqlen: int | None) -> None:
    """Check offsets that are in host memory: from 0 to ``total``, never falling."""
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {offsets[0]}.")
    if offsets[-1] != total:
        raise ValueError(
            f"cu_seqlens must end at the number of packed tokens, expected {total}, got "
            f"{offsets[-1]}."
        )
    longest = 0
    for index, (start, stop) in enumerate(pairwise(offsets)):
        if stop < start:
            raise ValueError(
                f"cu_seqlens must not decrease, got {start} then {stop} at positions {index} and "
                f"{index + 1}. It holds cumulative offsets, not lengths."
            )
        longest = max(longest, stop - start)
    if max_seqlen is not None and longest > max_seqlen:
        raise ValueError(
            f"max_seqlen must be at least the longest packed sequence, expected {longest} or "
            f"more, got {max_seqlen}. Leave it at None to have it found."
        )


def check_strength_contents(strength: Tensor | None) -> None:
    """Check a strength in host memory: every head in [0, 1] (NaN passes: it is not hidden)."""
    if strength is None or strength.device.type != "cpu" or strength.numel() == 0:
        return
    low, high = strength.min().item(), strength.max().item()
    if low < 0.0 or high > 1.0:
        raise ValueError(
            f"strength must lie in [0, 1], got values from {low:.6g} to {high:.6g}: below 0 the "
            f"solve is unstable. Clamp it, or use a parametrisation into [0, 1]."
        )


def _check_float_tensor(name: str, tensor: Tensor, layout: str, dims: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {kind(tensor)}.")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}. "
            f"Use {name.split(' ')[0]}.float()."
        )
    if tensor.ndim != dims:
        raise ValueError(
            f"{name} must have {dims} dimensions {layout}, got {tensor.ndim} {tuple(tensor.shape)}."
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}. Use .to_dense().")
    if tensor.shape[-1] == 0:
        raise ValueError(f"{name} must have head_dim >= 1, got {tuple(tensor.shape)}.")


def _check_same(name: str, tensor: Tensor, of: str, like: Tensor) -> None:
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{name} must have {of}'s dtype, expected {like.dtype}, got {tensor.dtype}. "
            f"Use {name}.to({of}.dtype)."
        )
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on {of}'s device, expected {like.device}, got {tensor.device}. "
            f"Use {name}.to({of}.device)."
        )


def kind(thing: object) -> str:
    return f"{type(thing).__name__} ({thing!r:.60})" if thing is not None else "None"
