"""Error of the blocked solve against float64, by key correlation, length and dtype.

    python -m benchmarks.precision            # about a minute on one core
    python -m benchmarks.precision --device cuda
    python -m benchmarks.precision --quick

Writes ``precision-DEVICE.csv`` and ``.md`` (the tables of ``docs/numerics.md``) into
``benchmarks/results`` (or ``--out``). ``tf32`` (on a GPU) is float32 with
``torch.set_float32_matmul_precision("high")``. ``uncentred`` is the same solve with the kernel's exponent
formed from the plain normalised keys, to show what centring is worth.
"""

from __future__ import annotations

import argparse
import csv
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.solve import RESULTS, conditions
from lucid_attention import precondition
from lucid_attention.precondition import blocked
from lucid_attention.precondition.numerics import KEY_EPS

COSINES = (0.0, 0.5, 0.8, 0.95, 0.99)
SIZES = [(64, 2048), (64, 8192), (128, 2048), (128, 8192)]


@dataclass(frozen=True)
class Row:
    """Relative Frobenius errors against float64 of one head, keys sharing one direction."""

    head_dim: int
    seq: int
    cosine: float
    y_float32: float
    y_float32_uncentred: float
    y_tf32: float | None
    dv_float32: float
    dk_float32: float
    y_bfloat16: float
    y_float16: float


def error(got: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error."""
    return ((got.double() - exact).norm() / exact.norm()).item()


def uncentred(key: Tensor, value: Tensor) -> Tensor:
    """The blocked solve with the exponent formed from the plain normalised keys."""
    width = key.shape[-1]
    scale = width**-0.5
    inverse_rms = torch.rsqrt(key[0].square().mean(-1, keepdim=True) + KEY_EPS)
    half = torch.full_like(inverse_rms, -scale * width / 2)
    columns = torch.cat((key[0] * inverse_rms, torch.ones_like(half), half), dim=-1)
    keys = blocked.Keys(columns, key.new_zeros(1, 1, width), inverse_rms, scale)
    solution = value[0].clone()
    blocked.solve(keys, solution, None, blocked.Rows(None, None, None), None)
    return solution[None]


def gradients(key: Tensor, value: Tensor, weight: Tensor) -> list[Tensor]:
    """Y, dV and dK for an output gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in (key, value)]
    y = precondition(*leaves)
    grad_key, grad_value = torch.autograd.grad(y, leaves, weight.to(y.dtype))
    return [y.detach(), grad_value, grad_key]


def in_tf32(key: Tensor, value: Tensor) -> Tensor:
    """The solve as it comes out where a training script has allowed TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return precondition(key, value)
    finally:
        torch.set_float32_matmul_precision(before)


def measure(width: int, seq: int, cosine: float, device: str) -> Row:
    """All errors for one kind of keys. Half precision is measured against its own rounded inputs."""
    torch.manual_seed(0)
    shared, random = torch.randn(1, 1, 1, width), torch.randn(1, 1, seq, width)
    key = math.sqrt(cosine) * shared + math.sqrt(1 - cosine) * random
    value, weight = torch.randn(2, 1, 1, seq, width).unbind(0)
    key, value, weight = (x.to(device) for x in (key, value, weight))
    exact = gradients(key.double(), value.double(), weight.double())
    got = gradients(key, value, weight)
    half = {}
    for dtype in (torch.bfloat16, torch.float16):
        rounded = key.to(dtype), value.to(dtype)
        wide = precondition(*(x.double() for x in rounded))
        half[dtype] = error(precondition(*rounded), wide)
    return Row(
        width,
        seq,
        cosine,
        y_float32=error(got[0], exact[0]),
        y_float32_uncentred=error(uncentred(key, value), exact[0]),
        y_tf32=error(in_tf32(key, value), exact[0]) if device == "cuda" else None,
        dv_float32=error(got[1], exact[1]),
        dk_float32=error(got[2], exact[2]),
        y_bfloat16=half[torch.bfloat16],
        y_float16=half[torch.float16],
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="short sequences only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write")
    options = parser.parse_args()
    sizes = [(16, 300)] if options.quick else SIZES
    cases = [(width, seq, cosine) for width, seq in sizes for cosine in COSINES]
    device: str = options.device
    rows = [asdict(measure(*case, device)) for case in tqdm(cases, desc="precision")]
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / f"precision-{device}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    facts = conditions(device)
    titles = {
        "head_dim": "D",
        "seq": "N",
        "cosine": "cosine",
        "y_float32": "Y fp32",
        "y_float32_uncentred": "Y fp32, uncentred",
        "y_tf32": "Y TF32",
        "dv_float32": "dV fp32",
        "dk_float32": "dK fp32",
        "y_bfloat16": "Y bf16",
        "y_float16": "Y fp16",
    }
    shown = [name for name in titles if rows[0][name] is not None]
    lines = ["| " + " | ".join(titles[name] for name in shown) + " |", "|---" * len(shown) + "|"]
    for row in rows:
        keys = [str(row[name]) for name in shown[:3]]
        cells = keys + [f"{row[name]:.1e}" for name in shown[3:]]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(
        f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}, {facts['date']}."
    )
    (options.out / f"precision-{device}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
