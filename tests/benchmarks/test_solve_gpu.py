"""The GPU benchmark's machinery that needs no GPU: rows, tables, plot, gate, order of compiling."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import accuracy, gpu, precision_gpu, report, solve_gpu
from benchmarks.gpu import Job, Shape
from lucid_attention import precondition
from lucid_attention.precondition.kernels import launch

FACTS = {
    "commit": "abc1234", "date": "2026-12-01", "gpu": "NVIDIA H200", "torch": "2.11.0",
    "triton": "3.6.0", "matmul_tflops": 800.0,
}  # fmt: skip

USUAL = Shape(4, 8, 4096, 64)


def rows(shape: Shape = USUAL) -> list[dict[str, Any]]:
    """Rows of a run where flash failed and cuDNN took 1 ms."""
    times = {
        "triton": [0.0011, 0.0009, 0.001, 0.0012, 0.0013],
        "sdpa-cudnn": [0.001] * 3,
        "sdpa-flash": [],
        "triton in a graph": [0.0008],
        "sdpa-cudnn in a graph": [0.0005],
    }
    heads = dict.fromkeys(times, shape.chains)
    memory = {"triton": 3 * shape.value_bytes}
    return [
        row
        for which in gpu.PASSES
        for row in solve_gpu.rows_of(shape, which, times, memory, heads, {"triton": 2e-3}, FACTS)
    ]


def test_rows() -> None:
    ours, rival, failed = rows()[:3]
    assert [ours[name] for name in ("ms_p20", "ms_p50", "ms_p80")] == pytest.approx([0.98, 1.1, 1.22])  # fmt: skip
    assert ours["sdpa_backend"] == "cudnn"
    assert ours["ratio"] == pytest.approx(1.1)
    assert ours["graph_ratio"] == pytest.approx(1.6)
    assert math.isnan(failed["graph_ratio"])
    assert ours["tflops"] == pytest.approx(2 * 32 * 4096**2 * 64 / 1.1e-3 / 1e12)
    assert ours["peak_share"] == pytest.approx(ours["tflops"] / 800)
    assert (ours["extra_ratio"], ours["extra_mib"]) == (3.0, 3 * 32 * 4096 * 64 * 2 / 2**20)
    assert ours["us_per_step"] == pytest.approx(1100 / 32)
    assert (rival["ratio"], rival["rel_err"]) == (1.0, None)
    assert math.isnan(failed["ms_p50"])
    assert math.isnan(failed["extra_mib"])
    assert rows()[3]["us_per_step"] is None
    columns = "commit date gpu torch triton dtype batch kv_heads q_heads head_dim seq pass impl ms_p20 ms_p50 ms_p80 sdpa_backend sdpa_ms_p50 ratio graph_ms_p50 sdpa_graph_ms_p50 graph_ratio tflops peak_share extra_mib extra_ratio rel_err us_per_step"
    assert list(ours) == columns.split()


def test_tables_and_plot(tmp_path: Path) -> None:
    measured = rows() + rows(Shape(1, 8, 131072, 128))
    attention = Shape(1, 4, 32768, 64, query_heads=32)
    times = {"lucid_attention": [0.012], "lucid_attention-cudnn": [0.011], "sdpa-cudnn": [0.01]}
    heads = dict.fromkeys(times, 36)
    measured += solve_gpu.rows_of(attention, "forward", times, {}, heads, {}, FACTS)
    spans = iter(
        [
            ("prepare_kernel", 0.0, 100.0),
            ("hopper_solve_kernel", 200.0, 900.0),
            ("void at::native::fill<int>(int*)", 900.0, 950.0),
            ("Memset (Device)", 950.0, 1000.0),
        ]
    )
    lines = gpu.summarise(spans)
    assert [line.kernel for line in lines] == ["hopper_solve_kernel", "prepare_kernel", "others", "gaps"]  # fmt: skip
    assert [line.share for line in lines] == pytest.approx([0.7, 0.1, 0.1, 0.1])
    assert lines[2].launches == 2
    assert gpu.in_kernels(lines) == pytest.approx(sum(line.ms for line in lines[:3]))
    where = {"dtype": "bfloat16", "batch": 4, "kv_heads": 8, "head_dim": 64, "seq": 4096}
    stages = [{**where, "pass": "forward", **line._asdict()} for line in lines]
    text = report.solve_tables(measured, stages, FACTS)
    assert "| 64 | 32 | 4096 | fwd | 1.10 | 1.00 (cudnn) | **1.10** | 1.60 | 62 | 8% |" in text
    assert "| 32 / 4 | 64 | 1 | 32768 | fwd | 12.00 | 11.00 | 10.00 (cudnn) | 1.20 | **1.10** |" in text  # fmt: skip
    assert "| hopper solve | prepare | others | gaps |" in text
    assert "| 0.700 (70 %) | 0.100 (10 %) |" in text
    report.write_csv(measured, tmp_path / "solve.csv")
    read = list(csv.DictReader((tmp_path / "solve.csv").open()))
    assert len(read) == len(measured)
    assert (read[0]["ms_p50"], read[1]["rel_err"], read[2]["ms_p50"]) == ("1.1", "", "nan")
    report.plot(measured, FACTS, tmp_path / "solve.png")
    assert (tmp_path / "solve.png").stat().st_size > 10_000
    assert [report.slug(name) for name in ("NVIDIA H200", "NVIDIA A100 80GB")] == ["h200", "a100-80gb"]  # fmt: skip


def test_repetitions_are_the_same_in_every_round() -> None:
    assert [gpu.repetitions(seconds, 60.0) for seconds in (1e-6, 1e-3, 5.9e-3, 0.05, 2.0)] == [201, 60, 9, 3, 3]  # fmt: skip


def test_a_failure_is_reported_and_passes(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise RuntimeError("No available kernel.\nAborting")

    assert gpu.attempt("sdpa-cudnn", fails) is None
    assert "sdpa-cudnn failed: RuntimeError: No available kernel." in capsys.readouterr().out
    with pytest.raises(KeyError):
        gpu.attempt("ours", lambda: {}[0])


def test_gate() -> None:
    passed = accuracy.gate({(16, "float32")}, device="cpu", impl="blocked", seqs=(130,))
    assert passed[0].startswith("D 16 float32 N 130: Y ")
    passed = accuracy.gate({(16, "bfloat16")}, device="cpu", impl="blocked", seqs=(130,))
    assert [line.endswith("(precision high)") for line in passed] == [False, True]


@pytest.mark.parametrize("factor", [1.001, math.nan])
def test_gate_stops_what_is_wrong(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(key: torch.Tensor, value: torch.Tensor, impl: str, precision: str) -> torch.Tensor:
        return precondition(key, value, impl=impl, precision=precision) * (
            1.0 if impl == "reference" else factor
        )

    monkeypatch.setattr(accuracy, "precondition", wrong)
    with pytest.raises(SystemExit, match="nothing timed"):
        accuracy.gate({(16, "float32")}, device="cpu", impl="blocked", seqs=(130,))


def test_one_job_of_each_kernel_comes_first() -> None:
    shapes = [Shape(1, 8, 131072, 64), Shape(1, 8, 4096, 64), Shape(1, 1, 8192, 64)]
    jobs = [Job(shape, backward) for shape in shapes for backward in (False, True)]
    ordered = gpu.in_order([*jobs, jobs[0]])
    assert sorted(ordered, key=jobs.index) == jobs
    assert [(job.backward, job.shape.seq) for job in ordered] == [(True, 8192), (False, 8192), (True, 4096), (False, 4096), (True, 131072), (False, 131072)]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="in the interpreter; on a GPU the run checks it"
)
def test_unrounded_is_the_half_precision_path() -> None:
    key = precision_gpu.make_keys((("shared", 0.8), ("types", 0.9)), 130, 16, "cpu").half()
    value, grad = torch.randn_like(key), torch.randn_like(key)
    rest = (None, None, None, None, 0.25)
    called = launch.solve_dense(key, value, *rest)
    dk, dv, *_ = launch.adjoint_dense(grad, key, called, *rest)
    found = precision_gpu.wide(key, value, grad, called, True)
    exact = accuracy.gradients("reference", key.double(), value.double(), grad.double())
    for wide, narrow, right in zip(found, (called, dv, dk), exact, strict=True):
        assert wide.dtype == torch.float32
        # float16: the interpreter cuts bfloat16 off instead of rounding
        assert torch.equal(wide.half(), narrow)
        assert max(precision_gpu.errors(wide, right)) < 2e-3


def test_keys_have_the_cosine_they_are_named_after() -> None:
    keys = precision_gpu.make_keys((("shared", 0.8), ("types", 0.9)), 512, 1024, "cpu")
    unit = torch.nn.functional.normalize(keys[0], dim=-1)
    cosine = unit @ unit.mT
    off = ~torch.eye(512, dtype=torch.bool)
    assert cosine[0][off].mean().item() == pytest.approx(0.8, abs=0.02)
    same = cosine[1][off] > 0.5
    assert cosine[1][off][same].mean().item() == pytest.approx(0.9, abs=0.02)
    assert same.float().mean().item() == pytest.approx(1 / precision_gpu.TYPES, rel=0.3)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["solve_gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        solve_gpu.main()


def test_the_error_table_of_some_head_sizes() -> None:
    found = precision_gpu.cases(False, [256])
    assert {(case[0], case[1]) for case in found} == {(256, 4096), (256, 32768)}
    every = {case[0] for case in precision_gpu.cases(False)}
    assert every == {64, 128, 256}
    assert {job.shape.head_dim for job in precision_gpu.jobs(False, [64])} == {64}


def test_head_sizes_that_no_shape_has(tmp_path: Path) -> None:
    """Before anything is compiled or written."""
    options = argparse.Namespace(quick=False, head_dims=[68], part="attention", out=tmp_path)
    with pytest.raises(SystemExit, match=r"no shape of --part attention has \[68\]"):
        solve_gpu.run({"attention"}, options)
    assert not list(tmp_path.iterdir())
