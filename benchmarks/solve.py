"""The blocked solve beside the dense route and softmax attention: time and peak memory.

    python -m benchmarks.solve            # on the CPU, about 5 minutes on two cores
    python -m benchmarks.solve --quick    # a few small shapes, to see that it runs

Writes ``solve-cpu.csv``, ``.json`` (conditions) and ``.png`` into ``benchmarks/results`` (or
``--out``). Times include everything a call does. Rivals: ``dense``, the definition by
``torch.linalg.solve_triangular`` with autograd, and ``sdpa``, PyTorch's causal softmax attention on
the same heads, which the solve is an addition to. On a GPU: ``benchmarks/solve_gpu.py``.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import gc
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lucid_attention import precondition

RESULTS = Path(__file__).parent / "results"
COSINE = 0.8
GATE = 1e-5  # relative error against float64 that float32 has to keep


@dataclass(frozen=True)
class Shape:
    """A batch of one: heads, length, head size."""

    heads: int
    seq: int
    head_dim: int


SHAPES = [
    *(Shape(4, seq, 64) for seq in (256, 1024, 4096, 8192, 16384)),
    *(Shape(4, seq, 128) for seq in (1024, 4096)),
    Shape(4, 4096, 68),
    Shape(1, 8192, 64),
    Shape(64, 256, 64),
]
QUICK = [Shape(2, 256, 64), Shape(2, 512, 16)]
# One (heads, N, N) matrix above this is not attempted by the dense route (it makes several).
DENSE_LIMIT = 1.2 * 2**30


@dataclass(frozen=True)
class Row:
    """One measurement; milliseconds, MiB; ratios are to the same row's rivals in the same run."""

    heads: int
    seq: int
    head_dim: int
    dtype: str
    direction: str
    impl: str
    ms_p20: float
    ms_p50: float
    ms_p80: float
    extra_mib: float
    gflops: float
    ratio_dense: float | None
    ratio_sdpa: float | None
    memory_ratio_dense: float | None
    rel_err: float | None


def dense(key: Tensor, value: Tensor) -> Tensor:
    """What one writes without this library: the whole matrix and a triangular solve."""
    width = key.shape[-1]
    key, given = key.float(), value.dtype  # the triangular solve takes no half precision
    keys = F.rms_norm(key, (width,), eps=1e-6)
    lower = torch.exp(keys @ keys.mT / math.sqrt(width) - math.sqrt(width)).tril()
    solved = torch.linalg.solve_triangular(lower, value.float(), upper=False, unitriangular=True)
    return solved.to(given)


def sdpa(key: Tensor, value: Tensor) -> Tensor:
    """Causal softmax attention with the keys as queries: the same heads, the same length."""
    return F.scaled_dot_product_attention(key, key, value, is_causal=True)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "blocked": precondition,
    "dense": dense,
    "sdpa": sdpa,
}


def operands(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Keys with pairwise cosine 0.8, values and an output gradient."""
    torch.manual_seed(0)
    size = (1, shape.heads, shape.seq, shape.head_dim)
    shared = torch.randn(1, shape.heads, 1, shape.head_dim)
    key = math.sqrt(COSINE) * shared + math.sqrt(1 - COSINE) * torch.randn(size)
    return key, torch.randn(size), torch.randn(size)


def relative_error(shape: Shape) -> float:
    """Error of the blocked solve against the dense definition in float64.

    One head, and at most the first 4096 tokens, which later ones do not change: the definition is
    quadratic in memory.
    """
    key, value, _ = (x[:, :1, :4096] for x in operands(shape))
    exact = precondition(key.double(), value.double(), impl="reference")
    got = precondition(key, value).double()
    return ((got - exact).norm() / exact.norm()).item()


def peak_extra_mib(run: Callable[[], object]) -> float:
    """Peak resident memory during ``run`` above what was held before, its result included."""
    gc.collect()
    # Hand freed memory back first, or a call that reuses it would seem to cost nothing.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    kept = run()
    peak = _status("VmHWM")
    del kept
    return max(0.0, (peak - before) / 1024)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile, in milliseconds."""
    points = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])) * 1e3
    return tuple(points.tolist())  # type: ignore[return-value]


