"""The launches: from the operators' arguments to kernels. Nothing here reads the device.

The four functions at the end take what the torch operators take, as `blocked_calls` does.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..numerics import KEY_EPS
from .adjoint import adjoint_kernel
from .inverse import inverse_kernel
from .past import answer_kernel, range_kernel
from .plan import (
    SHIFT_BACKWARD,
    SHIFT_FORWARD,
    Call,
    Control,
    Geometry,
    Plan,
    Prepared,
    interpreted,
    longest_sequence,
    plan_for,
)
from .prepare import prepare_kernel
from .solve import solve_kernel
from .toward import toward_kernel

PREPARED_ROWS = 32
LARGEST_EXPONENT = 20.0
"""Half precision inside up to this ``kernel_scale * D``; the default scale has sqrt(D), at most 16.

Rounding keys to float16 moves the exponent of P by up to about a thousandth of it.
"""


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _dense(tensor: Tensor | None) -> Tensor | None:
    """Masks and strengths are read by index: an expanded or sliced one is copied."""
    return None if tensor is None else tensor.contiguous()


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _prepare(
    call: Call,
    geometry: Geometry,
    key: Tensor,
    value: Tensor,
    second: Tensor | None,
    strength: Tensor | None,
    mask: Tensor | None,
    reference: Tensor | None,
    largest: Tensor,
    largest_second: Tensor | None,
    bad: Tensor,
    *,
    past: bool = False,
) -> Prepared:
    plan = call.plan
    half = plan.block // 2
    keys = geometry.workspace(key, plan.dtype, call.key_width)
    weights = geometry.workspace(key, torch.float32) if plan.centred else None
    live = geometry.workspace(key, torch.int8)
    rows = min(plan.block, PREPARED_ROWS)
    prepare_kernel[(geometry.slots * (plan.block // rows),)](
        key, *geometry.strides(key), reference, 0 if reference is None else reference.shape[-2],
        value, *geometry.strides(value),
        second, *((0, 0, 0) if second is None else geometry.strides(second)),
        mask, geometry.table, keys, weights, live, largest, largest_second, bad,
        geometry.heads, geometry.chains, geometry.blocks, geometry.length,
        call.width, call.value_width, call.c2, KEY_EPS,
        R=plan.block, ROWS=rows, PACKED=geometry.packed, PAST=past, CENTRED=plan.centred,
        **call.pieces, **call.value_pieces, num_warps=4,
    )  # fmt: skip
    if past:
        return Prepared(keys, weights, live, None, reference)
    inverse = key.new_empty((geometry.slots, 3, half, half), dtype=plan.dtype)
    inverse_kernel[(geometry.slots,)](
        keys, weights, live, strength, inverse, geometry.heads, geometry.chains, geometry.blocks,
        call.key_width, call.c2, call.shift(0),
        R=plan.block, **call.pieces, **call.exact, num_warps=4,
        # Four programs to a multiprocessor: a quarter faster at 64, and slower where rows are wider.
        maxnreg=128 if call.key_width == 64 else None,
    )  # fmt: skip
    return Prepared(keys, weights, live, inverse, reference)


@functools.cache
def _has_hopper_kernels(device: torch.device) -> bool:
    """Hopper's own kernels are in Gluon, whose interface changes with every Triton: 3.6 was tested."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) == (9, 0)
        and triton.__version__.startswith("3.6.")
    )


def _hopper(call: Call, tensor: Tensor) -> bool:
    """Half precision with head sizes of one piece, on a card that has the kernels."""
    pieces = (*call.pieces.values(), *call.value_pieces.values())
    return (
        call.plan.dtype == torch.float16
        and all(piece in (0, 64, 128) for piece in pieces)
        and pieces[1] == pieces[3] == 0
        and _has_hopper_kernels(tensor.device)
    )


