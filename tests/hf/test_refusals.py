"""Models and settings that are not supported say so, by name and with a remedy."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from lucid_attention.hf import disable, enable, strengths
from lucid_attention.hf.eligibility import _UNSUPPORTED

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


QWEN3_NEXT = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


def refused(name: str, **settings) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **settings})
    for suffix in ("ForCausalLM", "Model"):
        if hasattr(transformers, name + suffix):
            return getattr(transformers, name + suffix)(config)
    raise AssertionError(name)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("Mistral", {"sliding_window": 8, "num_key_value_heads": 2}, "no layer.*sliding"),
        ("Phi3", {"sliding_window": 8}, "no layer.*sliding"),
        ("Bert", {}, "no layer|own attention"),
        ("T5", {"num_heads": 2, "d_model": 32, "d_kv": 16, "d_ff": 32}, "encoder-decoder"),
        ("Bloom", {}, "ignores custom attention"),
        ("Falcon", {}, "ignores custom attention"),
        ("Mpt", {"d_model": 32, "n_heads": 2, "n_layers": 2}, "own attention"),
        ("GPTJ", {"n_embd": 32, "n_head": 2, "n_layer": 2, "rotary_dim": 8}, "own attention"),
        ("DeepseekV3", {"num_key_value_heads": 2}, "latent attention"),
        ("DeepseekV2", {"num_key_value_heads": 2}, "latent attention"),
        ("DiffLlama", {"num_key_value_heads": 2}, "not supported.*value heads"),
        ("Doge", {"num_key_value_heads": 2}, "not supported.*mask"),
    ],
)
def test_models_that_cannot_be_enabled(name, settings, message):
    model = refused(name, **settings)
    with pytest.raises(ValueError, match=f"model: .*({message})"):
        enable(model)


def test_attn_implementation_lucid_refuses_the_same_models():
    with pytest.raises(ValueError, match=r"no layer that LUCID can take"):
        refused("Mistral", sliding_window=8, attn_implementation="lucid")


def test_a_composite_model():
    text = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"intermediate_size": 16, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=1
    )
    with pytest.raises(ValueError, match=r"composite.*text model"):
        enable(transformers.Gemma3ForConditionalGeneration(config))


def test_a_composite_model_around_a_lucid_one():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
        image_size=28,
        patch_size=14,
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SMALL), vision_config=vision
    )
    # `config` of the parts: here transformers, not enable, decides what is switched.
    wanted = {"text_config": "lucid", "vision_config": "sdpa"}
    with pytest.raises(ValueError, match=r"composite.*text model"):
        transformers.LlavaForConditionalGeneration._from_config(
            copy.deepcopy(config), attn_implementation=wanted
        )
    config.vision_config._attn_implementation = "sdpa"
    assert transformers.LlavaForConditionalGeneration(config)  # without LUCID it is untouched


def test_a_bidirectional_decoder():
    model = refused(
        "Gemma3Text", num_key_value_heads=2, head_dim=16, use_bidirectional_attention=True
    )
    with pytest.raises(ValueError, match=r"no layer.*not causal"):
        enable(model)


@pytest.mark.parametrize("function", [enable, disable, strengths])
def test_not_a_transformers_model(function):
    with pytest.raises(TypeError, match=r"model: expected a transformers PreTrainedModel.*Linear"):
        function(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([], ValueError, "layers: expected at least one.*disable"),
        ([4], ValueError, "layers: expected indices below 4"),
        ([-5], ValueError, "layers: expected indices below 4"),
        ([0], ValueError, r"layers: layer 0 is not a causal full-attention.*\[1, 3\]"),
        ([True], TypeError, "layers: expected integers"),
        (["1"], TypeError, "layers: expected integers"),
        ("all", TypeError, "layers: expected a list"),
        (1, TypeError, "layers: expected a list"),
    ],
)
def test_bad_layers(layers, error, message, build):
    with pytest.raises(error, match=message):
        enable(build("Gemma2"), layers=layers)


def test_layers_of_a_hybrid_model():
    """Negative indices count all layers; one without attention is told apart from none at all."""
    model = refused(
        "Qwen3Next",
        **{
            **QWEN3_NEXT,
            "layer_types": ["full_attention", "linear_attention"] * 2,
            "num_hidden_layers": 4,
        },
    )
    enable(model, layers=[-2])
    assert model.config.lucid["layers"] == [2]
    with pytest.raises(ValueError, match=r"layers: layer -1 has no self-attention.*\[0, 2\]"):
        enable(model, layers=[-1])
    with pytest.raises(ValueError, match=r"layers: expected indices below 4"):
        enable(model, layers=[4])


def test_bad_impl(build):
    with pytest.raises(ValueError, match=r"impl"):
        enable(build("Llama"), impl="fastest")


def test_impl_reaches_the_operator(build, ids):
    model = enable(build("Llama"), impl="reference")
    expected = enable(build("Llama"), impl="blocked")(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert model.model.layers[0].self_attn.lucid.impl == "reference"


def test_strengths_per_head_need_equal_heads(build):
    model = build("Llama")
    model.model.layers[1].self_attn.config = copy.deepcopy(model.config)
    model.model.layers[1].self_attn.config.num_key_value_heads = 1
    with pytest.raises(ValueError, match=r"strength: expected one number"):
        enable(model, strength=torch.ones(2))


# --- at run time -------------------------------------------------------------------------------


def test_attention_weights(build, ids):
    model = enable(build("Llama"))
    with pytest.raises(ValueError, match=r"output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"output_attentions"):
        model.config.output_attentions = True


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("StableLm", {"num_key_value_heads": 2}),
        ("Nemotron", {"num_key_value_heads": 2, "head_dim": 16}),
        ("OPT", {"ffn_dim": 32, "word_embed_proj_dim": 32}),
    ],
)
def test_families_that_drop_keyword_arguments(name, settings, ids):
    model = enable(refused(name, **settings))
    with pytest.raises(ValueError, match=rf"{name}Attention.*does not hand its keyword arguments"):
        model(ids)


def test_the_table_of_unsupported_families_names_real_ones():
    assert set(_UNSUPPORTED) <= set(transformers.models.auto.configuration_auto.CONFIG_MAPPING)


def test_an_implementation_set_after_construction(build, ids):
    model = build("Llama")
    model.set_attn_implementation("lucid")
    with pytest.raises(ValueError, match=r"call lucid_attention.hf.enable\(model\)"):
        model(ids)


def test_continuous_batching(build, ids):
    model = enable(build("Llama"))
    assert not model._supports_flash_attn
    with pytest.raises(ValueError, match=r"continuous batching.*not supported"):
        model.set_attn_implementation("paged|lucid")
    # In words of our own with transformers 5.17, of transformers' with 5.23.
    with pytest.raises(ValueError, match=r"not supported"):
        model.generate_batch(ids.tolist())
