"""Functions as PyTorch operators: opaque to ``torch.compile``, differentiable by formula.

What ``torch.library.custom_op`` does, without the checks and the bookkeeping that it repeats on every
call: on a host that drives a GPU they cost more than a short sequence's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# One library an operator: a module that is reloaded defines its operators anew, and the libraries that it
# replaces take back what they had. This dict outlives a reload of this module.
_libraries: dict[str, torch.library.Library] = globals().get("_libraries", {})


class Operator:
    """A function as ``torch.ops.lucid_attention.<its name>``, to be called with positional arguments.

    Its schema comes from the annotations; it returns new tensors and changes no argument but those named. Where
    nothing but autograd wants to know of a call, the function is called without PyTorch's dispatcher in between.
    """

    def __init__(self, function: Callable[..., Any], changes: tuple[str, ...] = ()) -> None:
        self.name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=changes)
        library = _libraries[self.name] = torch.library.Library("lucid_attention", "FRAGMENT")
        library.define(self.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Where a model is compiled around an eager call, dynamo must not trace what is inside.
        self._function = torch.compiler.disable(function)
        library.impl(self.name, self._function, "CompositeExplicitAutograd")
        self.overload: Any = getattr(torch.ops.lucid_attention, self.name).default
        self._node: Any = None

    def __call__(self, *inputs: Any) -> Any:
        if not _is_plain(inputs):
            return self.overload(*inputs)
        if _needs_graph(inputs):
            return self._node.apply(self._function, *inputs)
        return self._function(*inputs)

    def differentiate(
        self,
        formula: Callable[..., Any],
        save: Callable[[Any, tuple[Any, ...], Any], None] = lambda ctx, inputs, output: None,
    ) -> None:
        """Give the operator its gradient: ``formula(ctx, *grads)``, from what ``save`` kept."""

        def forward(ctx: Any, function: Callable[..., Any], *inputs: Any) -> Any:
            output = function(*inputs)
            save(ctx, inputs, output)
            return output

        def backward(ctx: Any, *grads: Any) -> Any:
            found = formula(ctx, *grads)
            return None, *found

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._node = type(self.name, (torch.autograd.Function,), members)

        def below(*inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return self.overload(*inputs)

        def autograd(*inputs: Any) -> Any:
            return self._node.apply(below, *inputs) if _needs_graph(inputs) else below(*inputs)

        _libraries[self.name].impl(self.name, torch.compiler.disable(autograd), "Autograd")


def operator(function: Callable[..., Any]) -> Operator:
    """Decorator: see `Operator`."""
    return Operator(function)


def operator_changing(*names: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator: an operator without gradients that writes into the arguments named."""
    return lambda function: Operator(function, names)


def fake_of(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: shapes and dtypes of an operator's results, for tracing."""
    return torch.library.register_fake(f"lucid_attention::{name}", lib=_libraries[name])


def _needs_graph(inputs: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for x in inputs:
            if isinstance(x, Tensor) and x.requires_grad:
                if torch._C._are_functorch_transforms_active():
                    raise RuntimeError(
                        "lucid_attention's gradients are not for torch.func (grad, vjp, jacrev, vmap of them). Use "
                        "torch.autograd.grad, or impl='reference' (at quadratic memory)."
                    )
                return True
    return False


_PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype}


def _is_plain(inputs: tuple[Any, ...]) -> bool:
    """Whether only autograd cares: nothing traced or transformed, no mode, no subclass of a tensor, no meta tensor."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._autograd._profiler_enabled()  # which should name the operator
        and _PLAIN.issuperset(map(type, inputs))
        and not inputs[0].is_meta
        # Gradients of many at once, the first of the backward operators' arguments, look like any tensor.
        and not torch._C._functorch.is_legacy_batchedtensor(inputs[0])
    )
