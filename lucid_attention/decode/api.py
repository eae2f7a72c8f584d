"""The public decode operator: checks, choice of implementation, docstring."""

from __future__ import annotations

import torch
from torch import Tensor

from lucid_attention.precondition.autocast import autocast, no_autocast
from lucid_attention.precondition.differentiation import refuse_transforms
from lucid_attention.precondition.registration import fake_of, operator_changing
from lucid_attention.precondition.validation import (
    check_key_mask,
    check_key_value,
    check_query,
    check_strength_contents,
    resolve_impl,
    resolve_scale,
    resolve_strength,
)

from . import stepwise
from .launch import counters_needed, decode, why_not_fused
from .validation import (
    check_block_table,
    check_caches,
    check_no_gradient,
    check_room,
    check_sinks,
    check_workspace,
    check_y_scale,
    resolve_lengths,
    resolve_softcap,
)


def lucid_attention_with_kvcache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    y_cache: Tensor,
    cache_seqlens: int | Tensor,
    *,
    y_scale: Tensor | None = None,
    key_mask: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    kernel_scale: float | None = None,
    strength: float | Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    workspace: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""LUCID attention of new tokens after a cached past; appends them to the cache, in place.

    For a row of the batch with ``n`` cached tokens, new token ``i`` is position ``n + i``::

        y_{n+i} = value_i - sum_{j < n+i} L_{n+i,j} y_j        L as in `lucid_attention.precondition`
        output_i = softmax_j(scale * query_i . key_j, j <= n+i) y_j

    On a GPU one kernel reads the cache once for both, for all query heads of a KV head, and writes the new
    rows: a decoding step costs what softmax attention costs. Nothing reads the device, so a step can be captured in a
    CUDA graph and replayed while ``cache_seqlens`` grows.

    Args:
        query: ``(batch, heads, tokens, head_dim)``, float16, bfloat16, float32 or float64; heads a
            multiple of key's. One token is a decoding step, a few are a speculation to verify, many a prompt.
        key: ``(batch, kv_heads, tokens, head_dim)``; value: ``(batch, kv_heads, tokens, value_dim)``.
        key_cache: ``(batch, kv_heads, capacity, head_dim)``, key's dtype, any strides with a contiguous last
            dimension. With ``block_table``: ``(pages, kv_heads, page_size, head_dim)``.
        y_cache: the preconditioned values, ``(.., value_dim)`` and as many rows; float16, bfloat16, float32 or
            float64, whatever value's dtype. float16 with ``y_scale`` keeps the accuracy of one full solve at half of
            float32's size; in bfloat16 new rows are less accurate (docs/numerics.md).
        cache_seqlens: tokens in the cache before this call: an int, or int32 or int64 ``()``, ``(1,)`` or
            ``(batch,)``. What lies behind them is never read (it may be NaN). It is not changed: add ``tokens`` to it.
        y_scale: float32 ``(batch, kv_heads)``, powers of two: ``Y = y_cache * y_scale``. None is 1.
        key_mask: bool ``(batch, keys)``, False for padding among cached and new tokens, as it was when each
            was written; ``keys`` at least what is cached after the call. Output and ``y`` of padding are 0.
        block_table: int32 ``(batch, most pages)``: a sequence's rows ``p * page_size ..`` are page
            ``block_table[b, p]`` of the caches. Pages that new tokens go to belong to one sequence alone. Both are checked
            where the table can be read on the host; on a GPU what a length reaches must be pages of the cache.
        scale, kernel_scale, strength: as in `lucid_attention.lucid_attention`.
        softcap: scores of the softmax become ``softcap * tanh(scores / softcap)``.
        sinks: ``(heads,)`` scores of one more key that all see and whose value is 0.
        workspace: from `decode_workspace`, kept with a cache: saves a memory clearing each call. A workspace
            serves one call at a time.
        impl: ``"auto"`` takes the GPU kernels where they run and the tokens are few ((heads / kv_heads + 1) *
            tokens <= 64, tokens <= 16); otherwise the new tokens are solved by `lucid_attention.precondition` and
            attend by PyTorch operations. ``"triton"``: the kernels; ``"blocked"``: PyTorch, any device;
            ``"reference"``: the same with the dense solve. A named choice never falls back.

    Returns:
        ``(batch, heads, tokens, value_dim)``, query's dtype. If the new tokens do not fit, or a length is negative,
        and ``cache_seqlens`` could not be read on the host (a tensor on a GPU, or in a compiled call), that row's output
        is NaN and its cache is unchanged; without a GPU the same of a page that is not there in a compiled call.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or numbers out of range; a full cache; operands that need a gradient (solve with
            `lucid_attention.precondition` and ``past=`` to train).

    Source: arXiv 2602.10410, section on inference; the name and the arguments follow flash-attention's
    ``flash_attn_with_kvcache``.

    Example:
        >>> import torch
        >>> from lucid_attention import lucid_attention, lucid_attention_with_kvcache, precondition
        >>> query, key, value = torch.randn(3, 1, 2, 10, 16).unbind(0)
        >>> key_cache, y_cache = torch.zeros(2, 1, 2, 32, 16).unbind(0)
        >>> key_cache[:, :, :9] = key[:, :, :9]  # the prompt
        >>> y_cache[:, :, :9] = precondition(key[:, :, :9], value[:, :, :9])
        >>> new = [x[:, :, 9:] for x in (query, key, value)]
        >>> step = lucid_attention_with_kvcache(*new, key_cache, y_cache, cache_seqlens=9)
        >>> torch.allclose(step, lucid_attention(query, key, value)[:, :, 9:], atol=1e-5)
        True
    """
    impl = resolve_impl(impl)
    query, key, value = autocast(query), autocast(key), autocast(value)
    check_key_value(key, value)
    check_query(query, key)
    refuse_transforms("lucid_attention_with_kvcache", query, key, value, key_cache, y_cache)
    check_caches(key_cache, y_cache, key, value, block_table)
    check_no_gradient(query, key, value, key_cache, y_cache, y_scale, strength, sinks)
    check_block_table(block_table, key)
    batch, heads, tokens, width = key.shape
    scale = resolve_scale("scale", scale, width, positive=False)
    kernel_scale = resolve_scale("kernel_scale", kernel_scale, width, positive=True)
    resolved = resolve_strength(strength, key, heads)
    if not torch.compiler.is_compiling():
        check_strength_contents(resolved)
    check_y_scale(y_scale, key)
    capacity = key_cache.shape[2]
    if block_table is not None:
        capacity *= block_table.shape[1]
    if key_mask is not None:
        keys = (
            key_mask.shape[1] if isinstance(key_mask, Tensor) and key_mask.ndim == 2 else capacity
        )
        check_key_mask(key_mask, batch, keys, key.device)
        capacity = min(capacity, keys)
    check_sinks(sinks, query)
    softcap = resolve_softcap(softcap)
    lengths = resolve_lengths(cache_seqlens, key)
    check_room(cache_seqlens, tokens, capacity, block_table, key_cache)
    if batch * heads * tokens == 0:
        return query.new_empty((*query.shape[:3], value.shape[-1]))
    if workspace is None:
        workspace = decode_workspace(batch, heads, key.device)
    elif not torch.compiler.is_compiling():
        check_workspace(workspace, counters_needed(batch, heads, key.device), key)
    output: Tensor = with_kvcache(
        query, key, value, key_cache, y_cache, lengths, workspace, y_scale, key_mask, block_table,
        resolved, sinks, scale, kernel_scale, softcap, impl,
    )  # fmt: skip
    return output


def decode_workspace(batch: int, kv_heads: int, device: torch.device | str) -> Tensor:
    """What `lucid_attention_with_kvcache` needs between calls: int32 counters, 0 before and after each call.

    Example:
        >>> from lucid_attention.decode import decode_workspace
        >>> decode_workspace(2, 4, "cpu").dtype
        torch.int32
    """
    device = torch.device(device)
    return torch.zeros(counters_needed(batch, kv_heads, device), dtype=torch.int32, device=device)


@operator_changing("key_cache", "y_cache", "workspace")
def with_kvcache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    y_cache: Tensor,
    cache_seqlens: Tensor,
    workspace: Tensor,
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
    """The output; arguments as checked by the public function."""
    check_strength_contents(strength)  # a compiled call comes here unchecked
    arguments = (
        query, key, value, key_cache, y_cache, cache_seqlens, y_scale, key_mask, block_table,
        strength, sinks, scale, kernel_scale, softcap,
    )  # fmt: skip
    with no_autocast(key):
        if impl in ("auto", "triton"):
            reason = why_not_fused(query, key, value, y_cache, interpreter=impl == "triton")
            if reason is None:
                return decode(*arguments, workspace)
            if impl == "triton":
                raise ValueError(
                    f"impl='triton' cannot serve this call: {reason}. Use impl='auto' or impl='blocked'."
                )
        return stepwise.attend(*arguments, impl)


@fake_of("with_kvcache")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    y_cache: Tensor,
    cache_seqlens: Tensor,
    workspace: Tensor,
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
    return query.new_empty((*query.shape[:3], value.shape[-1]))
