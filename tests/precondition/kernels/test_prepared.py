"""Blocks as Hopper's kernel prepares them, beside the portable kernel's, and their inverses beside float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import HARD_KEYS, make_keys
from tests.precondition.test_definition import pack

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("_hopper")]
WIDTHS = [(64, 64), (128, 128), (68, 68), (100, 56), (64, 128), (96, 96), (33, 33)]
Given = dict[str, Any]


@pytest.fixture
def _hopper() -> None:
    from lucid_attention.precondition.kernels.family import has_hopper_kernels

    if not has_hopper_kernels(torch.device("cuda")):
        pytest.skip(
            "needs a Hopper card and Triton 3.6: elsewhere the portable kernel prepares all blocks"
        )


def as_tiles(operand: Tensor) -> Tensor:
    """Quadrants from the order of the tensor cores' registers, which the fused adjoint loads: transposed back."""
    x = operand.view(
        -1, 3, 4, 4, 8, 4, 2, 2, 2
    )  # step, warp, row, pair, column + 8, row + 8, column
    return x.permute(0, 1, 3, 7, 4, 2, 6, 5, 8).reshape(-1, 3, 64, 64).transpose(2, 3)


def prepared(
    given: Given, monkeypatch: pytest.MonkeyPatch, *, hopper: bool, few: bool = False
) -> list[dict[str, Any]]:
    """What `prepare` left for the solve and for the adjoint solve, as of many blocks or of ``few``."""
    from lucid_attention.precondition.kernels import launch, plan, stages

    found: list[dict[str, Any]] = []
    prepare = stages.prepare

    def noting(run: Any, geometry: Any, at: Any, *args: Any, **options: Any) -> None:
        assert stages.inverts_in_shared_memory(run.call) == hopper
        prepare(run, geometry, at, *args, **options)
        names = (
            "keys",
            "live",
            "largest",
            "bad",
            "inverse",
            "largest_second",
            "table",
            "solved",
            "gh",
        )
        parts = {name: getattr(at, name, None) for name in names}
        found.append({name: None if x is None else x.clone() for name, x in parts.items()})
        found[-1]["operand"] = hopper and options.get("form") is stages.Form.FUSED
        found[-1]["shape"] = geometry.chains, geometry.blocks

    with monkeypatch.context() as patch:
        patch.setattr(plan, "_calls", {})
        if not few:
            patch.setattr(plan, "FEW_BLOCKS", 0)
            patch.setattr(plan, "LINKED_BLOCKS", 0)
        patch.setattr(stages, "prepare", noting)
        # Only the blocks are looked at.
        patch.setattr(stages, "solve", lambda *args: None)
        patch.setattr(stages, "hopper_adjoint", lambda *args: None)
        if not hopper:
            patch.setattr(stages, "inverts_in_shared_memory", lambda call: False)
        key, value, grad = given["key"], given["value"], given["grad"]
        rest = given["strength"], given["mask"], None, key.shape[-1] ** -0.5
        packed = given["offsets"], 0 if given["offsets"] is None else key.shape[0]
        launch._solve(key, value, *packed, *rest)
        launch._adjoint(grad, key, value, *packed, *rest)  # any Y will do
    return found


