"""A compiled kernel with the arguments that its layout decides, to be launched with the others alone.

Triton's way to a launch looks at every argument: of which type, divisible by what, which compiled kernel goes
with that. For a kernel of a known layout all that is known, and what is left is one call of the function
in C that Triton made for the kernel. That function is Triton 3.6's; with another version, or while a profiler's
hook waits for launches, compiled kernels are launched as Triton documents it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver

make_tensordesc_arg: Any = None
if triton.__version__.startswith("3.6."):
    from triton.backends.nvidia.driver import make_tensordesc_arg


def stream_of(device: torch.device) -> int:
    """The current stream, as a launch takes it."""
    stream: int = driver.active.get_current_stream(device.index or 0)
    return stream


def launches_are_unobserved() -> bool:
    """Whether no profiler has asked to hear of launches."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return all(hook is None or not getattr(hook, "calls", True) for hook in hooks)


class Kept:
    """Call it with a kernel's pointers as tensors, or ``launch`` it with addresses."""

    def __init__(
        self, compiled: Any, programs: int, pointers: tuple[Any, ...], tail: tuple[object, ...]
    ) -> None:
        # Shapes and tiles; a descriptor's tensor is not kept.
        self._descriptors = [
            SimpleNamespace(**{**vars(x), "base": None})
            for x in pointers
            if hasattr(x, "block_shape")
        ]
        self._grid = (programs, 1, 1)
        self._tail = tail
        self._compiled = compiled
        self._launch, self._before = _function_of(compiled)

    @property
    def direct(self) -> bool:
        """Whether it can be launched by addresses."""
        return self._launch is not None

    def __call__(self, pointers: tuple[Any, ...]) -> None:
        self._compiled[self._grid](*pointers, *self._tail)

    def launch(self, stream: int, addresses: tuple[Any, ...]) -> None:
        self._launch(*self._grid, stream, *self._before, *addresses, *self._tail)

    def describe(self, index: int, address: int) -> tuple[object, ...]:
        """What ``launch`` takes for the kernel's ``index``-th argument, a tensor descriptor, at another address."""
        base = SimpleNamespace(data_ptr=lambda: address)
        moved = SimpleNamespace(**{**vars(self._descriptors[index]), "base": base})
        meta = self._compiled.metadata.tensordesc_meta[index]
        return tuple(make_tensordesc_arg(moved, meta))


def _function_of(compiled: Any) -> tuple[Any, tuple[object, ...]]:
    """The kernel's launch function in C, and what it takes between the stream and the kernel's arguments."""
    if make_tensordesc_arg is None:
        return None, ()
    try:
        run = compiled.run
        if run.global_scratch_size or run.profile_scratch_size:
            return None, ()
        function = run.launch
        code = getattr(function, "__code__", None)
        if code is not None:  # around it, what makes tensor descriptors: `describe` does that here
            at = code.co_freevars.index("launcher")
            function = function.__closure__[at].cell_contents
        before = (
            compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None,
            compiled.packed_metadata, None, None, None,
        )  # fmt: skip
    except (AttributeError, ValueError):
        return None, ()
    return function, before
