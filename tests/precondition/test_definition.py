"""The operator against its definition: implementations, shapes, masks, chunks, dtypes, strides."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lucid_attention import precondition, precondition_varlen
from tests.conftest import HARD_KEYS, make_keys, relative_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EXACT = 1e-12  # float64: rounding of a few thousand operations


def by_hand(key: Tensor, value: Tensor, scale: float, strength: float = 1.0) -> Tensor:
    """Two nested loops straight from the formula: the oracle's oracle."""
    seq, width = key.shape
    unit = [k / math.sqrt(float(k.square().mean()) + 1e-6) for k in key]
    solved: list[Tensor] = []
    for i in range(seq):
        row = value[i].clone()
        for j in range(i):
            row -= strength * math.exp(scale * (float(unit[i] @ unit[j]) - width)) * solved[j]
        solved.append(row)
    return torch.stack(solved)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize(("scale", "strength"), [(None, None), (0.05, 0.3), (1.5, 1.0)])
def test_equals_the_formula_written_out(
    impl: str, scale: float | None, strength: float | None
) -> None:
    key, value = make_keys("mixed", 2, 2, 17, 6), torch.randn(2, 2, 17, 5, dtype=torch.float64)
    got = precondition(key, value, kernel_scale=scale, strength=strength, impl=impl)
    written = 1.0 if strength is None else strength
    for b in range(2):
        for h in range(2):
            expected = by_hand(key[b, h], value[b, h], scale or 1 / math.sqrt(6), written)
            assert relative_error(got[b, h], expected) < EXACT


@pytest.mark.parametrize("kind", HARD_KEYS)
@pytest.mark.parametrize("seq", [0, 1, 15, 63, 64, 65, 127, 128, 129, 1000])
def test_blocked_equals_reference(kind: str, seq: int) -> None:
    key, value = make_keys(kind, 1, 3, seq, 16), torch.randn(1, 3, seq, 16, dtype=torch.float64)
    got = precondition(key, value, impl="blocked")
    assert got.shape == value.shape
    assert relative_error(got, precondition(key, value, impl="reference")) < EXACT


@pytest.mark.parametrize(
    ("width", "value_width"), [(1, 1), (68, 68), (64, 33), (20, 128), (256, 8)]
)
def test_any_head_size(width: int, value_width: int) -> None:
    key = make_keys("cos0.8", 2, 2, 150, width)
    value = torch.randn(2, 2, 150, value_width, dtype=torch.float64)
    expected = precondition(key, value, impl="reference")
    assert relative_error(precondition(key, value), expected) < EXACT


def test_many_chains_are_split_into_parts() -> None:
    key = make_keys("cos0.8", 40, 8, 140, 8)
    value = torch.randn(40, 8, 140, 8, dtype=torch.float64)
    strength = torch.linspace(0, 1, 8, dtype=torch.float64)
    mask = torch.rand(40, 140) > 0.2
    got = precondition(key, value, strength=strength, key_mask=mask)
    expected = precondition(key, value, strength=strength, key_mask=mask, impl="reference")
    assert relative_error(got, expected) < EXACT


def test_any_strides() -> None:
    key = make_keys("cos0.8", 2, 100, 3, 16).transpose(1, 2)  # (batch, seq, heads, dim) in memory
    value = torch.randn(16, 2, 3, 200, dtype=torch.float64).permute(1, 2, 3, 0)[:, :, ::2]
    got = precondition(key, value)
    assert got.is_contiguous()
    assert torch.equal(got, precondition(key.contiguous(), value.contiguous()))


def test_arguments_are_left_alone() -> None:
    key, value = make_keys("cos0.8", 1, 1, 200, 8), torch.randn(1, 1, 200, 8, dtype=torch.float64)
    kept = key.clone(), value.clone()
    precondition(key, value)
    assert torch.equal(key, kept[0])
    assert torch.equal(value, kept[1])


