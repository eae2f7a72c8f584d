"""Training on a GPU: bfloat16, checkpointing, packed documents, the fused loss."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lucid_attention.tasks.novel import packaged_novel
from lucid_attention.train import TrainConfig, train
from lucid_attention.train.model import build_model, use_fused_layers, use_fused_loss

pytestmark = pytest.mark.gpu


def losses(tmp_path: Path, name: str, changes: dict[str, Any], **settings: Any) -> list[float]:
    text = tmp_path / "novel.txt"
    text.write_text(packaged_novel()[:200_000], encoding="utf-8")
    config = TrainConfig(
        text=str(text), vocabulary=2048, layers=3, width=256, heads=4, kv_heads=2, head_dim=64, length=512, **settings,
    )  # fmt: skip
    arguments = {"max_steps": 20, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none",
                 "bf16": True, "eval_steps": 20, "save_steps": 20, **changes}  # fmt: skip
    outcome = train(config, arguments, out=tmp_path / name, say=lambda line: None, quiet=True)
    rows = list(csv.DictReader((outcome.folder / "log.csv").open()))
    assert all(float(r["memory_gib"]) > 0 for r in rows if r["loss"])
    return [float(r["loss"]) for r in rows if r["loss"]]


def test_a_training_in_bfloat16(tmp_path: Path) -> None:
    """Gradient checkpointing changes memory, not losses; LUCID learns; so does softmax."""
    plain = losses(tmp_path, "plain", {})
    checkpointed = losses(tmp_path, "checkpointed", {"gradient_checkpointing": True})
    softmax = losses(tmp_path, "softmax", {}, attention="softmax")
    assert plain[-1] < plain[0] - 0.8 and softmax[-1] < softmax[0] - 0.8
    assert max(abs(a - b) for a, b in zip(plain, checkpointed, strict=True)) < 0.02


def _product_error() -> float:
    """Of a product in float32, relative."""
    a, b = torch.randn(2, 512, 512, device="cuda", dtype=torch.float64, generator=torch.Generator("cuda").manual_seed(0))  # fmt: skip
    return float(((a.float() @ b.float()).double() - a @ b).norm() / (a @ b).norm())


@pytest.mark.parametrize("attention", ["lucid", "softmax"])
def test_compiled_layers_learn_the_same(attention: str, tmp_path: Path) -> None:
    """With fused layers, compiled ones and neither; never with both."""
    model = build_model(TrainConfig(text="x", layers=1, width=64, attention=attention), 100, seed=0)  # fmt: skip
    cuda, exact = torch.device("cuda"), _product_error()
    assert use_fused_layers(model, "auto", cuda, compiled=True) == "none" and "Liger" not in repr(model)  # fmt: skip
    assert use_fused_layers(model, "auto", cuda) == "liger"
    plain = losses(tmp_path, "plain", {}, attention=attention, fused_layers="none")
    fused = losses(tmp_path, "fused", {}, attention=attention)
    compiled = losses(tmp_path, "compiled", {"torch_compile": True}, attention=attention)
    assert _product_error() < 2 * exact  # no TensorFloat-32 is left: it is 500 times as far
    for other in (fused, compiled):
        assert max(abs(a - b) for a, b in zip(plain, other, strict=True)) < 0.02


@pytest.mark.parametrize("use", [use_fused_loss, use_fused_layers])
@pytest.mark.parametrize("position", ["rope", "nope"])
def test_what_is_fused_is_what_was_there(use: Callable[..., str], position: str) -> None:
    config = TrainConfig(text="x", layers=2, width=128, heads=2, head_dim=64, length=256, position=position)  # fmt: skip
    found = {}
    for choice in ("none", "liger"):
        model: Any = build_model(config, 5000, seed=0).cuda()
        assert use(model, choice, torch.device("cuda")) == choice
        if use is use_fused_layers:
            assert ("Liger" in repr(model)) == (choice == "liger")
        torch.manual_seed(0)
        ids = torch.randint(5000, (2, 256), device="cuda")
        output = model(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        found[choice] = [output.loss.detach(), *(p.grad for p in model.parameters())]
    for a, b in zip(found["none"], found["liger"], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5)
