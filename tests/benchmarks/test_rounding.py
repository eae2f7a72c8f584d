"""The imitated solve: what it is without roundings, and that each of them is where it says."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch

from benchmarks import rounding
from benchmarks.precision import error
from benchmarks.precision_gpu import Kind, make_keys
from lucid_attention import precondition


@pytest.mark.parametrize("kind", rounding.KINDS)
def test_what_is_imitated(kind: Kind) -> None:
    torch.manual_seed(0)
    key = make_keys((kind,), 300, 24, "cpu")[0, 0].double()
    value = torch.randn(300, 16, dtype=torch.float64)
    exact = precondition(key[None, None], value[None, None], impl="reference")[0, 0]
    for how in (
        rounding.Rounded(),
        rounding.Rounded(centred=True),
        rounding.Rounded(without_constant=True),
    ):
        assert error(rounding.solve(key, value, how), exact) < 1e-12
    # Half the float16 digits of one operand, at least: each of the roundings was made.
    for name in ("keys", "weights", "solution", "inverse"):
        rounded = rounding.solve(key, value, rounding.Rounded(**{name: True}))
        assert 2e-5 < error(rounded, exact) < 2e-2


def test_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rounding", "--quick", "--out", str(tmp_path)])
    rounding.main()
    rows = list(csv.DictReader((tmp_path / "rounding-cpu.csv").open()))
    assert [(row["keys"], float(row["cosine"])) for row in rows] == list(rounding.KINDS)
    for row in rows:
        parts = [float(row[f"y_{name}"]) for name in ("keys", "weights", "solution", "inverse")]
        assert float(row["y_all"]) == pytest.approx(sum(x * x for x in parts) ** 0.5, rel=0.25)
    shared = rows[2]
    assert float(shared["y_all_centred_without_constant"]) < float(shared["y_all"]) / 4
    assert "| 16 | 300 | shared 0.95 |" in (tmp_path / "rounding-cpu.md").read_text()
