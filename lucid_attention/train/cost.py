"""Flops of a training step, and what share of a GPU's peak they are."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["flops_per_token", "parameters", "peak_flops"]

# Dense bfloat16, FLOP/s, as the vendors state them.
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def parameters(model: Any) -> dict[str, int]:
    """How many there are, and how many of them a token is multiplied with (all but a lookup)."""
    total = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    return {"total": total, "multiplied": total if tied else total - embedding.numel()}


def flops_per_token(model: Any, length: int, *, is_lucid: bool | None = None) -> dict[str, float]:
    """Forward and backward, of rows of ``length`` tokens that are one document each.

    Six for every parameter that a token is multiplied with; causal attention, ``2 N D`` a query head forward and ``5 N D``
    backward; the solve, the same for every KV head of a LUCID layer. What gradient checkpointing computes again
    does not count. ``is_lucid``: whether the solves count; None: unless the strength is 0, as it may be when a schedule begins.
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    lucid = getattr(config, "lucid", None)
    if is_lucid is None:
        is_lucid = lucid is not None and lucid["strength"] != 0.0
    layers = len(lucid["layers"]) if lucid and is_lucid else 0
    found = {
        "matmul": 6.0 * parameters(model)["multiplied"],
        "attention": 7.0
        * length
        * head_dim
        * config.num_attention_heads
        * config.num_hidden_layers,
        "solve": 7.0 * length * head_dim * config.num_key_value_heads * layers,
    }
    return {**found, "total": sum(found.values())}


def peak_flops(device: torch.device) -> float | None:
    """Of the card, in bfloat16; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in _PEAKS.items() if card in name), None)
