"""Functions as PyTorch operators: opaque to ``torch.compile``, differentiable by formula.

What ``torch.library.custom_op`` does, without the checks and the bookkeeping that it repeats on every
call: on a host that drives a GPU they cost more than a short sequence's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Operator = Callable[..., Any]
_library = torch.library.Library("lucid_attention", "FRAGMENT")


def operator(function: Callable[..., Any]) -> Operator:
    """Register a function as ``torch.ops.lucid_attention.<its name>`` and return that operator.

    Its schema comes from the annotations; it changes no argument and returns new tensors.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    # Where a model is compiled around an eager call, dynamo must not trace what is inside.
    _library.impl(name, torch.compiler.disable(function), "CompositeExplicitAutograd")
    overload: Operator = getattr(torch.ops.lucid_attention, name).default
    return overload


def fake_of(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: shapes and dtypes of an operator's results, for tracing."""
    return torch.library.register_fake(f"lucid_attention::{name}", lib=_library)


def differentiate(
    name: str,
    formula: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None] = lambda ctx, inputs, output: None,
) -> None:
    """Give an operator its gradient: ``formula(ctx, *grads)``, from what ``save`` kept."""
    overload = getattr(torch.ops.lucid_attention, name).default

    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = overload(*inputs)
        save(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(formula)}
    graph_node: Any = type(name, (torch.autograd.Function,), members)

    def autograd(*inputs: Any) -> Any:
        if torch.is_grad_enabled():
            for x in inputs:
                if isinstance(x, Tensor) and x.requires_grad:
                    return graph_node.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*inputs)

    _library.impl(name, autograd, "Autograd")
