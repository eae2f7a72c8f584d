"""The model of a training: a Llama, or what Llama is without position encoding; new or from a checkpoint."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SmolLM3Config,
)

from lucid_attention.hf import enable

from .configuration import TrainConfig, TrainError

__all__ = [
    "build_model",
    "can_fuse",
    "check_fused_layers",
    "model_config",
    "use_fused_layers",
    "use_fused_loss",
]


def model_config(config: TrainConfig, vocabulary: int, tokenizer: Any = None) -> PreTrainedConfig:
    """The stock config of a new model. Without position encoding it is SmolLM3's, every layer a NoPE layer:
    SmolLM3 is Llama but for that choice.
    """
    size = config.size()
    end = None if tokenizer is None else tokenizer.eos_token_id
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": size["width"],
        "intermediate_size": size["mlp_width"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "head_dim": size["head_dim"],
        "max_position_embeddings": config.length,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None if tokenizer is None else tokenizer.bos_token_id,
        "eos_token_id": end,
        "pad_token_id": None,
    }
    if config.position == "nope":
        return SmolLM3Config(**common, no_rope_layers=[0] * size["layers"])
    theta = config.rope_theta or 10000.0
    return LlamaConfig(**common, rope_parameters={"rope_type": "default", "rope_theta": theta})


def build_model(
    config: TrainConfig, vocabulary: int, *, seed: int, tokenizer: Any = None, device: str = "cpu"
) -> PreTrainedModel:
    """The model that is trained, in float32, LUCID already; softmax is LUCID of strength 0.

    Two trainings of one seed that differ in attention alone begin from the same weights.

    Args:
        vocabulary: of the tokenizer.
        seed: of new weights.
        device: "meta" builds no weights.

    Raises:
        TrainError: the checkpoint cannot be loaded, LUCID cannot take it, or its vocabulary is smaller than the
            tokenizer's.
    """
    if config.init_from is None:
        stock = model_config(config, vocabulary, tokenizer)
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            model: Any = AutoModelForCausalLM.from_config(stock)
    else:
        model = _from_checkpoint(config, device)
        held = model.get_input_embeddings().weight.shape[0]
        if vocabulary > held:
            raise TrainError(
                f"tokenizer: has {vocabulary} tokens and the checkpoint {config.init_from} only {held}; give the "
                "tokenizer that the checkpoint was trained with"
            )
        most = getattr(model.config, "max_position_embeddings", None)
        if most is not None and most < config.length:
            model.config.max_position_embeddings = config.length
    strength: float | str = config.strength
    if config.attention == "softmax" or config.strength_steps:
        strength = 0.0
    layers = None if config.lucid_layers is None else list(config.lucid_layers)
    scale = config.kernel_scale
    if config.attention == "lucid":
        # Of a LUCID checkpoint they are part of what was learnt.
        saved = getattr(model.config, "lucid", None) or {}
        scale = saved.get("kernel_scale") if scale is None else scale
        layers = saved.get("layers") if layers is None else layers
    try:
        enable(
            model, layers=layers, strength=strength, kernel_scale=scale, precision=config.solve_precision
        )  # fmt: skip
    except ValueError as error:
        raise TrainError(str(error)) from None
    return model


def _from_checkpoint(config: TrainConfig, device: str) -> Any:
    source = config.init_from
    try:
        found: Any = AutoConfig.from_pretrained(source)
        if config.rope_theta is not None:
            if not getattr(found, "rope_parameters", None):
                raise TrainError(f"rope_theta: the checkpoint {source} has no RoPE")
            found.rope_parameters = {**found.rope_parameters, "rope_theta": config.rope_theta}
        if device == "meta":
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(found)
        return AutoModelForCausalLM.from_pretrained(source, config=found, dtype=torch.float32)
    except TrainError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().split("\n")[0]
        raise TrainError(f"init_from {source}: cannot be loaded: {first}") from None


def use_fused_loss(model: Any, choice: str, device: torch.device) -> str:
    """Replace the output layer and the cross-entropy by liger-kernel's, which never forms the logits.

    Returns:
        What is used now: "liger" or "none".

    Raises:
        TrainError: "liger" was asked for and cannot be had.
    """
    return _use_liger(model, "fused_loss", choice, device, {"fused_linear_cross_entropy"})


def use_fused_layers(
    model: Any, choice: str, device: torch.device, *, compiled: bool = False
) -> str:
    """Replace the norms and the gated MLPs by liger-kernel's, one kernel where there were ten; of this model alone.

    Args:
        compiled: the layers will be compiled, which fuses more; then "auto" is "none". With both, a loss stood .07 higher after 60
            steps than with either alone (one run, liger-kernel 0.8.5, torch 2.11, an H100; the cause was not looked for).

    Returns:
        What is used now: "liger" or "none".

    Raises:
        TrainError: "liger" was asked for and cannot be had.
    """
    check_fused_layers(choice, compiled=compiled)
    if compiled:
        return "none"
    # Not its rotary encoding, which is a function of the module and so every model's.
    parts = {"rms_norm", "layer_norm"}
    activation = getattr(model.config, "hidden_activation", None) or getattr(model.config, "hidden_act", None)  # fmt: skip
    # It does not look at the activation itself.
    gated = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}.get(str(activation))
    if gated:
        parts.add(gated)
    return _use_liger(model, "fused_layers", choice, device, parts)


def check_fused_layers(choice: str, *, compiled: bool) -> None:
    """Before anything is built.

    Raises:
        TrainError: "liger" was asked for, and ``torch_compile`` too.
    """
    if compiled and choice == "liger":
        raise TrainError(
            "fused_layers: expected auto or none beside torch_compile, got liger: with both a loss was .07 higher after 60 steps than "
            "with either; take fused_layers: none, compiling fuses the same and more"
        )


def can_fuse(field: str, choice: str, device: torch.device) -> bool:
    """Whether liger-kernel runs here.

    Raises:
        TrainError: it does not, and "liger" was asked for.
    """
    reason = None
    if find_spec("liger_kernel") is None:
        reason = "liger-kernel is not installed (pip install 'lucid-attention[fused]')"
    elif device.type != "cuda":
        reason = f"liger-kernel's kernels run on a GPU, and this is a {device.type}"
    if reason is not None and choice == "liger":
        raise TrainError(f"{field}: {reason}; take {field}: none")
    return reason is None


def _use_liger(model: Any, field: str, choice: str, device: torch.device, parts: set[str]) -> str:
    if choice == "none" or not can_fuse(field, choice, device):
        return "none"
    from liger_kernel.transformers import monkey_patch

    family = type(model.config).lucid_stock_class.model_type
    patch = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(family)
    if patch is None:
        if choice == "auto":
            return "none"
        raise TrainError(f"{field}: liger-kernel does not know {family}; take {field}: none")
    switches = [n for n, p in inspect.signature(patch).parameters.items() if n != "model"]
    with _classes_kept(model):
        patch(model=model, **{name: name in parts for name in switches})
    return "liger"


@contextlib.contextmanager
def _classes_kept(model: Any) -> Iterator[None]:
    """Beside a model's own layers liger-kernel replaces the classes that later models would be made of; those are put back."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    names = {kind.__module__ for kind in kinds if kind.__module__.startswith("transformers.models.")}  # fmt: skip
    before = {name: dict(vars(sys.modules[name])) for name in names}
    try:
        yield
    finally:
        for name, content in before.items():
            now = vars(sys.modules[name])
            now.update({key: value for key, value in content.items() if now.get(key) is not value})
