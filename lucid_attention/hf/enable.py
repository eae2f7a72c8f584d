"""`enable`: one line that switches a decoder to LUCID attention, and `disable`, the way back."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lucid_attention.precondition.validation import resolve_impl, resolve_precision, resolve_scale

from .attention import warn_once
from .checkpoint import (
    IMPLEMENTATION,
    LucidConfigMixin,
    LucidModelMixin,
    lucid_config_class,
    lucid_model_class,
    other_attention,
    register_models,
)
from .eligibility import (
    attention_layers,
    chosen_layers,
    eligible_layers,
    pretrained_model,
    refuse_composite,
    warn_if_untested,
)
from .hook import after_forward, before_forward
from .strength import (
    SUBMODULE,
    FixedStrength,
    LearnedStrength,
    kv_heads_of,
    parse_strength,
    per_layer,
    strength_modules,
)

__all__ = ["disable", "enable", "strengths"]


def enable(
    model: nn.Module,
    *,
    layers: Iterable[int] | None = None,
    strength: float | str | Tensor | None = None,
    kernel_scale: float | None = None,
    precision: str = "default",
    impl: str = "auto",
) -> nn.Module:
    """Switches a decoder model to LUCID attention, in place, for training and for inference.

    In its LUCID layers the model then computes `softmax(scale Q K^T + causal) Y` with
    `Y = L^-1 V`, see `lucid_attention.precondition`; the other layers stay as they are. The model
    becomes an instance of a LUCID subclass of its own class (`LucidLlamaForCausalLM`), with a copy
    of its config, so `save_pretrained` and `from_pretrained` keep LUCID, its layers and strengths.
    Calling it again replaces the whole setting; `disable(model)` goes back to softmax.

    Args:
        model: a transformers decoder (causal LM, base model, classification head, ...), loaded or
            fresh, or a PEFT model around one. Pass the outermost model, before FSDP or DDP wrap it.
        layers: indices of the layers to switch (negative ones count from the end); None: every
            full-attention layer. Sliding-window and chunked layers cannot be switched.
        strength: `b` in `L_b = I + b * strictly-lower(P)`. None: 1, LUCID. A number in [0, 1]; 0 is
            softmax exactly. A tensor `(kv_heads,)` or `(LUCID layers, kv_heads)`. "learned": one
            trained parameter per KV head, starting from the model's present strength, which is 0
            for a softmax model, so that its loss does not jump. See also `StrengthSchedule`.
        kernel_scale: of the preconditioner, as for `lucid_attention.precondition`; None is `1/sqrt(D)`.
            Smaller ones let keys answer for keys that are less alike; towards 0 the values are
            differences, `y_n = v_n - v_(n-1)`, whatever the keys.
        precision: of the preconditioner, as for `lucid_attention.precondition`, where it has its price: later chunks of a
            prompt (and all of it in a static cache within a graph) are computed in float32 with "high", the few
            tokens of a decoding step on a GPU as with "default". It is not saved.
        impl: of the preconditioner, as for `lucid_attention.precondition`. It is not saved.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a transformers model, or an argument has another type.
        ValueError: the model has no layer that LUCID can take, or is of an unsupported kind
            (encoder, encoder-decoder, multimodal, MLA, own attention code); `layers`, `strength`, `precision` or
            `impl` out of range; a learned strength in a PEFT model that would not train it.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lucid_attention.hf import enable
        >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=2, num_attention_heads=2)
        >>> model = enable(LlamaForCausalLM(config), layers=[1], strength=0.5)
        >>> type(model).__name__, model.config.lucid
        ('LucidLlamaForCausalLM', {'layers': [1], 'strength': 0.5})
    """
    pretrained = pretrained_model(model)
    resolve_impl(impl)
    resolve_precision(precision)
    if kernel_scale is not None:
        kernel_scale = resolve_scale("kernel_scale", kernel_scale, 1, positive=True)
    attention = attention_layers(pretrained)
    eligible = eligible_layers(pretrained, attention)
    chosen = chosen_layers(layers, eligible, attention, pretrained.config.num_hidden_layers)
    kv_heads = {index: kv_heads_of(attention[index]) for index in chosen}
    if strength is None or isinstance(strength, (str, int, float)):
        parsed = parse_strength(strength, len(chosen), 1)
    else:
        if len(set(kv_heads.values())) > 1:
            raise ValueError(
                f"strength: expected one number, because the layers have different numbers of KV "
                f"heads ({kv_heads}); got a {type(strength).__name__}"
            )
        parsed = parse_strength(strength, len(chosen), next(iter(kv_heads.values())))
    if parsed == "learned" and _is_peft(model, pretrained):
        _check_peft_trains(attention, chosen)

    warn_if_untested(pretrained)
    if _is_peft(model, pretrained) and not isinstance(pretrained, LucidModelMixin):
        warn_once(
            "adapter",
            "saving this PEFT model's adapter alone does not save that its base is LUCID now, so "
            "the adapter would load onto softmax. Enable the base model before get_peft_model, "
            "save it with save_pretrained, and load it from there: the adapter then names it.",
        )
    _become_lucid(model, pretrained)
    decoder = pretrained.base_model
    decoder.config.lucid = {"layers": chosen, "strength": parsed}
    if kernel_scale is not None:
        decoder.config.lucid["kernel_scale"] = kernel_scale
    for index, module in attention.items():
        if index not in chosen:
            if hasattr(module, SUBMODULE):
                delattr(module, SUBMODULE)
            continue
        _install_strength(module, parsed, chosen.index(index), len(chosen))
        for installed in module.modules():  # every adapter's copy, and the one it was made from
            if isinstance(installed, (FixedStrength, LearnedStrength)):
                installed.impl, installed.precision = impl, precision
                installed.kernel_scale = kernel_scale
    if before_forward not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(before_forward, with_kwargs=True)
        decoder.register_forward_hook(after_forward, with_kwargs=True, always_call=True)
    return model


def disable(model: nn.Module, attn_implementation: str = "sdpa") -> nn.Module:
    """Goes back from LUCID to softmax attention, in place: the model's stock class, config, layers.

    Learned strengths are dropped.

    Args:
        model: a model that `enable` switched, or a LUCID checkpoint loaded.
        attn_implementation: "sdpa", "eager" and so on, as transformers names them.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: it is not a LUCID model, or `attn_implementation` is "lucid" or unknown to the
            model; the model is then as it was.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lucid_attention.hf import disable, enable
        >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=2, num_attention_heads=2)
        >>> type(disable(enable(LlamaForCausalLM(config)))).__name__
        'LlamaForCausalLM'
    """
    pretrained = _lucid_model(model)
    if attn_implementation == IMPLEMENTATION:
        raise ValueError(
            'attn_implementation: expected softmax attention ("sdpa", "eager", ...), got "lucid"'
        )
    old = pretrained.config
    new = copy.deepcopy(old)
    new.__class__ = old.lucid_stock_class
    del new.lucid
    _replace(model, old, new, lambda cls: cls.lucid_stock_class)
    new._attn_implementation = None
    try:
        pretrained.set_attn_implementation(attn_implementation)
    except BaseException:
        _replace(model, new, old, lucid_model_class)
        raise
    for module in pretrained.modules():
        if hasattr(module, SUBMODULE):
            delattr(module, SUBMODULE)
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is before_forward:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, hook in list(module._forward_hooks.items()):
            if hook is after_forward:
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
    return model


def strengths(model: nn.Module) -> Tensor:
    """The strengths in use, fp32 `(LUCID layers, KV heads)` on the CPU, learned ones included.

    Raises TypeError or ValueError as `disable` does, and ValueError for learned strengths on the
    meta device, which have no values.
    """
    pretrained = _lucid_model(model)
    rows = []
    for module, layer in zip(
        strength_modules(pretrained),
        [m for m in pretrained.modules() if SUBMODULE in m._modules],
        strict=True,
    ):
        if isinstance(module, FixedStrength):
            value = torch.tensor(module.value, dtype=torch.float32, device="cpu")
        elif module.strength_bias.is_meta:
            raise ValueError(
                "model: its learned strengths are on the meta device and have no values yet; load "
                "its weights first"
            )
        else:
            with torch.no_grad():
                value = module()
                if hasattr(value, "full_tensor"):  # FSDP2's DTensor: every process gets all of it
                    value = value.full_tensor()
                value = value.cpu()
        rows.append(value.expand(kv_heads_of(layer)))
    return torch.stack(rows)


def _lucid_model(model: nn.Module) -> PreTrainedModel:
    pretrained = pretrained_model(model)
    if not issubclass(type(pretrained), LucidModelMixin):
        raise ValueError(
            f"model: expected a LUCID model, got {type(pretrained).__name__}, which is softmax"
        )
    return pretrained


def install_in_transformers() -> None:
    """Lets `attn_implementation="lucid"` and LUCID checkpoints take effect at construction.

    transformers tells an attention implementation nothing when a model is built, and strips its
    name when one is saved. `post_init`, which every model runs last in its constructor and before
    its weights are loaded, is therefore wrapped here, once: a model whose config asks for "lucid"
    is passed to `enable`. Without it, such a model would lack its cache hook and its learned
    strengths, and would be saved as a softmax model. And a model whose config holds a LUCID
    setting, but which was asked to run with other attention, is refused there.

    `save_pretrained` is wrapped for the one model that neither `enable` nor `post_init` ever sees:
    the one around a decoder that was enabled by itself, `enable(model.model)`.
    """
    stock, stock_save = PreTrainedModel.post_init, PreTrainedModel.save_pretrained
    if getattr(stock, "is_lucid", False):
        return

    @functools.wraps(stock)
    def post_init(self: PreTrainedModel) -> None:
        stock(self)
        config = self.config
        setting = getattr(config, "lucid", None)
        asked = getattr(config, "_attn_implementation", None)
        if asked != IMPLEMENTATION:
            if isinstance(setting, dict):
                raise other_attention(asked)
            if _holds_lucid(self):
                refuse_composite(self)
            return
        if _is_around_lucid(self):
            _become_lucid(self, self)  # its decoder was enabled a moment ago
            return
        if not (setting is None or isinstance(setting, dict)):
            raise TypeError(
                'config.lucid: expected {"layers": [...], "strength": ...} or None, got '
                f"{setting!r}"
            )
        if isinstance(config, LucidConfigMixin):
            # It may be another model's: `type(model)(model.config)`.
            _replace(self, config, copy.deepcopy(config), lambda cls: cls)
        setting = setting or {}
        enable(
            self,
            layers=setting.get("layers"),
            strength=setting.get("strength"),
            kernel_scale=setting.get("kernel_scale"),
        )

    @functools.wraps(stock_save)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, LucidModelMixin) and _holds_lucid(self):
            if not _is_around_lucid(self):
                raise ValueError(
                    f"model: {type(self).__name__} contains a LUCID model, and its checkpoint "
                    "would load as softmax; save the LUCID model by itself, or call "
                    "lucid_attention.hf.enable on the outer model"
                )
            _become_lucid(self, self)
        return stock_save(self, *args, **kwargs)

    post_init.is_lucid = True  # type: ignore[attr-defined]
    PreTrainedModel.post_init = post_init
    PreTrainedModel.save_pretrained = save_pretrained


def _is_around_lucid(model: PreTrainedModel) -> bool:
    return model.base_model is not model and isinstance(model.base_model, LucidModelMixin)


def _holds_lucid(model: PreTrainedModel) -> bool:
    return any(isinstance(module, LucidModelMixin) for module in model.modules())


def _become_lucid(model: nn.Module, pretrained: PreTrainedModel) -> None:
    """Gives a model its LUCID class and a LUCID copy of its config.

    A copy: a user may build a softmax twin from the same config object afterwards.
    """
    old, decoder = pretrained.config, pretrained.base_model
    if isinstance(decoder.config, LucidConfigMixin):
        new = decoder.config
    elif isinstance(old, LucidConfigMixin):
        new = old
    else:
        new = copy.deepcopy(old)
        new.__dict__.pop("_attn_implementation_internal", None)
        new.__class__ = lucid_config_class(type(old))
    _replace(model, old, new, lucid_model_class)
    register_models(type(new))


def _replace(model: nn.Module, old: Any, new: Any, cls: Any) -> None:
    for module in model.modules():
        if module.__dict__.get("config") is old:
            module.config = new
        if isinstance(module, PreTrainedModel):
            module.__class__ = cls(type(module))


def _install_strength(
    module: nn.Module, parsed: float | str | list[Any], row: int, rows: int
) -> None:
    present = getattr(module, SUBMODULE, None)
    if parsed == "learned":
        if present is None or isinstance(present, FixedStrength):
            initial = 0.0 if present is None else present.value
            weight = next(module.parameters())
            present = LearnedStrength(initial, kv_heads_of(module), weight.device)
            present.train(module.training)
            setattr(module, SUBMODULE, present)
    else:
        assert not isinstance(parsed, str)
        setattr(module, SUBMODULE, FixedStrength(per_layer(parsed, rows)[row]))


def _is_peft(model: nn.Module, pretrained: PreTrainedModel) -> bool:
    return model is not pretrained or hasattr(pretrained, "peft_config")


def _check_peft_trains(attention: dict[int, nn.Module], chosen: list[int]) -> None:
    for index in chosen:
        if not hasattr(getattr(attention[index], SUBMODULE, None), "modules_to_save"):
            raise ValueError(
                'strength: "learned" in a PEFT model that would neither train nor save it; call '
                'enable(model, strength="learned") first, then get_peft_model(model, '
                "LoraConfig(modules_to_save=['lucid'], ...)); or use a fixed strength"
            )
