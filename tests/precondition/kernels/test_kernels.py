"""The Triton kernels against float64: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lucid_attention import precondition, precondition_varlen
from lucid_attention.precondition import operators
from tests.conftest import HARD_KEYS, make_keys, relative_error
from tests.precondition.test_definition import pack

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),  # nothing unwritten may be read
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0"),  # interpreter
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HALF = torch.float16


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU; here the kernels are compiled")
    name: str = request.param
    return name


def run(
    leaves: list[Tensor], impl: str, grad: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """``Y`` and the gradients of all leaves: key, value, then strength, past key, past Y."""
    key, value, *more = leaves
    options = dict(options)
    if options.pop("learned", False):
        options["strength"] = more.pop(0)
    if more:
        options["past"] = tuple(more)
    offsets = options.pop("offsets", None)
    if offsets is None:
        y = precondition(key, value, impl=impl, **options)
    else:
        y = precondition_varlen(key, value, offsets, impl=impl, **options)
    if grad is None:
        grad = torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape)
    return [y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def widened(leaves: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in leaves]


def rounded(x: Tensor, power: float = 1.0) -> Tensor:
    """Through float16 and back, in units of ``power``."""
    return (x * power).half().double() / power


def half_inside(
    leaves: list[Tensor], strength: Tensor | None = None, *, exact_p: bool = False
) -> list[Tensor]:
    """``Y, dK, dV`` as torch computes them when khat, P, Y, dV and T are held in float16.

    This is the yardstick: the same roundings as the kernels', in another order and without tiles.
    Exact arithmetic otherwise. ``exact_p``: P is not rounded where it multiplies Y and dV.
    """
    key, value = (x.detach().double() for x in leaves[:2])
    seq, width = key.shape[-2:]
    inverse = torch.rsqrt(key.square().mean(-1, keepdim=True) + 1e-6)
    khat = rounded(key * inverse)
    scale = width**-0.5
    factor = 1.0 if strength is None else strength.double()[:, None, None]
    exact = torch.exp(scale * (khat @ khat.mT - width)).tril(-1)
    p = exact if exact_p else rounded(exact, 2.0**15)

    def substitute(matrix: Tensor, right: Tensor) -> Tensor:
        unit = 2.0 ** torch.floor(torch.log2(right.abs().amax().clamp(min=1e-30)))
        found = torch.zeros_like(right)
        for i in range(seq):
            row = right[..., i : i + 1, :]
            row = row - factor * matrix[..., i : i + 1, :i] @ found[..., :i, :]
            found[..., i : i + 1, :] = rounded(row / unit) * unit
        return found

    y = substitute(p, value)
    grad = torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape).to(leaves[0].dtype)
    flipped = p.flip(-1, -2).mT
    dv = substitute(flipped, grad.double().flip(-2)).flip(-2)
    t = (dv @ y.mT).tril(-1) * p
    t = rounded(t, 2.0 ** -math.ceil(math.log2(t.abs().amax().item() + 1e-30)))
    dkhat = -factor * scale * (t @ khat + t.mT @ khat)
    dk = inverse * (dkhat - khat * (dkhat * khat).mean(-1, keepdim=True))
    return [x.to(leaves[0].dtype) for x in (y, dk, dv)]


def operands(
    kind: str, *shape: int, value_width: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    key = make_keys(kind, *shape, dtype=dtype, device=device)
    value = torch.randn(*shape[:-1], value_width, dtype=torch.float64).to(device, dtype)
    return [key.requires_grad_(), value.requires_grad_()]


def close(got: Tensor, exact: Tensor, yardstick: Tensor, terms: Tensor | None = None) -> None:
    """At most twice the yardstick's error, and a few roundings of the result.

    ``terms``: for a gradient that vanishes by cancellation (identical keys), what its size is
    measured against.
    """
    assert got.dtype == yardstick.dtype
    size = exact.norm().item()
    if terms is not None:
        size = max(size, terms.norm().item())
    if size == 0.0:
        assert not got.any()
        return
    error = (got.double() - exact).norm().item() / size
    allowed = (yardstick.double() - exact).norm().item() / size
    # bfloat16 results are truncated, not rounded, by the interpreter: up to one eps
    assert error <= 2 * allowed + 4 * torch.finfo(got.dtype).eps, (error, allowed)


def vanishing(leaves: list[Tensor], outputs: list[Tensor]) -> Tensor:
    """The size of the key gradient's terms before they cancel: ``|dV| |Y| / |k|``, per row."""
    key = leaves[0].detach().double()
    norms = outputs[2].double().norm(dim=-1, keepdim=True) * outputs[0].double().norm()
    rms = key.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-3)
    return norms / rms / key.shape[-2] ** 0.5


