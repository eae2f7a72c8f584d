"""What the GPU benchmarks share: shapes, operands, timing in turn, memory, kernel times, compiling."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import multiprocessing.pool
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from triton.errors import TritonError

from benchmarks.solve import COSINE
from lucid_attention.precondition.kernels import launch, plan

FAILURES = (RuntimeError, AssertionError, TritonError)
"""No back end for a shape, out of memory, a kernel that does not compile or does not launch."""

PASSES = ("forward", "backward", "forward+backward")
ROUNDS = 3
BUDGET_MS = 60.0
MOST_CALLS = 201
L2_BYTES = 256 << 20  # written before each timed call, so that none finds its inputs in the cache
COMPILE_SECONDS = 150


@dataclass(frozen=True)
class Shape:
    """``query_heads`` 0: as many as KV heads."""

    batch: int
    kv_heads: int
    seq: int
    head_dim: int
    dtype: str = "bfloat16"
    query_heads: int = 0

    @property
    def q_heads(self) -> int:
        return self.query_heads or self.kv_heads

    @property
    def chains(self) -> int:
        return self.batch * self.kv_heads

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def value_bytes(self) -> int:
        return self.chains * self.seq * self.head_dim * self.torch_dtype.itemsize


def operands(shape: Shape, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and an output gradient of the KV heads; keys with pairwise cosine 0.8."""
    torch.manual_seed(shape.seq + shape.head_dim)
    size = (shape.batch, shape.kv_heads, shape.seq, shape.head_dim)
    normal = functools.partial(torch.randn, device=device)
    shared = normal(*size[:2], 1, shape.head_dim)
    key = math.sqrt(COSINE) * shared + math.sqrt(1 - COSINE) * normal(size)
    query = normal(shape.batch, shape.q_heads, *size[2:])
    return tuple(x.to(shape.torch_dtype) for x in (query, key, normal(size), normal(size)))  # type: ignore[return-value]


def attempt(name: str, action: Callable[[], Any], backend: SDPBackend | None = None) -> Any:
    """What ``action`` returns, with one attention back end allowed; None, and a line, if it fails."""
    try:
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            return action()
    except FAILURES as error:
        first = str(error).strip().split("\n")[0]
        tqdm.write(f"    {name} failed: {type(error).__name__}: {first[:150]}")
    torch.cuda.empty_cache()  # here, where the exception holds no tensors any more
    return None


# Timing


@dataclass(frozen=True)
class Contestant:
    """One of the calls that are timed in turn."""

    call: Callable[[], object]
    backend: SDPBackend | None = None
    budget_ms: float = BUDGET_MS


def repetitions(seconds: float, budget_ms: float) -> int:
    """Calls to time: what fits the budget, at least one a round, the same number in each round."""
    fitting = min(MOST_CALLS, int(budget_ms / 1e3 / max(seconds, 1e-9)))
    return max(1, fitting // ROUNDS) * ROUNDS


def in_turn(contestants: Mapping[str, Contestant]) -> dict[str, list[float]]:
    """Seconds of each call, by device events; an empty list for one that failed.

    As `triton.testing.do_bench` (events, the L2 cache overwritten before each call), but round after
    round over the contestants, so that a drift of the clocks meets them alike, and with no more than
    four calls of one that takes long. Each should have been called once before.
    """
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in contestants}
    counts = {}

    def record(name: str, count: int) -> list[float] | None:
        one = contestants[name]
        found: list[float] | None = attempt(
            name, lambda: _seconds(one.call, count, flush), one.backend
        )
        return found

    for name, one in contestants.items():
        once = record(name, 1)
        if once is not None and once[0] < 0.02:
            once = record(name, 3)
        if once is not None:
            counts[name] = repetitions(min(once), one.budget_ms)
    for _, name in itertools.product(range(ROUNDS), list(counts)):
        found = record(name, counts[name] // ROUNDS) if name in counts else None
        if found is None:
            counts.pop(name, None)
            times[name] = []
        else:
            times[name] += found
    return times


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph: what it takes where the host does not launch its kernels one by one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _seconds(call: Callable[[], object], count: int, flush: Tensor) -> list[float]:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def matmul_tflops() -> float:
    """Rate of a large bfloat16 matrix product on random data: the peak that shares are of."""
    size = 8192
    left, right = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16).unbind(0)
    torch.matmul(left, right)
    seconds = in_turn({"matrix product": Contestant(lambda: torch.matmul(left, right))})
    return 2 * size**3 / float(torch.tensor(seconds["matrix product"]).median()) / 1e12


# Memory


