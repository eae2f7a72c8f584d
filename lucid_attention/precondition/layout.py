"""Batches and packed sequences as the chains that the blocked solve works on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import torch
from torch import Tensor

from . import blocked
from .blocked import Keys, Rows
from .numerics import compute_dtype
from .validation import check_offsets

# Columns that a tile should at least span before more chains share it.
_MIN_TILE_WIDTH = 512


class Chains:
    """A dense batch seen as ``batch * heads`` independent chains, a few of them at a time."""

    def __init__(
        self,
        key: Tensor,
        strength: Tensor | None,
        key_mask: Tensor | None,
        past_key: Tensor | None,
        past_preconditioned: Tensor | None,
        kernel_scale: float,
    ) -> None:
        self.batch, self.heads, self.seq, _ = key.shape
        self.dtype = compute_dtype(key)
        self.kernel_scale = kernel_scale
        self.mask = key_mask
        if key_mask is not None:
            key = torch.where(key_mask[:, None, :, None], key, 0.0)
        self.key = flat(key, self.dtype)
        self._strength = None if strength is None else strength.repeat(self.batch)
        self.past_key: Tensor | None = None
        self.past_preconditioned: Tensor | None = None
        self.bad: Tensor | None = None
        self.past_bad: Tensor | None = None
        if past_key is not None and past_preconditioned is not None:
            # A padded row of the past (y = 0) answers nothing; what its key holds must not matter.
            empty = (past_preconditioned == 0).all(-1, keepdim=True)
            past_key = torch.where(empty & ~past_key.isfinite(), 0.0, past_key)
            self.past_key = flat(past_key, self.dtype)
            self.past_preconditioned = flat(past_preconditioned, self.dtype)

    def confine(self, *operands: Tensor) -> None:
        """Set what is not finite to 0 in the keys, the past and, in place, flat ``operands``.

        0 * NaN would spread it; `spoil` knows afterwards where it was.
        """
        if not _surely_finite(self.key, *operands):
            self.bad = _not_finite(self.key, *operands)
            if self.mask is not None:
                self.bad &= self.mask.repeat_interleave(self.heads, 0)
            self.key = torch.where(self.bad[..., None], 0.0, self.key)
            for operand in operands:
                operand.masked_fill_(self.bad[..., None], 0.0)
        if self.past_key is None or self.past_preconditioned is None:
            return
        if not _surely_finite(self.past_key, self.past_preconditioned):
            bad = _not_finite(self.past_key, self.past_preconditioned)[..., None]
            self.past_bad = bad.flatten(1).any(1)
            self.past_key = torch.where(bad, 0.0, self.past_key)
            self.past_preconditioned = torch.where(bad, 0.0, self.past_preconditioned)

    def spoil(self, *chains: Tensor) -> None:
        """NaN into ``chains``, each ``(C, ..)``, where anything in the chain or its past was not finite."""
        here = None if self.bad is None else self.bad.any(1)
        for bad in (here, self.past_bad):
            for x in chains:
                if bad is not None and x.numel() > 0:
                    x.masked_fill_(bad.view(-1, *[1] * (x.ndim - 1)), float("nan"))

    def spoil_after(self, rows: Tensor) -> None:
        """NaN into the tokens' rows from the first that was not finite on; from a past, into all."""
        here = None if self.bad is None else self.bad.cumsum(1) > 0
        before = None if self.past_bad is None else self.past_bad[:, None]
        for bad in (here, before):
            if bad is not None:
                if self.mask is not None:
                    bad = bad & self.mask.repeat_interleave(self.heads, 0)
                rows.masked_fill_(bad[..., None], float("nan"))

    def parts(self) -> Iterator[slice]:
        return parts_of(self.key)

    def keys(self, part: slice) -> Keys:
        return blocked.make_keys(self.key[part], self._reference(part), self.kernel_scale)

    def past(self, part: slice) -> tuple[Keys, Tensor] | None:
        if self.past_key is None or self.past_preconditioned is None:
            return None
        keys = blocked.make_keys(self.past_key[part], self._reference(part), self.kernel_scale)
        return keys, self.past_preconditioned[part]

    def strength(self, part: slice) -> Tensor | None:
        return column(self._strength, part, self.dtype)

    def tokens(self, part: slice) -> Tensor | None:
        if self.mask is None:
            return None
        index = torch.arange(part.start, part.stop, device=self.mask.device) // self.heads
        return self.mask[index][..., None]

    def _reference(self, part: slice) -> Tensor:
        """The key of each chain's first token, which the kernel is centred on."""
        if self.past_key is not None and self.past_key.shape[1] > 0:
            return self.past_key[part, :1]
        tokens = self.tokens(part)
        key = self.key[part]
        if self.seq == 0:
            return key.new_zeros(1, 1, key.shape[-1])
        if tokens is None:
            return key[:, :1]
        first = tokens.to(torch.uint8).argmax(1, keepdim=True)
        return key.take_along_dim(first, 1)


