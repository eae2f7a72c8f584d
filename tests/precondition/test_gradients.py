"""Gradients: against the dense definition's autograd, by finite differences, and where they end."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lucid_attention import precondition, precondition_varlen
from lucid_attention.precondition import layout
from tests.conftest import HARD_KEYS, make_keys, relative_error
from tests.precondition.test_definition import LENGTHS, pack

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EXACT = 1e-11


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def weighted_sum(y: Tensor) -> Tensor:
    """A loss whose gradient differs in every entry."""
    return (y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)).sum()


@pytest.mark.parametrize("kind", HARD_KEYS)
@pytest.mark.parametrize("seq", [1, 63, 129, 400])
def test_equal_the_reference(kind: str, seq: int) -> None:
    key, value = make_keys(kind, 1, 2, seq, 12), torch.randn(1, 2, seq, 7, dtype=torch.float64)
    found = []
    for impl in ("reference", "blocked"):
        operands = leaves(key, value)
        loss = weighted_sum(precondition(*operands, impl=impl))
        found.append(torch.autograd.grad(loss, operands))
    for got, expected in zip(found[1], found[0], strict=True):
        # identical keys have a key gradient of 0 up to cancellation: measure against its terms
        floor = value.norm() / key.norm().clamp(min=1e-12)
        assert (got - expected).norm() <= EXACT * max(expected.norm(), floor)


@pytest.mark.parametrize("seq", [15, 150])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("past", [0, 5, 200])
def test_equal_the_reference_with_everything(seq: int, padded: bool, past: int) -> None:
    mask = torch.rand(2, seq) > 0.3 if padded else None
    operands = (
        make_keys("cos0.8", 2, 3, seq, 12),
        torch.randn(2, 3, seq, 7, dtype=torch.float64),
        torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64),
        make_keys("cos0.8", 2, 3, past, 12),
        torch.randn(2, 3, past, 7, dtype=torch.float64),
    )
    found = []
    for impl in ("reference", "blocked"):
        key, value, strength, *kept = leaves(*operands)
        y = precondition(key, value, strength=strength, key_mask=mask, past=tuple(kept), impl=impl)
        found.append(torch.autograd.grad(weighted_sum(y), [key, value, strength, *kept]))
    for got, expected in zip(found[1], found[0], strict=True):
        assert got.shape == expected.shape
        assert relative_error(got, expected) < EXACT


@pytest.mark.parametrize("strength", [0.0, 1e-3, 1.0])
def test_strength_gradient_by_differences(strength: float) -> None:
    key, value = make_keys("cos0.8", 2, 2, 200, 8), torch.randn(2, 2, 200, 8, dtype=torch.float64)

    def loss(b: Tensor) -> Tensor:
        return weighted_sum(precondition(key, value, strength=b))

    b = torch.full((2,), strength, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(loss(b), b)
    step = 1e-6
    for head in range(2):
        # one-sided, inwards: outside [0, 1] a strength is refused
        inward = step if strength < 0.5 else -step
        points = [b.detach().clone() for _ in range(3)]
        points[1][head] += inward
        points[2][head] += 2 * inward
        f0, f1, f2 = (float(loss(p)) for p in points)
        difference = (-3 * f0 + 4 * f1 - f2) / (2 * inward)
        assert got[head].item() == pytest.approx(difference, rel=1e-5)


def test_gradcheck() -> None:
    key = make_keys("cos0.5", 2, 2, 9, 4).requires_grad_()
    value = torch.randn(2, 2, 9, 3, dtype=torch.float64, requires_grad=True)
    strength = torch.tensor([0.2, 0.9], dtype=torch.float64, requires_grad=True)
    past_key = make_keys("cos0.5", 2, 2, 4, 4).requires_grad_()
    past_y = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :2] = mask[1, 5] = False

    def function(*operands: Tensor) -> Tensor:
        key, value, strength, past_key, past_y = operands
        return precondition(key, value, strength=strength, key_mask=mask, past=(past_key, past_y))

    assert torch.autograd.gradcheck(function, (key, value, strength, past_key, past_y))


def test_gradcheck_packed() -> None:
    key = make_keys("cos0.5", 2, 11, 4).transpose(0, 1).contiguous().requires_grad_()
    value = torch.randn(11, 2, 3, dtype=torch.float64, requires_grad=True)
    strength = torch.tensor([0.2, 0.9], dtype=torch.float64, requires_grad=True)
    offsets = pack((4, 0, 6, 1))

    def function(key: Tensor, value: Tensor, strength: Tensor) -> Tensor:
        return precondition_varlen(key, value, offsets, strength=strength)

    assert torch.autograd.gradcheck(function, (key, value, strength))


@pytest.mark.parametrize("lengths", [case for case in LENGTHS if sum(case)], ids=str)
def test_packed_equal_separate(lengths: tuple[int, ...]) -> None:
    total = sum(lengths)
    operands = (
        make_keys("cos0.8", 3, total, 6).transpose(0, 1),
        torch.randn(total, 3, 5, dtype=torch.float64),
        torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64),
    )
    found = []
    for impl in ("reference", "blocked"):
        key, value, strength = leaves(*operands)
        y = precondition_varlen(key, value, pack(lengths), strength=strength, impl=impl)
        found.append(torch.autograd.grad(weighted_sum(y), [key, value, strength]))
    for got, expected in zip(found[1], found[0], strict=True):
        assert relative_error(got, expected) < EXACT


@pytest.mark.parametrize("lengths", [(5, 130, 260, 3), (64,) * 5, (300, 2)], ids=str)
def test_packed_without_reading_the_offsets(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator with ``max_seqlen`` given, tiles hold columns of other sequences."""
    total = sum(lengths)
    operands = (
        make_keys("cos0.8", 3, total, 6).transpose(0, 1),
        torch.randn(total, 3, 5, dtype=torch.float64),
        torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64),
    )
    found = []
    for reads in (True, False):
        monkeypatch.setattr(layout.Packed, "reads_offsets", lambda *_, reads=reads: reads)
        key, value, strength = leaves(*operands)
        y = precondition_varlen(
            key, value, pack(lengths), max_seqlen=max(lengths), strength=strength
        )
        found.append([y, *torch.autograd.grad(weighted_sum(y), [key, value, strength])])
    for got, expected in zip(found[1], found[0], strict=True):
        assert relative_error(got, expected) < EXACT


