"""The precision table's machinery on short sequences."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from benchmarks import precision


def test_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["precision", "--quick", "--out", str(tmp_path)])
    precision.main()
    rows = list(csv.DictReader((tmp_path / "precision-cpu.csv").open()))
    assert [float(row["cosine"]) for row in rows] == list(precision.COSINES)
    for row in rows:
        assert 0 < float(row["y_float32"]) < 1e-6 < float(row["y_float16"]) < float(row["y_bfloat16"])  # fmt: skip
    worst = rows[-1]
    assert float(worst["y_float32_uncentred"]) > 3 * float(worst["y_float32"])
    assert "| 16 | 300 | 0.99 |" in (tmp_path / "precision-cpu.md").read_text()
