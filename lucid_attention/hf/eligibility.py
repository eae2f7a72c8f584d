"""Which models and which of their layers LUCID can take, and why not the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .attention import warn_once
from .checkpoint import FAMILIES

# Families that do something to the values between the cache and the attention function, or share
# one layer's cache with others: `Y` would be cached at the wrong place.
_UNSUPPORTED = {
    "diffllama": "it combines pairs of value heads after the cache",
    "doge": "it adds a learned mask to the attention scores",
    "gemma3n_text": "its layers share key-value caches",
    "gemma4_text": "its layers share key-value caches",
    "gemma4_unified_text": "its layers share key-value caches",
    "idefics": "it mixes cross-attention layers in",
    "jetmoe": "it repeats values after the cache",
    "mllama_text_model": "it mixes cross-attention layers in",
}


def pretrained_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, or the one inside a PEFT model; TypeError for anything else."""
    wrapper: Any = model
    inner = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"model: expected a transformers PreTrainedModel or a PEFT model around one, got "
            f"{type(inner).__name__}; call this before wrapping the model in FSDP, DDP or compile"
        )
    return inner


def refuse_composite(model: PreTrainedModel) -> None:
    """Raises ValueError for models in which LUCID attention would not be causal self-attention."""
    config, name = model.config, type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model: expected a decoder-only model, got {name}, an encoder-decoder: LUCID is "
            "defined for causal self-attention"
        )
    if config.get_text_config(decoder=True) is not config:
        raise ValueError(
            f"model: expected a text decoder, got {name}, a composite (multimodal) model whose "
            "masks are not causal for all tokens; load its text model alone"
        )


def attention_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The self-attention modules by layer index, or the reason why there are none to switch."""
    config, name = model.config, type(model).__name__
    refuse_composite(model)
    if config.model_type in _UNSUPPORTED:
        raise ValueError(
            f"model: {name} is not supported with LUCID attention: {_UNSUPPORTED[config.model_type]}"
        )
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(
            f"model: {name} uses multi-head latent attention (MLA), whose cache holds a compressed "
            "latent in place of keys and values; LUCID needs a model that caches keys and values"
        )
    stock = getattr(type(model), "lucid_stock_class", type(model))
    if not stock._can_set_attn_implementation():
        raise ValueError(
            f"model: {name} has its own attention code and ignores custom attention functions; "
            "LUCID needs a model that follows transformers' AttentionInterface"
        )
    found: dict[int, nn.Module] = {}
    for module in model.base_model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "scaling") and hasattr(module, "is_causal"):
            if index in found:
                raise ValueError(
                    f"model: {name} has two attention modules in layer {index}; LUCID needs a "
                    "decoder with one self-attention in each layer"
                )
            found[index] = module
    return dict(sorted(found.items()))


def eligible_layers(model: PreTrainedModel, attention: dict[int, nn.Module]) -> list[int]:
    config = model.config
    types = getattr(config, "layer_types", None)
    eligible = []
    for index, module in attention.items():
        if types is not None:
            full = types[index] == "full_attention"
        else:
            full = not (
                getattr(config, "sliding_window", None)
                or getattr(config, "attention_chunk_size", None)
            )
        if full and module.is_causal:
            eligible.append(index)
    if not eligible:
        kinds = sorted(set(types)) if types else ["sliding window"] if attention else []
        causal = all(module.is_causal for module in attention.values())
        raise ValueError(
            f"model: {type(model).__name__} has no layer that LUCID can take: expected causal "
            f"full-attention layers, got {kinds or 'no attention layers it can recognise'}"
            + ("" if causal else ", not causal (an encoder)")
            + "; choose a model with full attention, or set sliding_window=None in its config"
        )
    return eligible


def chosen_layers(
    layers: Iterable[int] | None,
    eligible: list[int],
    attention: dict[int, nn.Module],
    number: int,
) -> list[int]:
    """The layers that a user named, of a decoder with `number` layers, checked and sorted."""
    if layers is None:
        return eligible
    if isinstance(layers, (str, int)) or not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected a list of layer indices or None, got {layers!r}")
    chosen = set()
    for index in layers:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"layers: expected integers, got {index!r}")
        wrapped = index + number if index < 0 else index
        if not 0 <= wrapped < number:
            raise ValueError(f"layers: expected indices below {number} (the layers), got {index}")
        if wrapped not in attention:
            raise ValueError(
                f"layers: layer {index} has no self-attention; the layers that can be switched are "
                f"{eligible}"
            )
        if wrapped not in eligible:
            raise ValueError(
                f"layers: layer {index} is not a causal full-attention layer; the layers that can "
                f"be switched are {eligible}"
            )
        chosen.add(wrapped)
    if not chosen:
        raise ValueError(
            "layers: expected at least one layer index, got none; disable(model) goes back to softmax"
        )
    return sorted(chosen)


def warn_if_untested(model: PreTrainedModel) -> None:
    stock = getattr(type(model.config), "lucid_stock_class", type(model.config)).__name__
    if stock not in FAMILIES:
        warn_once(
            f"untested {stock}",
            f"LUCID attention is not tested with {type(model).__name__}; tested families: "
            f"{', '.join(name.removesuffix('Config') for name in FAMILIES)}. Compare its logits "
            "with and without a cache before relying on it.",
        )
