"""The public operator ``V -> Y = L^-1 V``: checks, choice of implementation, docstrings."""

from __future__ import annotations

import torch
from torch import Tensor

from . import operators, reference
from .autocast import autocast, no_autocast
from .differentiation import refuse_forward_mode
from .validation import (
    check_cu_seqlens,
    check_key_mask,
    check_key_value,
    check_offsets,
    check_past,
    check_strength_contents,
    resolve_impl,
    resolve_out_dtype,
    resolve_precision,
    resolve_scale,
    resolve_strength,
)


def precondition(
    key: Tensor,
    value: Tensor,
    *,
    kernel_scale: float | None = None,
    strength: float | Tensor | None = None,
    key_mask: Tensor | None = None,
    past: tuple[Tensor, Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
    precision: str = "default",
    impl: str = "auto",
) -> Tensor:
    r"""Precondition values by their keys' correlations: ``Y = L^-1 V``.

    ``L`` is unit lower triangular, one per batch row and KV head::

        khat_i = key_i / sqrt(mean(key_i^2) + 1e-6)
        L_ij   = strength * exp(kernel_scale * (khat_i . khat_j - head_dim))    for j < i
        y_i    = value_i - sum_{j<i} L_ij y_j

    ``y_i`` is the part of ``value_i`` that the memory did not already answer for ``key_i``. For any
    keys and any length ``|Y|_F <= 2 |V|_F``. Follow it with a causal softmax attention over ``Y``
    (`lucid_attention.lucid_attention` does both).

    Args:
        key: ``(batch, kv_heads, seq, head_dim)``, float16, bfloat16, float32 or float64, any
            strides; as the attention sees it (after RoPE and QK-norm).
        value: ``(batch, kv_heads, seq, value_dim)``, key's dtype and device.
        kernel_scale: positive; None is ``1/sqrt(head_dim)``, whatever the softmax's scale is.
        strength: None (1, LUCID), a float in [0, 1] (0 returns ``value``: softmax attention), or a
            float32 tensor ``(kv_heads,)`` in [0, 1], which may need a gradient.
        key_mask: bool ``(batch, seq)``, False for padding, anywhere in the row: there ``y`` is
            exactly 0 and nothing else changes, whatever key and value hold.
        past: ``(past_key, past_preconditioned)``, each ``(batch, kv_heads, past, ..)``: key and
            value are a chunk that follows it, and ``key_mask`` covers the chunk only. Every split
            of a sequence into chunks gives the same ``Y``, to rounding. ``past_preconditioned`` may
            be wider than value's dtype (keep it in float32 where that matters); its rows that are
            all 0 count as padding, whatever their keys hold.
        out_dtype: of the result; None is value's. float32 keeps what rounding to a narrower value's
            dtype drops: for a cache that later tokens are solved from. Gradients are value's all the same.
        precision: of float16 and bfloat16 inputs inside the kernels. ``"default"`` rounds ``L``'s entries to
            float16, an error that grows with length where keys are alike: at 128K tokens, cosine .8 and ``head_dim``
            128, 5e-3 before ``Y`` itself is rounded (which ``out_dtype=torch.float32`` spares it). ``"high"`` takes
            them in two halves, 6e-4 there, for 1.1 to 1.6 times the time forward (few heads: up to 2.3) and 1.0 to 2.2 times backward where
            Hopper's own kernels serve (head sizes above 32, mostly with ``value_dim`` alike; no ``past``); other
            calls are then computed in float32, at a tenth of the speed or less. Wider inputs and the other implementations
            have more precision than either. It has nothing to do with PyTorch's setting for float32 products.
        impl: ``"auto"`` takes the GPU kernels where they run (CUDA, compute capability 8.0, Triton
            3.4, float16/bfloat16/float32, head sizes up to 256) and ``"blocked"`` elsewhere, and for
            a chunk of less than 128 tokens after a past.
            ``"triton"``: the kernels; ``"blocked"``: torch only, any device; ``"reference"``: the
            dense definition, quadratic memory. A named choice never falls back.

    Returns:
        ``Y``, value's shape and device, contiguous, of ``out_dtype``. ``"blocked"`` computes float16 and
        bfloat16 in float32 and rounds once; the kernels multiply in float16 with range scaling and
        accumulate in float32 (docs/numerics.md). Under autocast, inputs are cast as for
        ``F.scaled_dot_product_attention``; ``strength`` and ``past_preconditioned`` are not.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices, ``kernel_scale``, ``strength``, ``precision`` or ``impl`` out of range; a
            strength tensor's contents are checked on the CPU only (elsewhere it would synchronise).
        RuntimeError: on a second derivative or in forward mode (``impl="reference"`` has both).

    Source: arXiv 2602.10410; ``lucid_attention/precondition/README.md`` derives it.

    Example:
        >>> import torch
        >>> from lucid_attention import precondition
        >>> key = torch.ones(1, 1, 3, 4)  # one key, written three times
        >>> value = torch.tensor([1.0, 2.0, 5.0]).view(1, 1, 3, 1)
        >>> precondition(key, value).round(decimals=3).flatten().tolist()  # what each write changed
        [1.0, 1.0, 3.0]
    """
    impl = resolve_impl(impl)
    key, value = autocast(key), autocast(value)
    check_key_value(key, value)
    kernel_scale = resolve_scale("kernel_scale", kernel_scale, key.shape[-1], positive=True)
    resolved = resolve_strength(strength, key, key.shape[1])
    check_key_mask(key_mask, key.shape[0], key.shape[2], key.device)
    if isinstance(past, (tuple, list)) and len(past) == 2:
        past = (autocast(past[0]), past[1])
    past = check_past(past, key, value)
    out_dtype = resolve_out_dtype(out_dtype, value)
    precision = resolve_precision(precision)
    if impl == "reference":
        check_strength_contents(resolved)
        with no_autocast(key):
            return reference.precondition(
                key,
                value,
                kernel_scale=kernel_scale,
                strength=resolved,
                key_mask=key_mask,
                past=past,
                out_dtype=out_dtype,
            )
    past_key, past_preconditioned = (None, None) if past is None else past
    refuse_forward_mode(key, value, resolved, past_key, past_preconditioned)
    solved: Tensor = operators.precondition(
        key, value, resolved, key_mask, past_key, past_preconditioned, kernel_scale, impl, precision, out_dtype
    )  # fmt: skip
    return solved


def precondition_varlen(
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int | None = None,
    kernel_scale: float | None = None,
    strength: float | Tensor | None = None,
    precision: str = "default",
    impl: str = "auto",
) -> Tensor:
    r"""`precondition` for sequences packed one after another, each solved by itself.

    Args:
        key: ``(total, kv_heads, head_dim)``.
        value: ``(total, kv_heads, value_dim)``.
        cu_seqlens: int32 ``(sequences + 1,)``, cumulative offsets: starts at 0, ends at ``total``,
            never falls; equal neighbours are an empty sequence. On key's device.
        max_seqlen: length of the longest sequence, or more. None finds it, which synchronises an
            accelerator; given, nothing does, and then it has to be right.
        kernel_scale, strength, precision, impl: as in `precondition`.

    Returns:
        ``Y`` ``(total, kv_heads, value_dim)``. A NaN stays in its own sequence and head.

    Raises:
        TypeError, ValueError: as in `precondition`; the offsets' contents are checked where they
            are read anyway (on the CPU, or with ``max_seqlen=None``).

    Example:
        >>> import torch
        >>> from lucid_attention import precondition_varlen
        >>> key, value = torch.ones(4, 1, 8), torch.ones(4, 1, 1)
        >>> offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
        >>> y = precondition_varlen(key, value, offsets, max_seqlen=2)
        >>> y.abs().round(decimals=3).flatten().tolist()
        [1.0, 0.0, 1.0, 0.0]
    """
    impl = resolve_impl(impl)
    key, value = autocast(key), autocast(value)
    check_key_value(key, value, packed=True)
    check_cu_seqlens(cu_seqlens, max_seqlen, key)
    kernel_scale = resolve_scale("kernel_scale", kernel_scale, key.shape[-1], positive=True)
    resolved = resolve_strength(strength, key, key.shape[1])
    precision = resolve_precision(precision)
    if impl == "reference":
        check_strength_contents(resolved)
        offsets = cu_seqlens.tolist()
        check_offsets(offsets, key.shape[0], max_seqlen)
        with no_autocast(key):
            return reference.precondition_varlen(
                key, value, offsets, kernel_scale=kernel_scale, strength=resolved
            )
    refuse_forward_mode(key, value, resolved)
    solved: Tensor = operators.precondition_varlen(
        key, value, cu_seqlens, resolved, max_seqlen, kernel_scale, impl, precision
    )
    return solved
