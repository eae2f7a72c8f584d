"""The machinery of the evidence: cells kept, runs that go on, models that are shared; not the results."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from lucid_attention.reproduce import (
    EXPERIMENTS,
    ReproduceError,
    corpus,
    language,
    moving,
    reproduce,
)
from lucid_attention.reproduce.experiment import Workplace, _identity
from lucid_attention.reproduce.moving import WAYS
from lucid_attention.train import TrainConfig
from lucid_attention.train.trainer import MeteredTrainer
from tests.reproduce.conftest import run

SLOW = ("moving", "repeat")  # more than 20 seconds; of both there are quicker tests below


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in EXPERIMENTS]
)
def test_a_tiny_run(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if name != "language-model":  # it has both texts, which are written anew in its two runs
        request.getfixturevalue("copied_corpora")
    one = EXPERIMENTS[name]
    seeds = 1 if one.per_seed else 3  # each of these takes seconds
    folder = run(name, tmp_path / "out", seeds=seeds)
    assert len(list((folder / "cells").glob("*.json"))) == len(one.cells(True))
    assert not (folder / "work").exists()  # what the cells needed is gone
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert {row["seed"] for row in rows} == {str(seed) for seed in range(1, seeds + 1)}
    sides = {row.get("attention") or row["way"] for row in rows}
    most = {"softmax", "lucid", "differences", "average", "moved"}
    assert sides == set(WAYS) or {"softmax", "lucid"} <= sides <= most
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    pattern = r"(?i)(lucid|way) - softmax|\| never \|"  # on a CPU a seed repeats
    assert re.search(pattern, (folder / "summary.md").read_text())
    # The same again, bit for bit, but for the clock.
    again = list(csv.DictReader((run(name, tmp_path / "again", seeds=seeds) / "results.csv").open()))  # fmt: skip
    for row in (*rows, *again):
        row.pop("tokens_per_s", None)
    assert rows == again


@pytest.mark.usefixtures("copied_corpora")
def test_moving_begins_where_softmax_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """At strength 0 the switch costs nothing; at once it does; a learned strength moves, at its own rate."""
    monkeypatch.setattr(type(EXPERIMENTS["moving"]), "lengths", lambda self, tiny: (24, 24))
    folder = run("moving", tmp_path / "out", seeds=1)
    rows = list(csv.DictReader((folder / "results.csv").open()))
    loss = {(row["way"], row["step"]): float(row["loss"]) for row in rows}
    before = loss["softmax", "-1"]
    assert loss["softmax", "0"] == loss["schedule", "0"] == loss["learned", "0"] == before
    assert loss["abrupt", "0"] != before != loss["half", "0"]
    strength = {row["way"]: float(row["strength"]) for row in rows}
    assert strength["softmax"] == 0 and strength["abrupt"] == strength["schedule"] == strength["half"] == 1  # fmt: skip
    assert (
        0.03 < strength["learned"] < 24 * 0.02
    )  # at the rate of the others it would be .024 at most
    assert re.search(r"\| nope \| learned \|.*\| 0\.\d+ \(one seed\) \(0\.\d+ to 0\.\d+\) \|", (folder / "summary.md").read_text())  # fmt: skip


@pytest.mark.usefixtures("copied_corpora")
def test_moving_goes_on_within_a_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the third of four steps: the same rows, with none of the step it went on from."""
    monkeypatch.setattr(moving, "WAYS", {"learned": WAYS["learned"]})  # one is enough

    def rows(work: str) -> list[dict[str, Any]]:
        place = Workplace(torch.device("cpu"), True, tmp_path / work, tmp_path / "shared")
        return EXPERIMENTS["moving"].run({"position": "nope"}, [1], place, lambda steps: None)

    whole = rows("whole")
    real = MeteredTrainer.training_step

    def stops(self: MeteredTrainer, *args: Any, **keywords: Any) -> torch.Tensor:
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return real(self, *args, **keywords)

    monkeypatch.setattr(MeteredTrainer, "training_step", stops)
    with pytest.raises(KeyboardInterrupt):
        rows("stopped")
    assert (tmp_path / "stopped" / "learned" / "run" / "checkpoint-3").is_dir()
    monkeypatch.setattr(MeteredTrainer, "training_step", real)
    assert rows("stopped") == whole and [row["step"] for row in whole] == [-1, 0, 4]


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("memory", tmp_path / "whole")
    memory = type(EXPERIMENTS["memory"])
    real, ran = memory.run, []

    def stops(self: Any, cell: Any, *args: Any) -> Any:
        if len(ran) == 1:
            raise KeyboardInterrupt
        ran.append(cell)
        return real(self, cell, *args)

    monkeypatch.setattr(memory, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        run("memory", tmp_path / "out")
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 1
    assert "LUCID - softmax" in (tmp_path / "out" / "summary.md").read_text()  # of what there is
    monkeypatch.setattr(memory, "run", real)
    said: list[str] = []
    folder = reproduce(EXPERIMENTS["memory"], out=tmp_path / "out", tiny=True, device="cpu", say=said.append, quiet=True)  # fmt: skip
    assert "1 of 2 cells are there already" in said
    assert (folder / "results.csv").read_text() == (whole / "results.csv").read_text()


@pytest.mark.slow
def test_two_phases_go_on_within_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped within either phase or between them: the same rows, bit for bit."""
    whole = run("two-phase", tmp_path / "whole")
    two_phase = type(EXPERIMENTS["two-phase"])
    real = two_phase.run
    for stop in (2, 4, 6):
        drawn: list[int] = []

        def stops(self: Any, cell: Any, seeds: Any, place: Any, tick: Any, stop: int = stop, drawn: list[int] = drawn) -> Any:  # fmt: skip
            def told(steps: int) -> None:
                drawn.append(steps)
                if sum(drawn) == stop:
                    raise KeyboardInterrupt

            return real(self, cell, seeds, place, told)

        monkeypatch.setattr(two_phase, "run", stops)
        out = tmp_path / f"out{stop}"
        with pytest.raises(KeyboardInterrupt):
            run("two-phase", out)
        assert not list((out / "cells").iterdir()) and list((out / "work").glob("*/state.pt"))
        ticks: list[int] = []
        monkeypatch.setattr(two_phase, "run", lambda self, *a, ticks=ticks: real(self, *a[:3], ticks.append))  # fmt: skip
        run("two-phase", out)
        assert ticks[0] == stop and sum(ticks) == 32
        assert (out / "results.csv").read_text() == (whole / "results.csv").read_text()


def test_a_text_model_is_trained_once(language_run: tuple[Path, Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Another experiment, and another process, find it; its checkpoints are gone."""
    first, theirs, count = language_run
    assert count == 6  # softmax and LUCID, on two texts, and the controls
    shared = shutil.copytree(theirs, tmp_path / "shared")
    trained: list[Any] = []
    real = language.train_cell

    def counted(place: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        trained.append(config)
        return real(place, config, *args, **kwargs)

    monkeypatch.setattr(language, "train_cell", counted)
    again = run("language-model", tmp_path / "again", seeds=1, shared=shared)
    assert not trained
    assert (first / "results.csv").read_text() == (again / "results.csv").read_text()
    assert len(list(shared.glob("tiny/models/*/run/model/model.safetensors"))) == 6
    assert not list(shared.glob("tiny/models/*/run/checkpoint-*")) and not (first / "work").exists()
    run("language-model", tmp_path / "more", seeds=2, shared=shared)
    assert [c.attention for c in trained] == ["softmax", "lucid"] * 2 + ["lucid"] * 2
    assert [c.kernel_scale for c in trained] == [None] * 4 + [1e-6] * 2
    assert [c.strength for c in trained] == [1.0] * 5 + [0.25]


@pytest.mark.usefixtures("copied_corpora")
def test_logs_without_their_models(language_run: tuple[Path, Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Two files of each training are enough for what reads losses; what begins from a model trains it again, and if that
    is stopped, the log of the beginning is not taken for the whole, nor its checkpoint lost.
    """
    (first, shared, _), other = language_run, tmp_path / "other"
    for name in ("facts.json", "run/log.csv"):
        for file in shared.glob(f"tiny/models/*/{name}"):
            copy = other / file.relative_to(shared)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    trained: list[int] = []
    real = language.train

    def counted(config: Any, given: Any, **keywords: Any) -> Any:
        trained.append(given["max_steps"])
        return real(config, {**given, "max_steps": stop or given["max_steps"], "save_steps": 2}, **keywords)  # fmt: skip

    stop = 0
    monkeypatch.setattr(language, "train", counted)
    # Of a training that was stopped here, before the log came.
    for folder in other.glob("tiny/models/*/run"):
        (folder / "checkpoint-1").mkdir()
    last = run("language-model", tmp_path / "last", seeds=1, shared=other)
    for folder in other.glob("tiny/models/*/run"):
        (folder / "checkpoint-1").rmdir()
    assert not trained and (last / "results.csv").read_text() == (first / "results.csv").read_text()
    place = Workplace(torch.device("cpu"), True, tmp_path / "work", other / "tiny")
    asked: dict[str, Any] = {"attention": "lucid", "position": "nope", "head_dim": 16, "text": "stdlib"}  # fmt: skip
    steps = language.text_steps(True)

    def killed(step: int) -> None:
        raise KeyboardInterrupt

    # Stopped at step 2 of 4, with a log until there.
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        language.text_model(place, steps, 1, killed, **asked)
    (folder,) = {path.parents[1] for path in other.glob("tiny/models/*/run/checkpoint-2")}
    config = folder / "run" / "config.yaml"
    config.write_text(config.read_text().replace("max_steps: 2", f"max_steps: {steps}"))
    stop = 0
    resumed: list[Path] = []
    going_on = language.continue_training
    monkeypatch.setattr(language, "continue_training", lambda run, **k: resumed.append(run) or going_on(run, **k))  # fmt: skip
    found = language.text_model(place, steps, 1, lambda step: None, weights=False, **asked)
    assert trained == [steps] and resumed == [folder / "run"]
    assert found.log[-1]["step"] == steps and (found.folder / "model.safetensors").is_file()


def test_copies_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two documents that have more than half of their longer lines in common, the first alone is in the text."""
    # In the order of the corpus.
    a, b, c = sorted("abc", key=lambda name: hashlib.sha256(name.encode()).digest())
    own = {name: [f"{name} has this line for itself, number {i}" for i in range(10)] for name in "abc"}  # fmt: skip
    content = {a: own[a], b: own[a][:6] + own[b][:4], c: own[a][:5] + own[c][:5]}
    for name, lines in content.items():
        (tmp_path / f"{name}.py").write_text("\n".join([*lines, "short"]))
    monkeypatch.setattr(corpus, "_LIBRARIES", ())
    monkeypatch.setattr(corpus, "_sources", lambda root, without=(): {n: tmp_path / f"{n}.py" for n in "abc"})  # fmt: skip
    for libraries, expected in ((True, (a, c)), (False, (a, b, c))):
        path = corpus.write_corpus(tmp_path / f"{libraries}.jsonl", libraries=libraries)
        texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        assert texts[1:] == [
            "\n".join([*content[name], "short"]) for name in expected
        ]  # after the novel


def test_two_texts(tmp_path: Path) -> None:
    """The libraries' text holds the standard library's, but for copies, and each has its own tokens."""
    from lucid_attention.reproduce.corpus import write_corpus

    place = Workplace(torch.device("cpu"), True, tmp_path / "work", tmp_path / "shared")
    small, large = (Path(language.settings(place, text=text).tokens_of or "") for text in ("stdlib", "libraries"))  # fmt: skip
    assert (small / "corpus.jsonl").read_text() != (large / "corpus.jsonl").read_text()
    assert (small / "data" / "tokens.json").is_file() and (large / "data" / "tokens.json").is_file()
    whole = {name: write_corpus(tmp_path / f"{name}.jsonl", libraries=name == "large") for name in ("small", "large")}  # fmt: skip
    lines = {name: set(path.read_text(encoding="utf-8").splitlines()) for name, path in whole.items()}  # fmt: skip
    assert sum(map(len, lines["small"] - lines["large"])) < 0.06 * sum(map(len, lines["small"]))
    # 900 steps of 32K tokens, and 2 % that is held out, at 4.2 characters a token.
    assert sum(map(len, lines["large"])) > 900 * 16 * 2048 * 4.2 * 1.02 > sum(map(len, lines["small"]))  # fmt: skip
    # As many steps as its tokens allow, and no more.
    config, tokens = TrainConfig(text="x", length=2048, validation_share=0.02), tmp_path / "tokens.json"  # fmt: skip
    for there, steps in ((33_460_419, 990), (33_460_419, 1001), (30_000_000, 900)):
        tokens.write_text(json.dumps({"tokens": there}))
        allowed = contextlib.nullcontext() if steps == 990 else pytest.raises(ReproduceError, match=f"steps meet once, got {there:,}")  # fmt: skip
        with allowed:
            language._check_met_once(tokens, config, steps)


def test_processes_share_the_cells(tmp_path: Path) -> None:
    """A cell that another process is at is left to it, and what both found is in the tables."""
    out = tmp_path / "out"
    run("memory", out, most_seconds=-1.0)
    cells = EXPERIMENTS["memory"].cells(True)
    (out / ".locks").mkdir(exist_ok=True)
    taken = FileLock(out / ".locks" / f"{_identity(cells[0])}.lock")
    said: list[str] = []
    with taken:
        reproduce(EXPERIMENTS["memory"], out=out, tiny=True, device="cpu", say=said.append, quiet=True)  # fmt: skip
        assert "1 cells are another process's; its end writes what both have found" in said
        rows = list(csv.DictReader((out / "results.csv").open()))
        assert {row["attention"] for row in rows} == {cells[1]["attention"]}
    run("memory", out)
    assert (out / "results.csv").read_text() == (run("memory", tmp_path / "whole") / "results.csv").read_text()  # fmt: skip


@pytest.mark.usefixtures("copied_corpora")
def test_more_seeds_and_some_cells_alone(tmp_path: Path) -> None:
    """A folder of fewer seeds is gone on with; ``only`` runs what it says, and the tables have the rest too."""
    out, shared = tmp_path / "out", tmp_path / "shared"
    run("language-model", out, seeds=1, shared=shared, only="text=libraries,attention=lucid")
    cells = [json.loads(file.read_text())["cell"] for file in (out / "cells").glob("*.json")]
    assert [(c["text"], c["attention"], c["seed"]) for c in cells] == [("libraries", "lucid", 1)]
    run("language-model", out, seeds=1, shared=shared, only="text=libraries, attention=softmax")
    before = {file: file.stat().st_mtime_ns for file in (out / "cells").glob("*.json")}
    run("language-model", out, seeds=2, shared=shared, only="text=libraries,seed=2")
    assert {file: file.stat().st_mtime_ns for file in before} == before
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert {(r["attention"], r["seed"]) for r in rows} == {("softmax", "1"), ("softmax", "2"), ("lucid", "1"), ("lucid", "2"), ("differences", "2"), ("average", "2")}  # fmt: skip
    with pytest.raises(ReproduceError, match=r"version 4, 2 seeds\), not tiny language-model \(version 4, 1 seeds"):  # fmt: skip
        run("language-model", out, seeds=1)
    run("memory", tmp_path / "memory", seeds=1, most_seconds=-1.0)
    with pytest.raises(ReproduceError, match="holds tiny memory"):  # its seeds are in one cell
        run("memory", tmp_path / "memory", seeds=2)
    for only, message in (
        ("position", "--only position: expected NAME=VALUE"),
        ("colour=red", "--only colour: no cell has it, but attention, position, head_dim, seed, text"),
        ("text=,attention=differences", "--only attention=differences: no such cell, attention is one of softmax, lucid"),
    ):  # fmt: skip
        with pytest.raises(ReproduceError, match=message):
            run("language-model", tmp_path / "none", only=only)
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("copied_corpora")
def test_fewer_seeds_leave_the_work_of_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """While a process of one seed runs, another begins with two: what it is at stays, and the tables have its cells."""
    out = tmp_path / "out"
    kind = type(EXPERIMENTS["language-model"])
    real, begun = kind.run, []

    def joined(self: Any, cell: Any, *args: Any) -> Any:
        if not begun:
            begun.append(cell)
            run("language-model", out, seeds=2, only="seed=2,attention=lucid,text=libraries")
            (out / "work" / "theirs").mkdir()
        return real(self, cell, *args)

    monkeypatch.setattr(kind, "run", joined)
    run("language-model", out, seeds=1)
    assert (out / "work" / "theirs").is_dir()
    assert {row["seed"] for row in csv.DictReader((out / "results.csv").open())} == {"1", "2"}


def test_no_cell_is_begun_after_the_time(tmp_path: Path) -> None:
    folder = run("memory", tmp_path / "out", most_seconds=-1.0)
    assert (folder / "work").exists() or not list((folder / "cells").iterdir())
    assert not (folder / "results.csv").exists()


def test_the_test_prose_is_not_trained_on(tmp_path: Path) -> None:
    from lucid_attention.reproduce.corpus import corpus_id, write_corpus
    from lucid_attention.tasks.prose import sentences_of
    from lucid_attention.train.tasks import part_of, read_prose

    path = write_corpus(tmp_path / "corpus.jsonl")
    text = " ".join(
        path.read_text(encoding="utf-8").replace("\\n", " ").replace('\\"', '"').split()
    )
    long = [s for s in sentences_of(part_of(read_prose(None), True)) if len(s) > 60]
    trained = [s for s in sentences_of(part_of(read_prose(None), False)) if len(s) > 60]
    assert len(long) > 300 and not [s for s in long if s in text]
    assert sum(s in text for s in trained[:300]) > 250  # the search finds what is there
    assert len(corpus_id(path)) == 12 and write_corpus(path) == path


def test_a_fixed_order_is_asked_for_and_given_back() -> None:
    from lucid_attention.reproduce.repeat import _fixed_order

    for before in (False, True):
        torch.use_deterministic_algorithms(before)
        try:
            with _fixed_order():
                assert torch.are_deterministic_algorithms_enabled()
            assert torch.are_deterministic_algorithms_enabled() == before
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_processes_begin_and_end_together(tmp_path: Path) -> None:
    """Three at once on a new folder: none fails, no cell is run twice, the tables have all."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lucid_attention", "reproduce", "memory", "--tiny", "--seeds", "1", "--device", "cpu", "--out", str(out)]  # fmt: skip
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(3)]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert len(list((out / "cells").glob("*.json"))) == 2 and not (out / "work").exists()
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert {row["attention"] for row in rows} == {"softmax", "lucid"}


def test_tiny_and_full_models_share_nothing(language_run: tuple[Path, Path, int]) -> None:
    _, shared, _ = language_run
    assert [path.name for path in shared.iterdir()] == ["tiny"]
    model = next(shared.glob("tiny/models/*/facts.json"))
    facts = json.loads(model.read_text())
    assert facts["trained_on"] == facts["device"] == "cpu" and len(facts["corpus"]) == 12
