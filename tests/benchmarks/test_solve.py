"""The benchmark's machinery on small shapes: gate, CSV, conditions, plot."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import solve


def test_quick_run_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["solve", "--quick", "--out", str(tmp_path)])
    solve.main()
    rows = list(csv.DictReader((tmp_path / "solve-cpu.csv").open()))
    assert len(rows) == 2 * 2 * 3
    ours = [row for row in rows if row["impl"] == "blocked"]
    assert all(float(row["rel_err"]) < 1e-5 and float(row["ratio_sdpa"]) > 0 for row in ours)
    assert {"commit", "date", "device", "torch"} <= set(json.loads((tmp_path / "solve-cpu.json").read_text()))  # fmt: skip
    assert (tmp_path / "solve-cpu.png").stat().st_size > 10_000


@pytest.mark.parametrize("make", [torch.Tensor.clone, lambda value: value * torch.nan])
def test_a_wrong_solve_is_not_timed(
    make: Callable[[Tensor], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = solve.precondition

    def wrong(key: Tensor, value: Tensor, impl: str = "auto") -> Tensor:
        return right(key, value, impl=impl) if impl == "reference" else make(value)

    monkeypatch.setattr(sys, "argv", ["solve", "--quick", "--out", str(tmp_path)])
    monkeypatch.setattr(solve, "precondition", wrong)
    with pytest.raises(SystemExit, match=r"relative error .* nothing timed"):
        solve.main()
    assert not list(tmp_path.iterdir())
