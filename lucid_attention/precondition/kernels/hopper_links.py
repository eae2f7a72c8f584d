"""How `hopper_solve` makes a chain's steps short where few chains are solved.

A block's solution is, with ``T`` the inverse of the block and ``P_i`` its kernel with block ``i``,

    y = T (v - b sum_i P_i y_i) = T (v - b sum_{i < last} P_i y_i) + W y_last,    W = -b T P_last

Two things make the step from ``y_last`` to ``y`` short. The *link* ``W`` is known before ``y_last`` is: when that comes, one product is left. And
``y_last`` is not announced and then copied, which is three ways through memory; its rows begin as *marks*, which
`hopper_inverse` writes, and whoever waits for them reads them until no word is a mark any more.

A mark is 32 bits of ones, two float16 NaNs that no conversion gives. Each word says of itself that it is there: no order between them is
needed, only that an aligned word is never seen half written. Blocks that come later copy, once the counter says so. It counts
halves of blocks, of which a later one may come before an earlier one's here: but who finishes block k has seen all words of k - 1, and so on, so that
whatever is counted, all blocks before it are in memory.

``v - b sum_{i < last} P_i y_i`` and ``T`` times it are a right-hand side and a solution of the sequence without the rows of ``last``: the bounds that keep
right-hand sides and solutions in float16's range hold for them, too.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper_tiles import as_long, power_of_two, rows_layout


@gluon.jit
def marks(ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """A tile of marks."""
    return gl.full([ROWS, COLUMNS], -1, gl.int16, layout).to(gl.float16, bitcast=True)


@gluon.constexpr_function
def _until_written(count, apart):
    """Load 16 bytes ``count`` times, so many bytes apart, all at once, again and again until no word is a mark."""
    words = 4 * count
    text = "{\n.reg .pred behind;\n.reg .b32 top;\nAGAIN:\n"
    for k in range(count):
        four = ", ".join(f"${4 * k + word}" for word in range(4))
        text += f"ld.relaxed.gpu.global.v4.b32 {{{four}}}, [${words} + {k * apart}];\n"
    text += "max.u32 top, $0, $1;\n"
    for word in range(2, words):
        text += f"max.u32 top, top, ${word};\n"
    return text + "setp.eq.u32 behind, top, 0xffffffff;\n@behind bra AGAIN;\n}"


@gluon.constexpr_function
def _constraints(outputs, inputs):
    return ",".join(["=&r"] * outputs + ["l"] * inputs)


@gluon.jit
def once_written(Rows, row, first_column, E: gl.constexpr, STORED: gl.constexpr):
    """64 rows from ``row``, ``E`` columns, of marked rows of ``STORED``, once they are written; 0 beyond ``STORED``."""
    layout: gl.constexpr = rows_layout(E)
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, layout))
    column = first_column + gl.arange(0, E, gl.SliceLayout(0, layout))
    there = column < STORED
    # Threads without columns of their own look at the first ones, which this part of the columns has itself.
    pointers = (
        Rows + as_long(rows)[:, None] * STORED + gl.where(there, column, first_column)[None, :]
    )
    COUNT: gl.constexpr = E // 2
    # A thread's vectors are 1024 / E rows apart.
    x = gl.inline_asm_elementwise(
        _until_written(COUNT // 8, 2 * (1024 // E) * STORED),
        _constraints(COUNT // 2, COUNT),
        [pointers],
        dtype=gl.float16,
        is_pure=False,
        pack=COUNT,
    )
    return gl.where(there[None, :], x, 0.0)


@gluon.jit
def write_rows(Rows, row, first_column, x, STORED: gl.constexpr):
    """Write 64 rows over marks: by words of four bytes at least (``STORED`` is a multiple of 16), never by halves of one."""
    E: gl.constexpr = x.shape[1]
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, rows_layout(E)))
    column = first_column + gl.arange(0, E, gl.SliceLayout(0, rows_layout(E)))
    pointers = Rows + as_long(rows)[:, None] * STORED + column[None, :]
    gl.store(pointers, x, mask=(column < STORED)[None, :])


@gluon.jit
def as_link(w, left: gl.constexpr):
    """``W`` as a left operand, and the exponent of two that each row carries: its largest entry comes below 2^15.

    ``P`` carries 2^15 for the same reason: float16 then has what it can of small entries.
    """
    largest = gl.max(gl.abs(w), axis=1)
    exponent = (largest.to(gl.int32, bitcast=True) >> 23) - 127
    carried = gl.minimum(14 - exponent, 15)
    link = gl.convert_layout((w * power_of_two(carried)[:, None]).to(gl.float16), left)
    return link, gl.convert_layout(carried, gl.SliceLayout(1, left.parent))
