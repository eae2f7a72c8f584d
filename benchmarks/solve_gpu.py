"""The kernels of the solve on a GPU beside softmax attention: time, memory, error, where time goes.

    make bench-gpu                                       # everything, 3 to 4 minutes on an H200
    python -m benchmarks.solve_gpu --part attention      # solve, attention or precision alone
    python -m benchmarks.solve_gpu --head-dims 68        # such shapes alone
    python -m benchmarks.solve_gpu --quick               # a few small shapes, to see that it runs

Writes ``solve-GPU.csv`` (times, memory, errors), ``-stages.csv`` (kernels' shares of a call), ``.json``
(conditions), ``.md`` (tables) and ``.png`` into ``benchmarks/results`` (or ``--out``), after each shape
what there is so far; ``solve-68-GPU.*`` with ``--head-dims 68``; ``attention-GPU.*`` instead with ``--part attention``. ``benchmarks/precision_gpu.py``
writes ``precision-GPU``. Nothing is timed unless all results agree with float64.

Everything goes through the public functions and includes all they do. The rival is PyTorch's causal
softmax attention on the same heads with the faster of its back ends for the shape and pass. Other
rows: ``dense``, the definition by ``torch.linalg.solve_triangular``, and ``blocked``, torch only;
``triton-high``: our kernels with ``precision="high"``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend
from tqdm import tqdm

from benchmarks import precision_gpu, report
from benchmarks.accuracy import GATE_SEQS, errors_of, gate
from benchmarks.gpu import (
    PASSES,
    Contestant,
    Job,
    Shape,
    attempt,
    captured,
    compile_in_parallel,
    extra_bytes,
    in_turn,
    kernel_times,
    matmul_tflops,
    operands,
)
from benchmarks.solve import RESULTS, conditions, dense, quantiles
from lucid_attention import lucid_attention, precondition

SHAPES = [
    *(Shape(chains // 8, 8, seq, 64) for chains, seq in ((32, 4096), (16, 16384), (16, 32768), (8, 131072))),
    *(Shape(chains // 8, 8, seq, 128) for chains, seq in ((32, 4096), (8, 16384), (8, 32768), (8, 131072))),
    *(Shape(4, 8, seq, 68) for seq in (2048, 8192, 32768)),
    Shape(4, 4, 4096, 68),
    Shape(4, 8, 8192, 96),
    Shape(1, 8, 4096, 128),
    Shape(32, 8, 2048, 64),
    Shape(1, 4, 8192, 128),
    Shape(1, 1, 8192, 128),
    Shape(1, 1, 8192, 64),
    Shape(1, 1, 1024, 128),
    *(Shape(batch, 8, seq, 256) for batch, seq in ((4, 4096), (1, 8192), (1, 32768))),
    *(Shape(batch, 8, seq, 192) for batch, seq in ((4, 4096), (1, 8192), (1, 32768))),
    Shape(1, 8, 8192, 64, "float32"),
]  # fmt: skip
ATTENTION = [Shape(batch, 4, seq, 64, query_heads=32) for batch, seq in ((8, 4096), (1, 32768), (1, 131072))]  # fmt: skip
QUICK = [Shape(2, 2, 512, 64), Shape(1, 2, 300, 68)]
QUICK_ATTENTION = [Shape(1, 2, 512, 64, query_heads=4)]
FLOPS = {"forward": 2, "backward": 5, "forward+backward": 7}  # times N^2 D a head
DENSE_BYTES = 9 << 30  # the dense route makes several matrices of this size
BLOCKED_ROWS = 4096
GRAPHED_ROWS = 16384  # beyond, launches are a small part of a call
GRAPH = " in a graph"

CUDNN, FLASH, EFFICIENT = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)
NAMES = {CUDNN: "cudnn", FLASH: "flash", EFFICIENT: "efficient"}


class Entry(NamedTuple):
    """A function to time, the operands that it takes, and the heads that count for its flops."""

    function: Callable[..., Tensor]
    leaves: list[Tensor]
    heads: int
    backend: SDPBackend | None = None
    budget_ms: float = 60.0


solve = partial(precondition, impl="triton")
solve_high = partial(precondition, impl="triton", precision="high")
attend = partial(lucid_attention, impl="triton")
blocked = partial(precondition, impl="blocked")


def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's causal softmax attention."""
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=gqa)


