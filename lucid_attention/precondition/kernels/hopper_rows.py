"""64 rows of a user's tensors, for one group of four warps of `hopper_solve`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper_tiles import as_long, power_of_two


@gluon.jit
def rows_at(base, stride, width, at, end, UNIT: gl.constexpr, E: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Pointers to 64 rows of a user's tensor from ``at``, and which of their entries exist."""
    row = at + gl.arange(0, 64, gl.SliceLayout(1, layout))
    column = gl.arange(0, E, gl.SliceLayout(0, layout))
    pointers = base + as_long(row)[:, None] * (as_long(stride) * UNIT) + column[None, :]
    return pointers, row, row < end, (column < width * UNIT)[None, :]


@gluon.jit
def values_at(base, stride, width, Mask, batch, length, at, end, UNIT: gl.constexpr, E: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Pointers to 64 rows of values, and which of their entries belong to a token."""
    pointers, row, live, inside = rows_at(base, stride, width, at, end, UNIT, E, layout)
    if Mask is not None:
        live = live & (gl.load(Mask + batch * as_long(length) + row, mask=live, other=0) != 0)
    return pointers, live[:, None] & inside


@gluon.jit
def store_rows(base, stride, width, at, end, x, UNIT: gl.constexpr, E: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    pointers, _, live, inside = rows_at(base, stride, width, at, end, UNIT, E, layout)
    gl.store(pointers, x, mask=live[:, None] & inside)


@gluon.jit
def factors(Mask, strength, batch, length, at, end, SHIFT: gl.constexpr, layout: gl.constexpr):
    """Of 64 rows: which are tokens, and what ``P`` is multiplied by, 0 for others."""
    row = at + gl.arange(0, 64, gl.SliceLayout(1, layout))
    live = row < end
    if Mask is not None:
        live = live & (gl.load(Mask + batch * as_long(length) + row, mask=live, other=0) != 0)
    strength = gl.to_tensor(strength).to(gl.float32)
    return live, gl.where(live, strength * power_of_two(0 * at - SHIFT), 0.0)
