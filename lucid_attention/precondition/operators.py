"""The solve as PyTorch custom operators: dispatch, gradients, fakes.

``torch.ops.lucid_attention.precondition`` and ``..precondition_varlen`` are opaque to
``torch.compile`` and differentiable once; their backward operators raise when differentiated again.
Which implementation runs is decided inside (`implementation.choose`), so that a traced program
does not depend on the device it was traced on. Autocast is off within.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autocast import no_autocast
from .differentiation import no_second_derivative
from .implementation import choose
from .numerics import compute_dtype
from .registration import fake_of, operator
from .validation import check_strength_contents


@operator
def precondition(
    key: Tensor,
    value: Tensor,
    strength: Tensor | None,
    key_mask: Tensor | None,
    past_key: Tensor | None,
    past_preconditioned: Tensor | None,
    kernel_scale: float,
    impl: str,
    precision: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """``Y = L^-1 V`` for dense batches; arguments as checked by the public function."""
    check_strength_contents(strength)
    with no_autocast(key):
        solved: Tensor = choose(impl, key, value, past_key).solve_dense(
            key, value, strength, key_mask, past_key, past_preconditioned, kernel_scale, out_dtype, precision
        )  # fmt: skip
        return solved


@fake_of("precondition")
def _(
    key: Tensor,
    value: Tensor,
    strength: Tensor | None,
    key_mask: Tensor | None,
    past_key: Tensor | None,
    past_preconditioned: Tensor | None,
    kernel_scale: float,
    impl: str,
    precision: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return value.new_empty(value.shape, dtype=out_dtype)


@operator
def precondition_backward(
    grad: Tensor,
    key: Tensor,
    solution: Tensor,
    strength: Tensor | None,
    key_mask: Tensor | None,
    past_key: Tensor | None,
    past_preconditioned: Tensor | None,
    kernel_scale: float,
    impl: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of key, value, strength and the past; empty where there is none."""
    with no_autocast(key):
        grads = choose(impl, key, solution, past_key).adjoint_dense(
            grad, key, solution, strength, key_mask, past_key, past_preconditioned, kernel_scale, precision
        )  # fmt: skip
        return (
            grads[0],
            grads[1],
            _like(grads[2], strength, key),
            _like(grads[3], past_key, key),
            _like(grads[4], past_preconditioned, key),
        )


@fake_of("precondition_backward")
def _(
    grad: Tensor,
    key: Tensor,
    solution: Tensor,
    strength: Tensor | None,
    key_mask: Tensor | None,
    past_key: Tensor | None,
    past_preconditioned: Tensor | None,
    kernel_scale: float,
    impl: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        key.new_empty(key.shape),
        solution.new_empty(solution.shape),
        _empty_like(strength, key),
        _empty_like(past_key, key),
        _empty_like(past_preconditioned, key),
    )


@operator
def precondition_varlen(
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    strength: Tensor | None,
    max_seqlen: int | None,
    kernel_scale: float,
    impl: str,
    precision: str,
) -> Tensor:
    """``Y = L^-1 V`` for packed sequences; arguments as checked by the public function."""
    check_strength_contents(strength)
    with no_autocast(key):
        solved: Tensor = choose(impl, key, value).solve_packed(
            key, value, cu_seqlens, strength, max_seqlen, kernel_scale, precision
        )
        return solved


@fake_of("precondition_varlen")
def _(
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    strength: Tensor | None,
    max_seqlen: int | None,
    kernel_scale: float,
    impl: str,
    precision: str,
) -> Tensor:
    return value.new_empty(value.shape)


@operator
def precondition_varlen_backward(
    grad: Tensor,
    key: Tensor,
    solution: Tensor,
    cu_seqlens: Tensor,
    strength: Tensor | None,
    max_seqlen: int | None,
    kernel_scale: float,
    impl: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of key, value and strength (empty where there is none)."""
    with no_autocast(key):
        grads = choose(impl, key, solution).adjoint_packed(
            grad, key, solution, cu_seqlens, strength, max_seqlen, kernel_scale, precision
        )
        return grads[0], grads[1], _like(grads[2], strength, key)


@fake_of("precondition_varlen_backward")
def _(
    grad: Tensor,
    key: Tensor,
    solution: Tensor,
    cu_seqlens: Tensor,
    strength: Tensor | None,
    max_seqlen: int | None,
    kernel_scale: float,
    impl: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        key.new_empty(key.shape),
        solution.new_empty(solution.shape),
        _empty_like(strength, key),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    key, value, strength, key_mask, past_key, past_preconditioned, *ctx.options, _ = inputs
    output = output.to(value.dtype)  # gradients are those of Y in value's dtype
    ctx.save_for_backward(key, output, strength, key_mask, past_key, past_preconditioned)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    _, _, strength, _, past_key, past_preconditioned = saved
    grads = precondition_backward(grad.to(saved[1].dtype), *saved, *ctx.options)
    return (
        grads[0],
        grads[1],
        None if strength is None else grads[2],
        None,
        None if past_key is None else grads[3],
        None if past_preconditioned is None else grads[4],
        None,
        None,
        None,
        None,
    )


def _save_varlen(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    key, _, cu_seqlens, strength, *ctx.options = inputs
    ctx.save_for_backward(key, output, cu_seqlens, strength)


def _backward_varlen(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = precondition_varlen_backward(grad, *saved, *ctx.options)
    strength = None if saved[3] is None else grads[2]
    return grads[0], grads[1], None, strength, None, None, None, None


precondition.differentiate(_backward, _save)
precondition_varlen.differentiate(_backward_varlen, _save_varlen)
precondition_backward.differentiate(no_second_derivative)
precondition_varlen_backward.differentiate(no_second_derivative)


def _like(grad: Tensor | None, operand: Tensor | None, key: Tensor) -> Tensor:
    """``grad`` in its operand's shape and dtype; an empty tensor where there is no operand."""
    if operand is None or grad is None:
        return key.new_empty(0, dtype=compute_dtype(key))
    return grad.view(operand.shape).to(operand.dtype)


def _empty_like(operand: Tensor | None, key: Tensor) -> Tensor:
    if operand is None:
        return key.new_empty(0, dtype=compute_dtype(key))
    return operand.new_empty(operand.shape)
