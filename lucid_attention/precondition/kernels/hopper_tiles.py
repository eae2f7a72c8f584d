"""Device functions that Hopper's kernels share: waiting, proxies, layouts of a group's registers.

A group is four warps. TMA is the engine that copies tiles between global and shared memory; it sees
memory through a proxy of its own, so ordinary accesses and its are ordered by fences.
"""

from __future__ import annotations

import functools

from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import tiles

power_of_two = gluon.jit(tiles.power_of_two.fn)
range_exponent = gluon.jit(tiles.range_exponent.fn)
place_ticket = gluon.jit(tiles.place_ticket.fn)


@builtin
def reduce_add(descriptor, coord, source, _semantic=None):
    """Add a tile of shared memory to global memory, as ``tma.async_copy_shared_to_global`` stores one."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, coord, source.handle)


@gluon.jit
def wait_for(counter, need):
    """Return ``counter`` once it is at least ``need``, as the slowest thread of a warp saw it.

    See ``tiles.wait_for``; what TMA reads or adds after this comes after what was announced.
    """
    return gl.inline_asm_elementwise(
        """
        {
        .reg .pred behind;
        AGAIN:
        ld.acquire.gpu.global.b32 $0, [$1];
        setp.lt.s32 behind, $0, $2;
        @behind bra AGAIN;
        fence.proxy.async.global;
        redux.sync.min.s32 $0, $0, 0xffffffff;
        }
        """,
        "=&r,l,r",
        [counter.to(gl.int64, bitcast=True), need],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def look_at(counter):
    """``counter`` now; see ``wait_for``."""
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1]; fence.proxy.async.global; redux.sync.min.s32 $0, $0, 0xffffffff;",
        "=&r,l",
        [counter.to(gl.int64, bitcast=True)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def fence_proxy(value):
    """Order this thread's ordinary accesses and those of TMA; ``value`` passes through."""
    return gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.b32 $0, $1;",
        "=r,r",
        [value],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def stores_done(value):
    """Wait until what this thread stored or added by TMA is in global memory (not only read).

    It is then visible to this thread like its own stores, and a release announces it: no fence.
    """
    return gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.b32 $0, $1;",
        "=r,r,~{memory}",
        [value],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def anew():
    """Zero that the compiler does not know: addresses that build on it are not kept over a loop."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.constexpr_function
def accumulator(width):
    """64 rows of ``width`` columns in the registers of one group, as the tensor cores leave them."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])


@gluon.constexpr_function
def rows_layout(columns):
    """64 rows of four warps, 16 bytes of a row a thread."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@gluon.jit
def operand(x, WIDTH: gl.constexpr):
    """A tile as the left operand of a product of ``WIDTH`` columns: no data moves."""
    return gl.convert_layout(x.to(gl.float16), gl.DotOperandLayout(0, accumulator(WIDTH), 2))


@gluon.jit
def place_in(ring, n):
    """Which place of a ring of one, two or four has tile ``n``, and the parity of how often it was taken before."""
    SIZE: gl.constexpr = ring.shape[0]
    gl.static_assert(SIZE == 1 or SIZE == 2 or SIZE == 4)
    return n & (SIZE - 1), (n >> (SIZE // 2)) & 1


@gluon.jit
def in_order(x):
    """64 rows in the order of the registers, which `finish` reads: 16 bytes of a thread together."""
    D: gl.constexpr = x.shape[1]
    x = gl.permute(gl.reshape(x, (4, 2, 8, D // 8, 4, 2)), (3, 0, 2, 4, 1, 5))
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [2, 2], [1, 0])
    return gl.convert_layout(gl.reshape(x, (D // 4, 256)), layout)


@gluon.jit
def halves(x):
    """64 x 128 as two tiles of 64 x 64: no data moves."""
    first, second = gl.split(gl.permute(gl.reshape(x, (64, 2, 64)), (0, 2, 1)))
    return gl.convert_layout(first, accumulator(64)), gl.convert_layout(second, accumulator(64))


@gluon.jit
def first_columns(x, WIDTH: gl.constexpr):
    """Of 64 x 64 the first 64, 32 or 16 columns: no data moves."""
    if WIDTH < 64:
        x, _ = gl.split(gl.permute(gl.reshape(x, (64, 2, 32)), (0, 2, 1)))
    if WIDTH < 32:
        x, _ = gl.split(gl.permute(gl.reshape(x, (64, 2, 16)), (0, 2, 1)))
    return gl.convert_layout(x, accumulator(WIDTH))


@gluon.constexpr_function
def wide_layout(width, swaps):
    """A product's layout with pairs of columns exchanged between neighbouring lanes.

    After two exchanges a thread holds 8 neighbours of a row, and 4 lanes 32: whole sectors.
    """
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    columns = [[0, 8 << k] for k in range((width // 8).bit_length() - 1)]
    taken = []
    for swap in range(swaps):
        taken.append(lanes[swap])
        lanes[swap] = columns.pop(0)
    registers = [[0, 1], *taken, [8, 0], *columns]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, width])


@gluon.jit
def as_long(x):
    """A size or an index as 64 bits. As an unsigned number its upper half costs no register."""
    x = gl.to_tensor(x)
    if x.dtype.primitive_bitwidth < 64:
        x = x.to(gl.uint32, bitcast=True).to(gl.int64)
    return x


@gluon.jit
def keep(x):
    """``x``, to the compiler another number.

    Two conversions around it stay two: each is then one round of shuffles. A product before it is not fused with a sum after it.
    """
    PACK: gl.constexpr = 32 // x.dtype.primitive_bitwidth
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=PACK
    )


@gluon.jit
def widen(x, E: gl.constexpr):
    middle: gl.constexpr = wide_layout(E, 1)
    wide: gl.constexpr = wide_layout(E, 2)
    return gl.convert_layout(keep(gl.convert_layout(x, middle)), wide)


@gluon.jit
def narrow(x, sums: gl.constexpr, E: gl.constexpr):
    middle: gl.constexpr = wide_layout(E, 1)
    return gl.convert_layout(keep(gl.convert_layout(x, middle)), sums)


@functools.cache
def _shared_layout(bits: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(128 if bits == 16 else 0, bits, 2)


def tile_descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A workspace as tiles that TMA copies: halves of 128 bytes swizzled, or float32 as it is.

    Columns that the workspace does not have are zeros when they are loaded, and not stored.
    """
    # Not by its constructor, whose checks of a caller's shapes cost as much as a launch.
    descriptor = object.__new__(TensorDescriptor)
    height, width = tensor.shape
    descriptor.base = tensor
    descriptor.shape, descriptor.strides = [height, width], [width, 1]
    descriptor.block_shape = [rows, columns]
    descriptor.layout = _shared_layout(8 * tensor.element_size())
    descriptor.padding = "zero"
    return descriptor
