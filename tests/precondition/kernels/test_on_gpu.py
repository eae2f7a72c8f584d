"""Values and gradients on a GPU: real sizes, both kernel families, training. Races and precision="high" have files of their own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lucid_attention import lucid_attention, precondition, precondition_varlen
from lucid_attention.precondition import implementation
from tests.conftest import HARD_KEYS, make_keys, relative_error
from tests.precondition.kernels.conftest import of, of_all
from tests.precondition.kernels.test_kernels import (
    close,
    half_inside,
    operands,
    run,
    vanishing,
    widened,
)
from tests.precondition.test_definition import pack

pytestmark = pytest.mark.gpu
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
# All but the last two take Hopper's own kernels on such a card, these the portable ones.
WIDTHS = [
    (64, 64), (128, 128), (64, 128), (128, 64), (100, 56), (68, 68), (80, 80), (67, 67), (72, 66),
    (84, 90), (96, 96), (136, 140), (160, 150), (192, 192), (192, 128), (180, 100), (201, 256), (256, 256),
    (68, 64), (256, 192),
]  # fmt: skip
SMALL_WIDTHS = [(16, 16), (17, 40), (40, 17), (24, 64), (33, 20), (48, 48), (64, 16)]


@of_all("width", [64, 68, 96, 128, 256], lambda width: width <= 128)
@pytest.mark.parametrize("kind", HARD_KEYS)
@pytest.mark.usefixtures("_blocks")
def test_hard_keys(kind: str, width: int) -> None:
    leaves = operands(kind, 1, 2, 1000, width, value_width=width, dtype=HALF, device="cuda")
    if kind == "huge":  # 1e4 times a normal number is at float16's end
        leaves[0] = (leaves[0].detach() / 16).requires_grad_()
    exact = run(widened(leaves), "reference")
    yardstick = half_inside(leaves)
    got = run(leaves, "triton")
    for index, (g, e, y) in enumerate(zip(got, exact, yardstick, strict=True)):
        close(g, e, y, vanishing(leaves, exact) if index == 1 else None)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL], ids=str)
@pytest.mark.parametrize(("width", "value_width"), WIDTHS + SMALL_WIDTHS)
@of("many")
@pytest.mark.usefixtures("_blocks")
def test_head_sizes(dtype: torch.dtype, width: int, value_width: int) -> None:
    leaves = operands(
        "cos0.8", 1, 2, 1000, width, value_width=value_width, dtype=dtype, device="cuda"
    )
    exact = run(widened(leaves), "reference")
    yardstick = run(leaves, "blocked") if dtype == FULL else half_inside(leaves)
    for g, e, y in zip(run(leaves, "triton"), exact, yardstick, strict=True):
        close(g, e, y)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize(
    ("width", "value_width"), [sizes for sizes in WIDTHS if max(sizes) <= 128 and sizes != (68, 64)]
)
@of("few", "some")
@pytest.mark.usefixtures("_blocks")
def test_head_sizes_of_few_blocks(dtype: torch.dtype, width: int, value_width: int) -> None:
    """Values at every multiple of their 64 columns that a part may begin with; strided, which come in words or do not."""
    leaves = operands("cos0.8", 1, 2, 1000, width, value_width=value_width, dtype=dtype, device="cuda")  # fmt: skip
    exact = run(widened(leaves), "reference")
    yardstick = half_inside(leaves)
    expected = run(leaves, "triton")
    for g, e, y in zip(expected, exact, yardstick, strict=True):
        close(g, e, y)
    for more in (3, 8):
        wide = leaves[1].new_zeros(1, 2, 1000, value_width + more)
        wide[..., :value_width] = leaves[1].detach()
        sliced = [leaves[0], wide[..., :value_width].requires_grad_()]
        for g, e in zip(run(sliced, "triton"), expected, strict=True):
            assert torch.equal(g, e)


@of_all(
    "kind",
    [(dtype, width) for dtype in (HALF, FULL) for width in (64, 128, 68, 96, 256)],
    lambda kind: kind[0] == HALF and kind[1] <= 128,
)
@pytest.mark.parametrize("seq", [1, 15, 63, 64, 65, 127, 128, 129, 255, 257, 2048, 8192])
@pytest.mark.usefixtures("_blocks")
def test_lengths(kind: tuple[torch.dtype, int], seq: int) -> None:
    dtype, width = kind
    heads = 2 if seq > 4000 else 5
    value_width = width if width in (68, 96, 256) else 64
    leaves = operands("cos0.8", 1, heads, seq, width, value_width=value_width, dtype=dtype, device="cuda")  # fmt: skip
    exact = run(widened(leaves), "blocked")  # float64; against the reference elsewhere
    got = run(leaves, "triton")
    if dtype == HALF:
        for index, (g, e, y) in enumerate(zip(got, exact, half_inside(leaves), strict=True)):
            close(g, e, y, vanishing(leaves, exact) if seq == 1 and index == 1 else None)
        return
    for index, (g, e) in enumerate(zip(got, exact, strict=True)):
        if seq == 1 and index == 1:
            assert not g.any()
        else:
            assert relative_error(g, e) < 1e-5


@of_all(
    "sizes",
    [
        (64, 64), (128, 128), (68, 68), (84, 84), (40, 40), (20, 20), (256, 256), (136, 136),
        (64, 128), (180, 100),
    ],
    lambda sizes: 32 < max(sizes) <= 128,
)  # fmt: skip
@pytest.mark.parametrize("case", ["left", "right", "anywhere", "packed", "strength", "past"])
@pytest.mark.usefixtures("_blocks")
def test_layouts(case: str, sizes: tuple[int, int]) -> None:
    """Against float64, in bfloat16, with NaN wherever nothing should be read."""
    width, value_width = sizes
    leaves = operands(
        "cos0.5", 2, 2, 700, width, value_width=value_width, dtype=BRAIN, device="cuda"
    )
    options: dict[str, Any] = {}
    index = torch.arange(700, device="cuda")
    dead: Tensor | None = None
    if case in ("left", "right", "anywhere"):
        mask = {
            "left": torch.stack((index >= 600, index >= 3)),
            "right": torch.stack((index < 1, index < 640)),
            "anywhere": torch.rand(2, 700, device="cuda") > 0.4,
        }[case]
        options["key_mask"] = mask
        dead = ~mask[:, None, :, None]
    if case == "packed":
        leaves = [x.detach()[0].transpose(0, 1).requires_grad_() for x in leaves]
        options["offsets"] = pack((5, 0, 129, 1, 300, 0, 265)).cuda()
        options["max_seqlen"] = 300
    if case in ("strength", "packed"):
        options["learned"] = True
        leaves.append(torch.tensor([0.3, 1.0], device="cuda", requires_grad=True))
    if case == "past":
        past_key = make_keys("cos0.5", 2, 2, 333, width, dtype=BRAIN, device="cuda")
        if width > 128:
            # Not of unrelated keys: their P is 1e-7 there, and T no normal float16 number (docs/numerics.md).
            both = make_keys("cos0.5", 2, 2, 1033, width, dtype=BRAIN, device="cuda")
            past_key, leaves[0] = (
                both[:, :, :333].clone(),
                both[:, :, 333:].clone().requires_grad_(),
            )
        leaves += [
            past_key.requires_grad_(),
            torch.randn(2, 2, 333, value_width, device="cuda", requires_grad=True),
        ]
    exact = run(widened(leaves), "reference", **options)
    if dead is not None:
        with torch.no_grad():
            for leaf in leaves[:2]:
                leaf.masked_fill_(dead, float("nan"))
    got = run(leaves, "triton", **options)
    torch_does = run(leaves, "blocked", **options)  # float32 inside, from the rounded Y as well
    for g, e, b in zip(got, exact, torch_does, strict=True):
        assert relative_error(g, e) < 2 * relative_error(b, e) + 4e-3
        if dead is not None:
            assert not g.masked_select(dead.expand_as(g)).any()
    for g, e in zip(run(leaves, "triton", **options), got, strict=True):
        assert torch.equal(g, e)


@pytest.mark.parametrize("width", [64, 128, 68, 256])
@pytest.mark.parametrize("place", ["key", "value"])
@of("few", "many")
@pytest.mark.usefixtures("_blocks")
def test_nan_stays_where_it_is(place: str, width: int) -> None:
    leaves = operands("cos0.5", 2, 2, 700, width, value_width=width, dtype=BRAIN, device="cuda")
    clean = run(leaves, "triton")
    with torch.no_grad():
        leaves[0 if place == "key" else 1][0, 1, 300, 3] = float("nan")
    got = run(leaves, "triton")
    hit = torch.zeros(2, 2, 700, dtype=torch.bool, device="cuda")
    hit[0, 1, 300:] = True
    assert got[0][hit].isnan().all() and torch.equal(got[0][~hit], clean[0][~hit])
    hit[0, 1] = True
    for g, c in zip(got[1:], clean[1:], strict=True):
        assert g[hit].isnan().all() and torch.equal(g[~hit], c[~hit])


@pytest.mark.parametrize("width", [64, 128, 68, 256])
@of("few", "many")
@pytest.mark.usefixtures("_blocks")
def test_gradients_far_below_float16(width: int) -> None:
    leaves = operands("cos0.5", 1, 2, 700, width, value_width=width, dtype=BRAIN, device="cuda")
    grad = torch.randn(1, 2, 700, width, device="cuda", dtype=BRAIN)
    exact = run(widened(leaves), "reference", grad.double())
    for size in (1e-8, 1e-20, 1e20):
        got = run(leaves, "triton", grad * size)
        for g, e in zip(got[1:], exact[1:], strict=True):
            assert relative_error(g.double() / (grad * size / grad).double().mean(), e) < 2e-2


@pytest.mark.parametrize("width", [64, 128])
def test_float32_at_length(width: int) -> None:
    """Plain float32 products stop at 2.5e-5 here."""
    leaves = operands("cos0.8", 1, 1, 32768, width, value_width=64, dtype=FULL, device="cuda")
    key, value = (x.detach() for x in leaves)
    exact = precondition(key.double(), value.double(), impl="blocked")
    assert relative_error(precondition(key, value, impl="triton"), exact) < 1e-5


@pytest.mark.parametrize("width", [64, 128, 68, 256])
@of("few", "many")
@pytest.mark.usefixtures("_blocks")
def test_triangular_gradients_on_this_card(width: int) -> None:
    """Triton 3.4 to 3.7.0 miscompile some transposed products on Hopper: every block, by itself."""
    leaves = operands("cos0.8", 1, 4, 512, width, value_width=width, dtype=HALF, device="cuda")
    packed = [x.detach()[0].transpose(0, 1).requires_grad_() for x in leaves]
    offsets = pack((128, 64, 64, 127, 129)).cuda()
    exact = run(widened(packed), "reference", offsets=offsets)
    for g, e in zip(run(packed, "triton", offsets=offsets), exact, strict=True):
        assert relative_error(g, e) < 3e-3


def test_a_model_learns_the_same() -> None:
    """Losses of a small model with the kernels follow those with the dense definition."""

    def losses(impl: str) -> list[float]:
        torch.manual_seed(0)
        width, heads, vocabulary = 128, 2, 32
        embed = torch.nn.Embedding(vocabulary, width, device="cuda")
        project = torch.nn.Linear(width, 3 * width, device="cuda")
        read = torch.nn.Linear(width, vocabulary, device="cuda")
        modules = torch.nn.ModuleList((embed, project, read))
        optimizer = torch.optim.AdamW(modules.parameters(), lr=3e-3)
        history = []
        for _ in range(60):
            tokens = torch.randint(0, vocabulary, (4, 200), device="cuda")
            target = tokens.roll(2, 1)
            with torch.autocast("cuda", torch.bfloat16):
                hidden = embed(tokens)
                parts = (
                    project(hidden).unflatten(-1, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
                )
                attended = lucid_attention(*parts.unbind(0), impl=impl).transpose(1, 2).flatten(2)
                logits = read(hidden + attended)
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), target.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        return history

    ours, dense = losses("triton"), losses("reference")
    assert dense[-1] < dense[0] - 0.05  # it does learn
    assert max(abs(a - b) for a, b in zip(ours, dense, strict=True)) < 0.02


def test_auto_takes_the_kernels_and_says_so_where_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    key = torch.randn(1, 2, 300, 64, device="cuda", dtype=HALF)
    assert torch.equal(precondition(key, key), precondition(key, key, impl="triton"))
    assert not torch.equal(precondition(key, key), precondition(key, key, impl="blocked"))
    offsets = pack((100, 200)).cuda()
    packed = key[0].transpose(0, 1)
    assert torch.equal(
        precondition_varlen(packed, packed, offsets),
        precondition_varlen(packed, packed, offsets, impl="triton"),
    )
    implementation._why_not_device.cache_clear()
    monkeypatch.setattr(implementation, "TESTED", (("another card", (1, 0), "3.6.0"),))
    with pytest.warns(UserWarning, match="were tested on another card with Triton 3.6.0; this is"):
        precondition(key, key)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precondition(key, key)  # once
    implementation._why_not_device.cache_clear()
    bad = ((torch.cuda.get_device_capability(), "3.0", "99.0", "wrong gradients"),)
    monkeypatch.setattr(implementation, "KNOWN_BAD", bad)
    with pytest.raises(
        ValueError, match=r"gives wrong results \(wrong gradients\); Triton 99.0 is good"
    ):
        precondition(key, key, impl="triton")
    assert precondition(key, key).shape == key.shape
    implementation._why_not_device.cache_clear()
