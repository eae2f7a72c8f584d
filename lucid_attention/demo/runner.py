"""Runs the demo: both parts in order, each written to disk as soon as it is finished."""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel

from lucid_attention.results import ResultsFolder

from .configuration import DemoConfig
from .language_model import Attention, LossCurve, check_checkpoint, train_twin
from .memory import CURVES, all_curves
from .plots import language_model_plot, memory_plot, summary_plot
from .progress import progress
from .record import DemoRecord
from .report import summary
from .text import Corpus, prepare_corpus

__all__ = ["DemoOutcome", "run_demo"]

CHECKPOINT_FOLDER = "checkpoint"


@dataclass(frozen=True)
class DemoOutcome:
    """How a run ended.

    Attributes:
        folder: where the results are.
        record: what was found.
    """

    folder: Path
    record: DemoRecord


def run_demo(
    config: DemoConfig,
    *,
    text: Path | None = None,
    out: Path | None = None,
    console: Console | None = None,
) -> DemoOutcome:
    """Run both parts and write the results folder.

    The text and ``out`` are checked before anything is written. A KeyboardInterrupt ends the run
    early: what was finished, and the losses so far, are written and summed up as at a full end.

    Args:
        config: every size and the seed.
        text: a user's text file; None for the packaged novel.
        out: a new or empty folder for the results; None for a dated one under ``results``.
        console: where the summary goes; None for standard output.

    Raises:
        TextError: the text cannot be used.
        FolderError: the results folder cannot be made.
    """
    console = console or Console()
    ResultsFolder.check(out)
    corpus = prepare_corpus(text, config.language_model)
    folder = ResultsFolder.create(out, kind="demo")
    _say(console, f"Results go to {folder.path}")
    if corpus.note:
        _say(console, f"{corpus.name}: {corpus.note}")
    record = DemoRecord(
        config=config,
        text=corpus.name,
        text_characters=corpus.characters,
        text_note=corpus.note,
    )
    try:
        record.save(folder)
        _memory_part(record, folder)
        _plot(record, folder)
        _language_model_part(record, folder, corpus)
        record.status = "complete"
    except KeyboardInterrupt:
        record.status = "interrupted"
    # Numbers first: a second Ctrl-C may cost the plots only.
    record.save(folder)
    _plot(record, folder)
    _sum_up(record, folder, console)
    return DemoOutcome(folder=folder.path, record=record)


def _memory_part(record: DemoRecord, folder: ResultsFolder) -> None:
    config = record.config.memory
    units = len(CURVES) * (config.steps + len(config.test_lengths))
    order = [f"{attention}, {positions}" for attention, positions in CURVES]
    with progress("memory, four models", units) as advance:
        for curve in all_curves(config, seed=record.config.seed, advance=advance):
            record.memory.append(curve)
            record.memory.sort(key=lambda finished: order.index(finished.name))
            record.save(folder)


def _language_model_part(record: DemoRecord, folder: ResultsFolder, corpus: Corpus) -> None:
    model = _train(record, folder, corpus, "LUCID")
    config = record.config.language_model
    with progress("save, load, generate", 3 * config.new_tokens) as advance:
        record.checkpoint = check_checkpoint(
            model,
            corpus,
            config,
            folder=folder.path / CHECKPOINT_FOLDER,
            seed=record.config.seed,
            advance=advance,
        )
    record.save(folder)
    _plot(record, folder)
    _train(record, folder, corpus, "softmax")


def _train(
    record: DemoRecord, folder: ResultsFolder, corpus: Corpus, attention: Attention
) -> PreTrainedModel:
    config = record.config.language_model
    # In the record before it is trained: an interrupt keeps the losses so far.
    curve = LossCurve(attention)
    record.losses.append(curve)
    with (
        tempfile.TemporaryDirectory() as scratch,
        progress(f"Llama, {attention:12s}", config.steps) as advance,
    ):
        model = train_twin(
            curve,
            corpus,
            config,
            seed=record.config.seed,
            scratch=Path(scratch),
            advance=advance,
        )
    record.save(folder)
    return model


def _plot(record: DemoRecord, folder: ResultsFolder) -> None:
    """Draw what there is; a plot without a single curve is left out."""
    losses = [curve for curve in record.losses if curve.train]
    if record.memory:
        folder.write_bytes("memory.png", memory_plot(record.memory, record.config))
    if losses:
        folder.write_bytes(
            "language_model.png", language_model_plot(losses, record.config, record.text)
        )
    if record.memory and losses:
        folder.write_bytes(
            "summary.png", summary_plot(record.memory, losses, record.config, record.text)
        )


def _sum_up(record: DemoRecord, folder: ResultsFolder, console: Console) -> None:
    tables = summary(record)
    console.print(tables)
    plain = Console(file=io.StringIO(), width=100, record=True)
    plain.print(tables)
    folder.write_text("summary.txt", plain.export_text())
    if record.status == "interrupted":
        _say(console, "Interrupted: what was finished is kept.")
    names = sorted(path.name for path in folder.path.iterdir())
    _say(console, f"Results in {folder.path}: {', '.join(names)}")


def _say(console: Console, line: str) -> None:
    """A line that holds names of the user's files, which are not markup."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)
