"""The attention function behind `attn_implementation="lucid"`.

    Y = L^-1 V            in the layers that `enable` chose, `lucid_attention.precondition`
    O = softmax(...) Y    `lucid_attention.attention.softmax_attention`, memory linear in N

What it does with a cache (hugging-face.md calls this the deferred commit):

| layer and cache | values preconditioned | then |
|---|---|---|
| not a LUCID layer | none | plain attention |
| no cache | all | |
| LUCID cache layer, empty | all | committed |
| LUCID cache layer, some past | the new ones, against `(K, Y)` | committed |
| the same, few tokens on a GPU | in one pass with the attention, `lucid_attention.decode` | |
| stock cache layer | all of them, again at every step | warned about once |
"""

from __future__ import annotations

import itertools
import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lucid_attention import lucid_attention_with_kvcache, precondition, precondition_varlen
from lucid_attention.attention import softmax_attention, softmax_attention_varlen
from lucid_attention.decode.launch import why_not_this_many

from .cache import LucidLayer
from .masks import Packing, convert_4d_mask, pack
from .strength import SUBMODULE, FixedStrength, strength_of

CONTEXT = "lucid_context"  # the keyword under which a decoder's hook hands it to every layer


@dataclass
class ForwardContext:
    """What one forward pass of an enabled decoder tells its attention layers.

    `cache`: the cache in use. `documents`: document numbers `(batch, seq)` of a packed batch.
    `packing`, `masks`, `local_masks`: worked out by the first layer that needs them, then shared;
    masks by the id of the tensor they were made from, which is kept alive beside them.
    `padding_checked`: whether a layer has compared the mask with what its cache remembers. `starts`: numbers of
    cached tokens, on a device (a model's layers may be on several).
    """

    cache: Cache | None = None
    documents: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    packing: Packing | None = None
    masks: dict[int, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict)
    local_masks: dict[int, tuple[Tensor | None, Tensor]] = field(default_factory=dict)
    padding_checked: bool = False
    starts: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)


_CHANGES_SCORES = ("block_indices", "indices", "position_bias")
"""Of what models hand their attention function, what would change its result and is not done."""


