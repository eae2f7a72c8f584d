"""The two-phase task, by hand and by its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lucid_attention.tasks import two_phase


def test_both_phases_by_hand() -> None:
    copied = two_phase(2, 6, phase="copy", generator=torch.Generator().manual_seed(1))
    mean = two_phase(2, 6, phase="mean", generator=torch.Generator().manual_seed(1))
    assert torch.equal(copied.digits, mean.digits)
    assert torch.equal(copied.target, copied.digits.float())
    for row, target in zip(mean.digits.tolist(), mean.target.tolist(), strict=True):
        assert target == pytest.approx([sum(row[: i + 1]) / (i + 1) for i in range(6)])
    assert copied.digits.min() >= 0 and copied.digits.max() <= 9
    assert two_phase(0, 0, phase="copy", generator=torch.Generator()).digits.shape == (0, 0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch": -1}, ValueError, "batch must be at least 0"),
        ({"length": 2.0}, TypeError, "length must be an int"),
        ({"phase": "sum"}, ValueError, "phase must be one of copy, mean, got 'sum'"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "batch": 1,
        "length": 3,
        "phase": "copy",
        "generator": torch.Generator(),
        **changes,
    }
    with pytest.raises(error, match=message):
        two_phase(**arguments)
