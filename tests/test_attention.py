"""LUCID attention as a whole, and its softmax half in every form that callers need."""

from __future__ import annotations

import ctypes
import gc
import math
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lucid_attention import lucid_attention, lucid_attention_varlen
from lucid_attention.attention import softmax_attention, softmax_attention_varlen
from lucid_attention.blocked_softmax import _Problem
from tests.conftest import Asked, make_keys, relative_error
from tests.precondition.test_definition import LENGTHS, pack

EXACT = 1e-10


def operands(
    batch: int, heads: int, kv_heads: int, seq: int, width: int, value_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, heads, seq, width, dtype=torch.float64, requires_grad=True),
        make_keys("cos0.5", batch, kv_heads, seq, width).requires_grad_(),
        torch.randn(batch, kv_heads, seq, value_width, dtype=torch.float64, requires_grad=True),
    )


def gradients(output: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weight = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).view(output.shape)
    return torch.autograd.grad(output, leaves, weight, retain_graph=True)


def compare(got: Tensor, expected: Tensor, leaves: tuple[Tensor, ...]) -> None:
    assert got.shape == expected.shape
    assert relative_error(got, expected) < EXACT
    for g, e in zip(gradients(got, leaves), gradients(expected, leaves), strict=True):
        assert relative_error(g, e) < EXACT


@pytest.mark.parametrize("seq", [0, 1, 15, 64, 130, 300])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize(("width", "value_width"), [(16, 16), (68, 68), (16, 9), (5, 24)])
def test_equals_reference(
    seq: int, heads: int, kv_heads: int, width: int, value_width: int
) -> None:
    leaves = operands(2, heads, kv_heads, seq, width, value_width)
    scale, strength = 0.3, torch.linspace(0, 1, kv_heads, dtype=torch.float64)
    options = {"scale": scale, "kernel_scale": 0.2, "strength": strength}
    got = lucid_attention(*leaves, **options)
    expected = lucid_attention(*leaves, **options, impl="reference")
    compare(got, expected, leaves)


def test_reference_is_softmax_of_the_definition() -> None:
    """The oracle's softmax half against PyTorch's own attention."""
    query, key, value = operands(1, 4, 2, 50, 8, 8)
    got = lucid_attention(query, key, value, strength=0.0, impl="reference")
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert relative_error(got, expected) < 1e-12


@pytest.mark.parametrize("where", ["left", "right", "anywhere", "all"])
def test_padding(where: str) -> None:
    seq = 150
    mask = torch.ones(2, seq, dtype=torch.bool)
    if where == "left":
        mask[0, :70] = False
    elif where == "right":
        mask[0, 90:] = False
    elif where == "anywhere":
        mask = torch.rand(2, seq) > 0.4
    else:
        mask[0] = False
    leaves = operands(2, 4, 2, seq, 12, 7)
    got = lucid_attention(*leaves, key_mask=mask)
    compare(got, lucid_attention(*leaves, key_mask=mask, impl="reference"), leaves)
    assert (got.transpose(1, 2)[~mask] == 0).all()
    spoiled = tuple(x.detach().clone() for x in leaves)
    for x in spoiled:
        x.transpose(1, 2)[~mask] = math.nan
        x.requires_grad_()
    again = lucid_attention(*spoiled, key_mask=mask)
    assert torch.equal(again, got)
    for g, e in zip(gradients(again, spoiled), gradients(got, leaves), strict=True):
        assert torch.equal(g, e)
        assert (g.transpose(1, 2)[~mask] == 0).all()
    for row in range(2):
        keep = mask[row]
        if keep.any():
            alone = lucid_attention(*(x[row : row + 1, :, keep] for x in leaves))
            assert relative_error(got[row : row + 1, :, keep], alone) < EXACT


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_equals_separate(lengths: tuple[int, ...]) -> None:
    leaves = tuple(
        x.detach()[0].transpose(0, 1).requires_grad_()
        for x in operands(1, 4, 2, sum(lengths), 12, 7)
    )
    got = lucid_attention_varlen(*leaves, pack(lengths), max_seqlen=max(lengths), scale=0.2)
    expected = lucid_attention_varlen(*leaves, pack(lengths), scale=0.2, impl="reference")
    compare(got, expected, leaves)


