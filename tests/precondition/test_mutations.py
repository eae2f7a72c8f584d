"""The checks can fail: drop a term of the blocked solve, and comparison with the oracle breaks."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lucid_attention import precondition, precondition_varlen
from lucid_attention.precondition import blocked, blocked_calls, layout
from tests.conftest import make_keys, relative_error
from tests.precondition.test_definition import pack

SOURCE = Path(blocked.__file__).read_text()

MUTATIONS = {
    "no answer from earlier blocks": ("block -= answered if strength is None else strength * answered\n        if rows.tokens", "pass\n        if rows.tokens"),
    "no answer from the past": ("answered = _answered(left, past[0].columns, past[1])", "answered = torch.zeros_like(block)"),
    "strength ignored across blocks": ("strength * answered\n        if rows.tokens", "answered\n        if rows.tokens"),
    "strength ignored in the diagonal block": ("lower *= strength", "pass"),
    "columns not centred": ("centred -= reference", "pass"),
    "row's weight dropped": ("(centred * self.scale, weight, one)", "(centred * self.scale, 0 * weight, one)"),
    "upper triangle kept": ("coupled = index[None, :] < index[:, None]", "coupled = index[None, :] != index[:, None]"),
    "padding not cleared": ("block.masked_fill_(~rows.tokens[:, start:stop], 0.0)\n        lower =", "pass\n        lower ="),
    "gradient at padding not cleared": ("block.masked_fill_(~rows.tokens[:, start:stop], 0.0)\n\n        lower *=", "pass\n\n        lower *="),
    "padding coupled in the diagonal block": ("coupled = coupled & rows.tokens[:, start:stop]", "pass"),
    "rows of a new sequence not cut off": ("return block.masked_fill((rows.starts", "return block.clone().masked_fill(False & (rows.starts"),
    "sequences coupled in the diagonal block": ("coupled = coupled & (index[None, :] + start >= rows.starts[start:stop, None])", "pass"),
    "adjoint reaches other sequences": ("adjoint.masked_fill_(strangers[low:high], 0.0)", "pass"),
    "solution of other sequences read": ("return known if strangers is None else known.masked_fill(strangers, 0.0)", "return known"),
    "adjoint solved with L instead of its transpose": ("torch.linalg.solve_triangular(system.mT, block, upper=True", "torch.linalg.solve_triangular(system, block, upper=False"),
    "adjoint update dropped": ("grad_columns[:, low:high] -= adjoint if strength is None else strength * adjoint", "pass"),
    "key gradient: rows' side dropped": ("toward_block += from_columns", "pass"),
    "key gradient: columns' side dropped": ("toward_columns[:, low:high] += torch.bmm(kernel.mT, right)", "pass"),
    "key gradient: diagonal block dropped": ("toward_block += torch.bmm(lower.mT, right)", "pass"),
    "key gradient: centring not undone": ("grad = toward[..., :width] + toward[..., width : width + 1] * keys.reference", "grad = toward[..., :width].clone()"),
    "key gradient: radial part kept": ("(grad - normalized * radial)", "grad"),
    "key gradient: kernel scale forgotten": ("grad *= -keys.scale if strength is None else -keys.scale * strength", "grad *= -1.0 if strength is None else -strength"),
    "key gradient: strength forgotten": ("-keys.scale * strength", "-keys.scale"),
    "strength gradient of the wrong sign": ("grad_strength -= from_columns", "grad_strength += from_columns"),
}  # fmt: skip


def mutant(old: str, new: str) -> types.ModuleType:
    assert SOURCE.count(old) == 1, f"the source has changed, update the mutation: {old!r}"
    module = types.ModuleType("lucid_attention.precondition.blocked_mutant")
    module.__package__ = "lucid_attention.precondition"
    sys.modules[module.__name__] = module  # dataclasses and NamedTuple look themselves up
    exec(compile(SOURCE.replace(old, new), "mutant", "exec"), module.__dict__)
    return module


def results(impl: str) -> list[Tensor]:
    """Everything at once: padding, past, strength; then packed sequences."""
    torch.manual_seed(0)
    mask = torch.rand(2, 300) > 0.2
    leaves = [
        make_keys("cos0.8", 2, 2, 300, 6),
        torch.randn(2, 2, 300, 5, dtype=torch.float64),
        torch.tensor([0.4, 0.9], dtype=torch.float64),
        make_keys("cos0.8", 2, 2, 40, 6),
        torch.randn(2, 2, 40, 5, dtype=torch.float64),
    ]
    for leaf in leaves:
        leaf.requires_grad_()
    key, value, strength, *past = leaves
    found = []
    for options in (
        {"key_mask": mask, "past": tuple(past), "strength": strength},
        {"strength": strength},
        {},
    ):
        y = precondition(key, value, impl=impl, **options)
        grads = torch.autograd.grad(y, leaves, torch.cos(y.detach()), allow_unused=True)
        found += [y, *(g for g in grads if g is not None)]
    packed = [x.detach()[0].transpose(0, 1).requires_grad_() for x in (key, value)]
    offsets = pack((5, 160, 130, 5))
    y = precondition_varlen(*packed, offsets, max_seqlen=160, strength=strength, impl=impl)
    found += [y, *torch.autograd.grad(y, [*packed, strength], torch.cos(y.detach()))]
    return found


def agree(impl: str = "blocked") -> bool:
    pairs = zip(results(impl), results("reference"), strict=True)
    return all(relative_error(got, expected) < 1e-10 for got, expected in pairs)


@pytest.fixture(autouse=True)
def _inexact_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where tiles hold columns of other sequences."""
    monkeypatch.setattr(layout.Packed, "reads_offsets", lambda *_: False)


def test_unchanged_it_agrees() -> None:
    assert agree()


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_dropped_term_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutant(*MUTATIONS[name])
    monkeypatch.setattr(blocked_calls, "blocked", changed)
    monkeypatch.setattr(layout, "blocked", changed)
    assert not agree()