def extra_bytes(call: Callable[[], object], kept: int = 0) -> int:
    """Peak memory of a call above what was held before, its results, and ``kept`` bytes."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    results = result if isinstance(result, tuple) else (result,)
    held = sum(x.numel() * x.element_size() for x in results if isinstance(x, Tensor))
    return peak - before - held - kept


# Where a call's time goes


class KernelTime(NamedTuple):
    """One line of a profile; ``share`` is of the time from the first kernel's start to the last's end."""

    kernel: str
    launches: int
    ms: float
    share: float


PROFILED = 5
"""Calls, each in a profile of its own: the one whose kernels take the median time is reported."""


def kernel_times(call: Callable[[], object]) -> list[KernelTime]:
    """Device time of one call by kernel: ours by name, PyTorch's as "others", and "gaps"."""
    call()
    found = []
    for _ in range(PROFILED):
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            call()
            torch.cuda.synchronize()
        found.append(
            summarise(
                (event.name, event.time_range.start, event.time_range.end)
                for event in recorded.events() or []
                if event.device_type == DeviceType.CUDA
                and not getattr(event, "is_user_annotation", False)
            )
        )
    return sorted(found, key=in_kernels)[PROFILED // 2]


def in_kernels(lines: list[KernelTime]) -> float:
    """Milliseconds without the gaps."""
    return sum(line.ms for line in lines if line.launches)


def summarise(spans: Iterator[tuple[str, float, float]]) -> list[KernelTime]:
    """Sum ``(name, start, end)`` in microseconds by name, the longest first, "gaps" last."""
    found: dict[str, list[float]] = {}
    first, last = math.inf, -math.inf
    for name, start, end in spans:
        first, last = min(first, start), max(last, end)
        ours = name.isidentifier() and name.endswith("_kernel")
        found.setdefault(name if ours else "others", []).append((end - start) / 1e3)
    if not found:
        return []
    total = max((last - first) / 1e3, 1e-9)
    lines = [KernelTime(name, len(ms), sum(ms), sum(ms) / total) for name, ms in found.items()]
    lines.sort(key=lambda line: -line.ms)
    gaps = total - sum(line.ms for line in lines)
    return [*lines, KernelTime("gaps", 0, gaps, gaps / total)]


# Compiling


@contextlib.contextmanager
def unrounded() -> Iterator[None]:
    """Within it, the kernels for half precision take float32 tensors.

    Given bfloat16 values in float32 they compute what they compute for bfloat16 inputs, and the
    result is not rounded to bfloat16 at the end. For precision="high" only where Hopper's own kernels serve it:
    float32's kernels, which do elsewhere, are kept out.
    """
    plan_for = plan.plan_for
    with (
        mock.patch.object(plan, "plan_for", lambda _, *widths: plan_for(torch.float16, *widths)),
        mock.patch.object(plan, "_calls", {}),
    ):
        yield


class Job(NamedTuple):
    """Kernels to have in Triton's cache on disk."""

    shape: Shape
    backward: bool
    unrounded: bool = False
    precision: str = "default"

    @property
    def kind(self) -> tuple[object, ...]:
        """What a kernel may be compiled for: Triton tells 1 and multiples of 16 from other numbers."""
        shape = self.shape
        sizes = (shape.kv_heads, shape.chains, math.ceil(shape.seq / 128), shape.seq)
        classes = ("one" if n == 1 else n % 16 == 0 for n in sizes)
        own = (self.backward, self.unrounded, self.precision, shape.dtype, shape.head_dim)
        return (*own, *classes)


def in_order(jobs: list[Job]) -> list[Job]:
    """One for each kernel first, then one of each kind, then the rest, which should find all done.

    Cheap jobs first among them, but backward, which takes longest to compile, before forward.
    """
    jobs = sorted(set(jobs), key=lambda job: (not job.backward, job.shape.chains * job.shape.seq))
    tiers: tuple[list[Job], ...] = ([], [], [])
    seen: set[tuple[object, ...]] = set()
    for job in jobs:
        coarse = job.kind[:5]
        tiers[0 if coarse not in seen else 1 if job.kind not in seen else 2].append(job)
        seen |= {coarse, job.kind}
    return [job for tier in tiers for job in tier]


def run_job(job: Job) -> str | None:
    """Run a job's kernels once, in a process of its own; says what went wrong."""
    torch.set_num_threads(1)
    try:
        _, key, value, grad = operands(job.shape)
        rest = (None, None, None, None, job.shape.head_dim**-0.5)
        with contextlib.ExitStack() as stack:
            if job.unrounded:
                key, value, grad = key.float(), value.float(), grad.float()
                stack.enter_context(unrounded())
            if job.backward:
                launch.adjoint_dense(grad, key, value, *rest, job.precision)
            else:
                launch.solve_dense(key, value, *rest, precision=job.precision)
        torch.cuda.synchronize()
    except FAILURES as error:
        return f"{job}: {type(error).__name__}: {str(error)[:300]}"
    del key, value, grad
    torch.cuda.empty_cache()
    return None


def compile_in_parallel(jobs: list[Job]) -> None:
    """Fill Triton's cache from several processes: compiling is most of a first call's time."""
    jobs = in_order(jobs)
    workers = max(1, min(14, os.cpu_count() or 1, len(jobs)))
    # Leaving the block ends the processes, also one that hangs.
    with torch.multiprocessing.get_context("spawn").Pool(workers) as pool:
        done = pool.imap_unordered(run_job, jobs, chunksize=1)
        assert isinstance(done, multiprocessing.pool.IMapIterator)
        try:
            for _ in tqdm(jobs, desc="compiling"):
                trouble = done.next(COMPILE_SECONDS)
                if trouble:
                    tqdm.write(f"    {trouble}")
        except multiprocessing.TimeoutError:
            tqdm.write("    compiling in parallel took too long; what is missing is compiled later")
