"""The summary at the end: tables for people, made from a record."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .language_model import CheckpointCheck
from .record import DemoRecord

__all__ = ["summary"]


def summary(record: DemoRecord) -> RenderableType:
    """Tables of whatever parts are done."""
    parts: list[RenderableType] = []
    if record.memory:
        parts.append(_memory_table(record))
    if record.losses:
        parts.append(_loss_table(record))
    if record.checkpoint is not None:
        parts.append(_checkpoint_table(record.checkpoint))
        generated = Text(record.checkpoint.prompt, style="bold")
        generated.append(record.checkpoint.continuation, style="not bold")
        parts.append(Panel(generated, title="generated with the LUCID cache (prompt in bold)"))
    return Group(*parts) if parts else Text("Nothing was finished.")


def _memory_table(record: DemoRecord) -> Table:
    config = record.config.memory
    table = Table(
        title=f"Memory: queries answered, by sequence length (trained at {config.train_length})",
        title_justify="left",
        caption=f"one layer, {config.keys} keys, seed {record.config.seed}; "
        "bold: the best at that length",
        caption_justify="left",
    )
    # Eight columns of numbers fit an 80-character log; memory.csv has every length.
    doublings = [n for n in config.test_lengths if n % config.test_lengths[0] == 0]
    shown = [n for n in doublings if (n // doublings[0]).bit_count() == 1][-8:]
    table.add_column("model")
    for length in shown:
        table.add_column(str(length), justify="right")
    table.add_column("seconds", justify="right")
    accuracies = [{point.length: point.accuracy for point in c.points} for c in record.memory]
    best = {n: max(accuracy[n] for accuracy in accuracies) for n in shown}
    for curve, accuracy in zip(record.memory, accuracies, strict=True):
        cells = [
            f"[bold]{accuracy[n]:.1%}[/bold]" if accuracy[n] == best[n] else f"{accuracy[n]:.1%}"
            for n in shown
        ]
        table.add_row(curve.name, *cells, f"{curve.train_seconds + curve.test_seconds:.0f}")
    return table


def _loss_table(record: DemoRecord) -> Table:
    table = Table(
        title=f"Language model: {escape(record.text)}",  # a file name may look like markup
        title_justify="left",
        caption="one seed, a tiny model: a check that training works, no claim about which is "
        "better",
        caption_justify="left",
    )
    table.add_column("attention")
    for heading in ("parameters", "steps", "training loss", "held-out loss", "seconds"):
        table.add_column(heading, justify="right")
    for curve in record.losses:
        table.add_row(
            curve.attention,
            f"{curve.parameters:,}" if curve.parameters else "",
            str(max((step for step, _ in (*curve.train, *curve.validation)), default=0)),
            f"{curve.train[-1][1]:.3f}" if curve.train else "",
            f"{curve.validation[-1][1]:.3f}" if curve.validation else "",
            "stopped" if curve.seconds is None else f"{curve.seconds:.0f}",
        )
    return table


def _checkpoint_table(check: CheckpointCheck) -> Table:
    table = Table(title="Checkpoint: saved, then loaded again", title_justify="left")
    table.add_column("check")
    table.add_column("found", justify="right")
    table.add_row("attention after loading", check.implementation)
    table.add_row("largest logit difference", f"{check.largest_logit_difference:g}")
    table.add_row("cache layers made by generate()", ", ".join(check.cache_layers))
    table.add_row(
        "cached tokens equal to uncached ones", f"{check.equal_tokens} of {check.compared_tokens}"
    )
    table.add_row("result", "passed" if check.passed else "[bold red]FAILED[/bold red]")
    return table
