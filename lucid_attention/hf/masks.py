"""Which tokens attend to which, in the only two forms a LUCID layer can take.

The solve is bounded for documents times padding, and for no other mask (`precondition/README.md`).
So a LUCID layer never gets an N x N mask: the mask function registered with transformers returns
the padding mask, `(batch, keys)` bool, or None; documents come from `position_ids`. A 4-D mask that
a user made is read once, checked to be of that form, and converted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import causal_mask_function, sdpa_mask

_REMEDY = (
    "LUCID's solve is bounded only for causal masks with documents and padding; "
    "use such a mask, or leave this model's layers on softmax attention"
)


def lucid_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask function of the "lucid" attention implementation.

    For full-attention layers: bool `(batch, kv_length)`, True where a key may be seen by the last
    query, or None where all of them may. For sliding and chunked layers (`local_size` given)
    transformers' own mask for sdpa, because those layers run there.

    Raises:
        ValueError: a mask function that is not causal within documents, or an `attention_mask` too
            short for the keys.
    """
    if local_size is not None:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )
    tracing = torch.compiler.is_compiling()
    if use_vmap or not (tracing or _is_causal_within_documents(mask_function)):
        raise ValueError(f"attention mask: expected a plain causal one; {_REMEDY}")
    static = isinstance(q_offset, Tensor) or kv_length != q_offset + q_length
    mask = attention_mask
    if mask is not None:
        mask = mask.to(device=device, dtype=torch.bool)
        missing = kv_offset + kv_length - mask.shape[-1]
        if missing > 0 and not static:
            raise ValueError(
                f"attention_mask: expected one entry for each of the {kv_offset + kv_length} keys, "
                f"cached ones included, got {mask.shape[-1]}"
            )
        mask = F.pad(mask, (0, max(missing, 0)))[:, kv_offset : kv_offset + kv_length]
    if static:
        written = torch.arange(kv_length, device=device) < q_offset + q_length
        return written.expand(batch_size, -1) if mask is None else mask & written
    if mask is not None and not tracing and bool(mask.all()):
        return None
    return mask


def _is_causal_within_documents(mask_function: Callable[..., Any]) -> bool:
    """Whether a mask function is transformers' causal one, possibly times its packing masks.

    transformers composes mask functions as closures and says nothing else about them, so this
    recognises the ones it builds for packed batches and no others.
    """
    if mask_function is causal_mask_function:
        return True
    name = getattr(mask_function, "__qualname__", "")
    if not inspect.isfunction(mask_function):
        return False
    if not name.startswith("and_masks."):
        return False
    parts = inspect.getclosurevars(mask_function).nonlocals["mask_functions"]
    others = [part for part in parts if not _is_packing(part)]
    return bool(others) and all(_is_causal_within_documents(_unwrapped(part)) for part in others)


def _is_packing(part: Callable[..., Any]) -> bool:
    return getattr(part, "__qualname__", "").startswith("packed_sequence_mask_function.")


def _unwrapped(part: Callable[..., Any]) -> Callable[..., Any]:
    """Newer transformers evaluates the causal function at positions within the documents."""
    if getattr(part, "__qualname__", "").startswith("remap_positions_for_packed_sequence."):
        inner: Callable[..., Any] = inspect.getclosurevars(part).nonlocals["mask_function"]
        return inner
    return part


@dataclass
class Packing:
    """Documents packed into rows: which tokens are real, in order, and where documents start.

    `index`: int64 `(tokens,)` into the flattened `(batch * seq)`, None where every token is real.
    `cu_seqlens`: int32, offsets of the documents among those tokens. `max_seqlen`: an upper bound.
    """

    index: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int


def documents_from_positions(position_ids: Tensor, batch: int) -> Tensor | None:
    """Document numbers `(batch, seq)` of a packed batch, None where each row is one document.

    A document starts wherever a position is not its predecessor's plus one, as in transformers.

    Raises ValueError if a later document does not start at position 0: then the rows are not
    packed documents but, say, the shard of a context-parallel run.
    """
    position_ids = position_ids.expand(batch, -1)
    starts = torch.zeros_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=-1) != 1
    if not torch.compiler.is_compiling():
        if not bool(starts.any()):
            return None
        if bool((position_ids[starts] != 0).any()):
            raise ValueError(
                "position_ids: expected every packed document to start at position 0, got a jump "
                "to another position (documents cut by context parallelism, or positions with "
                "gaps); LUCID needs whole documents in each row"
            )
    return starts.cumsum(-1)