def _solve(call: Call, prepared: Prepared, value: Tensor, out: Tensor, mask: Tensor | None, strength: Tensor | None, control: Control) -> None:  # fmt: skip
    geometry, plan = call.geometry, call.plan
    if _hopper(call, value):
        from .hopper_solve import hopper_solve

        hopper_solve(call, prepared, value, out, mask, strength, control, SHIFT_FORWARD)
        return
    done, largest, bad = control.parts[:3]
    solved = geometry.workspace(value, plan.dtype, call.solution_width)
    tiles = plan.solve
    solve_kernel[(geometry.slots,)](
        prepared.keys, prepared.weights, prepared.inverse, value, *geometry.strides(value),
        solved, out, *geometry.strides(out), mask, strength, geometry.table,
        done, largest, bad, control.ticket,
        geometry.heads, geometry.chains, geometry.blocks, geometry.length, call.value_width,
        geometry.headroom, call.c2, call.shift(SHIFT_FORWARD), 1.0,
        R=plan.block, M=tiles.columns, STAGES=tiles.stages, PACKED=geometry.packed,
        SHIFT=SHIFT_FORWARD, INTERPRET=interpreted(),
        **call.pieces, **call.value_pieces, **call.exact, num_warps=tiles.warps,
    )  # fmt: skip