@pytest.mark.parametrize("kind", HARD_KEYS)
def test_half_precision(kind: str, device: str) -> None:
    leaves = operands(kind, 1, 2, 200, 20, value_width=12, dtype=HALF, device=device)
    if kind == "huge":  # 1e4 times a normal number is at float16's end
        leaves[0] = (leaves[0].detach() / 16).requires_grad_()
    exact = run(widened(leaves), "reference")
    yardstick = half_inside(leaves)
    got = run(leaves, "triton")
    for index, (g, e, y) in enumerate(zip(got, exact, yardstick, strict=True)):
        close(g, e, y, vanishing(leaves, exact) if index == 1 else None)


@pytest.mark.parametrize("kind", ["cos0.99", "mixed", "huge"])
def test_high_precision(kind: str, device: str) -> None:
    """Y before its rounding: float32 inside, as wherever Hopper's own kernels do not serve."""
    leaves = operands(kind, 1, 2, 200, 20, value_width=12, dtype=HALF, device=device)
    if kind == "huge":
        leaves[0] = (leaves[0].detach() / 16).requires_grad_()
    exact = run(widened(leaves), "reference")
    got = run(leaves, "triton", precision="high")
    for index, (g, e) in enumerate(zip(got, exact, strict=True)):
        close(g, e, e.to(HALF), vanishing(leaves, exact) if index == 1 else None)
    key, value = (x.detach() for x in leaves)
    wide = precondition(key, value, precision="high", out_dtype=torch.float32, impl="triton")
    assert relative_error(wide, exact[0]) < 2e-6
    assert torch.equal(wide.half(), got[0])


@pytest.mark.parametrize("case", ["padding", "packed", "past"])
def test_high_precision_of_other_layouts(case: str, device: str) -> None:
    leaves = operands("cos0.9", 1, 1, 150, 20, value_width=12, dtype=HALF, device=device)
    options: dict[str, Any] = {"precision": "high"}
    if case == "padding":
        options["key_mask"] = torch.rand(1, 150, device=device) > 0.4
    if case == "packed":
        leaves = [x.detach()[0].transpose(0, 1).requires_grad_() for x in leaves]
        options["offsets"] = pack((5, 0, 130, 15)).to(device)
    if case == "past":
        leaves.append(make_keys("cos0.9", 1, 1, 70, 20, dtype=HALF, device=device).requires_grad_())
        leaves.append(torch.randn(1, 1, 70, 12, device=device, requires_grad=True))
    exact = run(widened(leaves), "reference", **options)
    for g, e in zip(run(leaves, "triton", **options), exact, strict=True):
        # What rounding Y, its gradient and the results to float16 makes.
        assert relative_error(g, e) < 1.2e-3


@pytest.mark.parametrize("kind", HARD_KEYS)
def test_float32(kind: str, device: str) -> None:
    leaves = operands(kind, 1, 2, 100, 20, value_width=12, dtype=torch.float32, device=device)
    exact = run(widened(leaves), "reference")
    yardstick = run(leaves, "blocked")
    got = run(leaves, "triton")
    for index, (g, e, y) in enumerate(zip(got, exact, yardstick, strict=True)):
        close(g, e, y, vanishing(leaves, exact) if index == 1 else None)


