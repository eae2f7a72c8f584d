"""Which of the GPU kernels' roundings makes how much of their error: the forward solve imitated in float64.

    python -m benchmarks.rounding            # about six minutes on two cores
    python -m benchmarks.rounding --quick

The kernels multiply float16 operands and add in float32. Here each of the four roundings to float16 is made by
itself, in blocks of 128 rows as there, then all of them; everything else is float64. Then all of them once more in kernels that
do not exist: with keys centred on the sequence's first one, as the float32 kernels have them,

    khat_i . khat_j = (khat_i - r) . (khat_j - r) + w_i + w_j,    w = khat . r - |r|^2 / 2,

with a constant taken out of the weights before they are rounded, ``P Y = (P - a) Y + a 1^T Y``, ``a`` the
weight of the mean key with itself, and with both. Writes ``rounding-cpu.csv`` and ``.md`` into ``benchmarks/results`` (or ``--out``).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.linalg import solve_triangular
from tqdm import tqdm

from benchmarks import report
from benchmarks.precision import error
from benchmarks.precision_gpu import Kind, make_keys
from benchmarks.solve import RESULTS, conditions
from lucid_attention.precondition.kernels.plan import SHIFT_FORWARD, headroom
from lucid_attention.precondition.numerics import KEY_EPS

BLOCK = 128
KINDS: tuple[Kind, ...] = (("shared", 0.5), ("shared", 0.8), ("shared", 0.95), ("types", 0.9))
CASES = [(width, 4096, kind) for width in (64, 128) for kind in KINDS] + [
    (width, 32768, kind) for width in (64, 128) for kind in (("shared", 0.8), ("types", 0.9))
]
QUICK = [(16, 300, kind) for kind in KINDS]


@dataclass(frozen=True)
class Rounded:
    """What is rounded to float16 (keys, the weights P, Y as an operand, the inverse and its right-hand side), and how."""

    keys: bool = False
    weights: bool = False
    solution: bool = False
    inverse: bool = False
    centred: bool = False
    without_constant: bool = False


ALL = {"keys": True, "weights": True, "solution": True, "inverse": True}
ROUNDINGS = {
    "y_keys": Rounded(keys=True),
    "y_weights": Rounded(weights=True),
    "y_solution": Rounded(solution=True),
    "y_inverse": Rounded(inverse=True),
    "y_all": Rounded(**ALL),
    "y_all_centred": Rounded(**ALL, centred=True),
    "y_all_without_constant": Rounded(**ALL, without_constant=True),
    "y_all_centred_without_constant": Rounded(**ALL, centred=True, without_constant=True),
}


def half(x: Tensor, power: int = 0) -> Tensor:
    """``x`` as float16 holds it in units of ``2^-power``."""
    return (x * 2.0**power).half().double() * 2.0**-power


def solve(key: Tensor, value: Tensor, how: Rounded) -> Tensor:
    """``Y = L^-1 V`` of ``(seq, width)`` in float64, but for what ``how`` names."""
    seq, width = key.shape
    scale, largest = width**-0.5, width**0.5
    keys = key * torch.rsqrt(key.square().mean(-1, keepdim=True) + KEY_EPS)
    mean = keys.mean(0)
    constant = math.exp(scale * mean.dot(mean).item() - largest) if how.without_constant else 0.0
    weight = keys.new_zeros(seq)
    if how.centred:
        reference = keys[0] * (largest / keys[0].norm())
        weight = keys @ reference - reference.dot(reference) / 2
        keys = keys - reference
    if how.keys:
        keys = half(keys)
    # The kernels' power of two: the largest value, times what Y can grow by, below 2^15.
    power = 15 - headroom(seq) - math.frexp(value.abs().max().item())[1]
    y, operand = torch.empty_like(value), torch.empty_like(value)
    total = value.new_zeros(value.shape[-1])

    def couplings(rows: slice, columns: slice) -> Tensor:
        """``P``."""
        exponent = keys[rows] @ keys[columns].T + weight[rows, None] + weight[None, columns]
        return torch.exp(scale * exponent - largest)

    for start in range(0, seq, BLOCK):
        rows, before = slice(start, min(start + BLOCK, seq)), slice(0, start)
        p = couplings(rows, before) - constant
        p = half(p, SHIFT_FORWARD) if how.weights else p
        right = value[rows] - p @ operand[before] - constant * total
        lower = couplings(rows, rows).tril(-1)
        if how.inverse:  # as the kernels have it, without its ones
            one = torch.eye(lower.shape[0], dtype=torch.float64)
            inverse = solve_triangular(lower, one, upper=False, unitriangular=True) - one
            y[rows] = right + half(inverse) @ half(right, power)
        else:
            y[rows] = solve_triangular(lower, right, upper=False, unitriangular=True)
        operand[rows] = half(y[rows], power) if how.solution else y[rows]
        total = total + y[rows].sum(0)
    return y


def measure(width: int, seq: int, kind: Kind) -> dict[str, object]:
    """Relative Frobenius errors of ``Y``, inputs in bfloat16."""
    torch.manual_seed(seq + width)
    key = make_keys((kind,), seq, width, "cpu")[0, 0].bfloat16().double()
    value = torch.randn(seq, width, dtype=torch.float64).bfloat16().double()
    exact = solve(key, value, Rounded())
    found = {name: error(solve(key, value, how), exact) for name, how in ROUNDINGS.items()}
    return {"head_dim": width, "seq": seq, "keys": kind[0], "cosine": kind[1], **found}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="short sequences only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    facts = conditions("cpu")
    rows = []
    for case in tqdm(QUICK if options.quick else CASES, desc="rounding"):
        known = {name: facts[name] for name in ("commit", "date", "torch")}
        rows.append({**known, **measure(*case)})
        report.write_csv(rows, options.out / "rounding-cpu.csv")
    titles = "D | N | keys | rounded: keys | P | Y | inverse | all | all, keys centred | all, a constant out of P | all, both"
    lines = [
        [str(r["head_dim"]), str(r["seq"]), f"{r['keys']} {r['cosine']:g}", *(f"{r[name]:.1e}" for name in ROUNDINGS)]
        for r in rows
    ]  # fmt: skip
    text = report.table(titles.split(" | "), lines)
    (options.out / "rounding-cpu.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
