"""Softmax attention over preconditioned values, composed from an attention that already exists.

`lucid_attention` is `precondition` followed by causal softmax attention. The softmax half is
PyTorch's fused attention wherever that is linear in memory; padding, attention sinks and
``Dv != D`` are brought into the form those kernels take by one more feature or one more key.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from .blocked_softmax import blocked_softmax
from .precondition import precondition, precondition_varlen, reference
from .precondition.autocast import autocast, no_autocast
from .precondition.differentiation import refuse_forward_mode
from .precondition.numerics import compute_dtype
from .precondition.validation import (
    check_cu_seqlens,
    check_key_mask,
    check_key_value,
    check_offsets,
    check_query,
    resolve_impl,
    resolve_scale,
)

varlen_attn: Any
try:  # packed attention for CUDA in half precision
    from torch.nn.attention.varlen import varlen_attn

    # Its first form, in torch 2.10, has neither a scale nor this way of saying "causal".
    if "window_size" not in inspect.signature(varlen_attn).parameters:
        varlen_attn = None
except ImportError:
    varlen_attn = None

# Queries per call where a mask has to be written out, so that it stays linear in the keys.
_MASK_ROWS = 256
# Below this, half precision cannot hold a feature that hides a key.
_LEAST_SCALE = 1e-3


def lucid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    kernel_scale: float | None = None,
    strength: float | Tensor | None = None,
    key_mask: Tensor | None = None,
    precision: str = "default",
    impl: str = "auto",
) -> Tensor:
    r"""Causal LUCID self-attention: ``softmax(scale * Q K^T + causal) L^-1 V``.

    Args:
        query: ``(batch, heads, seq, head_dim)``; heads a multiple of key's (GQA).
        key: ``(batch, kv_heads, seq, head_dim)``.
        value: ``(batch, kv_heads, seq, value_dim)``; ``value_dim`` may differ from ``head_dim``.
        scale: of the softmax's scores; None is ``1/sqrt(head_dim)``.
        kernel_scale: of the preconditioner's; None is ``1/sqrt(head_dim)``.
        strength: None (1), a float in [0, 1] or a tensor ``(kv_heads,)``; 0 is softmax attention.
        key_mask: bool ``(batch, seq)``, False for padding, anywhere in the row: the output there is
            0 and nothing else changes, whatever the padded positions hold.
        precision: of the preconditioner, as in `lucid_attention.precondition`.
        impl: as in `lucid_attention.precondition`; ``"reference"`` also makes the softmax dense.

    Returns:
        ``(batch, heads, seq, value_dim)``, value's dtype and device. Memory is linear in ``seq``.

    Raises:
        TypeError, ValueError: as in `lucid_attention.precondition`.

    Source: arXiv 2602.10410, Algorithm 1.

    Example:
        >>> import torch
        >>> from lucid_attention import lucid_attention
        >>> query = torch.randn(2, 8, 100, 64)
        >>> key, value = torch.randn(2, 2, 2, 100, 64).unbind(0)  # 2 KV heads for 8 query heads
        >>> lucid_attention(query, key, value).shape
        torch.Size([2, 8, 100, 64])
    """
    impl = resolve_impl(impl)
    query, key, value = autocast(query), autocast(key), autocast(value)
    check_key_value(key, value)
    check_query(query, key)
    scale = resolve_scale("scale", scale, key.shape[-1], positive=False)
    check_key_mask(key_mask, key.shape[0], key.shape[2], key.device)
    preconditioned = precondition(
        key, value, kernel_scale=kernel_scale, strength=strength, key_mask=key_mask, precision=precision, impl=impl
    )  # fmt: skip
    if impl == "reference":
        with no_autocast(key):
            return reference.softmax_attention(
                query, key, preconditioned, scale=scale, key_mask=key_mask
            )
    if key_mask is None:
        return softmax_attention(query, key, preconditioned, scale=scale)
    tokens = key_mask[:, None, :, None]
    query = torch.where(tokens, query, 0.0)
    output = softmax_attention(query, key, preconditioned, scale=scale, key_mask=key_mask)
    return torch.where(tokens, output, 0.0)


def lucid_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int | None = None,
    scale: float | None = None,
    kernel_scale: float | None = None,
    strength: float | Tensor | None = None,
    precision: str = "default",
    impl: str = "auto",
) -> Tensor:
    r"""`lucid_attention` for sequences packed one after another; none sees another.

    Args:
        query: ``(total, heads, head_dim)``.
        key: ``(total, kv_heads, head_dim)``.
        value: ``(total, kv_heads, value_dim)``.
        cu_seqlens: int32 ``(sequences + 1,)``, from 0 to ``total``, never falling.
        max_seqlen: the longest sequence's length or more; None finds it, which synchronises an
            accelerator.
        scale, kernel_scale, strength, precision, impl: as in `lucid_attention`.

    Returns:
        ``(total, heads, value_dim)``, value's dtype and device.

    Raises:
        TypeError, ValueError: as in `lucid_attention.precondition_varlen`.

    Example:
        >>> import torch
        >>> from lucid_attention import lucid_attention_varlen
        >>> query, key, value = torch.randn(3, 30, 4, 64).unbind(0)
        >>> offsets = torch.tensor([0, 10, 30], dtype=torch.int32)
        >>> lucid_attention_varlen(query, key, value, offsets, max_seqlen=20).shape
        torch.Size([30, 4, 64])
    """
    impl = resolve_impl(impl)
    query, key, value = autocast(query), autocast(key), autocast(value)
    check_key_value(key, value, packed=True)
    check_query(query, key, packed=True)
    check_cu_seqlens(cu_seqlens, max_seqlen, key)
    scale = resolve_scale("scale", scale, key.shape[-1], positive=False)
    max_seqlen = _longest(cu_seqlens, max_seqlen)
    preconditioned = precondition_varlen(
        key,
        value,
        cu_seqlens,
        max_seqlen=max_seqlen,
        kernel_scale=kernel_scale,
        strength=strength,
        precision=precision,
        impl=impl,
    )
    if impl == "reference":
        return _dense_varlen(query, key, preconditioned, cu_seqlens.tolist(), scale)
    return softmax_attention_varlen(
        query, key, preconditioned, cu_seqlens, max_seqlen=max_seqlen, scale=scale
    )


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    query_start: int | Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal softmax attention in linear memory, for whole sequences, chunks and single tokens.

    Args:
        query: ``(batch, heads, queries, head_dim)``.
        key: ``(batch, kv_heads, keys, head_dim)``; value: ``(batch, kv_heads, keys, value_dim)``.
        scale: None is ``1/sqrt(head_dim)``.
        key_mask: bool ``(batch, keys)``, False for keys that nobody sees, whatever they hold.
        query_start: position of the first query among the keys: query ``i`` sees the keys
            ``j <= query_start + i``. None aligns the ends (``keys - queries``); an int64 tensor of
            shape ``()`` on query's device (a pre-allocated cache's) is never read by the host.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sinks: ``(heads,)`` scores of one more key that all see and whose value is 0.
        dropout: probability of dropping an attention weight (on a CPU this takes quadratic memory).

    Returns:
        ``(batch, heads, queries, value_dim)``; rows that see no key are 0.

    Raises:
        ValueError: ``dropout`` together with ``softcap``, which no kernel offers.

    Example:
        >>> import torch
        >>> from lucid_attention.attention import softmax_attention
        >>> query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 10, 16)
        >>> softmax_attention(query, key, key).shape  # three new tokens after seven cached ones
        torch.Size([1, 4, 3, 16])
    """
    if scale is None:
        scale = query.shape[-1] ** -0.5
    query, key, value = autocast(query), autocast(key), autocast(value)
    _check_sinks(sinks, query.shape[1])
    queries, keys, width = query.shape[2], key.shape[2], value.shape[-1]
    aligned = query_start is None
    start = keys - queries if query_start is None else query_start
    square = aligned and queries == keys

    unfused = softcap is not None or (query.dtype == torch.float64 and query.device.type != "cpu")
    # Kernels multiply what is masked with -inf by it.
    unfused = unfused or scale <= 0
    if key_mask is not None or sinks is not None:
        # A feature's contribution is multiplied by scale: where that is tiny or negative, do without.
        unfused = unfused or scale < _LEAST_SCALE
    if not square and queries > 1 and not dropout and query.device.type == "cpu":
        # Written-out masks would be saved for backward, one row of keys for every query.
        operands = (query, key, value)
        unfused = unfused or (torch.is_grad_enabled() and any(x.requires_grad for x in operands))
    if unfused:
        if dropout:
            raise ValueError(
                f"dropout must be 0 with softcap, in float64 on an accelerator, with a scale that is not positive, or with a "
                f"mask and a scale below {_LEAST_SCALE}, got {dropout}: no kernel offers both. Set the model's "
                f"attention dropout to 0."
            )
        position = torch.arange(queries, device=query.device)
        refuse_forward_mode(query, key, value, sinks)
        return blocked_softmax(
            query,
            key,
            value,
            torch.zeros_like(position),
            (position + start).clamp(max=keys - 1),
            key_mask,
            sinks,
            scale,
            softcap,
            keys if square else None,
        )[0]

    if key_mask is not None:
        padding = ~key_mask[:, None, :, None]
        key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)
    if queries == 1 and sinks is None:
        visible = None if key_mask is None else key_mask[:, None, None, :]
        if not aligned:
            position = torch.arange(keys, device=query.device)
            causal = (position <= start)[None, None, None, :]
            visible = causal if visible is None else visible & causal
        return _sdpa(query, key, value, scale, dropout, attn_mask=visible)

    query, key, value = _extend(query, key, value, scale, key_mask, sinks)
    if square:
        if sinks is not None:  # the sink is key 0: a query 0 before the others keeps the square
            query = F.pad(query, (0, 0, 1, 0))
        output = _sdpa(query, key, value, scale, dropout, is_causal=True)
        return output[:, :, output.shape[2] - queries :, :width]
    if aligned and queries <= keys and query.device.type == "cuda":
        bias = causal_lower_right(queries, key.shape[2])
        return _sdpa(query, key, value, scale, dropout, attn_mask=bias)[..., :width]
    sink = 0 if sinks is None else 1
    column = torch.arange(key.shape[2], device=query.device) - sink
    outputs = []
    for low in range(0, queries, _MASK_ROWS):
        row = torch.arange(low, min(low + _MASK_ROWS, queries), device=query.device)
        visible = column[None, :] <= (row + start)[:, None]
        part = query[:, :, low : low + _MASK_ROWS]
        outputs.append(_sdpa(part, key, value, scale, dropout, attn_mask=visible[None, None]))
    return torch.cat(outputs, dim=2)[..., :width] if outputs else query[..., :width]


