"""The blocked solve: torch only, any device, memory linear in the sequence length.

Forward (substitution by block rows): ``Y_r = L_rr^-1 (V_r - b P_r,<r Y_<r)``. Backward (block rows
from the last to the first): one sweep computes each tile of ``P`` once and uses it for the adjoint
solve and for the key gradient, five products in all. Neither ever holds more of ``P`` than a tile.

Dense batches and packed sequences are one problem here: row ``i`` of a *chain* (one batch row and
head, or one head of a packed batch) is coupled to the columns ``start_i <= j < i``.

The kernel is centred. With ``r`` the chain's first key brought to length ``sqrt(D)``, and
``a = khat - r``,

    khat_i . khat_j - D  =  a_i . a_j  +  (khat_i . r - D)  +  (khat_j . r - D)

so that two extra features carry the last two terms and the product itself stays small where keys
are alike. That is where float32 loses digits otherwise: it is worth a factor of 3 to 6 at cosine
0.8 and 17 to 48 at 0.99 (docs/numerics.md). The *first* key, not the mean, so that no token touches
the rounding of an earlier one. Names of shapes: C chains, N rows, M columns, D head size, E = Dv.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .numerics import KEY_EPS

# Rows of a block. Larger blocks spend more in the triangular solve, smaller ones more in launches.
BLOCK = 128
# Elements of P held at once: about a core's L2 cache on a CPU, enough to fill a GPU elsewhere.
TILE_ELEMENTS_CPU = 1 << 18
TILE_ELEMENTS_DEVICE = 1 << 24


class Keys(NamedTuple):
    """Normalised keys, centred on ``reference``, with the two features that complete the kernel."""

    columns: Tensor  # (C, N, D + 2): a_j, 1, scale * (khat_j . r - D)
    reference: Tensor  # (C, N or 1, D)
    inverse_rms: Tensor  # (C, N, 1)
    scale: float

    @property
    def head_dim(self) -> int:
        return self.reference.shape[-1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Left factors of rows ``start:stop``: ``rows @ columns.mT`` is the kernel's exponent."""
        block = self.columns[:, start:stop]
        centred, one, weight = block.split((self.head_dim, 1, 1), dim=-1)
        return torch.cat((centred * self.scale, weight, one), dim=-1)


class Rows(NamedTuple):
    """Which columns each row is coupled to."""

    tokens: Tensor | None  # (C, N, 1) bool: False rows have y = 0
    starts: Tensor | None  # (N,) int64: row i is coupled to starts[i] <= j < i; None: to all
    first_column: tuple[int, ...] | None  # per block row, the first column worth computing


class Gradients(NamedTuple):
    """What the backward sweep returns, in the chains' layout and in the compute dtype."""

    key: Tensor
    value: Tensor
    strength: Tensor  # (C,), also where the strength is None
    past_key: Tensor | None
    past_preconditioned: Tensor | None


def make_keys(key: Tensor, reference: Tensor, kernel_scale: float) -> Keys:
    """Normalise keys ``(C, N, D)`` and centre them on ``reference`` ``(C, N or 1, D)``, any keys.

    References are brought to length ``sqrt(D)``. In a packed batch a tile forms exponents between
    sequences as well, which are not used but must not overflow: with references of one length they
    stay at or below 0.
    """
    inverse_rms = torch.rsqrt(key.square().mean(-1, keepdim=True) + KEY_EPS)
    chains, seq, width = key.shape
    length = reference.square().sum(-1, keepdim=True).sqrt()
    usable = length.isfinite() & (length > 0)
    reference = torch.where(usable, reference * (width**0.5 / length), 1.0)
    columns = key.new_empty(chains, seq, width + 2)
    centred = columns[..., :width]
    torch.mul(key, inverse_rms, out=centred)
    columns[..., width + 1 :] = kernel_scale * ((centred * reference).sum(-1, keepdim=True) - width)
    centred -= reference
    columns[..., width] = 1.0
    return Keys(columns, reference, inverse_rms, kernel_scale)


