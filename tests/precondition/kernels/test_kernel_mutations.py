"""The checks can fail: drop a term of a kernel, and the comparison with the oracle breaks."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from lucid_attention import precondition
from lucid_attention.precondition.kernels import launch
from tests.conftest import make_keys, relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0"),
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="mutants are Python files that the interpreter runs; compiling each takes minutes",
    ),
]
SEQ, PAST, WIDTH, VALUE_WIDTH = 150, 70, 16, 16

# name: (file, text, replacement); every text occurs in its file, the first place is changed
MUTATIONS = {
    "no answer from announced blocks": ("solve.py", "acc1 = accumulate(acc1, p, y1, exact_one, PRECISION)", "acc1 = acc1"),
    "no answer from the last block": ("solve.py", "if block > first:", "if block > first + 99:"),
    "the block's own inverse left out": ("solve.py", "v1 = accumulate(v1, inverse, v1.to(inverse.dtype), exact_one, PRECISION)", "v1 = v1"),
    "strength ignored": ("solve.py", "factor = strength\n", "factor = 1.0\n"),
    "padding solved": ("solve.py", "v1 = tl.where(live[:, None], v1, 0.0)", "v1 = v1"),
    "inverse not merged": ("inverse.py", "below = _merged(P, first, second, exact_one, PRECISION)", "below = _merged(P, first, second, exact_one, PRECISION) * 0"),
    "tiles not merged": ("inverse.py", "tl.store(place, below)", "tl.store(place, below * 0)"),
    "inverse merged on one side": ("inverse.py", "below = accumulate(C.to(tl.float32), second, C, exact_one, PRECISION)", "below = C.to(tl.float32)"),
    "inverse not substituted": ("inverse.py", "x -= left[k] * column_rows[k]", "x -= 0.0"),
    "half a row not substituted": ("inverse.py", "x -= right[k - 8] * column_rows[k]", "x -= 0.0"),
    "padding in the inverse": ("inverse.py", "P = tl.where(live > 0, P, 0.0)", "P = P"),
    "uncentred weight": ("prepare.py", "c2 * (weight - width)", "c2 * (0 * weight)"),
    "adjoint without later blocks": ("adjoint.py", "acc1 = accumulate(acc1, p.to(DTYPE), g1, exact_one, PRECISION)", "acc1 = acc1"),
    "inverse not transposed": ("adjoint.py", "inverse_tile(T + (start // R) * (3 * H * H), R, True)", "inverse_tile(T + (start // R) * (3 * H * H), R, False)"),
    "key gradient without later blocks": ("adjoint.py", "toward1 = accumulate(toward1, t, c1, exact_one, PRECISION)", "toward1 = toward1"),
    "pairs of a block one way only": ("adjoint.py", "t = t + tl.trans(t)", "t = t"),
    "strength without a block's pairs": ("adjoint.py", "total += tl.sum(t, axis=1)\n    if Strength", "total += 0.0\n    if Strength"),
    "key gradient without earlier blocks": ("toward.py", "acc1 = accumulate(acc1, t, c1, exact_one, PRECISION)", "acc1 = acc1"),
    "radial part kept": ("toward.py", "acc1 - n1 * radial[:, None]", "acc1"),
    "reference not added back": ("toward.py", "acc1 += total[:, None] * r1[None, :]", "acc1 += 0.0"),
    "past unanswered": ("past.py", "acc1 = accumulate(acc1, p, x1, exact_one, PRECISION)", "acc1 = acc1"),
}  # fmt: skip


@pytest.fixture
def mutant(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ModuleType]:
    """A copy of the kernels with one text replaced, imported beside the real ones."""
    folder = tmp_path / "kernels"
    shutil.copytree(
        Path(launch.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__")
    )
    if request.param is not None:
        name, old, new = MUTATIONS[request.param]
        source = (folder / name).read_text()
        assert old in source, "the kernel has changed: adapt the mutation"
        (folder / name).write_text(source.replace(old, new, 1))
    package = "lucid_attention.precondition.mutant"
    spec = importlib.util.spec_from_file_location(
        package, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    sys.modules[package] = importlib.util.module_from_spec(spec)
    yield importlib.import_module(f"{package}.launch")
    for module in [m for m in sys.modules if m.startswith(package)]:
        del sys.modules[module]


def agree(module: ModuleType) -> bool:
    """``Y`` and all gradients of one call with padding, strength and a past, in float32."""
    leaves = [
        make_keys("cos0.5", 1, 1, SEQ, WIDTH, dtype=torch.float32),
        torch.randn(1, 1, SEQ, VALUE_WIDTH),
        torch.tensor([0.7]),
        make_keys("cos0.5", 1, 1, PAST, WIDTH, dtype=torch.float32),
        torch.randn(1, 1, PAST, VALUE_WIDTH),
    ]
    mask = torch.arange(SEQ)[None] != 100  # in a block that has blocks before and after it
    key, value, strength, *past = exact = [x.double().requires_grad_() for x in leaves]
    y = precondition(
        key, value, strength=strength, key_mask=mask, past=(past[0], past[1]), impl="reference"
    )
    grad = torch.randn(y.shape)
    expected = [y, *torch.autograd.grad(y, exact, grad.double())]
    key, value, strength, *past = leaves
    scale = WIDTH**-0.5
    got: list[Tensor] = [module.solve_dense(key, value, strength, mask, *past, scale)]
    got += module.adjoint_dense(grad, key, y.float(), strength, mask, *past, scale)
    return all(relative_error(g, e) < 1e-4 for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("mutant", [None], indirect=True, ids=["unchanged"])
def test_unchanged_it_agrees(mutant: ModuleType) -> None:
    assert agree(mutant)


@pytest.mark.parametrize("mutant", MUTATIONS, indirect=True)
def test_a_dropped_term_shows(mutant: ModuleType) -> None:
    assert not agree(mutant)
