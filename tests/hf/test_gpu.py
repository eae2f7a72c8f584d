"""What only a GPU shows: offloaded caches, CUDA graphs, bf16, no synchronisation while decoding."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import StaticCache

from lucid_attention.hf import LucidCache, enable
from lucid_attention.hf.cache import LucidLayer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def ids():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 96, (2, 70), generator=generator).cuda()


@pytest.fixture
def left_padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    return mask


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GptOss"])
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static", "static", "dynamic"])
def test_caches_agree(family, kind, build, ids, left_padded):
    model = enable(build(family)).cuda()
    how = {"attention_mask": left_padded, "max_new_tokens": 20, "min_new_tokens": 20}
    how |= {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, use_cache=False, **how)
    actual = model.generate(ids, cache_implementation=kind, disable_compile=True, **how)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(
        torch.stack(actual.logits), torch.stack(expected.logits), rtol=1e-3, atol=2e-3
    )
    layers = actual.past_key_values.layers
    assert [i for i, x in enumerate(layers) if isinstance(x, LucidLayer)] == model.config.lucid[
        "layers"
    ]


def test_an_offloaded_cache_continues(build, ids):
    model = enable(build("Llama", num_hidden_layers=4)).cuda()
    expected = model(ids, use_cache=False).logits
    cache = LucidCache(model.config, offloading=True)
    parts = ids.split([40, 1, 28, 1], dim=1)
    logits = [model(part, past_key_values=cache).logits for part in parts]
    assert any(layer.values.device.type == "cpu" for layer in cache.layers)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("family", ["Gemma2", "GptOss"])
def test_offloading_on_a_busy_gpu(family, build, ids):
    """Where the host is far ahead, a layer is brought back only after it is on the host, into memory that nobody reads.

    Of models whose sliding layers are stock ones: LUCID's own block until they are copied. Static caches passed without the order, too.
    """
    model = enable(build(family, num_hidden_layers=6)).cuda()
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}  # fmt: skip
    expected = model.generate(ids, use_cache=False, **how)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: torch.cuda._sleep(3_000_000))
    actual = model.generate(ids, cache_implementation="offloaded", disable_compile=True, **how)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=1e-3, atol=2e-3)  # fmt: skip


@pytest.mark.parametrize("family", ["Llama", "GptOss"])
def test_cuda_graphs(family, build, ids, left_padded):
    """generate() compiles the static cache's steps in mode "reduce-overhead" by itself."""
    model = enable(build(family)).cuda()
    how = {"attention_mask": left_padded, "max_new_tokens": 20, "min_new_tokens": 20}
    expected = model.generate(ids, do_sample=False, use_cache=False, **how)
    for _ in range(2):  # recorded, then replayed
        actual = model.generate(ids, do_sample=False, cache_implementation="static", **how)
        assert torch.equal(actual, expected)


def test_offloading_is_refused_in_a_compiled_step(build, ids):
    """Compiled, it would end the process, and a stock model's does."""
    model = enable(build("Llama")).cuda()
    with pytest.raises(ValueError, match="disable_compile=True"):
        model.generate(ids, cache_implementation="offloaded_static", max_new_tokens=3)


@torch.no_grad()
def test_bf16_is_as_close_as_softmax_is(build, ids):
    """Twice the error that the softmax twin makes in the same precision, plus a rounding band."""
    errors = {}
    for lucid in (False, True):
        stock = build("Llama", num_hidden_layers=4)
        model = (enable(stock) if lucid else stock).bfloat16()
        exact = copy.deepcopy(model).double().cuda()
        model.cuda()
        expected = exact(ids, use_cache=False).logits
        actual = model(ids, use_cache=False).logits.double()
        errors[lucid] = ((actual - expected).norm() / expected.norm()).item()
        cache, parts = None, []
        for part in ids.split([50, 10, 10], dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits.double())
        cached = ((torch.cat(parts, 1) - expected).norm() / expected.norm()).item()
        assert cached < 2 * errors[lucid] + 4e-3
    assert errors[True] < 2 * errors[False] + 4e-3, errors


@torch.no_grad()
def test_a_decoding_step_does_not_synchronise(build, ids):
    model = enable(build("Llama"), strength=0.5).cuda()
    cache = StaticCache(model.config, max_cache_len=96)
    model(ids, past_key_values=cache)
    step = torch.compile(model, backend="eager", fullgraph=True)
    arguments = {
        "attention_mask": (torch.arange(96) <= 70).long().expand(2, -1).cuda(),
        "position_ids": torch.full((2, 1), 70).cuda(),
        "past_key_values": cache,
    }
    step(ids[:, :1], **arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(ids[:, :1], **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_in_bf16_with_fp32_strengths(build, ids):
    model = enable(build("Gemma3Text"), strength="learned").bfloat16().cuda().train()
    loss = model(ids, labels=ids).loss
    loss.backward()
    theta = model.model.layers[1].self_attn.lucid.strength_bias
    assert theta.is_cuda and theta.dtype == theta.grad.dtype == torch.float32
    assert loss.isfinite() and theta.grad.abs().max() > 0
