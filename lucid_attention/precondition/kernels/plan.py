"""What shapes and dtypes decide: tiles, chains, workspaces, the arguments that kernels share.

Workspaces of a call, for C chains of B blocks of R rows, in the operands' dtype (float16 for
half-precision inputs, else float32):

    Kh  (C B R, D1 + D2)   Yh, Gh  (C B R, E1 + E2)   T  (C B, 3, R/2, R/2)

and ``Control``, int32 zeros: ticket, finished blocks, ranges, first bad rows.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..validation import check_offsets
from .tiles import LANE

LOG2E = math.log2(math.e)
# P carries 2^SHIFT in half precision: 2^15 is all that float16 has above 1; T = (dV . y) P needs
# the room below as well.
SHIFT_FORWARD = 15
SHIFT_BACKWARD = 7
LARGEST_EXPONENT = 20.0
"""Half precision inside up to this ``kernel_scale * D``; the default scale has sqrt(D), at most 16.

Rounding keys to float16 moves the exponent of P by up to about a thousandth of it.
"""
MOST_CALLS = 1024
"""Layouts that are remembered; beyond, all are forgotten and come back as they are met."""


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, in its interpreter."""
    return bool(triton.knobs.runtime.interpret)


def pieces(width: int) -> tuple[int, int]:
    """A head size as two tile widths, powers of two of at least 16; the second may be 0.

    Up to 64 there is one piece: a second one of 16 would save little, and the assembler that comes
    with Triton 3.6 spoiled the operand descriptors of some 32 + 16 builds on Hopper (a solve of head
    sizes 17 and 40 ended in an illegal memory access).
    """
    first = max(LANE, 1 << (width.bit_length() - 1))
    if width <= first:
        return first, 0
    if width <= 64:
        return 2 * first, 0
    second = max(LANE, 1 << (width - first - 1).bit_length())
    return (2 * first, 0) if second == first else (first, second)


class Tiles(NamedTuple):
    """One kernel's tile and its compiler options."""

    columns: int
    stages: int
    warps: int


@dataclass(frozen=True)
class Plan:
    """What the shapes and dtypes of a call decide."""

    dtype: torch.dtype
    block: int
    solve: Tiles
    adjoint: Tiles
    toward: Tiles
    precision: str

    @property
    def centred(self) -> bool:
        return self.dtype == torch.float32


def plan_for(dtype: torch.dtype, width: int, value_width: int) -> Plan:
    """Hand-picked tiles; a function of dtype and head sizes alone, so lengths never recompile."""
    widest = max(sum(pieces(width)), sum(pieces(value_width)))
    if dtype == torch.float32:
        if widest <= 128:
            tiles = Tiles(32, 2, 4)
            return Plan(torch.float32, 64, tiles, Tiles(16, 1, 4), Tiles(16, 1, 4), "tf32x3")
        tiles = Tiles(16, 1, 4)
        return Plan(torch.float32, 32, tiles, tiles, tiles, "tf32x3")
    if widest <= 64:
        return Plan(torch.float16, 128, Tiles(64, 3, 8), Tiles(64, 2, 8), Tiles(64, 3, 8), "tf32")
    if widest <= 128:
        solve, adjoint, toward = Tiles(64, 3, 8), Tiles(64, 2, 8), Tiles(128, 2, 8)
        return Plan(torch.float16, 128, solve, adjoint, toward, "tf32")
    return Plan(torch.float16, 64, Tiles(64, 2, 4), Tiles(32, 2, 4), Tiles(32, 2, 4), "tf32")