def _adjoint(call: Call, prepared: Prepared, grad: Tensor, solution: Tensor, grad_value: Tensor, strength: Tensor | None, control: Control) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Returns ``Gh``, ``Yh``, the later half of the key gradient (and its row sums), and ``-sum T``."""
    geometry, plan = call.geometry, call.plan
    done, largest_grad, largest_solution, bad = control.parts[:4]
    gh = geometry.workspace(grad, plan.dtype, call.solution_width)
    yh = geometry.workspace(grad, plan.dtype, call.solution_width)
    toward = geometry.workspace(grad, torch.float32, call.key_width)
    sums = geometry.workspace(grad, torch.float32) if plan.centred else None
    strength_sum = torch.zeros(geometry.slots, dtype=torch.float32, device=grad.device)
    tiles = plan.adjoint
    adjoint_kernel[(geometry.slots,)](
        prepared.keys, prepared.weights, prepared.inverse, prepared.live,
        grad, *geometry.strides(grad), solution, *geometry.strides(solution),
        gh, yh, grad_value, *geometry.strides(grad_value), toward, sums, strength_sum,
        strength, geometry.table, done, largest_grad, largest_solution, bad, control.ticket,
        geometry.heads, geometry.chains, geometry.blocks, geometry.length, call.value_width,
        geometry.headroom, call.c2, call.shift(SHIFT_BACKWARD), 1.0,
        R=plan.block, M=tiles.columns, STAGES=tiles.stages, PACKED=geometry.packed,
        SHIFT=SHIFT_BACKWARD, INTERPRET=interpreted(),
        **call.pieces, **call.value_pieces, **call.exact, num_warps=tiles.warps,
    )  # fmt: skip
    return gh, yh, toward, sums, strength_sum


class _Gradient(NamedTuple):
    """What the backward launches of a call share."""

    call: Call
    prepared: Prepared
    grad: Tensor
    key: Tensor
    solution: Tensor
    grad_key: Tensor
    grad_value: Tensor
    strength: Tensor | None
    mask: Tensor | None
    control: Control

    def fused(self) -> Tensor | None:
        """Both halves of the key gradient in the adjoint sweep, where that kernel is; ``-sum T``."""
        if not _hopper(self.call, self.key) or self.call.solution_width > self.call.key_width:
            return None
        from .hopper_adjoint import hopper_adjoint

        return hopper_adjoint(
            self.call, self.prepared, self.grad, self.solution, self.grad_value, self.key,
            self.grad_key, self.strength, self.mask, self.control, SHIFT_BACKWARD,
        )  # fmt: skip

    def finish(self, gh: Tensor, yh: Tensor, toward: Tensor, sums: Tensor | None) -> None:
        """The earlier blocks' half and the key's gradient."""
        geometry = self.call.geometry
        _, largest, largest_solution, bad = self.control.parts
        _toward(
            self.call, geometry, self.prepared, Operand(gh, largest, geometry.headroom),
            self.prepared, geometry.blocks, Operand(yh, largest_solution, 0), toward, sums,
            self.key, self.grad_key, self.mask, self.strength, bad,
            causal=True, add=True, finish=True,
        )  # fmt: skip

    def adjoint(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        return _adjoint(
            self.call, self.prepared, self.grad, self.solution, self.grad_value, self.strength,
            self.control,
        )  # fmt: skip


class Operand(NamedTuple):
    """A value workspace with the range that it was scaled by."""

    rows: Tensor
    largest: Tensor
    headroom: int


def _toward(
    call: Call,
    geometry: Geometry,
    prepared: Prepared,
    rows: Operand,
    columns: Prepared,
    column_blocks: int,
    operand: Operand,
    toward: Tensor,
    sums: Tensor | None,
    key: Tensor,
    grad_key: Tensor,
    mask: Tensor | None,
    strength: Tensor | None,
    bad: Tensor,
    *,
    causal: bool,
    add: bool,
    finish: bool,
    strength_sum: Tensor | None = None,
) -> None:
    plan, tiles = call.plan, call.plan.toward
    reference = prepared.reference
    toward_kernel[(geometry.slots,)](
        prepared.keys, prepared.weights, *rows, columns.keys, columns.weights, *operand,
        toward, sums, key, *geometry.strides(key),
        reference, 0 if reference is None else reference.shape[-2],
        grad_key, *geometry.strides(grad_key), mask, strength, strength_sum, geometry.table, bad,
        geometry.heads, geometry.chains, geometry.blocks, column_blocks, geometry.length,
        call.width, call.c2, call.shift(SHIFT_BACKWARD), call.kernel_scale, KEY_EPS, 1.0,
        R=plan.block, M=tiles.columns, STAGES=tiles.stages, PACKED=geometry.packed,
        CAUSAL=causal, ADD=add, FINISH=finish, SHIFT=SHIFT_BACKWARD,
        **call.pieces, **call.value_pieces, **call.exact, num_warps=tiles.warps,
    )  # fmt: skip


def _answer(call: Call, geometry: Geometry, prepared: Prepared, columns: Prepared, column_blocks: int, operand: Operand, value: Tensor | None, strength: Tensor | None, bad: Tensor) -> Tensor:  # fmt: skip
    plan, tiles = call.plan, call.plan.solve
    out = prepared.keys.new_empty(
        (geometry.chains // geometry.heads, geometry.heads, geometry.length, call.value_width),
        dtype=torch.float32,
    )
    answer_kernel[(geometry.slots,)](
        prepared.keys, prepared.weights, columns.keys, columns.weights, *operand,
        value, *((0, 0, 0) if value is None else geometry.strides(value)), out, strength, bad,
        geometry.heads, geometry.chains, geometry.blocks, column_blocks, geometry.length,
        call.value_width, call.c2, call.shift(SHIFT_FORWARD), 1.0,
        R=plan.block, M=tiles.columns, STAGES=tiles.stages, SHIFT=SHIFT_FORWARD,
        **call.pieces, **call.value_pieces, **call.exact, num_warps=tiles.warps,
    )  # fmt: skip
    return out


def _reference(
    plan: Plan, geometry: Geometry, key: Tensor, mask: Tensor | None, past_key: Tensor | None
) -> Tensor | None:
    """float32 only: the key that a sequence's kernel is centred on, its first, at length sqrt(D)."""
    if not plan.centred:
        return None
    if geometry.table is not None:
        rows = geometry.table[0].clamp(max=max(0, geometry.length - 1))
        first = key.index_select(0, rows).transpose(0, 1)
    elif past_key is not None and past_key.shape[2] > 0:
        first = past_key[:, :, :1]
    elif mask is None:
        first = key[:, :, :1]
    else:
        index = mask.to(torch.uint8).argmax(1)[:, None, None, None]
        first = key.take_along_dim(index, 2)
    first = first.float().reshape(geometry.chains, -1, key.shape[-1])
    length = first.square().sum(-1, keepdim=True).sqrt()
    usable = length.isfinite() & (length > 0)
    return torch.where(usable, first * (key.shape[-1] ** 0.5 / length), 1.0).contiguous()


class _Past(NamedTuple):
    """A past as columns: its keys, its values in range, and what was found out about them."""

    geometry: Geometry
    prepared: Prepared
    operand: Operand
    bad: Tensor