def test_packed_nan_stays_in_its_sequence_and_head() -> None:
    lengths = (5, 130, 200, 40)
    key = make_keys("cos0.8", 2, sum(lengths), 8).transpose(0, 1).contiguous()
    value = torch.randn(sum(lengths), 2, 8, dtype=torch.float64)
    weight = torch.randn(sum(lengths), 2, 8, dtype=torch.float64)
    found = []
    for spoil in (False, True):
        if spoil:
            weight[140, 1] = torch.nan
        operands = leaves(key, value)
        y = precondition_varlen(*operands, pack(lengths))
        found.append(torch.autograd.grad(y, operands, weight))
    hit = torch.zeros(sum(lengths), 2, dtype=torch.bool)
    hit[135:335, 1] = True
    for got, clean in zip(found[1], found[0], strict=True):
        assert got[hit].isnan().all()
        assert relative_error(got[~hit], clean[~hit]) < EXACT


def test_padding_gets_no_gradient_and_passes_none_on() -> None:
    key, value = make_keys("cos0.8", 2, 2, 150, 8), torch.randn(2, 2, 150, 8, dtype=torch.float64)
    mask = torch.rand(2, 150) > 0.3
    weight = torch.randn_like(value)
    found = []
    for spoil in (False, True):
        if spoil:
            for tensor in (key, value, weight):
                tensor.transpose(1, 2)[~mask] = torch.nan
        operands = leaves(key, value)
        y = precondition(*operands, key_mask=mask)
        found.append(torch.autograd.grad(y, operands, weight))
    for got, clean in zip(found[1], found[0], strict=True):
        assert (got.transpose(1, 2)[~mask] == 0).all()
        assert torch.equal(got, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    """No worse than twice the dense definition in the same dtype (float32 inside), and finite."""
    key = make_keys("cos0.9", 1, 2, 700, 32, dtype=dtype)
    value, weight = (torch.randn(1, 2, 700, 32).to(dtype) for _ in range(2))
    grads = {}
    for name, cast, impl in (
        ("exact", torch.float64, "reference"),
        ("dense", dtype, "reference"),
        ("got", dtype, "blocked"),
    ):
        operands = leaves(key.to(cast), value.to(cast))
        y = precondition(*operands, impl=impl)
        grads[name] = torch.autograd.grad(y, operands, weight.to(cast))
    rounding = torch.finfo(dtype).eps
    for got, dense, exact in zip(grads["got"], grads["dense"], grads["exact"], strict=True):
        assert got.dtype == dtype
        assert relative_error(got, exact) < 2 * relative_error(dense, exact) + rounding


def test_only_what_is_asked_for() -> None:
    key = make_keys("cos0.8", 1, 1, 20, 4)
    value = torch.randn(1, 1, 20, 4, dtype=torch.float64, requires_grad=True)
    y = precondition(key, value, strength=torch.tensor([0.5]))
    (got,) = torch.autograd.grad(y.sum(), value)
    assert got.isfinite().all()
    strength = torch.tensor([0.5], requires_grad=True)
    y = precondition(key, value.detach(), strength=strength)
    assert torch.autograd.grad(y.sum(), strength)[0].dtype == torch.float32


@pytest.mark.parametrize("packed", [False, True])
def test_second_derivative_raises(packed: bool) -> None:
    key = make_keys("cos0.8", 1, 20, 4).requires_grad_()
    value = torch.randn(1, 20, 4, dtype=torch.float64, requires_grad=True)
    if packed:
        y = precondition_varlen(key.transpose(0, 1), value.transpose(0, 1), pack((20,)))
    else:
        y = precondition(key[None], value[None])
    (grad,) = torch.autograd.grad(weighted_sum(y), key, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), key)


