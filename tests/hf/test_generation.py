"""generate() with the cache it makes by itself gives what it gives without a cache."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, StaticCache

from lucid_attention import precondition
from lucid_attention.hf import LucidCache, attention, enable
from lucid_attention.hf.cache import LucidDynamicLayer, LucidLayer, LucidStaticLayer

NEW = 14
TOLERANCE = {"rtol": 1e-4, "atol": 3e-4}


def generate(model, ids: Tensor, **kwargs):
    """Tokens and the scores they were chosen by; never stops early, so every step is compared."""
    result = model.generate(
        ids,
        **{
            "max_new_tokens": NEW,
            "min_new_tokens": NEW,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
            **kwargs,
        },
    )
    return result.sequences, torch.stack(result.logits, 1)


def agree(actual, expected) -> None:
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], **TOLERANCE)


def lucid_layers(cache) -> list[int]:
    return [i for i, layer in enumerate(cache.layers) if isinstance(layer, LucidLayer)]


def test_greedy_with_left_padding(family, build, ids, left_padded):
    model = enable(build(family))
    expected = generate(model, ids, attention_mask=left_padded, use_cache=False)
    agree(generate(model, ids, attention_mask=left_padded), expected)
    static = {"cache_implementation": "static", "disable_compile": True}
    agree(generate(model, ids, attention_mask=left_padded, **static), expected)
    alone = generate(model, ids[:1, 5:])
    assert torch.equal(alone[0][0, -NEW:], expected[0][0, -NEW:])


def test_the_last_logits_equal_one_forward_pass_over_the_result(build, ids):
    model = enable(build("Llama"))
    tokens, logits = generate(model, ids)
    once = model(tokens, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(logits, once, **TOLERANCE)


@pytest.mark.parametrize("strength", [0.4, "learned"])
def test_other_strengths(strength, build, ids):
    model = enable(build("Llama"), strength=strength)
    if strength == "learned":
        for layer in model.model.layers:
            torch.nn.init.uniform_(layer.self_attn.lucid.strength_bias, 0.2, 0.9)
    agree(generate(model, ids), generate(model, ids, use_cache=False))


def test_sampling_repeats_with_the_seed(build, ids):
    model = enable(build("Qwen3"))
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(generate(model, ids, do_sample=True, top_k=20, use_cache=use_cache))
    agree(*results)


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static", "disable_compile": True, "num_beams": 2},
    ],
    ids=["beams", "several beams", "several samples", "chunked prefill", "static beams"],
)
def test_other_ways_of_generating(family, how, build, ids, left_padded):
    model = enable(build(family))
    how = {"attention_mask": left_padded, **how}
    torch.manual_seed(0)
    actual = generate(model, ids, **how)
    how.pop("prefill_chunk_size", None)
    how.pop("cache_implementation", None)
    torch.manual_seed(0)
    expected = generate(model, ids, use_cache=False, **how)
    assert torch.equal(actual[0], expected[0])


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("Llama", "assisted"),
        ("Llama", "prompt lookup"),
        pytest.param(
            "GptOss",
            "assisted",
            marks=pytest.mark.skipif(
                Version(transformers.__version__) < Version("5.23"),
                reason="transformers 5.17 gives sliding layers a mask of another length after some "
                "rejected proposals, with stock GPT-OSS and Gemma 2 (eager) as well",
            ),
        ),
        ("GptOss", "prompt lookup"),
    ],
)
def test_speculative_decoding(family, kind, build, ids):
    model = enable(build(family))
    ids = ids[:1].repeat(1, 2)  # a repetition, so that prompt lookup proposes something
    if kind == "assisted":
        assistant = enable(build(family, seed=0))
        with torch.no_grad():  # close to the model: some proposals are kept, some rolled back
            for parameter in assistant.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        how = {"assistant_model": assistant}
    else:
        how = {"prompt_lookup_num_tokens": 3}
    actual = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, **how)
    expected, _ = generate(model, ids, use_cache=False, eos_token_id=None, min_new_tokens=None)
    assert torch.equal(actual, expected)


def test_a_conversation_over_several_turns(build, ids):
    model = enable(build("Gemma2"))
    cache = LucidCache(model.config)
    assert lucid_layers(cache) == [1, 3] == model.config.lucid["layers"]
    text = ids
    for turn in range(3):
        expected, _ = generate(model, text, use_cache=False)
        actual, _ = generate(model, text, past_key_values=cache)
        assert torch.equal(actual, expected)
        text = torch.cat([expected, ids[:, turn : turn + 3]], dim=1)


@pytest.mark.parametrize("make", [LucidCache, lambda config: DynamicCache()])
def test_every_split_into_chunks_gives_the_same_logits(make, build, ids, left_padded):
    model = enable(build("Llama"))
    expected = model(ids, attention_mask=left_padded, use_cache=False).logits
    for sizes in ([19], [1] * 19, [3, 1, 9, 6], [18, 1]):
        cache, done, parts = make(model.config), 0, []
        for part in ids.split(sizes, dim=1):
            done += part.shape[1]
            mask = left_padded[:, :done]
            parts.append(model(part, attention_mask=mask, past_key_values=cache).logits)
        actual = torch.cat(parts, 1)[left_padded.bool()]
        torch.testing.assert_close(actual, expected[left_padded.bool()], **TOLERANCE)


def test_static_cache_in_chunks(build, ids, left_padded):
    for family in ("Llama", "Gemma2", "GptOss"):
        model = enable(build(family), layers=[1])
        expected = model(ids, attention_mask=left_padded, use_cache=False).logits
        cache, parts, done = StaticCache(model.config, max_cache_len=32), [], 0
        for part in ids.split([5, 1, 12, 1], dim=1):
            done += part.shape[1]
            mask = left_padded[:, :done]
            parts.append(model(part, attention_mask=mask, past_key_values=cache).logits)
        assert isinstance(cache.layers[1], LucidStaticLayer) and lucid_layers(cache) == [1]
        actual = torch.cat(parts, 1)[left_padded.bool()]
        torch.testing.assert_close(actual, expected[left_padded.bool()], **TOLERANCE)


def test_padding_inside_a_later_chunk(build, ids):
    """A batched second turn: the rows' new parts have different lengths."""
    model = enable(build("Llama"))
    mask = torch.ones_like(ids)
    mask[0, 8:11] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    first = model(ids[:, :8], use_cache=True)
    second = model(
        ids[:, 8:],
        attention_mask=mask,
        position_ids=positions[:, 8:],
        past_key_values=first.past_key_values,
    )
    alone = model(ids[:1][:, mask[0].bool()], use_cache=False).logits
    torch.testing.assert_close(second.logits[:1, 3:], alone[:, 8:], **TOLERANCE)


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