def _past(
    call: Call, past_key: Tensor, past_preconditioned: Tensor, reference: Tensor | None
) -> _Past:
    plan = call.plan
    past_key, past_preconditioned = _rows(past_key), _rows(past_preconditioned)
    geometry = Geometry(past_key, plan.block)
    largest, bad = Control(past_key, geometry.slots, geometry.slots).parts
    prepared = _prepare(
        call, geometry, past_key, past_preconditioned, None, None, None, reference, largest, None,
        bad, past=True,
    )  # fmt: skip
    rows = geometry.workspace(past_key, plan.dtype, call.solution_width)
    range_kernel[(geometry.slots,)](
        past_preconditioned, *geometry.strides(past_preconditioned), rows, largest, 0,
        geometry.heads, geometry.chains, geometry.blocks, geometry.length, call.value_width,
        R=plan.block, CENTRED=plan.centred, **call.value_pieces, num_warps=4,
    )  # fmt: skip
    return _Past(geometry, prepared, Operand(rows, largest, 0), bad)


def _plan(key: Tensor, value: Tensor, kernel_scale: float) -> Plan:
    """float32 inside for float32 inputs, and where float16 keys would move the exponents too far."""
    width = key.shape[-1]
    exact = key.dtype == torch.float32 or kernel_scale * width > LARGEST_EXPONENT
    return plan_for(torch.float32 if exact else torch.float16, width, value.shape[-1])


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
    out = value.new_empty(value.shape)
    if out.numel() == 0:
        return out
    with _on(key):
        key, value = _rows(key), _rows(value)
        strength, key_mask = _dense(strength), _dense(key_mask)
        plan = _plan(key, value, kernel_scale)
        geometry = Geometry(key, plan.block)
        call = Call(geometry, plan, key, value, kernel_scale)
        reference = _reference(plan, geometry, key, key_mask, past_key)
        control = Control(key, *[geometry.slots] * 3)
        _, largest, bad = control.parts
        right = value
        past = None
        if past_key is not None and past_preconditioned is not None and past_key.shape[2] > 0:
            past = _past(call, past_key, past_preconditioned, reference)
            # The chunk's right-hand side needs its keys, and its range the right-hand side.
            scratch = Control(key, *[geometry.slots] * 2)
            rows = _prepare(
                call, geometry, key, value, None, None, key_mask, reference,
                scratch.parts[0], None, bad, past=True,
            )  # fmt: skip
            right = _answer(
                call, geometry, rows, past.prepared, past.geometry.blocks, past.operand, value,
                strength, past.bad,
            )  # fmt: skip
        prepared = _prepare(
            call, geometry, key, right, None, strength, key_mask, reference, largest, None, bad
        )
        _solve(call, prepared, right, out, key_mask, strength, control)
    return out


