"""What layouts decide: which calls are kept, their memory, the order of tickets, where packed blocks are."""

from __future__ import annotations

import functools
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from lucid_attention.precondition.kernels import kept, plan
from lucid_attention.precondition.kernels.plan import Geometry, Parts, Run, call_for, rounds
from lucid_attention.precondition.kernels.table import table_kernel
from lucid_attention.precondition.kernels.tiles import place_ticket
from tests.precondition.test_definition import pack

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="runs in Triton's interpreter, which is off where there is a GPU",
)


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_calls", {})


def test_the_same_layout_is_the_same_call() -> None:
    key, value = torch.randn(2, 2, 3, 100, 64).unbind(0)
    strength = torch.ones(3)
    first = call_for(key, value, 0.1, (strength,))
    assert call_for(key.clone(), value.clone(), 0.1, (strength,)) is first
    others = (
        call_for(key, value, 0.2, (strength,)),
        call_for(key, value, 0.1, (None,)),
        call_for(key.half(), value.half(), 0.1, (strength,)),
        call_for(key[:, :, :99], value[:, :, :99], 0.1, (strength,)),
        call_for(key.transpose(1, 2).contiguous().transpose(1, 2), value, 0.1, (strength,)),
        call_for(key, value, 0.1, (strength.double(),)),
    )
    assert len({id(call) for call in (first, *others)}) == 1 + len(others)
    assert call_for(key, value, 0.1, (strength,)) is first


def test_what_is_not_kept() -> None:
    odd = torch.randn(2 * 3 * 100 * 64 + 1)[1:].view(2, 3, 100, 64)  # no multiple of 16 bytes
    key = torch.randn(2, 3, 100, 64)
    for operands in ((odd, key), (key, odd)):
        assert call_for(*operands, 0.1, ()) is not call_for(*operands, 0.1, ())
    assert call_for(key, key, 0.1, (), keep=False) is not call_for(key, key, 0.1, (), keep=False)
    assert not plan._calls


def test_packed_calls_are_known_by_their_sizes() -> None:
    """Where sequences begin is found on the device, in every call anew."""
    key = torch.randn(100, 3, 64)

    def call(offsets: list[int], longest: int = 90) -> plan.Call:
        return call_for(key, key, 0.1, (), torch.tensor(offsets), longest)

    assert call([0, 10, 100]) is call([0, 30, 100])
    assert call([0, 10, 100]) is not call([0, 30, 60, 100])
    assert call([0, 10, 100]) is call([0, 30, 100], 95)
    assert call([0, 10, 100]) is not call([0, 60, 100], 60)  # fewer powers of two kept free
    moved = torch.tensor([9, 0, 10, 100], dtype=torch.int32)[1:]  # no multiple of 16 bytes
    assert call_for(key, key, 0.1, (), moved, 90) is not call([0, 10, 100])


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MOST_CALLS", 5)
    for seq in range(1, 20):
        key = torch.randn(1, 1, seq, 64)
        call_for(key, key, 0.1, ())
        assert len(plan._calls) <= 5


def test_parts_do_not_overlap() -> None:
    parts = Parts(
        {"ticket": (torch.int32, 1), "sums": (torch.float32, 77)},
        {"keys": (torch.float16, (5, 3)), "none": None, "live": (torch.int8, (13,))},
    )
    buffers = parts.buffers(torch.device("cpu"))
    at = parts.tensors(buffers)
    assert at.none is None
    assert at.sums.shape == (77,) and at.keys.shape == (5, 3) and at.keys.dtype == torch.float16
    assert not at.ticket.any() and not at.sums.any()
    addresses = parts.addresses(buffers)
    spans = []
    for name in ("ticket", "sums", "keys", "live"):
        part: Tensor = getattr(at, name)
        assert getattr(addresses, name) == part.data_ptr() and part.data_ptr() % 16 == 0
        assert parts.tensor(name, buffers).data_ptr() == part.data_ptr()  # type: ignore[union-attr]
        spans.append((part.data_ptr(), part.data_ptr() + part.nbytes))
    for (_, stop), (start, _) in pairwise(sorted(spans)):
        assert stop <= start


class FakeKernel(SimpleNamespace):
    """Stands for a jitted kernel: what it was launched with, in Triton's ways."""

    arg_names = ("X", "n", "BLOCK", "SHIFT")
    __hash__ = object.__hash__

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def first(*args: Any, **constants: Any) -> Any:
            self.got.append(("first", grid, args, constants))
            return FakeCompiled(self)

        return first