def softmax_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention within each packed sequence, in linear memory.

    With ``max_seqlen`` given nothing synchronises the device.

    Args:
        query: ``(total, heads, head_dim)``; key: ``(total, kv_heads, head_dim)``; value:
            ``(total, kv_heads, value_dim)``.
        cu_seqlens, max_seqlen: as in `lucid_attention_varlen`.
        scale, softcap, sinks: as in `softmax_attention`.

    Returns:
        ``(total, heads, value_dim)``.
    """
    if scale is None:
        scale = query.shape[-1] ** -0.5
    query, key, value = autocast(query), autocast(key), autocast(value)
    _check_sinks(sinks, query.shape[1])
    max_seqlen = _longest(cu_seqlens, max_seqlen)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_offsets(cu_seqlens.tolist(), query.shape[0], max_seqlen)
    width = max(query.shape[-1], value.shape[-1])
    fused = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and width <= 256
    plain = softcap is None and sinks is None and scale > 0
    if fused and varlen_attn is not None and max_seqlen and plain:
        output = _packed_kernel(query, key, value, cu_seqlens, max_seqlen, scale)
        return output[..., : value.shape[-1]]
    position = torch.arange(query.shape[0], device=query.device)
    if cu_seqlens.shape[0] > 1:
        offsets = cu_seqlens.long()
        sequence = torch.searchsorted(offsets[1:], position, right=True)
        first = offsets[sequence.clamp(max=cu_seqlens.shape[0] - 2)]
    else:
        first = torch.zeros_like(position)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    refuse_forward_mode(query, key, value, sinks)
    output = blocked_softmax(
        query, key, value, first, position, None, sinks, scale, softcap, max_seqlen
    )[0]
    return output[0].transpose(0, 1)


def _extend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    key_mask: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Carry padding in a feature, sinks in a key, and pad to widths that fused kernels take.

    A written-out mask would rule the linear-memory kernels out. Instead one more feature adds a
    large negative number to the score of every padded key, and another (with one more key in front,
    whose value is 0) adds each head's sink.
    """
    features = []
    if key_mask is not None:
        # As far below every real score as the dtype reaches: a key must not win because the others
        # score low. float16 ends at 65504, so both factors take their part.
        half = query.dtype == torch.float16
        lift, drop = (6e4, -6e4) if half else (1.0, -1e30)
        column = torch.where(key_mask, 0.0, drop).to(key.dtype)[:, None, :, None]
        features.append((query.new_full((1, 1, 1, 1), lift), column))
    if sinks is not None:
        key, value = F.pad(key, (0, 0, 1, 0)), F.pad(value, (0, 0, 1, 0))
        features = [(row, F.pad(column, (0, 0, 1, 0))) for row, column in features]
        first = (torch.arange(key.shape[2], device=key.device) == 0).to(key.dtype)
        exact = sinks.to(compute_dtype(query)) / scale
        row = exact.to(query.dtype)
        rest = (exact - row).to(query.dtype)  # what half precision drops, as a second feature
        for part in (row, rest):
            features.append((part[None, :, None, None], first[None, None, :, None]))
    for row, column in features:
        query = torch.cat((query, row.expand(*query.shape[:-1], 1)), dim=-1)
        key = torch.cat((key, column.expand(*key.shape[:-1], 1)), dim=-1)
    width = max(query.shape[-1], value.shape[-1])
    if query.is_cuda:  # the fused kernels want 16 bytes of alignment
        width = -(-width // 8) * 8
    return _widen(query, width), _widen(key, width), _widen(value, width)


def _widen(tensor: Tensor, width: int) -> Tensor:
    """Zeros up to ``width`` features. By nothing is no call: ``F.pad`` would copy, and its gradient too."""
    missing = width - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing else tensor


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    dropout: float,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """PyTorch's fused attention; heads are expanded only where its kernels cannot share them."""
    # A branch, not bool(...): under torch.compile with dynamic shapes the head counts are symbols.
    enable_gqa = False
    if query.shape[1] != key.shape[1]:
        enable_gqa = True
    if enable_gqa and query.is_cuda and query.dtype == torch.float32:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        enable_gqa = False
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    if query.is_cuda and output.requires_grad and query.dtype in (torch.float16, torch.bfloat16):
        return _GradientLaidOutAlike.apply(output)
    return output


class _GradientLaidOutAlike(torch.autograd.Function):
    """The identity; its gradient gets the strides of the output, by a copy where it has others.

    PyTorch (2.6 to this day) keeps cuDNN's plans for the backward pass under the layouts of query, key and
    value alone, but builds in that of the gradient: a second call whose gradient lies otherwise runs the
    first one's plan, reads it in the wrong order and returns wrong gradients without a word.
    """

    @staticmethod
    def forward(output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        stride = inputs[0].stride()
        order: list[int] = []  # axes from outer to inner; `sorted` would take no symbols as keys
        for axis in range(output.dim()):
            order.insert(len([o for o in order if stride[o] >= stride[axis]]), axis)
        ctx.order = order

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        inverse = [ctx.order.index(axis) for axis in range(grad.dim())]
        return grad.permute(ctx.order).contiguous().permute(inverse)


def _packed_kernel(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    """PyTorch's packed flash attention: one width for all operands, a multiple of 8."""
    width = -(-max(query.shape[-1], value.shape[-1]) // 8) * 8
    query, key, value = (_widen(x, width) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    longest = max_seqlen
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
    output: Tensor = varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options
    )
    return output


def _longest(cu_seqlens: Tensor, max_seqlen: int | None) -> int | None:
    """``max_seqlen``, found where it is not given and the offsets can be read."""
    unknown = max_seqlen is None and cu_seqlens.shape[0] > 1 and not cu_seqlens.is_meta
    if unknown and not torch.compiler.is_compiling():
        return int(cu_seqlens.diff().max())
    return max_seqlen


def _check_sinks(sinks: Tensor | None, heads: int) -> None:
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(
            f"sinks must hold one score for each query head, expected shape ({heads},), got "
            f"{tuple(sinks.shape)}."
        )


def _dense_varlen(
    query: Tensor, key: Tensor, value: Tensor, offsets: list[int], scale: float
) -> Tensor:
    check_offsets(offsets, key.shape[0], None)
    outputs = []
    with no_autocast(key):
        for start, stop in pairwise(offsets):
            q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (query, key, value))
            dense = reference.softmax_attention(q, k, v, scale=scale, key_mask=None)
            outputs.append(dense[0].transpose(0, 1))
    if not outputs:
        return value.new_empty(0, query.shape[1], value.shape[-1])
    return torch.cat(outputs)
