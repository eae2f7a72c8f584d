"""Softmax attention by tiles: torch only, any device, memory linear in the length.

PyTorch's fused kernels do the work wherever they can (see `lucid_attention.attention`). This
operator serves what they do not: packed sequences outside half precision on CUDA, softcapped
scores, float64 on a GPU. It never synchronises the device and never holds more of the scores than a
tile. Names of shapes: C chains (batch x KV heads), G query heads per KV head, Q queries, M keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .precondition.autocast import no_autocast
from .precondition.blocked import BLOCK, tile_elements
from .precondition.differentiation import no_second_derivative
from .precondition.numerics import compute_dtype
from .precondition.registration import fake_of, operator


@operator
def blocked_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    reach: int | None,
) -> tuple[Tensor, Tensor]:
    """Attention in which query ``i`` sees the keys ``first_i <= j <= last_i`` that are not padding.

    Args:
        query: ``(batch, heads, Q, D)``; key, value: ``(batch, kv_heads, M, D)`` and ``(.., E)``.
        first, last: int64 ``(Q,)``, non-decreasing; ``first`` names a query's sequence.
        key_mask: bool ``(batch, M)``, False for padding.
        sinks: ``(heads,)``, the score of one more key whose value is 0.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        reach: on an accelerator, a promise that ``Q == M``, ``last_i <= i`` and
            ``i - first_i < reach``, which bounds the tiles to visit; None visits all.

    Returns:
        The output ``(batch, heads, Q, E)`` in value's dtype, 0 where a query sees nothing, and the
        log-sum-exp of its scores, ``(batch, heads, Q)``.
    """
    with no_autocast(query):
        problem = _Problem(query, key, value, first, last, key_mask, sinks, scale, softcap, reach)
        output = problem.query.new_empty(*problem.query.shape[:-1], value.shape[-1])
        lse = problem.query.new_empty(problem.query.shape[:-1])
        for part in problem.parts():
            for start, stop, low, high in problem.blocks():
                found = problem.attend(part, start, stop, low, high)
                output[part, :, start:stop], lse[part, :, start:stop] = found
        output.masked_fill_(problem.poisoned_queries()[..., None], float("nan"))
        shape = query.shape[:-1]
        return output.view(*shape, value.shape[-1]).to(value.dtype), lse.view(shape)


@fake_of("blocked_softmax")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    reach: int | None,
) -> tuple[Tensor, Tensor]:
    output = value.new_empty(*query.shape[:-1], value.shape[-1])
    return output, query.new_empty(query.shape[:-1], dtype=compute_dtype(query))


@operator
def blocked_softmax_backward(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    reach: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sinks (empty where there is none)."""
    with no_autocast(query):
        problem = _Problem(query, key, value, first, last, key_mask, sinks, scale, softcap, reach)
        grads = problem.gradients(grad, output, lse)
        return (
            grads.query.view(query.shape).to(query.dtype),
            grads.key.view(key.shape).to(key.dtype),
            grads.value.view(value.shape).to(value.dtype),
            query.new_empty(0) if sinks is None else grads.sinks.to(sinks.dtype),
        )


