"""What shapes and dtypes decide: tiles, chains, memory, the arguments that kernels share.

A call works in two allocations (`Parts`), for C chains of B blocks of R rows, operands' dtype float16
for half-precision inputs, else float32:

    keys (C B R, D1 + D2)   solved, gh, yh (C B R, E1 + E2)   inverse (C B, 3, R/2, R/2)   ...

and int32 zeros: ticket, finished blocks, ranges, first bad rows.
"""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..validation import check_offsets
from .family import is_hoppers
from .kept import Kept, launches_are_unobserved, stream_of
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
ROUND = 640
"""Blocks that are solved before the number of chains at work is halved: about five for each multiprocessor.

Fewer, and a chain's blocks wait for each other; more, and what the chains at work read does not stay in the
second-level cache.
"""
WIDE_ROUND = 384
"""The same where a block reads twice as much: with 256 columns, or in `hopper_adjoint` with more than ``WIDE_KEYS`` of keys,
whose sums are read and written, too."""
WIDE_KEYS = 96
MOST_CHAINS = 64
"""At work at a time in the first round."""
FEW_BLOCKS, FEW_CHAINS = 128, 16
"""At most so many blocks of so many chains are few: about one for each of Hopper's multiprocessors, so that time is what a chain's
steps take, and products cost nothing. Of more chains, which have few steps then, nothing was measured."""
LINKED_BLOCKS, LINKED_CHAINS = 512, 8
"""The same for short steps alone (`hopper_links`): up to here blocks wait for each other more than they compute."""
MOST_TILES = 256
"""Descriptors that a layout remembers, by address."""
ALIGNMENT = 256
"""Bytes: every part of a buffer starts at a multiple, so that its alignment does not depend on lengths."""


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


Part = tuple[torch.dtype, tuple[int, ...]]


def headroom(longest: int) -> int:
    """``|y| <= 2 sqrt(N) max|v|`` for every entry: that many powers of two are kept free."""
    return math.ceil(math.log2(2.0 * math.sqrt(max(1, longest))))