def test_a_copied_or_pickled_model_generates_the_same(build, ids):
    model = enable(build("Llama"), strength=torch.tensor([0.25, 0.75]))
    expected = generate(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        agree(generate(twin, ids), expected)


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


def test_generate_upgrades_the_cache_it_makes(build, ids, recwarn):
    model = enable(build("Llama"))
    cache = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    assert all(type(layer) is LucidDynamicLayer for layer in cache.layers)
    assert not [w for w in recwarn if "raw values" in str(w.message)]


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


def few_tokens_after_a_past(layer, lucid, query, softmax) -> bool:
    """Where decoding goes through `lucid_attention_with_kvcache`, on a CPU too, with its PyTorch path."""
    return layer.pending.room is not None and layer.scaled and layer.pending.past.shape[2] > 0


@pytest.fixture
def one_pass(monkeypatch):
    """The tokens of the calls that the decode operator gets."""
    calls = []
    real = attention.lucid_attention_with_kvcache

    def counted(query, *args, **kwargs):
        calls.append(query.shape[2])
        return real(query, *args, **kwargs)

    monkeypatch.setattr(attention, "lucid_attention_with_kvcache", counted)
    monkeypatch.setattr(attention, "_is_one_pass", few_tokens_after_a_past)
    return calls


@torch.no_grad()
@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("name", ["Llama", "GptOss", "Gemma2"])
def test_the_decode_operator_fills_a_static_cache(
    name, offloaded, build, ids, left_padded, one_pass, monkeypatch
):
    """It writes keys and `Y`, the layer counts: as the solve beside it would have."""
    model = enable(build(name), strength=0.8, kernel_scale=0.15)
    expected = model(ids, attention_mask=left_padded, use_cache=False).logits
    if offloaded:
        real = LucidStaticLayer.update

        def moves_away(layer, *args, **kwargs):
            found = real(layer, *args, **kwargs)
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            return found

        monkeypatch.setattr(LucidStaticLayer, "update", moves_away)
    caches = [StaticCache(model.config, max_cache_len=24) for _ in range(2)]
    for cache, ours in zip(caches, (True, False), strict=True):
        if not ours:
            monkeypatch.setattr(attention, "_is_one_pass", lambda *args: False)
        at = 0
        for length in (9, 1, 1, 3, 1, 2, 1):
            now = slice(at, at + length)
            logits = model(
                ids[:, now], attention_mask=left_padded[:, : at + length], past_key_values=cache,
            ).logits  # fmt: skip
            real_rows = left_padded[:, now].bool()
            torch.testing.assert_close(logits[real_rows], expected[:, now][real_rows], **TOLERANCE)
            at += length
    layers = lucid_layers(caches[0])
    # A static layer always has a past: its buffers. The prompt, nine tokens, goes this way too where Y needs no scale.
    assert one_pass == [n for n in (9, 1, 1, 3, 1, 2, 1) for _ in layers]
    for i in layers:
        first, second = caches[0].layers[i], caches[1].layers[i]
        assert int(first.cumulative_length) == int(second.cumulative_length) == 18
        torch.testing.assert_close(first.keys, second.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(first.values, second.values, **TOLERANCE)


def compiled_whole(model):
    return torch.compile(model, backend="eager")


def compiled_layers(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


@torch.no_grad()
@pytest.mark.parametrize("make", [StaticCache, LucidCache], ids=["static", "growing"])
@pytest.mark.parametrize("compiled", [compiled_whole, compiled_layers])
def test_offloading_is_refused_in_a_compiled_step(compiled, make, build, ids):
    """Tracing it would end the process. Here the cache only says that it is offloaded; `test_gpu.py` has one that is."""
    model = enable(build("Llama"))
    cache = make(model.config, **({"max_cache_len": 24} if make is StaticCache else {}))
    model(ids[:, :9], past_key_values=cache)
    expected = model(ids[:, 9:10], past_key_values=copy.deepcopy(cache)).logits
    cache.offloading = True
    with pytest.raises(ValueError, match=r"past_key_values: an offloaded.*disable_compile=True"):
        compiled(model)(ids[:, 9:10], past_key_values=cache)
    cache.offloading = False  # nothing was written
    logits = compiled(model)(ids[:, 9:10], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected, **TOLERANCE)


@torch.no_grad()
def test_offloading_in_one_graph_says_why_not(build, ids):
    torch._dynamo.reset()  # of what was compiled before, frames are left alone that broke off
    model = enable(build("Llama"))
    cache = StaticCache(model.config, max_cache_len=24)
    model(ids[:, :9], past_key_values=cache)
    cache.offloading = True
    with pytest.raises(Unsupported, match="an offloaded cache in a compiled step"):
        torch.compile(model, backend="eager", fullgraph=True)(ids[:, 9:10], past_key_values=cache)


@torch.no_grad()
def test_the_decode_operator_in_a_compiled_step(build, ids, left_padded, monkeypatch):
    monkeypatch.setattr(attention, "_is_one_pass", few_tokens_after_a_past)
    model = enable(build("Llama"), strength=0.8)
    expected = model(ids, attention_mask=left_padded, use_cache=False).logits
    cache = StaticCache(model.config, max_cache_len=24)
    model(ids[:, :9], attention_mask=left_padded[:, :9], past_key_values=cache)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, backend=counter, fullgraph=True)
    full = torch.nn.functional.pad(left_padded, (0, 5))
    for i in range(9, 18):
        seen = full.clone()
        seen[:, i + 1 :] = 0
        logits = step(
            ids[:, i : i + 1], attention_mask=seen, position_ids=torch.full((2, 1), i), past_key_values=cache
        ).logits  # fmt: skip
        torch.testing.assert_close(logits[:, 0], expected[:, i], **TOLERANCE)
        assert all(int(cache.layers[n].cumulative_length) == i + 1 for n in lucid_layers(cache))
    assert counter.frame_count == 1
    torch._dynamo.reset()
