"""The rule behind impl="auto", on a CPU: what the kernels would be asked to do is decided by shapes."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from lucid_attention.precondition import blocked_calls, implementation
from lucid_attention.precondition.implementation import choose


@pytest.fixture
def _on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device that has the kernels."""

    def fine(key: Tensor, value: Tensor, *, interpreter: bool = False) -> None:
        return None

    monkeypatch.setattr(implementation, "why_no_kernels", fine)


def chosen(
    impl: str, width: int, *, dtype: torch.dtype, seq: int = 300, past: int | None = None
) -> str:
    key = torch.empty(1, 1, seq, width, dtype=dtype)
    past_key = None if past is None else torch.empty(1, 1, past, width, dtype=dtype)
    module: ModuleType = choose(impl, key, key, past_key)
    return module.__name__.rsplit(".", 1)[-1]


@pytest.mark.usefixtures("_on_a_card")
def test_auto_on_a_card() -> None:
    half = torch.float16
    assert chosen("auto", 64, dtype=half) == "launch"
    assert chosen("auto", 64, dtype=half, seq=128, past=500) == "launch"
    assert chosen("auto", 64, dtype=half, seq=127, past=500) == "blocked_calls"  # decoding
    assert chosen("triton", 64, dtype=half, seq=127, past=500) == "launch"
    assert chosen("auto", 20, dtype=half) == chosen("auto", 20, dtype=torch.float32) == "launch"
    assert chosen("blocked", 64, dtype=half) == "blocked_calls"


def test_auto_elsewhere() -> None:
    key = torch.empty(1, 1, 300, 64)
    assert choose("auto", key, key) is blocked_calls  # also where the interpreter is switched on
    assert choose("auto", key.double(), key.double()) is blocked_calls


def test_versions() -> None:
    assert implementation._version("3.6.0") < implementation._version("3.10.1+git1")
    assert implementation._version("3.7.1") == (3, 7, 1)
