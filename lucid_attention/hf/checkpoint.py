"""Checkpoints that say they are LUCID.

transformers strips the attention implementation on save, so a stock model with
`attn_implementation="lucid"` would reload as softmax without a word. Here every LUCID model is an
instance of a thin subclass of its stock class, made by one factory, whose config writes the marker

    "attn_implementation": "lucid", "lucid": {"layers": [...], "strength": ...[, "kernel_scale": ...]}

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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
    "SmolLM3Config": "lucid_smollm3",
}
_MADE: dict[type, Any] = {}  # stock class -> LUCID class
_REGISTERED: set[Any] = set()
_MODELS = {
    "Model": "AutoModel",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}
_PREFIX = "Lucid"


def other_attention(value: Any) -> ValueError:
    """The error for a LUCID checkpoint or model that is about to run with other attention."""
    return ValueError(
        f'attn_implementation: expected "lucid" for a LUCID model, got {value!r}, which would read '
        "its weights with other attention; leave attn_implementation out, and to go back to "
        "softmax on purpose call lucid_attention.hf.disable(model) on the loaded model"
    )


class LucidConfigMixin:
    """What every LUCID config adds to its stock class: the marker, and that it cannot be undone."""

    lucid_stock_class: ClassVar[type[PreTrainedConfig]]

    @property
    def _attn_implementation_internal(self) -> str:
        return IMPLEMENTATION

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, value: str | None) -> None:
        if value not in (None, IMPLEMENTATION):
            raise other_attention(value)

    @property
    def output_attentions(self) -> bool:
        return False

    @output_attentions.setter
    def output_attentions(self, value: bool | None) -> None:
        if value:
            raise ValueError(
                "output_attentions: attention weights are never formed with LUCID attention; "
                "expected False, got True; call lucid_attention.hf.disable(model, 'eager') on the "
                "loaded model to see the weights of its softmax twin"
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduce(self, super().__reduce_ex__(protocol))

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
        if str(attn_implementation).startswith("paged|"):
            raise ValueError(
                f'attn_implementation: expected "lucid" for a LUCID model, got '
                f"{attn_implementation!r}; continuous batching (paged attention) is not supported "
                "with LUCID attention; use generate() with the default or the static cache"
            )
        if attn_implementation not in (None, IMPLEMENTATION):
            raise other_attention(attn_implementation)
        return IMPLEMENTATION

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduce(self, super().__reduce_ex__(protocol))

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
    tested = getattr(transformers, stock.__name__, None) is stock
    model_type = FAMILIES.get(stock.__name__) if tested else None
    made: type[PreTrainedConfig] = _subclass(
        stock, LucidConfigMixin, model_type=model_type or stock.model_type
    )
    return made


def lucid_model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The LUCID subclass of a stock model class; the class itself if it is one already."""
    if issubclass(stock, LucidModelMixin):
        return stock
    config_class = lucid_config_class(stock.config_class)
    made: type[PreTrainedModel] = _subclass(stock, LucidModelMixin, config_class=config_class)
    if stock.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        # By this list of names the Trainer tells whether to shift the labels (label smoothing), and
        # the text-generation pipeline whether a model can generate. Its keys are model types; this
        # one is nobody's.
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[made.__name__] = made.__name__
    return made


def _subclass(stock: type, mixin: type, **attributes: Any) -> Any:
    if stock not in _MADE:
        name = _PREFIX + stock.__name__
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
        _MADE[stock] = made
        globals()[name] = made  # where `from ... import LucidLlamaForCausalLM` looks
    return _MADE[stock]


def _reduce(instance: Any, reduced: Any) -> Any:
    """Pickles a LUCID object by its stock class: the LUCID one of a user's class is made on demand,
    and another process has not made it yet.
    """
    kind = type(instance)
    if _MADE.get(kind.lucid_stock_class) is not kind:
        return reduced  # a class that was derived from a LUCID one
    return (_new_instance, (kind.lucid_stock_class,), *reduced[2:])


def _new_instance(stock: Any) -> Any:
    model = issubclass(stock, PreTrainedModel)
    made: Any = lucid_model_class(stock) if model else lucid_config_class(stock)
    return made.__new__(made)


def __getattr__(name: str) -> Any:
    """Makes the class of an untested family when it is imported by its name."""
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
        register_models(config_class)


def register_models(config_class: Any) -> None:
    """Lets the Auto classes build models from a LUCID config, for any family."""
    if config_class in _REGISTERED:
        return
    _REGISTERED.add(config_class)
    family = config_class.lucid_stock_class.__name__.removesuffix("Config")
    for suffix, auto_name in _MODELS.items():
        # Gemma3TextConfig belongs to Gemma3TextModel but to Gemma3ForCausalLM.
        names = (family + suffix, family.removesuffix("Text") + suffix)
        stock = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)
        if stock is not None and issubclass(stock.config_class, config_class.lucid_stock_class):
            auto = getattr(transformers, auto_name)
            auto.register(config_class, lucid_model_class(stock), exist_ok=True)
