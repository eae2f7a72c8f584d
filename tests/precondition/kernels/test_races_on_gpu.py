"""What must not matter on a GPU: schedules, programs, other work, what lies in memory, which calls came before, addresses."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from lucid_attention import precondition
from lucid_attention.precondition.kernels import plan
from tests.conftest import relative_error
from tests.precondition.kernels.conftest import of
from tests.precondition.kernels.test_kernels import (
    operands,
    run,
    widened,
)
from tests.precondition.test_definition import pack

pytestmark = pytest.mark.gpu
BRAIN = torch.bfloat16


@pytest.mark.parametrize("width", [64, 128, 68])
@of("few", "some")
@pytest.mark.usefixtures("_blocks")
def test_no_row_of_an_earlier_call_is_taken(width: int) -> None:
    """A row that is waited for is known by what lies in memory, where rows of the calls before it may lie."""
    calls = [
        operands("cos0.5", 1, 3, 2000, width, value_width=width, dtype=BRAIN, device="cuda")
        for _ in range(3)
    ]
    expected = [run(leaves, "triton") for leaves in calls]
    for turn in range(60):
        for g, e in zip(run(calls[turn % 3], "triton"), expected[turn % 3], strict=True):
            assert torch.equal(g, e)
    for leaves, outputs in zip(calls, expected, strict=True):
        for g, e in zip(outputs, run(widened(leaves), "blocked"), strict=True):
            assert relative_error(g, e) < 1e-2


@pytest.mark.parametrize("case", ["padded", "packed", "strength", "long"])
@of("many")
@pytest.mark.usefixtures("_blocks")
def test_schedules_change_no_bit(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a block gives what it owes to the others is a matter of speed."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("Hopper's own kernels need a Hopper card")
    seq = 3000 if case == "long" else 700
    leaves = operands("cos0.5", 1, 5, seq, 64, value_width=64, dtype=BRAIN, device="cuda")
    options: dict[str, Any] = {}
    if case == "padded":
        options["key_mask"] = torch.rand(1, seq, device="cuda") > 0.4
    if case == "packed":
        leaves = [x.detach()[0].transpose(0, 1).requires_grad_() for x in leaves]
        options["offsets"] = pack((5, 0, 129, 1, 300, 0, 265)).cuda()
    if case in ("strength", "packed"):
        options["learned"] = True
        leaves.append(torch.linspace(0.3, 1, 5, device="cuda", requires_grad=True))
    adjoint = importlib.import_module("lucid_attention.precondition.kernels.hopper_adjoint")
    expected = run(leaves, "triton", **options)
    monkeypatch.setattr(adjoint, "LATE_FROM", 0)
    monkeypatch.setattr(plan, "_calls", {})  # which schedule it is is kept with a call
    for _ in range(3):
        for g, e in zip(run(leaves, "triton", **options), expected, strict=True):
            assert torch.equal(g, e)


@pytest.mark.parametrize(
    ("width", "value_width", "late", "precision"),
    [
        (64, 64, False, "default"), (64, 64, True, "default"), (68, 68, False, "default"), (96, 96, False, "default"),
        (128, 128, False, "default"), (256, 256, False, "default"), (64, 128, False, "default"),
        (192, 128, False, "default"), (64, 64, False, "high"), (128, 128, False, "high"), (256, 256, False, "high"),
    ],
)  # fmt: skip
def test_more_blocks_than_the_card_holds(
    width: int, value_width: int, late: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several rounds of programs: each takes up what the one before it left in barriers and buffers."""
    adjoint = importlib.import_module("lucid_attention.precondition.kernels.hopper_adjoint")
    monkeypatch.setattr(adjoint, "LATE_FROM", 0 if late else 1 << 30)
    monkeypatch.setattr(plan, "_calls", {})
    leaves = operands(
        "cos0.5", 8, 8, 4000, width, value_width=value_width, dtype=BRAIN, device="cuda"
    )
    expected = run(leaves, "triton", precision=precision)
    for _ in range(20 if width <= 128 else 5):
        for g, e in zip(run(leaves, "triton", precision=precision), expected, strict=True):
            assert torch.equal(g, e)
    few = [x.detach()[5:6, 3:4].requires_grad_() for x in leaves]
    grad = torch.cos(torch.arange(expected[0].numel(), device="cuda")).view(expected[0].shape)
    exact = run(widened(few), "blocked", grad[5:6, 3:4].double())
    for g, e in zip(expected, exact, strict=True):
        assert relative_error(g[5:6, 3:4], e) < 1e-2