def in_units(*lengths: int) -> tuple[int, list[int]]:
    """The largest unit of up to 8 entries that divides all lengths, and the lengths in it.

    A kernel that multiplies by a constant unit knows that so many entries lie together; of rows of 68, which
    begin at no multiple of 16 bytes, it would otherwise move each entry by itself, at a fifth of the speed.
    """
    # Multiples of 16 Triton knows by itself. One unit serves all: where widths differ the wider step is lost. Its 64-bit numbers are those that need it; divided, they would not,
    # and overflow when multiplied again.
    known = math.gcd(*lengths) % 16 == 0 or max(lengths) >= 1 << 31
    unit = 1 if known else math.gcd(8, *lengths)
    return unit, [length // unit for length in lengths]


def in_words(tensor: Tensor, width: int, unit: int) -> bool:
    """Whether the compiler knows that rows of ``width`` two-byte entries come in words of four bytes or more.

    Such rows can be copied to shared memory without passing through registers. ``unit``: see `in_units`.
    """
    known = unit > 1 or all(length % 16 == 0 for length in (width, *tensor.stride()[:-1]))
    return tensor.element_size() == 2 and known and tensor.data_ptr() % 16 == 0


class Geometry:
    """The chains of a call: dense ``(batch, heads, seq, ..)`` or packed ``(total, heads, ..)``."""

    def __init__(
        self, tensor: Tensor, block: int, offsets: Tensor | None = None, longest: int = 0
    ) -> None:
        self.block = block
        self.sequences = 0
        if offsets is None:
            batch, self.heads, self.length, _ = tensor.shape
            self.chains = batch * self.heads
            self.blocks = triton.cdiv(self.length, block)
            self.longest = self.length
        else:
            self.length, self.heads, _ = tensor.shape
            self.chains = self.heads
            self.sequences = offsets.shape[0] - 1
            self.blocks = self.length // block + min(self.sequences, self.length)
            self.longest = min(longest, self.length)
        self.packed = offsets is not None

    @property
    def slots(self) -> int:
        return self.chains * self.blocks

    @property
    def at_once(self) -> int:
        """Chains; of a packed batch those that it would be if all its sequences were as long as the longest."""
        return self.chains * triton.cdiv(self.length, max(1, self.longest))

    @property
    def headroom(self) -> int:
        return headroom(self.longest)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.heads, self.chains, self.blocks, self.length

    def rows(self, dtype: torch.dtype, *shape: int) -> Part:
        """A part of memory with a row for each row of all blocks."""
        return dtype, (self.slots * self.block, *shape)

    def strides(self, tensor: Tensor | None) -> tuple[int, int, int]:
        """Strides of (batch, head, row); zeros where there is no tensor."""
        if tensor is None:
            return 0, 0, 0
        if self.packed:
            return 0, tensor.stride(1), tensor.stride(0)
        return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def rounds(geometry: Geometry, most: int = ROUND, parts: int = 1) -> tuple[int, int]:
    """The order of tickets, as ``(wide, deep)``: ``deep`` rows of blocks of ``wide`` chains, then the next chains.

    With ``parts`` of a chain's columns of values each is a chain.

    After them come the rows from ``deep`` to ``2 deep``, of half as many chains at a time, and so on: what the
    chains at work read stays about the same, ``most`` blocks.
    """
    if geometry.packed:  # where a block is says nothing of how many come before it
        return parts * geometry.chains, geometry.blocks
    wide = min(parts * geometry.chains, MOST_CHAINS)
    return wide, min(most // wide, geometry.blocks)


def longest_sequence(offsets: Tensor, packed: Tensor, longest: int | None) -> int:
    """The longest sequence; the offsets are read, and then checked, only if it is not given."""
    if longest is not None and offsets.device.type != "cpu":
        return longest
    host = offsets.tolist()
    check_offsets(host, packed.shape[0], longest)
    return max((stop - start for start, stop in pairwise(host)), default=0)


class Parts:
    """The memory of a call by name: parts of one buffer of zeros, and of one that holds anything.

    Args:
        zeros: of each part, a dtype of four bytes and a number of entries.
        scratch: dtype and shape; None for a part that the call does without.
    """

    def __init__(
        self, zeros: dict[str, tuple[torch.dtype, int]], scratch: dict[str, Part | None]
    ) -> None:
        self._places: list[tuple[int, int, torch.dtype, tuple[int, ...]] | None] = []
        self._names = [*zeros, *scratch]
        self._frame: Any = namedtuple("Frame", self._names)
        self._sizes = [0, 0]
        for buffer, parts in enumerate((zeros.values(), scratch.values())):
            for part in parts:
                if part is None:
                    self._places.append(None)
                    continue
                dtype, shape = part
                shape = shape if isinstance(shape, tuple) else (shape,)
                self._places.append((buffer, self._sizes[buffer], dtype, shape))
                size = dtype.itemsize * math.prod(shape)
                self._sizes[buffer] += triton.cdiv(size, ALIGNMENT) * ALIGNMENT

    def buffers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(self._sizes[0] // 4, dtype=torch.int32, device=device)
        return zeros, torch.empty(self._sizes[1], dtype=torch.uint8, device=device)

    def tensor(self, name: str, buffers: tuple[Tensor, Tensor]) -> Tensor | None:
        """A part as a tensor."""
        place = self._places[self._names.index(name)]
        if place is None:
            return None
        buffer, start, dtype, shape = place
        count = dtype.itemsize * math.prod(shape)
        whole = buffers[buffer].view(torch.uint8)
        return whole[start : start + count].view(dtype).view(shape)

    def tensors(self, buffers: tuple[Tensor, Tensor]) -> Any:
        """All parts as tensors, by name."""
        return self._frame(*[self.tensor(name, buffers) for name in self._names])

    def addresses(self, buffers: tuple[Tensor, Tensor]) -> Any:
        """All parts as addresses, by name."""
        starts = buffers[0].data_ptr(), buffers[1].data_ptr()
        return self._frame._make(
            [None if place is None else starts[place[0]] + place[1] for place in self._places]
        )


class Call:
    """What a call's kernels share, kept between calls: everything that operands' layouts decide.

    Contents and addresses are never kept, but for descriptors of tiles, which are found by their address.
    """

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        kernel_scale: float,
        offsets: Tensor | None,
        longest: int,
        *,
        past: bool,
        keep: bool,
        high: bool = False,
    ) -> None:
        self.width, self.value_width = key.shape[-1], value.shape[-1]
        self.key_width, self.solution_width = (
            sum(pieces(width)) for width in (self.width, self.value_width)
        )
        # float32 inside also where float16 keys would move the exponents too far.
        half = key.dtype != torch.float32 and kernel_scale * self.width <= LARGEST_EXPONENT
        if high and half:
            # Only Hopper's kernels take P in two halves, and a past has no such kernel.
            widths = self.key_width, self.solution_width
            half = not past and is_hoppers(torch.float16, *widths, key.device, past=False)
        self.plan = plan_for(torch.float16 if half else torch.float32, self.width, self.value_width)
        self.device = key.device
        self.kernel_scale = kernel_scale
        self.c2 = kernel_scale * LOG2E
        self.pieces = dict(zip(("D1", "D2"), pieces(self.width), strict=True))
        self.value_pieces = dict(zip(("E1", "E2"), pieces(self.value_width), strict=True))
        self.hopper = is_hoppers(
            self.plan.dtype, self.key_width, self.solution_width, self.device, past=past
        )
        self.halves = high and self.hopper
        if self.hopper:
            self.plan = replace(self.plan, block=128)
        # Hopper's kernels have tiles of 64, 128 or 256 columns; what a workspace does not have of them the copy
        # engine fills with zeros.
        self.key_tile, self.solution_tile = (
            max(64, triton.next_power_of_2(width))
            for width in (self.key_width, self.solution_width)
        )
        self.exact = {"CENTRED": self.plan.centred, "PRECISION": self.plan.precision}
        self.geometry = Geometry(key, self.plan.block, offsets, longest)
        slots, chains = self.geometry.slots, self.geometry.at_once
        self.few = slots <= FEW_BLOCKS and chains <= FEW_CHAINS
        self.linked = (
            self.hopper and not high and max(self.key_tile, self.solution_tile) <= 128
            and (self.few or (slots <= LINKED_BLOCKS and chains <= LINKED_CHAINS))
        )  # fmt: skip
        # Columns of values are solved by themselves: a step of 64 is shorter.
        self.value_parts = self.solution_tile // 64 if self.linked and self.few else 1
        self.adjoint_round = WIDE_ROUND if self.key_width > WIDE_KEYS else ROUND
        self.parts: Parts | None = None
        self.keep = keep and not interpreted()
        self.kept: dict[int, Kept] = {}
        self.direct = False
        self.tiles: dict[tuple[int, int], tuple[object, ...]] = {}

    def shift(self, power: int) -> float:
        return power - self.c2 * self.width


class Run:
    """One use of a `Call`: its memory, ``at``, and the way to its kernels.

    Once every kernel of a call is kept, operands and parts are passed as addresses: Triton's way through
    tensors takes longer than a short sequence's kernels run.
    """

    def __init__(self, call: Call, parts: Callable[[], Parts]) -> None:
        if call.parts is None:
            call.parts = parts()
        self.call = call
        self.buffers = call.parts.buffers(call.device)  # to outlive what is launched
        self.direct = call.direct and launches_are_unobserved()
        if self.direct:
            self.stream = stream_of(call.device)
            self.at = call.parts.addresses(self.buffers)
        else:
            self.at = call.parts.tensors(self.buffers)

    def operands(self, *tensors: Tensor | None) -> tuple[Any, ...]:
        """Operands as this run's kernels take them."""
        if self.direct:
            return tuple([None if x is None else x.data_ptr() for x in tensors])
        return tensors

    def part(self, name: str) -> Any:
        """A part as a tensor."""
        assert self.call.parts is not None
        return self.call.parts.tensor(name, self.buffers)

    def tiles(
        self, kernel: Any, wanted: Callable[[], tuple[tuple[Any, int, int, int], ...]]
    ) -> tuple[Any, ...]:
        """Parts as tiles that Hopper's copy engine moves, as a kernel's first arguments.

        Args:
            wanted: for each the part, its width, and the rows and columns of a tile, which may be wider.
        """
        from .hopper_tiles import tile_descriptor

        if not self.direct:
            return tuple([tile_descriptor(part.view(-1, w), *tile) for part, w, *tile in wanted()])
        # All parts lie in one buffer, so that its address tells theirs.
        where = id(kernel), self.buffers[1].data_ptr()
        known = self.call.tiles.get(where)
        if known is None:
            if len(self.call.tiles) >= MOST_TILES:
                self.call.tiles.clear()
            kept = self.call.kept[id(kernel)]
            each = [kept.describe(index, part) for index, (part, *_) in enumerate(wanted())]
            known = self.call.tiles[where] = tuple([x for found in each for x in found])
        return known

    def launch(
        self,
        kernel: Any,
        programs: int,
        pointers: tuple[Any, ...],
        sizes: Callable[[], tuple[object, ...]],
        constants: Callable[[], dict[str, object]],
    ) -> None:
        """Launch ``kernel(*pointers, *sizes(), **constants())``.

        ``sizes`` and ``constants`` (compile-time constants and options) follow from the layout: a kept kernel has them.
        No kernel is launched twice in a call that is kept.
        """
        kept = self.call.kept.get(id(kernel))
        if kept is None:
            numbers, named = sizes(), constants()
            compiled = kernel[programs,](*pointers, *numbers, **named)
            if self.call.keep:
                names = kernel.arg_names[len(pointers) + len(numbers) :]
                tail = (*numbers, *(named[name] for name in names))
                self.call.kept[id(kernel)] = Kept(compiled, programs, pointers, tail)
        elif self.direct:
            kept.launch(self.stream, pointers)
        else:
            kept(pointers)

    def end(self) -> None:
        """All kernels of the call were launched: from the next run on they are launched by address."""
        call = self.call
        # Centred calls want a tensor for their reference; they are slow enough not to mind.
        if call.keep and not call.direct and not call.plan.centred:
            call.direct = all(kept.direct for kept in call.kept.values())


_calls: dict[tuple[object, ...], Call] = {}


def call_for(
    key: Tensor,
    value: Tensor,
    kernel_scale: float,
    others: tuple[Tensor | None, ...],
    offsets: Tensor | None = None,
    longest: int = 0,
    *,
    past: bool = False,
    keep: bool = True,
    high: bool = False,
) -> Call:
    """The ``Call`` for these operands and ``others``, all that a call's kernels read.

    Args:
        past: they follow one; such a call is not kept.
        keep: each kernel is launched once in such a call, so that it can be kept with it.
    """
    # What Triton compiles for depends on dtypes, strides, which operands there are and whether
    # pointers are multiples of 16; one that is not takes the long way.
    signature: list[object] = [key.device, kernel_scale, high]
    pointers = 0
    for x in (key, value, *others):
        if x is None:
            signature.append(None)
        else:
            signature += (x.dtype, x.shape, x.stride())
            pointers |= x.data_ptr()
    if offsets is not None:
        # Of the longest sequence no more matters: batches of many lengths share a call.
        geometry = Geometry(key, LANE, offsets, longest)
        few = (geometry.at_once <= FEW_CHAINS, geometry.at_once <= LINKED_CHAINS)
        signature += (offsets.shape[0], geometry.headroom, few)
        pointers |= offsets.data_ptr()
    keep = keep and not past and pointers % 16 == 0
    known = tuple(signature)
    call = _calls.get(known) if keep else None
    if call is None:
        call = Call(key, value, kernel_scale, offsets, longest, past=past, keep=keep, high=high)
        if keep:
            if len(_calls) >= MOST_CALLS:
                _calls.clear()
            _calls[known] = call
    return call
