"""Attention maps written out, before and after preconditioning: for looking at, at lengths that can be looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from lucid_attention.precondition.reference import kernel_matrix, normalize_keys

from .capture import LayerTensors

__all__ = ["LONGEST", "attention_maps", "lower_factor"]

LONGEST = 8192
"""Tokens: a map of a head is ``N x N`` in float64, 512 MiB here."""


def lower_factor(layer: LayerTensors, kv_head: int, strength: float | None = None) -> Tensor:
    """``L`` of one KV head, float64 ``(N, N)``; with the layer's strength, or another one, or 1 in a softmax layer."""
    keys = normalize_keys(layer.key[kv_head].double())
    _check_length(keys.shape[0])
    if strength is None:
        strength = 1.0 if layer.strength is None else float(layer.strength[kv_head])
    scale = keys.shape[-1] ** -0.5 if layer.kernel_scale is None else layer.kernel_scale
    below = strength * kernel_matrix(keys, keys, scale)
    return below.tril(-1) + torch.eye(keys.shape[0], dtype=torch.float64, device=keys.device)


def attention_maps(
    layer: LayerTensors, head: int, strength: float | None = None
) -> tuple[Tensor, Tensor]:
    """What a query head attends to, before and after the preconditioner.

    ``A = softmax(scale Q K^T)`` are the weights on ``Y``; ``A L^-1`` those on ``V``, since ``A Y = A L^-1 V``. The rows of the first
    add up to 1 (less with sinks); the second may be negative.

    Args:
        layer: from `capture`.
        head: query head.
        strength: instead of the layer's own (1 in a softmax layer).

    Returns:
        Both, float64 ``(N, N)``.

    Raises:
        ValueError: a text longer than `LONGEST`.
    """
    group = layer.group
    query, key = layer.query[head].double(), layer.key[head // group].double()
    _check_length(key.shape[0])
    scores = layer.scale * query @ key.mT
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(future, float("-inf"))
    if layer.sinks is not None:
        sink = layer.sinks[head].double().expand(scores.shape[0], 1)
        weights = torch.softmax(torch.cat((scores, sink), dim=1), dim=1)[:, :-1]
    else:
        weights = torch.softmax(scores, dim=1)
    factor = lower_factor(layer, head // group, strength)
    # A L^-1 = (L^-T A^T)^T
    after = torch.linalg.solve_triangular(factor.mT, weights.mT, upper=True, unitriangular=True).mT
    return weights, after


def _check_length(tokens: int) -> None:
    if tokens > LONGEST:
        raise ValueError(f"text: expected at most {LONGEST} tokens to write maps out, got {tokens}")
