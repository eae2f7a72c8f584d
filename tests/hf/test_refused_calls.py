"""Calls, caches and masks that are not supported say so, by name and with a remedy."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

from lucid_attention.hf import LucidCache, enable
from lucid_attention.hf.masks import lucid_mask


class RoundedLayer(QuantizedLayer):
    """A quantised layer without a quantisation library: it keeps halves."""

    def _quantize(self, tensor, axis):
        return tensor.half()

    def _dequantize(self, tensor):
        return tensor.float()


def test_quantised_caches(build, ids):
    model = enable(build("Llama"))
    with pytest.raises(ValueError, match=r"quantised caches are not supported"):
        model(ids, past_key_values=Cache(layers=[RoundedLayer(), RoundedLayer()]))


def test_caches_that_are_not_caches(build, ids):
    with pytest.raises(TypeError, match=r"past_key_values: expected a transformers Cache.*tuple"):
        enable(build("Llama"))(ids, past_key_values=((ids, ids),))


def test_a_cache_of_another_model(build, ids):
    """A LUCID cache outside the LUCID layers that filled it would be read as values."""
    model = enable(build("Llama"))

    def filled() -> LucidCache:
        return model(ids, use_cache=True).past_key_values

    with pytest.raises(ValueError, match=r"preconditioned values"):
        build("Llama")(ids[:, :1], past_key_values=filled())  # a softmax model
    with pytest.raises(ValueError, match=r"LUCID layers are \[1\] of 2"):
        enable(build("Llama"), layers=[1])(ids[:, :1], past_key_values=filled())
    with pytest.raises(ValueError, match=r"layer 0 .* of 1"):
        enable(build("Llama", num_hidden_layers=1))(ids[:, :1], past_key_values=filled())
    with pytest.raises(ValueError, match=r"expected keys and values with"):
        enable(build("Llama", num_key_value_heads=4))(ids[:, :1], past_key_values=filled())
    with pytest.raises(ValueError, match=r"expected keys and values with"):
        enable(build("Llama", head_dim=8))(ids[:, :1], past_key_values=filled())
    with pytest.raises(ValueError, match=r"expected keys and values with"):
        model(ids[:1, :1], past_key_values=filled())  # another batch


@torch.no_grad()
def test_a_full_static_cache(build, ids):
    """Nothing is written and nothing is lost: a larger cache goes on from where this one ended."""
    model = enable(build("Llama"))
    expected = model(ids, use_cache=False).logits
    cache = StaticCache(model.config, max_cache_len=12)
    model(ids[:, :10], past_key_values=cache)
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(ValueError, match=r"static cache is full: it holds 10 of 12 tokens, and 3"):
        model(ids[:, 10:13], past_key_values=cache)
    for layer, was in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, was) and int(layer.cumulative_length) == 10
    with pytest.raises(ValueError, match=r"static cache is full: it holds 0 of 12 tokens, and 19"):
        model(ids, past_key_values=StaticCache(model.config, max_cache_len=12))
    logits = model(ids[:, 10:12], past_key_values=cache).logits  # what fits still does
    torch.testing.assert_close(logits, expected[:, 10:12], rtol=1e-4, atol=3e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_of_another_dtype(kind, build, ids):
    model = enable(build("Llama"))
    cache = LucidCache(model.config)
    if kind == "static":
        cache = StaticCache(model.config, max_cache_len=24)
    model(ids[:, :10], past_key_values=cache)
    with pytest.raises(ValueError, match=r"cache's dtype, torch.float32, got torch.bfloat16"):
        model.bfloat16()(ids[:, 10:], past_key_values=cache)


def test_an_interrupted_cache(build, ids):
    model = enable(build("Llama"))
    cache = model(ids, use_cache=True).past_key_values
    model.model.layers[0].self_attn.lucid.impl = "nonsense"
    with pytest.raises(ValueError, match=r"impl"):
        model(ids[:, :1], past_key_values=cache)
    model.model.layers[0].self_attn.lucid.impl = "auto"
    with pytest.raises(ValueError, match=r"interrupted.*new cache"):
        model(ids[:, :1], past_key_values=cache)


def test_a_pass_that_dies_before_attention_permits_nothing(build, ids):
    model = enable(build("Llama"))
    cache = LucidCache(model.config)
    with pytest.raises(IndexError):
        model(ids + 96, past_key_values=cache)  # not in the vocabulary
    with pytest.raises(ValueError, match=r"not one of its LUCID layers"):
        build("Llama")(ids, past_key_values=cache)
    model(ids, past_key_values=cache)  # the model itself may go on
    assert cache.get_seq_length() == 19


def test_bad_cache_configs(build):
    with pytest.raises(TypeError, match=r"config: expected a transformers config"):
        LucidCache({"layers": 2})
    with pytest.raises(ValueError, match=r"config: expected the config of a LUCID model.*enable"):
        LucidCache(build("Llama").config)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_padding_of_cached_positions_cannot_change(kind, build, ids, left_padded):
    model = enable(build("Llama"))
    everything = torch.ones_like(ids)

    def after(first: torch.Tensor | None):
        static = StaticCache(model.config, max_cache_len=24)
        cache = LucidCache(model.config) if kind == "dynamic" else static
        for part in (slice(0, 8), slice(8, 10)):
            mask = None if first is None else first[:, : part.stop]
            model(ids[:, part], attention_mask=mask, past_key_values=cache)
        return cache

    hidden = everything.clone()
    hidden[1, 3] = 0
    forgotten = None if kind == "dynamic" else everything[:, :11]
    for first, then in (
        (None, hidden[:, :11]),  # cached as real, now hidden
        (everything, hidden[:, :11]),
        (left_padded, everything[:, :11]),  # cached as padding, now real
        (left_padded, forgotten),
    ):
        cache = after(first)
        with pytest.raises(ValueError, match=r"padding of cached positions changed.*new cache"):
            model(ids[:, 10:11], attention_mask=then, past_key_values=cache)
    new = torch.zeros(2, 1, 3, 13, dtype=torch.bool)
    new[..., 10:] = torch.ones(3, 3).tril().bool()  # a new document behind the cached one
    if kind == "dynamic":
        with pytest.raises(ValueError, match=r"padding of cached positions changed.*row 0, pos"):
            model(ids[:, 10:13], attention_mask=new, past_key_values=after(None))


def test_the_remembered_padding_follows_the_cache(build, ids, left_padded):
    """What is done to a cache is done to its mask: the right mask passes, the old one does not."""
    model = enable(build("Llama")).requires_grad_(False)

    def filled():
        return model(
            ids[:, :12], attention_mask=left_padded[:, :12], past_key_values=LucidCache()
        ).past_key_values

    swapped, doubled = torch.tensor([1, 0]), torch.tensor([0, 0, 1, 1])
    for change, rows in (
        (lambda cache: cache.reorder_cache(swapped), swapped),
        (lambda cache: cache.batch_select_indices(swapped), swapped),
        (lambda cache: cache.batch_repeat_interleave(2), doubled),
        (lambda cache: cache.crop(-8), torch.tensor([0, 1])),
    ):
        cache = filled()
        change(cache)
        done = cache.get_seq_length()
        part = {"past_key_values": cache, "attention_mask": left_padded[rows, : done + 1]}
        model(ids[rows, done : done + 1], **part)
        wrong = torch.ones(len(rows), done + 2, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"padding of cached positions changed"):
            model(ids[rows, done : done + 1], past_key_values=cache, attention_mask=wrong)
    cache = filled()
    cache.crop(-8)  # what was cut off is forgotten
    mask = left_padded[:, :12].clone()
    mask[1, 6:8] = 0
    model(ids[:, 4:12], past_key_values=cache, attention_mask=mask)


# --- masks and packing -------------------------------------------------------------------------


def causal(n: int) -> torch.Tensor:
    return torch.ones(n, n).tril().bool()[None, None].clone()


def test_4d_masks_that_are_refused(build, ids):
    model = enable(build("Llama"))
    n = ids.shape[1]
    bidirectional = torch.ones(1, 1, n, n, dtype=torch.bool)
    hole = causal(n)
    hole[..., 7, 3] = False
    window = causal(n).triu(-4)
    strict = causal(n).tril(-1)
    prefix = causal(n)
    prefix[..., :4, :4] = True
    heads = causal(n).repeat(1, 2, 1, 1)
    heads[:, 1, 9, 2] = False
    for mask in (bidirectional, hole, window, strict, prefix):
        with pytest.raises(ValueError, match=r"causal x documents x padding"):
            model(ids, attention_mask=mask, use_cache=False)
    with pytest.raises(ValueError, match=r"one mask for all heads"):
        model(ids, attention_mask=heads, use_cache=False)
    bias = torch.zeros(1, 1, n, n).masked_fill(~causal(n), float("-inf"))
    bias[..., 5, 2] = -0.5
    with pytest.raises(ValueError, match=r"position bias"):
        model(ids, attention_mask=bias, use_cache=False)
    with pytest.raises(ValueError, match=r"expected a 4-D mask of shape"):
        model(ids, attention_mask=causal(n), past_key_values=StaticCache(model.config, 32))


def test_a_packed_4d_mask_with_a_cache(build, ids):
    mask = causal(ids.shape[1])
    mask[..., 9:, :9] = False
    with pytest.raises(ValueError, match=r"attention_mask: packed documents cannot be cached"):
        enable(build("Llama"))(ids, attention_mask=mask, use_cache=True)


def test_a_plain_4d_mask_is_shared_by_the_batch(build, ids):
    model = enable(build("Llama"))
    actual = model(ids, attention_mask=causal(ids.shape[1])).logits
    torch.testing.assert_close(actual, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_4d_mask_with_a_cache(build, ids, left_padded):
    model = enable(build("Llama"))
    expected = model(ids, attention_mask=left_padded, use_cache=False).logits
    mask = causal(19) & left_padded.bool()[:, None, None, :]
    cache = DynamicCache()
    first = model(ids[:, :12], attention_mask=mask[..., :12, :12], past_key_values=cache).logits
    second = model(ids[:, 12:], attention_mask=mask[..., 12:, :], past_key_values=cache).logits
    actual = torch.cat([first, second], 1)[left_padded.bool()]
    torch.testing.assert_close(actual, expected[left_padded.bool()], rtol=1e-4, atol=3e-4)


def test_mask_functions_that_are_not_causal():
    from transformers.masking_utils import and_masks, bidirectional_mask_function, or_masks

    arguments = {"batch_size": 1, "q_length": 4, "kv_length": 4}
    causal_function = transformers.masking_utils.causal_mask_function
    assert lucid_mask(**arguments) is None
    for function in (
        bidirectional_mask_function,
        or_masks(causal_function, bidirectional_mask_function),
        and_masks(bidirectional_mask_function),
        and_masks(causal_function, bidirectional_mask_function),
        len,
    ):
        with pytest.raises(ValueError, match=r"expected a plain causal"):
            lucid_mask(**arguments, mask_function=function)
    with pytest.raises(ValueError, match=r"expected a plain causal"):
        lucid_mask(**arguments, use_vmap=True)


def test_masks_of_other_shapes(build, ids):
    model = enable(build("Llama"))
    with pytest.raises(
        ValueError, match=r"attention_mask: expected a padding mask .*\(2, 19, 19\)"
    ):
        model(ids, attention_mask=torch.ones(2, 19, 19))


def test_a_call_without_inputs(build):
    model = enable(build("Llama"))
    with pytest.raises(ValueError, match=r"input_ids"):  # in transformers' words
        model(position_ids=torch.arange(4)[None])


def test_a_mask_that_is_too_short(build, ids):
    model = enable(build("Llama"))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"one entry for each of the 20 keys.*got 1"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)


def test_a_static_mask_that_is_too_short(build, ids):
    model = enable(build("Llama"))
    mask = torch.ones_like(ids)
    length = ids.shape[1]
    cache = StaticCache(model.config, max_cache_len=length + 4)
    model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
    with pytest.raises(
        ValueError, match=r"attention_mask: expected one entry for each of the 9 keys.*got 8"
    ):
        model(ids[:, 8:9], attention_mask=mask[:, :8], past_key_values=cache)
    found = model(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(found, model(ids, use_cache=False).logits[:, 8:], rtol=1e-3, atol=1e-4)  # fmt: skip


def test_masks_of_another_batch(build, ids):
    model = enable(build("Llama"))
    for cache in (None, LucidCache(model.config)):
        with pytest.raises(ValueError, match=f"attention_mask: expected a row for each of the {len(ids)} rows"):  # fmt: skip
            model(ids, attention_mask=torch.ones(len(ids) + 1, ids.shape[1]), past_key_values=cache)


def test_integer_4d_masks(build, ids):
    model = enable(build("Llama"))
    mask = torch.ones(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.long).tril()
    with pytest.raises(ValueError, match=r"attention_mask: expected a 4-D mask of bool .*int64"):
        model(ids, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("kind", [LucidCache, DynamicCache, StaticCache])
def test_packed_positions_with_a_cache(kind, build, ids):
    model = enable(build("Llama"))
    half = ids.shape[1] // 2
    positions = torch.cat([torch.arange(half), torch.arange(ids.shape[1] - half)])
    extra = {"max_cache_len": 64} if kind is StaticCache else {}
    cache = kind(config=model.config, **extra)
    with pytest.raises(ValueError, match="position_ids: they restart"):
        model(ids, position_ids=positions.expand(len(ids), -1), past_key_values=cache)
    plain = torch.arange(ids.shape[1]).expand(len(ids), -1)
    model(ids, position_ids=plain, past_key_values=kind(config=model.config, **extra))


@pytest.mark.parametrize("name", ["block_indices", "indices", "position_bias"])
def test_what_changes_scores_is_not_swallowed(name, build, ids):
    model = enable(build("Llama"))
    with pytest.raises(ValueError, match=f"{name}: LlamaAttention chooses or shifts"):
        model(ids, use_cache=False, **{name: torch.zeros(1)})
    model(ids, use_cache=False, **{name: None})


def test_a_softmax_cache_is_warned_about(build, ids):
    model = build("Llama")
    cache = DynamicCache(config=model.config)
    model(ids[:, :4], past_key_values=cache)
    with pytest.warns(UserWarning, match="right only if this model computed them"):
        enable(model)(ids[:, 4:], past_key_values=cache)


def test_packing_that_is_refused(build, ids):
    model = enable(build("Llama"))
    packed = torch.cat([torch.arange(9), torch.arange(10)]).unsqueeze(0)
    with pytest.raises(ValueError, match=r"packed documents cannot be cached.*use_cache=False"):
        model(ids, position_ids=packed)
    shard = torch.cat([torch.arange(9), torch.arange(30, 40)]).unsqueeze(0)
    with pytest.raises(ValueError, match=r"every packed document to start at position 0"):
        model(ids, position_ids=shard, use_cache=False)
    offsets = torch.tensor([0, 19, 38], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q: packed documents need position_ids"):
        model(ids, cu_seq_lens_q=offsets, use_cache=False)
    offsets = torch.tensor([0, 8, 19], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"offsets at which position_ids restart, \[0, 9, 19\]"):
        model(ids[:1], position_ids=packed, cu_seq_lens_q=offsets, use_cache=False)
    offsets = torch.tensor([0, 38], dtype=torch.int32)
    for batch in (torch.arange(19)[None], torch.arange(19).expand(2, -1)):
        with pytest.raises(ValueError, match=r"position_ids restart, \[0, 19, 38\], got \[0, 38\]"):
            model(ids, position_ids=batch, cu_seq_lens_q=offsets, use_cache=False)
    offsets = torch.tensor([0, 19, 38], dtype=torch.int32)
    rows = model(ids, position_ids=batch, cu_seq_lens_q=offsets, use_cache=False).logits
    torch.testing.assert_close(rows, model(ids).logits, rtol=1e-4, atol=2e-4)
    offsets = torch.tensor([0, 8, 19], dtype=torch.int32)
    straight = torch.arange(19).unsqueeze(0)
    with pytest.raises(ValueError, match=r"offsets at which position_ids restart, \[0, 19\]"):
        model(ids[:1], position_ids=straight, cu_seq_lens_q=offsets, use_cache=False)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch with gloo")
def test_torch_context_parallel(build, ids, tmp_path):
    model = enable(build("Llama"))
    file = f"file://{tmp_path}/rendezvous"
    dist.init_process_group("gloo", init_method=file, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shard = ids.repeat(1, 2)[:, :32].contiguous()
        with (
            context_parallel(mesh, buffers=[shard], buffer_seq_dims=[1]),
            pytest.raises(ValueError, match=r"context_parallel: LUCID attention does not support"),
        ):
            model(shard)
    finally:
        dist.destroy_process_group()
    model(ids)  # afterwards it is over


@pytest.mark.parametrize("size", ["cp_size", "sp_size"])
def test_accelerate_context_parallel(size, build, ids, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    model = enable(build("Llama"))
    config = accelerate.ParallelismConfig(**{size: 2})
    state = sys.modules["accelerate.state"].AcceleratorState
    monkeypatch.setitem(state._shared_state, "parallelism_config", config)
    with pytest.raises(ValueError, match=r"cp_size or sp_size"):
        model(ids)