def solve(
    keys: Keys, value: Tensor, strength: Tensor | None, rows: Rows, past: tuple[Keys, Tensor] | None
) -> None:
    """Solve ``L Y = V`` for every chain, in place: ``value`` ``(C, N, E)`` becomes ``Y``.

    Args:
        strength: ``(C, 1, 1)`` or None for 1.
        past: keys and ``Y`` ``(C, M, E)`` of the tokens before, which all rows are coupled to.
    """
    for start, stop, first in _block_rows(value.shape[1], rows):
        left = keys.rows(start, stop)
        block = value[:, start:stop]
        if past is not None:
            answered = _answered(left, past[0].columns, past[1])
            block -= answered if strength is None else strength * answered
        if first < start:
            known = _in_sequence(value[:, first:start], _strangers(rows, first, start))
            answered = _answered(left, keys.columns[:, first:start], known)
            answered = _continuing(answered, rows, start, stop)
            block -= answered if strength is None else strength * answered
        if rows.tokens is not None:
            block.masked_fill_(~rows.tokens[:, start:stop], 0.0)
        lower = _diagonal_block(left, keys, rows, start, stop)
        if strength is not None:
            lower *= strength
        block.copy_(torch.linalg.solve_triangular(lower, block, upper=False, unitriangular=True))


def solve_adjoint(
    keys: Keys,
    solution: Tensor,
    grad: Tensor,
    strength: Tensor | None,
    rows: Rows,
    past: tuple[Keys, Tensor] | None,
) -> Gradients:
    """The adjoint solve ``L^T dV = dY`` fused with the key gradient; ``grad`` becomes ``dV``.

    With ``T_ij = (dV_i . y_j) P_ij``, which is 0 unless ``j < i``:
    ``dkhat_i = -b s sum_j (T_ij + T_ji) khat_j`` and ``db = -sum T``. Multiplying by ``b`` at the end keeps ``db`` right at ``b = 0``.
    """
    seq = grad.shape[1]
    toward = torch.zeros_like(keys.columns)
    toward_past = None if past is None else torch.zeros_like(past[0].columns)
    grad_past = None if past is None else torch.zeros_like(past[1])
    grad_strength = grad.new_zeros(grad.shape[0])

    for start, stop, first in reversed(list(_block_rows(seq, rows))):
        left = keys.rows(start, stop)
        right = keys.columns[:, start:stop]
        lower = _diagonal_block(left, keys, rows, start, stop)
        block = grad[:, start:stop]
        if rows.tokens is not None:
            block.masked_fill_(~rows.tokens[:, start:stop], 0.0)
        system = lower if strength is None else strength * lower
        block.copy_(torch.linalg.solve_triangular(system.mT, block, upper=True, unitriangular=True))
        if rows.tokens is not None:
            block.masked_fill_(~rows.tokens[:, start:stop], 0.0)

        lower *= torch.bmm(block, solution[:, start:stop].mT)
        from_columns = torch.bmm(lower, right)
        toward_block = toward[:, start:stop]
        toward_block += torch.bmm(lower.mT, right)
        if first < start:
            strangers = _strangers(rows, first, start)
            from_columns += _sweep(
                left, right, _continuing(block, rows, start, stop), strength,
                keys.columns[:, first:start], _in_sequence(solution[:, first:start], strangers),
                grad[:, first:start], toward[:, first:start], strangers,
            )  # fmt: skip
        if past is not None:
            assert grad_past is not None and toward_past is not None
            from_columns += _sweep(
                left, right, block, strength, past[0].columns, past[1], grad_past, toward_past, None
            )
        toward_block += from_columns
        grad_strength -= from_columns[..., keys.head_dim].sum(-1)  # times the feature 1: sum of T

    return Gradients(
        key=_key_gradient(keys, toward, strength),
        value=grad,
        strength=grad_strength,
        past_key=None if past is None else _key_gradient(past[0], toward_past, strength),
        past_preconditioned=grad_past,
    )


def _answered(left: Tensor, columns: Tensor, known: Tensor) -> Tensor:
    """``sum_j P_ij y_j`` over the given columns: what the memory already answers to these rows."""
    chains, height, _ = left.shape
    answered = left.new_zeros(chains, height, known.shape[-1])
    for low, high in _tiles(columns, height):
        kernel = torch.bmm(left, columns[:, low:high].mT).exp_()
        answered.baddbmm_(kernel, known[:, low:high])
    return answered


