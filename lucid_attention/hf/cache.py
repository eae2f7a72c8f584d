"""A key-value cache that holds `(K, Y)`, keys and preconditioned values, in place of `(K, V)`.

A cache's `update` never sees the padding mask, so it cannot precondition. Hence the *deferred
commit*: `update` stores the new keys and keeps the raw new values pending; the attention function,
which has the mask, solves for the new rows of `Y` and commits them with `commit`.

In half precision `Y` is kept in float16, with a power-of-two scale for each row and head: new rows are solved
from it, and in bfloat16 they would be less accurate than one full solve (docs/numerics.md).

What keeps a cache from silently meaning something else: only a decoder that `enable` has prepared
arms a LUCID layer, and `update` refuses to run unarmed, so no softmax layer ever reads `Y` as `V`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, cache_utils
from transformers.cache_utils import DynamicLayer, QuantizedLayer, StaticLayer

from lucid_attention import decode_workspace

# transformers >= 5.18 has a common base of all its quantised layers.
_QUANTIZED = getattr(cache_utils, "BaseQuantizedLayer", QuantizedLayer)

__all__ = ["LucidCache"]


@dataclass
class Pending:
    """What one forward pass has handed to a layer and not yet committed.

    `key`, `value`: the new rows, `(B, Hkv, Q, D)` and `(B, Hkv, Q, Dv)`. `all_keys`, `past`: the
    layer's keys with the new ones, and its `Y` so far, as they were on the compute device: an
    offloaded cache moves the layer's own tensors away before attention runs. `start`: how many tokens the static
    buffers hold before the new ones, 0-dimensional; None for a growing layer. `position`: rows of
    the static buffers that the new tokens have taken, None before `place`. `room`: the buffers of keys and `Y`
    with rows for the new tokens, None where there are none.
    """

    key: Tensor
    value: Tensor
    all_keys: Tensor
    past: Tensor
    start: Tensor | None = None
    position: Tensor | None = None
    room: tuple[Tensor, Tensor] | None = None


class LucidLayer:
    """What growing and static LUCID layers share: arming, the pending rows, the checks.

    `known`, `real`: how many of the first cached positions were committed with a mask that is known
    here, and that mask, bool `(batch, known)`; None where all of them are real. Compiled steps do
    not extend it, and only the first LUCID layer of a model keeps it. `y_dtype`: as asked for.
    `y_scale`: float32 `(B, Hkv)`, `Y = values * y_scale`, None for 1; `scaled`: whether the first rows have set it.
    `workspace`: of the decode operator.
    """

    armed = False
    pending: Pending | None = None
    y_dtype: torch.dtype | None = None
    y_scale: Tensor | None = None
    scaled = False
    workspace: Tensor | None = None
    workspace_for: tuple[int, int] | None = None
    known = 0
    real: Tensor | None = None
    keys: Any
    values: Any

    def begin(self, key: Tensor, value: Tensor) -> None:
        """Checks that this forward pass may use the layer."""
        if not self.armed:
            raise ValueError(
                "past_key_values: this cache holds preconditioned values of a LUCID model and was "
                "handed to a layer that is not one of its LUCID layers (another model, or the same "
                "model without LUCID); expected the model that filled it; start with a new cache"
            )
        if self.pending is not None:
            raise ValueError(
                "past_key_values: an earlier forward pass was interrupted between writing keys and "
                "committing values, so this cache is incomplete; start with a new cache"
            )
        if self.keys is not None and self.keys.numel() > 0:
            expected = (*self.keys.shape[:2], self.keys.shape[-1], self.values.shape[-1])
            got = (*key.shape[:2], key.shape[-1], value.shape[-1])
            if expected != got:
                raise ValueError(
                    "past_key_values: expected keys and values with (batch, KV heads, key width, "
                    f"value width) = {expected}, as the cache holds, got {got}; the cache belongs "
                    "to another model or batch; start with a new cache"
                )
            if self.keys.dtype != key.dtype:
                raise ValueError(
                    f"past_key_values: expected keys of the cache's dtype, {self.keys.dtype}, got {key.dtype}: "
                    "the model was cast after it filled this cache; start with a new cache"
                )
        self.armed = False

    def stored_dtype(self, value: Tensor) -> torch.dtype:
        """The dtype that `Y` is kept in."""
        if self.y_dtype is not None:
            return self.y_dtype
        return torch.float16 if value.dtype == torch.bfloat16 else value.dtype

    def initialize_scale(self, key: Tensor, value: Tensor) -> None:
        if self.stored_dtype(value) == torch.float16:
            self.y_scale = torch.ones(key.shape[:2], dtype=torch.float32, device=key.device)
        self.scaled = self.y_scale is None

    def in_units(self, preconditioned: Tensor) -> Tensor:
        """Rows of `Y` as they are stored. The first ones set the scale: their largest entry becomes 2^-6 to 2^-5,
        so that later ones may be 2^21 times as large, and 2^-8 times as small before they lose bits.
        """
        if self.y_scale is None:
            return preconditioned
        if not self.scaled:
            size = torch.where(preconditioned.isfinite(), preconditioned.abs(), 0.0)
            largest = size.flatten(2).amax(-1) if size.shape[2] else size.new_zeros(size.shape[:2])
            # A row that is padding so far takes after the others.
            largest = torch.where(largest > 0, largest, largest.amax(0, keepdim=True))
            exponent = torch.frexp(largest.float()).exponent.clamp(-100, 100) + 5
            scale = torch.where(largest > 0, torch.exp2(exponent.float()), 1.0)
            self.y_scale.copy_(scale)
            self.scaled = True
        return preconditioned / self.y_scale[:, :, None, None]

    def in_full(self, values: Tensor) -> Tensor:
        """What `in_units` gave, float32 where there is a scale."""
        if self.y_scale is None:
            return values
        return values * self.y_scale[:, :, None, None]

    def counters(self, key: Tensor) -> Tensor:
        """The decode operator's workspace; it may be used under a CUDA graph once it is there."""
        workspace, (batch, heads) = self.workspace, key.shape[:2]
        if (
            workspace is None
            or workspace.device != key.device
            or self.workspace_for != (batch, heads)
        ):
            workspace = decode_workspace(batch, heads, key.device)
            self.workspace, self.workspace_for = workspace, (batch, heads)
        return workspace

    def place(self) -> None:
        """Writes what `update` left to the decode operator, which writes the new keys itself: where that does not run."""

    @abstractmethod
    def commit(self, preconditioned: Tensor | None) -> Tensor:
        """Stores the new rows of `Y`; returns all of `Y` as it is stored, on the compute device.

        None: the decode operator wrote them, and the new keys, into `pending.room`.
        """

    def check_padding(self, real: Tensor | None) -> None:
        """Checks that positions whose `Y` is cached are padding now if and only if they were then,
        and remembers the padding of the pending ones. `real`: bool `(batch, keys)`, or None.

        Raises ValueError otherwise: `Y` would be that of another mask.
        """
        assert self.pending is not None
        batch, _, length, _ = self.pending.key.shape
        past = self.pending.past.shape[2]
        if self.pending.start is not None:
            past = int(self.pending.start)
        known = min(self.known, past)
        before = None if self.real is None else self.real[:, :known]
        if before is not None or (real is not None and known > 0):
            ones = torch.ones(batch, known, dtype=torch.bool, device=self.pending.key.device)
            before = ones if before is None else before
            now = ones if real is None else real[:, :known]
            # A row in which nothing is real is not attended to at all.
            used = None if real is None else real[:, : past + length].any(1, keepdim=True)
            differs = (now != before) if used is None else (now != before) & used
            if bool(differs.any()):
                row, position = (int(i) for i in differs.nonzero()[0])
                raise ValueError(
                    "attention_mask: the padding of cached positions changed (first at row "
                    f"{row}, position {position}), but their preconditioned values were computed "
                    "with the mask of the earlier passes; pass the same mask for them, or start "
                    "with a new cache"
                )
        if known < past:
            self.known, self.real = known, before  # compiled steps came between
            return
        self.known = past + length
        if before is None and real is None:
            self.real = None
            return
        if before is None:
            before = torch.ones(batch, past, dtype=torch.bool, device=self.pending.key.device)
        new = before.new_ones(batch, length) if real is None else real[:, past : past + length]
        self.real = torch.cat([before, new], dim=1)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.forget()

    def forget(self) -> None:
        """What is known beside the rows themselves."""
        self.known, self.real, self.pending = 0, None, None
        self.scaled = self.y_scale is None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select(beam_idx)

    def _select(self, rows: Tensor | list[int]) -> None:
        if not isinstance(rows, Tensor):
            rows = torch.tensor(rows, dtype=torch.long)
        self.real = None if self.real is None else self.real[rows.to(self.real.device)]
        if self.y_scale is not None:
            self.y_scale = self.y_scale[rows.to(self.y_scale.device)]


