"""From the operators' arguments to kernels. Nothing here reads the device.

The four functions at the end take what the torch operators take, as `blocked_calls` does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import stages
from .plan import Geometry, Run, call_for, longest_sequence

Pair = tuple[Tensor, Tensor]


def row_major(tensor: Tensor) -> Tensor:
    """Operands are read by rows of contiguous entries."""
    tensor = tensor.resolve_neg()  # a negated view's memory has the other sign
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def dense(tensor: Tensor | None) -> Tensor | None:
    """Masks, strengths and offsets are read by index: an expanded or sliced one is copied."""
    return None if tensor is None else tensor.resolve_neg().contiguous()


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


class _Past:
    """A past as columns: its keys, its values in range, and what was found out about them."""

    def __init__(self, run: Run, past: Pair, reference: Tensor | None) -> None:
        self.key, self.value = row_major(past[0]), row_major(past[1])
        self.geometry = Geometry(self.key, run.call.plan.block)
        parts = stages.past_parts(run.call, self.geometry)
        self.at = parts.tensors(parts.buffers(self.key.device))
        stages.prepare(
            run,
            self.geometry,
            self.at,
            self.key,
            self.value,
            None,
            None,
            None,
            reference,
            past=True,
        )
        stages.in_range(run, self.geometry, self.at, self.value, self.at.rows, self.at.largest)


def _solve(
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    longest: int,
    strength: Tensor | None,
    key_mask: Tensor | None,
    past: Pair | None,
    kernel_scale: float,
    out_dtype: torch.dtype | None = None,
    *,
    high: bool = False,
) -> Tensor:
    out = value.new_empty(value.shape, dtype=out_dtype or value.dtype)
    if out.numel() == 0:
        return out
    with on_device_of(key):
        key, value = row_major(key), row_major(value)
        strength, key_mask, offsets = dense(strength), dense(key_mask), dense(offsets)
        call = call_for(
            key, value, kernel_scale, (strength, key_mask), offsets, longest,
            past=past is not None, keep=out.dtype == value.dtype, high=high,
        )  # fmt: skip
        run = Run(call, partial(stages.solve_parts, call))
        k, v, o, mask, b, seqs = run.operands(key, value, out, key_mask, strength, offsets)
        stages.table(run, seqs)
        reference = stages.reference(run, key, key_mask, past)
        if past is not None:
            v = _without_past(run, key, value, key_mask, strength, past, reference)
        stages.prepare(run, call.geometry, run.at, k, v, None, mask, b, reference)
        stages.solve(run, v, o, mask, b)
        run.end()
    return out


def _without_past(
    run: Run,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    strength: Tensor | None,
    past: Pair,
    reference: Tensor | None,
) -> Tensor:
    """A chunk's right-hand side. Its range is known afterwards, its keys are needed before."""
    before = _Past(run, past, reference)
    geometry = run.call.geometry
    parts = stages.past_parts(run.call, geometry)
    at = parts.tensors(parts.buffers(key.device))._replace(bad=run.at.bad)
    stages.prepare(run, geometry, at, key, value, None, mask, None, reference, past=True)
    blocks = before.geometry.blocks
    return stages.answer(run, geometry, at, before.at, blocks, before.at.rows, 0, value, strength)


