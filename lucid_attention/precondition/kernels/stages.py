"""A call's stages, each one launch or two: workspaces, grids, arguments, which kernel family."""

from __future__ import annotations

import functools
from typing import NamedTuple

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
    Prepared,
    interpreted,
)
from .prepare import prepare_kernel
from .solve import solve_kernel
from .toward import toward_kernel

PREPARED_ROWS = 32


def prepare(
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
    call.launch(
        prepare_kernel, geometry.slots * (plan.block // rows),
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
    call.launch(
        inverse_kernel, geometry.slots,
        keys, weights, live, strength, inverse, geometry.heads, geometry.chains, geometry.blocks,
        call.c2, call.shift(0),
        R=plan.block, **call.pieces, **call.exact, num_warps=4,
        # More programs to a multiprocessor: 10 % and 3 % faster, and slower with fewer registers.
        maxnreg={64: 96, 128: 128}.get(call.key_width),
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


def has_fused_adjoint(call: Call, tensor: Tensor) -> bool:
    """Both halves of the key gradient in the adjoint sweep: registers allow values as wide as keys."""
    return _hopper(call, tensor) and call.solution_width <= call.key_width


def in_range(call: Call, geometry: Geometry, value: Tensor, largest: Tensor) -> Tensor:
    """Values as a column workspace, scaled by their largest."""
    rows = geometry.workspace(value, call.plan.dtype, call.solution_width)
    call.launch(
        range_kernel, geometry.slots,
        value, *geometry.strides(value), rows, largest, 0,
        geometry.heads, geometry.chains, geometry.blocks, geometry.length, call.value_width,
        R=call.plan.block, CENTRED=call.plan.centred, **call.value_pieces, num_warps=4,
    )  # fmt: skip
    return rows


def solve(call: Call, prepared: Prepared, value: Tensor, out: Tensor, mask: Tensor | None, strength: Tensor | None, control: Control) -> None:  # fmt: skip
    geometry, plan = call.geometry, call.plan
    if _hopper(call, value):
        from .hopper_solve import hopper_solve

        hopper_solve(call, prepared, value, out, mask, strength, control)
        return
    done, largest, bad = control.parts[:3]
    solved = geometry.workspace(value, plan.dtype, call.solution_width)
    tiles = plan.solve
    call.launch(
        solve_kernel, geometry.slots,
        prepared.keys, prepared.weights, prepared.inverse, value, *geometry.strides(value),
        solved, out, *geometry.strides(out), mask, strength, geometry.table,
        done, largest, bad, control.ticket,
        geometry.heads, geometry.chains, geometry.blocks, geometry.length, call.value_width,
        geometry.headroom, call.c2, call.shift(SHIFT_FORWARD), 1.0,
        R=plan.block, M=tiles.columns, STAGES=tiles.stages, PACKED=geometry.packed,
        SHIFT=SHIFT_FORWARD, INTERPRET=interpreted(),
        **call.pieces, **call.value_pieces, **call.exact, num_warps=tiles.warps,
    )  # fmt: skip


def adjoint(call: Call, prepared: Prepared, grad: Tensor, solution: Tensor, grad_value: Tensor, strength: Tensor | None, control: Control) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Returns ``Gh``, ``Yh``, the later half of the key gradient (and its row sums), and ``-sum T``."""
    geometry, plan = call.geometry, call.plan
    done, largest_grad, largest_solution, bad = control.parts[:4]
    gh = geometry.workspace(grad, plan.dtype, call.solution_width)
    yh = geometry.workspace(grad, plan.dtype, call.solution_width)
    toward = geometry.workspace(grad, torch.float32, call.key_width)
    sums = geometry.workspace(grad, torch.float32) if plan.centred else None
    strength_sum = None
    if strength is not None:
        strength_sum = torch.zeros(geometry.slots, dtype=torch.float32, device=grad.device)
    tiles = plan.adjoint
    call.launch(
        adjoint_kernel, geometry.slots,
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


class Operand(NamedTuple):
    """A value workspace with the range that it was scaled by."""

    rows: Tensor
    largest: Tensor
    headroom: int


def toward(
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
    call.launch(
        toward_kernel, geometry.slots,
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


def answer(call: Call, geometry: Geometry, prepared: Prepared, columns: Prepared, column_blocks: int, operand: Operand, value: Tensor | None, strength: Tensor | None, bad: Tensor) -> Tensor:  # fmt: skip
    plan, tiles = call.plan, call.plan.solve
    out = prepared.keys.new_empty(
        (geometry.chains // geometry.heads, geometry.heads, geometry.length, call.value_width),
        dtype=torch.float32,
    )
    call.launch(
        answer_kernel, geometry.slots,
        prepared.keys, prepared.weights, columns.keys, columns.weights, *operand,
        value, *((0, 0, 0) if value is None else geometry.strides(value)), out, strength, bad,
        geometry.heads, geometry.chains, geometry.blocks, column_blocks, geometry.length,
        call.value_width, call.c2, call.shift(SHIFT_FORWARD), 1.0,
        R=plan.block, M=tiles.columns, STAGES=tiles.stages, SHIFT=SHIFT_FORWARD,
        **call.pieces, **call.value_pieces, **call.exact, num_warps=tiles.warps,
    )  # fmt: skip
    return out


def reference(
    call: Call, key: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None
) -> Tensor | None:
    """float32 only: the key that a sequence's kernel is centred on, its first, at length sqrt(D)."""
    if not call.plan.centred:
        return None
    geometry = call.geometry
    if geometry.table is not None:
        rows = geometry.table[0].clamp(max=max(0, geometry.length - 1))
        first = key.index_select(0, rows).transpose(0, 1)
    elif past is not None:
        first = past[0][:, :, :1]
    elif mask is None:
        first = key[:, :, :1]
    else:
        index = mask.to(torch.uint8).argmax(1)[:, None, None, None]
        first = key.take_along_dim(index, 2)
    first = first.float().reshape(geometry.chains, -1, key.shape[-1])
    length = first.square().sum(-1, keepdim=True).sqrt()
    usable = length.isfinite() & (length > 0)
    return torch.where(usable, first * (key.shape[-1] ** 0.5 / length), 1.0).contiguous()
