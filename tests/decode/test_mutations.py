"""The checks can fail: drop a term of a decode kernel, and the comparison with float64 breaks."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lucid_attention.decode
from lucid_attention.decode import launch
from tests.conftest import relative_error
from tests.decode.cases import Case, Step

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
FOLDER = Path(launch.__file__).parent

# name: (text, replacement); the first place is changed
MUTATIONS = {
    "sums do not fade": ("acc1 * fade[:, None], Y_PRECISION", "acc1, Y_PRECISION"),
    "weights do not fade": ("weight = weight * fade + tl.sum(p, axis=1)", "weight = weight + tl.sum(p, axis=1)"),
    "keys not normalised": ("s * factor[:, None] * inverse_rms[None, :] - shift", "s * factor[:, None] - shift"),
    "new key not normalised": ("kernel_scale * own_rms, scale", "kernel_scale, scale"),
    "padding seen": ("seen = seen & (tl.load(Mask + wide_b * mask_b + rows", "seen = seen | (tl.load(Mask + wide_b * mask_b + rows"),
    "beyond the length": ("live = rows < length", "live = rows < length + 1"),
    "softcap left out": ("capped = softcap * LOG2_E * (1.0 - 2.0 / (grown + 1.0))", "capped = s * scale * LOG2_E"),
    "parts of others left out": ("for part in tl.range(earliest, latest + 1,", "for part in tl.range(latest, latest + 1,"),
    "parts do not fade": ("acc1 += fade[:, None] * _piece(sums", "acc1 += _piece(sums"),
    "new tokens not solved": ("answered = -strength * UNSHIFT", "answered = 0.0 * UNSHIFT"),
    "strength left out": ("strength = tl.load(Strength + head).to(tl.float32)", "strength = 1.0"),
    "new tokens do not see each other": ("column * tl.sum(tl.where(y_row, acc1, 0.0), axis=0)[None, :]", "0.0 * column"),
    "a token sees the next": ("reach = tl.where(is_query, of_token", "reach = tl.where(is_query, of_token + 1"),
    "sinks left out": ("+ tl.math.exp2(sink - new_top + SHIFT)", "+ 0.0"),
    "Y's scale left out on the way in": ("fade = tl.where(is_key, answered, fade) * unit", "fade = tl.where(is_key, answered, fade)"),
    "Y's scale left out on the way out": ("acc1 / unit, 0, E1", "acc1, 0, E1"),
    "second piece of keys": ("s = _dot(x2, tl.trans(k2), s, PRECISION, INTERPRET)", "s = s"),
    "second piece of Y": ("acc2 = _dot(p, y2, acc2 * fade[:, None], Y_PRECISION, INTERPRET)", "acc2 = acc2"),
    "counters not returned": ('tl.atomic_xchg(counter, 0, sem="relaxed")', "tl.debug_barrier()"),
}  # fmt: skip
ON_HOPPER = {
    "sums do not fade": ("hopper", "            acc = acc * fade[None, :]\n", ""),
    "keys not normalised": ("hopper", "gl.where(is_key[None, :], inverse_rms[:, None], 1.0)", "1.0"),
    "group 1 left out": ("hopper", "acc * fade[None, :] + their_acc * their_fade[None, :]", "acc * fade[None, :]"),
    "padding seen": ("hopper", "seen = seen & (kept != 0)", "seen = seen | (kept != 0)"),
    "a mask of another turn": ("hopper", "_kept_rows(Mask + wide_b * mask_b, rows + 2 * TILE, length)", "_kept_rows(Mask + wide_b * mask_b, rows + TILE, length)"),
    "parts do not fade": ("hopper_finish", "sums * gl.expand_dims(fades, 2), axis=0", "sums, axis=0"),
    "new tokens do not see each other": ("hopper_finish", "acc = acc * fade[:, None] + w[:, None] * y[None, :]", "acc = acc * fade[:, None]"),
    "a half left out": ("hopper_finish", "first_column: gl.constexpr = GROUP * HALF", "first_column: gl.constexpr = 0 * HALF"),
    "counters not returned": ("hopper_finish", 'gl.atomic_xchg(counter, 0, sem="relaxed")', "gl.thread_barrier()"),
}  # fmt: skip


@pytest.fixture
def mutant(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """A kernel's module with one text replaced, and what imports it, in the place of the real ones."""
    module, old, new = request.param
    source = (FOLDER / f"{module}.py").read_text()
    assert old in source, "the kernel has changed: adapt the mutation"
    (tmp_path / f"{module}.py").write_text(source.replace(old, new, 1))
    kept = {}
    for name in dict.fromkeys((module, "hopper" if module.startswith("hopper") else module)):
        folder = tmp_path if name == module else FOLDER
        full = f"lucid_attention.decode.{name}"
        kept[name] = importlib.import_module(full)
        spec = importlib.util.spec_from_file_location(full, folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        changed = importlib.util.module_from_spec(spec)
        sys.modules[full] = changed
        spec.loader.exec_module(changed)
        setattr(lucid_attention.decode, name, changed)
    yield
    for name, real in kept.items():
        sys.modules[f"lucid_attention.decode.{name}"] = real
        setattr(lucid_attention.decode, name, real)


def agree(device: str, width: int) -> bool:
    """Padding, a split past, more tokens than one, strength, softcap, sinks; twice with one workspace."""
    case = Case(
        (300, 170), tokens=3, width=width, value_width=width, padding="anywhere", strength=True,
        softcap=4.0, sinks=True, capacity=320, keys="cos0.8",
    )  # fmt: skip
    plain = Case((300, 170), tokens=3, width=width, value_width=width, capacity=320)
    workspace = lucid_attention.decode.decode_workspace(2, 2, device)
    good = True
    for one in (case, plain):
        step = Step(one, device)
        if one is case:  # what hides behind the mask must not matter
            step.mask[:, :5] = False
        output, new = step.expected()
        got = step.run("triton", workspace=workspace)
        good &= relative_error(got.cpu(), output) < 1.5e-3
        good &= relative_error(step.added()[1].cpu(), new) < 1e-3
        good &= bool((workspace == 0).all())
    return good


def cases(unchanged: str, changes: dict[str, tuple[str, str, str]]) -> list[object]:
    found: list[object] = [pytest.param((unchanged, "", ""), id="unchanged")]
    return found + [pytest.param(change, id=name) for name, change in changes.items()]


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="compiling each takes long; the interpreter runs them"
)
@pytest.mark.parametrize("mutant", cases("kernel", {name: ("kernel", *change) for name, change in MUTATIONS.items()}), indirect=True)  # fmt: skip
def test_a_dropped_term_shows(
    mutant: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "slots", lambda device: 5)
    unchanged = "unchanged" in request.node.callspec.id
    assert agree("cpu", 68) == unchanged


@pytest.mark.gpu
@pytest.mark.parametrize("mutant", cases("hopper", ON_HOPPER), indirect=True)
def test_a_dropped_term_shows_on_hopper(
    mutant: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So few that each has several tiles, for both of its groups.
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 3)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("Hopper's kernel: it needs compute capability 9.0")
    assert agree("cuda", 128) == ("unchanged" in request.node.callspec.id)