def backends(shape: Shape) -> tuple[SDPBackend, ...]:
    """The back ends that may serve a shape; those that do not are recorded as failed."""
    if shape.dtype == "float32":
        return (EFFICIENT,)
    return (CUDNN, FLASH) if shape.head_dim % 8 == 0 else (FLASH, EFFICIENT)


def entries(shape: Shape) -> dict[str, Entry]:
    """Everything that is timed on a shape, by its name in the table."""
    leaves = [x.requires_grad_() for x in operands(shape)[:3]]
    heads, q_heads = shape.chains, shape.batch * shape.q_heads
    rivals = {
        f"sdpa-{NAMES[backend]}": Entry(softmax, leaves, q_heads, backend)
        for backend in backends(shape)
    }
    if shape.q_heads > shape.kv_heads:
        with_each = {
            f"lucid_attention-{NAMES[backend]}": Entry(attend, leaves, q_heads + heads, backend)
            for backend in backends(shape)
        }
        return {"lucid_attention": Entry(attend, leaves, q_heads + heads), **with_each, **rivals}
    found = {"triton": Entry(solve, leaves[1:], heads), **rivals}
    if shape.dtype != "float32":
        found["triton-high"] = Entry(solve_high, leaves[1:], heads)
    if heads * shape.seq**2 * 4 <= DENSE_BYTES:
        found["dense"] = Entry(dense, leaves[1:], heads)
    if shape.seq <= BLOCKED_ROWS:
        found["blocked"] = Entry(blocked, leaves[1:], heads, budget_ms=1.0)
    return found


def call_of(function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor, which: str) -> Callable[[], object]:  # fmt: skip
    """One pass as a call without arguments; for "backward" the graph is made here."""
    if which == "backward":
        return partial(torch.autograd.grad, function(*leaves), leaves, grad, retain_graph=True)

    def call() -> object:
        if which == "forward":
            with torch.no_grad():
                return function(*leaves)
        return torch.autograd.grad(function(*leaves), leaves, grad)

    return call


def rows_of(
    shape: Shape,
    which: str,
    times: dict[str, list[float]],
    memory: dict[str, float],
    heads: dict[str, int],
    errors: dict[str, float],
    facts: dict[str, Any],
) -> list[dict[str, Any]]:
    """A row for each entry, with its ratio to the fastest softmax attention of the same run."""
    found = {name: quantiles(seconds) for name, seconds in times.items() if seconds}
    graphed = {
        name.removesuffix(GRAPH): found.pop(name)[1] for name in list(found) if name.endswith(GRAPH)
    }
    rivals = {name: ms[1] for name, ms in found.items() if name.startswith("sdpa-")}
    rival = min(rivals, key=lambda name: rivals[name]) if rivals else ""
    graph_rival = min((ms for name, ms in graphed.items() if name in rivals), default=math.nan)
    rows = []
    for name in (name for name in times if not name.endswith(GRAPH)):
        low, middle, high = found.get(name, (math.nan,) * 3)
        tflops = FLOPS[which] * heads[name] * shape.seq**2 * shape.head_dim / middle / 1e9
        extra = memory.get(name, math.nan)
        ours = name == "triton"
        rows.append(
            {
                **{name: facts[name] for name in ("commit", "date", "gpu", "torch", "triton")},
                "dtype": shape.dtype,
                "batch": shape.batch,
                "kv_heads": shape.kv_heads,
                "q_heads": shape.q_heads,
                "head_dim": shape.head_dim,
                "seq": shape.seq,
                "pass": which,
                "impl": name,
                "ms_p20": low,
                "ms_p50": middle,
                "ms_p80": high,
                "sdpa_backend": rival.removeprefix("sdpa-"),
                "sdpa_ms_p50": rivals.get(rival, math.nan),
                "ratio": middle / rivals.get(rival, math.nan),
                "graph_ms_p50": graphed.get(name, math.nan),
                "sdpa_graph_ms_p50": graph_rival,
                "graph_ratio": graphed.get(name, math.nan) / graph_rival,
                "tflops": tflops,
                "peak_share": tflops / facts["matmul_tflops"],
                "extra_mib": extra / 2**20,
                "extra_ratio": extra / shape.value_bytes,
                "rel_err": errors.get(name),
                "us_per_step": (
                    middle * 1e3 / (shape.seq / 128) if ours and which == "forward" else None
                ),
            }
        )
    return rows