def test_no_token_touches_an_earlier_one() -> None:
    key, value = make_keys("cos0.8", 1, 2, 300, 16, dtype=torch.float32), torch.randn(1, 2, 300, 16)
    before = precondition(key, value)
    key[:, :, 200:], value[:, :, 200:] = torch.nan, 7.0
    after = precondition(key, value)
    assert torch.equal(before[:, :, :200], after[:, :, :200])
    assert after[:, :, 201:].isnan().all()


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_strength_zero_is_softmax_attention_exactly(impl: str) -> None:
    key, value = (
        make_keys("identical", 2, 2, 150, 8, dtype=torch.float32),
        torch.randn(2, 2, 150, 4),
    )
    assert torch.equal(precondition(key, value, strength=0.0, impl=impl), value)
    assert torch.equal(precondition(key, value, strength=torch.zeros(2), impl=impl), value)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_strength_per_head_and_one(impl: str) -> None:
    key, value = make_keys("cos0.8", 2, 3, 140, 8), torch.randn(2, 3, 140, 8, dtype=torch.float64)
    strengths = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    got = precondition(key, value, strength=strengths, impl=impl)
    for head, strength in enumerate(strengths.tolist()):
        alone = precondition(
            key[:, head : head + 1], value[:, head : head + 1], strength=strength, impl="reference"
        )
        assert relative_error(got[:, head : head + 1], alone) < EXACT
    plain = precondition(key, value, impl=impl)
    assert relative_error(precondition(key, value, strength=1.0, impl=impl), plain) < EXACT


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("where", ["left", "right", "anywhere", "all", "none"])
def test_padding_is_as_if_it_were_not_there(impl: str, where: str) -> None:
    seq = 200
    mask = torch.ones(2, seq, dtype=torch.bool)
    if where == "left":
        mask[0, :70] = False
    elif where == "right":
        mask[0, 131:] = False
    elif where == "anywhere":
        mask[0] = torch.rand(seq) > 0.5
        mask[1, 0] = False
    elif where == "all":
        mask[0] = False
    key, value = make_keys("cos0.8", 2, 2, seq, 8), torch.randn(2, 2, seq, 8, dtype=torch.float64)
    key[0, 1][~mask[0]] = math.nan
    value[0, 0][~mask[0]] = math.inf
    got = precondition(key, value, key_mask=mask, impl=impl)
    assert (got.transpose(1, 2)[~mask] == 0).all()
    for row in range(2):
        keep = mask[row]
        alone = precondition(key[row : row + 1, :, keep], value[row : row + 1, :, keep])
        assert relative_error(got[row : row + 1, :, keep], alone) < EXACT


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("splits", [(1, 2), (64,), (128,), (1, 130, 131, 250), (0, 299)])
@pytest.mark.parametrize("padded", [False, True])
def test_any_split_into_chunks_gives_the_same(
    impl: str, splits: tuple[int, ...], padded: bool
) -> None:
    seq = 300
    key, value = make_keys("cos0.8", 2, 2, seq, 8), torch.randn(2, 2, seq, 5, dtype=torch.float64)
    mask = torch.rand(2, seq) > 0.3 if padded else torch.ones(2, seq, dtype=torch.bool)
    key[:, 0][~mask] = math.nan  # padding may hold anything, in the past too
    strength = torch.tensor([0.5, 1.0], dtype=torch.float64)
    options = {"strength": strength, "impl": impl}
    whole = precondition(key, value, key_mask=mask if padded else None, **options)
    solved = value[:, :, :0]
    for start, stop in pairwise((0, *splits, seq)):
        chunk = precondition(
            key[:, :, start:stop],
            value[:, :, start:stop],
            key_mask=mask[:, start:stop] if padded else None,
            past=(key[:, :, :start], solved),
            **options,
        )
        solved = torch.cat((solved, chunk), dim=2)
    assert relative_error(solved, whole) < EXACT


LENGTHS = [(0,), (1,), (1, 1, 1), (5, 0, 130, 260, 3, 0), (300,), (64,) * 5, (0, 0), (128, 128, 1)]


