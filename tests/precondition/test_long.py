"""Long sequences: memory and precision where they are promised, too long for every run."""

from __future__ import annotations

import pytest
import torch

from lucid_attention import lucid_attention, precondition
from tests.conftest import make_keys, relative_error
from tests.test_attention import peak_mib

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("attention", [False, True])
def test_memory_at_16k_tokens(attention: bool) -> None:
    """Forward and backward, four heads of 64, under 300 MiB; one N x N matrix would be 4 GiB."""
    query, key, value = torch.randn(3, 1, 4, 16384, 64).requires_grad_().unbind(0)

    def run() -> None:
        output = lucid_attention(query, key, value) if attention else precondition(key, value)
        output.sum().backward()

    assert peak_mib(run) < 300


@pytest.mark.parametrize("kind", ["cos0.8", "cos0.99"])
@pytest.mark.parametrize("width", [64, 128])
def test_float32_at_16k_tokens(kind: str, width: int) -> None:
    key = make_keys(kind, 1, 1, 16384, width, dtype=torch.float32)
    value = torch.randn(1, 1, 16384, width)
    exact = precondition(key.double(), value.double())
    assert relative_error(precondition(key, value), exact) < 1e-5