def lucid_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, in the form transformers' `AttentionInterface` calls.

    Args:
        module: the attention layer; a LUCID layer holds its strength as `module.lucid`.
        query: `(B, H, Q, D)`; key, value: `(B, Hkv, KV, D)`, after the cache's update.
        attention_mask: what `lucid_mask` returned, or a user's 4-D mask; a bool or additive 4-D
            mask in sliding and chunked layers.
        dropout, scaling, softcap, s_aux: of the softmax. The preconditioner has a scale of its own
            (`enable`); it neither sees the softcap nor the sinks.
        **kwargs: `lucid_context`, and whatever the model adds.

    Returns:
        `(B, Q, H, Dv)` and None: attention weights are never formed.

    Raises:
        ValueError: the model was not prepared by `enable`, a mask or a combination of arguments is
            not supported (each message says which and what to do).
    """
    context: ForwardContext | None = kwargs.get(CONTEXT)
    if context is None:
        raise ValueError(
            f'attn_implementation="lucid": {type(module).__name__} got no "{CONTEXT}" from its '
            "decoder: the implementation was set after construction (call "
            "lucid_attention.hf.enable(model) instead), or a layer was called by itself (run the "
            "whole model), or this family does not hand its keyword arguments on to the attention "
            "function (it is not supported)"
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions: attention weights are never formed with LUCID attention; "
            "expected False, got True"
        )
    for name in _CHANGES_SCORES:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}: {type(module).__name__} chooses or shifts its scores by it, which LUCID attention does not do, nor the "
                "layers beside it; expected None. The family is not supported"
            )
    if _is_local(module, kwargs):
        if context.documents is not None:
            attention_mask = _within_documents(context, attention_mask, query.shape[2])
        return _stock(
            module, query, key, value, attention_mask, dropout, scaling, softcap, s_aux, kwargs
        )

    query, key, value = _autocast(query, key, value)
    real, documents = attention_mask, context.documents
    if attention_mask is not None and attention_mask.ndim == 4:
        if id(attention_mask) not in context.masks:
            context.masks[id(attention_mask)] = (
                attention_mask,
                *convert_4d_mask(attention_mask, query.shape[0], query.shape[2], key.shape[2]),
            )
        _, real, documents = context.masks[id(attention_mask)]

    index: int = module.layer_idx  # type: ignore[assignment]
    layer = None
    if context.cache is not None and index < len(context.cache.layers):
        layer = context.cache.layers[index]
    softmax = _Softmax(scaling, softcap, s_aux, dropout)
    lucid = getattr(module, SUBMODULE, None)

    if documents is not None or context.cu_seqlens is not None:
        if context.cache is not None:
            raise ValueError(
                "attention_mask: packed documents cannot be cached, because a cache does not know "
                "where they start; pass use_cache=False and no past_key_values"
            )
        output = _packed(context, _unless_off(lucid), query, key, value, real, documents, softmax)
    elif isinstance(layer, LucidLayer) and layer.pending is not None:
        output = _cached(context, layer, lucid, query, real, softmax)
    else:
        keys, values, real, start = _aligned(layer, query.shape[2], key, value, real)
        lucid = _unless_off(lucid)
        if lucid is not None:
            if keys.shape[2] > query.shape[2] and not torch.compiler.is_compiling():
                warn_once(
                    "stock cache",
                    "this cache layer holds raw values, so LUCID attention preconditions all of "
                    "them again at every step. That is slow, and right only if this model computed them: of "
                    "softmax attention's cache it goes on with softmax's keys and values. A new cache (LucidCache, an "
                    "empty DynamicCache or StaticCache, or none) is upgraded by itself in a model "
                    "prepared with lucid_attention.hf.enable.",
                )
            values = precondition(
                keys,
                values,
                kernel_scale=lucid.kernel_scale,
                strength=strength_of(lucid, values),
                key_mask=real,
                precision=lucid.precision,
                impl=lucid.impl,
            )
        output = softmax(query, keys, values, real, start)
    return output.transpose(1, 2).contiguous(), None


@dataclass
class _Softmax:
    """The softmax half of a layer, with what the model asks of it."""

    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    dropout: float

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        query_start: Tensor | None = None,
    ) -> Tensor:
        return softmax_attention(
            query,
            key,
            value.to(query.dtype),
            scale=self.scale,
            key_mask=key_mask,
            query_start=query_start,
            softcap=self.softcap,
            sinks=self.sinks,
            dropout=self.dropout,
        )

    def packed(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
        """The same for packed documents, `(total, heads, D)`."""
        value = value.to(query.dtype)
        if self.dropout == 0.0:
            return softmax_attention_varlen(
                query,
                key,
                value,
                packing.cu_seqlens,
                max_seqlen=packing.max_seqlen,
                scale=self.scale,
                softcap=self.softcap,
                sinks=self.sinks,
            )
        if torch.compiler.is_compiling():
            raise ValueError(
                "position_ids: packed documents with attention dropout cannot be compiled; set the "
                "model's attention_dropout to 0, or run without torch.compile"
            )
        # No kernel takes packed documents and dropout at once, so one document at a time.
        rows = []
        for start, end in itertools.pairwise(packing.cu_seqlens.tolist()):
            q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
            rows.append(self(q, k, v, None)[0].transpose(0, 1))
        return torch.cat(rows)


def _cached(
    context: ForwardContext,
    layer: LucidLayer,
    lucid: Any,
    query: Tensor,
    real: Tensor | None,
    softmax: _Softmax,
) -> Tensor:
    """Preconditions the pending rows against the cached `(K, Y)`, commits them, attends to all."""
    pending = layer.pending
    assert pending is not None
    length = query.shape[2]
    if not context.padding_checked and not is_in_a_graph(query):
        layer.check_padding(real)
        context.padding_checked = True
    if _is_one_pass(layer, lucid, query, softmax):
        return _one_pass(context, layer, lucid, query, real, softmax)
    layer.place()
    keys, key, value = _autocast(pending.all_keys, pending.key, pending.value)
    if pending.position is None:
        new_real = None if real is None else real[:, -length:]
        written = keys.shape[2] - length
    else:
        new_real = None if real is None else real.index_select(1, pending.position)
        # The rows of Y that are still zero change nothing. A graph goes through them all; elsewhere the host asks.
        written = keys.shape[2] if is_in_a_graph(query) else _count(layer) - length
    past = keys[:, :, :written], layer.in_full(pending.past[:, :, :written])
    narrow = value.dtype.itemsize < 4 and pending.past.dtype != value.dtype
    new = precondition(
        key,
        value,
        kernel_scale=lucid.kernel_scale,
        strength=strength_of(lucid, value),
        key_mask=new_real,
        past=past if written > 0 else None,
        out_dtype=torch.float32 if narrow else None,
        precision=lucid.precision,
        impl=lucid.impl,
    )
    values = layer.commit(new)
    keys, values, real, start = _aligned(layer, length, keys, values, real)
    # All new: as they were solved, not as they were stored.
    values = new if values.shape[2] == length else layer.in_full(values)
    return softmax(query, keys, values, real, start)


def _is_one_pass(layer: LucidLayer, lucid: Any, query: Tensor, softmax: _Softmax) -> bool:
    """Whether this is the decode kernel's: few tokens after a past, on a GPU, without gradients.

    Which GPUs it runs on the operator knows, which is opaque to a compiler.
    """
    pending = layer.pending
    assert pending is not None
    key, value = pending.key, pending.value
    if pending.room is None or not layer.scaled or softmax.dropout or pending.past.shape[2] == 0:
        return False
    if lucid.impl not in ("auto", "triton") or not query.is_cuda:
        return False
    # Under autocast, or in models that compute keys in float32, dtypes may differ.
    if len({query.dtype, key.dtype, value.dtype, pending.room[0].dtype}) > 1:
        return False
    if torch.is_grad_enabled() and (
        any(x.requires_grad for x in (query, key, value, *lucid.parameters()))
    ):
        return False
    return why_not_this_many(query, key, value) is None


def _one_pass(
    context: ForwardContext,
    layer: LucidLayer,
    lucid: Any,
    query: Tensor,
    real: Tensor | None,
    softmax: _Softmax,
) -> Tensor:
    """One kernel reads the cache once, for the new rows of `Y` and the output, and appends the rows."""
    pending = layer.pending
    assert pending is not None and pending.room is not None
    start = pending.start
    if start is None:
        known = pending.past.shape[2], query.device
        if known not in context.starts:
            context.starts[known] = torch.full(
                (1,), known[0], dtype=torch.int32, device=query.device
            )
        start = context.starts[known]
    output = lucid_attention_with_kvcache(
        query,
        pending.key,
        pending.value,
        *pending.room,
        start,
        y_scale=layer.y_scale,
        key_mask=real,
        scale=softmax.scale,
        kernel_scale=lucid.kernel_scale,
        strength=strength_of(lucid, pending.value),
        softcap=softmax.softcap,
        sinks=softmax.sinks,
        workspace=layer.counters(pending.key),
        impl=lucid.impl,
    )
    layer.commit(None)
    return output


def is_in_a_graph(tensor: Tensor) -> bool:
    """Whether this pass is being compiled or captured, so that the host can read nothing."""
    return torch.compiler.is_compiling() or (
        tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    )


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """Casts as autocast does before SDPA: RoPE leaves keys in float32 beside half-width values."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def _count(layer: Any) -> int:
    """Tokens in a static layer, the new ones among them. Asks the device."""
    return int(layer.cumulative_length)


