"""The machinery of the evidence: cells kept, runs that go on, statistics by hand; not the results."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from typer.testing import CliRunner

from lucid_attention import cli, precondition
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
from lucid_attention.reproduce.statistics import paired, quantile, said, spread_of
from lucid_attention.results import FolderError
from lucid_attention.train import TrainConfig, tasks
from lucid_attention.train.run import prepare_tokens
from lucid_attention.train.trainer import MeteredTrainer
from tests.conftest import make_keys, relative_error


def run(name: str, out: Path, **changes: Any) -> Path:
    return reproduce(EXPERIMENTS[name], out=out, tiny=True, device="cpu", say=lambda line: None, quiet=True, **changes)  # fmt: skip


@pytest.fixture(autouse=True)
def few_rows_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tasks: what is found is not looked at, and making rows takes longer than the tiny models."""
    monkeypatch.setattr(tasks, "_VALIDATION_ROWS", 32)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The tiny texts, without and with the libraries: written once, all sources of a dozen libraries are looked at for them."""
    folder = tmp_path_factory.mktemp("corpora")
    return {
        libraries: corpus.write_corpus(
            folder / f"{libraries}.jsonl", libraries=libraries, tiny=True
        )
        for libraries in (False, True)
    }


def copying(corpora: dict[bool, Path]) -> Callable[..., Path]:
    """In the place of `write_corpus`."""

    def copied(path: Path, *, libraries: bool, tiny: bool) -> Path:
        assert tiny
        return Path(shutil.copy(corpora[libraries], path))

    return copied


@pytest.fixture
def copied_corpora(corpora: dict[bool, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Experiments find their texts written; whether that repeats is `test_a_tiny_run`'s, of language-model."""
    monkeypatch.setattr(language, "write_corpus", copying(corpora))


@pytest.fixture(scope="module")
def language_run(
    corpora: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, int]:
    """A run of language-model, what it shares, and how many models it trained; not to be changed."""
    folder = tmp_path_factory.mktemp("language")
    trained: list[Any] = []
    real = language.train_cell

    def counted(*args: Any, **kwargs: Any) -> Any:
        trained.append(args)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "train_cell", counted)
        patch.setattr(language, "write_corpus", copying(corpora))
        out = run("language-model", folder / "first", seeds=1, shared=folder / "shared")
    return out, folder / "shared", len(trained)


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


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_full_sizes_are_listed(name: str) -> None:
    one = EXPERIMENTS[name]
    cells = one.cells(False)
    assert len({json.dumps(cell, sort_keys=True) for cell in cells}) == len(cells)
    for cell in cells:
        if cell.get("attention") in ("softmax", "lucid"):
            twin = {**cell, "attention": "lucid" if cell["attention"] == "softmax" else "softmax"}
            assert twin in cells
        assert one.steps(cell, False) > 100
    assert one.gpu_minutes < 30


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


def test_a_library_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_LIBRARIES", ("torch", "no_such_library"))
    with pytest.raises(ReproduceError, match=r"no_such_library: is not installed.*pip install no_such_library"):  # fmt: skip
        corpus.write_corpus(tmp_path / "corpus.jsonl", libraries=True)
    assert list(tmp_path.iterdir()) == []


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


def test_the_legend_has_what_any_panel_shows() -> None:
    from lucid_attention.reproduce.figures import legend, panels, seed_lines

    _, axes = panels(2)
    for axis, names in zip(axes, (("softmax",), ("softmax", "differences")), strict=True):
        for name in names:
            seed_lines(axis, [{"seed": 1, "x": 0, "y": 0}], "x", "y", label=name)
    legend(axes)
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["softmax", "differences"]  # fmt: skip