def measure(shape: Shape, direction: str, seconds: float) -> list[Row]:
    """Time all implementations in turn, round after round, so that a drift meets them alike."""
    key, value, grad = operands(shape)
    backward = direction == "forward+backward"
    names = list(IMPLEMENTATIONS)
    if shape.heads * shape.seq**2 * 4 > DENSE_LIMIT:
        names.remove("dense")

    def call(name: str) -> object:
        if not backward:
            with torch.no_grad():
                return IMPLEMENTATIONS[name](key, value)
        leaves = key.requires_grad_(), value.requires_grad_()
        return torch.autograd.grad(IMPLEMENTATIONS[name](*leaves), leaves, grad)

    memory = {}
    for name in names:
        call(name)
        memory[name] = peak_extra_mib(lambda name=name: call(name))  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in names}
    stop = time.perf_counter() + seconds
    while len(times["blocked"]) < 3 or (time.perf_counter() < stop and len(times["blocked"]) < 50):
        for name in names:
            start = time.perf_counter()
            call(name)
            times[name].append(time.perf_counter() - start)

    median = {name: quantiles(times[name])[1] for name in names}
    flops = (7 if backward else 2) * shape.heads * shape.seq**2 * shape.head_dim
    error = relative_error(shape)
    rows = []
    for name in names:
        low, middle, high = quantiles(times[name])
        ours = name == "blocked"
        compared = ours and "dense" in median
        rows.append(
            Row(
                **asdict(shape),
                dtype=str(key.dtype).removeprefix("torch."),
                direction=direction,
                impl=name,
                ms_p20=round(low, 3),
                ms_p50=round(middle, 3),
                ms_p80=round(high, 3),
                extra_mib=round(memory[name], 1),
                gflops=round(flops / middle / 1e6, 1),
                ratio_dense=round(middle / median["dense"], 3) if compared else None,
                ratio_sdpa=round(middle / median["sdpa"], 3) if ours else None,
                memory_ratio_dense=(
                    round(memory[name] / max(memory["dense"], 0.1), 3) if compared else None
                ),
                rel_err=float(f"{error:.2e}") if ours else None,
            )
        )
    return rows


def conditions(device: str) -> dict[str, str | int | float]:
    """What a reader needs to judge the numbers."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        # $COMMIT goes first: a copy of the tree may carry an older history than its own
        "commit": os.environ.get("COMMIT") or git.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
        "device": cpu if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "key_cosine": COSINE,
        "flops": "causal: 2 N^2 D a head forward, 5 N^2 D backward, the same for every row",
    }


def plot(rows: list[Row], facts: dict[str, str | int | float], path: Path) -> None:
    """Time and memory against length at the commonest head count and size, log-log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"blocked": "#d55e00", "dense": "#e69f00", "sdpa": "#0072b2"}
    labels = {"blocked": "LUCID solve, blocked", "dense": "LUCID solve, dense", "sdpa": "softmax attention (SDPA)"}  # fmt: skip
    sizes = [(row.heads, row.head_dim) for row in rows]
    heads, head_dim = max(set(sizes), key=sizes.count)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    lengths: set[int] = set()
    for direction, style in (("forward", "-"), ("forward+backward", "--")):
        for impl, colour in colours.items():
            line = [
                row
                for row in rows
                if (row.impl, row.direction, row.heads, row.head_dim)
                == (impl, direction, heads, head_dim)
            ]
            label = labels[impl] if style == "-" else None
            for axis, field in zip(axes, ("ms_p50", "extra_mib"), strict=True):
                at = [row.seq for row in line]
                axis.plot(at, [getattr(row, field) for row in line], style, color=colour, marker="o", ms=4, label=label)  # fmt: skip
                lengths.update(at)
    for axis, title in zip(axes, ("time, ms (median)", "peak extra memory, MiB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="sequence length", title=title)
        ticks = sorted(lengths)
        axis.set_xticks(ticks, [str(n) if n < 1024 else f"{n // 1024}K" for n in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=9)
    figure.text(
        0.01,
        0.01,
        f"{heads} heads, D = {head_dim}, {rows[0].dtype}, key cosine {COSINE}; solid: forward, "
        f"dashed: forward + backward. {facts['device']}, torch {facts['torch']}, "
        f"{facts['threads']} CPU threads, {facts['date']}.",
        fontsize=7.5,
        color="#555555",
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=150)


def main() -> None:
    """Gate, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write")
    parser.add_argument("--seconds", type=float, help="time for each shape and pass")
    options = parser.parse_args()
    shapes = QUICK if options.quick else SHAPES
    for shape in tqdm(shapes, desc="correctness gate"):
        error = relative_error(shape)
        if not error <= GATE:  # a NaN does not pass
            raise SystemExit(f"{shape}: relative error {error:.1e} is above {GATE}; nothing timed.")
    facts = conditions("cpu")
    seconds = options.seconds or (0.2 if options.quick else 8.0)
    rows: list[Row] = []
    for shape in tqdm(shapes, desc="measuring"):
        for direction in ("forward", "forward+backward"):
            rows += measure(shape, direction, seconds)
    options.out.mkdir(parents=True, exist_ok=True)
    base = options.out / "solve-cpu"
    with base.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    base.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    plot(rows, facts, base.with_suffix(".png"))
    for row in rows:
        if row.impl == "blocked":
            dense_ratio = "not run" if row.ratio_dense is None else f"{row.ratio_dense:.2f}"
            print(
                f"{row.heads:3} heads  N {row.seq:6}  D {row.head_dim:3}  {row.direction:17} "
                f"{row.ms_p50:9.2f} ms  / dense {dense_ratio}  / sdpa {row.ratio_sdpa:.2f}  "
                f"extra {row.extra_mib:.0f} MiB  error {row.rel_err:.1e}"
            )
    print(f"written to {base}.csv, .json, .png")


if __name__ == "__main__":
    main()
