"""The decoding benchmark's machinery that needs no GPU: drift, the model's rivals, rows, tables, plot."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import decode_drift, decode_gpu, decode_model, decode_report
from benchmarks.decode_gpu import Layers, Step

FACTS: dict[str, Any] = {
    "commit": "abc1234", "date": "2026-12-01", "gpu": "NVIDIA H200", "torch": "2.11.0",
    "triton": "3.6.0", "copy_gb_per_s": 4000.0,
}  # fmt: skip


def test_drift_on_a_small_scale() -> None:
    rows = decode_drift.run(True, FACTS, device="cpu")
    errors = {(row["cosine"], row["cache"]): row["err"] for row in rows}
    assert set(errors) == {(c, d) for c in (0.5, 0.8) for d in ("float16", "float32", "bfloat16")}
    for cosine in (0.5, 0.8):
        assert errors[cosine, "float32"] < errors[cosine, "float16"] < errors[cosine, "bfloat16"]
        assert 1e-8 < errors[cosine, "float32"] < 2e-6  # on a CPU everything is float32


@torch.no_grad()
def test_the_models_rival_computes_what_transformers_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_model, "captured", lambda step: step)
    found = decode_model.models(True, "cpu")
    torch.manual_seed(1)
    logits = {}
    for name, model in found.items():
        torch.manual_seed(1)
        step = decode_model.step_of(model.float(), 2, 40, name == "lucid")
        step()
        logits[name] = step()
    torch.testing.assert_close(logits["softmax_best"], logits["sdpa"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits["lucid"], logits["sdpa"], rtol=1e-2, atol=1e-2)


def test_layers_hold_a_gibibyte() -> None:
    assert Step(8, 8, 4, 128, 32768).cache_bytes == 1 << 30
    layers = Layers(Step(1, 2, 2, 16, 1 << 12), "cpu")
    assert layers.calls == 64  # of at most
    assert layers.softmax(3).shape == (1, 4, 1, 16)
    # A mask of ones masks nothing; the second call writes what the first wrote.
    torch.testing.assert_close(layers.masked(3), layers.lucid(3))
    layers.ones[:, :2000] = False
    assert not torch.allclose(layers.masked(3), layers.lucid(3), rtol=1e-2, atol=1e-2)
    assert len({x.data_ptr() for x in layers.keys}) == 64


def row(impl: str, ms: float, ratio: float) -> dict[str, Any]:
    return {
        **{name: FACTS[name] for name in ("commit", "date", "gpu", "torch", "triton")},
        "batch": 1, "kv_heads": 8, "q_heads": 32, "head_dim": 128, "context": 32768, "tokens": 1, "layers": 8,
        "impl": impl, "ms_p20": ms, "ms_p50": ms, "ms_p80": ms, "gb_per_s": 134.2 / ms, "copy_share": 0.8,
        "rival": "sdpa-cudnn", "rival_ms_p50": ms / ratio, "ratio": ratio, "output_err": 2e-3, "y_err": 3e-4,
    }  # fmt: skip


def test_files(tmp_path: Path) -> None:
    results = decode_report.Results(tmp_path / "decode-h200", FACTS)
    results.steps = [row("lucid", 0.041, 1.036), row("lucid_masked", 0.0437, 1.104), row("sdpa-cudnn", 0.0396, 1.0)]  # fmt: skip
    results.drift = decode_drift.run(True, FACTS, device="cpu")
    times = {"softmax_best": [0.01], "lucid": [0.0101], "sdpa": [0.02]}
    results.model = list(decode_model.rows(times, "step", 16, 32768, 16, FACTS))
    results.write()
    results.plot()
    text = (tmp_path / "decode-h200.md").read_text()
    assert "| 41.0 | 43.7 | 39.6 (sdpa-cudnn) | **1.036** |" in text
    assert "**1.010**" in text and "1584" in text  # tokens a second
    assert "## Drift" in text
    with (tmp_path / "decode-h200.csv").open() as file:
        assert [r["impl"] for r in csv.DictReader(file)] == ["lucid", "lucid_masked", "sdpa-cudnn"]
    assert (tmp_path / "decode-model-h200.csv").exists()
    assert (tmp_path / "decode-model-h200.png").exists()
    assert (tmp_path / "decode-h200.png").stat().st_size > 10_000
    assert "ratio 1.036" in decode_report.line(results.steps[0])


def test_every_target_of_the_step_is_among_the_shapes() -> None:
    shapes = {(s.batch * s.kv_heads, s.head_dim, s.context) for s in decode_gpu.STEPS}
    assert {(64, 128, 32768), (8, 128, 32768), (8, 128, 131072), (4, 128, 131072)} <= shapes
