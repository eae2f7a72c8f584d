"""Which family of kernels serves a call, in which form, and what memory that takes; as on a Hopper card."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lucid_attention.precondition.kernels import family, plan, stages
from lucid_attention.precondition.kernels.plan import Call, call_for
from lucid_attention.precondition.kernels.stages import Form

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def _on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "has_hopper_kernels", lambda device: True)
    monkeypatch.setattr(plan, "_calls", {})


def call(
    width: int, value_width: int, *, past: bool = False, dtype: torch.dtype = HALF, high: bool = False,
    batch: int = 8, heads: int = 3, seq: int = 1000,
) -> Call:  # fmt: skip
    """By default of 192 blocks."""
    key, value = (
        torch.empty(1, dtype=dtype).expand(batch, heads, seq, n) for n in (width, value_width)
    )
    return call_for(key, value, width**-0.5, (), past=past, high=high)


@pytest.mark.parametrize(
    ("width", "value_width", "form", "block"),
    [
        (64, 64, Form.FUSED, 128),
        (128, 64, Form.FUSED, 128),
        (68, 80, Form.FUSED, 128),
        (64, 128, Form.APART, 128),
        (132, 144, Form.APART, 128),
        (192, 128, Form.APART, 128),
        (200, 256, Form.APART, 128),
        (16, 16, Form.PORTABLE, 128),
        (96, 64, Form.PORTABLE, 128),
        (256, 192, Form.PORTABLE, 64),
    ],
)
def test_form(width: int, value_width: int, form: Form, block: int) -> None:
    found = call(width, value_width)
    assert found.hopper == (form is not Form.PORTABLE)
    assert stages.form_of(found) is form
    assert found.plan.block == found.geometry.block == block


@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (128, 64), (68, 80), (128, 128), (64, 128)])  # fmt: skip
def test_few_blocks(width: int, value_width: int) -> None:
    """One for each multiprocessor: dV first, and a step for every 64 columns of values."""
    found = call(width, value_width, heads=2)
    assert found.geometry.slots == 128
    assert stages.form_of(found) is Form.APART
    assert found.linked
    assert found.value_parts == (1 if value_width == 64 else 2)
    for parts in (stages.solve_parts(found), stages.adjoint_parts(found, Form.APART)):
        done = parts.tensor("done", parts.buffers(torch.device("cpu")))
        assert done is not None
        assert done.numel() == 128 * found.value_parts
    more = call(width, value_width, batch=1, heads=3, seq=43 * 128)
    assert more.geometry.slots == 129
    assert not more.few
    assert more.linked  # of few chains
    assert more.value_parts == 1
    assert stages.form_of(more) is (Form.APART if (width, value_width) == (64, 128) else Form.FUSED)


def test_many_short_chains_are_not_few() -> None:
    """They have hardly any steps, and two kernels more would count."""
    assert call(64, 64, batch=16, heads=1, seq=128).few
    assert not call(64, 64, batch=17, heads=1, seq=128).few
    offsets = torch.zeros(65, dtype=torch.int32)
    key = torch.empty(8192, 1, 64, dtype=HALF)
    few = [call_for(key, key, 0.1, (), offsets, longest).few for longest in (512, 500, 8192, 400)]
    assert few == [True, False, True, False]


@pytest.mark.parametrize(
    ("batch", "heads", "seq", "linked"),
    [(2, 4, 8192, True), (1, 1, 65536, True), (3, 3, 7168, False), (2, 4, 8193, False), (1, 1, 65537, False)],
)  # fmt: skip
def test_few_chains(batch: int, heads: int, seq: int, linked: bool) -> None:
    """At most 8 of 512 blocks in all: their steps are made short, and nothing else changes."""
    found = call(128, 128, batch=batch, heads=heads, seq=seq)
    assert found.linked == linked
    assert found.value_parts == 1
    assert stages.form_of(found) is Form.FUSED


def test_what_is_not_linked() -> None:
    """There is no such kernel for P in two halves, tiles of 256 columns, other cards."""
    few = {"batch": 1, "heads": 1}
    assert call(64, 64, **few).linked
    assert not call(64, 64, high=True, **few).linked
    assert not call(192, 192, **few).linked
    assert not call(16, 16, **few).linked
    assert call(64, 64, past=True, **few).linked  # what a past leaves is solved as ever


def test_packed_chains_are_as_many_as_are_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of a batch wait for nobody: many short ones are many chains, and that never depends on earlier calls."""
    monkeypatch.setattr(plan, "FEW_BLOCKS", 0)
    key = torch.empty(8192, 4, 64, dtype=HALF)
    offsets = torch.zeros(5, dtype=torch.int32)

    def linked(longest: int) -> bool:
        return call_for(key, key, 0.1, (), offsets, longest).linked

    assert [linked(longest) for longest in (8192, 4096, 4095, 5000, 3000)] == [
        True, True, False, True, False,
    ]  # fmt: skip


def test_wide_calls_with_a_past_are_portable() -> None:
    """Their kernels have blocks of another size, which all of a call's share."""
    found = call(256, 256, past=True)
    assert not found.hopper
    assert found.plan.block == 64
    assert not plan._calls  # and so no call without a past meets it
    assert call(128, 128, past=True).hopper


def test_other_dtypes_and_scales_are_portable() -> None:
    assert not call(256, 256, dtype=torch.float32).hopper
    key = torch.empty(1, 1, 300, 256, dtype=HALF)
    assert not call_for(key, key, 1.0, ()).hopper  # exponents too large for float16 keys


@pytest.mark.parametrize(
    ("width", "past"), [(64, False), (68, False), (256, False), (64, True), (96, True)]
)
def test_high_precision(width: int, past: bool) -> None:
    """P in two halves, and so the key gradient apart; without kernels for that float32 inside."""
    found = call(width, width, past=past, high=True)
    assert found.halves == found.hopper == (not past)
    assert found.plan.centred == past
    assert stages.form_of(found) is (Form.PORTABLE if past else Form.APART)
    assert not call(width, width).halves
    if not past:
        assert call(width, width, high=True) is found is not call(width, width)


def test_high_precision_changes_nothing_else() -> None:
    assert call(16, 16, high=True).plan.centred  # no kernel of Hopper's own
    full = call(64, 64, dtype=torch.float32, high=True)
    assert full.plan == call(64, 64, dtype=torch.float32).plan
    assert not full.halves


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("width", [*range(64, 257, 4), 65, 97, 129, 130, 193])
def test_memory(width: int, high: bool, few: bool) -> None:
    """Beyond inputs, outputs and the saved Y: forward at most 4 times the value's size, backward 8."""
    found = call(width, width, high=high, heads=2 if few else 3)
    assert found.few == few
    value = found.geometry.chains * found.geometry.blocks * found.plan.block * width * 2
    for parts, times in (
        (stages.solve_parts(found), 4),
        (stages.adjoint_parts(found, stages.form_of(found)), 8),
    ):
        zeros, scratch = parts._sizes
        assert zeros + scratch <= times * value
    if 68 <= width <= 96:  # the sums have no columns of zeros
        assert zeros + scratch <= (7.4 if high or few else 6.2) * value