class LucidDynamicLayer(LucidLayer, DynamicLayer):
    """A growing layer of `(K, Y)`; cropping, reordering, repeating are the base class's.

    Outside autograd its tensors are the first rows of larger buffers, so that a decoding step writes
    its rows in place; stock layers copy the whole cache at every step. A tensor that was taken from the cache is
    never changed: rows go behind all that were ever written to a buffer (`filled`), or to a new one.
    """

    buffers: tuple[Tensor, Tensor] | None = None
    filled = 0

    def __init__(self, y_dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.y_dtype = y_dtype

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the buffers behind."""
        return {**self.__dict__, "buffers": None}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.values = torch.tensor([], dtype=self.stored_dtype(value_states), device=self.device)
        self.initialize_scale(key_states, value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends the keys, keeps the values pending; returns all keys and the *raw new* values."""
        self.begin(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.values
        if past.numel() == 0:
            past = past.new_empty((*value_states.shape[:2], 0, value_states.shape[-1]))
            # It may have been another batch before it was cropped.
            if not torch.compiler.is_compiling():
                self.initialize_scale(key_states, value_states)
        room = None
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            length, new = past.shape[2], key_states.shape[2]
            room = self._room(key_states, past, length, new)
            room[0][:, :, length : length + new] = key_states
            keys = room[0][:, :, : length + new]
        else:
            keys = key_states
            if self.keys.numel() > 0:
                keys = torch.cat([self.keys, key_states], dim=-2)
        self.buffers, self.filled = room, keys.shape[2]
        self.keys = keys
        self.pending = Pending(key_states, value_states, keys, past, room=room)
        return keys, value_states

    def _room(self, key: Tensor, past: Tensor, length: int, new: int) -> tuple[Tensor, Tensor]:
        """The present buffers if what is cached is their beginning and the new rows fit, or new ones."""
        fits = self.buffers is not None and length + new <= self.buffers[0].shape[2]
        if fits and length == self.filled:
            assert self.buffers is not None
            usable = torch.is_inference_mode_enabled() or not self.buffers[0].is_inference()
            present = zip((self.keys, past), self.buffers, strict=True)
            if usable and all(
                x.data_ptr() == y.data_ptr() and x.stride() == y.stride() and x.dtype == y.dtype
                for x, y in present
            ):
                return self.buffers
        # A prompt's cache may never grow; one that does grows by an eighth.
        rows = length + new + (max(64, length // 8) if length else 0)
        keys = key.new_empty((*key.shape[:2], rows, key.shape[-1]), dtype=self.keys.dtype)
        values = past.new_empty((*past.shape[:2], rows, past.shape[-1]))
        if length:
            keys[:, :, :length] = self.keys
            values[:, :, :length] = past
        return keys, values

    def commit(self, preconditioned: Tensor | None) -> Tensor:
        pending = self.pending
        assert pending is not None
        if pending.room is not None:
            start = pending.past.shape[2]
            end = start + pending.key.shape[2]
            if preconditioned is not None:
                pending.room[1][:, :, start:end] = self.in_units(preconditioned)
            values = pending.room[1][:, :, :end]
        else:
            assert preconditioned is not None
            rows = self.in_units(preconditioned).to(pending.past.dtype)
            with torch.autocast(
                rows.device.type, enabled=False
            ):  # it knows one half precision only
                values = torch.cat([pending.past, rows], dim=-2)
        # An offloading cache has moved the keys to the host since `update`; the values follow. The
        # copy blocks, since it is the host's memory that the next prefetch reads.
        self.values = values.to(self.keys.device)
        if self.values is not values:
            self.buffers = None
        self.pending = None
        return values

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.known = min(self.known, self.keys.shape[-2]) if self.is_initialized else 0
        # Cropped to nothing, it takes another batch.
        self.real = None if self.real is None or not self.known else self.real[:, : self.known]

    def reset(self) -> None:
        """Empties it; a stock layer fills its tensors with zeros, which stay cached."""
        if self.is_initialized:  # as `lazy_initialization` leaves them
            self.keys, self.values = self.keys.new_empty(0), self.values.new_empty(0)
        self.buffers, self.filled = None, 0
        self.forget()

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.real = None if self.real is None else self.real.repeat_interleave(repeats, dim=0)
        if self.y_scale is not None:
            self.y_scale = self.y_scale.repeat_interleave(repeats, dim=0)


class LucidStaticLayer(LucidLayer, StaticLayer):
    """A layer of `(K, Y)` with fixed buffers, for `torch.compile`.

    The rows of `Y` that are not written yet are zero, and a zero row changes no solve.
    """

    def __init__(
        self, max_cache_len: int, y_dtype: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        super().__init__(max_cache_len=max_cache_len, **kwargs)
        self.y_dtype = y_dtype

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        dtype = self.stored_dtype(value_states)
        self.values = self.values.to(dtype)
        self.initialize_scale(key_states, value_states)
        for tensor in (self.values, self.y_scale, self.counters(key_states)):
            if tensor is not None and not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(tensor)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keeps keys and values pending; returns all keys, the new ones not among them yet, and the *raw new* values.

        Four small kernels a layer and token are saved by leaving keys and count to the decode operator and `commit`.
        """
        self.begin(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        room = (self.keys, self.values)
        self.pending = Pending(
            key_states, value_states, self.keys, self.values, self.cumulative_length, room=room
        )
        return self.keys, value_states

    def place(self) -> None:
        pending = self.pending
        assert pending is not None
        pending.position = self._rows()
        self.cumulative_length.add_(pending.key.shape[-2])
        pending.all_keys.index_copy_(2, pending.position, pending.key)

    def commit(self, preconditioned: Tensor | None) -> Tensor:
        pending = self.pending
        assert pending is not None
        if preconditioned is not None and pending.position is None:
            self.place()
        keys, values, position = pending.all_keys, pending.past, pending.position
        if preconditioned is not None:
            assert position is not None
            values.index_copy_(2, position, self.in_units(preconditioned).to(values.dtype))
        if self.values is not values:
            # The layer was offloaded after `update`: its buffers are copies made on the host, which nothing above reached.
            rows = self._rows() if position is None else position
            there = rows.to(self.values.device)
            for own, used in ((self.keys, keys), (self.values, values)):
                own.index_copy_(2, there, used.index_select(2, rows).to(own.device))
        if position is None:
            self.cumulative_length.add_(pending.key.shape[-2])
        self.pending = None
        return values

    def _rows(self) -> Tensor:
        """Where the pending tokens go, before they are counted."""
        assert self.pending is not None
        return torch.arange(self.pending.key.shape[-2], device=self.device) + self.cumulative_length


class LucidCache(DynamicCache):
    """A growing cache for a LUCID model: `(K, Y)` in its LUCID layers, stock layers elsewhere.

    It has a stock cache's size and methods (crop, reorder, repeat, select, deepcopy, pickle).
    `generate()` and a forward pass with `use_cache=True` make their own; build one yourself to
    choose `y_dtype`, or to continue a conversation.

    Args:
        config: the config of an enabled model (`model.config`); None lets the model fill in the
            layers on its first use.
        y_dtype: what `Y` is kept in. None: float16 for values in half precision, the values' dtype otherwise.
            float16 is scaled by a power of two for each row and head. torch.bfloat16 is less accurate on
            correlated keys, torch.float32 takes twice the memory.
        **kwargs: as for `transformers.DynamicCache` (`offloading`, ...).

    Raises:
        TypeError: `config` is not a transformers config, `y_dtype` not a floating dtype.
        ValueError: `config` is not that of a LUCID model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lucid_attention.hf import LucidCache, enable
        >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=2)
        >>> model = enable(LlamaForCausalLM(config))
        >>> cache = LucidCache(model.config)
        >>> _ = model(input_ids=__import__("torch").tensor([[1, 2, 3]]), past_key_values=cache)
        >>> cache.get_seq_length()
        3
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        *,
        y_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if config is not None and not isinstance(config, PreTrainedConfig):
            raise TypeError(
                f"config: expected a transformers config (model.config), got {type(config).__name__}"
            )
        lucid = getattr(config, "lucid", None)
        if config is not None and not isinstance(lucid, dict):
            raise ValueError(
                "config: expected the config of a LUCID model, got one without LUCID layers "
                f"({type(config).__name__}); call lucid_attention.hf.enable(model) first"
            )
        if y_dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(
                "y_dtype: expected None, torch.float16, torch.bfloat16, torch.float32 or torch.float64, got "
                f"{y_dtype!r}"
            )
        super().__init__(config=config, **kwargs)
        self.y_dtype = y_dtype
        if isinstance(lucid, dict):
            upgrade(self, lucid["layers"], len(self.layers))

    def reset(self) -> None:
        """Empties the cache; stock growing layers keep zeros in the place of what they held."""
        super().reset()
        for layer in self.layers:
            if isinstance(layer, DynamicLayer) and layer.is_initialized:
                layer.keys, layer.values = layer.keys.new_empty(0), layer.values.new_empty(0)


class _OrderedStream(torch.cuda.Stream):
    """The stream on which an offloading cache brings back its next layer, after all that the model has asked for so far on the
    default stream, the one that transformers' way back waits on, too.

    transformers' own starts at once, while the model may still be writing the layer's copy on the host, or reading from memory of
    a layer before, which is free as soon as Python lets go of it: on a busy GPU logits were wrong.
    """

    def __enter__(self) -> Any:
        self.wait_stream(torch.cuda.default_stream(self.device))
        return super().__enter__()


def upgrade(cache: Cache, lucid_layers: Iterable[int], number_of_layers: int) -> None:
    """Swaps the *empty* stock layers of `cache` at `lucid_layers` for LUCID layers, in place.

    It looks at types and at `is_initialized` only: asking a static layer for its length would
    break compilation. Layers of other kinds stay; the attention function recomputes what they hold.
    """
    if cache.layer_class_to_replicate is DynamicLayer:
        while len(cache.layers) < number_of_layers:
            cache.layers.append(DynamicLayer())
    stream = getattr(cache, "prefetch_stream", None)
    if (
        stream is not None
        and stream.device.type == "cuda"
        and not torch.compiler.is_compiling()
        and not isinstance(stream, _OrderedStream)
    ):
        cache.prefetch_stream = _OrderedStream(stream.device)
    y_dtype = getattr(cache, "y_dtype", None)
    for index in lucid_layers:
        if index >= len(cache.layers):
            continue
        layer = cache.layers[index]
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[index] = LucidDynamicLayer(y_dtype)
        elif type(layer) is StaticLayer and not layer.is_initialized:
            cache.layers[index] = LucidStaticLayer(layer.max_cache_len, y_dtype)


def arm(cache: Cache, lucid_layers: Iterable[int], number_of_layers: int) -> None:
    """Prepares a cache for one forward pass of the model with these LUCID layers.

    Raises ValueError if the cache belongs to a model with other LUCID layers, is quantised, or was reset and is a stock one.
    """
    upgrade(cache, lucid_layers, number_of_layers)
    if not torch.compiler.is_compiling():
        _check_reset(cache)
    expected = set(lucid_layers)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, LucidLayer):
            if index not in expected or len(cache.layers) > number_of_layers:
                raise ValueError(
                    f"past_key_values: layer {index} of this cache holds preconditioned values, "
                    f"but the model's LUCID layers are {sorted(expected)} of {number_of_layers}; "
                    "the cache belongs to another model, or generate(assistant_early_exit=...), which shares one cache "
                    "between a model and its first layers, is not supported for this one; start with a new cache"
                )
            layer.armed = True
        elif index in expected and isinstance(layer, _QUANTIZED):
            raise ValueError(
                "past_key_values: quantised caches are not supported with LUCID attention: they "
                "quantise the raw values before these can be preconditioned; use the default "
                "(dynamic) or the static cache"
            )


def _check_reset(cache: Cache) -> None:
    """A stock growing cache that is reset keeps zeros in its stock layers, which later tokens would attend to."""
    growing = [x for x in cache.layers if isinstance(x, DynamicLayer) and x.is_initialized]
    empty = [x.keys.numel() == 0 for x in growing if isinstance(x, LucidDynamicLayer)]
    if any(empty) and any(x.keys.numel() for x in growing if not isinstance(x, LucidDynamicLayer)):
        raise ValueError(
            "past_key_values: this cache was reset, and of its layers those of softmax attention hold rows of zeros since; take a "
            "new one, or a LucidCache, which is empty after a reset"
        )


def check_room(cache: Cache, length: int, mask: Tensor | None = None) -> None:
    """Raises ValueError if the static LUCID layers of `cache` have no room for `length` more tokens, or a padding mask
    (batch, keys) says nothing of some of them: the rest of a static cache's room is masked.

    It reads one number from the device; layers are as full as the first of them.
    """
    for layer in cache.layers:
        if isinstance(layer, LucidStaticLayer):
            cached = int(layer.cumulative_length) if layer.is_initialized else 0
            if cached + length > layer.max_cache_len:
                raise ValueError(
                    f"past_key_values: the static cache is full: it holds {cached} of {layer.max_cache_len} tokens, "
                    f"and {length} more came. Nothing was written; continue with a larger one "
                    "(StaticCache(config, max_cache_len=...)) or a growing one (LucidCache)"
                )
            if mask is not None and mask.ndim == 2 and mask.shape[1] < cached + length:
                raise ValueError(
                    f"attention_mask: expected one entry for each of the {cached + length} keys, cached ones "
                    f"included, got {mask.shape[1]}"
                )
            return


def disarm(cache: Cache) -> None:
    """Takes back what `arm` permitted and the forward pass did not use."""
    for layer in cache.layers:
        if isinstance(layer, LucidLayer):
            layer.armed = False