@pytest.mark.parametrize("seq", [1, 15, 63, 64, 65, 127, 128, 129, 257])
def test_lengths(seq: int, device: str) -> None:
    leaves = operands("cos0.8", 1, 1, seq, 16, value_width=16, dtype=HALF, device=device)
    exact = run(widened(leaves), "reference")
    for g, e, y in zip(run(leaves, "triton"), exact, half_inside(leaves), strict=True):
        close(g, e, y, vanishing(leaves, exact) if seq == 1 else None)


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("width", "value_width"), [(68, 68), (40, 20), (16, 100), (4, 130), (96, 1), (160, 36)]
)
def test_head_sizes(dtype: torch.dtype, width: int, value_width: int, device: str) -> None:
    leaves = operands(
        "cos0.8", 1, 1, 140, width, value_width=value_width, dtype=dtype, device=device
    )
    exact = run(widened(leaves), "reference")
    yardstick = half_inside(leaves) if dtype == HALF else run(leaves, "blocked")
    for g, e, y in zip(run(leaves, "triton"), exact, yardstick, strict=True):
        close(g, e, y)


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
def test_padding(dtype: torch.dtype, side: str, device: str) -> None:
    heads = 2 if side == "anywhere" else 1  # a mask is of a batch row, whatever its head: seen once
    leaves = operands("cos0.5", 2, heads, 150, 20, value_width=12, dtype=dtype, device=device)
    index = torch.arange(150)
    mask = {
        "left": torch.stack((index >= 130, index >= 3)),
        "right": torch.stack((index < 1, index < 140)),
        "anywhere": torch.rand(2, 150) > 0.4,
    }[side].to(device)
    exact = run(widened(leaves), "reference", key_mask=mask)
    with torch.no_grad():
        for leaf in leaves:
            leaf.masked_fill_(~mask[:, None, :, None], float("nan"))
    got = run(leaves, "triton", key_mask=mask)
    for g, e in zip(got, exact, strict=True):
        assert relative_error(g, e) < (3e-3 if dtype == HALF else 3e-6)
        assert not g.masked_select(~mask[:, None, :, None].expand_as(g)).any()


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_packed(dtype: torch.dtype, device: str) -> None:
    lengths = (5, 0, 150, 1, 129, 15, 0)
    leaves = operands("cos0.5", 2, 300, 20, value_width=12, dtype=dtype, device=device)
    leaves = [x.detach().transpose(0, 1).requires_grad_() for x in leaves]
    strength = torch.tensor([0.4, 1.0], device=device, requires_grad=True)
    offsets = pack(lengths).to(device)
    options = {"offsets": offsets, "learned": True}
    exact = run(widened([*leaves, strength]), "reference", **options)
    # Where the offsets are on the host they tell the longest sequence, whatever the caller says.
    for longest in (None, 150, 300) if device == "cuda" else (300,):
        got = run([*leaves, strength], "triton", max_seqlen=longest, **options)
        for g, e in zip(got, exact, strict=True):
            assert relative_error(g, e) < (3e-3 if dtype == HALF else 3e-6)


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("past", [1, 140])
def test_past_and_strength(dtype: torch.dtype, past: int, device: str) -> None:
    leaves = operands("cos0.5", 1, 2, past + 70, 20, value_width=12, dtype=dtype, device=device)
    strength = torch.tensor([0.5, 1.0], device=device)
    key, value = (x.detach() for x in leaves)
    before = precondition(
        key[:, :, :past].double(), value[:, :, :past].double(), strength=strength, impl="reference"
    )
    mask = torch.arange(70, device=device)[None] != 3
    chunk = [key[:, :, past:], value[:, :, past:], strength, key[:, :, :past], before.float()]
    chunk = [x.clone().requires_grad_() for x in chunk]
    options = {"learned": True, "key_mask": mask}
    exact = run(widened(chunk), "reference", **options)
    for g, e in zip(run(chunk, "triton", **options), exact, strict=True):
        assert relative_error(g, e) < (4e-3 if dtype == HALF else 4e-6)


@pytest.mark.parametrize("size", [1e-8, 1e30])
def test_range(size: float, device: str) -> None:
    """Values and gradients far outside float16's range lose nothing: bfloat16 holds them."""
    leaves = operands("cos0.5", 1, 2, 150, 20, value_width=12, dtype=torch.bfloat16, device=device)
    grad = torch.randn(1, 2, 150, 12).to(device, torch.bfloat16)
    y, dk, dv = run(leaves, "triton", grad)
    sized = [leaves[0], (leaves[1].detach() * size).requires_grad_()]
    got = run(sized, "triton", grad)
    assert relative_error(got[0].double() / size, y) < 2e-2
    assert relative_error(got[1].double() / size, dk) < 2e-2
    assert relative_error(got[2], dv) < 2e-2
    if size < 1:
        tiny = run(leaves, "triton", grad * size)
        assert relative_error(tiny[1].double() / size, dk) < 2e-2
        assert relative_error(tiny[2].double() / size, dv) < 2e-2


def test_one_loud_head_does_not_cost_the_others(device: str) -> None:
    """One power of two per batch row and head."""
    leaves = operands("cos0.5", 1, 2, 150, 20, value_width=12, dtype=torch.float16, device=device)
    expected = run(leaves, "triton")
    with torch.no_grad():
        leaves[1][:, 1] *= 2.0**12
    got = run(leaves, "triton")
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g[:, 0], e[:, 0])


