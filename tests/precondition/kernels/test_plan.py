"""What is kept between calls: only for operands that Triton compiles the same kernels for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lucid_attention.precondition.kernels import plan
from lucid_attention.precondition.kernels.plan import call_for


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


def test_packed_calls_have_offsets_of_their_own() -> None:
    key = torch.randn(100, 3, 64)
    calls = [
        call_for(key, key, 0.1, (), torch.tensor(offsets), 90)
        for offsets in ([0, 10, 100], [0, 30, 100])
    ]
    tables = [call.geometry.table for call in calls]
    assert tables[0] is not None and tables[1] is not None
    assert not torch.equal(tables[0], tables[1])
    assert calls[0]._compiled is calls[1]._compiled
    more = call_for(key, key, 0.1, (), torch.tensor([0, 30, 60, 100]), 90)
    assert more._compiled is not calls[0]._compiled


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MOST_CALLS", 5)
    for seq in range(1, 20):
        key = torch.randn(1, 1, seq, 64)
        call_for(key, key, 0.1, ())
        assert len(plan._calls) <= 5


def test_a_kept_kernel_gets_its_arguments_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second launch goes to the compiled kernel: constants where the signature has them."""
    monkeypatch.setattr(plan, "interpreted", lambda: False)
    got: list[Any] = []

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args: got.append((grid, args))

    class Kernel(SimpleNamespace):
        arg_names = ("X", "n", "BLOCK", "SHIFT")
        __hash__ = object.__hash__

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **constants: Any) -> Compiled:
                got.append((grid, args, constants))
                return Compiled()

            return launch

    kernel = Kernel()
    key = torch.randn(1, 1, 5, 64)
    for n in (1, 2):
        call_for(key, key, 0.1, ()).launch(kernel, 7, "x", n, SHIFT=3, BLOCK=64, num_warps=4)
    assert got == [
        ((7,), ("x", 1), {"SHIFT": 3, "BLOCK": 64, "num_warps": 4}),
        ((7, 1, 1), ("x", 2, 64, 3)),
    ]