def test_reference_has_a_second_derivative() -> None:
    key = make_keys("cos0.8", 1, 1, 5, 3).requires_grad_()
    value = torch.randn(1, 1, 5, 2, dtype=torch.float64)

    def function(key: Tensor) -> Tensor:
        return precondition(key, value, impl="reference")

    assert torch.autograd.gradgradcheck(function, (key,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", ["key", "value", "grad", "past_key", "past"])
def test_not_finite_spoils_its_head_and_no_other(place: str, dtype: torch.dtype) -> None:
    """One rule for all implementations: Y from there on, and every gradient of that row and head."""
    key = make_keys("cos0.5", 2, 2, 210, 8).to(dtype)
    leaves = {
        "key": key[:, :, 70:].clone(),
        "value": torch.randn(2, 2, 140, 4, dtype=torch.float64).to(dtype),
        "past_key": key[:, :, :70].clone(),
        "past": torch.randn(2, 2, 70, 4, dtype=torch.float64).to(dtype),
    }
    grad = torch.randn(2, 2, 140, 4, dtype=torch.float64).to(dtype)
    mask = torch.arange(140) != 50

    def run(spoil: float | None) -> list[Tensor]:
        spoiled = {name: x.clone() for name, x in leaves.items()} | {"grad": grad.clone()}
        if spoil is not None:
            spoiled[place][0, 1, 30, 2] = spoil
        inputs = [spoiled[name].requires_grad_() for name in leaves]
        y = precondition(
            inputs[0], inputs[1], key_mask=mask[None].expand(2, -1), past=(inputs[2], inputs[3])
        )
        return [y, *torch.autograd.grad(y, inputs, spoiled["grad"])]

    clean = run(None)
    for spoil in (math.nan, math.inf):
        y, *grads = run(spoil)
        after = {"grad": 140, "past_key": 0, "past": 0}.get(place, 30)
        assert y[0, 1, after:][mask[after:]].isnan().all()
        assert torch.equal(y[0, 1, :after], clean[0][0, 1, :after])
        for name, g, c in zip(leaves, grads, clean[1:], strict=True):
            live = mask if name in ("key", "value") else slice(None)
            assert g[0, 1][live].isnan().all(), name
            for row, head in ((0, 0), (1, 0), (1, 1)):
                assert torch.equal(g[row, head], c[row, head])
        assert not any(x[0, 1, 50].any() for x in (y, *grads[:2]))
