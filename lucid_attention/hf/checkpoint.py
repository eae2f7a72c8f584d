"""Checkpoints that say they are LUCID.

transformers strips the attention implementation on save, so a stock model with
`attn_implementation="lucid"` would reload as softmax without a word. Here every LUCID model is an
instance of a thin subclass of its stock class, made by one factory, whose config writes the marker

    "attn_implementation": "lucid", "lucid": {"layers": [...], "strength": ...}

A process without this package then fails to load it (the implementation is unknown to it, and for
the families below so is `model_type`, "lucid_llama" and so on). The tested families are registered
with the Auto classes; other families keep their `model_type` and load as stock models that become
LUCID when constructed (`install_in_transformers`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .strength import LearnedStrength

IMPLEMENTATION = "lucid"

# Stock config class -> model_type of the LUCID checkpoint. Every one is tested with random models.
FAMILIES = {
    "LlamaConfig": "lucid_llama",
    "MistralConfig": "lucid_mistral",
    "Qwen2Config": "lucid_qwen2",
    "Qwen3Config": "lucid_qwen3",
    "Gemma2Config": "lucid_gemma2",
    "Gemma3TextConfig": "lucid_gemma3_text",
    "GptOssConfig": "lucid_gpt_oss",
    "OlmoConfig": "lucid_olmo",
    "Olmo2Config": "lucid_olmo2",
    "Phi3Config": "lucid_phi3",
}
_MODELS = {
    "Model": "AutoModel",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
}
_PREFIX = "Lucid"


class LucidConfigMixin:
    """What every LUCID config adds to its stock class: the marker, and that it cannot be undone."""

    lucid_stock_class: ClassVar[type[PreTrainedConfig]]

    @property
    def _attn_implementation_internal(self) -> str:
        return IMPLEMENTATION

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, value: str | None) -> None:
        if value not in (None, IMPLEMENTATION):
            raise ValueError(
                f'attn_implementation: expected "lucid" for a LUCID model, got {value!r}, which '
                "would read its weights with other attention; to go back to softmax on purpose "
                "call lucid_attention.hf.disable(model) on the loaded model"
            )

    def to_dict(self) -> dict[str, Any]:
        output: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        output["attn_implementation"] = IMPLEMENTATION
        return output


class LucidModelMixin:
    """What every LUCID model adds to its stock class."""

    lucid_stock_class: ClassVar[type[PreTrainedModel]]
    # Continuous batching replaces an implementation it does not know by flash attention, with only
    # a warning, in models that support flash.
    _supports_flash_attn = False

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        if attn_implementation not in (None, IMPLEMENTATION):
            paged = str(attn_implementation).startswith("paged|")
            raise ValueError(
                f'attn_implementation: expected "lucid" for a LUCID model, got '
                f"{attn_implementation!r}; "
                + (
                    "continuous batching (paged attention) is not supported with LUCID attention; "
                    "use generate() with the default or the static cache"
                    if paged
                    else "to go back to softmax call lucid_attention.hf.disable(model)"
                )
            )
        return IMPLEMENTATION

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LearnedStrength):
            # Through transformers' guarded function: it leaves a parameter alone that was loaded.
            init.copy_(module.strength_bias, module.initial_values())
        else:
            super()._init_weights(module)  # type: ignore[misc]


def lucid_config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The LUCID subclass of a stock config class; the class itself if it is one already."""
    if issubclass(stock, LucidConfigMixin):
        return stock
    return _subclass(
        stock, LucidConfigMixin, model_type=FAMILIES.get(stock.__name__, stock.model_type)
    )


def lucid_model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The LUCID subclass of a stock model class; the class itself if it is one already."""
    if issubclass(stock, LucidModelMixin):
        return stock
    return _subclass(stock, LucidModelMixin, config_class=lucid_config_class(stock.config_class))


def _subclass(stock: type, mixin: type, **attributes: Any) -> Any:
    name = _PREFIX + stock.__name__
    made = globals().get(name)
    if made is None or made.lucid_stock_class is not stock:
        made = type(
            name,
            (mixin, stock),
            {
                "__module__": __name__,
                "__doc__": f"`{stock.__name__}` with LUCID attention, see `lucid_attention.hf.enable`.",
                "lucid_stock_class": stock,
                **attributes,
            },
        )
        globals()[name] = made  # where pickle and `from ... import LucidLlamaForCausalLM` look
    return made


def __getattr__(name: str) -> Any:
    """Makes the class of an untested family when it is unpickled in another process."""
    stock = getattr(transformers, name.removeprefix(_PREFIX), None)
    if name.startswith(_PREFIX) and isinstance(stock, type):
        if issubclass(stock, PreTrainedModel):
            return lucid_model_class(stock)
        if issubclass(stock, PreTrainedConfig):
            return lucid_config_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register_families() -> None:
    """Registers the tested families with transformers' Auto classes."""
    for stock_name, model_type in FAMILIES.items():
        config_class = lucid_config_class(getattr(transformers, stock_name))
        AutoConfig.register(model_type, config_class, exist_ok=True)
        family = stock_name.removesuffix("Config")
        for suffix, auto_name in _MODELS.items():
            # Gemma3TextConfig belongs to Gemma3TextModel but to Gemma3ForCausalLM.
            names = (family + suffix, family.removesuffix("Text") + suffix)
            stock = next(
                (getattr(transformers, n) for n in names if hasattr(transformers, n)), None
            )
            if stock is not None and issubclass(stock.config_class, config_class.lucid_stock_class):
                auto = getattr(transformers, auto_name)
                auto.register(config_class, lucid_model_class(stock), exist_ok=True)