def measure(
    shape: Shape, which: str, errors: dict[str, float], facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Memory, then time in turn, of everything on a shape."""
    field = entries(shape)
    grads = {}
    calls: dict[str, Contestant] = {}
    memory: dict[str, float] = {}
    for name, entry in field.items():
        query = entry.leaves[0]  # of the output's shape, whatever the entry takes first
        if query.shape not in grads:
            grads[query.shape] = torch.randn_like(query)
        call = attempt(
            name, partial(call_of, entry.function, entry.leaves, grads[query.shape], which),
            entry.backend,
        )  # fmt: skip
        if call is None:
            continue
        kept = query.nbytes if which == "forward+backward" else 0
        extra = attempt(name, partial(extra_bytes, call, kept), entry.backend)
        if extra is not None:
            memory[name] = extra
            calls[name] = Contestant(call, entry.backend, entry.budget_ms)
        # A backward pass alone runs on the stream of its forward pass, outside the capture.
        graphed = shape.seq <= GRAPHED_ROWS and which != "backward"
        if extra is not None and graphed and name not in ("dense", "blocked"):
            replay = attempt(name + GRAPH, partial(captured, call), entry.backend)
            if replay is not None:
                calls[name + GRAPH] = Contestant(replay, entry.backend, entry.budget_ms)
    times: dict[str, list[float]] = {name: [] for name in field}
    times.update(in_turn(calls))
    heads = {name: entry.heads for name, entry in field.items()}
    return rows_of(shape, which, times, memory, heads, errors, facts)


def stages_of(shape: Shape, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The kernels' times in one call of each pass."""
    _, key, value, grad = operands(shape)
    leaves = [key.requires_grad_(), value.requires_grad_()]
    where = {name: getattr(shape, name) for name in ("dtype", "batch", "kv_heads", "head_dim", "seq")}  # fmt: skip
    return [
        {"commit": facts["commit"], "gpu": facts["gpu"], **where, "pass": which, **line._asdict()}
        for which in ("forward", "backward")
        for line in kernel_times(call_of(solve, leaves, grad, which))
    ]


def repeatable(shape: Shape) -> dict[str, bool | None]:
    """Whether two backward passes on the same graph give the same bits."""
    grad = operands(shape)[0]  # of the output's shape
    found: dict[str, bool | None] = {}
    for name, entry in entries(shape).items():
        if name in ("dense", "blocked"):
            continue
        call = attempt(name, partial(call_of, entry.function, entry.leaves, grad, "backward"), entry.backend)  # fmt: skip
        pair = call and attempt(name, lambda call=call: (call(), call()), entry.backend)
        found[name] = pair and all(torch.equal(a, b) for a, b in zip(*pair, strict=True))
    return found


def facts_of_run() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    facts: dict[str, Any] = conditions("cuda")
    facts["gpu"] = facts.pop("device")
    return {
        **facts,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "matmul_tflops": round(matmul_tflops(), 1),
        "matmul": "8192 x 8192 x 8192, bfloat16, random, measured in the same run",
        "timing": "device events around whole calls, host time between launches included; L2 cache "
        "overwritten before each; rivals in turn, 3 rounds; 20th, 50th, 80th percentile",
        "graph": "the same call as a CUDA graph, ours and the rivals', up to 16384 tokens",
        "rival": "F.scaled_dot_product_attention, causal; the faster back end counts",
        "deterministic_backward": "ours always is; PyTorch's cuDNN and flash are not unless "
        "torch.use_deterministic_algorithms(True), which was off",
        "extra": "peak during the call above inputs, outputs and saved Y",
        "rel_err": "against float64, output rounding included; forward: Y, backward: dV, "
        "forward+backward: the larger",
    }


class Results:
    """Rows so far, written out whenever there are more."""

    def __init__(self, base: Path, facts: dict[str, Any]) -> None:
        self.base, self.facts = base, facts
        self.rows: list[dict[str, Any]] = []
        self.stages: list[dict[str, Any]] = []

    def write(self) -> None:
        self.base.parent.mkdir(parents=True, exist_ok=True)
        self.base.with_suffix(".json").write_text(json.dumps(self.facts, indent=2) + "\n")
        if self.rows:
            report.write_csv(self.rows, self.base.with_suffix(".csv"))
        if self.stages:
            report.write_csv(self.stages, self.base.with_name(self.base.name + "-stages.csv"))
        text = report.solve_tables(self.rows, self.stages, self.facts)
        self.base.with_suffix(".md").write_text(text)


def run(parts: set[str], options: argparse.Namespace) -> None:
    """Compile, gate, measure, write."""
    shapes = QUICK if options.quick else SHAPES
    attention = QUICK_ATTENTION if options.quick else ATTENTION
    if options.head_dims:
        shapes = [shape for shape in shapes if shape.head_dim in options.head_dims]
        attention = [shape for shape in attention if shape.head_dim in options.head_dims]
    measured = (shapes if "solve" in parts else []) + (attention if "attention" in parts else [])
    kinds = {(shape.head_dim, shape.dtype) for shape in measured}
    precision_jobs = []
    if "precision" in parts:
        precision_jobs = precision_gpu.jobs(options.quick, options.head_dims)
    if not measured + precision_jobs:
        raise SystemExit(f"--head-dims: no shape of --part {options.part} has {options.head_dims}")
    kinds |= {(job.shape.head_dim, job.shape.dtype) for job in precision_jobs}
    gated = [Shape(2, 4, seq, *kind) for kind in sorted(kinds) for seq in GATE_SEQS]
    jobs = [Job(shape, backward) for shape in gated + measured for backward in (False, True)]
    jobs += [
        Job(shape, backward, precision="high")
        for shape in gated + (measured if "solve" in parts else [])
        for backward in (False, True)
        if shape.dtype != "float32"
    ]
    begun = time.perf_counter()
    seconds: dict[str, float] = {}

    def lap(part: str) -> None:
        torch.cuda.empty_cache()
        seconds[part] = round(time.perf_counter() - begun - sum(seconds.values()), 1)
        tqdm.write(f"{part}: {seconds[part]} s")

    compile_in_parallel(jobs + precision_jobs)
    lap("compiling")
    passed = gate(kinds)
    tqdm.write("\n".join(passed))
    facts = {**facts_of_run(), "gate": passed, "seconds": seconds}
    if measured:
        facts["repeatable_backward"] = repeatable(measured[0])
    lap("gate")
    name = "-".join(
        ["attention" if "solve" not in parts else "solve", *map(str, options.head_dims or ())]
    )
    results = Results(options.out / f"{name}-{report.slug(facts['gpu'])}", facts)
    for shape in tqdm(shapes if "solve" in parts else [], desc="solve"):
        known = {}
        for entry, precision in (("triton", "default"), ("triton-high", "high")):
            if precision == "default" or shape.dtype != "float32":
                job = partial(errors_of, shape, precision)
                known[entry] = attempt(f"errors of {shape}, precision {precision}", job) or {}
        for which in PASSES:
            errors = {entry: found.get(which, math.nan) for entry, found in known.items()}
            results.rows += measure(shape, which, errors, facts)
            tqdm.write(report.line(results.rows))
            torch.cuda.empty_cache()
        results.write()
    lap("solve")
    for shape in tqdm(attention if "attention" in parts else [], desc="attention"):
        for which in ("forward", "forward+backward"):
            results.rows += measure(shape, which, {}, facts)
            tqdm.write(report.line(results.rows))
            torch.cuda.empty_cache()
        results.write()
    if any(shape.head_dim in (64, 128) for shape in measured) and "solve" in parts:
        report.plot(results.rows, facts, results.base.with_suffix(".png"))
    lap("attention")
    # After all timing: a profiler that has once been on may leave launches slower.
    for shape in tqdm(shapes if "solve" in parts else [], desc="stages"):
        results.stages += attempt(f"stages of {shape}", partial(stages_of, shape, facts)) or []
    lap("stages")
    if measured:
        facts["matmul_tflops_at_the_end"] = round(matmul_tflops(), 1)
        results.write()
    if "precision" in parts:
        precision_gpu.run(options.out, facts, options.quick, options.head_dims)
        lap("precision")
    if measured:
        results.write()
        print(results.base.with_suffix(".md").read_text())
        print(f"written to {results.base}.*")
        ours = ("triton", "triton-high", "lucid_attention")
        lost = [row for row in results.rows if row["impl"] in ours and math.isnan(row["ms_p50"])]
        if lost:
            raise SystemExit(f"{len(lost)} of our own measurements failed; see the lines above.")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few small shapes only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write")
    parser.add_argument(
        "--head-dims", type=int, nargs="+", help="these head sizes only, in files of their own"
    )
    parser.add_argument("--part", choices=("solve", "attention", "precision", "all"), default="all")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks.solve_gpu needs a CUDA device; python -m benchmarks.solve runs on the CPU."
        )
    every = {"solve", "attention", "precision"}
    run(every if options.part == "all" else {options.part}, options)


if __name__ == "__main__":
    main()
