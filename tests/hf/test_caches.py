"""What is done to a cache between two passes: cut, reordered, reset, copied, taken from; what it is kept in."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

from lucid_attention import precondition
from lucid_attention.hf import LucidCache, enable
from lucid_attention.hf.cache import LucidDynamicLayer, LucidStaticLayer
from tests.hf.conftest import TOLERANCE, lucid_layers


def test_crop_is_exact(build, ids):
    model = enable(build("Llama"))
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(-7)
    assert cache.get_seq_length() == 12
    changed = ids.clone()
    changed[:, 12:] = ids[:, :7]
    actual = model(changed[:, 12:], past_key_values=cache).logits
    expected = model(changed, use_cache=False).logits[:, 12:]
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@pytest.mark.parametrize("how", ["reorder", "repeat", "select", "deepcopy", "pickle", "reset"])
def test_what_is_done_to_a_cache(how, build, ids):
    model = enable(build("Gemma3Text")).requires_grad_(False)
    cache = model(ids[:, :12], use_cache=True).past_key_values
    rows = torch.tensor([1, 0])
    if how == "reorder":
        cache.reorder_cache(rows)
    elif how == "repeat":
        cache.batch_repeat_interleave(2)
        rows = torch.tensor([0, 0, 1, 1])
    elif how == "select":
        cache.batch_select_indices(torch.tensor([1]))
        rows = torch.tensor([1])
    elif how == "deepcopy":
        original, cache, rows = cache, copy.deepcopy(cache), torch.tensor([0, 1])
        model(ids[:, :3], past_key_values=original)  # does not touch the copy
    elif how == "pickle":
        cache, rows = pickle.loads(pickle.dumps(cache)), torch.tensor([0, 1])
    else:
        cache = StaticCache(model.config, max_cache_len=24)
        model(ids[:, 3:], past_key_values=cache)
        cache.reset()
        model(ids[:, :12], past_key_values=cache)
        rows = torch.tensor([0, 1])
    assert lucid_layers(cache) == [1, 3]
    actual = model(ids[rows, 12:], past_key_values=cache).logits
    expected = model(ids, use_cache=False).logits[rows, 12:]
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_stock_cache_with_content_is_exact_and_warns_once(family, kind, build, ids, recwarn):
    """Raw values of an earlier forward pass of the same model: every y is computed again."""
    model = enable(build(family))
    expected = model(ids, use_cache=False).logits
    config = build(family).config
    if kind == "dynamic":
        stock = DynamicCache(config=config)
    else:
        stock = StaticCache(config=config, max_cache_len=24)
        heads, width = model.config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
        stock.early_initialization(2, heads, width, torch.float32, torch.device("cpu"))
    if kind == "dynamic":
        for layer in stock.layers:  # initialised, hence not upgraded
            layer.lazy_initialization(torch.zeros(2, 2, 0, 1), torch.zeros(2, 2, 0, 1))
    logits, done = [], 0
    for part in ids.split([6, 1, 11, 1], dim=1):
        done += part.shape[1]
        logits.append(model(part, past_key_values=stock).logits)
    assert lucid_layers(stock) == []
    torch.testing.assert_close(torch.cat(logits, 1), expected, **TOLERANCE)
    about = [w for w in recwarn if "raw values" in str(w.message)]
    assert len(about) == 1 and "enable" in str(about[0].message)


@torch.no_grad()
def test_dtypes_of_y(build):
    """In a bf16 model whose keys correlate, rows solved from a bf16 past are worse; from float16 they are not."""
    model = enable(build("Llama", num_hidden_layers=1)).bfloat16()
    block = model.model.layers[0]
    attention = block.self_attn
    attention.k_proj.weight.mul_(0.1)
    attention.k_proj.bias = torch.nn.Parameter(torch.randn(32, dtype=torch.bfloat16))
    attention.v_proj.weight.mul_(2.0**-30)  # far below what float16 holds without a scale
    ids = torch.randint(3, 96, (1, 200), generator=torch.Generator().manual_seed(0))
    value = attention.v_proj(block.input_layernorm(model.model.embed_tokens(ids)))
    value = value.unflatten(-1, (2, 16)).transpose(1, 2).double()
    errors = {}
    for y_dtype in (torch.bfloat16, None, torch.float32):
        cache = LucidCache(model.config, y_dtype=y_dtype)
        for part in ids.split(1, dim=1):
            model(part, past_key_values=cache)
        layer = cache.layers[0]
        assert layer.keys.dtype == torch.bfloat16
        assert layer.values.dtype == (torch.float16 if y_dtype is None else y_dtype)
        expected = precondition(layer.keys.double(), value)  # of the same rounded keys and values
        y = layer.in_full(layer.values)
        errors[y_dtype] = ((y - expected).norm() / expected.norm()).item()
    assert errors[torch.float32] < 0.2 * errors[None] < 0.05 * errors[torch.bfloat16] < 1e-3, errors


def test_a_cache_takes_floating_dtypes(build):
    with pytest.raises(TypeError, match="y_dtype"):
        LucidCache(enable(build("Llama")).config, y_dtype=torch.int8)


@torch.no_grad()
def test_what_was_taken_from_a_cache_is_not_changed(build, ids):
    """Decoding writes in place, but only behind what anybody has seen."""
    model = enable(build("Llama"))
    cache = LucidCache(model.config)
    model(ids[:, :6], past_key_values=cache)
    model(ids[:, 6:7], past_key_values=cache)
    layer = cache.layers[0]
    start = layer.keys.data_ptr()
    taken = [layer.keys, layer.values]
    kept = [x.clone() for x in taken]
    model(ids[:, 7:8], past_key_values=cache)
    assert layer.keys.data_ptr() == start  # in place
    cache.crop(-3)
    model(ids[:, 9:13], past_key_values=cache)
    assert layer.keys.data_ptr() != start
    for was, now in zip(kept, taken, strict=True):
        assert torch.equal(was, now)
    actual = model(ids[:, 13:14], past_key_values=cache).logits
    expected = model(torch.cat([ids[:, :5], ids[:, 9:14]], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_a_cache_filled_in_inference_mode_goes_on_outside(build, ids):
    model = enable(build("Llama"))
    expected = model(ids, use_cache=False).logits[:, -1]
    with torch.inference_mode():
        cache = model(ids[:, :10], use_cache=True).past_key_values
        model(ids[:, 10:11], past_key_values=cache)
    with torch.no_grad():
        model(ids[:, 11:14], past_key_values=cache)
    actual = model(ids[:, 14:], past_key_values=cache).logits[:, -1]  # with gradients
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@torch.no_grad()
def test_branches_from_one_cache(build, ids):
    """The tensors of a cache are put back, and another continuation follows: the first one's rows are not overwritten."""
    model = enable(build("Llama"))
    cache = LucidCache(model.config)
    model(ids[:, :10], past_key_values=cache)
    model(ids[:, 10:11], past_key_values=cache)  # buffers with room

    def taken():
        return [(layer.keys, layer.values) for layer in cache.layers]

    def put_back(tensors):
        for layer, (keys, values) in zip(cache.layers, tensors, strict=True):
            layer.keys, layer.values = keys, values

    base = taken()
    model(ids[:, 11:12], past_key_values=cache)
    first = taken()
    put_back(base)
    model(ids[:, 3:4], past_key_values=cache)
    put_back(first)
    actual = model(ids[:, 12:13], past_key_values=cache).logits
    expected = model(ids[:, :13], use_cache=False).logits[:, -1:]
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_gradients_of_the_query_alone_through_a_cache(build, ids):
    """As in a LoRA of the first layer's queries: nothing else needs a gradient, and nothing saved is overwritten."""
    model = enable(build("Llama", num_hidden_layers=1)).requires_grad_(False)
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    cache, total = LucidCache(model.config), 0.0
    for part in ids.split([8, 1, 1, 9], dim=1):
        total = total + model(part, past_key_values=cache).logits.square().sum()
    (actual,) = torch.autograd.grad(total, weight)
    loss = model(ids, use_cache=False).logits.square().sum()
    (expected,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_cache_cropped_to_nothing_takes_another_batch(build, ids):
    model = enable(build("Llama")).bfloat16()
    cache = LucidCache(model.config)
    model(ids.repeat(2, 1)[:3, :10], past_key_values=cache)
    cache.crop(-10)
    model(ids[:1, :10], past_key_values=cache)
    layer = cache.layers[0]
    assert layer.y_scale.shape == (1, 2)
    fresh = LucidCache(model.config)
    model(ids[:1, :10], past_key_values=fresh)
    assert torch.equal(layer.values, fresh.layers[0].values)


@pytest.mark.parametrize(
    "family", ["Llama", "Gemma3Text"]
)  # all layers LUCID; sliding layers between
def test_a_growing_cache_is_reset(family, build, ids):
    """Empty, and what was taken from its LUCID layers before stays what it was."""
    model = enable(build(family)).requires_grad_(False)
    cache = LucidCache(model.config)
    model(ids.flip(0)[:, :7], past_key_values=cache)
    layer = cache.layers[lucid_layers(cache)[0]]
    taken = [layer.keys, layer.values]
    before = [x.clone() for x in taken]
    cache.reset()
    assert cache.get_seq_length() == 0 and lucid_layers(cache)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    for start, end in ((0, 9), (9, 10), (10, 19)):
        got = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got[1], expected[1, 10:], **TOLERANCE)
    torch.testing.assert_close(got[0], expected[0, 10:], **TOLERANCE)
    assert all(torch.equal(x, y) for x, y in zip(taken, before, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["growing", "static"])
def test_a_cache_is_reset_after_an_interrupt(kind, build, ids, monkeypatch):
    """Between its keys and its Y, which is where a first pass runs out of memory."""
    model = enable(build("Llama"))
    cache = LucidCache(model.config) if kind == "growing" else StaticCache(model.config, 24)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lucid_attention.hf.attention.precondition", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, :9], past_key_values=cache)
    cache.reset()
    got = model(ids[:, :12], past_key_values=cache).logits
    expected = model(ids[:, :12], use_cache=False).logits
    torch.testing.assert_close(got, expected, **TOLERANCE)


@torch.no_grad()
def test_a_stock_cache_with_softmax_layers_that_was_reset_is_refused(build, ids):
    model = enable(build("Gemma3Text"))
    cache = DynamicCache(config=model.config)
    model(ids[:, :9], past_key_values=cache)
    model(ids[:, 9:10], past_key_values=cache)
    cache.reset()
    with pytest.raises(ValueError, match="past_key_values: this cache was reset"):
        model(ids[:, :9], past_key_values=cache)
    plain = DynamicCache(config=(whole := enable(build("Llama"))).config)
    whole(ids.flip(0)[:, :9], past_key_values=plain)
    plain.reset()
    got = whole(ids[:, :9], past_key_values=plain).logits
    torch.testing.assert_close(got, whole(ids[:, :9], use_cache=False).logits, **TOLERANCE)


@torch.no_grad()
def test_a_cache_that_was_prepared_is_reset(build, ids):
    model = enable(build("Llama"))
    cache = LucidCache(model.config)
    model(ids[:, :1], past_key_values=cache)  # of which the layers are to be like
    layer = cache.layers[0]
    fresh = LucidCache(model.config)
    fresh.early_initialization(2, 2, layer.keys.shape[-1], torch.float32, torch.device("cpu"))
    fresh.reset()
    got = model(ids[:, :9], past_key_values=fresh).logits
    torch.testing.assert_close(got, model(ids[:, :9], use_cache=False).logits, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("how", ["crop", "crop, then select"])
def test_a_padded_cache_cropped_to_nothing_takes_another_batch(how, build, ids):
    model = enable(build("Llama"))
    cache = LucidCache(model.config)
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, :3] = 0
    rows = ids.repeat(2, 1)
    model(rows[:3, :8], attention_mask=mask, past_key_values=cache)
    cache.crop(-8)
    if how != "crop":
        cache.batch_select_indices(torch.tensor([0, 1]))
    got = model(rows[:2, :12], past_key_values=cache).logits
    expected = model(rows[:2, :12], use_cache=False).logits
    torch.testing.assert_close(got, expected, **TOLERANCE)


@torch.no_grad()
def test_rows_of_a_cache_are_selected_by_a_list(build, ids):
    """As of stock caches; in half precision and with padding, which have something of every row beside it."""
    model = enable(build("Llama")).bfloat16()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    both = []
    for rows in ([1], torch.tensor([1])):
        cache = LucidCache(model.config)
        model(ids[:, :10], attention_mask=mask[:, :10], past_key_values=cache)
        cache.batch_select_indices(rows)
        both.append(model(ids[1:, 10:], attention_mask=mask[1:], past_key_values=cache).logits)
    assert torch.equal(*both)


@torch.no_grad()
def test_a_row_that_begins_with_a_chunk_of_padding(build, ids):
    """Its scale takes after the other rows', so that its small values do not lose bits in float16."""
    model = enable(build("Llama", num_hidden_layers=1)).bfloat16()
    model.model.layers[0].self_attn.v_proj.weight.mul_(2.0**-20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = LucidCache(model.config)
    for start, end in ((0, 6), (6, 19)):
        model(
            ids[:, start:end], attention_mask=mask[:, :end],
            position_ids=positions[:, start:end], past_key_values=cache,
        )  # fmt: skip
    layer = cache.layers[0]
    alone = LucidCache(model.config, y_dtype=torch.float32)
    model(ids[:1, 6:], past_key_values=alone)
    got = layer.in_full(layer.values)[:1, :, 6:]
    expected = alone.layers[0].values
    assert ((got - expected).norm() / expected.norm()).item() < 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *(("dynamic", how) for how in ("reorder", "select", "repeat", "deepcopy", "pickle", "reset")),
        *(("static", how) for how in ("reorder", "deepcopy", "pickle", "reset")),
    ],
)  # fmt: skip
def test_scales_follow_their_rows(kind, how):
    """Two rows of very different size in float16: each keeps its own scale, whatever is done to the cache."""
    make = LucidDynamicLayer if kind == "dynamic" else lambda: LucidStaticLayer(16)
    layer = make()
    size = torch.tensor([1e-6, 1e6])[:, None, None, None]
    key = torch.randn(2, 3, 5, 8, dtype=torch.bfloat16)
    y = size * torch.randn(2, 3, 5, 8)

    def put(layer, key, y):
        layer.armed = True
        layer.update(key, y.bfloat16())
        layer.commit(y)

    put(layer, key, y)
    rows = torch.tensor([0, 1])
    if how == "reorder":
        rows = torch.tensor([1, 0])
        layer.reorder_cache(rows)
    elif how == "deepcopy":
        layer = copy.deepcopy(layer)
    elif how == "pickle":
        layer = pickle.loads(pickle.dumps(layer))
    elif how == "reset":
        layer.reset()
        y = y.flip(0)
        put(layer, key, y)
    elif how == "select":
        rows = torch.tensor([1])
        layer.batch_select_indices(rows)
    else:
        rows = torch.tensor([0, 0, 1, 1])
        layer.batch_repeat_interleave(2)
    put(layer, key[rows], 2 * y[rows])  # later rows in the scale of the first
    got = layer.in_full(layer.values)[:, :, :10]
    expected = torch.cat([y, 2 * y], 2)[rows]
    assert layer.y_scale.shape == (len(rows), 3)
    error = (got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() < 4e-4