def test_packed_nan_stays_in_its_sequence_and_head() -> None:
    lengths = (5, 130, 200, 40)
    query, key, value = (
        x.detach()[0].transpose(0, 1).contiguous() for x in operands(1, 4, 2, 375, 12, 7)
    )
    weight = torch.randn(375, 4, 7, dtype=torch.float64)

    def run() -> tuple[Tensor, ...]:
        leaves = tuple(x.clone().requires_grad_() for x in (query, key, value))
        output = lucid_attention_varlen(*leaves, pack(lengths))
        return output.detach(), *torch.autograd.grad(output, leaves, weight)

    clean = run()
    key[140, 1] = math.nan  # third sequence (135:335), second KV head: query heads 2 and 3
    got = run()
    assert got[0][141:335, 2:].isnan().all()
    for g, e in zip(got, clean, strict=True):
        hit = torch.zeros(g.shape[:2], dtype=torch.bool)
        hit[135:335, g.shape[1] // 2 :] = True
        assert relative_error(g[~hit], e[~hit]) < EXACT
        assert g[hit].isnan().any()


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    start: int | None = None,
) -> Tensor:
    """Attention as a textbook writes it, with every extra."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    queries, keys = query.shape[2], key.shape[2]
    scores = scale * query @ key.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    start = keys - queries if start is None else start
    columns, rows = (torch.arange(n, device=query.device) for n in (keys, queries))
    visible = columns[None, :] <= start + rows[:, None]
    visible = visible.expand(query.shape[0], 1, queries, keys)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    weights = torch.where(visible, scores.exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[None, :, None, None]
    weights = torch.where(total > 0, weights / total, 0.0)
    return weights @ value


@pytest.mark.parametrize("queries", [1, 3, 70, 300, 600])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks", "both"])
@pytest.mark.parametrize("start", ["aligned", "tensor"])
def test_softmax_half(queries: int, padded: bool, extra: str, start: str) -> None:
    keys = 600
    query = torch.randn(2, 4, queries, 12, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 2, keys, 12, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 2, keys, 7, dtype=torch.float64, requires_grad=True)
    leaves = [query, key, value]
    mask = None
    if padded:
        mask = torch.rand(2, keys) > 0.3
        mask[0, :400] = False
    options: dict[str, Tensor | float | None] = {"softcap": None, "sinks": None}
    if extra in ("softcap", "both"):
        options["softcap"] = 2.0
    if extra in ("sinks", "both"):
        options["sinks"] = torch.randn(4, dtype=torch.float64, requires_grad=True)
        leaves.append(options["sinks"])
    first = 5 if start == "tensor" else None  # as a pre-allocated cache that is still filling
    position = torch.tensor(5) if start == "tensor" else None
    got = softmax_attention(
        query, key, value, scale=0.4, key_mask=mask, query_start=position, **options
    )
    expected = naive(query, key, value, 0.4, key_mask=mask, start=first, **options)
    assert relative_error(got, expected) < EXACT
    for g, e in zip(gradients(got, leaves), gradients(expected, leaves), strict=True):
        assert relative_error(g, e) < EXACT


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-6, 1e-3, 40.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_any_scale_with_a_mask(scale: float, dtype: torch.dtype) -> None:
    query, key, value = (x.detach().to(dtype) for x in operands(2, 4, 2, 50, 8, 8))
    mask = torch.rand(2, 50) > 0.4
    got = lucid_attention(query, key, value, scale=scale, key_mask=mask)
    wide = (x.double() for x in (query, key, value))
    exact = lucid_attention(*wide, scale=scale, key_mask=mask, impl="reference")
    assert relative_error(got, exact) < (EXACT if dtype == torch.float64 else 2e-3)


def test_softmax_half_hidden_keys_may_hold_anything() -> None:
    query, key, value = (torch.randn(2, 2, n, 8) for n in (3, 20, 20))
    mask = torch.rand(2, 20) > 0.4
    clean = softmax_attention(query, key, value, key_mask=mask)
    for tensor in (key, value):
        tensor.transpose(1, 2)[~mask] = math.nan
    assert torch.equal(softmax_attention(query, key, value, key_mask=mask), clean)
    one = softmax_attention(query[:, :, :1], key, value, key_mask=mask)
    assert one.isfinite().all()


@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks"])
def test_softmax_half_packed(extra: str) -> None:
    lengths = (5, 0, 130, 33)
    query, key, value = (
        x.detach()[0].transpose(0, 1) for x in operands(1, 4, 2, sum(lengths), 12, 7)
    )
    options: dict[str, Tensor | float] = {}
    if extra == "softcap":
        options["softcap"] = 2.0
    elif extra == "sinks":
        options["sinks"] = torch.randn(4, dtype=torch.float64)
    got = softmax_attention_varlen(query, key, value, pack(lengths), scale=0.4, **options)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        q, k, v = (x[part].transpose(0, 1)[None] for x in (query, key, value))
        alone = naive(q, k, v, 0.4, **options)[0].transpose(0, 1)
        assert relative_error(got[part], alone) < 1e-6
        start += length


def test_softmax_half_packed_without_reading_the_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator the tiles to visit follow from the longest sequence alone."""
    lengths = (5, 130, 260, 3)
    leaves = tuple(
        x.detach()[0].transpose(0, 1).requires_grad_()
        for x in operands(1, 4, 2, sum(lengths), 12, 7)
    )
    expected = softmax_attention_varlen(*leaves, pack(lengths))
    grads = gradients(expected, leaves)
    blocks = _Problem.blocks

    def unread(self: _Problem) -> Iterator[tuple[int, int, int, int]]:
        self.reads_bounds = False
        return blocks(self)

    monkeypatch.setattr(_Problem, "blocks", unread)
    got = softmax_attention_varlen(*leaves, pack(lengths), max_seqlen=260)
    assert relative_error(got, expected) < EXACT
    for g, e in zip(gradients(got, leaves), grads, strict=True):
        assert relative_error(g, e) < EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_half_precision(dtype: torch.dtype, padded: bool) -> None:
    """Within twice the error of the dense definition that rounds its Y and its output alike."""
    query, key, value = (x.detach().to(dtype) for x in operands(2, 4, 2, 500, 64, 64))
    mask = torch.rand(2, 500) > 0.3 if padded else None
    exact = lucid_attention(
        query.double(), key.double(), value.double(), key_mask=mask, impl="reference"
    )
    dense = lucid_attention(query, key, value, key_mask=mask, impl="reference")
    got = lucid_attention(query, key, value, key_mask=mask)
    assert got.dtype == dtype
    rounding = torch.finfo(dtype).eps
    assert relative_error(got, exact) < 2 * relative_error(dense, exact) + rounding