class Geometry:
    """The chains of a call: dense ``(batch, heads, seq, ..)`` or packed ``(total, heads, ..)``."""

    def __init__(
        self,
        tensor: Tensor,
        block: int,
        offsets: Tensor | None = None,
        longest: int = 0,
    ) -> None:
        self.block = block
        self.packed = offsets is not None
        if offsets is None:
            batch, self.heads, self.length, _ = tensor.shape
            self.chains = batch * self.heads
            self.blocks = triton.cdiv(self.length, block)
            self.longest = self.length
            self.table: Tensor | None = None
        else:
            self.length, self.heads, _ = tensor.shape
            self.chains = self.heads
            sequences = offsets.shape[0] - 1
            self.blocks = self.length // block + min(sequences, self.length)
            self.longest = min(longest, self.length)
            self.table = _block_table(offsets, self.length, block, self.blocks)

    @property
    def slots(self) -> int:
        return self.chains * self.blocks

    @property
    def headroom(self) -> int:
        """``|y| <= 2 sqrt(N) max|v|`` for every entry: that many powers of two are kept free."""
        return math.ceil(math.log2(2.0 * math.sqrt(max(1, self.longest))))

    def strides(self, tensor: Tensor) -> tuple[int, int, int]:
        """Strides of (batch, head, row)."""
        if self.packed:
            return 0, tensor.stride(1), tensor.stride(0)
        return tensor.stride(0), tensor.stride(1), tensor.stride(2)

    def workspace(self, like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
        return like.new_empty((self.slots * self.block, *shape), dtype=dtype)


def _block_table(offsets: Tensor, total: int, block: int, blocks: int) -> Tensor:
    """Per block: first row, number of rows, first and one past the last block of its sequence."""
    # Wrong offsets that were not read give wrong results, but no index out of range.
    offsets = offsets.clamp(0, total)
    starts, ends = offsets[:-1], offsets[1:]
    counts = (ends - starts).clamp(min=0)
    after = ((counts + (block - 1)) // block).cumsum(0)
    index = torch.arange(blocks, device=offsets.device)
    sequence = torch.searchsorted(after, index, right=True)
    used = sequence < after.shape[0]
    sequence = sequence.clamp(max=max(0, after.shape[0] - 1))
    last = after[sequence]
    first = torch.where(sequence > 0, after[sequence - 1], 0)
    local = (index - first) * block
    rows = (counts[sequence] - local).clamp(0, block)
    rows = torch.where(used, rows, 0)
    return torch.stack((starts[sequence] + local, rows, first, last.clamp(max=blocks))).to(
        torch.int32
    )


def longest_sequence(offsets: Tensor, packed: Tensor, longest: int | None) -> int:
    """The longest sequence; the offsets are read, and then checked, only if it is not given."""
    if longest is not None and offsets.device.type != "cpu":
        return longest
    host = offsets.tolist()
    check_offsets(host, packed.shape[0], longest)
    return max((stop - start for start, stop in pairwise(host)), default=0)


class Control:
    """The int32 zeros that a launch starts from, as views of one buffer.

    Every part starts at a multiple of 128 bytes: an alignment that depended on the length would compile
    the kernels anew.
    """

    def __init__(self, like: Tensor, *slots: int) -> None:
        room = [32, *(-(-count // 32) * 32 for count in slots)]
        buffer = torch.zeros(sum(room), dtype=torch.int32, device=like.device)
        self.ticket, *self.parts = buffer.split(room)


class Call:
    """What a call's kernels share, kept between calls: everything that operands' layouts decide.

    ``launch`` also keeps the compiled kernels: finding out anew, for every argument, what decides how a
    kernel is compiled takes Triton longer than a short sequence's kernels run.
    """

    geometry: Geometry

    def __init__(self, key: Tensor, value: Tensor, kernel_scale: float, *, keep: bool) -> None:
        self.width, self.value_width = key.shape[-1], value.shape[-1]
        # float32 inside also where float16 keys would move the exponents too far.
        exact = key.dtype == torch.float32 or kernel_scale * self.width > LARGEST_EXPONENT
        self.plan = plan_for(
            torch.float32 if exact else torch.float16, self.width, self.value_width
        )
        self.kernel_scale = kernel_scale
        self.c2 = kernel_scale * LOG2E
        self.pieces = dict(zip(("D1", "D2"), pieces(self.width), strict=True))
        self.value_pieces = dict(zip(("E1", "E2"), pieces(self.value_width), strict=True))
        self.key_width = sum(self.pieces.values())
        self.solution_width = sum(self.value_pieces.values())
        self.exact = {"CENTRED": self.plan.centred, "PRECISION": self.plan.precision}
        self._keep = keep
        self._compiled: dict[Any, tuple[Any, tuple[object, ...]]] = {}

    def shift(self, power: int) -> float:
        return power - self.c2 * self.width

    def launch(self, kernel: Any, programs: int, *args: object, **constants: object) -> None:
        """Launch ``kernel`` with its arguments in order; ``constants`` are its constexprs and options.

        Triton's launch hooks (profilers) see every launch; its debugging knobs count when they are set before a
        layout is met.
        """
        which = (kernel, *constants.values())
        known = self._compiled.get(which)
        if known is not None:
            compiled, order = known
            compiled[programs, 1, 1](*args, *order)
            return
        compiled = kernel[programs,](*args, **constants)
        if self._keep and compiled is not None and not interpreted():
            names = kernel.arg_names[len(args) :]
            self._compiled[which] = compiled, tuple(constants[name] for name in names)


_calls: dict[tuple[object, ...], Call] = {}


def call_for(
    key: Tensor,
    value: Tensor,
    kernel_scale: float,
    others: tuple[Tensor | None, ...],
    offsets: Tensor | None = None,
    longest: int = 0,
    *,
    keep: bool = True,
) -> Call:
    """The ``Call`` for these operands and ``others``, all that a call's kernels read.

    Args:
        keep: each kernel is launched once in such a call, so that it can be kept with it.
    """
    operands = (key, value, *others)
    # What Triton compiles for depends on dtypes, strides, which operands there are and whether
    # pointers are multiples of 16; one that is not takes the long way.
    signature: list[object] = [key.device, kernel_scale]
    pointers = 0
    for x in operands:
        if x is None:
            signature.append(None)
        else:
            signature += (x.dtype, x.shape, x.stride())
            pointers |= x.data_ptr()
    if offsets is not None:
        signature.append(offsets.shape[0])
    keep = keep and pointers % 16 == 0
    known = tuple(signature)
    call = _calls.get(known) if keep else None
    if call is None:
        call = Call(key, value, kernel_scale, keep=keep)
        if offsets is None:
            call.geometry = Geometry(key, call.plan.block)
        if keep:
            if len(_calls) >= MOST_CALLS:
                _calls.clear()
            _calls[known] = call
    if offsets is not None:
        call = copy.copy(call)
        call.geometry = Geometry(key, call.plan.block, offsets, longest)
    return call


class Prepared(NamedTuple):
    keys: Tensor
    weights: Tensor | None
    live: Tensor
    inverse: Tensor | None
    reference: Tensor | None
