"""The strength of a LUCID layer: fixed, scheduled while training goes on, or learned.

`L_b = I + b * strictly-lower(P)`: `b = 0` is the softmax layer exactly, `b = 1` is LUCID, and
every `b` in between is stable (`/docs/hugging-face.md` says how to move a model over). Each LUCID
attention layer holds one of the two small modules below as its submodule `lucid`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["FixedStrength", "LearnedStrength", "StrengthSchedule"]

SUBMODULE = "lucid"  # the name under which an attention layer holds its strength module


class _ClampWithInwardGradient(torch.autograd.Function):
    """Clamp to [0, 1] whose gradient is projected: at or beyond a bound it passes only when a
    descent step would move inwards. The ordinary clamp's gradient is zero outside the interval, so
    a parameter that an optimiser has carried past a bound would be stuck there for ever.
    """

    @staticmethod
    def forward(ctx: Any, theta: Tensor) -> Tensor:
        ctx.save_for_backward(theta)
        return theta.clamp(0.0, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (theta,) = ctx.saved_tensors
        outwards = ((theta <= 0.0) & (grad > 0.0)) | ((theta >= 1.0) & (grad < 0.0))
        return grad.masked_fill(outwards, 0.0)


class FixedStrength(nn.Module):
    """A strength that no optimiser moves: one number, or one per KV head.

    It holds no parameter and no buffer: the exact value is a Python float that lives in the
    model's config, so neither `model.to(torch.bfloat16)` nor a weights file can round it.
    """

    precision = "default"

    def __init__(self, value: float | Sequence[float], impl: str = "auto") -> None:
        super().__init__()
        self.impl = impl
        self.kernel_scale: float | None = None
        self.value: float | list[float] = 1.0
        self._tensor: Tensor | None = None
        self.set(value)

    def set(self, value: float | Sequence[float]) -> None:
        """Replaces the value; one number or a sequence with one number per KV head."""
        self.value = float(value) if isinstance(value, (int, float)) else [float(v) for v in value]
        if self._tensor is not None:
            # In place: a compiled step reads the same tensor, so a schedule recompiles nothing.
            self._tensor.copy_(torch.tensor(self.value))

    @property
    def is_off(self) -> bool:
        """Whether this is softmax attention exactly, and not for one step of a schedule only."""
        return self._tensor is None and self.value == 0.0

    def follow_schedule(self, kv_heads: int, device: torch.device) -> None:
        """Keeps the value in a tensor from now on, one that `set` rewrites in place."""
        self._tensor = torch.empty(kv_heads, dtype=torch.float32, device=device)
        self._tensor.copy_(torch.tensor(self.value))

    def forward(self, reference: Tensor | None = None) -> float | Tensor | None:
        """The strength: None (which means 1), a float, or an fp32 tensor `(kv_heads,)`.

        `reference` is any tensor on the device wanted; it is an argument because PEFT's
        `modules_to_save` wrapper calls every module with a positional tensor.
        """
        device = torch.device("cpu") if reference is None else reference.device
        # The tensor first: a compiled step that never reads `value` is not recompiled when a
        # schedule changes it.
        if self._tensor is not None and self._tensor.device == device:
            return self._tensor
        if isinstance(self.value, float):
            return None if self.value == 1.0 else self.value
        if torch.compiler.is_compiling():
            return torch.tensor(self.value, dtype=torch.float32, device=device)
        # Kept for the next pass, which may be a training step: autograd refuses a tensor that was
        # made in inference mode.
        with torch.inference_mode(False):
            self._tensor = torch.tensor(self.value, dtype=torch.float32, device=device)
        return self._tensor

    def extra_repr(self) -> str:
        return f"strength={self.value}"


class LearnedStrength(nn.Module):
    """A trained strength per KV head, `b = clamp(theta, 0, 1)` with a one-sided gradient.

    A sigmoid cannot start at exactly 0, and .01 is already a jump where row sums of `P` are in the
    thousands; the clamp starts at the softmax model exactly and can still move.
    """

    precision = "default"

    # transformers' Trainer keeps weight decay away from every parameter whose name contains "bias"
    # (`Trainer.get_decay_parameter_names`). Decay would pull the strength towards softmax whatever
    # the loss says, and this name is the only switch that needs no cooperation from the user.
    PARAMETER = "strength_bias"

    def __init__(
        self,
        initial: float | Sequence[float],
        kv_heads: int,
        device: torch.device | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.impl = impl
        self.kernel_scale: float | None = None
        self.initial = initial
        # fp32 whatever the model's dtype: near 1 a bf16 step is .004, coarser than most updates.
        self.strength_bias = nn.Parameter(torch.empty(kv_heads, dtype=torch.float32, device=device))
        self.reset_parameters()

    def initial_values(self) -> Tensor:
        """The strength that the layer starts from, fp32 `(kv_heads,)`."""
        values = torch.tensor(self.initial, dtype=torch.float32, device=self.strength_bias.device)
        return values.expand_as(self.strength_bias)

    def reset_parameters(self) -> None:
        """Sets the parameter to the strength the layer starts from."""
        with torch.no_grad():
            self.strength_bias.copy_(self.initial_values())

    def _apply(self, fn: Any, recurse: bool = True) -> LearnedStrength:
        def keep_fp32(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            if moved.dtype == torch.float32 or not moved.is_floating_point():
                return moved
            return tensor.to(moved.device)  # moved there, but not rounded

        super()._apply(keep_fp32, recurse)
        return self

    def forward(self, reference: Tensor | None = None) -> Tensor:
        """The strength, fp32 `(kv_heads,)`, in [0, 1]. Raises ValueError if it was rounded."""
        theta = self.strength_bias
        if theta.dtype != torch.float32:
            raise ValueError(
                f"a learned LUCID strength must stay float32, got {theta.dtype}: a mixed-precision "
                "policy (FSDP2's MixedPrecisionPolicy) has rounded it; shard the strengths by "
                "themselves first: for every LUCID layer fully_shard(layer.self_attn.lucid, "
                "mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), ...)"
            )
        return _ClampWithInwardGradient.apply(theta)

    def extra_repr(self) -> str:
        return f"kv_heads={self.strength_bias.numel()}"


def strength_of(module: nn.Module, reference: Tensor) -> Any:
    """The strength that a layer's submodule `lucid` gives, on the device of `reference`.

    Raises ValueError if it is learned, but frozen in training. With a copy of it in a PEFT adapter
    (`modules_to_save`) it may be: that copy is trained, the original is there for
    `disable_adapter()`.
    """
    if (
        isinstance(module, LearnedStrength)
        and module.training
        and torch.is_grad_enabled()
        and not module.strength_bias.requires_grad
    ):
        raise ValueError(
            "a learned LUCID strength is frozen while its model trains, so it would be neither "
            "trained nor, with PEFT, saved; expected requires_grad=True, or with PEFT "
            "LoraConfig(modules_to_save=['lucid']); to keep the values as they are, call "
            "enable(model, strength=<their tensor>)"
        )
    return module(reference)


def strength_modules(model: nn.Module) -> list[FixedStrength | LearnedStrength]:
    """The strength modules of an enabled model in the order of its layers, PEFT's wrappers undone
    (the adapter's copy is the one returned, but while the adapter is disabled).
    """
    found: list[FixedStrength | LearnedStrength] = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != SUBMODULE:
            continue
        if hasattr(module, "modules_to_save"):  # PEFT's wrapper
            if getattr(module, "disable_adapters", False):
                module = module.original_module
            else:
                module = module.modules_to_save[module.active_adapters[0]]
        if isinstance(module, (FixedStrength, LearnedStrength)):
            found.append(module)
    return found


def parse_strength(
    strength: float | str | Sequence[Any] | Tensor | None, layers: int, kv_heads: int
) -> float | str | list[Any]:
    """Checks a strength given by a user (or read from a config) and returns it as JSON can hold it:
    a float, "learned", `[kv_heads]` floats for every layer, or `[layers][kv_heads]` floats.

    Raises TypeError or ValueError as `enable` documents.
    """
    expected = (
        f'None, a number in [0, 1], "learned", or a tensor of shape ({kv_heads},) (KV heads) or '
        f"({layers}, {kv_heads}) (LUCID layers, KV heads)"
    )
    if strength is None:
        return 1.0
    if isinstance(strength, str):
        if strength != "learned":
            raise ValueError(f"strength: expected {expected}; got {strength!r}")
        return strength
    if isinstance(strength, bool) or not isinstance(strength, (int, float, list, tuple, Tensor)):
        raise TypeError(f"strength: expected {expected}; got {type(strength).__name__}")
    # Explicitly on the CPU: `from_pretrained` builds models with "meta" as the default device.
    values = strength if isinstance(strength, Tensor) else torch.tensor(strength, device="cpu")
    if values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"strength: expected {expected}; got a tensor of {values.dtype}")
    values = values.detach().double().cpu()
    if isinstance(strength, (int, float)):
        values = torch.tensor(float(strength), dtype=torch.float64, device="cpu")
    if tuple(values.shape) not in {(), (kv_heads,), (layers, kv_heads)}:
        raise ValueError(f"strength: expected {expected}; got shape {tuple(values.shape)}")
    if not bool(((values >= 0) & (values <= 1)).all()):  # NaN fails too
        raise ValueError(
            f"strength: expected values in [0, 1] (outside it the solve is not bounded); got "
            f"{values.tolist()}"
        )
    result: float | list[Any] = values.tolist()
    return result


def per_layer(strength: float | list[Any], layers: int) -> list[float | list[float]]:
    """A parsed fixed strength, spread out over the LUCID layers."""
    if isinstance(strength, list) and strength and isinstance(strength[0], list):
        return list(strength)
    return [strength] * layers


class StrengthSchedule(TrainerCallback):
    """Moves the strength of a LUCID model while transformers' Trainer trains it.

    `b(t) = start + (end - start) * f(min(t / T, 1))` after `t` optimiser steps, with `f(x) = x`
    ("linear") or `f(x) = (1 - cos(pi x)) / 2` ("cosine"). The value for the next step is written
    into the model and its config after every step, so a checkpoint saved on the way loads with that
    strength, and a resumed Trainer, whose step count is restored, goes on exactly. With
    `load_best_model_at_end` the best checkpoint's strength comes back with its weights.

    Args:
        start: strength at step 0, in [0, 1].
        end: strength from step `T` on, in [0, 1].
        steps: `T`: a number of optimiser steps (int >= 1), or a fraction of the whole training
            (float in (0, 1]).
        shape: "linear" or "cosine".

    Raises:
        ValueError: an argument out of range; at the start of training, if the model is not a LUCID
            model or its strength is learned.
        TypeError: an argument of another type.

    Example:
        >>> from lucid_attention.hf import StrengthSchedule
        >>> schedule = StrengthSchedule(steps=100)
        >>> schedule.value(25, max_steps=1000)
        0.25

        `Trainer(model=enable(model, strength=0.0), callbacks=[schedule], ...)`
    """

    def __init__(
        self,
        start: float = 0.0,
        end: float = 1.0,
        *,
        steps: int | float = 0.5,
        shape: str = "linear",
    ) -> None:
        for name, value in (("start", start), ("end", end)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}: expected a strength in [0, 1], got {value}")
        if isinstance(steps, bool) or not isinstance(steps, (int, float)):
            raise TypeError(f"steps: expected an int or a float, got {type(steps).__name__}")
        if (isinstance(steps, int) and steps < 1) or (
            isinstance(steps, float) and not 0.0 < steps <= 1.0
        ):
            raise ValueError(
                f"steps: expected an int >= 1 (optimiser steps) or a float in (0, 1] (fraction of "
                f"the training), got {steps!r}"
            )
        if shape not in ("linear", "cosine"):
            raise ValueError(f'shape: expected "linear" or "cosine", got {shape!r}')
        self.start, self.end, self.steps, self.shape = float(start), float(end), steps, shape

    def value(self, step: int, max_steps: int) -> float:
        """The strength after `step` optimiser steps of a training of `max_steps`."""
        length = self.steps if isinstance(self.steps, int) else max(1.0, self.steps * max_steps)
        x = min(step / length, 1.0)
        if x == 1.0:
            return self.end
        fraction = x if self.shape == "linear" else (1.0 - math.cos(math.pi * x)) / 2.0
        return self.start + (self.end - self.start) * fraction

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        modules = _scheduled(model)
        attention_layers = [m for m in _modules(model) if hasattr(m, SUBMODULE)]
        for module, layer in zip(modules, attention_layers, strict=True):
            weight = next(layer.parameters())
            module.follow_schedule(kv_heads_of(layer), weight.device)
        self._write(model, state)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._write(model, state)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        # The Trainer has put the best checkpoint's weights back; the strength is not among them.
        if args.load_best_model_at_end and state.best_model_checkpoint:
            config = Path(state.best_model_checkpoint, "config.json")
            if config.is_file():
                best = json.loads(config.read_text(encoding="utf-8"))["lucid"]["strength"]
            else:  # PEFT saves no config with an adapter
                best = self.value(state.best_global_step or 0, state.max_steps)
            set_fixed_strength(model, best)

    def _write(self, model: nn.Module | None, state: TrainerState) -> None:
        set_fixed_strength(model, self.value(state.global_step, state.max_steps))


def set_fixed_strength(model: nn.Module | None, value: float) -> None:
    """Writes one strength into every LUCID layer and into the config that a checkpoint saves."""
    for strength in _scheduled(model):
        strength.set(value)
    for module in _modules(model):
        setting = getattr(getattr(module, "config", None), "lucid", None)
        if isinstance(setting, dict):
            setting["strength"] = value


def kv_heads_of(attention: nn.Module) -> int:
    """The number of KV heads of an attention layer."""
    config: Any = attention.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(heads)


def _modules(model: nn.Module | None) -> Iterable[nn.Module]:
    return model.modules() if model is not None else ()


def _scheduled(model: nn.Module | None) -> list[FixedStrength]:
    modules = strength_modules(model) if model is not None else []
    fixed = [module for module in modules if isinstance(module, FixedStrength)]
    if not modules or len(fixed) != len(modules):
        raise ValueError(
            "StrengthSchedule: expected a model with fixed LUCID strengths, got "
            + ("one whose strength is learned" if modules else "a model without LUCID layers")
            + "; call lucid_attention.hf.enable(model, strength=0.0) before training"
        )
    return fixed