def _adjoint(
    grad: Tensor,
    key: Tensor,
    solution: Tensor,
    offsets: Tensor | None,
    longest: int,
    strength: Tensor | None,
    key_mask: Tensor | None,
    past: Pair | None,
    kernel_scale: float,
    *,
    high: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    grad_key, grad_value = key.new_empty(key.shape), solution.new_empty(solution.shape)
    grad_strength = None
    if solution.numel() == 0:
        none = () if past is None else (torch.zeros_like(past[0]), torch.zeros_like(past[1]))
        if strength is not None:
            grad_strength = torch.zeros_like(strength)
        return grad_key, grad_value, grad_strength, *(none or (None, None))
    grads_past: tuple[Tensor | None, Tensor | None] = (None, None)
    with on_device_of(key):
        grad, key, solution = row_major(grad), row_major(key), row_major(solution)
        strength, key_mask, offsets = dense(strength), dense(key_mask), dense(offsets)
        call = call_for(
            key, solution, kernel_scale, (grad, strength, key_mask), offsets, longest,
            past=past is not None, high=high,
        )  # fmt: skip
        form = stages.Form.PORTABLE if past is not None else stages.form_of(call)
        run = Run(call, partial(stages.adjoint_parts, call, form))
        g, k, y, dk, dv, mask, b, seqs = run.operands(
            grad, key, solution, grad_key, grad_value, key_mask, strength, offsets
        )
        stages.table(run, seqs)
        reference = stages.reference(run, key, key_mask, past)
        before = None if past is None else _Past(run, past, reference)
        geometry, at = call.geometry, run.at
        stages.prepare(run, geometry, at, k, g, y, mask, b, reference, form=form)
        past_sum = None
        if form is not stages.Form.PORTABLE:
            stages.hopper_adjoint(run, form, g, y, dv, k, dk, mask, b)
        else:
            stages.adjoint(run, g, y, dv, b)
            if before is not None:
                past_sum = None if strength is None else torch.zeros_like(at.pairs)
                grads_past = _past_gradients(
                    run, before, key, grad_key, key_mask, strength, reference, past_sum
                )
            stages.toward(
                run, geometry, at, at.gh, geometry.headroom, at, at.yh, at.largest_second, 0,
                geometry.blocks, (at.toward, at.sums), k, dk, mask, b, reference,
                causal=True, add=True, finish=True,
            )  # fmt: skip
        run.end()
        if strength is not None:
            pairs = run.part("pairs")
            if past_sum is not None:
                pairs = pairs + past_sum
            grad_strength = pairs.view(-1, geometry.heads, pairs.numel() // geometry.chains)
            grad_strength = grad_strength.sum((0, 2))
    return grad_key, grad_value, grad_strength, *grads_past


def _past_gradients(
    run: Run,
    before: _Past,
    key: Tensor,
    grad_key: Tensor,
    mask: Tensor | None,
    strength: Tensor | None,
    reference: Tensor | None,
    past_sum: Tensor | None,
) -> Pair:
    """The past's gradients; what it gives to the chunk's keys goes to the chunk's sums."""
    geometry, at = run.call.geometry, run.at
    stages.toward(
        run, geometry, at, at.gh, geometry.headroom, before.at, before.at.rows, before.at.largest, 0,
        before.geometry.blocks, (at.toward, at.sums), key, grad_key, mask, strength, reference,
        causal=False, add=True, finish=False, strength_sum=past_sum,
    )  # fmt: skip
    grad_past_key = before.key.new_empty(before.key.shape)
    # What is not finite in the chunk spoils the past's gradients too.
    chunk_bad = at.bad[:: geometry.blocks][: geometry.chains]
    before.at.bad[:: before.geometry.blocks][: geometry.chains] += chunk_bad
    width = run.call.key_width
    rows = before.geometry.slots * before.geometry.block
    scratch = torch.empty((rows, width), dtype=torch.float32, device=key.device)
    weights = None if at.sums is None else scratch.new_empty(rows)
    stages.toward(
        run, before.geometry, before.at, before.at.rows, 0, at, at.gh, at.largest, geometry.headroom,
        geometry.blocks, (scratch, weights), before.key, grad_past_key, None, strength, reference,
        causal=False, add=False, finish=True,
    )  # fmt: skip
    grad_past = stages.answer(
        run, before.geometry, before.at, at, geometry.blocks, at.gh, geometry.headroom, None, strength
    )  # fmt: skip
    return grad_past_key, grad_past.to(before.value.dtype)


def _pair(past_key: Tensor | None, past_preconditioned: Tensor | None) -> Pair | None:
    if past_key is None or past_preconditioned is None or past_key.shape[2] == 0:
        return None
    return past_key, past_preconditioned


def solve_dense(
    key: Tensor,
    value: Tensor,
    strength: Tensor | None,
    key_mask: Tensor | None,
    past_key: Tensor | None,
    past_preconditioned: Tensor | None,
    kernel_scale: float,
    out_dtype: torch.dtype | None = None,
    precision: str = "default",
) -> Tensor:
    """``Y = L^-1 V`` for ``(batch, heads, seq, ..)``."""
    past = _pair(past_key, past_preconditioned)
    return _solve(
        key, value, None, 0, strength, key_mask, past, kernel_scale, out_dtype, high=precision == "high"
    )  # fmt: skip


def solve_packed(
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    strength: Tensor | None,
    max_seqlen: int | None,
    kernel_scale: float,
    precision: str = "default",
) -> Tensor:
    """``Y = L^-1 V`` for packed ``(total, heads, ..)``."""
    longest = longest_sequence(cu_seqlens, key, max_seqlen)
    return _solve(
        key, value, cu_seqlens, longest, strength, None, None, kernel_scale, high=precision == "high"
    )  # fmt: skip


def adjoint_dense(
    grad: Tensor,
    key: Tensor,
    solution: Tensor,
    strength: Tensor | None,
    key_mask: Tensor | None,
    past_key: Tensor | None,
    past_preconditioned: Tensor | None,
    kernel_scale: float,
    precision: str = "default",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of key, value, strength ``(heads,)`` and the past, None where there is none."""
    past = _pair(past_key, past_preconditioned)
    return _adjoint(
        grad, key, solution, None, 0, strength, key_mask, past, kernel_scale, high=precision == "high"
    )  # fmt: skip


def adjoint_packed(
    grad: Tensor,
    key: Tensor,
    solution: Tensor,
    cu_seqlens: Tensor,
    strength: Tensor | None,
    max_seqlen: int | None,
    kernel_scale: float,
    precision: str = "default",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of key, value and strength ``(heads,)``."""
    longest = longest_sequence(cu_seqlens, key, max_seqlen)
    return _adjoint(
        grad, key, solution, cu_seqlens, longest, strength, None, None, kernel_scale, high=precision == "high"
    )[:3]  # fmt: skip