def _sweep(
    left: Tensor,
    right: Tensor,
    grad_rows: Tensor,
    strength: Tensor | None,
    columns: Tensor,
    solution: Tensor,
    grad_columns: Tensor,
    toward_columns: Tensor,
    strangers: Tensor | None,
) -> Tensor:
    """One block row of the backward sweep against the given columns.

    ``solution`` is 0 at strangers, so ``T`` is too; the adjoint has to be told. Subtracts from ``grad_columns``, adds to ``toward_columns``, returns ``sum_j T_ij columns_j``.
    """
    from_columns = torch.zeros_like(right)
    for low, high in _tiles(columns, left.shape[1]):
        kernel = torch.bmm(left, columns[:, low:high].mT).exp_()
        adjoint = torch.bmm(kernel.mT, grad_rows)
        if strangers is not None:
            adjoint.masked_fill_(strangers[low:high], 0.0)
        grad_columns[:, low:high] -= adjoint if strength is None else strength * adjoint
        kernel *= torch.bmm(grad_rows, solution[:, low:high].mT)
        from_columns.baddbmm_(kernel, columns[:, low:high])
        toward_columns[:, low:high] += torch.bmm(kernel.mT, right)
    return from_columns


def _diagonal_block(left: Tensor, keys: Keys, rows: Rows, start: int, stop: int) -> Tensor:
    """Strictly lower part of ``P`` for one block row, zero outside the coupled entries."""
    kernel = torch.bmm(left, keys.columns[:, start:stop].mT).exp_()
    index = torch.arange(stop - start, device=kernel.device)
    coupled = index[None, :] < index[:, None]
    if rows.starts is not None:
        coupled = coupled & (index[None, :] + start >= rows.starts[start:stop, None])
    if rows.tokens is not None:
        coupled = coupled & rows.tokens[:, start:stop]
    return kernel.masked_fill_(~coupled, 0.0)


def _strangers(rows: Rows, first: int, start: int) -> Tensor | None:
    """Columns ``first:start`` that are not in the sequence that row ``start`` is in, ``(M, 1)``."""
    if rows.starts is None:
        return None
    index = torch.arange(first, start, device=rows.starts.device)
    return (index < rows.starts[start])[:, None]


def _in_sequence(known: Tensor, strangers: Tensor | None) -> Tensor:
    return known if strangers is None else known.masked_fill(strangers, 0.0)


def _continuing(block: Tensor, rows: Rows, start: int, stop: int) -> Tensor:
    """Rows ``start:stop``, 0 where a row's sequence begins inside the block."""
    if rows.starts is None:
        return block
    return block.masked_fill((rows.starts[start:stop] >= start)[:, None], 0.0)


def _key_gradient(keys: Keys, toward: Tensor | None, strength: Tensor | None) -> Tensor:
    """From ``sum T khat`` to ``dK``: undo the centring, then RMS-norm's own backward."""
    assert toward is not None
    width = keys.head_dim
    normalized = keys.columns[..., :width] + keys.reference
    grad = toward[..., :width] + toward[..., width : width + 1] * keys.reference
    grad *= -keys.scale if strength is None else -keys.scale * strength
    radial = (grad * normalized).mean(-1, keepdim=True)
    return keys.inverse_rms * (grad - normalized * radial)


def _block_rows(seq: int, rows: Rows) -> Iterator[tuple[int, int, int]]:
    """``(start, stop, first column)`` of every block row."""
    for index, start in enumerate(range(0, seq, BLOCK)):
        first = 0 if rows.first_column is None else rows.first_column[index]
        yield start, min(start + BLOCK, seq), first


def _tiles(columns: Tensor, height: int) -> Iterator[tuple[int, int]]:
    """Split columns so that a tile of ``P`` over all chains stays within its budget."""
    chains, width, _ = columns.shape
    step = max(BLOCK, tile_elements(columns.device) // max(1, chains * height))
    for low in range(0, width, step):
        yield low, min(low + step, width)


def tile_elements(device: torch.device) -> int:
    """How many elements of ``P`` to hold at once."""
    return TILE_ELEMENTS_CPU if device.type == "cpu" else TILE_ELEMENTS_DEVICE