def pack(documents: Tensor, real: Tensor | None = None) -> Packing:
    """Offsets of the documents numbered in `documents` `(batch, seq)`, padding left out."""
    batch, seq = documents.shape
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents.diff(dim=-1) != 0
    starts = starts.flatten()
    index = None
    if real is not None:
        # The first *real* token of a document starts it among the real tokens.
        index = real.flatten().nonzero().squeeze(-1)
        rows = torch.arange(batch, device=documents.device).unsqueeze(-1)
        number = (rows * (seq + 1) + documents).flatten()[index]
        starts = torch.ones_like(number, dtype=torch.bool)
        starts[1:] = number.diff() != 0
    total = starts.numel()
    if torch.compiler.is_compiling():
        # No shape may depend on the data: the unused offsets are empty documents at the end.
        positions = torch.arange(total, device=documents.device)
        offsets = torch.where(starts, positions, total).sort().values
    else:
        offsets = starts.nonzero().squeeze(-1)
    cu_seqlens = F.pad(offsets, (0, 1), value=total).to(torch.int32)
    return Packing(index, cu_seqlens, seq)


def convert_4d_mask(
    mask: Tensor, batch: int, q_length: int, kv_length: int
) -> tuple[Tensor, Tensor | None]:
    """Reads a user's 4-D mask as `(padding mask (batch, keys), documents or None)`.

    Args:
        mask: `(batch or 1, 1, q_length, kv_length)`, bool (True: attend) or additive float.

    Raises:
        ValueError: the mask is not exactly causal x documents x padding, or differs between heads,
            or cannot be read because the forward pass is being compiled.
    """
    if torch.compiler.is_compiling():
        raise ValueError(
            "attention_mask: a 4-D mask cannot be checked inside torch.compile; pass the 2-D "
            "padding mask, or position_ids that restart at 0 in every document"
        )
    if tuple(mask.shape[2:]) != (q_length, kv_length):
        raise ValueError(
            f"attention_mask: expected a 4-D mask of shape (batch, 1, {q_length}, {kv_length}), "
            f"got {tuple(mask.shape)}; with a static cache pass the 2-D padding mask"
        )
    allowed = mask if mask.dtype == torch.bool else _attend(mask)
    if not torch.equal(allowed, allowed[:, :1].expand_as(allowed)):
        raise ValueError(f"attention_mask: expected one mask for all heads; {_REMEDY}")
    allowed = allowed[:, 0].expand(batch, -1, -1)
    past = kv_length - q_length
    own = allowed.diagonal(offset=past, dim1=1, dim2=2)  # whether a token sees itself: it is real
    real = torch.cat([allowed[:, :, :past].any(dim=1), own], dim=1)

    # A token begins a document when it does not see the real token before it.
    documents = torch.zeros(real.shape, dtype=torch.int64, device=mask.device)
    if past == 0:
        before = torch.where(real, torch.arange(kv_length, device=mask.device), -1).cummax(1).values
        before = F.pad(before[:, :-1], (1, 0), value=-1)
        sees = allowed.gather(2, before.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        documents = (real & (before >= 0) & ~sees).cumsum(1)
    queries = torch.arange(past, kv_length, device=mask.device).unsqueeze(-1)
    causal = torch.arange(kv_length, device=mask.device) <= queries
    same = documents[:, past:, None] == documents[:, None, :]
    expected = causal & same & real[:, None, :]
    wrong = (allowed != expected) & (own[:, :, None] | allowed.any(dim=-1, keepdim=True))
    if bool(wrong.any()):
        row = [int(i) for i in wrong.nonzero()[0]]
        raise ValueError(
            f"attention_mask: expected a 4-D mask that is exactly causal x documents x padding, got "
            f"another value at (batch, query, key) = {tuple(row)}; {_REMEDY}; with a static cache, whose room is wider "
            "than what is cached, pass the 2-D padding mask"
        )
    if past == 0 and bool((documents[:, 1:] != documents[:, :-1]).any()):
        return real, documents
    return real, None


def _attend(additive: Tensor) -> Tensor:
    if not additive.is_floating_point():
        raise ValueError(
            f"attention_mask: expected a 4-D mask of bool or of floating point, got {additive.dtype}; use "
            "attention_mask.bool() if it is 1 where attention may go"
        )
    blocked = additive <= torch.finfo(additive.dtype).min / 2
    if bool(((additive != 0) & ~blocked).any()):
        raise ValueError(
            "attention_mask: expected an additive 4-D mask of zeros and -inf (or the dtype's "
            f"minimum), got other values (a position bias?); {_REMEDY}"
        )
    return ~blocked
