"""Forward passes and gradients of enabled models equal the dense definition."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, StaticCache

from lucid_attention.hf import LucidCache, disable, enable
from tests.conftest import Asked

LLAMA4 = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "intermediate_size_mlp": 48,
    "attention_chunk_size": 6,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
}
TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}  # fp32, logits of order 1 to 10


def close(actual: Tensor, expected: Tensor, **kwargs) -> None:
    torch.testing.assert_close(actual, expected, **{**TOLERANCE, **kwargs})


def test_forward_and_gradients_equal_the_dense_definition(family, build, dense_twin, ids):
    stock = build(family)
    twin, model = dense_twin(stock), enable(copy.deepcopy(stock))
    softmax = stock(ids).logits
    expected, actual = twin(ids, use_cache=False), model(ids, use_cache=False)
    close(actual.logits, expected.logits)
    assert (actual.logits - softmax).abs().max() > 0.05  # LUCID is not the softmax model

    twin(ids, labels=ids, use_cache=False).loss.backward()
    model(ids, labels=ids, use_cache=False).loss.backward()
    wanted = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    assert len(wanted) > 10
    for name, parameter in model.named_parameters():
        if name in wanted:
            scale = wanted[name].abs().max().item()
            close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-4 * scale + 1e-7)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_the_dense_definition(family, side, build, dense_twin, ids):
    stock = build(family)
    twin, model = dense_twin(stock), enable(copy.deepcopy(stock))
    mask = torch.ones_like(ids)
    mask[0, slice(0, 6) if side == "left" else slice(-6, None)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    arguments = {"attention_mask": mask, "position_ids": positions}
    expected = twin(ids, use_cache=False, **arguments).logits
    for use_cache in (False, True):
        actual = model(ids, use_cache=use_cache, **arguments).logits
        close(actual[mask.bool()], expected[mask.bool()])
    alone = model(ids[:1][:, mask[0].bool()]).logits
    close(actual[0][mask[0].bool()], alone[0])


def test_packed_documents_equal_separate_ones(family, build, dense_twin, ids):
    stock = build(family)
    twin, model = dense_twin(stock), enable(copy.deepcopy(stock))
    lengths = [7, 1, 11]
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    actual = model(ids, position_ids=positions, use_cache=False).logits
    if family != "GptOss":  # transformers' GPT-OSS does not tell its masks about packing
        close(actual, twin(ids, position_ids=positions, use_cache=False).logits)
    apart = [model(part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
    close(actual, torch.cat(apart, dim=1))
    assert (actual - model(ids, use_cache=False).logits).abs().max() > 0.05


def test_the_flattening_collator(build, ids):
    """The packing of transformers: position_ids, and on request the offsets beside them."""
    model = enable(build("Gemma2"))
    rows = [{"input_ids": part.tolist()} for part in ids.flatten().split([7, 1, 30])]
    apart = [model(torch.tensor([row["input_ids"]]), use_cache=False).logits for row in rows]
    for offsets in (False, True):
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=offsets)
        batch = collator(rows)
        assert ("cu_seq_lens_q" in batch) == offsets
        output = model(**batch, use_cache=False)
        close(output.logits, torch.cat(apart, dim=1))
        assert output.loss.isfinite()


def test_packed_gradients_with_padding_in_a_4d_mask(build, dense_twin, ids):
    stock = build("Llama")
    twin, model = dense_twin(stock), enable(copy.deepcopy(stock))
    documents = torch.tensor([0] * 6 + [1] * 8 + [2] * 5)
    real = torch.ones(2, 19, dtype=torch.bool)
    real[0, 6:8] = False  # padding in front of a packed document
    real[1, -3:] = False
    allowed = (documents[:, None] == documents) & torch.ones(19, 19).tril().bool()
    mask = (allowed & real[:, None, :])[:, None]
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = twin(ids, attention_mask=additive, use_cache=False).logits
    expected[real].pow(2).sum().backward()
    wanted = [p.grad for p in twin.parameters()]
    for given in (mask, additive, additive.masked_fill(~mask, float("-inf"))):
        model.zero_grad()
        actual = model(ids, attention_mask=given, use_cache=False).logits
        close(actual[real], expected[real])
        actual[real].pow(2).sum().backward()
        for parameter, grad in zip(model.parameters(), wanted, strict=True):
            close(parameter.grad, grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item())


def test_masks_are_remembered_together_with_what_was_made_of_them(build, ids):
    """They are found by the tensor's id, which another tensor takes over when the first is freed."""
    contexts = []

    def remember(module, arguments, kwargs, output):
        contexts.append(kwargs["lucid_context"])

    positions = torch.cat([torch.arange(9), torch.arange(10)]).expand(2, -1)
    mask = torch.ones(19, 19).tril().bool()[None, None]
    for family, arguments in (
        ("Llama", {"attention_mask": mask}),
        ("GptOss", {"position_ids": positions}),
    ):
        model = enable(build(family))
        model.model.layers[0].self_attn.register_forward_hook(remember, with_kwargs=True)
        model(ids, use_cache=False, **arguments)
    kept = {**contexts[0].masks, **contexts[1].local_masks}
    assert contexts[0].masks and contexts[1].local_masks
    assert all(id(entry[0]) == key for key, entry in kept.items())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_gradient_checkpointing(reentrant, use_cache, build, ids):
    model = enable(build("Llama"), strength="learned").train()
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(ids, labels=ids, use_cache=use_cache).loss.backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)


