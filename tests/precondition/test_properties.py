"""The theorems of the mathematics, as properties: bounds, the defining equation, the read-out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lucid_attention import lucid_attention, precondition
from lucid_attention.precondition.reference import kernel_matrix, normalize_keys
from tests.conftest import HARD_KEYS, make_keys, relative_error

shapes = st.tuples(st.integers(1, 400), st.sampled_from([1, 3, 16, 68]), st.integers(1, 20))
kinds = st.sampled_from(HARD_KEYS)
dtypes = st.sampled_from([torch.float64, torch.float32])
# A bound of 2 in exact arithmetic; rounding adds a little, and far less than this.
SLACK = 1 + 1e-4


@given(kinds, shapes, dtypes, st.sampled_from([None, 0.0, 0.3, 1.0]), st.integers(0, 5))
def test_the_solve_at_most_doubles_a_norm(
    kind: str, shape: tuple[int, int, int], dtype: torch.dtype, strength: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    seq, width, value_width = shape
    key = make_keys(kind, 1, 1, seq, width, dtype=dtype)
    value = torch.randn(1, 1, seq, value_width, dtype=dtype).requires_grad_()
    y = precondition(key, value, strength=strength)
    assert y.norm() <= 2 * SLACK * value.norm()
    weight = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, value, weight)
    assert grad.norm() <= 2 * SLACK * weight.norm()


@given(kinds, shapes, st.sampled_from([0.01, None, 2.0]), st.integers(0, 5))
def test_the_solution_solves(
    kind: str, shape: tuple[int, int, int], scale: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    seq, width, value_width = shape
    key = make_keys(kind, 1, 1, seq, width)
    value = torch.randn(1, 1, seq, value_width, dtype=torch.float64)
    y = precondition(key, value, kernel_scale=scale)
    keys = normalize_keys(key)
    lower = kernel_matrix(keys, keys, scale or width**-0.5).tril(-1)
    lower = lower + torch.eye(seq, dtype=torch.float64)
    assert relative_error(lower @ y, value) < 1e-12


@given(st.integers(2, 300), st.integers(0, 5))
def test_one_key_written_often_reads_its_latest_value(seq: int, seed: int) -> None:
    """The read-out is (latest value) / n: parallel to it, nothing left of the older ones."""
    torch.manual_seed(seed)
    key = make_keys("identical", 1, 1, seq, 16)
    value = torch.randn(1, 1, seq, 8, dtype=torch.float64)
    # keys normalise to within eps of sqrt(D), so the kernel is 1 only to about 1e-6
    output = lucid_attention(key, key, value)[0, 0, -1]
    assert relative_error(output * seq, value[0, 0, -1]) < 1e-4


@given(kinds, st.integers(1, 200), st.integers(0, 5))
def test_the_operator_is_linear_in_the_values(kind: str, seq: int, seed: int) -> None:
    torch.manual_seed(seed)
    key = make_keys(kind, 1, 1, seq, 8)
    one, other = torch.randn(2, 1, 1, seq, 4, dtype=torch.float64)

    def solve(value: Tensor) -> Tensor:
        return precondition(key, value)

    assert relative_error(solve(2 * one - 3 * other), 2 * solve(one) - 3 * solve(other)) < 1e-12


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 7.0, 1e4])
def test_a_key_counts_by_its_direction(factor: float) -> None:
    """Up to the eps of its normalisation, which shortens keys of size 1e-3 and below."""
    key, value = make_keys("cos0.8", 1, 1, 100, 16), torch.randn(1, 1, 100, 4, dtype=torch.float64)
    mean_square = key.square().mean(-1, keepdim=True)
    shortened = key * (mean_square + 1e-6 / factor**2).rsqrt()
    keys = kernel_matrix(shortened, shortened, 0.25).tril(-1) + torch.eye(100, dtype=torch.float64)
    assert relative_error(keys @ precondition(factor * key, value), value) < 1e-12
