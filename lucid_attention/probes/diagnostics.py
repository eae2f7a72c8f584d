"""Numbers about every KV head of a model on a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lucid_attention import precondition
from lucid_attention.precondition.reference import normalize_keys

from .capture import LayerTensors, capture
from .maps import attention_maps, lower_factor

__all__ = ["HeadDiagnosis", "condition_number", "diagnose"]


@dataclass(frozen=True)
class HeadDiagnosis:
    """One KV head of one layer; what is about query heads is their mean.

    Attributes:
        layer, kv_head: which.
        strength: of its preconditioner; in a softmax layer the one that was asked for.
        is_lucid: whether the model uses it.
        mean_key_cosine: over all pairs of different positions.
        row_sum: of ``P`` below the diagonal, the mean over rows.
        norm_ratio: ``||Y|| / ||V||``, Frobenius.
        condition: ``||L|| ||L^-1||``, spectral.
        sink: attention on the first token, the mean over all later queries.
        hit_rate: of the last query, ``A`` on the needle's tokens; NaN without a needle.
        hit_rate_preconditioned: the same of ``A L^-1``, the weights on the values; may be negative.
        solve_error: relative, of ``Y`` as this machine computes it in the model's dtype, against float64.
    """

    layer: int
    kv_head: int
    strength: float
    is_lucid: bool
    mean_key_cosine: float
    row_sum: float
    norm_ratio: float
    condition: float
    sink: float
    hit_rate: float
    hit_rate_preconditioned: float
    solve_error: float


@torch.no_grad()
def diagnose(
    model: Any,
    input_ids: Tensor,
    *,
    needle: Sequence[int] = (),
    layers: list[int] | None = None,
    strength: float | None = None,
) -> list[HeadDiagnosis]:
    """Diagnose every KV head of a model's full-attention layers on one text.

    Args:
        model: as for `capture`.
        input_ids: int64 ``(1, N)``, ``2 <= N <= 8192``.
        needle: positions of the tokens that the last one ought to attend to.
        layers: indices; None: all.
        strength: instead of the model's own; a softmax model's layers are looked at as if they were LUCID of strength 1.

    Returns:
        A row for each layer and KV head.

    Raises:
        ValueError: a text too short or too long, a needle outside it, and as `capture`.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lucid_attention.hf import enable
        >>> from lucid_attention.probes import diagnose
        >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
        >>> (row,) = diagnose(enable(LlamaForCausalLM(config)), torch.arange(9)[None], needle=[3])
        >>> row.is_lucid, row.solve_error < 1e-5, 0 <= row.hit_rate <= 1
        (True, True, True)
    """
    length = input_ids.shape[-1]
    if length < 2:
        raise ValueError(f"input_ids: expected at least 2 tokens, got {length}")
    if any(not 0 <= place < length for place in needle):
        raise ValueError(f"needle: expected positions in [0, {length}), got {list(needle)}")
    return [
        _diagnose(layer, kv_head, list(needle), strength)
        for layer in capture(model, input_ids, layers)
        for kv_head in range(layer.key.shape[0])
    ]


def _diagnose(
    layer: LayerTensors, kv_head: int, needle: list[int], strength: float | None
) -> HeadDiagnosis:
    key, value = layer.key[kv_head], layer.value[kv_head]
    factor = lower_factor(layer, kv_head, strength)
    if strength is None:
        strength = 1.0 if layer.strength is None else float(layer.strength[kv_head])
    exact = torch.linalg.solve_triangular(factor, value.double(), upper=False, unitriangular=True)
    solved = precondition(
        key[None, None], value[None, None], kernel_scale=layer.kernel_scale, strength=strength
    )[0, 0]
    length = key.shape[0]
    keys = normalize_keys(key.double())
    # sum over pairs of khat_i . khat_j / D, from the norm of their sum.
    squares = float(keys.square().sum())
    pairs = float(keys.sum(0).square().sum()) - squares
    sinks, hits, after = [], [], []
    for head in range(kv_head * layer.group, (kv_head + 1) * layer.group):
        before, preconditioned = attention_maps(layer, head, strength)
        sinks.append(float(before[1:, 0].mean()))
        hits.append(float(before[-1, needle].sum()) if needle else float("nan"))
        after.append(float(preconditioned[-1, needle].sum()) if needle else float("nan"))
    return HeadDiagnosis(
        layer=layer.layer,
        kv_head=kv_head,
        strength=strength,
        is_lucid=layer.strength is not None,
        mean_key_cosine=pairs / (squares * (length - 1)) if squares else 0.0,
        row_sum=float(factor.tril(-1).sum(1).mean()),
        norm_ratio=_ratio(exact.norm(), value.double().norm()),
        condition=condition_number(factor),
        sink=_mean(sinks),
        hit_rate=_mean(hits),
        hit_rate_preconditioned=_mean(after),
        solve_error=_ratio((solved.double() - exact).norm(), exact.norm()),
    )


def condition_number(factor: Tensor, steps: int = 60) -> float:
    """``||L|| ||L^-1||`` of a unit lower-triangular matrix, by power iteration: from below, and rarely 1 % off."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(factor.shape[0], 2, dtype=torch.float64, generator=generator)
    forward = inverse = start.to(factor.device)
    norms = (torch.zeros(2), torch.zeros(2))
    for _ in range(steps):
        forward = forward / forward.norm(dim=0)
        inverse = inverse / inverse.norm(dim=0)
        ahead = factor @ forward
        back = torch.linalg.solve_triangular(factor, inverse, upper=False, unitriangular=True)
        norms = (ahead.norm(dim=0), back.norm(dim=0))
        forward = factor.mT @ ahead
        inverse = torch.linalg.solve_triangular(factor.mT, back, upper=True, unitriangular=True)
    return float(norms[0].max() * norms[1].max())


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(a / b) if float(b) else 0.0