def test_gradients_flow_through_the_cache(build, ids):
    model = enable(build("Llama"), strength=0.7)
    model(ids).logits.pow(2).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    first = model(ids[:, :8], use_cache=True)
    second = model(ids[:, 8:], past_key_values=first.past_key_values)
    torch.cat([first.logits, second.logits], 1).pow(2).sum().backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        close(parameter.grad, grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item())


def test_only_the_named_layers_change(build, dense_twin, ids):
    for family, layers in (("Llama", [1]), ("Gemma2", [3]), ("GptOss", [-1])):
        stock = build(family)
        model = enable(copy.deepcopy(stock), layers=layers)
        chosen = [index % stock.config.num_hidden_layers for index in layers]
        assert model.config.lucid["layers"] == chosen
        close(model(ids).logits, dense_twin(stock, chosen)(ids, use_cache=False).logits)


@pytest.mark.parametrize("strength", [0.35, [0.9, 0.1]])
def test_strengths_equal_the_dense_definition(strength, build, dense_twin, ids):
    stock = build("Llama")
    twin = dense_twin(stock, strength=strength)
    value = torch.tensor(strength) if isinstance(strength, list) else strength
    close(enable(stock, strength=value)(ids).logits, twin(ids, use_cache=False).logits)


@pytest.mark.parametrize("scale", [0.05, 0.9])
def test_kernel_scales_equal_the_dense_definition(scale, build, dense_twin, ids):
    """Whole, in chunks and packed; enabling again puts the usual one back."""
    stock = build("Llama")
    expected = dense_twin(stock, strength=0.8, kernel_scale=scale)(ids, use_cache=False).logits
    usual = dense_twin(stock)(ids, use_cache=False).logits
    assert (expected - usual).abs().max() > 0.01
    model = enable(stock, strength=0.8, kernel_scale=scale)
    close(model(ids, use_cache=False).logits, expected)
    for cache in (LucidCache(model.config), StaticCache(model.config, max_cache_len=24)):
        parts = [model(x, past_key_values=cache).logits for x in ids.split([7, 1, 1, 10], dim=1)]
        close(torch.cat(parts, 1), expected)
    packed = model(ids.reshape(1, -1), position_ids=torch.arange(19).repeat(2)[None], use_cache=False)  # fmt: skip
    close(packed.logits.view_as(expected), expected)
    close(enable(model)(ids, use_cache=False).logits, usual)
    assert "kernel_scale" not in model.config.lucid


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (0.0, ValueError, "kernel_scale must be positive, got 0"),
        (float("inf"), ValueError, "kernel_scale must be finite"),
        ("0.1", TypeError, "kernel_scale must be a Python float"),
        (torch.tensor(0.1), TypeError, "kernel_scale must be a Python float"),
    ],
)
def test_bad_kernel_scales(scale, error, message, build):
    model = build("Llama")
    with pytest.raises(error, match=message):
        enable(model, kernel_scale=scale)
    assert type(model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("strength", [0.0, "learned"])
def test_strength_zero_is_the_softmax_model(family, strength, build, dense_twin, ids):
    stock = build(family)
    expected = dense_twin(stock, layers=[])(ids, use_cache=False).logits
    close(enable(stock, strength=strength)(ids).logits, expected, rtol=1e-5, atol=2e-5)


def test_sliding_layers_are_the_stock_ones(build, ids):
    """With the LUCID layer at strength 0 everything else must be the eager stock model."""
    for family in ("Gemma2", "Gemma3Text", "GptOss"):
        stock = build(family)
        stock.set_attn_implementation("eager")
        expected = stock(ids).logits
        model = enable(stock, strength=0.0)
        close(model(ids).logits, expected, rtol=1e-5, atol=2e-5)
        close(model(ids, use_cache=False).logits, expected, rtol=1e-5, atol=2e-5)


def test_chunked_layers_are_the_stock_ones(build, ids):
    """Llama 4: chunked layers beside full ones without RoPE."""
    stock = build("Llama4Text", **LLAMA4)
    assert stock.config.layer_types == ["chunked_attention"] * 3 + ["full_attention"]
    stock.set_attn_implementation("eager")
    for parameter in stock.parameters():  # its experts are left uninitialised
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    expected = stock(ids).logits
    model = enable(stock, strength=0.0)
    close(model(ids).logits, expected, rtol=1e-5, atol=2e-5)
    enable(model)
    assert model.config.lucid["layers"] == [3]
    whole = model(ids, use_cache=False).logits
    assert (whole - expected).abs().max() > 0.05
    cache = LucidCache(model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([7, 1, 1, 10], dim=1)]
    close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("family", ["Gemma2", "GptOss"])
def test_softcap_and_sinks_change_the_result(family, build, ids):
    """Guards the comparisons above: without its softcap or sinks the model answers otherwise."""
    model = enable(build(family))
    before = model(ids).logits
    for layer in model.model.layers:
        if family == "Gemma2":
            layer.self_attn.attn_logit_softcapping = None
        else:
            torch.nn.init.constant_(layer.self_attn.sinks, -1e4)
    assert (model(ids).logits - before).abs().max() > 0.01


def test_kernel_scale_ignores_the_softmax_scale(build, ids):
    """Gemma's softmax scale differs from 1/sqrt(D); the preconditioner's does not follow it."""
    model = enable(build("Gemma3Text"), layers=[1])
    attention = model.model.layers[1].self_attn
    assert attention.scaling != model.config.head_dim**-0.5
    logits, values = [], []
    for scaling in (attention.scaling, 0.9):
        attention.scaling = scaling
        output = model(ids, use_cache=True)
        logits.append(output.logits)
        values.append(output.past_key_values.layers[1].values)  # Y
    assert torch.equal(*values) and (logits[0] - logits[1]).abs().max() > 0.01


def test_attention_dropout_is_honoured(build, ids):
    model = enable(build("Llama", attention_dropout=0.5)).train()
    torch.manual_seed(0)
    first = model(ids).logits
    second = model(ids).logits
    assert not torch.equal(first, second)
    packed = torch.cat([torch.arange(9), torch.arange(10)]).expand(2, -1)
    assert not torch.equal(
        model(ids, position_ids=packed, use_cache=False).logits,
        model(ids, position_ids=packed, use_cache=False).logits,
    )
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_dropout_with_softcap_is_refused(build, ids):
    model = enable(build("Gemma2", attention_dropout=0.5)).train()
    with pytest.raises(ValueError, match=r"dropout"):
        model(ids)


def test_fully_padded_rows_are_finite(build, ids):
    model = enable(build("Llama"))
    mask = torch.ones_like(ids)
    mask[0] = 0
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    close(logits[1], model(ids[1:]).logits[0])


def test_autocast_keeps_the_strength_in_fp32(build, ids):
    model = enable(build("Llama"), strength=torch.full((2, 2), 1e-3)).train()
    model = enable(model, strength="learned")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    theta = model.model.layers[0].self_attn.lucid.strength_bias
    assert theta.dtype == theta.grad.dtype == torch.float32
    assert theta.grad.isfinite().all() and theta.grad.abs().max() > 0


def test_disable_returns_the_stock_model(build, ids):
    stock = build("Gemma2")
    expected, kind = stock(ids).logits, type(stock)
    model = disable(enable(stock), attn_implementation="eager")
    assert type(model) is kind and type(model.model).__name__ == "Gemma2Model"
    assert not hasattr(model.config, "lucid") and model.config.model_type == "gemma2"
    stock.set_attn_implementation("eager")
    assert torch.equal(model(ids).logits, stock(ids).logits)
    assert expected.shape == model(ids).logits.shape
    assert not model.model._forward_hooks and not model.model._forward_hooks_always_called
    with pytest.raises(ValueError, match=r"expected a LUCID model"):
        disable(model)


def test_a_failed_disable_changes_nothing(build, ids):
    model = enable(build("Llama"), strength=torch.tensor([0.25, 0.5]))
    expected, kind = model(ids).logits, type(model)
    for name, message in (("nonsense", "nonsense"), ("lucid", r'expected softmax.*got "lucid"')):
        with pytest.raises(ValueError, match=message):
            disable(model, name)
        assert type(model) is kind and type(model.model).__name__ == "LucidLlamaModel"
        assert model.config._attn_implementation == "lucid"
        assert torch.equal(model(ids).logits, expected)


def test_enabling_again_replaces_the_setting(build, dense_twin, ids):
    stock = build("Llama")
    model = enable(copy.deepcopy(stock), strength=0.3, layers=[0])
    enable(model, layers=[1])
    assert not hasattr(model.model.layers[0].self_attn, "lucid")
    assert len(model.model._forward_pre_hooks) == 1
    close(model(ids).logits, dense_twin(stock, [1])(ids, use_cache=False).logits)


def test_the_config_passed_in_is_not_changed(build, ids):
    model = build("Llama")
    config = model.config
    enable(model)
    assert type(config).__name__ == "LlamaConfig" and not hasattr(config, "lucid")
    assert type(type(model).lucid_stock_class(config)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_other_heads(head, build, ids):
    import transformers

    config = build("Qwen3").config
    model = getattr(transformers, f"Qwen3{head}")(config).eval()
    before = model(ids)[0]
    enable(model)
    assert type(model).__name__ == f"LucidQwen3{head}"
    assert not torch.equal(model(ids)[0], before)


def test_precision_reaches_every_operator(build, ids):
    model = enable(build("Llama"), precision="high")
    packed = {"input_ids": ids.reshape(1, -1), "position_ids": torch.arange(19).repeat(2)[None]}
    with Asked() as asked:
        model(ids, labels=ids, use_cache=False).loss.backward()
        model(**packed, use_cache=False).logits.sum().backward()
        with torch.no_grad():
            cache = model(ids[:, :10], use_cache=True).past_key_values
            model(ids[:, 10:], past_key_values=cache)
    assert len(asked.precisions) == 4
    assert set().union(*asked.precisions.values()) == {"high"}
    enable(model)
    with Asked() as asked, torch.no_grad():
        model(ids, use_cache=False)
    assert asked.precisions == {"precondition": {"default"}}
    with pytest.raises(ValueError, match="precision must be one of"):
        enable(model, precision="low")


def test_a_static_cache_is_read_as_far_as_it_is_written(build, ids):
    """A prompt has no past, whatever room there is behind it."""
    model = enable(build("Llama"))
    expected = model(ids, use_cache=False).logits
    cache = StaticCache(model.config, max_cache_len=64)
    with Asked() as asked, torch.no_grad():
        parts = [model(x, past_key_values=cache).logits for x in ids.split([9, 7, 3], dim=1)]
    assert asked.pasts == [0, 0, 9, 9, 16, 16]  # two layers
    close(torch.cat(parts, 1), expected)
