"""What the hand-written gradients do not offer, refused by name: PyTorch would be silent or vague."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_forward_mode(*operands: Tensor | None) -> None:
    """Raise if an operand carries a tangent: a custom operator would return a tangent of 0."""
    if torch.compiler.is_compiling():
        return
    for operand in operands:
        if operand is not None and forward_ad.unpack_dual(operand).tangent is not None:
            raise RuntimeError(
                "lucid_attention has no forward-mode derivative (jvp). Use impl='reference', which "
                "has one (at quadratic memory), or reverse mode."
            )


def refuse_transforms(name: str, *operands: object) -> None:
    """Raise if an operand is a wrapper of ``torch.func`` or ``torch.vmap``: it has no memory to be written."""
    wrapped = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", None)
    if wrapped is None or torch.compiler.is_compiling():
        return
    if any(isinstance(x, Tensor) and wrapped(x) for x in operands):
        raise RuntimeError(
            f"{name} writes its cache and is not for torch.func and torch.vmap (grad, vjp, jvp, vmap). Give the batch "
            "as the first dimension, and train with lucid_attention.precondition(..., past=...) and reverse mode."
        )


def no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    """The autograd formula of every backward operator."""
    raise RuntimeError(
        "lucid_attention has no second derivative: its backward pass is not differentiable. Drop "
        "create_graph=True, or use impl='reference' of the public functions, which has one (at "
        "quadratic memory)."
    )