def test_tables_of_what_is_there_by_hand() -> None:
    """Seeds that lack a part are left out of a mean over the parts; a setting with fewer steps stays in the table."""
    from lucid_attention.reproduce.language_model import LanguageModel
    from lucid_attention.reproduce.needles import Needles

    accuracy = {("softmax", 1): (0.5, 0.1), ("lucid", 1): (0.7, 0.2), ("softmax", 2): (0.4, 0.0), ("lucid", 2): (0.9,)}  # fmt: skip
    made = [
        {"attention": side, "seed": seed, "needles": needles, "length": 8, "accuracy": value, "text_loss": 2.0, "corpus": "a" if seed == 1 else "b"}
        for (side, seed), values in accuracy.items() for needles, value in zip((1, 2), values, strict=False)
    ]  # fmt: skip
    text = Needles().summary(made)
    assert (
        "| all | softmax | 0.250 ± 0.071 |" in text and "| all | lucid | 0.450 (one seed) |" in text
    )
    assert "| all | lucid - softmax | +0.150 (one seed) |" in text
    assert "| 1 | lucid - softmax | +0.350 ± 0.150 |" in text

    assert "Not one text: a, b, by the beginning" in text
    about = {"position": "rope", "head_dim": 64, "training_loss": 1.0, "tokens_per_s": 1e3, "corpus": "a"}  # fmt: skip
    losses = [
        {**about, "text": text, "attention": side, "seed": seed, "step": step, "loss": seed + step + (side == "lucid")}
        for text, last in (("stdlib", 20), ("libraries", 10)) for seed in (1, 2) for side in ("softmax", "lucid") for step in sorted({10, last})
        if (text, side, seed) != ("libraries", "lucid", 2)
    ]  # fmt: skip
    table = LanguageModel().summary(losses)
    assert "| libraries | rope | 64 | lucid - softmax | +1.000 (one seed) |  | +0.000 (one seed) | inf | x 1.00 |" in table  # fmt: skip
    assert "| stdlib | rope | 64 | lucid - softmax | **+1.000 ± 0.000** |" not in table  # two seeds
    assert "| stdlib | rope | 64 | lucid - softmax | +1.000 ± 0.000 | +1.000 ± 0.000 |" in table
    assert "| libraries | rope | 64 | lucid | 12.000 (1 of 2 seeds) |" in table and "Not one text" not in table  # fmt: skip


def test_training_losses_by_hand() -> None:
    log = [{"step": float(step), "loss": float(step)} for step in range(10, 90, 10)]
    model = language.TextModel(Path(), [*log, {"step": 80.0, "eval_loss": 7.0}], {})
    assert model.training_loss(70) == 50.0 and model.training_loss(20) == 15.0
    assert math.isnan(model.training_loss(9)) and model.loss == 7.0


@pytest.mark.parametrize("kind", ["cos0", "cos0.9", "identical", "zero"])
def test_the_control_is_blind_to_keys(kind: str) -> None:
    """Its values are differences, whatever the keys: to the first order in the scale."""
    key, value = make_keys(kind, 1, 2, 300, 64), torch.randn(1, 2, 300, 64, dtype=torch.float64)
    solved = precondition(key, value, kernel_scale=language.DIFFERENCES["kernel_scale"])
    expected = torch.cat((value[:, :, :1], value.diff(dim=2)), dim=2)
    assert relative_error(solved, expected) < 1e-3


def test_the_milder_control_is_a_moving_average() -> None:
    """Of strength b: from each value, what came before it, with weights that fall by 1 - b."""
    key, value = make_keys("cos0.9", 1, 1, 200, 64), torch.randn(1, 1, 200, 64, dtype=torch.float64)
    setting = {name: language.AVERAGE[name] for name in ("kernel_scale", "strength")}
    solved, average = precondition(key, value, **setting), torch.zeros(64, dtype=torch.float64)
    for n in range(200):
        expected = value[0, 0, n] - average
        assert relative_error(solved[0, 0, n], expected) < 1e-3
        average = 0.75 * average + 0.25 * value[0, 0, n]


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


def rows(values: dict[int, float]) -> list[dict[str, Any]]:
    return [{"seed": seed, "x": value} for seed, value in values.items()]


