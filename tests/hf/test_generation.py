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

from lucid_attention.hf import LucidCache, attention, enable
from lucid_attention.hf.cache import LucidDynamicLayer, LucidStaticLayer
from tests.hf.conftest import TOLERANCE, lucid_layers

NEW = 14


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


def test_a_copied_or_pickled_model_generates_the_same(build, ids):
    model = enable(build("Llama"), strength=torch.tensor([0.25, 0.75]))
    expected = generate(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        agree(generate(twin, ids), expected)


def test_generate_upgrades_the_cache_it_makes(build, ids, recwarn):
    model = enable(build("Llama"))
    cache = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    assert all(type(layer) is LucidDynamicLayer for layer in cache.layers)
    assert not [w for w in recwarn if "raw values" in str(w.message)]


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
