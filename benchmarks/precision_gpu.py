"""Error of the kernels against float64 by key correlation and length, before the final rounding.

Run by ``python -m benchmarks.solve_gpu --part precision``; writes ``precision-GPU.csv`` and ``.md``.

Keys: "shared" c: every pair of a head's keys has cosine c; "types" c: each key is of one of 64 types
and has cosine c with those of its own. For bfloat16 inputs ``y``, ``dv`` and ``dk`` are what the kernels
compute before they round to bfloat16 (the adjoint gets the Y that was saved, rounded), and
``y_rounded`` is what a caller gets; with precision "default" and, where Hopper's own kernels serve it,
"high". Float64 is ``impl="blocked"`` on the same, rounded, inputs.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import report
from benchmarks.accuracy import gradients
from benchmarks.gpu import Job, Shape, attempt, unrounded
from lucid_attention.precondition.kernels import family, launch

Kind = tuple[str, float]
KINDS: tuple[Kind, ...] = (("shared", 0.0), ("shared", 0.5), ("shared", 0.8), ("shared", 0.95), ("types", 0.9))  # fmt: skip
KINDS_FLOAT32: tuple[Kind, ...] = (("shared", 0.5), ("shared", 0.8))
TYPES = 64
WIDTHS = (64, 128)
WIDEST = 256  # its float64 solve takes its time: shorter sequences only
SEQS = (4096, 32768, 131072)
SEQS_FLOAT32 = (32768,)
QUICK_SEQS = (300,)
GRADIENTS_UP_TO = 32768  # the float64 adjoint takes its time


def make_keys(kinds: tuple[Kind, ...], seq: int, width: int, device: str) -> Tensor:
    """Keys ``(1, len(kinds), seq, width)``: one head of each kind."""
    heads = []
    for name, cosine in kinds:
        centre = torch.randn(TYPES if name == "types" else 1, width, device=device)
        which = torch.randint(0, centre.shape[0], (seq,), device=device)
        noise = torch.randn(seq, width, device=device)
        heads.append(math.sqrt(cosine) * centre[which] + math.sqrt(1 - cosine) * noise)
    return torch.stack(heads)[None]


def errors(got: Tensor, exact: Tensor) -> list[float]:
    """Relative Frobenius error of each head."""
    got, exact = got.double(), exact.double()
    found: list[float] = ((got - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1)))[0].tolist()
    return found


def precisions(dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """Where other kernels serve "high", it is float32's."""
    both = dtype != torch.float32 and family.has_hopper_kernels(device)
    return ("default", "high") if both else ("default",)


def wide(
    key: Tensor, value: Tensor, grad: Tensor, saved: Tensor, backward: bool, precision: str = "default"
) -> list[Tensor]:  # fmt: skip
    """Y, dV and dK of half-precision inputs as the kernels have them before the final rounding."""
    rest = (None, None, None, None, key.shape[-1] ** -0.5)
    with unrounded():
        found = [launch.solve_dense(key.float(), value.float(), *rest, precision=precision)]
        if backward:
            operands = (x.float() for x in (grad, key, saved))
            dk, dv, *_ = launch.adjoint_dense(*operands, *rest, precision)
            found += [dv, dk]
    return found


def measure(width: int, seq: int, dtype: torch.dtype, kinds: tuple[Kind, ...], device: str = "cuda") -> list[dict[str, Any]]:  # fmt: skip
    """A row for each precision and kind of keys; what could not be computed is NaN."""
    torch.manual_seed(seq + width)
    key = make_keys(kinds, seq, width, device).to(dtype)
    value, grad = (torch.randn_like(key) for _ in range(2))
    backward = seq <= GRADIENTS_UP_TO
    name = f"precision of {dtype} D {width} N {seq}"
    exact = attempt(
        name,
        partial(gradients, "blocked", *(x.double() for x in (key, value, grad)), backward=backward),
    )
    return [
        row
        for precision in precisions(dtype, key.device)
        for row in _rows(name, width, seq, kinds, key, value, grad, exact, backward, precision)
    ]


