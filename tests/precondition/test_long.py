"""Long sequences: memory and precision where they are promised, too long for every run."""

from __future__ import annotations

import pytest
import torch

from lucid_attention import lucid_attention, precondition
from tests.conftest import make_keys, relative_error
from tests.test_attention import peak_mib

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("attention", "limit"), [(False, 300), (True, 400)])
def test_memory_at_16k_tokens(attention: bool, limit: int) -> None:
    """Forward and backward, four heads of 64, in MiB; one N x N matrix would be 4 GiB.

    Each operand and each gradient is 16 MiB, and the whole attention has more of them.
    """
    leaves = [torch.randn(1, 4, 16384, 64, requires_grad=True) for _ in range(3)]
    operands = leaves if attention else leaves[1:]

    def run() -> None:
        output = lucid_attention(*leaves) if attention else precondition(*operands)
        torch.autograd.grad(output.sum(), operands)

    assert peak_mib(run) < limit


@pytest.mark.parametrize("kind", ["cos0.8", "cos0.99"])
@pytest.mark.parametrize("width", [64, 128])
def test_float32_at_16k_tokens(kind: str, width: int) -> None:
    key = make_keys(kind, 1, 1, 16384, width, dtype=torch.float32)
    value = torch.randn(1, 1, 16384, width)
    exact = precondition(key.double(), value.double())
    assert relative_error(precondition(key, value), exact) < 1e-5
