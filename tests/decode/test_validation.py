"""Every user error of the decode operator names the argument, what was expected, what came, what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lucid_attention import lucid_attention_with_kvcache


def arguments(**changes: Any) -> dict[str, Any]:
    """A call that works, with some arguments replaced."""
    good: dict[str, Any] = {
        "query": torch.randn(2, 4, 1, 8),
        "key": torch.randn(2, 2, 1, 8),
        "value": torch.randn(2, 2, 1, 6),
        "key_cache": torch.zeros(2, 2, 10, 8),
        "y_cache": torch.zeros(2, 2, 10, 6),
        "cache_seqlens": 3,
    }

    def copied(name: str, x: Any) -> Any:
        fresh = isinstance(x, Tensor) and name.endswith("_cache") and x.is_contiguous()
        return x.clone() if fresh and not x.requires_grad else x

    clean = {name: copied(name, x) for name, x in changes.items()}
    return {**good, **clean}


PAGED = {
    "key_cache": torch.zeros(5, 2, 4, 8),
    "y_cache": torch.zeros(5, 2, 4, 6),
    "block_table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
}
half = torch.float16


def test_the_good_call_works() -> None:
    assert lucid_attention_with_kvcache(**arguments()).shape == (2, 4, 1, 6)
    assert lucid_attention_with_kvcache(**arguments(**PAGED)).shape == (2, 4, 1, 6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.randn(2, 3, 1, 8)}, ValueError, "query heads must be a multiple"),
        ({"query": torch.randn(2, 4, 2, 8)}, ValueError, "query must have key's seq"),
        ({"value": torch.randn(2, 1, 1, 6)}, ValueError, "value must have key's heads"),
        ({"key_cache": None}, TypeError, "key_cache must be a tensor"),
        ({"key_cache": torch.zeros(2, 2, 8)}, ValueError, "key_cache must have 4 dimensions"),
        ({"key_cache": torch.zeros(2, 3, 10, 8)}, ValueError, r"key_cache must have shape .*another model"),
        ({"key_cache": torch.zeros(5, 2, 4, 8)}, ValueError, "lacks its block_table"),
        ({"y_cache": torch.zeros(2, 2, 9, 6)}, ValueError, r"y_cache must have shape .*\(2, 2, 10, 6\)"),
        ({"key_cache": torch.zeros(2, 2, 10, 8, dtype=half)}, TypeError, "key_cache must have key's dtype"),
        ({"y_cache": torch.zeros(2, 2, 10, 6, dtype=torch.int32)}, TypeError, "y_cache must be float16"),
        ({"y_cache": torch.zeros(2, 2, 6, 10).mT}, ValueError, "contiguous in its last dimension"),
        ({"key_cache": torch.zeros(2, 2, 1, 16)[..., ::2], "y_cache": torch.zeros(2, 2, 1, 6), "cache_seqlens": 0}, ValueError, "contiguous in its last dimension"),
        ({"key_cache": torch.zeros(2, 2, 10, 8, requires_grad=True)}, ValueError, "has no gradient"),
        ({"y_scale": torch.ones(2, 2, requires_grad=True)}, ValueError, "has no gradient"),
        ({**PAGED, "cache_seqlens": torch.tensor([1, 2, 3])}, ValueError, "cache_seqlens must have shape"),
        ({"key_cache": torch.zeros(2, 2, 10, 8, device="meta")}, ValueError, "key_cache must be on key's device"),
        ({"cache_seqlens": 3.0}, TypeError, "cache_seqlens must be an int"),
        ({"cache_seqlens": True}, TypeError, "cache_seqlens must be an int"),
        ({"cache_seqlens": -1}, ValueError, "cache_seqlens must not be negative"),
        ({"cache_seqlens": 10}, ValueError, "the cache is full: 10 cached and 1 new"),
        ({"cache_seqlens": torch.tensor([3, 10])}, ValueError, "the cache is full: 10 cached"),
        ({"cache_seqlens": torch.tensor([1.0, 2.0])}, TypeError, "cache_seqlens must be int32 or int64"),
        ({"cache_seqlens": torch.tensor([1, 2, 3])}, ValueError, r"cache_seqlens must have shape .*\(2,\)"),
        ({"key_mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "cache is full: 3 cached .* capacity of 3"),
        ({"key_mask": torch.ones(2, 10)}, TypeError, "key_mask must be bool"),
        ({"key_mask": torch.ones(3, 10, dtype=torch.bool)}, ValueError, "key_mask must have shape"),
        ({"y_scale": torch.ones(2, 2, dtype=half)}, TypeError, "y_scale must be a float32"),
        ({"y_scale": torch.ones(2)}, ValueError, r"y_scale must have shape \(batch, kv_heads\)"),
        ({"strength": 1.5}, ValueError, "strength must lie in"),
        ({"strength": torch.tensor([0.5, -0.1])}, ValueError, "strength must lie in"),
        ({"softcap": 0.0}, ValueError, "softcap must be a positive float"),
        ({"softcap": "3"}, TypeError, "softcap must be a positive float"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks must have shape \(heads,\)"),
        ({"sinks": 3.0}, TypeError, "sinks must be a floating tensor"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"kernel_scale": 0.0}, ValueError, "kernel_scale must be positive"),
        ({"workspace": torch.zeros(1, dtype=torch.int32)}, ValueError, "workspace must come from decode_workspace"),
        ({"workspace": torch.zeros(9)}, TypeError, "workspace must come from decode_workspace"),
        ({"key_cache": torch.zeros(1, 2, 10, 8).expand(2, 2, 10, 8)}, ValueError, r"key_cache must have memory of its own .*contiguous"),
        ({"y_cache": torch.zeros(2, 1, 10, 6).expand(2, 2, 10, 6)}, ValueError, "y_cache must have memory of its own"),
        ({"impl": "flash"}, ValueError, "impl must be one of"),
        ({"query": torch.randn(2, 4, 1, 8, requires_grad=True)}, ValueError, r"has no gradient.*precondition"),
        ({"strength": torch.ones(2, requires_grad=True)}, ValueError, "has no gradient"),
        ({**PAGED, "block_table": [[0, 1], [2, 3]]}, TypeError, "block_table must be an int32 tensor"),
        ({**PAGED, "block_table": PAGED["block_table"].long()}, TypeError, "block_table must be int32"),
        ({**PAGED, "block_table": PAGED["block_table"][:1]}, ValueError, "block_table must have shape"),
        ({**PAGED, "block_table": PAGED["block_table"] + 4}, ValueError, "names page 6, but there are 5"),
        ({**PAGED, "cache_seqlens": 8}, ValueError, "the cache is full: 8 cached .* capacity of 8"),
    ],
)  # fmt: skip
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call = arguments(**changes)
    caches = [x for x in (call["key_cache"], call["y_cache"]) if isinstance(x, Tensor)]
    with pytest.raises(error, match=message):
        lucid_attention_with_kvcache(**call)
    for cache in caches:  # nothing was written
        assert cache.is_meta or int(cache.count_nonzero()) == 0


def test_one_cache_for_two() -> None:
    call = arguments(value=torch.randn(2, 2, 1, 8))
    call["y_cache"] = call["key_cache"]
    for same in (call, {**call, "y_cache": call["key_cache"][:]}):
        with pytest.raises(ValueError, match="must be two tensors"):
            lucid_attention_with_kvcache(**same)
    both = torch.zeros(2, 2, 2, 10, 8)  # two halves of one buffer are two
    lucid_attention_with_kvcache(**{**call, "key_cache": both[0], "y_cache": both[1]})


def test_pages_beyond_the_lengths_may_be_anything() -> None:
    table = torch.tensor([[0, -1], [2, 999]], dtype=torch.int32)
    call = arguments(**{**PAGED, "block_table": table, "cache_seqlens": 3})
    assert bool(lucid_attention_with_kvcache(**call).isfinite().all())


def decode(**changes: Any) -> Tensor:
    return lucid_attention_with_kvcache(**arguments(**{**PAGED, **changes}))


def test_pages_that_are_written_belong_to_one_row() -> None:
    """Full pages may be shared, a page that new tokens go to may not, nor be read by another row."""
    table = torch.tensor([[0, 1], [0, 3]], dtype=torch.int32)
    assert (
        decode(block_table=table, cache_seqlens=5).isfinite().all()
    )  # both share their full page 0
    for pages, length in (([[0, 1], [2, 1]], 5), ([[0, 1], [1, 3]], 5), ([[0, 0], [2, 3]], 4)):
        cache = torch.randn(5, 2, 4, 8)
        call = arguments(**PAGED | {"key_cache": cache, "cache_seqlens": length})
        call["key_cache"], call["block_table"] = cache, torch.tensor(pages, dtype=torch.int32)
        before = cache.clone()
        with pytest.raises(ValueError, match=r"block_table names page [01] more than once"):
            lucid_attention_with_kvcache(**call)
        assert torch.equal(cache, before)


@pytest.mark.parametrize("page", [-1, 5, 99])
def test_a_page_that_is_not_there_in_a_compiled_call(page: int) -> None:
    """Its row is NaN, nothing is written for it, and the other rows get what they would have got alone."""
    torch._dynamo.reset()
    compiled = torch.compile(lucid_attention_with_kvcache, fullgraph=True, backend="eager")
    # What is out of range is clamped to a page that the other row writes, at the same place.
    call = arguments(**PAGED | {"cache_seqlens": torch.tensor([0, 4])})
    call["block_table"] = torch.tensor([[0 if page < 0 else 4, 2], [1, page]], dtype=torch.int32)
    call["key_cache"], call["y_cache"] = torch.randn(5, 2, 4, 8), torch.randn(5, 2, 4, 6)
    alone = {
        name: x[:1] if name in ("query", "key", "value", "block_table", "cache_seqlens") else x.clone()
        for name, x in call.items()
    }  # fmt: skip
    expected = lucid_attention_with_kvcache(**alone)
    output = compiled(**call)
    assert output[1].isnan().all()
    torch.testing.assert_close(output[:1], expected)
    torch.testing.assert_close(call["key_cache"], alone["key_cache"], rtol=0, atol=0)
    torch.testing.assert_close(call["y_cache"], alone["y_cache"])


def test_an_int_length_with_pages_compiles() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lucid_attention_with_kvcache, fullgraph=True, backend="eager")
    call = arguments(**PAGED)
    torch.testing.assert_close(compiled(**call), lucid_attention_with_kvcache(**call))


@pytest.mark.parametrize("length", [2**31 - 1, 2**31, 2**70])
def test_a_length_beyond_every_cache(length: int) -> None:
    with pytest.raises(ValueError, match="the cache is full"):
        lucid_attention_with_kvcache(**arguments(cache_seqlens=length))


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf"), -1.0])
def test_scales_of_y_are_above_0(scale: float) -> None:
    y_scale = torch.ones(2, 2)
    y_scale[1, 0] = scale
    with pytest.raises(ValueError, match="y_scale must hold finite numbers above 0"):
        lucid_attention_with_kvcache(**arguments(y_scale=y_scale))


def test_function_transforms_are_refused_by_name() -> None:
    call = arguments()
    names = list(call)

    def output(*values: Any) -> Tensor:
        return lucid_attention_with_kvcache(**dict(zip(names, values, strict=True)))

    with pytest.raises(
        RuntimeError, match=r"lucid_attention_with_kvcache .* is not for torch.func"
    ):
        torch.func.grad(lambda x: output(x, *list(call.values())[1:]).sum())(call["query"])
    with pytest.raises(
        RuntimeError, match=r"lucid_attention_with_kvcache .* is not for torch.func"
    ):
        torch.vmap(output, in_dims=(0, 0, 0, 0, 0, None))(
            *[x[:, None] if isinstance(x, Tensor) else x for x in call.values()]
        )