def _rows(
    name: str, width: int, seq: int, kinds: tuple[Kind, ...], key: Tensor, value: Tensor, grad: Tensor,
    exact: list[Tensor] | None, backward: bool, precision: str,
) -> list[dict[str, Any]]:  # fmt: skip
    dtype = key.dtype
    called = attempt(
        name,
        partial(gradients, "triton", key, value, grad, backward=backward, precision=precision),
    )
    found = called
    if called is not None and dtype != torch.float32:
        found = attempt(name, partial(wide, key, value, grad, called[0], backward, precision))
    columns: dict[str, list[float]] = {}
    for index, column in enumerate(("y", "dv", "dk")[: 3 if backward else 1]):
        if exact is not None and found is not None:
            columns[column] = errors(found[index], exact[index])
    if exact is not None and called is not None and dtype != torch.float32:
        columns["y_rounded"] = errors(called[0], exact[0])
        if found is not None and not torch.equal(found[0].to(dtype), called[0]):
            tqdm.write(f"    {name}: not the same bits as a call in {dtype}")
    nothing = [math.nan] * len(kinds)
    return [
        {
            "dtype": str(dtype).removeprefix("torch."),
            "precision": precision,
            "head_dim": width,
            "seq": seq,
            "keys": kind,
            "cosine": cosine,
            **{column: columns.get(column, nothing)[index] for column in ("y", "dv", "dk", "y_rounded")},
        }
        for index, (kind, cosine) in enumerate(kinds)
    ]  # fmt: skip


def cases(
    quick: bool, head_dims: Collection[int] | None = None
) -> list[tuple[int, int, torch.dtype, tuple[Kind, ...]]]:
    """What is measured, the arguments of `measure`: short sequences first; None: all head sizes."""
    short = QUICK_SEQS if quick else SEQS
    half = [(width, seq, torch.bfloat16, KINDS) for seq in short for width in WIDTHS]
    half += [(WIDEST, seq, torch.bfloat16, KINDS) for seq in short if seq <= GRADIENTS_UP_TO]
    lengths = QUICK_SEQS if quick else SEQS_FLOAT32
    full = [(width, seq, torch.float32, KINDS_FLOAT32) for seq in lengths for width in WIDTHS]
    found = [case for case in half + full if head_dims is None or case[0] in head_dims]
    return sorted(found, key=lambda case: case[1])


def jobs(quick: bool, head_dims: Collection[int] | None = None) -> list[Job]:
    """The kernels that `run` needs."""
    found = []
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for width, seq, dtype, kinds in cases(quick, head_dims):
        shape = Shape(1, len(kinds), seq, width, str(dtype).removeprefix("torch."))
        for backward in (False, True) if seq <= GRADIENTS_UP_TO else (False,):
            found.append(Job(shape, backward))
            if dtype != torch.float32:
                found.append(Job(shape, backward, unrounded=True))
            if "high" in precisions(dtype, here):
                found += [Job(shape, backward, also, "high") for also in (False, True)]
    return found


def run(
    out: Path, facts: dict[str, Any], quick: bool, head_dims: Collection[int] | None = None
) -> None:
    """Measure and write, after each case what there is so far; some head sizes have a file of their own."""
    name = "-".join(["precision", *map(str, head_dims or ())])
    base = out / f"{name}-{report.slug(facts['gpu'])}"
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for case in tqdm(cases(quick, head_dims), desc="precision"):
        rows += measure(*case)
        torch.cuda.empty_cache()
        known = {name: facts[name] for name in ("commit", "date", "gpu", "torch", "triton")}
        report.write_csv([{**known, **row} for row in rows], base.with_suffix(".csv"))
        base.with_suffix(".md").write_text(report.precision_table(rows, facts))
    print(base.with_suffix(".md").read_text())
