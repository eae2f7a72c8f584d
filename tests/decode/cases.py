"""Decoding steps with a cache, and what float64 says about them; shares nothing with the package."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lucid_attention import lucid_attention_with_kvcache
from tests.conftest import make_keys


@dataclass
class Case:
    """A step's shape; ``lengths``: cached tokens of each row of the batch."""

    lengths: tuple[int, ...]
    kv_heads: int = 2
    group: int = 2
    tokens: int = 1
    width: int = 32
    value_width: int = 32
    capacity: int = 0
    dtype: torch.dtype = torch.float16
    y_dtype: torch.dtype = torch.float16
    keys: str = "cos0.5"
    page: int = 0
    padding: str = ""
    strength: bool = False
    softcap: float | None = None
    sinks: bool = False
    uniform: bool = False

    def __post_init__(self) -> None:
        if not self.capacity:
            whole = max(self.lengths) + self.tokens + 5
            self.capacity = -(-whole // self.page) * self.page if self.page else whole


class Step:
    """The operands of a case, made once; caches are NaN wherever nothing was written."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case, self.device = case, device
        batch, heads, n = len(case.lengths), case.kv_heads, case.capacity
        torch.manual_seed(sum(case.lengths))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64)

        keys = make_keys(case.keys, batch, heads, n, case.width).to(case.dtype)
        self.query = normal(batch, heads * case.group, case.tokens, case.width).to(case.dtype)
        self.value = normal(batch, heads, case.tokens, case.value_width).to(case.dtype)
        self.scale = None
        y = normal(batch, heads, n, case.value_width)
        if case.y_dtype == torch.float16:
            self.scale = torch.exp2(torch.arange(batch * heads).view(batch, heads) % 5 - 2.0)
            y = y / self.scale[:, :, None, None]
        stored = y.to(case.y_dtype)
        self.lengths = torch.tensor(case.lengths, dtype=torch.int32)
        place = self.lengths[:, None] + torch.arange(case.tokens)
        self.key = torch.stack([k[:, at] for k, at in zip(keys, place, strict=True)])
        self.mask = None
        column = torch.arange(n)
        if case.padding == "left":
            self.mask = column >= torch.arange(1, batch + 1)[:, None]
        elif case.padding == "anywhere":
            self.mask = torch.rand(batch, n) > 0.3
            self.mask[:, 0] = False
        if self.mask is not None:
            stored = torch.where(self.mask[:, None, :, None], stored, 0.0)
        written = (column < self.lengths[:, None])[:, None, :, None]
        self.key_cache = torch.where(written, keys, math.nan)
        self.y_cache = torch.where(written, stored, math.nan)
        self.table = None
        if case.page:
            self._page()
        self.strength = torch.linspace(0.1, 1.0, heads) if case.strength else None
        self.sinks = normal(heads * case.group).float() if case.sinks else None
        for name, tensor in vars(self).items():
            if isinstance(tensor, Tensor):
                setattr(self, name, tensor.to(device))

    def _page(self) -> None:
        """Pages in any order, some of nobody, entries beyond the last page out of range."""
        case, batch = self.case, len(self.case.lengths)
        each = case.capacity // case.page
        order = torch.randperm(batch * each + 3)[: batch * each].view(batch, each)
        caches = []
        for cache in (self.key_cache, self.y_cache):
            size = (batch * each + 3, case.kv_heads, case.page, cache.shape[-1])
            pages = torch.full(size, math.nan, dtype=cache.dtype)
            split = cache.unflatten(2, (each, case.page)).transpose(1, 2)
            pages[order] = split
            caches.append(pages)
        self.key_cache, self.y_cache = caches
        needed = -(-(self.lengths + case.tokens) // case.page)
        beyond = torch.arange(each) >= needed[:, None]
        self.order = order
        self.table = torch.where(beyond, 10**6, order).to(torch.int32)

    def dense(self) -> tuple[Tensor, Tensor]:
        """The caches by rows of the batch, in float64 and in full."""
        keys, ys = self.key_cache, self.y_cache
        if self.table is not None:
            keys, ys = (x[self.order].transpose(1, 2).flatten(2, 3) for x in (keys, ys))
        unit = 1.0 if self.scale is None else self.scale[:, :, None, None].double()
        return keys.double(), ys.double() * unit

    def run(self, impl: str, **more: Any) -> Tensor:
        lengths = self.lengths[:1] if self.case.uniform else self.lengths
        return lucid_attention_with_kvcache(
            self.query, self.key, self.value, self.key_cache, self.y_cache, lengths,
            **{
                "y_scale": self.scale, "key_mask": self.mask, "block_table": self.table,
                "strength": self.strength, "softcap": self.case.softcap, "sinks": self.sinks,
                "impl": impl, **more,
            },
        )  # fmt: skip

    def added(self) -> tuple[Tensor, Tensor]:
        """The rows that were appended, float64 and in full."""
        keys, ys = self.dense()
        spans = [slice(n, n + self.case.tokens) for n in self.case.lengths]
        return (
            torch.stack([k[:, span] for k, span in zip(keys, spans, strict=True)]),
            torch.stack([y[:, span] for y, span in zip(ys, spans, strict=True)]),
        )

    def expected(self) -> tuple[Tensor, Tensor]:
        """Output and new rows of Y, position by position."""
        case, width = self.case, self.case.width
        keys, ys = (x.cpu() for x in self.dense())
        query, key, value = (x.double().cpu() for x in (self.query, self.key, self.value))
        output = torch.zeros(*query.shape[:3], case.value_width, dtype=torch.float64)
        new = torch.zeros_like(value)
        for b, n in enumerate(case.lengths):
            real = torch.ones(n + case.tokens, dtype=torch.bool)
            if self.mask is not None:
                real = self.mask[b, : n + case.tokens].cpu()
            for h in range(case.kv_heads):
                k = torch.cat([keys[b, h, :n], key[b, h]])
                k = torch.where(real[:, None], k, 0.0)
                y = torch.cat([ys[b, h, :n], torch.zeros_like(value[b, h])])
                y = torch.where(real[:, None], y, 0.0)
                khat = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + 1e-6)
                factor = 1.0 if self.strength is None else self.strength[h].double().item()
                for i in range(case.tokens):
                    at = n + i
                    if not real[at]:
                        continue
                    p = factor * torch.exp((khat[:at] @ khat[at] - width) / math.sqrt(width))
                    y[at] = value[b, h, i] - (p * real[:at]) @ y[:at]
                    for g in range(case.group):
                        q = query[b, h * case.group + g, i]
                        s = k[: at + 1] @ q / math.sqrt(width)
                        if case.softcap:
                            s = case.softcap * torch.tanh(s / case.softcap)
                        s = s.masked_fill(~real[: at + 1], -math.inf)
                        if self.sinks is not None:
                            s = torch.cat([s, self.sinks[h * case.group + g].double().cpu()[None]])
                        w = torch.softmax(s, 0)[: at + 1]
                        output[b, h * case.group + g, i] = w @ y[: at + 1]
                new[b, h] = y[n:]
        return output, new


CASES = {
    "one token": Case((200,), uniform=True),
    "nothing cached": Case((0, 0), uniform=True),
    "ragged": Case((130, 0, 1, 64), tokens=1, group=4),
    "ragged, a few tokens": Case((65, 3, 128), tokens=5, group=3),
    "many tokens": Case((70, 9), tokens=16, group=1),
    "odd widths": Case((100, 37), width=68, value_width=36, tokens=2),
    "wider values": Case((90, 5), width=16, value_width=80),
    "D 128, group 8": Case((140, 7), width=128, value_width=128, group=8, kv_heads=1),
    "D 256": Case((70, 70), width=256, value_width=256, group=1, uniform=True),
    "D 96": Case((66, 2), width=96, value_width=96, tokens=3),
    "left padding": Case((80, 90, 100), padding="left", tokens=2),
    "padding anywhere": Case((80, 9), padding="anywhere", tokens=4, strength=True),
    "pages of 16": Case((100, 0, 17), page=16, tokens=3),
    "pages of 64": Case((100, 64, 1), page=64, tokens=2, width=64, value_width=64),
    "pages of 128": Case((300, 127), page=128, width=64, value_width=128, group=4),
    "pages and padding": Case((50, 20), page=32, padding="anywhere", tokens=2),
    "strength, softcap, sinks": Case((99, 12), strength=True, softcap=3.0, sinks=True, tokens=2),
    "float32": Case((150, 30), dtype=torch.float32, y_dtype=torch.float32, tokens=2),
    "float32, Y in float16": Case((150, 30), dtype=torch.float32),
    "bfloat16, Y in float32": Case((150, 30), dtype=torch.bfloat16, y_dtype=torch.float32),
    "bfloat16": Case((150, 30), dtype=torch.bfloat16, width=64, value_width=64),
    "Y in bfloat16": Case((150, 30), dtype=torch.bfloat16, y_dtype=torch.bfloat16),
    **{
        f"keys {kind}": Case((130, 20), keys=kind, tokens=3, group=1)
        for kind in ("cos0.8", "cos0.99", "identical", "repeated", "zero", "mixed")
    },
}  # fmt: skip