@pytest.mark.parametrize("row", [0, 63, 64, 127, 128, 199])
def test_one_loud_row_is_found_wherever_it_is(row: int, device: str) -> None:
    """A largest value that is overlooked overflows float16: the others are some hundred times smaller."""
    leaves = operands("cos0.5", 1, 1, 200, 20, value_width=12, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        leaves[1][0, 0, row, row % 12] = -500
    exact = run(widened(leaves), "reference")
    for g, e in zip(run(leaves, "triton"), exact, strict=True):
        assert relative_error(g, e) < 2e-2


def test_keys_too_large_to_square(device: str) -> None:
    """Finite keys whose squares are not: their norm is infinite, and they couple to nothing."""
    leaves = operands("cos0.5", 1, 1, 150, 20, value_width=12, dtype=torch.bfloat16, device=device)
    zero = [x.detach().clone() for x in leaves]
    with torch.no_grad():
        leaves[0][0, 0, 70] = 1e30
        zero[0][0, 0, 70] = 0
    y, expected = (precondition(*x, impl="triton") for x in (leaves, zero))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_nan_stays_where_it_is(dtype: torch.dtype, device: str) -> None:
    """In a key and, in another sequence and head of the same call, in a value."""
    leaves = operands("cos0.5", 2, 2, 150, 20, value_width=12, dtype=dtype, device=device)
    clean = run(leaves, "triton")
    with torch.no_grad():
        leaves[0][0, 1, 70, 3] = leaves[1][1, 0, 90, 3] = float("nan")
    got = run(leaves, "triton")
    hit = torch.zeros(2, 2, 150, dtype=torch.bool, device=device)
    hit[0, 1, 70:] = hit[1, 0, 90:] = True
    assert got[0][hit].isnan().all() and torch.equal(got[0][~hit], clean[0][~hit])
    hit[0, 1] = hit[1, 0] = True  # every gradient of those sequences and heads
    for g, c in zip(got[1:], clean[1:], strict=True):
        assert g[hit].isnan().all() and torch.equal(g[~hit], c[~hit])


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_nan_in_a_chunk_reaches_its_past(dtype: torch.dtype, device: str) -> None:
    """Whatever is not finite anywhere in a head spoils all gradients of that head, and no other's."""
    leaves = operands("cos0.5", 1, 2, 40, 20, value_width=12, dtype=dtype, device=device)
    leaves += [
        make_keys("cos0.5", 1, 2, 30, 20, dtype=dtype, device=device).requires_grad_(),
        torch.randn(1, 2, 30, 12, device=device, requires_grad=True),
    ]
    clean = run(leaves, "triton")
    for spoiled in (0, 2):
        hit = [x.detach().clone().requires_grad_() for x in leaves]
        with torch.no_grad():
            hit[spoiled][0, 1, 7, 3] = float("nan")
        got = run(hit, "triton")
        for g, c in zip(got[1:], clean[1:], strict=True):
            assert g[:, 1].isnan().all() and torch.equal(g[:, 0], c[:, 0])


@pytest.mark.parametrize("scale", [1.0, 8.0, 20.0])
def test_large_kernel_scales(scale: float, device: str) -> None:
    """float16 keys would be .7 %, 5 % and 13 % wrong here; these calls are float32 inside."""
    leaves = operands("repeated", 1, 1, 200, 64, value_width=16, dtype=HALF, device=device)
    exact = run(widened(leaves), "reference", kernel_scale=scale)
    got = run(leaves, "triton", kernel_scale=scale)
    assert relative_error(got[0], exact[0]) < 3e-3
    assert relative_error(got[2], exact[2]) < 3e-3
    # Alike keys' gradients cancel: measured against their terms.
    terms = scale * vanishing(leaves, exact).norm()
    assert (got[1].double() - exact[1]).norm() < 1e-5 * terms


def test_strides_and_no_strength(device: str) -> None:
    leaves = operands("cos0.8", 2, 140, 2, 20, value_width=20, dtype=HALF, device=device)
    leaves = [x.detach().transpose(1, 2).requires_grad_() for x in leaves]
    contiguous = [x.detach().contiguous().requires_grad_() for x in leaves]
    last = [x.detach().mT.contiguous().mT.requires_grad_() for x in leaves]
    expected = run(contiguous, "triton")
    for other in (leaves, last):
        for g, e in zip(run(other, "triton"), expected, strict=True):
            assert torch.equal(g, e)
    nothing = torch.zeros(2, device=device, requires_grad=True)
    got = run([*leaves, nothing], "triton", learned=True)
    exact = run(widened([*leaves, nothing]), "reference", learned=True)
    assert torch.equal(got[0], leaves[1]) and not got[1].any()
    assert relative_error(got[3], exact[3]) < 1e-2


def test_masks_and_strengths_of_any_strides(device: str) -> None:
    leaves = operands("cos0.5", 2, 2, 70, 20, value_width=12, dtype=torch.float32, device=device)
    wide = torch.rand(1, 140, device=device) > 0.3
    mask = wide[:, ::2].expand(2, 70)
    strength = torch.full((1,), 0.3, device=device).expand(2)
    got = run(leaves, "triton", key_mask=mask, strength=strength)
    exact = run(widened(leaves), "reference", key_mask=mask, strength=strength)
    for g, e in zip(got, exact, strict=True):
        assert relative_error(g, e) < 3e-6


def test_offsets_of_any_strides(device: str) -> None:
    """Also after a call with plain ones: what is kept of it must not meet these."""
    offsets = pack((5, 0, 129)).to(device)
    leaves = operands("cos0.5", 1, 1, 134, 20, value_width=12, dtype=HALF, device=device)
    leaves = [x.detach()[0].transpose(0, 1).requires_grad_() for x in leaves]
    expected = run(leaves, "triton", offsets=offsets)
    moved = torch.cat([offsets.new_tensor([9]), offsets])[1:]  # no multiple of 16 bytes
    strided = torch.stack([offsets, 0 * offsets + 7], dim=1)[:, 0]
    for other in (moved, strided, offsets):
        for g, e in zip(run(leaves, "triton", offsets=other), expected, strict=True):
            assert torch.equal(g, e)


def test_empty(device: str) -> None:
    for shape in ((0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8)):
        key = torch.randn(shape, device=device, requires_grad=True)
        value = torch.randn(shape, device=device, requires_grad=True)
        y, dk, dv = run([key, value], "triton")
        assert y.shape == dk.shape == dv.shape == shape
    packed = torch.randn(0, 2, 8, device=device)
    assert precondition_varlen(packed, packed, pack((0, 0)).to(device), impl="triton").shape == (
        0,
        2,
        8,
    )


def test_repeats_bit_for_bit(device: str) -> None:
    leaves = operands("cos0.9", 1, 2, 300, 20, value_width=12, dtype=HALF, device=device)
    first = run(leaves, "triton")
    for g, e in zip(run(leaves, "triton"), first, strict=True):
        assert torch.equal(g, e)


@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(optional: bool, device: str) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # fmt: skip
    key, value = operands("cos0.8", 2, 2, 20, 6, value_width=4, dtype=torch.float32, device=device)
    extra: tuple[Tensor | None, ...] = (None, None, None, None)
    if optional:
        extra = (
            torch.tensor([0.3, 1.0], device=device, requires_grad=True),
            torch.rand(2, 20, device=device) > 0.2,
            make_keys("cos0.8", 2, 2, 7, 6, dtype=torch.float32, device=device).requires_grad_(),
            torch.randn(2, 2, 7, 4, device=device, requires_grad=True),
        )
    args = (key, value, *extra, 0.4, "triton", "default", torch.float32)
    torch.library.opcheck(operators.precondition.overload, args, test_utils=checks)


@pytest.mark.parametrize("with_past", [False, True])
def test_out_dtype(with_past: bool, device: str) -> None:
    """Y before its rounding: closer to float64 than the rounded one, which it rounds to."""
    leaves = operands("cos0.5", 1, 2, 200, 64, value_width=64, dtype=torch.bfloat16, device=device)
    key, value = (x.detach() for x in leaves[:2])
    past = None
    if with_past:
        past = (key.flip(2), torch.randn(1, 2, 200, value.shape[-1], device=device))
    exact = precondition(
        key.double(),
        value.double(),
        past=past and tuple(x.double() for x in past),
        impl="reference",
    )
    wide = precondition(key, value, past=past, out_dtype=torch.float32, impl="triton")
    narrow = precondition(key, value, past=past, impl="triton")
    assert wide.dtype == torch.float32
    assert relative_error(wide, exact) < 8e-4 < 1.2e-3 < relative_error(narrow, exact)
    assert relative_error(wide, narrow) < 4e-3
