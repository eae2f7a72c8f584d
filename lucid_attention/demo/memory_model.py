"""The one-layer model of the memory part: the same for softmax and LUCID but for one line."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lucid_attention import lucid_attention

__all__ = ["Attention", "MemoryModel", "Positions"]

Attention = Literal["softmax", "LUCID"]
Positions = Literal["NoPE", "RoPE"]


class MemoryModel(nn.Module):
    """Embeddings, one pre-norm attention layer, one MLP, a linear read-out.

    A position's input is ``embed(key) + embed(value)``, with one more value for "blank" (a query).

    Args:
        keys, values: of the task.
        width, heads: model width, divisible by ``heads``.
        attention: ``"softmax"`` or ``"LUCID"``; it has no parameters, so twins share their weights.
        positions: ``"NoPE"`` (no position encoding) or ``"RoPE"``.
        generator: draws the initial weights.
    """

    def __init__(
        self,
        *,
        keys: int,
        values: int,
        width: int,
        heads: int,
        attention: Attention,
        positions: Positions,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.attention = attention
        self.positions = positions
        self.key_embedding = nn.Embedding(keys, width)
        self.value_embedding = nn.Embedding(values + 1, width)
        self.attention_norm = nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_output = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.output_norm = nn.RMSNorm(width)
        self.read_out = nn.Linear(width, values)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, 0.0, 0.05, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, key: Tensor, value: Tensor) -> Tensor:
        """Logits ``(batch, length, values)`` for ids ``key`` and ``value``, ``(batch, length)``."""
        hidden = self.key_embedding(key) + self.value_embedding(value)
        hidden = hidden + self._attend(self.attention_norm(hidden))
        hidden = hidden + self.mlp(self.mlp_norm(hidden))
        logits: Tensor = self.read_out(self.output_norm(hidden))
        return logits

    def _attend(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        split = self.query_key_value(hidden).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        if self.positions == "RoPE":
            query, key = rotate(query), rotate(key)
        if self.attention == "LUCID":
            read = lucid_attention(query, key, value)
        else:
            read = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.attention_output(read.transpose(1, 2).reshape(hidden.shape))
        return output


def rotate(x: Tensor, *, base: float = 10_000.0) -> Tensor:
    """Rotary position encoding of ``x``, ``(..., length, head_dim)``, head_dim even.

    Source: Su et al., RoFormer, arXiv 2104.09864.
    """
    length, width = x.shape[-2:]
    frequency = base ** (-torch.arange(0, width, 2, device=x.device) / width)
    angle = torch.arange(length, device=x.device)[:, None] * frequency
    cosine, sine = angle.cos(), angle.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