def test_paired_differences_by_hand() -> None:
    gap = paired(rows({1: 3.0, 2: 5.0, 3: 4.0}), rows({3: 1.0, 2: 2.0, 1: 1.0, 9: 0.0}), "x")
    assert (gap.mean, gap.seeds) == (pytest.approx(8 / 3), 3)
    assert gap.error == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))
    assert gap.counts and str(gap) == "+2.667 ± 0.333 (3 seeds)"
    assert gap.said() == "**+2.667 ± 0.333**" and gap.said(with_seeds=True) == f"**{gap}**"
    assert said(rows({1: 1.0, 2: 3.0}), "x", 2) == "2.00 ± 1.41" and said([], "x") == ""
    small = paired(rows({1: 0.1, 2: -0.1, 3: 0.3}), rows({1: 0, 2: 0, 3: 0}), "x")
    assert not small.counts and small.said() == "+0.100 ± 0.115"
    # t(17) * 0.2 / sqrt(18) = 2.11 * 0.2 / 4.24 < 0.1
    assert small.seeds_to_resolve == 18
    nothing = paired(rows({1: math.nan, 2: 1.0, 3: 2.0}), rows({1: 0, 2: 0, 3: 0}), "x")
    assert not nothing.counts and nothing.seeds_to_resolve == math.inf
    # Two standard errors of three seeds are chance in 18 % of all cases.
    assert not paired(rows({1: 1.0, 2: 2.0, 3: 0.0}), rows({1: 0, 2: 0, 3: -1.0}), "x").counts
    exact = {2: 12.706, 3: 4.303, 11: 2.228, 12: 2.201, 31: 2.042, 101: 1.984}
    assert all(quantile(n) == pytest.approx(t, rel=0.005) for n, t in exact.items())
    assert not paired(
        rows({1: 9.0, 2: 9.0}), rows({1: 0, 2: 0}), "x"
    ).counts  # two seeds are too few
    alone = paired(rows({1: 1.0}), rows({1: 0.0}), "x")
    assert math.isnan(alone.error) and alone.said() == alone.said(with_seeds=True) == "+1.000 (one seed)"  # fmt: skip
    assert said(rows({1: 5.65854}), "x", 4) == said(rows({1: 5.65854}), "x", 4, seeds=1) == "5.6585 (one seed)"  # fmt: skip
    assert said(rows({1: 5.65854}), "x", 4, seeds=2) == "5.6585 (1 of 2 seeds)"
    apart = paired(rows({1: 1.0}), rows({2: 0.0}), "x")
    assert apart.seeds == 0 and apart.said() == ""
    assert spread_of(rows({1: 1.0, 2: 3.0}), "x") == (2.0, pytest.approx(math.sqrt(2)))


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


def test_two_runs_of_a_seed_by_hand() -> None:
    """Equal until step 10, then .25 apart; the other seed never. What was evaluated before the end does not count."""
    from lucid_attention.reproduce.repeat import Repeat

    made = [
        {"attention": "lucid", "deterministic": False, "seed": seed, "run": run, "kind": kind, "step": step, "tokens_per_s": 5.0,
         "weights": f"w{run if seed == 1 else 0}", "loss": 2.0 + (0.25 if (seed, run) == (1, 2) and step >= 10 else 0.0)}
        for seed in (1, 2) for run in (1, 2) for kind, step in (("loss", 5), ("loss", 10), ("eval_loss", 5), ("eval_loss", 10))
    ]  # fmt: skip
    assert "| lucid | no | 2 | step 10 | 2.5e-01 | 1.2e-01 | 1 of 2 | 5 |" in Repeat().summary(made)
    assert "| lucid | no | 1 | never | 0.0e+00 | 0.0e+00 | 1 of 1 | 5 |" in Repeat().summary([r for r in made if r["seed"] == 2])  # fmt: skip


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
