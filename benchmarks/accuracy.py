"""Is it right? Y, dV and dK beside float64, before anything is timed and for each shape that is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu import PASSES, Shape, operands
from lucid_attention import precondition
from lucid_attention.precondition.validation import PRECISIONS

GATE_SEQS = (2048, 300)
# Largest relative errors of (Y and dV, dK); a half-precision output is rounded to 1.7e-3 (bfloat16).
BOUNDS = {torch.bfloat16: (6e-3, 1.2e-2), torch.float32: (1e-5, 3e-5)}
CHECKED_ROWS = 4096


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error; a NaN stays one."""
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def gradients(
    impl: str, key: Tensor, value: Tensor, grad: Tensor, *, backward: bool = True, precision: str = "default"
) -> list[Tensor]:  # fmt: skip
    """Y, and dV and dK if they are wanted."""
    how = {"impl": impl, "precision": precision}
    if not backward:
        with torch.no_grad():
            return [precondition(key, value, **how)]
    leaves = [x.detach().requires_grad_() for x in (value, key)]
    y = precondition(leaves[1], leaves[0], **how)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors are full of NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def gate(kinds: set[tuple[int, str]], device: str = "cuda", impl: str = "triton", seqs: tuple[int, ...] = GATE_SEQS) -> list[str]:  # fmt: skip
    """Compare Y, dV and dK with float64 for each head size and dtype; exits where one is too far off."""
    passed = []
    for head_dim, dtype in sorted(kinds):
        for seq in seqs:
            shape = Shape(2, 4, seq, head_dim, dtype)
            _, *given = operands(shape, device)
            exact = gradients("reference", *(x.double() for x in given))
            for precision in PRECISIONS if dtype != "float32" else PRECISIONS[:1]:
                with poisoned_memory():
                    got = gradients(impl, *given, precision=precision)
                errors = [relative_error(g, e) for g, e in zip(got, exact, strict=True)]
                near, far = BOUNDS[shape.torch_dtype]
                line = f"D {head_dim} {dtype} N {seq}: Y {errors[0]:.1e} dV {errors[1]:.1e} dK {errors[2]:.1e}"  # fmt: skip
                if precision != "default":
                    line += f" (precision {precision})"
                # A NaN does not pass.
                if not (errors[0] <= near and errors[1] <= near and errors[2] <= far):
                    raise SystemExit(
                        f"{line}: relative error above {near:.0e} (Y, dV) or {far:.0e} (dK); nothing timed."
                    )
                passed.append(line)
    return passed


def errors_of(shape: Shape, precision: str = "default") -> dict[str, float]:
    """Relative error of each pass of `solve` at its real size, rounding of the output included.

    The last chain: Y of the first 4096 tokens, which later ones do not change, and dV of the last
    4096, which earlier ones do not change: the float64 definition is quadratic in memory.
    """
    _, key, value, grad = operands(shape)
    y, dv, _ = gradients("triton", key, value, grad, precision=precision)
    key, value, grad, y, dv = (x[-1:, -1:] for x in (key, value, grad, y, dv))
    rows = slice(0, CHECKED_ROWS), slice(max(0, shape.seq - CHECKED_ROWS), None)
    first, last = ([x[:, :, part].double() for x in (key, value, grad)] for part in rows)
    forward = relative_error(y[:, :, rows[0]], gradients("reference", *first)[0])
    backward = relative_error(dv[:, :, rows[1]], gradients("reference", *last)[1])
    worse = max(forward, backward, key=lambda error: math.inf if math.isnan(error) else error)
    return dict(zip(PASSES, (forward, backward, worse), strict=True))
