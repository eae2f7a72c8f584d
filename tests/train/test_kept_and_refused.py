"""What a user made is kept, what a run reads stays what it was, and what cannot work is refused before the work."""

from __future__ import annotations

import csv
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lucid_attention.generate import GenerateError, load
from lucid_attention.hf import enable
from lucid_attention.results import FolderError, ResultsFolder
from lucid_attention.train import TrainConfig, TrainError, load_config, train
from lucid_attention.train import run as run_module
from lucid_attention.train.folder import absolute
from lucid_attention.train.model import build_model
from lucid_attention.train.run import continue_training, describe
from lucid_attention.train.tasks import MemoryRows, NeedleRows, part_of
from lucid_attention.train.text import check_outside, documents_of, train_tokenizer

WORDS = (
    "The cat sat on the mat. A dog ran far. Naïve birds sing in the tall green tree by the lake. "
)
ARGUMENTS: dict[str, Any] = {
    "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 2, "eval_steps": 2,
    "report_to": "none", "use_cpu": True,
}  # fmt: skip


def config(text: Path | str | None, **settings: Any) -> TrainConfig:
    sizes = {"layers": 2, "width": 32, "head_dim": 16, "length": 32, "vocabulary": 280}
    named = {} if text is None else {"text": str(text)}
    return TrainConfig(**{**sizes, **named, "validation_share": 0.1, **settings})


def run(settings: TrainConfig, out: Path, **changes: Any) -> Any:
    return train(settings, {**ARGUMENTS, **changes}, out=out, say=lambda line: None, quiet=True)


