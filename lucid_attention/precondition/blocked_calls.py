"""The four operations of the solve by PyTorch: what the operators do where no kernel serves.

Arithmetic is float32 (float64 for float64 inputs) whatever the inputs' dtype; results are rounded
once, at the end, so that every ``precision`` is the same. ``kernels/launch.py`` has the same four functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import blocked
from .blocked import Rows
from .layout import Chains, Packed, column, flat, heads_first, parts_of
from .numerics import compute_dtype


def solve_dense(
    key: Tensor,
    value: Tensor,
    strength: Tensor | None,
    key_mask: Tensor | None,
    past_key: Tensor | None,
    past_preconditioned: Tensor | None,
    kernel_scale: float,
    out_dtype: torch.dtype | None = None,
    precision: str = "default",
) -> Tensor:
    """``Y = L^-1 V`` for dense batches; arguments as checked by the public function."""
    dtype = compute_dtype(value)
    chains = Chains(key, strength, key_mask, past_key, past_preconditioned, kernel_scale)
    # What is returned must be no view: autograd refuses to change an operator's view in place.
    solution = value.to(dtype, memory_format=torch.contiguous_format, copy=True)
    solved = flat(solution, dtype)
    chains.confine(solved)
    for part in chains.parts():
        past = chains.past(part)
        rows = Rows(chains.tokens(part), None, None)
        blocked.solve(chains.keys(part), solved[part], chains.strength(part), rows, past)
    chains.spoil_after(solved)
    return solution.to(value.dtype if out_dtype is None else out_dtype)


def adjoint_dense(
    grad: Tensor,
    key: Tensor,
    solution: Tensor,
    strength: Tensor | None,
    key_mask: Tensor | None,
    past_key: Tensor | None,
    past_preconditioned: Tensor | None,
    kernel_scale: float,
    precision: str = "default",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of key, value, strength and the past; empty where there is none."""
    dtype = compute_dtype(solution)
    chains = Chains(key, strength, key_mask, past_key, past_preconditioned, kernel_scale)
    grad_value, flat_solution = flat(grad, dtype, copy=True), flat(solution, dtype, copy=True)
    chains.confine(grad_value, flat_solution)
    grad_key = torch.empty_like(chains.key)
    grad_strength = grad_value.new_empty(grad_value.shape[0])
    grad_past_key, grad_past = _empty_past(chains)
    for part in chains.parts():
        found = blocked.solve_adjoint(
            chains.keys(part),
            flat_solution[part],
            grad_value[part],
            chains.strength(part),
            Rows(chains.tokens(part), None, None),
            chains.past(part),
        )
        grad_key[part] = found.key
        grad_strength[part] = found.strength
        if found.past_key is not None and found.past_preconditioned is not None:
            grad_past_key[part] = found.past_key
            grad_past[part] = found.past_preconditioned
    chains.spoil(grad_key, grad_value, grad_strength, grad_past_key, grad_past)
    batch, heads = key.shape[:2]
    if key_mask is not None:
        padding = ~key_mask[:, None, :, None]
        grad_key = grad_key.view(key.shape).masked_fill(padding, 0.0)
        grad_value = grad_value.view(solution.shape).masked_fill(padding, 0.0)
    return (
        grad_key.view(key.shape).to(key.dtype),
        grad_value.view(solution.shape).to(solution.dtype),
        _like(grad_strength.view(batch, heads).sum(0), strength),
        _like(grad_past_key, past_key),
        _like(grad_past, past_preconditioned),
    )


def solve_packed(
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    strength: Tensor | None,
    max_seqlen: int | None,
    kernel_scale: float,
    precision: str = "default",
) -> Tensor:
    """``Y = L^-1 V`` for packed sequences; arguments as checked by the public function."""
    packed = Packed(cu_seqlens, key.shape[0], max_seqlen)
    dtype = compute_dtype(value)
    flat_key = heads_first(key, dtype)
    solution = heads_first(value, dtype)
    # In one chain 0 * NaN would carry a NaN into another sequence: solve without, mark after.
    bad = ~(flat_key.isfinite().all(-1) & solution.isfinite().all(-1))
    flat_key.masked_fill_(bad[..., None], 0.0)
    solution.masked_fill_(bad[..., None], 0.0)
    for part in parts_of(flat_key):
        keys = packed.keys(flat_key[part], kernel_scale)
        blocked.solve(keys, solution[part], column(strength, part, dtype), packed.rows, None)
    solution.masked_fill_(packed.after(bad)[..., None], float("nan"))
    return solution.transpose(0, 1).to(value.dtype).contiguous()


def adjoint_packed(
    grad: Tensor,
    key: Tensor,
    solution: Tensor,
    cu_seqlens: Tensor,
    strength: Tensor | None,
    max_seqlen: int | None,
    kernel_scale: float,
    precision: str = "default",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of key, value and strength (empty where there is none)."""
    packed = Packed(cu_seqlens, key.shape[0], max_seqlen)
    dtype = compute_dtype(solution)
    flat_key = heads_first(key, dtype)
    flat_solution = heads_first(solution, dtype)
    grad_value = heads_first(grad, dtype)
    operands = (flat_key, flat_solution, grad_value)
    bad = ~torch.stack([x.isfinite().all(-1) for x in operands]).all(0)
    for operand in operands:
        operand.masked_fill_(bad[..., None], 0.0)
    grad_key = torch.empty_like(flat_key)
    grad_strength = flat_key.new_empty(flat_key.shape[0])
    for part in parts_of(flat_key):
        found = blocked.solve_adjoint(
            packed.keys(flat_key[part], kernel_scale),
            flat_solution[part],
            grad_value[part],
            column(strength, part, dtype),
            packed.rows,
            None,
        )
        grad_key[part] = found.key
        grad_strength[part] = found.strength
    spoiled = packed.anywhere(bad)[..., None]
    grad_key.masked_fill_(spoiled, float("nan"))
    grad_value.masked_fill_(spoiled, float("nan"))
    grad_strength.masked_fill_(bad.any(-1), float("nan"))
    return (
        grad_key.transpose(0, 1).to(key.dtype).contiguous(),
        grad_value.transpose(0, 1).to(solution.dtype).contiguous(),
        _like(grad_strength, strength),
    )


def _empty_past(chains: Chains) -> tuple[Tensor, Tensor]:
    if chains.past_key is None or chains.past_preconditioned is None:
        return chains.key.new_empty(0), chains.key.new_empty(0)
    return torch.empty_like(chains.past_key), torch.empty_like(chains.past_preconditioned)


def _like(grad: Tensor, operand: Tensor | None) -> Tensor:
    """``grad`` in its operand's shape and dtype; an empty tensor where there is no operand."""
    if operand is None:
        return grad.new_empty(0)
    return grad.view(operand.shape).to(operand.dtype)
