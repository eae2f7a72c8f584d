"""What launches by address pass on, beside what Triton's own way passes on, for the same operands.

    python tests/precondition/kernels/launched.py '[[68, 68, false, "few"]]'

takes (head size, value size, Hopper's own kernels or the portable ones, and these as for few blocks, as for more of few chains, "some", or for many), launches nothing, and prints for each call
the launches that differ. A program of its own, as ``machine_code.py`` is.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import machine_code
import torch
from torch import Tensor
from triton.runtime import driver

Named = list[tuple[str, list[object]]]


class Names:
    """Addresses by what lies there: operands by name, parts of buffers by their offset."""

    def __init__(self, operands: dict[str, Tensor | None], buffers: list[Tensor]) -> None:
        self.operands = {x.data_ptr(): name for name, x in operands.items() if x is not None}
        self.buffers = buffers

    def __call__(self, x: Any) -> object:
        if isinstance(x, Tensor):
            return self(x.data_ptr()) if x.numel() else "nothing"
        if isinstance(x, tuple):  # a descriptor: see `described`
            return [self(entry) for entry in x]
        for number, buffer in enumerate(self.buffers):
            if isinstance(x, int) and 0 <= x - buffer.data_ptr() < buffer.nbytes:
                return f"buffer {number} + {x - buffer.data_ptr()}"
        return self.operands.get(x, x) if isinstance(x, int) else x


def described(_: object, *args: Any) -> tuple[object, ...]:
    return tuple(tuple(x) if isinstance(x, list) else x for x in args)


def operands(width: int, value_width: int, kind: str) -> dict[str, Tensor | None]:
    leading = (300, 2) if kind == "packed" else (2, 2, 300)
    key, value = (torch.randn(*leading, w, dtype=torch.bfloat16) for w in (width, value_width))
    found: dict[str, Tensor | None] = dict.fromkeys(("strength", "mask", "offsets"))
    if kind == "masked":
        found |= {"strength": torch.rand(2), "mask": torch.rand(2, 300) > 0.5}
    if kind == "packed":
        found["offsets"] = torch.tensor([0, 100, 300], dtype=torch.int32)
    return {"key": key, "value": value, "grad": torch.randn_like(value), **found}


def launches(given: dict[str, Tensor | None], plan: Any, launch: Any) -> Named:
    """The launches of a solve and its adjoint, with names for addresses."""
    key, value, grad, strength, mask, offsets = given.values()
    scale = 0.05  # in half precision at every head size
    found: Named = []
    for backward in (False, True):
        buffers: list[Tensor] = []
        make = plan.Parts.buffers

        def noted(self: Any, device: Any, buffers: Any = buffers, make: Any = make) -> Any:
            buffers[:] = make(self, device)
            return tuple(buffers)

        machine_code.LAUNCHED.clear()
        plan.Parts.buffers = noted
        extra = (offsets, strength, 200) if offsets is not None else (strength, mask, None, None)
        packed = offsets is not None
        if backward:
            call = launch.adjoint_packed if packed else launch.adjoint_dense
            results = call(grad, key, value, *extra, scale)
        else:
            call = launch.solve_packed if packed else launch.solve_dense
            results = (call(key, value, *extra, scale),)
        plan.Parts.buffers = make
        names = Names({**given, **{f"result {i}": x for i, x in enumerate(results)}}, buffers)
        for kernel, args in machine_code.LAUNCHED:
            # After the grid, the stream, the function, options and scratch come metadata and hooks.
            found.append((kernel, [*args[:4], *(names(x) for x in args[13:])]))
    return found


def main() -> None:
    driver.set_active(machine_code.Card())  # type: ignore[no-untyped-call]
    machine_code.Utilities.fill_tma_descriptor = described  # type: ignore[assignment]
    from lucid_attention.precondition.kernels import family, launch, plan

    for name in ("hopper_solve", "hopper_adjoint"):
        module: Any = importlib.import_module(f"lucid_attention.precondition.kernels.{name}")
        module.multiprocessors = lambda device: 132
    report = []
    limits = plan.FEW_BLOCKS, plan.LINKED_BLOCKS
    for width, value_width, hopper, blocks in json.loads(sys.argv[1]):
        plan.FEW_BLOCKS = limits[0] if blocks == "few" else 0
        plan.LINKED_BLOCKS = 0 if blocks == "many" else limits[1]
        family.has_hopper_kernels = lambda device, answer=hopper: answer  # type: ignore[assignment]
        for kind in ("plain", "masked", "packed"):
            plan._calls.clear()
            first = launches(operands(width, value_width, kind), plan, launch)
            second = launches(operands(width, value_width, kind), plan, launch)
            report.append(
                {
                    "kind": kind,
                    "kernels": [kernel for kernel, _ in first],
                    "direct": [call.direct for call in plan._calls.values()],
                    "differ": [str(pair) for pair in zip(first, second, strict=True) if pair[0] != pair[1]],
                }
            )  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