def go_on(out: Path, *changes: str) -> Any:
    return continue_training(out, changes, say=lambda line: None, quiet=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(WORDS * 60, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "trained"
    run(config(text, lucid_layers=(1,), kernel_scale=0.05), out)
    return out


@pytest.fixture
def again(trained: Path, tmp_path: Path) -> Path:
    """The finished run, to go on with."""
    return Path(shutil.copytree(trained, tmp_path / "again"))


def test_a_model_of_fewer_steps_is_kept(again: Path) -> None:
    out, first = again, again / "model"
    (first / "NOTES.md").write_text("mine")
    before = (first / "model.safetensors").read_bytes()
    after = go_on(out, "max_steps=6")
    assert after.finished and after.model == out / "model"
    kept = out / "model-before-step-5"
    assert (kept / "NOTES.md").read_text() == "mine"
    assert (kept / "model.safetensors").read_bytes() == before
    assert (after.model / "model.safetensors").read_bytes() != before


def test_a_diverged_training_says_so(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(TrainError, match=r"diverged.*lower learning_rate"):
        run(config(text), out, learning_rate=1e30, max_grad_norm=0)
    assert not (out / "model").exists() and (out / "checkpoint-4").is_dir()
    rows = [r for r in csv.DictReader((out / "log.csv").open()) if r["step"] == "4"]
    assert not any(r["loss"] and math.isfinite(float(r["loss"])) for r in rows)


def test_settings_that_changed_by_hand(again: Path) -> None:
    out = again
    path = out / "config.yaml"
    written = path.read_text()
    path.write_text(written.replace("width: 32", "width: 64"))
    with pytest.raises(TrainError, match="width was 32 when the run began and is 64"):
        go_on(out, "max_steps=6")
    path.write_text(written + "seed: 3\n")
    with pytest.raises(TrainError, match="seed was not there when the run began and is 3"):
        go_on(out)
    path.write_text(written.replace("max_steps: 4", "max_steps: 5"))
    assert go_on(out).step == 5


@pytest.mark.slow
def test_a_run_goes_on_from_anywhere_with_what_it_read(
    text: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prose = tmp_path / "prose.txt"
    prose.write_text("\n".join(f"This is line {n} of a poem" for n in range(2000)))
    settings = config(
        None, task="needles", tokenizer=str(trained / "tokenizer"), length=192, vocabulary=16384,
        task_options={"prose": "prose.txt"},
    )  # fmt: skip
    read = prose.read_text()
    out = tmp_path / "run"
    run(settings, out, max_steps=1)
    prose.write_text("Other words. " * 2000)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    rows: list[Any] = []
    monkeypatch.setattr(run_module, "NeedleRows", lambda *a, **k: rows.append(NeedleRows(*a, **k)) or rows[-1])  # fmt: skip
    assert go_on(out, "max_steps=2").step == 2
    assert (out / "prose.txt").read_text() == read
    assert [r.prose for r in rows] == [part_of(read, False), part_of(read, True)]


def test_names_are_whole(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(text.parent)
    assert absolute(config("book.txt")).text == str(text.resolve())
    assert absolute(config("*.txt")).text == str(text.parent.resolve() / "*.txt")
    assert absolute(config("novel")).text == "novel"
    assert absolute(config("missing.txt")).text == "missing.txt"


def test_a_run_does_not_read_itself(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(WORDS * 60)
    for source in (tmp_path, f"{tmp_path}/**/*"):
        with pytest.raises(TrainError, match="has the folder of the run in it"):
            run(config(source), tmp_path / "run")
        assert [p.name for p in tmp_path.iterdir()] == ["book.txt"]
    check_outside(f"{tmp_path}/*.txt", tmp_path / "run")
    check_outside(str(tmp_path / "book.txt"), tmp_path)  # named: meant


def test_other_tokens_of_the_same_number(text: Path, trained: Path, tmp_path: Path) -> None:
    other = train_tokenizer(["zzyzx quux plugh " * 50], 280)
    own = len(run_module.AutoTokenizer.from_pretrained(trained / "tokenizer"))
    assert len(other) <= own
    other.save_pretrained(tmp_path / "other")
    small = TrainConfig(
        init_from=str(trained / "model"), text=str(text), tokenizer=str(tmp_path / "other"), length=32
    )  # fmt: skip
    with pytest.raises(TrainError, match="give the tokenizer that the checkpoint was trained with"):
        run(small, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("save_only_model", True, "could not go on"),
        ("save_strategy", "epoch", "no epoch ends"),
        ("eval_strategy", "epoch", "no epoch ends"),
        ("logging_strategy", "epoch", "no epoch ends"),
        ("weight_decay", "abc", "weight_decay: expected a number at least 0, got 'abc'"),
        ("adam_beta2", 2, "adam_beta2: expected a number in"),
        ("per_device_eval_batch_size", 0, "expected a number at least 1, got 0"),
        ("dataloader_num_workers", -1, "expected a number at least 0, got -1"),
        ("report_to", "nonsense", "report_to: nonsense is not installed"),
        ("lr_scheduler_type", "cosine_with_min_lr", "min_lr"),
        ("optim", "adamw_bnb_8bit", "bitsandbytes"),
        ("optim_args", 3, "optim_args: expected a text"),
    ],
)
def test_arguments_that_would_fail_later(text: Path, tmp_path: Path, name: str, value: Any, message: str) -> None:  # fmt: skip
    with pytest.raises(TrainError, match=message):
        run(config(text), tmp_path / "run", **{name: value})
    assert not (tmp_path / "run").exists()


def test_no_half_precision_that_is_none(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainError, match="fp16: there is no GPU here"):
        run(config(text), tmp_path / "run", fp16=True)


def test_settings_are_checked_before_the_text(text: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def read(*_: Any) -> Any:
        raise AssertionError("the text was read")

    monkeypatch.setattr(run_module, "documents_of", read)
    begun = TrainConfig(init_from=str(trained / "model"), text=str(text), lucid_layers=(9,))
    with pytest.raises(TrainError, match="9"):
        run(begun, tmp_path / "run")
    if not torch.cuda.is_available():
        with pytest.raises(TrainError, match=r"fused_loss: .*take fused_loss: none"):
            run(config(text, fused_loss="liger"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_best_model_at_the_end(text: Path, tmp_path: Path) -> None:
    assert run(config(text), tmp_path / "run", load_best_model_at_end=True).finished


def test_layers_and_scale_of_a_checkpoint_stay(trained: Path) -> None:
    saved = AutoModelForCausalLM.from_pretrained(trained / "model").config.lucid
    assert saved["layers"] == [1] and saved["kernel_scale"] == 0.05
    model, _ = load(trained / "model", strength=0.5)
    assert model.config.lucid == {**saved, "strength": 0.5}
    on = TrainConfig(init_from=str(trained / "model"), task=None, text="novel")
    assert build_model(on, 0, seed=0, device="meta").config.lucid["layers"] == [1]
    stock = build_model(config("novel", attention="softmax"), 280, seed=0)
    assert enable(stock).config.lucid["layers"] == [0, 1]


def test_what_is_no_checkpoint(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    with pytest.raises(GenerateError, match=f"its checkpoint is {trained / 'model'}"):
        load(str(trained))
    (tmp_path / "empty").mkdir()
    with pytest.raises(GenerateError, match="it has no config"):
        load(str(tmp_path / "empty"))
    memory = TrainConfig(task="memory", layers=1, width=32, head_dim=16, length=64)
    with pytest.raises(GenerateError, match="it has no tokenizer"):
        load(str(run(memory, tmp_path / "memory", max_steps=1).model))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(trained.parent)
    with pytest.raises(GenerateError, match="trained has no folder modle"):
        load("trained/modle")


def test_prose_is_cut_where_something_ends() -> None:
    lines = "\n".join(f"line {n}" for n in range(100))
    for prose in (lines, WORDS * 9, "“Yes!” she said. " * 20):
        training, held_out = part_of(prose, False), part_of(prose, True)
        assert training + held_out == prose
        assert 0.05 < len(held_out) / len(prose) <= 0.2
    for prose in ("no end " * 50, ""):
        with pytest.raises(TrainError, match="no end of a sentence"):
            part_of(prose, True)


def test_rows_that_do_not_fit_or_ask_nothing(trained: Path) -> None:
    tokenizer = run_module.AutoTokenizer.from_pretrained(trained / "tokenizer")
    with pytest.raises(TrainError, match="task_options"):
        NeedleRows({"keys": 4, "queries": 4}, 150, tokenizer, seed=1)
    for share in (0, 1):
        with pytest.raises(TrainError, match="none asks for a value"):
            MemoryRows({"query_share": share}, 64, seed=1)


def test_rows_without_a_question_have_no_loss(tmp_path: Path) -> None:
    short = TrainConfig(task="memory", layers=1, width=32, head_dim=16, length=32)
    rows = MemoryRows(None, 32, seed=1, validation=True)
    asked = [bool((rows[i]["labels"][1:] != -100).any()) for i in range(len(rows))]
    assert not all(a or b for a, b in zip(asked[::2], asked[1::2], strict=True))  # of two
    outcome = run(short, tmp_path / "run", max_steps=2)
    assert math.isfinite(outcome.loss)


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.JSONL").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert list(documents_of(config(tmp_path / "rows.JSONL"))) == ["one", "two"]
    (tmp_path / "a[1].txt").write_text("brackets")
    assert list(documents_of(config(tmp_path / "a[1].txt"))) == ["brackets"]
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "sub" / "in.txt").write_text("inside")
    assert list(documents_of(config(tmp_path / "folder"))) == ["inside"]

    def closed(top: Any, onerror: Any) -> Any:
        onerror(PermissionError(13, "Permission denied", f"{top}/sub"))
        return iter(())

    with monkeypatch.context() as patch:
        patch.setattr(os, "walk", closed)
        with pytest.raises(TrainError, match="sub: cannot be read"):
            list(documents_of(config(tmp_path / "folder")))
    (tmp_path / "twice.yaml").write_text("text: novel\nlayers: 2\nlayers: 4\n")
    with pytest.raises(TrainError, match="layers is there twice"):
        load_config(tmp_path / "twice.yaml")


def test_a_dry_run_counts_the_tokenizer(trained: Path) -> None:
    small = config("novel", tokenizer=str(trained / "tokenizer"), vocabulary=16384)
    size = len(run_module.AutoTokenizer.from_pretrained(trained / "tokenizer"))
    assert any(f"vocabulary {size:,}" in line for line in describe(small, ARGUMENTS))


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(FolderError, match="cannot be written to"):
        ResultsFolder.check(tmp_path)
