"""A call's stages, each one launch: memory, grids, arguments, which kernel family.

``at`` has a call's memory by name (`plan.Parts`); operands are as `plan.Run.operands` returns them.
"""

from __future__ import annotations

import enum
import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ..numerics import KEY_EPS
from .adjoint import adjoint_kernel
from .columns import range_kernel
from .finish import finish_kernel
from .inverse import inverse_kernel
from .past import answer_kernel
from .plan import (
    SHIFT_BACKWARD,
    SHIFT_FORWARD,
    Call,
    Geometry,
    Part,
    Parts,
    Run,
    in_units,
    interpreted,
)
from .prepare import prepare_kernel
from .solve import solve_kernel
from .table import table_kernel
from .toward import toward_kernel

PREPARED_ROWS = 32
INVERSE_WARPS = 4
INVERSE_REGISTERS = {64: 128, 128: 128}
"""By head size, at most so many to a thread: while one program waits for memory, others multiply."""
INT, FLOAT = torch.int32, torch.float32


@functools.cache
def _hopper_module(name: str) -> Any:
    return importlib.import_module(f".hopper_{name}", __package__)


class Form(enum.Enum):
    """How dV and the key gradient are found."""

    FUSED = "one sweep"  # hopper_adjoint
    APART = "dV first"  # hopper_solve, hopper_toward
    PORTABLE = "half of the gradient with dV, half after it"  # adjoint, toward


def form_of(call: Call) -> Form:
    """Without a past. Registers hold both sums of one sweep up to 128 columns, values no wider than keys, ``P`` not in two halves.

    One sweep has fewer products, but its steps wait for turns to add as well: not for few blocks.
    """
    if not call.hopper:
        return Form.PORTABLE
    fused = call.solution_tile <= call.key_tile <= 128 and not call.halves
    return Form.FUSED if fused and not call.few else Form.APART


# Memory


def _prepared(call: Call, geometry: Geometry, *, inverted: bool = True) -> dict[str, Part | None]:
    """What `prepare` writes."""
    plan, half = call.plan, call.plan.block // 2
    return {
        "table": (INT, (4, geometry.blocks)) if geometry.packed else None,
        "keys": geometry.rows(plan.dtype, call.key_width),
        "weights": geometry.rows(FLOAT) if plan.centred else None,
        "live": geometry.rows(torch.int8),
        "inverse": (plan.dtype, (geometry.slots, 3, half, half)) if inverted else None,
    }


def solve_parts(call: Call) -> Parts:
    geometry = call.geometry
    zeros = dict.fromkeys(("largest", "bad"), (INT, geometry.slots))
    zeros["done"] = (INT, geometry.slots * call.value_parts)
    scratch = _prepared(call, geometry)
    scratch["solved"] = geometry.rows(call.plan.dtype, call.solution_width)
    return Parts({"ticket": (INT, 1), **zeros}, scratch)


def adjoint_parts(call: Call, form: Form) -> Parts:
    """Memory in units of the values': gh 1 and toward 2, apart yh 1 as well; where their workspaces are wider up to 1.2, 2.5 and 1.2."""
    geometry, plan = call.geometry, call.plan
    fused, hopper = form is Form.FUSED, form is not Form.PORTABLE
    zeros = dict.fromkeys(("largest", "largest_second", "bad"), (INT, geometry.slots))
    zeros["done"] = (INT, geometry.slots * call.value_parts)
    # Programs of Hopper's adjoint report by halves of a block, and pass on turns to add.
    zeros["turn"] = (INT, 2 * geometry.slots * fused)
    zeros["norms"] = (INT, 2 * geometry.slots * (form is Form.APART))
    zeros["pairs"] = (FLOAT, geometry.slots * (1 + hopper))
    scratch = _prepared(call, geometry)
    scratch["gh"] = geometry.rows(plan.dtype, call.solution_width)
    scratch["yh"] = None if fused else geometry.rows(plan.dtype, call.solution_width)
    scratch["toward"] = geometry.rows(FLOAT, call.key_width)
    scratch["sums"] = geometry.rows(FLOAT) if plan.centred else None
    return Parts({"ticket": (INT, 1), **zeros}, scratch)


