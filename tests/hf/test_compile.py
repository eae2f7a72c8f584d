"""torch.compile: generation with a static cache is one graph, training compiles without a break."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

from lucid_attention.hf import enable
from lucid_attention.hf.cache import LucidStaticLayer

TOLERANCE = {"rtol": 1e-4, "atol": 3e-4}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# transformers' own static sliding layers count in Python: one more graph, with LUCID or without.
@pytest.mark.parametrize(("family", "graphs"), [("Llama", 1), ("GptOss", 2)])
@torch.no_grad()
def test_compiled_decoding(family, graphs, build, ids, left_padded):
    model = enable(build(family), strength=0.8)
    expected = model(ids, attention_mask=left_padded, use_cache=False).logits
    counter = CompileCounter()
    step = torch.compile(model, backend=counter, fullgraph=True)
    cache = StaticCache(model.config, max_cache_len=24)
    model(ids[:, :9], attention_mask=left_padded[:, :9], past_key_values=cache)
    assert isinstance(cache.layers[1], LucidStaticLayer)
    full = torch.nn.functional.pad(left_padded, (0, 5))
    for i in range(9, 19):
        seen = full.clone()
        seen[:, i + 1 :] = 0  # one shape for all steps, as generate() has it
        logits = step(
            ids[:, i : i + 1],
            attention_mask=seen,
            position_ids=torch.full((2, 1), i),
            past_key_values=cache,
        ).logits
        torch.testing.assert_close(logits[:, 0], expected[:, i], **TOLERANCE)
    assert counter.frame_count == graphs


@torch.no_grad()
def test_a_compiled_chunk_after_a_past(build, ids, left_padded):
    model = enable(build("Llama"), layers=[1])  # layer 0 keeps softmax, over the same cache
    expected = model(ids, attention_mask=left_padded, use_cache=False).logits
    step = torch.compile(model, backend="eager", fullgraph=True)
    cache = StaticCache(model.config, max_cache_len=24)
    model(ids[:, :9], attention_mask=left_padded[:, :9], past_key_values=cache)
    logits = step(
        ids[:, 9:14],
        attention_mask=left_padded[:, :14],
        position_ids=torch.arange(9, 14).expand(2, -1),
        past_key_values=cache,
    ).logits
    torch.testing.assert_close(logits, expected[:, 9:14], **TOLERANCE)


def test_generate_compiles_its_static_cache(build, ids, left_padded):
    """Through generate() itself, whose decoding steps run through torch.compile."""
    from transformers import CompileConfig

    model = enable(build("Llama"))
    how = {"attention_mask": left_padded, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **how)
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # by default transformers compiles on accelerators only
    torch._dynamo.utils.counters.clear()
    actual = model.generate(ids, cache_implementation="static", compile_config=config, **how)
    assert torch.equal(actual, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_training_compiles_and_lengths_do_not_recompile_without_end(build, ids):
    model = enable(build("Llama"), strength="learned").train()
    twin = copy.deepcopy(model)
    counter = CompileCounter()
    step = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for length in (19, 11, 14):
        for m in (step, twin):
            m(ids[:, :length], labels=ids[:, :length], use_cache=False).loss.backward()
    assert counter.frame_count <= 2
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_compiled_packed_documents(build, ids):
    model = enable(build("Llama"))
    step = torch.compile(model, backend="eager", fullgraph=True)
    positions = torch.cat([torch.arange(7), torch.arange(1), torch.arange(11)]).expand(2, -1)
    expected = model(ids, position_ids=positions, use_cache=False).logits
    actual = step(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@torch.no_grad()
def test_a_schedule_does_not_recompile(build, ids):
    from lucid_attention.hf.strength import set_fixed_strength, strength_modules

    model = enable(build("Llama"), strength=0.0)
    for module in strength_modules(model):
        module.follow_schedule(2, torch.device("cpu"))
    counter = CompileCounter()
    step = torch.compile(model, backend=counter, fullgraph=True)
    for strength in (0.0, 0.25, 1.0):
        set_fixed_strength(model, strength)
        actual = step(ids, use_cache=False).logits
        expected = enable(build("Llama"), strength=strength)(ids, use_cache=False).logits
        torch.testing.assert_close(actual, expected, **TOLERANCE)
    assert counter.frame_count == 1


def test_a_4d_mask_cannot_be_compiled(build, ids):
    model = enable(build("Llama"))
    mask = torch.ones(19, 19).tril().bool().expand(2, 1, -1, -1)
    step = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"4-D mask cannot be checked inside torch.compile"):
        step(ids, attention_mask=mask, use_cache=False)


def test_packed_dropout_cannot_be_compiled(build, ids):
    model = enable(build("Llama", attention_dropout=0.1)).train()
    positions = torch.cat([torch.arange(9), torch.arange(10)]).expand(2, -1)
    step = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"packed documents with attention dropout"):
        step(ids, position_ids=positions, use_cache=False)
