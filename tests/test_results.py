"""The results folder: dated, never overwritten, files whole or not there."""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path

import pytest
import torch

from lucid_attention.results import FolderError, ResultsFolder, environment_facts

NOON = datetime(2026, 11, 22, 12, 0, 5)


def test_dated_folders_never_collide(tmp_path: Path) -> None:
    names = [
        ResultsFolder.create(None, kind="demo", base=tmp_path, now=NOON).path.name for _ in range(3)
    ]
    assert names == ["demo-20261122-120005", "demo-20261122-120005-2", "demo-20261122-120005-3"]


def test_a_new_and_an_empty_folder_are_taken(tmp_path: Path) -> None:
    new = tmp_path / "a" / "b"
    assert ResultsFolder.create(new, kind="demo").path == new
    assert ResultsFolder.create(new, kind="demo").path.is_dir()


def test_a_used_folder_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FolderError, match="is not empty; name a new or an empty folder"):
        ResultsFolder.create(tmp_path, kind="demo")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(FolderError, match="is a file"):
        ResultsFolder.create(path, kind="demo")
    with pytest.raises(FolderError, match="cannot be made"):
        ResultsFolder.create(path / "below", kind="demo")
    assert path.read_text() == "mine"


def test_a_thousand_runs_in_one_second_are_refused(tmp_path: Path) -> None:
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        (tmp_path / f"demo-20261122-120005{suffix}").mkdir()
    with pytest.raises(FolderError, match="are taken"):
        ResultsFolder.create(None, kind="demo", base=tmp_path, now=NOON)


def test_files_replace_their_older_selves_whole(tmp_path: Path) -> None:
    folder = ResultsFolder.create(tmp_path / "new", kind="demo")
    folder.write_json("numbers.json", {"a": [1.5, math.nan, math.inf], "b": (1, None)})
    folder.write_json("numbers.json", {"a": [1.5, math.nan, -math.inf], "b": (2, None)})
    folder.write_csv("table.csv", ("x", "y"), [(1, "a,b"), (2, "c")])
    content = json.loads((folder.path / "numbers.json").read_text())
    assert content == {"a": [1.5, None, None], "b": [2, None]}
    assert (folder.path / "table.csv").read_text() == 'x,y\n1,"a,b"\n2,c\n'
    assert sorted(path.name for path in folder.path.iterdir()) == ["numbers.json", "table.csv"]


def test_a_failed_write_keeps_the_older_file(tmp_path: Path) -> None:
    folder = ResultsFolder.create(tmp_path / "new", kind="demo")
    folder.write_json("numbers.json", {"a": 1})
    with pytest.raises(TypeError):
        folder.write_json("numbers.json", {"a": object()})
    assert json.loads((folder.path / "numbers.json").read_text()) == {"a": 1}


def test_environment_facts() -> None:
    facts = environment_facts()
    assert facts["torch"] == torch.__version__
    assert facts["transformers"]
    assert facts["cores"] >= 1
    assert datetime.fromisoformat(facts["date"]).tzinfo is not None
    assert set(facts) >= {"commit", "python", "accelerate", "threads", "machine"}


def test_a_folder_that_cannot_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"--out x+: cannot be used \(File name too long\)"):
        ResultsFolder.check(Path("x" * 300))


def test_the_commit_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy on another machine may carry no git, or another's."""
    monkeypatch.setenv("LUCID_COMMIT", "abc1234")
    assert environment_facts()["commit"] == "abc1234"
    monkeypatch.setenv("LUCID_COMMIT", "")
    assert environment_facts()["commit"] != ""
