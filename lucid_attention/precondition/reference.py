"""The dense definition of LUCID's operator: the oracle that every other path is tested against.

Quadratic memory, no custom gradient: plain PyTorch and its autograd, so that neither a shared
formula nor a shared shortcut can hide an error. In float64 inputs it computes in float64, in
anything narrower in float32.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .numerics import KEY_EPS, compute_dtype


def normalize_keys(key: Tensor) -> Tensor:
    """RMS-normalise keys: ``khat = k / sqrt(mean(k^2) + 1e-6)``, so that ``|khat|^2 = head_dim``.

    Args:
        key: ``(..., head_dim)``, any floating dtype; computed in float32 or wider.
    """
    key = key.to(compute_dtype(key))
    return key * torch.rsqrt(key.square().mean(-1, keepdim=True) + KEY_EPS)


def kernel_matrix(rows: Tensor, columns: Tensor, kernel_scale: float) -> Tensor:
    """``P_ij = exp(kernel_scale * (khat_i . khat_j - head_dim))`` for normalised keys."""
    return torch.exp(kernel_scale * (rows @ columns.mT - rows.shape[-1]))


def precondition(
    key: Tensor,
    value: Tensor,
    *,
    kernel_scale: float,
    strength: Tensor | None,
    key_mask: Tensor | None,
    past: tuple[Tensor, Tensor] | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Solve ``L Y = V`` with a dense ``L``; shapes as in `lucid_attention.precondition`."""
    dtype = compute_dtype(value)
    out_dtype, seq = out_dtype or value.dtype, value.shape[2]
    value = value.to(dtype)
    if key_mask is not None:
        tokens = key_mask[:, None, :, None]
        # where, not a product: padding may hold NaN, and 0 * NaN is NaN
        key = torch.where(tokens, key, 0.0)
        value = torch.where(tokens, value, 0.0)
    keys = normalize_keys(key)
    factor = 1.0 if strength is None else strength.to(dtype)[:, None, None]

    below = factor * kernel_matrix(keys, keys, kernel_scale)
    lower = torch.ones(seq, seq, dtype=torch.bool, device=key.device).tril(-1)
    if key_mask is not None:
        lower = lower & key_mask[:, None, :, None] & key_mask[:, None, None, :]
    below = torch.where(lower, below, 0.0)

    right = value
    if past is not None:
        answered = factor * kernel_matrix(keys, _past_keys(past), kernel_scale)
        right = right - answered @ past[1].to(dtype)
        if key_mask is not None:
            right = torch.where(tokens, right, 0.0)

    identity = torch.eye(seq, dtype=dtype, device=key.device)
    solution = torch.linalg.solve_triangular(
        below + identity, right, upper=False, unitriangular=True
    )
    return solution.to(out_dtype)


def _past_keys(past: tuple[Tensor, Tensor]) -> Tensor:
    """Normalised past keys; a padded row (its ``y`` is 0) is cleared of whatever is not finite."""
    past_key, past_preconditioned = past
    empty = (past_preconditioned == 0).all(-1, keepdim=True)
    return normalize_keys(torch.where(empty & ~past_key.isfinite(), 0.0, past_key))


def precondition_varlen(
    key: Tensor,
    value: Tensor,
    offsets: list[int],
    *,
    kernel_scale: float,
    strength: Tensor | None,
) -> Tensor:
    """Solve every packed sequence by itself; shapes as in `lucid_attention.precondition_varlen`."""
    solved = [
        precondition(
            key[start:stop].transpose(0, 1)[None],
            value[start:stop].transpose(0, 1)[None],
            kernel_scale=kernel_scale,
            strength=strength,
            key_mask=None,
            past=None,
        )[0].transpose(0, 1)
        for start, stop in pairwise(offsets)
    ]
    return torch.cat(solved) if solved else torch.zeros_like(value)


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, key_mask: Tensor | None
) -> Tensor:
    """Dense causal softmax attention with GQA; rows at padding are 0."""
    dtype, seq = compute_dtype(value), key.shape[2]
    groups = query.shape[1] // max(key.shape[1], 1)
    visible = torch.ones(seq, seq, dtype=torch.bool, device=key.device).tril()
    value_dtype = value.dtype
    if key_mask is not None:
        tokens = key_mask[:, None, :, None]
        query, key, value = (torch.where(tokens, x, 0.0) for x in (query, key, value))
        visible = visible & key_mask[:, None, None, :]
    key, value = (x.to(dtype).repeat_interleave(groups, dim=1) for x in (key, value))
    scores = scale * (query.to(dtype) @ key.mT)
    weights = torch.softmax(scores.masked_fill(~visible, torch.finfo(dtype).min), dim=-1)
    output = weights @ value
    if key_mask is not None:
        output = torch.where(tokens, output, 0.0)
    return output.to(value_dtype)