def solve_packed(
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    strength: Tensor | None,
    max_seqlen: int | None,
    kernel_scale: float,
) -> Tensor:
    """``Y = L^-1 V`` for packed ``(total, heads, ..)``."""
    out = value.new_empty(value.shape)
    if out.numel() == 0:
        return out
    with _on(key):
        key, value = _rows(key), _rows(value)
        plan = _plan(key, value, kernel_scale)
        geometry = Geometry(
            key, plan.block, cu_seqlens, longest_sequence(cu_seqlens, key, max_seqlen)
        )
        call = Call(geometry, plan, key, value, kernel_scale)
        reference = _reference(plan, geometry, key, None, None)
        control = Control(key, *[geometry.slots] * 3)
        _, largest, bad = control.parts
        prepared = _prepare(
            call, geometry, key, value, None, strength, None, reference, largest, None, bad
        )
        _solve(call, prepared, value, out, None, strength, control)
    return out


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
    grad_key, grad_value = key.new_empty(key.shape), solution.new_empty(solution.shape)
    nothing = key.new_empty(0)
    heads = key.shape[1]
    has_past = past_key is not None and past_preconditioned is not None and past_key.shape[2] > 0
    if solution.numel() == 0:
        grad_strength = torch.zeros(heads, dtype=torch.float32, device=key.device)
        return (
            grad_key,
            grad_value,
            grad_strength,
            nothing if past_key is None else torch.zeros_like(past_key),
            nothing if past_preconditioned is None else torch.zeros_like(past_preconditioned),
        )
    with _on(key):
        grad, key, solution = _rows(grad), _rows(key), _rows(solution)
        strength, key_mask = _dense(strength), _dense(key_mask)
        plan = _plan(key, solution, kernel_scale)
        geometry = Geometry(key, plan.block)
        call = Call(geometry, plan, key, solution, kernel_scale)
        reference = _reference(plan, geometry, key, key_mask, past_key)
        control = Control(key, *[geometry.slots] * 4)
        _, largest, largest_solution, bad = control.parts
        past = None
        if has_past:
            assert past_key is not None and past_preconditioned is not None
            past = _past(call, past_key, past_preconditioned, reference)
        prepared = _prepare(
            call, geometry, key, grad, solution, strength, key_mask, reference,
            largest, largest_solution, bad,
        )  # fmt: skip
        gradient = _Gradient(
            call, prepared, grad, key, solution, grad_key, grad_value, strength, key_mask, control
        )
        grad_past_key, grad_past = nothing, nothing
        pairs = gradient.fused() if past is None else None
        if pairs is None:
            gh, yh, toward, sums, pairs = gradient.adjoint()
            if past is not None:
                assert past_key is not None and past_preconditioned is not None
                operand = Operand(gh, largest, geometry.headroom)
                past_sum = None if strength is None else torch.empty_like(pairs)
                _toward(
                    call, geometry, prepared, operand, past.prepared, past.geometry.blocks,
                    past.operand, toward, sums, key, grad_key, key_mask, strength, bad,
                    causal=False, add=True, finish=False, strength_sum=past_sum,
                )  # fmt: skip
                if past_sum is not None:
                    pairs += past_sum
                grad_past_key = past_key.new_empty(past_key.shape)
                # What is not finite in the chunk spoils the past's gradients too.
                chunk_bad = bad[:: geometry.blocks][: geometry.chains]
                past.bad[:: past.geometry.blocks][: geometry.chains] += chunk_bad
                scratch = past.geometry.workspace(key, torch.float32, call.key_width)
                scratch_sums = past.geometry.workspace(key, torch.float32) if plan.centred else None
                _toward(
                    call, past.geometry, past.prepared, past.operand, prepared, geometry.blocks,
                    operand, scratch, scratch_sums, past_key, grad_past_key, None, strength,
                    past.bad, causal=False, add=False, finish=True,
                )  # fmt: skip
                grad_past = _answer(
                    call, past.geometry, past.prepared, prepared, geometry.blocks, operand, None,
                    strength, bad,
                ).to(past_preconditioned.dtype)  # fmt: skip
            gradient.finish(gh, yh, toward, sums)
        grad_strength = pairs.view(-1, heads, geometry.blocks).sum((0, 2))
    return grad_key, grad_value, grad_strength, grad_past_key, grad_past


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
    grad_key, grad_value = key.new_empty(key.shape), solution.new_empty(solution.shape)
    if solution.numel() == 0:
        return grad_key, grad_value, key.new_zeros(key.shape[1], dtype=torch.float32)
    with _on(key):
        grad, key, solution = _rows(grad), _rows(key), _rows(solution)
        plan = _plan(key, solution, kernel_scale)
        geometry = Geometry(
            key, plan.block, cu_seqlens, longest_sequence(cu_seqlens, key, max_seqlen)
        )
        call = Call(geometry, plan, key, solution, kernel_scale)
        reference = _reference(plan, geometry, key, None, None)
        control = Control(key, *[geometry.slots] * 4)
        _, largest, largest_solution, bad = control.parts
        prepared = _prepare(
            call, geometry, key, grad, solution, strength, None, reference,
            largest, largest_solution, bad,
        )  # fmt: skip
        gradient = _Gradient(
            call, prepared, grad, key, solution, grad_key, grad_value, strength, None, control
        )
        pairs = gradient.fused()
        if pairs is None:
            gh, yh, toward, sums, pairs = gradient.adjoint()
            gradient.finish(gh, yh, toward, sums)
        grad_strength = pairs.view(geometry.chains, geometry.blocks).sum(1)
    return grad_key, grad_value, grad_strength
