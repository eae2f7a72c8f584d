"""The operator on a CUDA device: accuracy, no synchronisation, CUDA graphs, torch.compile, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lucid_attention import (
    lucid_attention,
    lucid_attention_varlen,
    precondition,
    precondition_varlen,
)
from lucid_attention.attention import softmax_attention
from tests.conftest import HARD_KEYS, make_keys, relative_error
from tests.precondition.test_definition import pack
from tests.test_attention import naive

pytestmark = pytest.mark.gpu
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def no_synchronisation() -> Iterator[Callable[[], None]]:
    """A switch: from its call to the end of the test a host synchronisation raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def operands(
    *, dtype: torch.dtype, seq: int = 700, width: int = 64, value_width: int = 64, kv_heads: int = 2
) -> list[Tensor]:
    """Query (four heads), key, value on the GPU, needing gradients."""
    query = torch.randn(2, 4, seq, width, dtype=torch.float64)
    key = make_keys("cos0.8", 2, kv_heads, seq, width)
    value = torch.randn(2, kv_heads, seq, value_width, dtype=torch.float64)
    return [x.to("cuda", dtype).requires_grad_() for x in (query, key, value)]


def run(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    output = function(*leaves)
    weight = torch.cos(torch.arange(output.numel(), device="cuda")).view(output.shape)
    return [output, *torch.autograd.grad(output, leaves, weight.to(output.dtype))]


def compare(
    got: list[Tensor],
    dense: list[Tensor],
    exact: list[Tensor],
    dtype: torch.dtype,
    roundings: int = 2,
) -> None:
    """At most twice the error of the dense definition in the same dtype, plus a few roundings."""
    for g, d, e in zip(got, dense, exact, strict=True):
        assert g.dtype == dtype
        rounding = 1e-12 if dtype == torch.float64 else roundings * torch.finfo(dtype).eps
        bound = 2 * relative_error(d, e) + rounding
        assert relative_error(g, e) < bound


@pytest.mark.parametrize("kind", HARD_KEYS)
def test_solve(kind: str) -> None:
    key = make_keys(kind, 2, 3, 1000, 68, device="cuda").requires_grad_()
    value = torch.randn(2, 3, 1000, 20, dtype=torch.float64, device="cuda", requires_grad=True)
    got = run(precondition, [key, value])
    expected = run(lambda k, v: precondition(k, v, impl="reference"), [key, value])
    for g, e in zip(got, expected, strict=True):
        # identical keys have a key gradient of 0 up to cancellation: measure against its terms
        floor = value.norm() / key.norm().clamp(min=1e-12) if g.shape == key.shape else 0.0
        assert (g - e).norm() <= 1e-11 * max(e.norm(), floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (68, 68), (128, 64), (17, 40)])
@pytest.mark.parametrize("padded", [False, True])
def test_attention(dtype: torch.dtype, width: int, value_width: int, padded: bool) -> None:
    leaves = operands(dtype=dtype, width=width, value_width=value_width)
    mask = torch.rand(2, 700, device="cuda") > 0.3 if padded else None

    def attention(*x: Tensor, impl: str = "auto") -> Tensor:
        return lucid_attention(*x, key_mask=mask, impl=impl)

    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact = run(lambda *x: attention(*x, impl="reference"), exact_leaves)
    dense = run(lambda *x: attention(*x, impl="reference"), leaves)
    compare(run(attention, leaves), dense, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 68])
