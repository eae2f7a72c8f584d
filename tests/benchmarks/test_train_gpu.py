"""The training benchmark's machinery that needs no GPU: one model takes both parts, on the same weights."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import train_gpu
from lucid_attention.hf import strengths
from lucid_attention.train.configuration import TrainConfig


def test_the_model_is_the_papers() -> None:
    for head_dim in (64, 68):
        assert train_gpu.paper(head_dim, 4096).size() == {
            "layers": 22, "width": 2048, "head_dim": head_dim, "heads": 32, "kv_heads": 4, "mlp_width": 5632,
        }  # fmt: skip


@pytest.mark.parametrize("checkpointed", [False, True])
def test_one_model_takes_both_parts(checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpu, "TOKENS", 96)
    monkeypatch.setattr(train_gpu, "CHECKPOINTED", 48 if checkpointed else 1000)
    config = TrainConfig(text="x", layers=2, width=32, head_dim=12, heads=4, kv_heads=2, length=48)
    losses = {}
    for order in (("softmax", "lucid"), ("lucid", "softmax")):
        stepper = train_gpu.Stepper(config, 60, "cpu")
        stepper.at(config.length)
        torch.manual_seed(0)
        stepper.ids = torch.randint(60, (2, 48))
        assert stepper.rows == 2 and stepper.model.is_gradient_checkpointing == checkpointed
        for name in order:
            losses[order, name] = float(stepper.step(name))
            assert (strengths(stepper.model) == train_gpu.STRENGTHS[name]).all()
    first = [losses[order, order[0]] for order in ((("softmax", "lucid")), (("lucid", "softmax")))]
    assert first[0] != first[1] and all(3 < x < 6 for x in losses.values())


def test_the_table() -> None:
    facts = {"gpu": "NVIDIA H200", "torch": "2.11.0", "commit": "abc", "date": "2026-12-01"}
    row = {
        "head_dim": 68, "length": 4096, "rows": 8, "checkpointing": False, "fused_loss": "liger", "fused_layers": "none", "attention": "lucid",
        "ms_p50": 812.0, "tokens_per_s": 40354.0, "mfu": 0.4, "memory_gib": 61.2, "ratio": 1.03,
    }  # fmt: skip
    text = train_gpu.tables([row, {**row, "mfu": math.nan}], facts)
    assert (
        "| 68 | 4096 | 8 | no | liger | none | lucid | 812 | 40354 | 40% | 61.2 | **1.030** |"
        in text
    )