def exact_inverses(parts: dict[str, Any], strength: Tensor | None, width: int) -> Tensor:
    """What is under the diagonal of every block's inverse, as quadrants, in float64 from the keys in float16."""
    chains, blocks = parts["shape"]
    keys = parts["keys"].double().view(chains * blocks, 128, -1)
    live = parts["live"].view(-1, 128).double()
    p = torch.exp(keys @ keys.transpose(1, 2) * width**-0.5 - width**0.5)
    p = p * live[:, :, None] * live[:, None, :]
    if strength is not None:
        p = (
            p
            * strength.double()
            .repeat(chains // len(strength))
            .repeat_interleave(blocks)[:, None, None]
        )
    one = torch.eye(128, device=p.device, dtype=p.dtype)
    lower = p.tril(-1) + one
    inverse = torch.linalg.solve_triangular(
        lower, one.expand_as(p), upper=False, unitriangular=True
    )
    inverse = inverse - one
    return torch.stack([inverse[:, :64, :64], inverse[:, 64:, :64], inverse[:, 64:, 64:]], 1)


def compare(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = prepared(given, monkeypatch, hopper=True)
    portable = prepared(given, monkeypatch, hopper=False)
    assert len(ours) == len(portable) == 2
    for got, other in zip(ours, portable, strict=True):
        for name in ("live", "largest", "bad", "largest_second"):
            assert (got[name] is None) == (other[name] is None)
            assert got[name] is None or torch.equal(got[name], other[name]), name
        # The portable kernel adds up squares of 65 to 96 columns in two pieces: now and then the other neighbour.
        keys, others = got["keys"].double(), other["keys"].double()
        assert ((keys - others).abs() <= 2.0**-10 * others.abs()).all()
        assert (keys != others).double().mean() <= 1e-3
        inverse = as_tiles(got["inverse"]) if got["operand"] else got["inverse"]
        errors = []
        for parts, tiles in ((got, inverse), (other, other["inverse"])):
            exact = exact_inverses(parts, given["strength"], given["key"].shape[-1])
            first, second = parts["live"].view(-1, 2, 64).double().unbind(1)
            # Where there is no token nothing is promised: right-hand sides are 0 there.
            there = ((first, first), (second, first), (second, second))
            there = torch.stack([a[:, :, None] * b[:, None, :] for a, b in there], 1)
            errors.append((tiles.double() - exact) * there)
        assert inverse.isfinite().all()
        assert errors[0].norm() <= 1.05 * errors[1].norm() + 1e-6
        # No quadrant is worse, and no entry: at most twice the portable kernel's, and a rounding of what is largest there.
        worst, allowed, largest = (x.abs().amax((2, 3)) for x in (*errors, exact))
        assert (worst <= 2 * allowed + 2.0**-10 * largest).all()
        assert not inverse[:, ::2].double().triu().any()


def given_for(
    width: int,
    value_width: int,
    seq: int,
    kind: str = "cos0.8",
    dtype: torch.dtype = torch.bfloat16,
) -> Given:
    key = make_keys(kind, 2, 3, seq, width, dtype=dtype, device="cuda")
    value, grad = torch.randn(2, 2, 3, seq, value_width, device="cuda").to(dtype).unbind(0)
    return {"key": key, "value": value, "grad": grad} | dict.fromkeys(
        ("strength", "mask", "offsets")
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("width", "value_width"), WIDTHS)
def test_rows_of_few_blocks_are_marked(
    width: int, value_width: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every word of what the solve writes; all else is as it is of many."""
    given = given_for(width, value_width, 700)
    if packed:
        for name in ("key", "value", "grad"):
            given[name] = given[name][1].transpose(0, 1).contiguous()
        given["offsets"] = pack((5, 0, 129, 1, 300, 0, 265)).cuda()
    torch.full((1 << 26,), 1, dtype=torch.uint8, device="cuda")  # what allocations find
    few = prepared(given, monkeypatch, hopper=True, few=True)
    many = prepared(given, monkeypatch, hopper=True)
    for found, others, rows in zip(few, many, ("solved", "gh"), strict=True):
        assert not found["operand"]
        chains, blocks = found["shape"]
        assert found[rows].shape[0] == chains * blocks * 128
        assert (found[rows].view(torch.int16) == -1).all()
        for name in ("keys", "live", "largest", "bad", "largest_second"):
            assert (found[name] is None) == (others[name] is None)
            assert found[name] is None or torch.equal(found[name], others[name]), name
        inverse = as_tiles(others["inverse"]) if others["operand"] else others["inverse"]
        assert torch.equal(found["inverse"], inverse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seq", [1, 64, 129, 1000])
@pytest.mark.parametrize(("width", "value_width"), WIDTHS)
def test_lengths(
    width: int, value_width: int, seq: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(given_for(width, value_width, seq, dtype=dtype), monkeypatch)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kind", HARD_KEYS)
def test_hard_keys(kind: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(given_for(width, width, 300, kind), monkeypatch)


@pytest.mark.parametrize(("width", "value_width"), WIDTHS)
@pytest.mark.parametrize(
    "case",
    [
        "strength", "masked", "packed", "strided", "wide gradient", "wide", "not finite", "masked, not finite",
        "packed, not finite", "overflowing", "loud",
    ],
)  # fmt: skip
def test_cases(case: str, width: int, value_width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = given_for(width, value_width, 700)
    key, value, grad = given["key"], given["value"], given["grad"]
    if case == "strength":
        given["strength"] = torch.tensor([0.0, 0.4, 1.0], device="cuda")
    if "masked" in case:
        given["mask"] = torch.rand(2, 700, device="cuda") > 0.3
        key[:, :, ::7] = float("nan")  # at padding, where they must not matter
        given["mask"][:, ::7] = False
        given["mask"][:, [3, 5, 128, 300, 699]] = True
    if "not finite" in case:
        key[0, 0, 3, 1], key[1, 2, 699, 0] = float("inf"), float("nan")
        value[0, 1, 300, -1], value[1, 1, 5, 0] = float("nan"), -float("inf")
        grad[1, 0, 128, 2] = float("nan")
    if case == "overflowing":
        # Its square is not finite: such a key is 0, and nothing is wrong with its sequence.
        key[0, 1, 200] = 1e30
    if case == "loud":  # one entry that is some hundred times as large as the others, anywhere
        value[0, 0, 77, -1], value[1, 2, 640, 0] = -500.0, 300.0
        grad[0, 2, 699, 3] = -2000.0
    if case in ("wide", "wide gradient"):
        given["grad"] = grad.float()
    if case == "wide":
        # As a chunk's right-hand sides after a past, and as Y that was asked for in float32.
        given["value"] = value.float()
    if "packed" in case:
        for name in ("key", "value", "grad"):
            given[name] = given[name][1].transpose(0, 1).contiguous()
        given["offsets"] = pack((5, 0, 129, 1, 300, 0, 265)).cuda()
        if case == "packed":
            given["strength"] = torch.tensor([0.0, 0.4, 1.0], device="cuda")
    if case == "strided":
        for name in ("key", "value", "grad"):
            wide = torch.full(
                (2, 700, 3, given[name].shape[-1] + 3), 1e30, device="cuda"
            ).bfloat16()
            wide[..., 1:-2] = given[name].transpose(1, 2)
            given[name] = wide[..., 1:-2].transpose(1, 2)
    compare(given, monkeypatch)