@pytest.mark.parametrize("given", [False, True])
def test_packed(
    dtype: torch.dtype, width: int, given: bool, no_synchronisation: Callable[[], None]
) -> None:
    lengths = (5, 0, 300, 1, 130, 264)
    leaves = [
        x.detach()[0].transpose(0, 1).contiguous().requires_grad_()
        for x in operands(dtype=dtype, width=width, value_width=48)
    ]
    offsets = pack(lengths).cuda()

    def attention(*x: Tensor, impl: str = "auto") -> Tensor:
        longest = max(lengths) if given else None
        return lucid_attention_varlen(*x, offsets, max_seqlen=longest, impl=impl)

    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact = run(lambda *x: attention(*x, impl="reference"), exact_leaves)
    dense = run(lambda *x: attention(*x, impl="reference"), leaves)
    run(attention, leaves)  # compile and allocate what may synchronise once
    if given:
        no_synchronisation()
    got = run(attention, leaves)
    torch.cuda.set_sync_debug_mode("default")
    compare(got, dense, exact, dtype)


def test_packed_nan_stays_in_its_sequence() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [
            x.detach()[0].transpose(0, 1).contiguous().requires_grad_()
            for x in operands(dtype=dtype)
        ]
        offsets = pack((100, 350, 250)).cuda()

        def attention(*x: Tensor, offsets: Tensor = offsets) -> Tensor:
            return lucid_attention_varlen(*x, offsets, max_seqlen=350)

        clean = run(attention, leaves)
        with torch.no_grad():
            leaves[1][120, 1] = torch.nan
        got = run(attention, leaves)
        for g, c in zip(got, clean, strict=True):
            hit = torch.zeros(g.shape[:2], dtype=torch.bool, device="cuda")
            hit[100:450, g.shape[1] // 2 :] = True
            assert relative_error(g[~hit], c[~hit]) < 1e-2
        assert got[0][121:450, 2:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 3, 300, 700])
@pytest.mark.parametrize("extra", ["plain", "padded", "softcap", "sinks", "sinks padded"])
@pytest.mark.parametrize("start", ["aligned", "tensor"])
def test_softmax_half(dtype: torch.dtype, queries: int, extra: str, start: str) -> None:
    query, key, value = operands(dtype=dtype, value_width=40)
    leaves = [query[:, :, :queries].detach().requires_grad_(), key, value]
    options: dict[str, Tensor | float | None] = {"scale": 0.2}
    if "padded" in extra:
        options["key_mask"] = torch.rand(2, 700, device="cuda") > 0.3
    if "sinks" in extra:
        options["sinks"] = torch.randn(4, device="cuda")
    if extra == "softcap":
        options["softcap"] = 2.0
    first = 5 if start == "tensor" else None  # as a pre-allocated cache that is still filling
    position = None if first is None else torch.tensor(first, device="cuda")
    got = run(lambda *x: softmax_attention(*x, query_start=position, **options), leaves)
    scale = options.pop("scale")

    def textbook(cast: torch.dtype) -> list[Tensor]:
        wide = [x.detach().to(cast).requires_grad_() for x in leaves]
        extras = dict(options)
        if "sinks" in extras:
            extras["sinks"] = extras["sinks"].to(cast)  # type: ignore[union-attr]
        return run(lambda *x: naive(*x, scale, start=first, **extras), wide)

    # PyTorch's own float32 kernels group 700 terms in their own way: 9e-7 was measured
    compare(got, textbook(dtype), textbook(torch.float64), dtype, roundings=8)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_gradients_that_lie_differently(dtype: torch.dtype, masked: bool) -> None:
    """PyTorch runs cuDNN's plan for one layout of the output's gradient on others, which gave errors of 130 %."""
    leaves = operands(dtype=dtype)
    weight = torch.randn(2, 4, 700, 64, device="cuda", dtype=dtype)
    start = torch.tensor(3, device="cuda") if masked else None

    def gradients(weight: Tensor) -> tuple[Tensor, ...]:
        output = softmax_attention(*leaves, query_start=start)
        return torch.autograd.grad(output, leaves, weight)

    expected = gradients(weight)
    wide = torch.zeros(2, 4, 900, 80, device="cuda", dtype=dtype)
    wide[:, :, :700, :64] = weight
    for same in (
        weight.transpose(1, 2).contiguous().transpose(1, 2),
        wide[:, :, :700, :64],
        weight.mT.contiguous().mT,
        weight,
    ):
        for g, e in zip(gradients(same), expected, strict=True):
            assert relative_error(g, e) < 1e-2


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_nothing_synchronises(dtype: torch.dtype, no_synchronisation: Callable[[], None]) -> None:
    leaves = operands(dtype=dtype)
    mask = torch.rand(2, 700, device="cuda") > 0.3
    strength = torch.tensor([0.5, 1.0], device="cuda", requires_grad=True)
    past = (torch.randn_like(leaves[1]), torch.randn_like(leaves[2]))

    def everything() -> None:
        output = lucid_attention(*leaves, strength=strength, key_mask=mask)
        y = precondition(*leaves[1:], strength=strength, key_mask=mask, past=past)
        chunk = softmax_attention(leaves[0][:, :, :9], leaves[1], y, key_mask=mask)
        start = torch.tensor(5, device="cuda") if not ready else position
        slot = softmax_attention(leaves[0][:, :, :1], leaves[1], y, query_start=start)
        torch.autograd.grad(
            output.float().sum() + chunk.float().sum() + slot.float().sum(), [*leaves, strength]
        )

    ready = False
    position = torch.tensor(5, device="cuda")
    everything()
    ready = True
    no_synchronisation()
    everything()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graph(dtype: torch.dtype) -> None:
    _, key, value = (x.detach() for x in operands(dtype=dtype))

    def step() -> Tensor:
        k, v = key.requires_grad_(), value.requires_grad_()
        y = precondition(k, v)
        return torch.cat([y, *torch.autograd.grad(y.float().square().sum(), (k, v))])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            key.copy_(torch.randn_like(key))
            value.copy_(torch.randn_like(value))
        graph.replay()
        assert torch.equal(captured, step())