class FakeCompiled:
    """Stands for a compiled kernel, with a function in C where Triton 3.6 has it."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel: FakeKernel) -> None:
        self.got = kernel.got
        self.run = SimpleNamespace(
            global_scratch_size=kernel.scratch, profile_scratch_size=0,
            launch_cooperative_grid=False, launch_pdl=False,
            launch=functools.partial(self._direct),  # like a function in C, it has no code
        )  # fmt: skip

    def _direct(self, *args: Any) -> None:
        self.got.append(("direct", args))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.got.append(("kept", grid, args))


@pytest.mark.parametrize("scratch", [0, 64])
def test_launches_after_the_first(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept, then direct: constants where the signature has them, addresses for tensors."""
    monkeypatch.setattr(plan, "interpreted", lambda: False)
    monkeypatch.setattr(plan, "stream_of", lambda device: 5)
    monkeypatch.setattr(kept, "make_tensordesc_arg", lambda *_: ())
    observed = False
    monkeypatch.setattr(plan, "launches_are_unobserved", lambda: not observed)
    kernel = FakeKernel(got=[], scratch=scratch)
    key = torch.randn(1, 1, 5, 64, dtype=torch.float16)

    def use() -> tuple[Any, ...]:
        run = Run(call_for(key, key, 0.1, ()), lambda: Parts({"a": (torch.int32, 1)}, {}))
        (x,) = run.operands(key)
        run.launch(kernel, 7, (x,), lambda: (3,), lambda: {"SHIFT": 2, "BLOCK": 64, "num_warps": 4})
        run.end()
        last: tuple[Any, ...] = kernel.got[-1]
        return last

    assert use() == ("first", (7,), (key, 3), {"SHIFT": 2, "BLOCK": 64, "num_warps": 4})
    if scratch:  # memory that Triton allocates at every launch: its own way
        assert use() == ("kept", (7, 1, 1), (key, 3, 64, 2))
        return
    before = ("function", False, False, None, None, "metadata", None, None, None)
    assert use() == ("direct", (7, 1, 1, 5, *before, key.data_ptr(), 3, 64, 2))
    observed = True
    assert use() == ("kept", (7, 1, 1), (key, 3, 64, 2))


def test_with_another_triton_launches_go_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "make_tensordesc_arg", None)
    compiled = FakeCompiled(FakeKernel(got=[], scratch=0))
    found = kept.Kept(compiled, 3, (), ())
    assert not found.direct
    found(())
    assert compiled.got == [("kept", (3, 1, 1), ())]


def test_profilers_hear_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept.launches_are_unobserved()
    hook = triton.knobs.runtime.launch_enter_hook
    if hook is None:
        monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda *_: None)
    else:
        monkeypatch.setattr(hook, "calls", [lambda *_: None])
    assert not kept.launches_are_unobserved()


# The order of tickets


@triton.jit
def _places(chain_of, block_of, chains, blocks, wide, deep):
    ticket = tl.program_id(0)
    chain, block = place_ticket(ticket, chains, blocks, wide, deep)
    tl.store(chain_of + ticket, chain)
    tl.store(block_of + ticket, block)


@needs_interpreter
@pytest.mark.parametrize(
    ("chains", "blocks", "wide", "deep"),
    [(1, 9, 1, 2), (5, 13, 5, 3), (5, 16, 4, 4), (7, 5, 2, 8), (3, 20, 1, 1), (6, 6, 6, 6)],
)
def test_every_block_has_one_ticket_after_those_it_waits_for(
    chains: int, blocks: int, wide: int, deep: int
) -> None:
    chain, block = torch.empty(2, chains * blocks, dtype=torch.int32)
    _places[(chains * blocks,)](chain, block, chains, blocks, wide, deep)
    places = list(zip(chain.tolist(), block.tolist(), strict=True))
    assert sorted(places) == list(product(range(chains), range(blocks)))
    for one in range(chains):  # else a program may wait for one that never starts
        assert [b for c, b in places if c == one] == list(range(blocks))


