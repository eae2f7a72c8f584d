"""What only a GPU shows of the decode kernels: Hopper's own, graphs, repetition, long caches, many launches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lucid_attention import decode_workspace, lucid_attention_with_kvcache, precondition
from lucid_attention.decode import launch
from tests.conftest import make_keys, relative_error
from tests.decode.cases import Case, Step
from tests.decode.test_decode import check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def random(batch: int, heads: int, group: int, width: int, rows: int, tokens: int = 1) -> list[Tensor]:  # fmt: skip
    """Query, key, value, and caches whose first rows are used."""
    new = [torch.randn(batch, n, tokens, width, device="cuda", dtype=torch.bfloat16) for n in (heads * group, heads, heads)]  # fmt: skip
    key_cache = make_keys("cos0.5", batch, heads, rows, width, dtype=torch.bfloat16, device="cuda")
    return [*new, key_cache, torch.randn_like(key_cache, dtype=torch.float16)]


@pytest.mark.parametrize("tokens", [1, 2, 4, 7])
@pytest.mark.parametrize(
    "case",
    [
        Case((3000, 17, 0, 64), width=128, value_width=128, group=4),
        Case((3000, 2999), width=64, value_width=64, group=7, kv_heads=4, uniform=True),
        Case((2000, 900), width=256, value_width=128, group=1, kv_heads=1, padding="left"),
        Case((1500, 700), width=80, value_width=112, group=2, page=64, strength=True),
        Case((1500, 700), width=128, value_width=64, group=2, page=256, sinks=True, softcap=5.0),
        Case((1500, 64), width=128, value_width=128, group=4, dtype=torch.bfloat16, y_dtype=torch.bfloat16),
        Case(tuple(range(0, 3000, 60)), width=64, value_width=64, group=4),
        Case((9000, 9000), width=64, value_width=64, group=4, kv_heads=8, uniform=True, padding="anywhere"),
        Case(tuple(range(400, 3000, 40)), width=128, value_width=128, group=2, kv_heads=4, padding="anywhere"),
    ],
    ids=["ragged", "one length", "D 256", "pages of 64", "pages of 256", "Y in bfloat16", "50 rows", "padded", "65 padded rows"],
)  # fmt: skip
def test_hoppers_own_kernel(case: Case, tokens: int) -> None:
    """Long enough for several programs a head; unequal lengths go through the list of tiles."""
    from dataclasses import replace

    if case.uniform:
        case = replace(case, lengths=(case.lengths[0],) * 2)
    step = Step(replace(case, tokens=tokens, capacity=0), "cuda")
    if torch.cuda.get_device_capability() == (9, 0):
        used = (case.group + 1) * tokens
        rows = max(16, 1 << (used - 1).bit_length())
        assert launch.is_hoppers(step.key_cache, step.y_cache, rows, case.page)
    check(step, "triton")


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("lengths", [(190,) * 32, (64, 190, 320, 0, 1, 500) * 5], ids=["one length", "ragged"])  # fmt: skip
def test_heads_with_odd_numbers_of_tiles(width: int, lengths: tuple[int, ...]) -> None:
    """A program goes from head to head; with two tiles of each ring (D 256) its groups must not mix them up."""
    case = Case(lengths, kv_heads=8, group=1, width=width, value_width=width, uniform=len(set(lengths)) == 1)  # fmt: skip
    step = Step(case, "cuda")
    output, new = step.expected()
    rest = step.key_cache.clone(), step.y_cache.clone()
    for _ in range(300):
        step.key_cache.copy_(rest[0])
        step.y_cache.copy_(rest[1])
        got = step.run("triton")
        assert relative_error(got.cpu(), output) < 1.5e-3
    assert relative_error(step.added()[1].cpu(), new) < 1e-3


def test_many_parts_are_added_in_two_steps() -> None:
    """One KV head on a whole card: 132 parts."""
    for group, width in ((1, 64), (7, 128), (15, 64)):
        case = Case((40000,), kv_heads=1, group=group, width=width, value_width=width, uniform=True)
        check(Step(case, "cuda"), "triton")


def test_it_repeats_bit_for_bit() -> None:
    *new, key_cache, y_cache = random(2, 4, 8, 64, 20000)
    first = None
    for _ in range(20):
        caches = [key_cache.clone(), y_cache.clone()]
        got = [lucid_attention_with_kvcache(*new, *caches, 19990, impl="triton"), *caches]
        first = got if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True))


def test_a_graph_is_replayed_while_lengths_grow() -> None:
    """Captured once; each replay reads the lengths that are there then."""
    *new, key_cache, y_cache = random(3, 2, 4, 128, 700)
    lengths = torch.tensor([500, 0, 64], dtype=torch.int64, device="cuda")
    workspace = decode_workspace(3, 2, "cuda")
    static = [x.clone() for x in new]
    caches = [key_cache.clone(), y_cache.clone()]
    arguments = (*static, *caches, lengths)
    lucid_attention_with_kvcache(*arguments, workspace=workspace, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lucid_attention_with_kvcache(*arguments, workspace=workspace, impl="triton")
    twins = [key_cache.clone(), y_cache.clone()]
    for cache, twin in zip(caches, twins, strict=True):
        cache.copy_(twin)
    for _ in range(50):
        for held in static:
            held.normal_()
        graph.replay()
        expected = lucid_attention_with_kvcache(*static, *twins, lengths, impl="blocked")
        assert relative_error(out, expected) < 4e-3
        lengths += 1
    assert relative_error(caches[1], twins[1]) < 1e-3
    assert torch.equal(caches[0], twins[0])


def test_a_thousand_launches_beside_other_work() -> None:
    """Counters come back to 0, whatever else runs; kernels that follow one another do not overtake."""
    *new, key_cache, y_cache = random(1, 3, 2, 64, 9000)
    workspace = decode_workspace(1, 3, "cuda")
    side = torch.cuda.Stream()
    noise = torch.randn(2048, 2048, device="cuda")
    expected = None
    for i in range(1000):
        if i % 10 == 0:
            with torch.cuda.stream(side):
                noise = torch.nn.functional.normalize(noise @ noise)
        # Each call reads the row that the one before wrote.
        out = lucid_attention_with_kvcache(
            *new, key_cache, y_cache, 7000 + i, workspace=workspace, impl="triton"
        )
    torch.cuda.synchronize()
    assert int(workspace.abs().sum()) == 0
    key = torch.cat([key_cache[:, :, :7000], new[1].expand(-1, -1, 1000, -1)], 2).double()
    past = (key[:, :, :7000], y_cache[:, :, :7000].double())
    value = new[2].expand(-1, -1, 1000, -1).double()
    exact = precondition(key[:, :, 7000:], value, past=past, impl="blocked")
    assert relative_error(y_cache[:, :, 7000:8000], exact) < 3e-3
    weights = torch.softmax(new[0].double().unflatten(1, (3, 2)) @ key[:, :, None].mT / 8.0, dim=-1)
    y = torch.cat([past[1], exact], 2)
    expected = (weights @ y[:, :, None]).flatten(1, 2)
    assert relative_error(out, expected) < 5e-3


def test_nothing_synchronises() -> None:
    *new, key_cache, y_cache = random(2, 2, 2, 64, 300)
    lengths = torch.tensor([100, 200], dtype=torch.int32, device="cuda")
    mask = torch.ones(2, 300, dtype=torch.bool, device="cuda")
    call = lambda: lucid_attention_with_kvcache(  # noqa: E731
        *new, key_cache, y_cache, lengths, key_mask=mask, impl="triton"
    )
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.xdist_group("large")  # tens of gigabytes: one after another
def test_beyond_32_bits() -> None:
    """A cache of more than 2^31 entries; the last head of the last row is compared."""
    batch, heads, rows, width = 2, 9, 1 << 20, 128
    key_cache = torch.zeros(batch, heads, rows, width, device="cuda", dtype=torch.bfloat16)
    y_cache = torch.zeros_like(key_cache, dtype=torch.float16)
    assert key_cache.numel() > 1 << 31
    used = 3000
    key_cache[-1, -1, :used] = make_keys("cos0.5", used, width, dtype=torch.bfloat16, device="cuda")
    y_cache[-1, -1, :used] = torch.randn(used, width, device="cuda")
    new = [torch.randn(batch, n, 1, width, device="cuda", dtype=torch.bfloat16) for n in (18, 9, 9)]
    lengths = torch.tensor([1, used], dtype=torch.int32, device="cuda")
    got = lucid_attention_with_kvcache(*new, key_cache, y_cache, lengths, impl="triton")[-1:, -2:]
    part = [new[0][-1:, -2:], new[1][-1:, -1:], new[2][-1:, -1:]]
    caches = [x[-1:, -1:, : used + 1].clone() for x in (key_cache, y_cache)]
    y = caches[1][:, :, used].clone()
    expected = lucid_attention_with_kvcache(*part, *caches, used, impl="blocked")
    assert relative_error(got, expected) < 4e-3
    assert relative_error(y, caches[1][:, :, used]) < 1e-3
    assert math.isfinite(float(got.sum()))


def test_a_large_y_becomes_infinite_rather_than_wrong() -> None:
    *new, key_cache, y_cache = random(1, 1, 1, 64, 100)
    new[2].fill_(1e30)
    out = lucid_attention_with_kvcache(*new, key_cache, y_cache, 50, impl="triton")
    assert bool(y_cache[0, 0, 50].isinf().all())
    assert bool(lucid_attention_with_kvcache(*new, key_cache, y_cache, 51, impl="triton").isnan().any())  # fmt: skip
    assert bool(out.isfinite().all())


def test_the_memorys_rate_is_known() -> None:
    """Of any card that these kernels run on: 300 GB/s to 20 TB/s."""
    assert 300 < launch.memory_rate(torch.device("cuda", 0)) < 20000
