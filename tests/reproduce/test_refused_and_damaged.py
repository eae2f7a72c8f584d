"""`lucid reproduce` as a command: what it refuses, and files that an earlier run left damaged."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lucid_attention import cli
from lucid_attention.reproduce import (
    EXPERIMENTS,
    ReproduceError,
    corpus,
    language,
)
from lucid_attention.reproduce.experiment import Workplace
from lucid_attention.results import FolderError
from lucid_attention.train import TrainConfig
from lucid_attention.train.run import prepare_tokens
from tests.reproduce.conftest import run


def test_a_library_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_LIBRARIES", ("torch", "no_such_library"))
    with pytest.raises(ReproduceError, match=r"no_such_library: is not installed.*pip install no_such_library"):  # fmt: skip
        corpus.write_corpus(tmp_path / "corpus.jsonl", libraries=True)
    assert list(tmp_path.iterdir()) == []


def test_folders_of_other_runs(tmp_path: Path) -> None:
    run("two-phase", tmp_path / "out", seeds=1)
    with pytest.raises(ReproduceError, match=r"holds tiny two-phase \(version 2, 1 seeds\), not tiny memory \(version 3, 3 seeds\)"):  # fmt: skip
        run("memory", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("")
    with pytest.raises(FolderError, match="is not empty"):
        run("memory", tmp_path / "mine")
    (tmp_path / "mine" / "experiment.json").write_text('{"experiment": "x"}')
    with pytest.raises(ReproduceError, match=r"its experiment.json is not of lucid reproduce"):
        run("memory", tmp_path / "mine")
    with pytest.raises(ReproduceError, match="--seeds: expected 1 or more"):
        run("memory", tmp_path / "new", seeds=0)


def lucid(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.build_app(), ["reproduce", *arguments])
    return result.exit_code, result.output


def refused(*arguments: str) -> str:
    """What the command says in one line, with exit code 2."""
    code, text = lucid(*arguments)
    assert code == 2, text
    (line,) = text.splitlines()
    assert line.startswith("lucid reproduce: ")
    return line


def test_the_command(tmp_path: Path) -> None:
    code, text = lucid("--list")
    assert code == 0 and all(name in text for name in EXPERIMENTS) and "min on a GPU" in text
    code, text = lucid("memory", "--tiny", "--seeds", "2", "--device", "cpu", "--only", "attention=lucid", "--out", str(tmp_path / "out"))  # fmt: skip
    assert code == 0 and "LUCID - softmax | |" not in text and len(list((tmp_path / "out" / "cells").iterdir())) == 1  # fmt: skip
    code, text = lucid("memory", "--tiny", "--seeds", "2", "--device", "cpu", "--out", str(tmp_path / "out"))  # fmt: skip
    assert code == 0 and "# Updatable memory" in text
    assert lucid("nothing")[0] == lucid()[0] == 2


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "foo", "--device: expected cpu, cuda or cuda:N, got 'foo'"),
        ("--device", "meta", "--device: expected cpu, cuda or cuda:N, got 'meta'"),
        ("--device", "cuda:99", r"--device cuda:99: cannot be used \(.+\); take another"),
        ("--shared", "FILE", "--shared .*file: expected a folder, and .*file is none; name another"),
        ("--shared", "FILE/in", "--shared .*file/in: expected a folder, and .*file is none; name another"),
    ],
)  # fmt: skip
def test_refused_before_a_folder_is_made(option: str, value: str, message: str, tmp_path: Path) -> None:  # fmt: skip
    (tmp_path / "file").write_text("mine")
    given = value.replace("FILE", str(tmp_path / "file"))
    line = refused("repeat", "--tiny", option, given, "--out", str(tmp_path / "out"))
    assert re.search(message, line)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("experiment.json", "{", "name another folder, or delete this one and run again"),
        ("experiment.json", "[]", "name another folder, or delete this one and run again"),
        ("cells/CELL.json", "", "delete it, and the same command runs its cell again"),
        ("cells/CELL.json", "{}", "delete it, and the same command runs its cell again"),
    ],
)
def test_damaged_files_of_a_run(name: str, content: str, remedy: str, tmp_path: Path) -> None:
    """Said before any other cell is run; the files stay."""
    asked = ("memory", "--tiny", "--seeds", "1", "--device", "cpu", "--out", str(tmp_path / "out"))
    assert lucid(*asked, "--only", "attention=lucid")[0] == 0
    (cell,) = (tmp_path / "out" / "cells").iterdir()
    path = tmp_path / "out" / name.replace("CELL", cell.stem)
    path.write_text(content)
    line = refused(*asked)
    assert f"{path}: expected a JSON object" in line and line.endswith(remedy)
    assert path.read_text() == content and list(cell.parent.iterdir()) == [cell]
    if path == cell:
        cell.unlink()
        assert lucid(*asked)[0] == 0


@pytest.mark.parametrize(
    ("name", "left", "message"),
    [
        ("data/tokens.bin", 0, "tokens.bin: expected .* bytes, got 0; delete .*data and run again"),
        ("data/tokens.bin", 100, "tokens.bin: expected .* bytes, got 100; delete .*data and run again"),
        ("data/documents.bin", 8, "documents.bin: expected .* bytes, got 8; delete .*data and run again"),
        ("data/tokens.json", 9, "tokens.json: expected a JSON object .*; delete .*data and run again"),
        ("facts.json", 9, "facts.json: expected a JSON object .*; delete .*models/[0-9a-f]+ and run again"),
    ],
)  # fmt: skip
def test_damaged_files_that_are_shared(name: str, left: int, message: str, language_run: tuple[Path, Path, int], tmp_path: Path) -> None:  # fmt: skip
    """Cut off after so many bytes; without what the message says to delete the same command goes on."""
    first, theirs, _ = language_run
    shared = shutil.copytree(theirs, tmp_path / "shared")
    for path in shared.glob(f"tiny/*/*/{name}" if name == "facts.json" else f"tiny/*/{name}"):
        path.write_bytes(path.read_bytes()[:left])
    asked = ("language-model", "--tiny", "--seeds", "1", "--device", "cpu", "--only", "attention=average",
             "--shared", str(shared), "--out", str(tmp_path / "out"))  # fmt: skip
    assert re.search(message, refused(*asked))
    for folder in {path.parent for path in shared.rglob(Path(name).name)}:
        shutil.rmtree(folder)
    assert lucid(*asked)[0] == 0
    losses = [
        [(row["step"], row["loss"]) for row in csv.DictReader((out / "results.csv").open()) if row["attention"] == "average"]
        for out in (first, tmp_path / "out")
    ]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.parametrize("left", [None, 0, 100, 5000])
def test_a_shared_model_without_its_weights(left: int | None, language_run: tuple[Path, Path, int], tmp_path: Path) -> None:  # fmt: skip
    """What begins from it says so; what reads its losses has them."""
    shared = shutil.copytree(language_run[1], tmp_path / "shared")
    for path in shared.glob("tiny/models/*/run/model/model.safetensors"):
        if left is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:left])
    place = Workplace(torch.device("cpu"), True, tmp_path / "work", shared / "tiny")

    def model(weights: bool) -> language.TextModel:
        return language.text_model(
            place, language.text_steps(True), 1, lambda steps: None, weights=weights,
            attention="lucid", position="nope", head_dim=16, text="stdlib",
        )  # fmt: skip

    assert model(weights=False).loss > 0
    with pytest.raises(ReproduceError, match=r"model.safetensors: expected the weights .*; delete .*models/[0-9a-f]+ and run again") as found:  # fmt: skip
        model(weights=True)
    assert len(str(found.value).splitlines()) == 1


def test_a_training_that_cannot_begin_or_go_on(language_run: tuple[Path, Path, int], tmp_path: Path) -> None:  # fmt: skip
    """Its own line; and of a stopped one whose copy of the tokens was cut off."""
    place = Workplace(torch.device("cpu"), True, tmp_path / "work", language_run[1] / "tiny")
    config = language.settings(place, text="stdlib")

    def train(config: TrainConfig) -> None:
        language.train_cell(place, config, 2, 1, tmp_path / "cell", lambda steps: None)

    (tmp_path / "none").mkdir()
    begun = TrainConfig(tokens_of=config.tokens_of, init_from=str(tmp_path / "none"), length=64)
    with pytest.raises(ReproduceError, match=r"init_from .*none: cannot be loaded: .+"):
        train(begun)
    train(config)
    (tmp_path / "cell" / "run" / "data" / "tokens.bin").write_bytes(b"")
    with pytest.raises(ReproduceError, match=r"tokens.bin: expected .* bytes, got 0; delete .*cell/run/data and run again"):  # fmt: skip
        train(config)


@pytest.mark.usefixtures("copied_corpora")
def test_a_copy_of_tokens_that_was_cut_off(tmp_path: Path) -> None:
    """A kill between two files of the copy: the next training copies again."""
    place = Workplace(torch.device("cpu"), True, tmp_path, tmp_path / "shared" / "tiny")
    language.settings(place)  # makes the tokens that are copied
    (tmp_path / "new" / ".data.partial").mkdir(parents=True)
    (tmp_path / "new" / ".data.partial" / "tokens.json").write_text("{}")
    _, tokens = prepare_tokens(language.settings(place), tmp_path / "new")
    assert len(tokens.ids) > 10_000 and not (tmp_path / "new" / ".data.partial").exists()


def test_several_visible_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    place = Workplace(torch.device("cuda"), True, tmp_path, tmp_path)
    with pytest.raises(ReproduceError, match="expected one visible GPU, got 2; set CUDA_VISIBLE"):
        language.train_cell(place, TrainConfig(text="x"), 1, 1, tmp_path, lambda steps: None)
