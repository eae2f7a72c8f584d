"""`lucid train` as a command: exit codes, and several processes under accelerate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from typer.testing import CliRunner

from lucid_attention import cli

RECIPES = Path(__file__).parents[2] / "recipes"
SETTINGS = """
text: {text}
vocabulary: 270
layers: 1
width: 32
head_dim: 16
length: 32
max_steps: 4
per_device_train_batch_size: {batch}
report_to: none
use_cpu: true
"""


def lucid(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.build_app(), ["train", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def written(tmp_path: Path, batch: int = 2) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and a dog ran by. " * 60)
    path = tmp_path / f"of-{batch}.yaml"
    path.write_text(SETTINGS.format(text=text, batch=batch))
    return path


def test_a_training_and_its_exit_codes(tmp_path: Path) -> None:
    path, out = written(tmp_path), tmp_path / "run"
    code, text = lucid(str(path), "--out", str(out), "--set", "max_steps=2")
    assert code == 0 and "lucid train: " in text and (out / "model" / "model.safetensors").exists()
    code, text = lucid(str(path), "--out", str(out))
    assert code == 2 and "holds a training; go on with it by --resume" in text
    code, text = lucid("--resume", str(out), "--set", "max_steps=3")
    assert code == 0 and "going on from checkpoint-2" in text
    assert lucid("--resume", str(out), "--dry-run")[0] == 2
    assert lucid()[0] == 2
    code, text = lucid(str(path), "--set", "widht=3")
    assert code == 2 and "did you mean width?" in text
    code, text = lucid(str(path), "--dry-run")
    assert code == 0 and "flops a token" in text


def test_accelerate_reads_the_fsdp_recipe() -> None:
    found = load_config_from_file(str(RECIPES / "fsdp2.yaml"))
    assert found.fsdp_config["fsdp_version"] == 2 and found.mixed_precision == "bf16"


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "torch_compile=true torch_compile_backend=aot_eager", "strength=learned"])  # fmt: skip
def test_two_processes_train_what_one_does(more: str, tmp_path: Path) -> None:
    """Two rows in each of two processes are one batch of four."""
    changes = [argument for change in more.split() for argument in ("--set", change)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # accelerate launch starts one process on a machine without GPUs; torchrun starts two anywhere.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]  # fmt: skip
    found = {}
    for name, before, batch in (("two", [*launch, "-m"], 2), ("one", [sys.executable, "-m"], 4)):
        command = [*before, "lucid_attention", "train", str(written(tmp_path, batch)), "--out", str(tmp_path / name), *changes]  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("flops a token") == 1
        found[name] = load_file(tmp_path / name / "model" / "model.safetensors")
    bad = [*launch, "-m", "lucid_attention", "train", str(written(tmp_path, 2)), "--out", str(tmp_path / "x"), "--set", "text=nowhere"]  # fmt: skip
    done = subprocess.run(bad, env=environment, capture_output=True, text=True, timeout=300, check=False)  # fmt: skip
    assert done.stderr.count("lucid train: text nowhere: no such file") == 1
    assert "lucid_attention/train/" not in done.stderr  # no traceback but torchrun's own
    assert not (tmp_path / "x").exists()
    for name, expected in found["one"].items():
        torch.testing.assert_close(found["two"][name], expected, rtol=1e-4, atol=1e-5)
