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
    width: int, value_width: int, *, past: bool = False, dtype: torch.dtype = HALF, high: bool = False
) -> Call:  # fmt: skip
    key, value = (torch.empty(2, 3, 1000, n, dtype=dtype) for n in (width, value_width))
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


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("width", range(64, 257, 4))
def test_memory(width: int, high: bool) -> None:
    """Beyond inputs, outputs and the saved Y: forward at most 4 times the value's size, backward 8 (9.2 in high precision)."""
    found = call(width, width, high=high)
    value = found.geometry.chains * found.geometry.blocks * found.plan.block * width * 2
    for parts, times in (
        (stages.solve_parts(found), 4),
        (stages.adjoint_parts(found, stages.form_of(found)), 9.2 if high else 8),
    ):
        zeros, scratch = parts._sizes
        assert zeros + scratch <= times * value
    if 64 < width <= 96 and not high:  # the sums have no columns of zeros
        assert zeros + scratch <= 6.2 * value
