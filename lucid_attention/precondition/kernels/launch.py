"""From the operators' arguments to kernels. Nothing here reads the device.

The four functions at the end take what the torch operators take, as `blocked_calls` does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import stages
from .plan import Call, Control, Geometry, Prepared, call_for, longest_sequence
from .stages import Operand


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _dense(tensor: Tensor | None) -> Tensor | None:
    """Masks and strengths are read by index: an expanded or sliced one is copied."""
    return None if tensor is None else tensor.contiguous()


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


class _Past(NamedTuple):
    """A past as columns: its keys, its values in range, and what was found out about them."""

    geometry: Geometry
    prepared: Prepared
    operand: Operand
    bad: Tensor


def _past(
    call: Call, past_key: Tensor, past_preconditioned: Tensor, reference: Tensor | None
) -> _Past:
    past_key, past_preconditioned = _rows(past_key), _rows(past_preconditioned)
    geometry = Geometry(past_key, call.plan.block)
    largest, bad = Control(past_key, geometry.slots, geometry.slots).parts
    prepared = stages.prepare(
        call, geometry, past_key, past_preconditioned, None, None, None, reference, largest, None,
        bad, past=True,
    )  # fmt: skip
    rows = stages.in_range(call, geometry, past_preconditioned, largest)
    return _Past(geometry, prepared, Operand(rows, largest, 0), bad)


def _solve(
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    longest: int,
    strength: Tensor | None,
    key_mask: Tensor | None,
    past: tuple[Tensor, Tensor] | None,
    kernel_scale: float,
) -> Tensor:
    out = value.new_empty(value.shape)
    if out.numel() == 0:
        return out
    with _on(key):
        key, value = _rows(key), _rows(value)
        strength, key_mask = _dense(strength), _dense(key_mask)
        call = call_for(
            key, value, kernel_scale, (strength, key_mask), offsets, longest, keep=past is None
        )
        geometry = call.geometry
        reference = stages.reference(call, key, key_mask, past)
        control = Control(key, *[geometry.slots] * 3)
        _, largest, bad = control.parts
        right = value
        if past is not None:
            before = _past(call, *past, reference)
            # The chunk's right-hand side needs its keys, and its range the right-hand side.
            scratch = Control(key, *[geometry.slots] * 2)
            rows = stages.prepare(
                call, geometry, key, value, None, None, key_mask, reference,
                scratch.parts[0], None, bad, past=True,
            )  # fmt: skip
            right = stages.answer(
                call, geometry, rows, before.prepared, before.geometry.blocks, before.operand,
                value, strength, before.bad,
            )  # fmt: skip
        prepared = stages.prepare(
            call, geometry, key, right, None, strength, key_mask, reference, largest, None, bad
        )
        stages.solve(call, prepared, right, out, key_mask, strength, control)
    return out


def _adjoint(
    grad: Tensor,
    key: Tensor,
    solution: Tensor,
    offsets: Tensor | None,
    longest: int,
    strength: Tensor | None,
    key_mask: Tensor | None,
    past: tuple[Tensor, Tensor] | None,
    kernel_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_key, grad_value = key.new_empty(key.shape), solution.new_empty(solution.shape)
    grad_strength = grad_past_key = grad_past = key.new_empty(0)
    if solution.numel() == 0:
        if strength is not None:
            grad_strength = torch.zeros_like(strength)
        if past is not None:
            grad_past_key, grad_past = torch.zeros_like(past[0]), torch.zeros_like(past[1])
        return grad_key, grad_value, grad_strength, grad_past_key, grad_past
    with _on(key):
        grad, key, solution = _rows(grad), _rows(key), _rows(solution)
        strength, key_mask = _dense(strength), _dense(key_mask)
        call = call_for(
            key, solution, kernel_scale, (grad, strength, key_mask), offsets, longest,
            keep=past is None,
        )  # fmt: skip
        geometry = call.geometry
        reference = stages.reference(call, key, key_mask, past)
        control = Control(key, *[geometry.slots] * 4, 2 * geometry.slots)
        _, largest, largest_solution, bad, _ = control.parts
        before = None if past is None else _past(call, *past, reference)
        prepared = stages.prepare(
            call, geometry, key, grad, solution, strength, key_mask, reference,
            largest, largest_solution, bad,
        )  # fmt: skip
        if before is None and stages.has_fused_adjoint(call, key):
            from .hopper_adjoint import hopper_adjoint

            pairs = hopper_adjoint(
                call,
                prepared,
                grad,
                solution,
                grad_value,
                key,
                grad_key,
                strength,
                key_mask,
                control,
            )
        else:
            gh, yh, toward, sums, pairs = stages.adjoint(
                call, prepared, grad, solution, grad_value, strength, control
            )
            operand = Operand(gh, largest, geometry.headroom)
            if past is not None and before is not None:
                past_sum = None if pairs is None else torch.empty_like(pairs)
                stages.toward(
                    call, geometry, prepared, operand, before.prepared, before.geometry.blocks,
                    before.operand, toward, sums, key, grad_key, key_mask, strength, bad,
                    causal=False, add=True, finish=False, strength_sum=past_sum,
                )  # fmt: skip
                if pairs is not None and past_sum is not None:
                    pairs += past_sum
                grad_past_key = past[0].new_empty(past[0].shape)
                # What is not finite in the chunk spoils the past's gradients too.
                chunk_bad = bad[:: geometry.blocks][: geometry.chains]
                before.bad[:: before.geometry.blocks][: geometry.chains] += chunk_bad
                scratch = before.geometry.workspace(key, torch.float32, call.key_width)
                scratch_sums = None
                if sums is not None:
                    scratch_sums = before.geometry.workspace(key, torch.float32)
                stages.toward(
                    call, before.geometry, before.prepared, before.operand, prepared,
                    geometry.blocks, operand, scratch, scratch_sums, _rows(past[0]), grad_past_key,
                    None, strength, before.bad, causal=False, add=False, finish=True,
                )  # fmt: skip
                grad_past = stages.answer(
                    call, before.geometry, before.prepared, prepared, geometry.blocks, operand, None,
                    strength, bad,
                ).to(past[1].dtype)  # fmt: skip
            stages.toward(
                call, geometry, prepared, operand, prepared, geometry.blocks,
                Operand(yh, largest_solution, 0), toward, sums, key, grad_key, key_mask, strength,
                bad, causal=True, add=True, finish=True,
            )  # fmt: skip
        if pairs is not None:
            grad_strength = pairs.view(-1, geometry.heads, geometry.blocks).sum((0, 2))
    return grad_key, grad_value, grad_strength, grad_past_key, grad_past


def _pair(
    past_key: Tensor | None, past_preconditioned: Tensor | None
) -> tuple[Tensor, Tensor] | None:
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
) -> Tensor:
    """``Y = L^-1 V`` for ``(batch, heads, seq, ..)``."""
    past = _pair(past_key, past_preconditioned)
    return _solve(key, value, None, 0, strength, key_mask, past, kernel_scale)


def solve_packed(
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    strength: Tensor | None,
    max_seqlen: int | None,
    kernel_scale: float,
) -> Tensor:
    """``Y = L^-1 V`` for packed ``(total, heads, ..)``."""
    longest = longest_sequence(cu_seqlens, key, max_seqlen)
    return _solve(key, value, cu_seqlens, longest, strength, None, None, kernel_scale)


def adjoint_dense(
    grad: Tensor,
    key: Tensor,
    solution: Tensor,
    strength: Tensor | None,
    key_mask: Tensor | None,
    past_key: Tensor | None,
    past_preconditioned: Tensor | None,
    kernel_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of key, value, strength ``(heads,)`` and the past (empty where there is none)."""
    past = _pair(past_key, past_preconditioned)
    return _adjoint(grad, key, solution, None, 0, strength, key_mask, past, kernel_scale)


def adjoint_packed(
    grad: Tensor,
    key: Tensor,
    solution: Tensor,
    cu_seqlens: Tensor,
    strength: Tensor | None,
    max_seqlen: int | None,
    kernel_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of key, value and strength ``(heads,)``."""
    longest = longest_sequence(cu_seqlens, key, max_seqlen)
    return _adjoint(grad, key, solution, cu_seqlens, longest, strength, None, None, kernel_scale)[
        :3
    ]