def test_compile_with_inductor() -> None:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return lucid_attention(query * 2, key, value) + 1

    compiled = torch.compile(attention, fullgraph=True, dynamic=True)
    for seq in (100, 333):
        leaves = operands(dtype=torch.bfloat16, seq=seq)
        for got, expected in zip(run(compiled, leaves), run(attention, leaves), strict=True):
            assert relative_error(got, expected) < 1e-2


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("width", [64, 68])
@pytest.mark.parametrize("case", ["plain", "padded", "packed", "chunk", "sinks"])
def test_memory_is_linear(dtype: torch.dtype, width: int, case: str) -> None:
    """One N x N matrix of this shape would be 4 heads * 16384^2 * 2 bytes = 2 GiB."""
    seq = 16384
    leaves = [x[:1] for x in operands(dtype=dtype, seq=seq, width=width, value_width=width)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if case == "packed":
        packed = [x[0].transpose(0, 1) for x in leaves]
        output = lucid_attention_varlen(*packed, pack((seq - 5, 5)).cuda(), max_seqlen=seq)
    elif case == "chunk":
        output = softmax_attention(leaves[0][:, :, 1:], leaves[1], leaves[2])
    elif case == "sinks":
        output = softmax_attention(*leaves, sinks=torch.randn(4, device="cuda"))
    else:
        mask = torch.rand(1, seq, device="cuda") > 0.3 if case == "padded" else None
        output = lucid_attention(*leaves, key_mask=mask)
    output.float().sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 700 * 2**20


def test_float32_on_correlated_keys() -> None:
    key, value = make_keys("cos0.8", 1, 2, 2048, 64, device="cuda"), torch.randn(1, 2, 2048, 64)
    value = value.cuda()
    exact = precondition(key.float().double(), value.double())
    assert relative_error(precondition(key.float(), value), exact) < 1e-5


def test_packed_offsets_are_checked_where_they_are_read() -> None:
    key = torch.randn(10, 1, 8, device="cuda")
    offsets = torch.tensor([0, 11], dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="cu_seqlens must end at"):
        precondition_varlen(key, key, offsets)