def _surely_finite(*rows: Tensor) -> bool:
    """Whether all is finite, found out where that is cheap and does not synchronise: on a CPU."""
    return rows[0].device.type == "cpu" and all(bool(x.sum().isfinite()) for x in rows)


def _not_finite(*rows: Tensor) -> Tensor:
    return ~torch.stack([x.isfinite().all(-1) for x in rows]).all(0)


class Packed:
    """Packed sequences seen as one chain per head whose rows know where their sequence starts."""

    def __init__(self, cu_seqlens: Tensor, total: int, max_seqlen: int | None) -> None:
        device = cu_seqlens.device
        host: list[int] | None = None
        if self.reads_offsets(device, max_seqlen):
            host = cu_seqlens.tolist()
            check_offsets(host, total, max_seqlen)
        position = torch.arange(total, device=device)
        # Wrong offsets that were not read give wrong results, but no index out of range.
        offsets = cu_seqlens.long().clamp(0, total)
        offsets = torch.cat((offsets, offsets.new_full((1,), total)))
        sequence = torch.searchsorted(offsets[1:-1], position, right=True)
        self.starts = torch.minimum(offsets[sequence], position)
        self.ends = torch.maximum(offsets[sequence + 1], position + 1)
        blocks = range(0, total, blocked.BLOCK)
        if host is not None:
            starts = [host[bisect_right(host, block) - 1] for block in blocks]
        else:
            assert max_seqlen is not None
            starts = [min(block, max(0, block - max_seqlen + 1)) for block in blocks]
        self.rows = Rows(None, self.starts, tuple(starts))

    @staticmethod
    def reads_offsets(device: torch.device, max_seqlen: int | None) -> bool:
        """Whether the host may know the offsets: without synchronising, or because it has to."""
        return device.type == "cpu" or max_seqlen is None

    def keys(self, key: Tensor, kernel_scale: float) -> Keys:
        return blocked.make_keys(key, key.index_select(1, self.starts), kernel_scale)

    def after(self, bad: Tensor) -> Tensor:
        """True from the first bad row of a sequence to its end; ``(heads, total)``."""
        count = bad.cumsum(-1)
        return count > self._before(bad, count)

    def anywhere(self, bad: Tensor) -> Tensor:
        """True on every row of a sequence that has a bad one; ``(heads, total)``."""
        count = bad.cumsum(-1)
        return count[:, self.ends - 1] > self._before(bad, count)

    def _before(self, bad: Tensor, count: Tensor) -> Tensor:
        return count[:, self.starts] - bad[:, self.starts].long()


def parts_of(chains: Tensor) -> Iterator[slice]:
    """Split ``(C, N, ..)`` so that a tile of a useful shape over a part stays within its budget."""
    count, seq = chains.shape[:2]
    height = max(1, min(seq, blocked.BLOCK))
    width = max(1, min(seq, _MIN_TILE_WIDTH))
    step = max(1, blocked.tile_elements(chains.device) // (height * width))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def flat(tensor: Tensor, dtype: torch.dtype, *, copy: bool = False) -> Tensor:
    """``(batch, heads, seq, width)`` as contiguous ``(batch * heads, seq, width)``."""
    tensor = tensor.to(dtype, memory_format=torch.contiguous_format, copy=copy).contiguous()
    return tensor.view(-1, *tensor.shape[2:]) if tensor.numel() else tensor.flatten(0, 1)


def heads_first(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """``(total, heads, width)`` as a contiguous copy ``(heads, total, width)``."""
    return packed.transpose(0, 1).to(dtype, memory_format=torch.contiguous_format, copy=True)


def column(strength: Tensor | None, part: slice, dtype: torch.dtype) -> Tensor | None:
    return None if strength is None else strength[part, None, None].to(dtype)
