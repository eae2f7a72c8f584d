"""What the attention layers of a model are given for a text: queries, keys, values, as the kernels see them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lucid_attention.hf.strength import SUBMODULE, strength_of

__all__ = ["LayerTensors", "capture"]


@dataclass(frozen=True)
class LayerTensors:
    """One full-attention layer's operands for one text, after RoPE.

    Attributes:
        layer: its index.
        query: ``(heads, N, D)``; key: ``(kv_heads, N, D)``; value: ``(kv_heads, N, E)``; as in the model's forward pass.
        scale: of the softmax's scores.
        strength: float32 ``(kv_heads,)``; None in a softmax layer.
        softcap, sinks: of the softmax; None where the model has none.
        kernel_scale: of the preconditioner; None is ``1/sqrt(D)``.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    strength: Tensor | None
    softcap: float | None = None
    sinks: Tensor | None = None
    kernel_scale: float | None = None

    @property
    def group(self) -> int:
        """Query heads of each KV head."""
        return self.query.shape[0] // self.key.shape[0]


@torch.no_grad()
def capture(model: Any, input_ids: Tensor, layers: list[int] | None = None) -> list[LayerTensors]:
    """Run a model over one text and keep what its full-attention layers are given.

    Args:
        model: a transformers decoder, LUCID or softmax (with "sdpa" or another named attention function).
        input_ids: int64 ``(1, N)``, on the model's device.
        layers: indices to keep; None: all. Sliding-window layers are left out.

    Returns:
        The layers in order.

    Raises:
        ValueError: more than one text, "eager" attention (which no function can watch), or a layer that is not a
            full-attention layer.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lucid_attention.hf import enable
        >>> from lucid_attention.probes import capture
        >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=2, num_attention_heads=2)
        >>> found = capture(enable(LlamaForCausalLM(config)), torch.arange(5)[None])
        >>> [(x.layer, tuple(x.key.shape)) for x in found]
        [(0, (2, 5, 4)), (1, (2, 5, 4))]
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise ValueError(f"input_ids: expected one text, (1, N), got {tuple(input_ids.shape)}")
    found: dict[int, LayerTensors] = {}
    with _watched(model, found):
        model(input_ids=input_ids, use_cache=False)
    for index in layers or ():
        if index not in found:
            raise ValueError(
                f"layers: expected full-attention layers, {sorted(found)}, got {index}"
            )
    return [found[i] for i in sorted(found) if layers is None or i in layers]


@contextmanager
def _watched(model: Any, found: dict[int, LayerTensors]) -> Iterator[None]:
    name = model.config._attn_implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        raise ValueError(
            f'model: its attention is {name!r}, which cannot be watched; load it with attn_implementation="sdpa"'
        )
    function = ALL_ATTENTION_FUNCTIONS[name]
    kept = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)

    def watch(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if _is_full(module, kwargs):
            index: int = module.layer_idx  # type: ignore[assignment]
            lucid = getattr(module, SUBMODULE, None)
            strength = None
            if lucid is not None:
                given = strength_of(lucid, value)
                strength = torch.ones(key.shape[1], device=key.device) * (
                    1.0 if given is None else given
                )
            scaling = kwargs.get("scaling")
            found[index] = LayerTensors(
                index,
                query[0].detach().clone(),
                key[0].detach().clone(),
                value[0].detach().clone(),
                query.shape[-1] ** -0.5 if scaling is None else scaling,
                strength,
                kwargs.get("softcap"),
                kwargs.get("s_aux"),
                None if lucid is None else lucid.kernel_scale,
            )
        return function(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = watch
    try:
        yield
    finally:
        if kept is None:
            del ALL_ATTENTION_FUNCTIONS[name]
        else:
            ALL_ATTENTION_FUNCTIONS[name] = kept


def _is_full(module: Any, kwargs: dict[str, Any]) -> bool:
    types = getattr(module.config, "layer_types", None)
    if types is not None:
        return bool(types[module.layer_idx] == "full_attention")
    return kwargs.get("sliding_window") is None
