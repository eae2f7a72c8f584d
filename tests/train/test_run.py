"""Whole trainings at tiny sizes: what they leave, that killed ones go on as if nothing had happened."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lucid_attention.hf import strengths
from lucid_attention.results import FolderError
from lucid_attention.train import TrainConfig, TrainError, train
from lucid_attention.train.run import continue_training, describe, last_checkpoint
from lucid_attention.train.trainer import MeteredTrainer

ARGUMENTS: dict[str, Any] = {
    "max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 2, "save_steps": 3, "eval_steps": 3,
    "report_to": "none", "use_cpu": True, "learning_rate": 3e-3,
}  # fmt: skip
WORDS = [
    "the cat sat on the mat",
    "a dog ran",
    "naïve birds sing in the tall green tree by the lake",
]


@pytest.fixture(scope="module")
def novel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(6):
        words = " ".join(WORDS[(number + k) % 3] for k in range(60))
        (folder / f"{number}.txt").write_text(words, encoding="utf-8")
    return folder


def config(novel: Path, **settings: Any) -> TrainConfig:
    sizes = {"layers": 2, "width": 32, "head_dim": 12, "heads": 4, "kv_heads": 2, "length": 48}
    return TrainConfig(**{"text": str(novel), "vocabulary": 280, "validation_share": 0.1, **sizes, **settings})  # fmt: skip


def run(settings: TrainConfig, out: Path, **changes: Any) -> Any:
    return train(settings, {**ARGUMENTS, **changes}, out=out, say=lambda line: None, quiet=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_what_a_training_leaves(novel: Path, tmp_path: Path) -> None:
    said: list[str] = []
    outcome = train(config(novel), {**ARGUMENTS, "max_steps": 8, "report_to": "tensorboard"},
                    out=tmp_path / "run", say=said.append, quiet=True)  # fmt: skip
    folder = outcome.folder
    assert outcome.finished and outcome.step == 8 and 0 < outcome.loss < 10
    assert {p.name for p in folder.iterdir()} >= {
        "config.yaml", "environment.json", "tokenizer", "data", "model", "log.csv", "loss.png", "runs", "checkpoint-8",
    }  # fmt: skip
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert [int(r["step"]) for r in rows if r["loss"]] == [2, 4, 6, 8]
    assert all(float(r["tokens_per_s"]) > 0 for r in rows if r["loss"])
    assert [int(r["step"]) for r in rows if r["eval_loss"]] == [3, 6, 8]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "runs").rglob("events.out.tfevents*"))
    model = AutoModelForCausalLM.from_pretrained(outcome.model)
    assert type(model).__name__ == "LucidLlamaForCausalLM" and model.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(outcome.model)
    ids = tokenizer("the cat sat", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    assert said[0].startswith("reading") and any(
        "parameters: 2 layers of width 32" in s for s in said
    )
    assert any("tokens to train on, seen" in s for s in said)


def test_softmax_leaves_a_stock_model(novel: Path, tmp_path: Path) -> None:
    outcome = run(config(novel, attention="softmax", position="nope"), tmp_path / "run")
    assert json.loads((outcome.model / "config.json").read_text())["model_type"] == "smollm3"
    model = AutoModelForCausalLM.from_pretrained(outcome.model)
    assert type(model).__name__ == "SmolLM3ForCausalLM"
    left = weights(outcome.folder / "checkpoint-6")
    assert all(torch.equal(left[n], p) for n, p in model.state_dict().items() if n in left)


def test_attentions_see_the_same_data(novel: Path, tmp_path: Path) -> None:
    """At strength 0 LUCID is softmax: the losses of whole trainings agree bit for bit."""
    losses = []
    for name, settings in (("s", {"attention": "softmax"}), ("l", {"strength": 0.0}), ("b", {})):
        outcome = run(config(novel, **settings), tmp_path / name)
        losses.append(outcome.loss)
    assert losses[0] == losses[1] != losses[2]


def test_nothing_is_overwritten(novel: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(FolderError, match="is not empty"):
        run(config(novel), out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    (out / "config.yaml").write_text("")
    with pytest.raises(TrainError, match="holds a training; go on with it by --resume"):
        run(config(novel), out)


def test_a_mistake_leaves_no_folder(novel: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="no such file"):
        run(config(novel, text="nowhere"), tmp_path / "a")
    with pytest.raises(TrainError, match=r"is too short, [\d,]+ tokens, [\d,]+ of them held out: expected at least 2 rows of 5000"):  # fmt: skip
        run(config(novel, length=5000), tmp_path / "b")
    with pytest.raises(TrainError, match="TrainingArguments"):
        run(config(novel), tmp_path / "c", lr_scheduler_type="zigzag")
    assert list(tmp_path.iterdir()) == []


def start(novel: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    """`lucid train` in a process of its own."""
    sizes = {
        **config(novel).size(),
        "length": 48,
        "vocabulary": 280,
        "validation_share": 0.1,
        "text": novel,
    }
    sizes |= {**ARGUMENTS, "max_steps": 40, "save_steps": 5}
    path = out.with_suffix(".yaml")
    path.write_text("\n".join(f"{name}: {value}" for name, value in sizes.items()))
    command = [
        sys.executable,
        "-m",
        "lucid_attention",
        "train",
        str(path),
        "--out",
        str(out),
        *more,
    ]
    return subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists():
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_goes_on(
    how: signal.Signals, novel: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """Weights, optimiser and losses are bit for bit those of the training that nobody stopped."""
    process = start(novel, tmp_path / "run")
    wait_for(tmp_path / "run" / "checkpoint-5" / "trainer_state.json", process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    stopped = last_checkpoint(tmp_path / "run")
    assert stopped is not None and int(stopped.name.split("-")[1]) < 40
    if how != signal.SIGKILL:
        assert process.returncode == 130 and b"lucid train --resume" in errors
        assert (tmp_path / "run" / "log.csv").exists()
    (tmp_path / "run" / "checkpoint-39").mkdir()  # one that was not written to its end
    shutil.copy(stopped / "model.safetensors", tmp_path / "run" / "checkpoint-39")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    said: list[str] = []
    outcome = continue_training(tmp_path / "moved", say=said.append, quiet=True)
    assert outcome.finished and f"going on from {stopped.name}" in said
    assert "checkpoint-39 was not written to its end and is left out" in said
    expected = weights(uninterrupted / "model")
    assert all(torch.equal(x, expected[n]) for n, x in weights(outcome.model).items())
    moments = [torch.load(f / "checkpoint-40" / "optimizer.pt")["state"] for f in (outcome.folder, uninterrupted)]  # fmt: skip
    for index, state in moments[0].items():
        assert torch.equal(state["exp_avg_sq"], moments[1][index]["exp_avg_sq"])
    logs = [list(csv.DictReader((f / "log.csv").open())) for f in (outcome.folder, uninterrupted)]
    assert [(r["step"], r["loss"], r["eval_loss"]) for r in logs[0]] == [(r["step"], r["loss"], r["eval_loss"]) for r in logs[1]]  # fmt: skip


def test_a_log_is_that_of_a_run_that_nobody_stopped(
    novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended between two losses that are logged, with a held-out loss before the first step."""
    given = {"max_steps": 8, "logging_steps": 2, "save_steps": 3, "eval_steps": 4, "eval_on_start": True}  # fmt: skip
    step = MeteredTrainer.training_step

    def ends(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 5:
            raise RuntimeError("no power")
        return step(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MeteredTrainer, "training_step", ends)
        with pytest.raises(RuntimeError, match="no power"):
            run(config(novel), tmp_path / "run", **given)
    ends_with: list[float] = []
    log = MeteredTrainer.log

    def logged(trainer: Any, logs: dict[str, float], *args: Any) -> None:
        ends_with.extend(logs[name] for name in ("train_loss",) if name in logs)
        log(trainer, logs, *args)

    monkeypatch.setattr(MeteredTrainer, "log", logged)  # of what is reported elsewhere, too
    outcome = continue_training(tmp_path / "run", say=lambda line: None, quiet=True)
    whole = run(config(novel), tmp_path / "whole", **given)
    assert len(ends_with) == 2 and ends_with[0] == ends_with[1]
    logs = [list(csv.DictReader((o.folder / "log.csv").open())) for o in (outcome, whole)]
    columns = ("step", "loss", "eval_loss")
    assert [[r[c] for c in columns] for r in logs[0]] == [[r[c] for c in columns] for r in logs[1]]
    assert [r["step"] for r in logs[1] if r["loss"]] == ["2", "4", "6", "8"]


@pytest.fixture(scope="module")
def uninterrupted(novel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    process = start(novel, out)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors.decode()
    return out


def test_more_steps_later(novel: Path, tmp_path: Path) -> None:
    outcome = run(config(novel), tmp_path / "run", lr_scheduler_type="constant")
    before = weights(outcome.model)
    longer = continue_training(outcome.folder, ["max_steps=9"], say=lambda line: None, quiet=True)
    assert longer.step == 9 and longer.finished
    assert not torch.equal(weights(longer.model)["lm_head.weight"], before["lm_head.weight"])
    whole = run(config(novel), tmp_path / "whole", lr_scheduler_type="constant", max_steps=9)
    assert torch.equal(weights(whole.model)["lm_head.weight"], weights(longer.model)["lm_head.weight"])  # fmt: skip
    with pytest.raises(TrainError, match="learning_rate: cannot change when a training goes on"):
        continue_training(outcome.folder, ["learning_rate=1"])
    with pytest.raises(TrainError, match="is no folder of lucid train"):
        continue_training(tmp_path)


def test_strength_rises_and_is_saved(novel: Path, tmp_path: Path) -> None:
    outcome = run(config(novel, strength=0.8, strength_steps=4), tmp_path / "run")
    early = json.loads((outcome.folder / "checkpoint-3" / "config.json").read_text())["lucid"]
    assert early["strength"] == pytest.approx(0.6)
    assert (strengths(AutoModelForCausalLM.from_pretrained(outcome.model)) == 0.8).all()
    learned = run(config(novel, strength="learned"), tmp_path / "learned")
    found = strengths(AutoModelForCausalLM.from_pretrained(learned.model))
    assert found.shape == (2, 2)
    names = [n for n in weights(learned.model) if "strength" in n]
    assert len(names) == 2


def test_a_learned_strength_has_a_rate_of_its_own(novel: Path, tmp_path: Path) -> None:
    """AdamW moves it by about its rate a step, which the log shows; it goes on bit for bit; other weights do not care."""
    found, rest = {}, {}
    for rate in (1e-4, 5e-2):
        asked = config(novel, strength="learned", strength_learning_rate=rate)
        outcome = run(asked, tmp_path / f"{rate}", lr_scheduler_type="constant", warmup_steps=0, max_steps=2)  # fmt: skip
        rest[rate] = weights(outcome.folder / "checkpoint-2")["lm_head.weight"]
        outcome = continue_training(outcome.folder, ["max_steps=4"], say=lambda line: None, quiet=True)  # fmt: skip
        found[rate] = strengths(AutoModelForCausalLM.from_pretrained(outcome.model))
        rows = list(csv.DictReader((outcome.folder / "log.csv").open()))
        shown = [float(row["strength"]) for row in rows if row["loss"]]
        assert shown[-1] == pytest.approx(found[rate].mean().item(), abs=1e-6)
        assert 0 < shown[0] < shown[-1] <= 4 * rate * 1.01
        state = torch.load(outcome.folder / "checkpoint-4" / "optimizer.pt")["param_groups"]
        assert [group["lr"] for group in state] == [3e-3, 3e-3, rate]
        assert [group["weight_decay"] for group in state] == [0.1, 0.0, 0.0]
        assert len(state[2]["params"]) == 2
    assert found[5e-2].max() > 100 * found[1e-4].max() > 0
    whole = run(config(novel, strength="learned", strength_learning_rate=5e-2), tmp_path / "whole", lr_scheduler_type="constant", warmup_steps=0, max_steps=4)  # fmt: skip
    assert torch.equal(strengths(AutoModelForCausalLM.from_pretrained(whole.model)), found[5e-2])
    torch.testing.assert_close(rest[1e-4], rest[5e-2], rtol=0, atol=1e-3)
    with pytest.raises(TrainError, match="strength_learning_rate: only a learned strength has one"):
        config(novel, strength_learning_rate=1e-3)
    with pytest.raises(TrainError, match="strength_learning_rate: expected a number above 0, got 0"):  # fmt: skip
        config(novel, strength="learned", strength_learning_rate=0)


def test_compiled_layers_learn_the_same(novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Layer by layer, a rising strength compiled once; stopped and gone on with; the next training is not compiled."""
    name = "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"
    monkeypatch.setenv(name, "false")
    settings = config(novel, layers=3, strength_steps=5, document_masks=False)
    real, resets = torch.compiler.reset, []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(real()))
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    found = []
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        out = tmp_path / f"run{len(found)}"
        run(settings, out, max_steps=3, **changes)
        outcome = continue_training(out, ["max_steps=6"], quiet=True, say=lambda line: None)
        found.append(weights(outcome.model))
        assert os.environ[name] == "false"
    for key, weight in found[0].items():
        torch.testing.assert_close(found[1][key], weight, rtol=1e-4, atol=1e-5)
    assert 1 < graphs["unique_graphs"] < 12
    assert (
        len(resets) == 3
    )  # this test's, and one for each training that is compiled: a process keeps a few variants only
    torch.compiler.reset()
    graphs.clear()
    run(settings, tmp_path / "next")
    assert graphs["unique_graphs"] == 0


def test_precision_is_given_back(novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """TensorFloat-32, which TrainingArguments turn on and accelerate by the older switch: on in every training, off after it."""
    from transformers import training_args
    from transformers.utils import import_utils

    from lucid_attention.train import run as module

    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("torch below 2.9 has other switches")
    backends, seen = torch.backends, []

    def state() -> list[Any]:
        b = backends
        switches = (b, b.cuda.matmul, b.cudnn, b.cudnn.conv, b.cudnn.rnn, b.mkldnn, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn)  # fmt: skip
        return [*(x.fp32_precision for x in switches), torch.get_float32_matmul_precision(), b.cuda.matmul.allow_tf32]  # fmt: skip

    real = module._Run.__call__

    def looked_at(self: Any, *args: Any) -> Any:
        seen.append((backends.fp32_precision, backends.cuda.matmul.fp32_precision))
        if len(seen) == 2:  # as accelerate does
            backends.cuda.matmul.allow_tf32 = True
        return real(self, *args)

    for place in (training_args, import_utils):
        monkeypatch.setattr(place, "is_torch_tf32_available", lambda: True)
    monkeypatch.setattr(module._Run, "__call__", looked_at)
    before = state()
    outcome = run(config(novel), tmp_path / "run", max_steps=1, tf32=True)
    assert state() == before
    continue_training(outcome.folder, ["max_steps=2"], say=lambda line: None, quiet=True)
    assert state() == before
    describe(config(novel), {"tf32": True})
    with pytest.raises(TrainError):
        run(config(novel, text="nowhere"), tmp_path / "none", tf32=True)
    assert state() == before
    run(config(novel), tmp_path / "again", max_steps=1, tf32=True)
    assert seen == [("tf32", "tf32")] * 3 and state() == before


def test_where_a_learned_strength_cannot_be_trained(novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Said before anything is made or lost."""
    from lucid_attention.train import run as module
    from lucid_attention.train.trainer import MeteredTrainer, check_strength

    asked = config(novel, strength="learned")
    with monkeypatch.context() as patch:
        other = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        patch.setattr(MeteredTrainer.__mro__[1], "create_optimizer", lambda self, model=None: other)
        with pytest.raises(TrainError, match=r"optim: .* has no groups of parameters"):
            run(asked, tmp_path / "optim")
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        with pytest.raises(TrainError, match="cannot be trained by FSDP in mixed precision"):
            run(asked, tmp_path / "none")
    plain = module.training_arguments(ARGUMENTS, tmp_path, validate=False)
    # DeepSpeed is not installed, so that TrainingArguments would stop before.
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        with pytest.raises(TrainError, match="DeepSpeed's optimiser does not take"):
            check_strength(asked, plain, None)
        check_strength(config(novel), plain, None)
    assert not (tmp_path / "none").exists()
    # Of an earlier version, which had two groups.
    old = run(asked, tmp_path / "old", max_steps=2)
    state = old.folder / "checkpoint-2" / "optimizer.pt"
    content = torch.load(state)
    content["param_groups"][1]["params"] += content["param_groups"].pop()["params"]
    torch.save(content, state)
    with pytest.raises(TrainError, match=r"strength: this run is of an earlier version.*begin it anew"):  # fmt: skip
        continue_training(old.folder, ["max_steps=4"])
    assert (old.model / "model.safetensors").is_file()
    with pytest.raises(TrainError, match="strength_learning_rate: softmax attention has none"):
        config(novel, attention="softmax", strength_learning_rate=1e-3)


def test_fused_layers_are_not_compiled(novel: Path, tmp_path: Path) -> None:
    """Neither trained nor counted."""
    asked = config(novel, fused_layers="liger")
    with pytest.raises(TrainError, match=r"fused_layers: expected auto or none .*, got liger"):
        run(asked, tmp_path / "refused", torch_compile=True)
    with pytest.raises(TrainError, match=r"fused_layers: .*take fused_layers: none"):
        describe(asked, {"torch_compile_backend": "aot_eager"})
    assert not (tmp_path / "refused").exists() and describe(asked, {})


def test_a_checkpoint_is_moved_to_lucid(novel: Path, tmp_path: Path) -> None:
    first = run(config(novel, attention="softmax"), tmp_path / "first")
    moved = TrainConfig(text=str(novel), init_from=str(first.model), length=48, validation_share=0.1)  # fmt: skip
    outcome = run(moved, tmp_path / "second", max_steps=2)
    assert type(AutoModelForCausalLM.from_pretrained(outcome.model)).__name__.startswith("Lucid")
    tokens = [(f / "data" / "tokens.bin").read_bytes() for f in (first.folder, outcome.folder)]
    assert tokens[0] == tokens[1]


def test_tokens_of_an_earlier_run(novel: Path, tmp_path: Path) -> None:
    first = run(config(novel), tmp_path / "first")
    again = TrainConfig(**{**asdict(config(novel)), "text": None, "tokens_of": str(first.folder)})
    outcome = run(again, tmp_path / "second")
    assert outcome.loss == first.loss
    shutil.rmtree(first.folder)
    assert continue_training(outcome.folder, ["max_steps=7"], say=lambda line: None, quiet=True).finished  # fmt: skip
    with pytest.raises(TrainError, match="is no folder of lucid train with its tokens"):
        run(again, tmp_path / "third")
    with pytest.raises(TrainError, match="tokenizer: tokens_of brings its own"):
        TrainConfig(tokens_of="x", tokenizer="y")


def test_a_task_is_learnt(tmp_path: Path) -> None:
    """Of four values: guessing is right in a quarter of the cases."""
    settings = TrainConfig(
        task="memory", task_options={"keys": 4, "values": 4, "query_share": 0.5}, layers=2, width=64,
        head_dim=16, length=32, position="nope",
    )  # fmt: skip
    outcome = run(settings, tmp_path / "run", max_steps=200, per_device_train_batch_size=32, eval_steps=200, save_steps=200)  # fmt: skip
    last = list(csv.DictReader((outcome.folder / "log.csv").open()))[-1]
    assert float(last["eval_accuracy"]) > 0.9


def test_a_dry_run_trains_nothing() -> None:
    settings = TrainConfig(text="nowhere", layers=22, width=2048, heads=32, kv_heads=4, head_dim=68)
    lines = describe(settings, {"bf16": True, "max_steps": 100})
    assert "22 layers of width 2048, 32 heads (4 KV) of 68" in lines[0]
    assert lines[1].startswith("training: 100 steps of 8 x 2,048 tokens, 1,638,400 in all")


def test_a_finished_run_is_finished(novel: Path, tmp_path: Path) -> None:
    """Going on with it changes nothing; a model that was not saved any more is saved from the last checkpoint."""
    outcome = run(config(novel, attention="softmax"), tmp_path / "run", lr_scheduler_type="constant")  # fmt: skip
    before = (outcome.model / "model.safetensors").read_bytes()
    again = continue_training(outcome.folder, say=lambda line: None, quiet=True)
    assert (again.step, again.finished, again.loss) == (6, True, outcome.loss)
    assert (again.model / "model.safetensors").read_bytes() == before
    shutil.rmtree(outcome.model)
    saved = continue_training(outcome.folder, say=lambda line: None, quiet=True)
    assert (saved.model / "model.safetensors").read_bytes() == before
    with pytest.raises(TrainError, match="max_steps: 6 steps are done already, got 4"):
        continue_training(outcome.folder, ["max_steps=4"])


def test_a_shorter_runs_model_is_not_the_longer_ones(novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Killed after the last checkpoint and before the model was saved: the model of fewer steps is not taken for it."""
    from lucid_attention.train import run as module

    outcome = run(config(novel), tmp_path / "run", lr_scheduler_type="constant")
    short = weights(outcome.model)["lm_head.weight"]

    def killed(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(module._Run, "_save", killed)
    with pytest.raises(SystemExit):
        continue_training(outcome.folder, ["max_steps=9"], say=lambda line: None, quiet=True)
    monkeypatch.undo()
    (outcome.folder / "log.csv").unlink()
    longer = continue_training(outcome.folder, say=lambda line: None, quiet=True)
    found = weights(longer.model)["lm_head.weight"]
    assert longer.step == 9 and not torch.equal(found, short)
    assert torch.equal(found, weights(outcome.folder / "checkpoint-9")["lm_head.weight"])
    assert "9," in (outcome.folder / "log.csv").read_text()


def test_unfinished_checkpoints_do_not_cost_whole_ones(novel: Path, tmp_path: Path) -> None:
    outcome = run(config(novel), tmp_path / "run", save_total_limit=1)
    (outcome.folder / "checkpoint-40").mkdir()
    (outcome.folder / "checkpoint-40" / "model.safetensors").write_bytes(b"half")
    longer = continue_training(outcome.folder, ["max_steps=9"], say=lambda line: None, quiet=True)
    assert longer.finished
    left = {"checkpoint-9", "unfinished-40", "model-before-step-7"}
    assert {p.name for p in outcome.folder.glob("*-[0-9]*")} == left


def test_a_run_killed_before_its_first_step_goes_on(novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from lucid_attention.train import run as module

    def killed(*_: object, **__: object) -> None:
        raise SystemExit

    monkeypatch.setattr(module, "write_tokens", killed)
    with pytest.raises(SystemExit):
        run(config(novel), tmp_path / "run")
    monkeypatch.undo()
    assert continue_training(tmp_path / "run", say=lambda line: None, quiet=True).finished


def test_bad_changes_change_nothing(novel: Path, tmp_path: Path) -> None:
    folder = run(config(novel), tmp_path / "run", max_steps=2).folder
    before = (folder / "config.yaml").read_text()
    for change, message in (
        ("max_steps=abc", "max_steps: expected a whole number"),
        ("max_steps=[1", "the value is not YAML"),
        ("max_steps", "expected key=value"),
        ("seed=2", "seed: cannot change"),
    ):
        with pytest.raises(TrainError, match=message):
            continue_training(folder, [change])
    assert (folder / "config.yaml").read_text() == before
    facts = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps({**facts, "processes": 8}))
    with pytest.raises(TrainError, match="was trained by 8 processes, got 1"):
        continue_training(folder)
    (folder / "environment.json").unlink()
    assert continue_training(folder, [" max_steps =3"], say=lambda line: None, quiet=True).step == 3
    (folder / "config.yaml").write_text("")
    with pytest.raises(TrainError, match="expected lines of the form"):
        continue_training(folder)


def test_a_moved_model_needs_its_source_no_more(novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    first = run(config(novel, attention="softmax"), tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    moved = TrainConfig(tokens_of="first", init_from="first/model", length=48, validation_share=0.1, strength=0.5)  # fmt: skip
    outcome = run(moved, tmp_path / "second", max_steps=3)
    monkeypatch.chdir("/")
    task = TrainConfig(task="needles", init_from=str(first.model), length=400)
    needles = run(task, tmp_path / "third", max_steps=1, per_device_train_batch_size=1, eval_strategy="no")  # fmt: skip
    shutil.rmtree(first.folder)
    assert continue_training(needles.folder, ["max_steps=2"], say=lambda line: None, quiet=True).finished  # fmt: skip
    longer = continue_training(outcome.folder, ["max_steps=5"], say=lambda line: None, quiet=True)
    assert longer.finished
    assert (strengths(AutoModelForCausalLM.from_pretrained(longer.model)) == 0.5).all()


def test_a_folder_that_was_there_stays(novel: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(TrainError, match="no such file"):
        run(config(novel, text="nowhere"), tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


def test_what_is_held_out_is_the_end(novel: Path, tmp_path: Path) -> None:
    from lucid_attention.train.run import _Run

    outcome = run(config(novel), tmp_path / "run", max_steps=1)
    made = _Run(config(novel), {**ARGUMENTS}, outcome.folder, lambda line: None, True)
    whole = np.fromfile(outcome.folder / "data" / "tokens.bin", dtype=np.uint16)
    training, held_out = made.training.tokens.ids, made.held_out.tokens.ids
    assert np.array_equal(np.concatenate((training, held_out)), whole)
    assert len(held_out) == max(48, round(0.1 * len(whole)))


def test_the_meter_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    from lucid_attention.train import progress

    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    meter = progress.Meter(tokens_per_step=1000, flops_per_token=5.0, peak=20_000.0)
    cpu = torch.device("cpu")
    assert meter.read(3, cpu) == {}
    meter.start(0)
    now[0] += 6.0
    meter.leave_out(4.0)  # an evaluation
    assert meter.read(2, cpu) == {"tokens_per_s": pytest.approx(1000.0), "mfu": pytest.approx(0.25)}
    now[0] += 4.0
    assert meter.read(4, cpu)["tokens_per_s"] == pytest.approx(500.0)