@pytest.mark.parametrize(
    ("width", "value_width", "late", "precision"),
    [
        (64, 64, False, "default"), (64, 64, True, "default"), (68, 68, False, "default"), (128, 128, False, "default"),
        (128, 64, False, "default"), (256, 256, False, "default"), (64, 64, False, "high"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("programs", [1, 3, 64])
@of("few", "some", "many")
@pytest.mark.usefixtures("_blocks")
def test_any_number_of_programs(
    programs: int, packed: bool, width: int, value_width: int, late: bool, precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One program alone finishes all blocks in order; whoever takes a block, it has the same bits."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("Hopper's own kernels need a Hopper card")
    kernels = "lucid_attention.precondition.kernels.hopper_"
    adjoint, solve = (importlib.import_module(kernels + name) for name in ("adjoint", "solve"))
    monkeypatch.setattr(adjoint, "LATE_FROM", 0 if late else 1 << 30)
    monkeypatch.setattr(plan, "_calls", {})  # the number of programs is kept with a call
    leaves = operands("cos0.8", 1, 5, 1100, width, value_width=value_width, dtype=BRAIN, device="cuda")  # fmt: skip
    options: dict[str, Any] = {"precision": precision, "learned": True}
    if packed:
        leaves = [x.detach()[0].transpose(0, 1).requires_grad_() for x in leaves]
        options["offsets"] = pack((5, 0, 129, 1, 600, 0, 365)).cuda()
    leaves.append(torch.linspace(0.3, 1, 5, device="cuda", requires_grad=True))
    expected = run(leaves, "triton", **options)
    monkeypatch.setattr(plan, "_calls", {})
    for module in (adjoint, solve):
        monkeypatch.setattr(module, "multiprocessors", lambda device: programs)
    for _ in range(2):
        for g, e in zip(run(leaves, "triton", **options), expected, strict=True):
            assert torch.equal(g, e)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("width", [64, 128, 68, 84, 256, 136])
@pytest.mark.parametrize("packed", [False, True])
@of("few", "some", "many")
@pytest.mark.usefixtures("_blocks")
def test_nothing_unwritten_is_read(packed: bool, width: int) -> None:
    """Hopper's own kernels with every allocation full of NaN; the portable ones in test_kernels.py.

    Bytes are all ones then, as `hopper_links` marks rows: whether marks are written show `test_prepared` and the earlier calls here.
    """
    assert torch.empty(3, device="cuda").isnan().all()
    leaves = operands("cos0.5", 1, 2, 700, width, value_width=width, dtype=BRAIN, device="cuda")
    options: dict[str, Any] = {}
    if packed:
        leaves = [x.detach()[0].transpose(0, 1).requires_grad_() for x in leaves]
        options["offsets"] = pack((5, 0, 129, 1, 300, 0, 265)).cuda()
    exact = run(widened(leaves), "reference", **options)
    for g, e in zip(run(leaves, "triton", **options), exact, strict=True):
        assert relative_error(g, e) < 1e-2


@pytest.mark.parametrize("width", [64, 128, 68, 256])
@of("few", "many")
@pytest.mark.usefixtures("_blocks")
def test_kept_kernels_fit_later_calls(width: int) -> None:
    """A launch that skips Triton's own look at the arguments must not meet others than it was made for."""
    leaves = operands("cos0.5", 1, 2, 700, width, value_width=width, dtype=BRAIN, device="cuda")
    expected = run(leaves, "triton")

    def moved(x: Tensor) -> Tensor:
        """The same numbers at an address that is no multiple of 16."""
        storage = x.new_empty(x.numel() + 1)
        storage[1:] = x.detach().flatten()
        return storage[1:].view(x.shape).requires_grad_()

    key, value = leaves
    for other in ([key, value], [moved(key), value], [key, moved(value)], [key, value]):
        for g, e in zip(run(other, "triton"), expected, strict=True):
            assert torch.equal(g, e)
    with_strength = run(leaves, "triton", strength=torch.full((2,), 0.5, device="cuda"))
    assert not torch.equal(with_strength[0], expected[0])
    masked = torch.ones(1, 700, dtype=torch.bool, device="cuda")
    for options in ({}, {"key_mask": masked}, {"strength": torch.ones(2, device="cuda")}):
        for g, e in zip(run(leaves, "triton", **options), expected, strict=True):
            assert torch.equal(g, e)


@pytest.mark.parametrize(
    ("width", "precision"),
    [
        (64, "default"),
        (128, "default"),
        (68, "default"),
        (256, "default"),
        (64, "high"),
        (128, "high"),
    ],
)
@of("few", "many")
@pytest.mark.usefixtures("_blocks")
def test_a_thousand_launches_beside_other_work(width: int, precision: str) -> None:
    """The chain of blocks is a race to be lost: other streams hold part of the card all the time."""
    leaves = operands("cos0.5", 1, 5, 1500, width, value_width=width, dtype=BRAIN, device="cuda")
    expected = run(leaves, "triton", precision=precision)
    noise = torch.randn(4096, 4096, device="cuda", dtype=BRAIN)
    others = [torch.cuda.Stream() for _ in range(2)]
    wrong = torch.zeros((), device="cuda")
    for turn in range(500):
        for other in others:
            with torch.cuda.stream(other):
                noise @ noise
        for g, e in zip(run(leaves, "triton", precision=precision), expected, strict=True):
            wrong += (g != e).any()
        if turn % 50 == 0:
            torch.cuda.synchronize()
    assert not wrong.item()


@pytest.mark.xdist_group("large")  # tens of gigabytes: one after another
@pytest.mark.parametrize("width", [64, 68, 256])
@of("many")  # the last head alone, too
@pytest.mark.usefixtures("_blocks")
def test_addresses_beyond_32_bits(width: int) -> None:
    """More than 2^31 elements: the last head is what it is alone."""
    seq = 2048
    heads = 2**31 // (seq * width) + 8
    key = torch.randn(1, heads, seq, width, device="cuda", dtype=BRAIN)
    value = torch.randn(1, heads, seq, width, device="cuda", dtype=BRAIN)
    key.requires_grad_()
    value.requires_grad_()
    got = precondition(key, value, impl="triton")
    grads = torch.autograd.grad(got, (key, value), torch.ones_like(got))
    last = [x.detach()[:, -1:].requires_grad_() for x in (key, value)]
    alone = precondition(*last, impl="triton")
    alone_grads = torch.autograd.grad(alone, last, torch.ones_like(alone))
    for g, e in zip((got, *grads), (alone, *alone_grads), strict=True):
        assert torch.equal(g[:, -1:], e)