def test_rounds() -> None:
    def found(batch: int, heads: int, seq: int) -> tuple[int, int]:
        return rounds(Geometry(torch.empty(batch, heads, seq, 1, device="meta"), 128))

    for batch, heads, seq in ((4, 8, 4096), (1, 8, 131072), (32, 8, 2048), (1, 1, 8192), (1, 1, 1)):
        wide, deep = found(batch, heads, seq)
        assert 1 <= wide <= batch * heads and deep >= 1
        assert wide * deep <= plan.ROUND
    assert found(1, 8, 131072) == (8, plan.ROUND // 8)
    packed = Geometry(torch.empty(1000, 3, 1, device="meta"), 128, torch.tensor([0, 7, 1000]), 993)
    assert rounds(packed) == (3, packed.blocks)
    assert rounds(packed, parts=2) == (6, packed.blocks)
    dense = Geometry(torch.empty(1, 3, 40 * 128, 1, device="meta"), 128)
    assert rounds(dense) == (3, 40)
    assert rounds(dense, parts=2) == (6, 40)


@pytest.mark.parametrize(
    ("width", "value_width", "most"),
    [
        (64, 64, plan.ROUND), (96, 96, plan.ROUND), (64, 128, plan.ROUND),
        (100, 100, plan.WIDE_ROUND), (128, 128, plan.WIDE_ROUND), (128, 64, plan.WIDE_ROUND),
    ],
)  # fmt: skip
def test_rounds_of_the_adjoint(width: int, value_width: int, most: int) -> None:
    """Sums of keys' gradients wider than 96 columns fill the cache sooner."""
    assert plan.WIDE_ROUND < plan.ROUND
    key, value = (torch.zeros(1, 2, 300, columns) for columns in (width, value_width))
    call = call_for(key, value, 0.1, ())
    assert call.adjoint_round == most


# Packed batches


def blocks_of(offsets: list[int], total: int, blocks: int, rows: int) -> list[list[int]]:
    """The table by its definition: first row, rows, the sequence's first block and one past its last."""
    found = []
    for start, stop in pairwise(offsets):
        count = -(-(stop - start) // rows)
        first = len(found)
        found += [
            [start + rows * i, min(rows, stop - start - rows * i), first, first + count]
            for i in range(count)
        ]
    return found + [[total, 0, 0, blocks]] * (blocks - len(found))


@needs_interpreter
@pytest.mark.parametrize("rows", [32, 128])
@pytest.mark.parametrize(
    "lengths",
    [(5,), (5, 0, 129, 1, 300, 0, 265), (0, 0, 7), (128, 256, 64), (1,) * 300, (0,) * 140 + (9,)],
)
def test_the_table_of_a_packed_batch(lengths: tuple[int, ...], rows: int) -> None:
    offsets = pack(lengths)
    total = sum(lengths)
    packed = torch.empty(total, 1, 1, device="meta")
    geometry = Geometry(packed, rows, offsets, max(lengths))
    expected = blocks_of(offsets.tolist(), total, geometry.blocks, rows)
    assert len(expected) == geometry.blocks
    found = torch.full((4, geometry.blocks), -1, dtype=torch.int32)
    table_kernel[len(lengths) + 1,](
        offsets, found, len(lengths), total, geometry.blocks, R=rows, CHUNK=128
    )
    for got, right in zip(found.T.tolist(), expected, strict=True):
        if right[1] == 0:  # a block that is left over: no rows, whatever else it says
            assert got[1] == 0 and got[2] == 0
        else:
            assert got == right


@needs_interpreter
@pytest.mark.parametrize(
    "wrong", [[0, 90, 40, 60], [0, 500, 20, 60], [-5, 10, 70, 60], [60, 0, 0, 60]]
)
def test_offsets_that_nobody_checked_reach_no_foreign_memory(wrong: list[int]) -> None:
    """On a GPU they are not read before the launch; whatever they hold, rows stay inside."""
    blocks = 60 // 32 + 3
    found = torch.full((4, blocks), -1, dtype=torch.int32)
    offsets = torch.tensor(wrong, dtype=torch.int32)
    table_kernel[4,](offsets, found, 3, 60, blocks, R=32, CHUNK=128)
    first, count = found[0], found[1]
    written = count > 0
    assert (first[written] >= 0).all() and (first + count)[written].max() <= 60


def test_rows_that_come_in_words() -> None:
    """Copies past the registers move four bytes at least: what the compiler knows of rows must promise that."""
    x = torch.zeros(2, 3, 5, 80, dtype=torch.bfloat16)

    def in_words(tensor: Tensor, *others: int) -> bool:
        width = tensor.shape[-1]
        unit, _ = plan.in_units(width, *tensor.stride()[:-1], *others)
        return plan.in_words(tensor, width, unit)

    assert in_words(x) and in_words(x[..., :66]) and in_words(x[:, :, :, :64], 33)
    assert (
        in_words(x.half()) and in_words(x[:, :, :1]) and in_words(x[:1, :1, :1].expand(2, 3, 5, 80))
    )
    assert not in_words(x[..., :65])  # half a word at the end
    assert not in_words(x[..., :66], 33)  # entry by entry, for the other operand's sake
    assert not in_words(x[..., 1:65])  # an address in the middle of a word
    odd = torch.zeros(2, 3, 5, 67, dtype=torch.bfloat16)
    assert not in_words(odd[..., :66]) and not in_words(odd[..., :64])
    assert not in_words(x.float())
