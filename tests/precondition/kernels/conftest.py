"""Which form of Hopper's kernels a small call on a GPU takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

BLOCKS = {
    "few": {},
    "some": {"FEW_BLOCKS": 0},
    "many": {"FEW_BLOCKS": 0, "LINKED_BLOCKS": 0},
}
"""Limits of `plan`, so that Hopper's kernels take a small call as one of few blocks, of more of few chains, of many chains."""


@pytest.fixture
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from lucid_attention.precondition.kernels import plan

    for name, limit in BLOCKS[request.param].items():
        monkeypatch.setattr(plan, name, limit)
    monkeypatch.setattr(plan, "_calls", {})  # which it is is kept with a call


def of(*names: str) -> pytest.MarkDecorator:
    """Once for each of these of ``BLOCKS``."""
    return pytest.mark.parametrize("_blocks", names, indirect=True)


def of_all(
    name: str, values: Sequence[Any], decides: Callable[[Any], bool]
) -> pytest.MarkDecorator:
    """Of each of ``BLOCKS`` where it ``decides`` which kernels there are, else once."""
    cases = [(value, kind) for value in values for kind in (BLOCKS if decides(value) else ("few",))]
    return pytest.mark.parametrize((name, "_blocks"), cases, indirect=["_blocks"], ids=str)