def past_parts(call: Call, geometry: Geometry) -> Parts:
    """Rows that are not solved: a past, or a chunk's keys before its right-hand side is known."""
    scratch = _prepared(call, geometry, inverted=False)
    scratch["rows"] = geometry.rows(call.plan.dtype, call.solution_width)
    zeros = dict.fromkeys(("largest", "bad"), (INT, geometry.slots))
    return Parts({**zeros, "largest_second": (INT, 0)}, scratch)


# Launches


def table(run: Run, offsets: Any) -> None:
    """Where the blocks of a packed batch are."""
    geometry = run.call.geometry
    if geometry.packed:
        run.launch(
            table_kernel, geometry.sequences + 1, (offsets, run.at.table),
            lambda: (geometry.sequences, geometry.length, geometry.blocks),
            lambda: {"R": geometry.block, "CHUNK": 128, "num_warps": 1},
        )  # fmt: skip


def inverts_in_shared_memory(call: Call) -> bool:
    """Whether Hopper's own kernel prepares blocks. Tiles of 256 columns would leave room for three programs, not four."""
    return call.hopper and max(call.key_tile, call.solution_tile) <= 128


def prepare(
    run: Run,
    geometry: Geometry,
    at: Any,
    key: Any,
    value: Any,
    second: Any,
    mask: Any,
    strength: Any,
    reference: Tensor | None,
    *,
    past: bool = False,
    form: Form | None = None,
) -> None:
    """Normalised keys, ranges, and, unless the rows are a ``past``, the inverses of the diagonal blocks.

    Args:
        form: of the gradient that they are for; None for the solve.
    """
    call, plan = run.call, run.call.plan

    def shared() -> dict[str, object]:
        return {
            "R": plan.block, "PACKED": geometry.packed, "CENTRED": plan.centred,
            **call.pieces, **call.value_pieces,
        }  # fmt: skip

    rows = 0 if reference is None else reference.shape[-2]
    if past:
        run.launch(
            prepare_kernel, geometry.slots * (plan.block // PREPARED_ROWS),
            (
                key, reference, value, mask, at.table, at.keys, at.weights, at.live, at.largest, at.bad,
            ),
            lambda: (
                *geometry.strides(key), rows, *geometry.strides(value), *geometry.sizes,
                call.width, call.value_width, call.c2, KEY_EPS,
            ),
            lambda: {**shared(), "ROWS": PREPARED_ROWS, "num_warps": 4},
        )  # fmt: skip
        return

    def units() -> tuple[int, list[int]]:
        strides = (*geometry.strides(key), *geometry.strides(value), *geometry.strides(second))
        return in_units(call.width, call.value_width, *strides)

    if inverts_in_shared_memory(call):
        solved = at.solved if form is None else at.gh if form is Form.APART else None
        _hopper_module("inverse").hopper_inverse(
            run, key, value, second, mask, strength, units,
            marked=solved if call.linked else None, fused=form is Form.FUSED,
        )  # fmt: skip
        return
    run.launch(
        inverse_kernel, geometry.slots,
        (
            key, reference, value, second, mask, at.table, at.keys, at.weights, at.live,
            at.largest, None if second is None else at.largest_second, at.bad, strength, at.inverse,
        ),
        lambda: (*units()[1], rows, *geometry.sizes, call.c2, call.shift(0), KEY_EPS, 1.0),
        lambda: {
            **shared(), **call.exact, "UNIT": units()[0],
            "WARPS": INVERSE_WARPS, "num_warps": INVERSE_WARPS,
            "maxnreg": INVERSE_REGISTERS.get(call.key_width),
        },
    )  # fmt: skip


def solve(run: Run, value: Any, out: Any, mask: Any, strength: Any) -> None:
    call, at, geometry, plan = run.call, run.at, run.call.geometry, run.call.plan
    if call.hopper:
        _hopper_module("solve").hopper_solve(run, value, out, at.solved, mask, strength)
        return
    tiles = plan.solve
    run.launch(
        solve_kernel, geometry.slots,
        (
            at.keys, at.weights, at.inverse, value, at.solved, out, mask, strength, at.table,
            at.done, at.largest, at.bad, at.ticket,
        ),
        lambda: (
            *geometry.strides(value), *geometry.strides(out), *geometry.sizes, call.value_width,
            geometry.headroom, call.c2, call.shift(SHIFT_FORWARD), 1.0,
        ),
        lambda: {
            "R": plan.block, "M": tiles.columns, "STAGES": tiles.stages, "PACKED": geometry.packed,
            "SHIFT": SHIFT_FORWARD, "INTERPRET": interpreted(), "num_warps": tiles.warps,
            **call.pieces, **call.value_pieces, **call.exact,
        },
    )  # fmt: skip


def hopper_adjoint(
    run: Run, form: Form, grad: Any, solution: Any, grad_value: Any, key: Any, grad_key: Any, mask: Any, strength: Any
) -> None:  # fmt: skip
    """Gradients of values and keys, by Hopper's kernels."""
    call, at, geometry = run.call, run.at, run.call.geometry
    if form is Form.FUSED:
        _hopper_module("adjoint").hopper_adjoint(run, grad, solution, grad_value, strength)
    else:
        hopper_solve = _hopper_module("solve").hopper_solve
        hopper_solve(run, grad, grad_value, at.gh, mask, strength, transposed=True)
        in_range(run, geometry, at, solution, at.yh, at.largest_second, at.gh, at.norms)
        _hopper_module("toward").hopper_toward(run, strength)

    def units() -> tuple[int, list[int]]:
        return in_units(call.width, *geometry.strides(key), *geometry.strides(grad_key))

    run.launch(
        finish_kernel, 2 * geometry.slots,
        (
            at.toward, key, grad_key, mask, strength, at.table, at.largest, at.largest_second, at.bad,
        ),
        lambda: (
            *units()[1], *geometry.sizes, geometry.headroom, call.kernel_scale, KEY_EPS,
        ),
        lambda: {
            "D": call.key_tile, "STORED": call.key_width, "UNIT": units()[0],
            "PACKED": geometry.packed, "num_warps": 8,
        },
    )  # fmt: skip


def adjoint(run: Run, grad: Any, solution: Any, grad_value: Any, strength: Any) -> None:
    """dV, what `toward` needs of it, and half of the key gradient."""
    call, at, geometry, plan = run.call, run.at, run.call.geometry, run.call.plan
    tiles = plan.adjoint
    run.launch(
        adjoint_kernel, geometry.slots,
        (
            at.keys, at.weights, at.inverse, at.live, grad, solution, at.gh, at.yh, grad_value,
            at.toward, at.sums, None if strength is None else at.pairs, strength, at.table,
            at.done, at.largest, at.largest_second, at.bad, at.ticket,
        ),
        lambda: (
            *geometry.strides(grad), *geometry.strides(solution), *geometry.strides(grad_value),
            *geometry.sizes, call.value_width, geometry.headroom, call.c2,
            call.shift(SHIFT_BACKWARD), 1.0,
        ),
        lambda: {
            "R": plan.block, "M": tiles.columns, "STAGES": tiles.stages, "PACKED": geometry.packed,
            "SHIFT": SHIFT_BACKWARD, "INTERPRET": interpreted(), "num_warps": tiles.warps,
            **call.pieces, **call.value_pieces, **call.exact,
        },
    )  # fmt: skip


def toward(
    run: Run,
    geometry: Geometry,
    at: Any,
    rows: Any,
    headroom: int,
    columns: Any,
    operand: Any,
    operand_largest: Any,
    operand_headroom: int,
    column_blocks: int,
    sums: tuple[Any, Any],
    key: Any,
    grad_key: Any,
    mask: Any,
    strength: Any,
    reference: Tensor | None,
    *,
    causal: bool,
    add: bool,
    finish: bool,
    strength_sum: Any = None,
) -> None:
    """What the columns, with their ``operand``, give to the key gradient of ``rows``; ``sums``: it and its weights.

    Args:
        at, columns: the memory of the rows' and of the columns' keys.
    """
    call, plan, tiles = run.call, run.call.plan, run.call.plan.toward
    run.launch(
        toward_kernel, geometry.slots,
        (
            at.keys, at.weights, rows, at.largest, columns.keys, columns.weights, operand, operand_largest,
            *sums, key, reference, grad_key, mask, strength, strength_sum, at.table, at.bad,
        ),
        lambda: (
            headroom, operand_headroom, *geometry.strides(key),
            0 if reference is None else reference.shape[-2], *geometry.strides(grad_key),
            geometry.heads, geometry.chains, geometry.blocks, column_blocks, geometry.length,
            call.width, call.c2, call.shift(SHIFT_BACKWARD), call.kernel_scale, KEY_EPS, 1.0,
        ),
        lambda: {
            "R": plan.block, "M": tiles.columns, "STAGES": tiles.stages, "PACKED": geometry.packed,
            "CAUSAL": causal, "ADD": add, "FINISH": finish, "SHIFT": SHIFT_BACKWARD,
            "num_warps": tiles.warps, **call.pieces, **call.value_pieces, **call.exact,
        },
    )  # fmt: skip


def in_range(
    run: Run, geometry: Geometry, at: Any, value: Any, rows: Any, largest: Any, other: Any = None, norms: Any = None
) -> None:  # fmt: skip
    """Values as columns, ``rows``, scaled by their largest; and the largest ``norms`` of these and ``other`` rows."""
    call, plan = run.call, run.call.plan
    run.launch(
        range_kernel, geometry.slots, (value, at.live, at.table, rows, largest, other, norms),
        lambda: (*geometry.strides(value), 0, *geometry.sizes, call.value_width),
        lambda: {
            "R": plan.block, "PACKED": geometry.packed, "CENTRED": plan.centred,
            "num_warps": 4 if call.solution_width <= 128 else 8, **call.value_pieces,
        },
    )  # fmt: skip


def answer(
    run: Run,
    geometry: Geometry,
    at: Any,
    columns: Any,
    column_blocks: int,
    operand: Any,
    headroom: int,
    value: Tensor | None,
    strength: Any,
) -> Tensor:
    """``value - b P operand`` between rows ``at`` and ``columns``, in float32."""
    call, plan, tiles = run.call, run.call.plan, run.call.plan.solve
    shape = (geometry.chains // geometry.heads, geometry.heads, geometry.length, call.value_width)
    out = torch.empty(shape, dtype=FLOAT, device=call.device)
    run.launch(
        answer_kernel, geometry.slots,
        (
            at.keys, at.weights, columns.keys, columns.weights, operand, columns.largest,
            value, out, strength, columns.bad,
        ),
        lambda: (
            *geometry.strides(value), headroom, geometry.heads, geometry.chains, geometry.blocks,
            column_blocks, geometry.length, call.value_width, call.c2, call.shift(SHIFT_FORWARD), 1.0,
        ),
        lambda: {
            "R": plan.block, "M": tiles.columns, "STAGES": tiles.stages, "SHIFT": SHIFT_FORWARD,
            "num_warps": tiles.warps, **call.pieces, **call.value_pieces, **call.exact,
        },
    )  # fmt: skip
    return out


def reference(
    run: Run, key: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None
) -> Tensor | None:
    """float32 only: the key that a sequence's kernel is centred on, its first, at length sqrt(D)."""
    if not run.call.plan.centred:
        return None
    geometry = run.call.geometry
    if geometry.packed:
        rows = run.at.table[0].clamp(0, max(0, geometry.length - 1))
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
