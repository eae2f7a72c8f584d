"""The whole demo at tiny sizes: what is written, what an interrupt keeps, what is never touched."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from lucid_attention.demo import runner
from lucid_attention.demo.configuration import DemoConfig
from lucid_attention.demo.runner import run_demo
from lucid_attention.demo.text import TextError
from lucid_attention.results import FolderError

PNG = b"\x89PNG\r\n\x1a\n"
EVERYTHING = [
    "checkpoint",
    "generated.txt",
    "language_model.png",
    "loss.csv",
    "memory.csv",
    "memory.png",
    "results.json",
    "summary.png",
    "summary.txt",
]


def paper() -> Console:
    return Console(file=io.StringIO(), width=80)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_whole_run(tiny: DemoConfig, text_file: Path, tmp_path: Path) -> None:
    console = paper()
    # Brackets are markup to rich, dollars are formulas to matplotlib; here they are names.
    out = tmp_path / "a[" / "b]"
    text_file = text_file.rename(text_file.with_name("$x_$ [draft].txt"))
    outcome = run_demo(tiny, text=text_file, out=out, console=console)
    assert outcome.folder == out
    assert f"Results go to {out}\n" in printed(console)
    assert f"Results in {out}: checkpoint," in printed(console)
    assert "Language model: $x_$ [draft].txt" in printed(console)
    assert sorted(path.name for path in out.iterdir()) == EVERYTHING
    assert all((out / name).read_bytes().startswith(PNG) for name in EVERYTHING if "png" in name)

    results = json.loads((out / "results.json").read_text())
    assert results["status"] == "complete"
    assert results["config"]["seed"] == 3
    assert results["config"]["memory"]["test_lengths"] == [16, 24, 32]
    assert results["environment"]["torch"]
    assert len(results["memory"]["curves"]) == 4
    language = results["language_model"]
    assert [curve["attention"] for curve in language["curves"]] == ["LUCID", "softmax"]
    assert language["checkpoint"]["passed"] is True

    with (out / "memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3
    assert [float(row["accuracy"]) for row in rows] == [
        point["accuracy"] for curve in results["memory"]["curves"] for point in curve["points"]
    ]
    with (out / "loss.csv").open() as file:
        losses = list(csv.DictReader(file))
    assert {(row["attention"], row["measured_on"]) for row in losses} == {
        (attention, part) for attention in ("LUCID", "softmax") for part in ("training", "held-out")
    }
    assert float(losses[0]["nats_per_token"]) == language["curves"][0]["train"][0][1]

    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    assert model.config._attn_implementation == "lucid"
    assert len(AutoTokenizer.from_pretrained(out / "checkpoint")) == 300

    assert language["checkpoint"]["continuation"] in (out / "generated.txt").read_text()
    for said in ("LUCID, NoPE", "softmax, RoPE", "held-out loss", "6 of 6", "passed", "no claim"):
        assert said in printed(console)
        assert said in (out / "summary.txt").read_text()
    assert str(out) in printed(console).replace("\n", "")


@pytest.mark.parametrize(
    ("bar", "after"), [("memory", 3), ("memory", 10), ("save", 3), ("Llama, softmax", 3)]
)
def test_an_interrupt_keeps_what_is_finished(
    bar: str,
    after: int,
    tiny: DemoConfig,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @contextmanager
    def interrupted_progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
        done = 0

        def advance(units: int) -> None:
            nonlocal done
            done += units
            if description.startswith(bar) and done >= after:
                raise KeyboardInterrupt

        yield advance

    monkeypatch.setattr(runner, "progress", interrupted_progress)
    console = paper()
    out = tmp_path / "out"
    outcome = run_demo(tiny, text=text_file, out=out, console=console)
    assert outcome.record.status == "interrupted"
    results = json.loads((out / "results.json").read_text())
    assert results["status"] == "interrupted"
    written = sorted(path.name for path in out.iterdir())
    if (bar, after) == ("memory", 3):
        assert written == ["results.json", "summary.txt"]
        assert "Nothing was finished" in printed(console)
    elif bar == "memory":
        assert len(results["memory"]["curves"]) == 1
        assert written == ["memory.csv", "memory.png", "results.json", "summary.txt"]
    elif bar == "save":
        assert results["language_model"]["curves"][0]["seconds"] > 0
        assert results["language_model"]["checkpoint"] is None
        assert written == [name for name in EVERYTHING if name != "generated.txt"]
    else:
        assert len(results["memory"]["curves"]) == 4
        finished, stopped = results["language_model"]["curves"]
        assert finished["seconds"] > 0
        assert stopped["seconds"] is None
        assert [step for step, _ in stopped["train"]] == [1, 2]
        assert written == EVERYTHING
        assert results["language_model"]["checkpoint"]["passed"] is True
        assert "stopped" in printed(console)
    assert "Interrupted: what was finished is kept." in printed(console)


def test_bad_text_writes_nothing(tiny: DemoConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(TextError, match="no such file"):
        run_demo(tiny, text=tmp_path / "missing.txt", out=out, console=paper())
    assert not out.exists()


def test_a_used_folder_is_refused_before_the_text_is_read(tiny: DemoConfig, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FolderError, match="is not empty"):
        run_demo(tiny, text=tmp_path / "missing.txt", out=tmp_path, console=paper())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_check_is_shown(tiny: DemoConfig, text_file: Path, tmp_path: Path) -> None:
    console = paper()
    outcome = run_demo(tiny, text=text_file, out=tmp_path / "out", console=console)
    assert outcome.record.checkpoint is not None
    outcome.record.checkpoint = replace(outcome.record.checkpoint, equal_tokens=2)
    console.print(runner.summary(outcome.record))
    assert "2 of 6" in printed(console)
    assert "FAILED" in printed(console)