def pack(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", ["cos0.8", "mixed"])
def test_packed_equals_separate(lengths: tuple[int, ...], kind: str) -> None:
    total, offsets = sum(lengths), pack(lengths)
    key = make_keys(kind, 3, total, 6).transpose(0, 1)
    value = torch.randn(total, 3, 5, dtype=torch.float64)
    strength = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    got = precondition_varlen(key, value, offsets, strength=strength)
    assert got.shape == value.shape
    expected = precondition_varlen(key, value, offsets, strength=strength, impl="reference")
    assert relative_error(got, expected) < EXACT
    longest = max(lengths)
    given = precondition_varlen(key, value, offsets, max_seqlen=longest, strength=strength)
    assert torch.equal(given, got)


def test_no_sequences_at_all() -> None:
    empty = torch.zeros(0, 2, 4)
    offsets = torch.zeros(1, dtype=torch.int32)
    for impl in ("reference", "blocked"):
        assert precondition_varlen(empty, empty, offsets, impl=impl).shape == (0, 2, 4)


@pytest.mark.parametrize("operand", ["key", "value"])
def test_nan_stays_in_its_sequence_and_head(operand: str) -> None:
    lengths = (5, 130, 200, 40)
    operands = {
        "key": make_keys("cos0.8", 2, sum(lengths), 8).transpose(0, 1).contiguous(),
        "value": torch.randn(sum(lengths), 2, 8, dtype=torch.float64),
    }
    clean = precondition_varlen(**operands, cu_seqlens=pack(lengths))
    operands[operand][140, 1] = math.nan  # in the third sequence, which starts at 135
    got = precondition_varlen(**operands, cu_seqlens=pack(lengths))
    hit = torch.zeros(sum(lengths), 2, dtype=torch.bool)
    hit[141:335, 1] = True
    assert got[hit].isnan().all()
    hit[140, 1] = True  # the row itself: its value's NaN shows, its key's may
    assert relative_error(got[~hit], clean[~hit]) < EXACT
    if operand == "value":
        assert got[140, 1].isnan().all()


@pytest.mark.parametrize("operand", ["key", "value"])
def test_nan_in_a_batch_stays_in_its_row_and_head(operand: str) -> None:
    operands = {
        "key": make_keys("cos0.8", 2, 2, 200, 8),
        "value": torch.randn(2, 2, 200, 8, dtype=torch.float64),
    }
    clean = precondition(**operands)
    operands[operand][1, 0, 50] = math.nan
    got = precondition(**operands)
    assert got[1, 0, 51:].isnan().all()
    got[1, 0, 50:] = clean[1, 0, 50:]
    assert relative_error(got, clean) < EXACT


@pytest.mark.parametrize("first", [0.0, 1e-30, 1e25, math.nan])
def test_a_sequence_does_not_overflow_its_neighbour(first: float) -> None:
    """Tiles form exponents between sequences too; with a short reference key those could overflow."""
    lengths = (150, 60)
    key = make_keys("cos0.5", 1, 210, 64, dtype=torch.float32).transpose(0, 1).contiguous()
    key[150] = first
    key.requires_grad_()
    value = torch.randn(210, 1, 8, requires_grad=True)
    y = precondition_varlen(key, value, pack(lengths), kernel_scale=3.0)
    grads = torch.autograd.grad(y[:150].sum(), (key, value))
    dense = precondition_varlen(key, value, pack(lengths), kernel_scale=3.0, impl="reference")
    expected = torch.autograd.grad(dense[:150].sum(), (key, value))
    for got, exact in zip((y, *grads), (dense, *expected), strict=True):
        assert relative_error(got[:150], exact[:150]) < 1e-4


def test_float32_on_correlated_keys() -> None:
    """The foundation's promise: within 1e-5 of float64 at cosine 0.8 and length 2048."""
    for width in (64, 128):
        key, value = make_keys("cos0.8", 1, 1, 2048, width), torch.randn(1, 1, 2048, width)
        exact = precondition(key.float().double(), value.double(), impl="reference")
        assert relative_error(precondition(key.float(), value), exact) < 1e-5


@pytest.mark.parametrize("kind", ["cos0.9", "cos0.99", "identical"])
def test_centring_pays_on_nearly_equal_keys(kind: str) -> None:
    """Without the centred kernel these are at 2e-5 and worse."""
    key, value = make_keys(kind, 1, 1, 2048, 64, dtype=torch.float32), torch.randn(1, 1, 2048, 64)
    exact = precondition(key.double(), value.double(), impl="reference")
    assert relative_error(precondition(key, value), exact) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    key, value = make_keys("cos0.9", 1, 2, 1000, 64, dtype=dtype), torch.randn(1, 2, 1000, 64)
    value = value.to(dtype)
    got = precondition(key, value)
    assert got.dtype == dtype
    exact = precondition(key.double(), value.double(), impl="reference")
    rounding = relative_error(exact.to(dtype), exact)
    assert relative_error(got, exact) < 1.05 * rounding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_chunks_in_half_precision(dtype: torch.dtype) -> None:
    """With Y kept in the inputs' dtype the stated bound is three times the final rounding, with Y
    kept in float32 a chunked solve is as good as one solve.
    """
    seq, step = 1024, 64
    key = make_keys("cos0.8", 1, 2, seq, 64, dtype=dtype)
    value = torch.randn(1, 2, seq, 64).to(dtype)
    exact = precondition(key.double(), value.double(), impl="reference")
    rounding = relative_error(exact.to(dtype), exact)
    for kept, bound in ((dtype, 3.0), (torch.float32, 1.05)):
        solved, outputs = value[:, :, :0].to(kept), []
        for start in range(0, seq, step):
            new = slice(start, start + step)
            # float32 inputs give float32 rows: what a cache that keeps more digits does
            chunk = precondition(
                key[:, :, new].to(kept),
                value[:, :, new].to(kept),
                past=(key[:, :, :start].to(kept), solved),
            )
            solved = torch.cat((solved, chunk), dim=2)
            outputs.append(chunk.to(dtype))
        assert relative_error(torch.cat(outputs, dim=2), exact) < bound * rounding


def test_a_wider_past_is_not_rounded() -> None:
    key, value = make_keys("cos0.8", 1, 1, 40, 8, dtype=torch.bfloat16), torch.randn(1, 1, 40, 8)
    value = value.bfloat16()
    wide = precondition(key[:, :, :30].float(), value[:, :, :30].float())
    new = (key[:, :, 30:], value[:, :, 30:])
    chunk = precondition(*new, past=(key[:, :, :30], wide))
    assert chunk.dtype == torch.bfloat16
    exact = precondition(key.double(), value.double())[:, :, 30:]
    assert torch.equal(chunk, exact.bfloat16())
    rounded = precondition(*new, past=(key[:, :, :30], wide.bfloat16()))
    assert not torch.equal(rounded, chunk)


def test_autocast_takes_mixed_dtypes_as_sdpa_does() -> None:
    """RoPE and QK-norm in float32 leave float32 keys beside half-precision values."""
    key, value = torch.randn(2, 1, 2, 20, 8).unbind(0)
    past = (key.bfloat16(), value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.nn.functional.scaled_dot_product_attention(key, key, value.bfloat16())
        got = precondition(key, value.bfloat16(), past=past)
    assert torch.equal(got, precondition(key.bfloat16(), value.bfloat16(), past=past))


def test_autocast_is_as_for_sdpa() -> None:
    key, value = make_keys("cos0.8", 1, 2, 200, 16, dtype=torch.float32), torch.randn(1, 2, 200, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sdpa = torch.nn.functional.scaled_dot_product_attention(key, key, value)
        got = precondition(key, value)
        wide = precondition(key.double(), value.double())
        strength = torch.tensor([0.999, 1.0])  # 0.999 is not a bfloat16
        weighted = precondition(key, value, strength=strength)
    assert got.dtype == sdpa.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    # inside, nothing is rounded: the same as bfloat16 inputs outside autocast
    rounded = key.bfloat16(), value.bfloat16()
    assert torch.equal(got, precondition(*rounded))
    assert torch.equal(weighted, precondition(*rounded, strength=strength))


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_out_dtype(impl: str, dtype: torch.dtype) -> None:
    """float32 keeps what rounding drops; gradients are those of the rounded Y."""
    key = make_keys("cos0.8", 1, 2, 90, 16, dtype=dtype).requires_grad_()
    value = torch.randn(1, 2, 90, 8).to(dtype).requires_grad_()
    past = (make_keys("cos0.8", 1, 2, 30, 16, dtype=dtype), torch.randn(1, 2, 30, 8))
    exact = precondition(
        key.double(), value.double(), past=tuple(x.double() for x in past), impl="reference"
    )
    wide = precondition(key, value, past=past, out_dtype=torch.float32, impl=impl)
    narrow = precondition(key, value, past=past, impl=impl)
    assert (wide.dtype, narrow.dtype) == (torch.float32, dtype)
    assert relative_error(wide, exact) < 1e-5 < relative_error(narrow, exact)
    assert torch.equal(wide.to(dtype), narrow)
    grad = torch.randn_like(narrow)
    expected = torch.autograd.grad(narrow, (key, value), grad)
    for g, e in zip(torch.autograd.grad(wide, (key, value), grad.float()), expected, strict=True):
        assert g.dtype == dtype
        if impl == "blocked":
            assert torch.equal(g, e)
        else:  # autograd's own, from Y as it was
            assert relative_error(g, e) < 2e-2
