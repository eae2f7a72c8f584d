"""What happens before every forward pass of an enabled decoder."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from .attention import CONTEXT, ForwardContext, is_in_a_graph
from .cache import LucidCache, arm, check_room, disarm
from .masks import documents_from_positions, pack


def before_forward(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of an enabled decoder: prepares its cache, finds packed documents, and hands
    both to the attention layers. A hook, because `generate()` hard-codes its cache classes.
    """
    if args:
        names = list(inspect.signature(type(decoder).forward).parameters)[1:]
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    config: Any = decoder.config
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions: attention weights are never formed with LUCID attention; expected "
            "False, got True"
        )
    if not torch.compiler.is_compiling():
        refuse_context_parallel()
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if cache is not None and not isinstance(cache, Cache):
        raise TypeError(
            f"past_key_values: expected a transformers Cache (LucidCache, DynamicCache, ...), got "
            f"{type(cache).__name__}"
        )
    rows = next((x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None)  # fmt: skip
    if isinstance(mask, Tensor) and mask.ndim == 2 and rows is not None and mask.shape[0] != rows.shape[0]:  # fmt: skip
        raise ValueError(
            f"attention_mask: expected a row for each of the {rows.shape[0]} rows of the batch, got {mask.shape[0]}"
        )
    if isinstance(mask, Tensor) and mask.ndim not in (2, 4):
        raise ValueError(
            "attention_mask: expected a padding mask (batch, keys) or a 4-D mask (batch, 1, "
            f"queries, keys), got shape {tuple(mask.shape)}"
        )
    positions = kwargs.get("position_ids")
    inputs = kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    use_cache = kwargs.get("use_cache")
    use_cache = config.use_cache if use_cache is None else use_cache
    if getattr(decoder, "gradient_checkpointing", False) and decoder.training:
        use_cache = False

    context = ForwardContext()
    if inputs is None:
        return (), {**kwargs, CONTEXT: context}  # the model says itself what it lacks
    if mask is None and positions is not None and positions.ndim == 2:
        if cache is None:
            context.documents = documents_from_positions(positions, inputs.shape[0])
        elif (
            inputs.shape[1] > 1
            and not is_in_a_graph(inputs)
            and documents_from_positions(positions, inputs.shape[0]) is not None
        ):
            raise ValueError(
                "position_ids: they restart, as those of packed documents do, and packed documents cannot be cached: a cache "
                "does not know where they start; pass use_cache=False and no past_key_values"
            )
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        if positions is None or mask is not None or cache is not None:
            raise ValueError(
                "cu_seq_lens_q: packed documents need position_ids that restart at 0 in every "
                "document, no attention_mask and no past_key_values"
            )
        if not torch.compiler.is_compiling():
            _check_offsets(cu_seqlens, context.documents, inputs)
        context.cu_seqlens, context.max_seqlen = cu_seqlens, kwargs.get("max_length_q")
    if use_cache and (context.documents is not None or cu_seqlens is not None):
        raise ValueError(
            "position_ids: packed documents cannot be cached, because transformers then forgets "
            "where they start; pass use_cache=False"
        )
    if cache is None and use_cache:
        cache = LucidCache(config)
        kwargs["past_key_values"] = cache
    if cache is not None:
        if getattr(cache, "offloading", False) and (
            torch.compiler.is_compiling() or has_compiled_parts(decoder)
        ):
            refuse_compiled_offloading()
        arm(cache, config.lucid["layers"], config.num_hidden_layers)
        if not is_in_a_graph(inputs):
            check_room(cache, inputs.shape[1], mask if isinstance(mask, Tensor) else None)
        context.cache = cache
    kwargs[CONTEXT] = context
    return (), kwargs


def after_forward(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Forward hook of an enabled decoder, called when the pass failed as well: whatever of its
    cache was not used is disarmed, so that no other model can use it.
    """
    cache = kwargs.get("past_key_values")
    if isinstance(cache, Cache):
        disarm(cache)


def _check_offsets(cu_seqlens: Tensor, documents: Tensor | None, inputs: Tensor) -> None:
    """Sliding layers take the documents from the positions, LUCID layers from the offsets."""
    found = cu_seqlens.unique()  # without empty documents, which have no positions
    if documents is None:  # each row is one
        documents = torch.zeros(inputs.shape[:2], dtype=torch.int64, device=inputs.device)
    expected = pack(documents).cu_seqlens.to(found)
    if not torch.equal(found, expected):
        raise ValueError(
            f"cu_seq_lens_q: expected the offsets at which position_ids restart, "
            f"{expected.tolist()}, got {cu_seqlens.tolist()}"
        )


def has_compiled_parts(decoder: nn.Module) -> bool:
    """Whether a module of the decoder was compiled in place (`layer.compile()`). One whose `forward` was replaced is not found."""
    return any(module._compiled_call_impl is not None for module in decoder.modules())


OFFLOADING_COMPILED = (
    "past_key_values: an offloaded cache in a compiled step, which torch (2.11) cannot trace; call "
    "generate(..., disable_compile=True), or do not compile the model"
)


@torch.compiler.disable(reason=OFFLOADING_COMPILED)  # the reason is what `fullgraph=True` shows
def refuse_compiled_offloading() -> None:
    """Raises ValueError in a compiled step, whose tracing would end the whole process, a stock model's as well: torch 2.11 breaks off at
    the streams of transformers' offloading (`torch._dynamo.graph_bytecode_inputs`).
    """
    raise ValueError(OFFLOADING_COMPILED)


def refuse_context_parallel() -> None:
    """Raises ValueError inside a run that shards the sequence over ranks: each rank would solve its
    own shard only, and be silently wrong.
    """
    found = None
    if "context_parallel" in getattr(F.scaled_dot_product_attention, "__module__", "") or (
        "experimental._attention" in getattr(F.scaled_dot_product_attention, "__module__", "")
    ):
        found = "torch's context_parallel"
    state = sys.modules.get("accelerate.state")
    shared = state.AcceleratorState._shared_state if state is not None else {}
    parallelism = shared.get("parallelism_config")
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        found = "accelerate's ParallelismConfig with cp_size or sp_size above 1"
    if found:
        raise ValueError(
            f"{found}: LUCID attention does not support a sequence sharded over ranks; use data "
            "or FSDP parallelism"
        )