def test_dropout_is_honoured_or_refused() -> None:
    query, key, value = (torch.ones(1, 2, 400, 8) for _ in range(3))
    kept = softmax_attention(query, key, value, dropout=0.5)
    assert kept.std() > 0.01  # without dropout every entry is 1
    assert kept.mean() == pytest.approx(1.0, abs=0.1)
    with pytest.raises(ValueError, match=r"dropout must be 0 with softcap, .*got 0.5"):
        softmax_attention(query, key, value, dropout=0.5, softcap=2.0)


def test_autocast() -> None:
    query, key, value = (x.detach().float() for x in operands(1, 4, 2, 60, 8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = lucid_attention(query, key, value)
        packed = lucid_attention_varlen(
            *(x[0].transpose(0, 1) for x in (query, key, value)), pack((60,))
        )
        dense = lucid_attention(query, key, value, impl="reference")
    assert got.dtype == packed.dtype == dense.dtype == torch.bfloat16
    halves = (x.bfloat16() for x in (query, key, value))
    assert torch.equal(got, lucid_attention(*halves))
    assert relative_error(packed.transpose(0, 1)[None], got) < 0.02
    assert relative_error(dense, got) < 0.02


def test_autocast_takes_mixed_dtypes() -> None:
    query, key, value = (x.detach().float() for x in operands(1, 4, 2, 60, 8, 8))
    halves = [x.bfloat16() for x in (query, key, value)]
    packed = [x[0].transpose(0, 1) for x in (query, key, halves[2])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = lucid_attention(query, key, halves[2])
        softmax = softmax_attention(query, key, halves[2], softcap=2.0)
        flat = lucid_attention_varlen(*packed, pack((60,)))
    assert torch.equal(got, lucid_attention(*halves))
    assert softmax.dtype == flat.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_padding_does_not_win_however_low_the_scores(dtype: torch.dtype) -> None:
    size = 200.0 if dtype == torch.float16 else 1e4
    direction = torch.nn.functional.normalize(torch.randn(64), dim=0) * size
    key = direction.expand(1, 1, 3, 64).to(dtype)
    value = torch.ones(1, 1, 3, 64, dtype=dtype)
    mask = torch.tensor([[False, True, True]])
    got = softmax_attention(-key, key, value, key_mask=mask)
    assert torch.equal(got[0, 0, :, 0], torch.tensor([0.0, 1.0, 1.0], dtype=dtype))


def test_queries_before_the_first_key_see_nothing() -> None:
    query, key, value = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 8)
    assert (softmax_attention(query, key, value)[0, 0, :2] == 0).all()
    key[0, 0, 2] = math.nan
    output = softmax_attention(query, key, value, softcap=3.0)
    assert (output[0, 0, :2] == 0).all()
    assert output[0, 0, 4].isnan().all()


def test_sinks_keep_their_digits_in_half_precision() -> None:
    query, key, value = (x.detach() for x in operands(1, 4, 2, 60, 16, 16))
    sinks = torch.tensor([1.3, 3.1, 5.7, 6.9], dtype=torch.float64)
    for dtype, bound in ((torch.float64, 1e-12), (torch.bfloat16, 8e-3), (torch.float16, 2e-3)):
        operand = [x.to(dtype) for x in (query, key, value)]
        exact = naive(*(x.double() for x in operand), 0.25, sinks=sinks)
        got = softmax_attention(*operand, scale=0.25, sinks=sinks)
        for head in range(4):  # a large sink leaves little output: each head by itself
            assert relative_error(got[:, head], exact[:, head]) < bound


def test_bad_sinks_and_offsets() -> None:
    query, key, value = (x.detach() for x in operands(1, 4, 2, 10, 8, 8))
    with pytest.raises(
        ValueError, match=r"sinks must hold one score .*expected shape \(4,\), got \(1,"
    ):
        softmax_attention(query, key, value, sinks=torch.zeros(1))
    packed = [x[0].transpose(0, 1) for x in (query, key, value)]
    with pytest.raises(ValueError, match="cu_seqlens must end at"):
        softmax_attention_varlen(*packed, pack((4, 5)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale: float, dtype: torch.dtype) -> None:
    """Fused kernels multiply -inf by them."""
    query, key, value = (x.detach().to(dtype) for x in operands(2, 4, 2, 130, 16, 8))
    found = lucid_attention(query, key, value, scale=scale)
    wide = [x.double() for x in (query, key, value)]
    expected = lucid_attention(*wide, scale=scale, impl="reference")
    error = (found.double() - expected).norm() / expected.norm()
    assert error < {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    offsets = torch.tensor([0, 130], dtype=torch.int32)
    packed = [x[:1, :, :130].squeeze(0).transpose(0, 1) for x in (query, key, value)]
    again = lucid_attention_varlen(*packed, offsets, max_seqlen=130, scale=scale).transpose(0, 1)
    assert (again.double() - expected[0]).norm() / expected[0].norm() < 2e-2


def test_forward_mode_is_refused_where_it_would_be_zero() -> None:
    query, key, value = (x.detach() for x in operands(1, 4, 2, 10, 8, 8))

    def softcapped(value: Tensor) -> Tensor:
        return softmax_attention(query, key, value, softcap=3.0)

    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(softcapped, (value,), (value,))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_activation_checkpointing(packed: bool, reentrant: bool) -> None:
    """The softmax half by tiles, as softcaps and packed batches on a CPU take it."""
    leaves = [torch.randn(1, 2, 40, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if packed:
            parts = (x[0].transpose(0, 1) for x in (query, key, value))
            return lucid_attention_varlen(*parts, pack((30, 10)))
        return softmax_attention(query, key, value, softcap=3.0)

    expected = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    output = checkpoint(run, *leaves, use_reentrant=reentrant)
    output.square().sum().backward()
    for leaf, e in zip(leaves, expected, strict=True):
        assert leaf.grad is not None and relative_error(leaf.grad, e) < EXACT


@pytest.mark.parametrize("value_width", [16, 8])
@pytest.mark.parametrize(
    ("device", "packed"), [("cpu", False), *(pytest.param("cuda", x, marks=pytest.mark.gpu) for x in (False, True))]
)  # fmt: skip
def test_operands_of_one_width_are_not_copied(device: str, packed: bool, value_width: int) -> None:
    """Padding by nothing is a copy each of query, key and value, and another of each gradient."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    leaves = [
        torch.randn(1, 2, 40, width, device=device, dtype=dtype, requires_grad=True)
        for width in (16, 16, value_width)
    ]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        if packed:
            offsets = pack((30, 10)).to(device)
            output = softmax_attention_varlen(*(x[0].transpose(0, 1) for x in leaves), offsets)
        else:
            output = softmax_attention(*leaves)
        output.sum().backward()
    pads = sum(event.name == "aten::constant_pad_nd" for event in profile.events())
    assert (pads == 0) == (value_width == 16)


def peak_mib(function, *args, **kwargs) -> float:  # type: ignore[no-untyped-def]
    """Peak resident memory above the start while ``function`` runs, in MiB."""
    gc.collect()
    # Hand freed memory back first, or a call that reuses it would seem to cost nothing.
    ctypes.CDLL(None).malloc_trim(0)
    process, running = psutil.Process(), True
    start = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        function(*args, **kwargs)
    finally:
        running = False
        thread.join()
    return (peak - start) / 2**20


@pytest.mark.parametrize("case", ["plain", "padded", "value_width", "width68", "softcap", "packed", "chunk"])  # fmt: skip
def test_memory_is_linear(case: str) -> None:
    """One N x N matrix of these shapes would be 2 heads * 4096^2 * 4 bytes = 128 MiB.

    Measured: 15 to 25 MiB, and 51 to 66 at width 68, whose operands are four times as large.
    """
    seq = 4096
    width, limit = (68, 100) if case == "width68" else (16, 50)
    query, key = torch.randn(2, 1, 2, seq, width).requires_grad_().unbind(0)
    value = torch.randn(1, 2, seq, 8 if case == "value_width" else width, requires_grad=True)

    def run() -> None:
        if case == "packed":
            q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
            output = lucid_attention_varlen(q, k, v, pack((seq - 100, 100)))
        elif case == "softcap":
            output = softmax_attention(query, key, value, softcap=3.0)
        elif case == "chunk":
            output = softmax_attention(query[:, :, 1:], key, value)
        else:
            mask = torch.rand(1, seq) > 0.3 if case == "padded" else None
            output = lucid_attention(query, key, value, key_mask=mask)
        output.sum().backward()

    run()  # let the libraries settle
    assert peak_mib(run) < limit


def test_precision_is_handed_down() -> None:
    leaves = operands(1, 2, 2, 20, 6, 4)
    with Asked() as asked:
        gradients(lucid_attention(*leaves, precision="high"), leaves)
        packed = tuple(x.detach()[0].transpose(0, 1).requires_grad_() for x in leaves)
        gradients(lucid_attention_varlen(*packed, pack((8, 12)), precision="high"), packed)
        assert set().union(*asked.precisions.values()) == {"high"}
        assert len(asked.precisions) == 4
    with pytest.raises(ValueError, match="precision must be one of"):
        lucid_attention(*leaves, precision="low")