def _aligned(
    layer: Any, length: int, keys: Tensor, values: Tensor, real: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Static buffers end in rows that are not written yet: where do the queries stand in them?

    Returns keys, values, mask and the position of the first query, None if the ends are aligned.
    """
    if not isinstance(layer, StaticLayer) or keys.shape[2] == length:
        return keys, values, real, None
    if length == 1 and real is not None:
        return keys, values, real, None  # one query sees whatever the mask leaves
    if torch.compiler.is_compiling():
        return keys, values, real, layer.cumulative_length - length
    # Prefill runs eagerly; cutting the buffers there lets the fused causal kernels do it.
    end = _count(layer)
    return keys[:, :, :end], values[:, :, :end], None if real is None else real[:, :end], None


def _packed(
    context: ForwardContext,
    lucid: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    documents: Tensor | None,
    softmax: _Softmax,
) -> Tensor:
    """Documents packed into rows: each is solved and attended to by itself."""
    if context.packing is None:
        if context.cu_seqlens is not None:
            longest = context.max_seqlen or key.shape[0] * key.shape[2]
            context.packing = Packing(None, context.cu_seqlens.to(torch.int32), longest)
        else:
            assert documents is not None
            context.packing = pack(documents, real)
    packing = context.packing
    batch, _, seq, _ = query.shape

    def gather(x: Tensor) -> Tensor:
        flat = x.transpose(1, 2).flatten(0, 1)
        return flat if packing.index is None else flat[packing.index]

    q, k, v = gather(query), gather(key), gather(value)
    if lucid is not None:
        v = precondition_varlen(
            k,
            v,
            packing.cu_seqlens,
            max_seqlen=packing.max_seqlen,
            kernel_scale=lucid.kernel_scale,
            strength=strength_of(lucid, v),
            precision=lucid.precision,
            impl=lucid.impl,
        )
    output = softmax.packed(q, k, v, packing)
    if packing.index is not None:
        scattered = output.new_zeros((batch * seq, *output.shape[1:]))
        output = scattered.index_copy(0, packing.index, output)
    return output.unflatten(0, (batch, seq)).transpose(1, 2)


def _unless_off(lucid: Any) -> Any:
    """A layer of strength 0 that caches nothing is a softmax layer, and costs what one costs."""
    return None if isinstance(lucid, FixedStrength) and lucid.is_off else lucid


def _is_local(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether this layer is sliding or chunked, so that its mask is transformers' own."""
    config: Any = module.config
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return bool(layer_types[module.layer_idx] != "full_attention")
    return kwargs.get("sliding_window") is not None


def _within_documents(context: ForwardContext, mask: Tensor | None, length: int) -> Tensor:
    """The mask of a local layer, cut at the documents. Most families' masks are already, and then
    this changes nothing; GPT-OSS does not tell its masks about packing (transformers 5.17, 5.23).
    """
    if id(mask) not in context.local_masks:
        documents = context.documents
        assert documents is not None
        same = documents[:, None, :, None] == documents[:, None, None, :]
        if mask is None:
            same = same & torch.ones(length, length, dtype=torch.bool, device=same.device).tril()
        else:
            same = same & mask  # bool: `lucid_mask` made it, a packed batch comes without a mask
        context.local_masks[id(mask)] = (mask, same)
    return context.local_masks[id(mask)][1]


def _stock(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """A sliding or chunked layer, as the model would run it without LUCID."""
    kwargs = {name: kwarg for name, kwarg in kwargs.items() if name != CONTEXT}
    if softcap is None and s_aux is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    # transformers' sdpa function has neither softcap nor sinks; the model's own eager one has.
    if attention_mask is None:
        # None is how transformers writes "causal", and after it the unused end of a static buffer.
        length = query.shape[2]
        if length > 1:
            key, value = key[:, :, :length], value[:, :, :length]
        ones = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = (ones.tril() if length > 1 else ones)[None, None]
    if attention_mask.dtype == torch.bool:
        blocked = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(
            ~attention_mask, blocked
        )
    eager = sys.modules[type(module).__module__].eager_attention_forward
    output, _ = eager(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        softcap=softcap,
        s_aux=s_aux,
        **kwargs,
    )
    return output, None


_WARNED: set[str] = set()


def warn_once(key: str, message: str) -> None:
    """Warns once a process for each key."""
    if key not in _WARNED:
        _WARNED.add(key)
        warnings.warn(message, stacklevel=2)