@fake_of("blocked_softmax_backward")
def _(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    reach: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        query.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, first, last, key_mask, sinks = inputs[:7]
    ctx.options = inputs[7:]
    ctx.save_for_backward(*output, query, key, value, first, last, key_mask, sinks)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: non-reentrant checkpointing makes them for one use
    grads = blocked_softmax_backward(grad, *saved, *ctx.options)
    sinks = None if saved[-1] is None else grads[3]
    return (*grads[:3], None, None, None, sinks, None, None, None)


blocked_softmax.differentiate(_backward, _save)
blocked_softmax_backward.differentiate(no_second_derivative)


class _Gradients(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor


class _Problem:
    """Operands in the chains' layout and compute dtype, free of NaN, and which tiles to visit.

    A tile multiplies hidden keys by a weight of 0, and 0 * NaN is NaN: rows that are not finite are
    solved as zeros and what they reach is marked afterwards, so a NaN neither spreads nor hides.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        first: Tensor,
        last: Tensor,
        key_mask: Tensor | None,
        sinks: Tensor | None,
        scale: float,
        softcap: float | None,
        reach: int | None,
    ) -> None:
        dtype = compute_dtype(query)
        batch, self.kv_heads, self.keys = key.shape[:3]
        groups = query.shape[1] // max(self.kv_heads, 1)
        chains = batch * self.kv_heads
        self.query = query.to(dtype).reshape(chains, groups, *query.shape[2:])
        self.key = key.to(dtype).reshape(chains, *key.shape[2:])
        self.value = value.to(dtype).reshape(chains, *value.shape[2:])
        self.first, self.last = first, last
        self.scale, self.softcap, self.reach = scale, softcap, reach
        self.reads_bounds = first.device.type == "cpu"
        self.tokens: Tensor | None = None
        self.sinks: Tensor | None = None
        if sinks is not None:
            self.sinks = sinks.to(dtype).view(self.kv_heads, groups).repeat(batch, 1)
        bad_keys = ~(self.key.isfinite().all(-1) & self.value.isfinite().all(-1))
        if key_mask is not None:
            self.tokens = key_mask.repeat_interleave(self.kv_heads, dim=0)
            bad_keys &= self.tokens
            hidden = bad_keys | ~self.tokens
        else:
            hidden = bad_keys
        self.bad_keys = bad_keys  # (C, M)
        self.bad_queries = ~self.query.isfinite().all(-1)  # (C, G, Q)
        self.key = self.key.masked_fill(hidden[..., None], 0.0)
        self.value = self.value.masked_fill(hidden[..., None], 0.0)
        self.query = self.query.masked_fill(self.bad_queries[..., None], 0.0)

    def parts(self) -> Iterator[slice]:
        """Chains, as many at a time as a tile of a useful shape allows."""
        chains, groups, queries, _ = self.query.shape
        tile = max(1, groups) * max(1, min(queries, BLOCK)) * max(1, min(self.keys, 512))
        step = max(1, tile_elements(self.query.device) // tile)
        for start in range(0, chains, step):
            yield slice(start, min(start + step, chains))

    def blocks(self) -> Iterator[tuple[int, int, int, int]]:
        """``(start, stop, low, high)``: a block of queries and the keys that they can see."""
        queries = self.query.shape[2]
        for start in range(0, queries, BLOCK):
            stop = min(start + BLOCK, queries)
            low, high = 0, self.keys
            if self.reads_bounds:
                low, high = int(self.first[start]), int(self.last[stop - 1]) + 1
            elif self.reach is not None:
                low, high = max(0, start - self.reach + 1), stop
            yield start, stop, low, max(low, high)

    def attend(
        self, part: slice, start: int, stop: int, low: int, high: int
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of queries ``start:stop`` against keys ``low:high``."""
        query = self.query[part, :, start:stop]
        shape = (*query.shape[:-1], 1)
        top = query.new_full(shape, float("-inf"))
        total = query.new_zeros(shape)
        output = query.new_zeros(*query.shape[:-1], self.value.shape[-1])
        for tile in self._tiles(query, low, high):
            scores, _ = self._scores(part, query, start, stop, tile)
            new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
            # -inf - -inf is NaN: a query that has seen nothing yet is measured from 0.
            origin = new_top.masked_fill(new_top == float("-inf"), 0.0)
            weights = torch.exp(scores - origin)
            fade = torch.exp(top - origin)
            total = total * fade + weights.sum(-1, keepdim=True)
            output = output * fade + weights @ self.value[part, None, tile]
            top = new_top
        if self.sinks is not None:
            sink = self.sinks[part, :, None, None]
            new_top = torch.maximum(top, sink)
            fade = torch.exp(top - new_top)
            total = total * fade + torch.exp(sink - new_top)
            output = output * fade
            top = new_top
        seen = total > 0
        output = torch.where(seen, output / total, 0.0)
        # +inf where nothing is seen: the weights exp(score - lse) are then 0 in the backward pass.
        lse = torch.where(seen, top + torch.log(total), float("inf"))
        return output, lse.squeeze(-1)

    def gradients(self, grad: Tensor, output: Tensor, lse: Tensor) -> _Gradients:
        """The usual backward pass of attention, tile by tile."""
        shape = self.query.shape[:-1]
        grad = grad.to(self.query.dtype).reshape(*shape, grad.shape[-1])
        output = output.to(self.query.dtype).reshape(*shape, output.shape[-1])
        lse = lse.reshape(*shape, 1)
        bad = self.bad_queries | ~(grad.isfinite().all(-1) & output.isfinite().all(-1))
        grad = grad.masked_fill(bad[..., None], 0.0)
        output = output.masked_fill(bad[..., None], 0.0)
        mean = (grad * output).sum(-1, keepdim=True)
        found = _Gradients(
            torch.zeros_like(self.query),
            torch.zeros_like(self.key),
            torch.zeros_like(self.value),
            self._sink_gradient(mean, lse, bad),
        )
        for part in self.parts():
            for start, stop, low, high in self.blocks():
                query = self.query[part, :, start:stop]
                grad_block = grad[part, :, start:stop]
                for tile in self._tiles(query, low, high):
                    scores, slope = self._scores(part, query, start, stop, tile)
                    weights = torch.exp(scores - lse[part, :, start:stop])
                    found.value[part, tile] += (weights.mT @ grad_block).sum(1)
                    weights *= (
                        grad_block @ self.value[part, None, tile].mT - mean[part, :, start:stop]
                    )
                    if slope is not None:
                        weights *= slope
                    weights *= self.scale
                    found.query[part, :, start:stop] += weights @ self.key[part, None, tile]
                    found.key[part, tile] += (weights.mT @ query).sum(1)
        self._mark(found, bad)
        return found

    def poisoned_queries(self) -> Tensor:
        """Queries ``(C, G, Q)`` that are not finite or see a key or value that is not."""
        count = torch.nn.functional.pad(self.bad_keys.long().cumsum(-1), (1, 0))
        beyond = torch.maximum(self.last + 1, self.first)  # a query before the first key sees none
        seen = count[:, beyond] - count[:, self.first]
        return self.bad_queries | (seen > 0)[:, None, :]

    def _sink_gradient(self, mean: Tensor, lse: Tensor, bad: Tensor) -> Tensor:
        if self.sinks is None:
            return mean.new_empty(0)
        weight = torch.exp(self.sinks[..., None] - lse.squeeze(-1))
        grad = -(weight * mean.squeeze(-1)).sum(-1)
        grad = grad.masked_fill(bad.any(-1), float("nan"))
        groups = self.query.shape[1]
        return grad.view(-1, self.kv_heads * groups).sum(0)

    def _mark(self, found: _Gradients, bad: Tensor) -> None:
        """NaN into every gradient of a sequence and KV head in which something is not finite."""
        queries = self.query.shape[2]
        # The sequence of a key: in self-attention its own position's, else there is only one.
        owner = self.first if queries == self.keys else self.first.new_zeros(self.keys)
        count = bad.new_zeros(bad.shape[0], self.keys + 1, dtype=torch.long)
        count.index_add_(1, self.first, bad.any(1).long())
        count.index_add_(1, owner, self.bad_keys.long())
        spoiled = count > 0
        nan = float("nan")
        found.query.masked_fill_(spoiled[:, None, self.first, None], nan)
        found.key.masked_fill_(spoiled[:, owner, None], nan)
        found.value.masked_fill_(spoiled[:, owner, None], nan)
        if self.tokens is not None:
            found.key.masked_fill_(~self.tokens[..., None], 0.0)
            found.value.masked_fill_(~self.tokens[..., None], 0.0)

    def _tiles(self, query: Tensor, low: int, high: int) -> Iterator[slice]:
        chains, groups, height, _ = query.shape
        step = max(BLOCK, tile_elements(query.device) // max(1, chains * groups * height))
        for start in range(low, high, step):
            yield slice(start, min(start + step, high))

    def _scores(
        self, part: slice, query: Tensor, start: int, stop: int, tile: slice
    ) -> tuple[Tensor, Tensor | None]:
        """Scores of a tile, -inf where hidden, and the softcap's slope (None without one)."""
        scores = self.scale * (query @ self.key[part, None, tile].mT)
        slope = None
        if self.softcap is not None:
            bounded = torch.tanh(scores / self.softcap)
            scores, slope = bounded * self.softcap, 1.0 - bounded.square()
        column = torch.arange(tile.start, tile.stop, device=query.device)
        first, last = self.first[start:stop, None], self.last[start:stop, None]
        visible = (column >= first) & (column <= last)
        if self.tokens is not None:
            visible = visible & self.tokens[part, None, None, tile]
        return scores.masked_fill(~visible, float("-inf")), slope
