"""``precision="high"`` on a GPU: hard keys, length, layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lucid_attention import precondition
from tests.conftest import HARD_KEYS, make_keys, relative_error
from tests.precondition.kernels.test_kernels import (
    close,
    half_inside,
    operands,
    run,
    vanishing,
    widened,
)
from tests.precondition.test_definition import pack

pytestmark = pytest.mark.gpu
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


HIGH_WIDTHS = [
    (64, 64),
    (128, 128),
    (68, 68),
    (96, 96),
    (64, 128),
    (192, 128),
    (136, 136),
    (256, 256),
    (20, 20),
]


@pytest.mark.parametrize(("width", "value_width"), HIGH_WIDTHS)
@pytest.mark.parametrize("kind", HARD_KEYS)
def test_high_precision(kind: str, width: int, value_width: int) -> None:
    """Nothing rounds P: with keys that are much alike its rounding is most of the usual error."""
    leaves = operands(kind, 1, 2, 1000, width, value_width=value_width, dtype=HALF, device="cuda")
    if kind == "huge":
        leaves[0] = (leaves[0].detach() / 16).requires_grad_()
    exact = run(widened(leaves), "reference")
    yardstick = half_inside(leaves, exact_p=True)
    got = run(leaves, "triton", precision="high")
    for index, (g, e, y) in enumerate(zip(got, exact, yardstick, strict=True)):
        close(g, e, y, vanishing(leaves, exact) if index == 1 else None)
    for g, e in zip(run(leaves, "triton", precision="high"), got, strict=True):
        assert torch.equal(g, e)


@pytest.mark.parametrize(("width", "value_width"), HIGH_WIDTHS)
def test_high_precision_at_length(width: int, value_width: int) -> None:
    """Before the final rounding: a small part of what one half of P leaves, forward and backward."""
    key = make_keys("cos0.9", 1, 2, 9000, width, dtype=BRAIN, device="cuda").requires_grad_()
    value = torch.randn(1, 2, 9000, value_width, device="cuda", dtype=BRAIN, requires_grad=True)
    grad = torch.randn_like(value)
    wide_key, wide_value = widened([key, value])
    exact = precondition(wide_key, wide_value, impl="blocked")
    (exact_dv,) = torch.autograd.grad(exact, wide_value, grad.double())
    errors = {}
    for precision in ("default", "high"):
        y = precondition(key, value, precision=precision, out_dtype=FULL, impl="triton")
        (dv,) = torch.autograd.grad(y, value, grad.float())
        errors[precision] = relative_error(y, exact), relative_error(dv, exact_dv)
    assert errors["high"][0] < 2e-3
    assert errors["high"][0] < 0.35 * errors["default"][0]
    # Rounded to bfloat16, 1.7e-3.
    assert errors["high"][1] < 2.7e-3
    assert errors["high"][1] < 0.8 * errors["default"][1]


@pytest.mark.parametrize(("width", "value_width"), HIGH_WIDTHS)
@pytest.mark.parametrize("case", ["left", "packed", "strength", "nan"])
@pytest.mark.usefixtures("poisoned_memory")
def test_high_precision_of_other_layouts(case: str, width: int, value_width: int) -> None:
    leaves = operands(
        "cos0.9", 2, 2, 700, width, value_width=value_width, dtype=BRAIN, device="cuda"
    )
    options: dict[str, Any] = {"precision": "high"}
    if case == "left":
        options["key_mask"] = torch.arange(700, device="cuda") >= torch.tensor(
            [[600], [3]], device="cuda"
        )
    if case == "packed":
        leaves = [x.detach()[0].transpose(0, 1).requires_grad_() for x in leaves]
        options["offsets"] = pack((5, 0, 129, 1, 300, 0, 265)).cuda()
    if case in ("packed", "strength"):
        options["learned"] = True
        leaves.append(torch.tensor([0.3, 1.0], device="cuda", requires_grad=True))
    exact = run(widened(leaves), "reference", **options)
    got = run(leaves, "triton", **options)
    torch_does = run(leaves, "blocked", **options)  # float32 inside, from the rounded Y as well
    for g, e, b in zip(got, exact, torch_does, strict=True):
        assert relative_error(g, e) < 2 * relative_error(b, e) + 4e-3
    if case == "nan":
        with torch.no_grad():
            leaves[0][0, 1, 300, 3] = float("nan")
        hit = torch.zeros(2, 2, 700, dtype=torch.bool, device="cuda")
        hit[0, 1, 300:] = True
        spoiled = run(leaves, "triton", **options)
        assert spoiled[0][hit].isnan().all() and torch.equal(spoiled[0][~hit], got[0][~hit])
