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
# One library an operator: a module that is reloaded defines its operators anew, and the libraries that it
# replaces take back what they had. This dict outlives a reload of this module.
_libraries: dict[str, torch.library.Library] = globals().get("_libraries", {})


def operator(function: Callable[..., Any]) -> Operator:
    """Register a function as ``torch.ops.lucid_attention.<its name>`` and return that operator.

    Its schema comes from the annotations; it changes no argument and returns new tensors.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    library = _libraries[name] = torch.library.Library("lucid_attention", "FRAGMENT")
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    # Where a model is compiled around an eager call, dynamo must not trace what is inside.
    library.impl(name, torch.compiler.disable(function), "CompositeExplicitAutograd")
    overload: Operator = getattr(torch.ops.lucid_attention, name).default
    return overload


def fake_of(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: shapes and dtypes of an operator's results, for tracing."""
    return torch.library.register_fake(f"lucid_attention::{name}", lib=_libraries[name])


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

    _libraries[name].impl(name, torch.compiler.disable(autograd), "Autograd")
