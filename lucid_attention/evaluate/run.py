"""What `lucid eval` does: tasks on a checkpoint, their results as JSON, table and plot."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from lucid_attention.generate import GenerateError, describe, load
from lucid_attention.results import ResultsFolder, environment_facts

from .harness import calls_of, check_tasks, check_tokenizer, rows_of, run_harness
from .prose import ProseTask, parse_task, run_task

__all__ = ["EvalError", "Evaluation", "evaluate"]


_FULL = 0.75
"""Of a prompt's tokens; with less it is said."""


class EvalError(ValueError):
    """Something the user can put right; its message is one line."""


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        folder: with ``results.json``, ``results.csv``, ``results.md``, ``accuracy.png`` (where something was measured at lengths),
            ``samples.jsonl`` (this project's tasks) and ``lm_eval.json`` (the harness's own).
        rows: ``task, version, length, metric, value, stderr, samples``.
    """

    folder: Path
    rows: list[dict[str, Any]]


def evaluate(
    checkpoint: str | Path,
    tasks: Sequence[str],
    *,
    lengths: Sequence[int] = (1024,),
    limit: int = 100,
    batch_size: int = 1,
    seed: int = 1,
    prose: Path | None = None,
    dtype: str = "auto",
    device: str | None = None,
    strength: float | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    quiet: bool = False,
) -> Evaluation:
    """Run tasks on a LUCID checkpoint, or on any other causal language model.

    Args:
        checkpoint: a folder or a hub id.
        tasks: of this project, with dials (``needles``, ``needles:keys=4:queries=2``, ``tracking:hops=2``), or of lm-evaluation-harness
            (``ruler``, ``niah_single_1``, ``babilong``, ``longbench``, ``scrolls_qasper``, ...).
        lengths: in tokens, prompt and answer together: of this project's tasks, of RULER's, and (powers of two) BABILong's.
        limit: samples of each task and length.
        batch_size: rows at once.
        seed: of the samples.
        prose: UTF-8 text that needles are hidden in; None: Jane Austen, Persuasion.
        dtype, device, strength: as for `lucid_attention.generate.load`.
        out: the folder, new or empty; None makes ``results/eval-YYYYmmdd-HHMMSS``.
        say, quiet: lines for the user; no progress bars.

    Raises:
        EvalError: no such checkpoint or task, a task that needs a network where there is none, a length too short.
        FolderError: the folder is in use.
    """
    if isinstance(tasks, str) or not isinstance(lengths, Sequence):
        raise EvalError(f"tasks, lengths: expected lists, got {tasks!r} and {lengths!r}")
    checkpoint = os.path.expanduser(str(checkpoint))  # noqa: PTH111 (Path's raises where there is no such user)
    out, prose = (None if path is None else Path(path) for path in (out, prose))
    own, others = _parsed(tasks)
    for name, number in (("limit", limit), ("batch_size", batch_size)):
        if number < 1:
            raise EvalError(f"--{name.replace('_', '-')}: expected 1 or more, got {number}")
    wanted = sorted(set(lengths))
    if not wanted or wanted[0] < 1:
        raise EvalError(f"--lengths: expected numbers of tokens, got {list(lengths)}")
    text = _prose(prose) if own else ""
    ResultsFolder.check(out)
    try:
        if others:
            check_tasks(others, wanted)
        model, tokenizer = load(checkpoint, dtype=dtype, device=device, strength=strength)
        check_tokenizer(others, tokenizer)
        # A length that is too short, before hours of others.
        made = [list(t.samples(text, tokenizer, wanted[0], limit, seed)) for t in own]
    except (ValueError, GenerateError) as error:
        raise EvalError(str(error)) from None
    # Greedy, and nothing else of what the checkpoint says of drawing: a penalty on repetitions is one on copying a needle.
    ends = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=ends.bos_token_id,
        eos_token_id=ends.eos_token_id,
        pad_token_id=ends.pad_token_id,
    )
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and wanted[-1] > most:
        say(f"{wanted[-1]} tokens are more than the {most} positions that the model was made for")

    folder = ResultsFolder.create(out, kind="eval")
    rows: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    facts = {
        "checkpoint": checkpoint, "model": describe(model), "strength": strength, "tasks": list(tasks), "lengths": wanted,
        "limit": limit, "batch_size": batch_size, "seed": seed, "prose": None if prose is None else str(prose),
        "prose_sha256": hashlib.sha256(text.encode()).hexdigest() if own else None, **environment_facts(), "finished": False,
    }  # fmt: skip
    for task, first in zip(own, made, strict=True):
        for length in wanted:
            try:
                row, said = run_task(
                    task, model, tokenizer, text, length, number=limit, batch_size=batch_size, seed=seed, quiet=quiet,
                    samples=first if length == wanted[0] else None,
                )  # fmt: skip
            except ValueError as error:
                raise EvalError(f"{task.name} at {length}: {error}") from None
            except IndexError:
                if most is None or length <= most:
                    raise
                raise EvalError(
                    f"{task.name}: the model does not go beyond its {most} positions, and {length} were asked for"
                ) from None
            rows.append(row)
            records += said
            spread = "" if math.isnan(row["stderr"]) else f" ± {row['stderr']:.1%}"
            say(f"{task.name} at {length}: {row['value']:.1%}{spread}")
            mean = sum(record["prompt_tokens"] for record in said) / len(said)
            if mean < _FULL * (length - task.new_tokens):
                say(
                    f"{task.name} at {length}: its prompts have {mean:.0f} tokens on average; the prose has long sentences"
                )
            _write(folder, rows, records, facts)
    if others:
        answers = []
        for call in calls_of(others, wanted):
            try:
                found = run_harness(
                    model, tokenizer, checkpoint, call, limit=limit, batch_size=batch_size, seed=seed,
                )  # fmt: skip
            except ValueError as error:
                raise EvalError(str(error)) from None
            answers.append(found)
            folder.write_text("lm_eval.json", json.dumps(answers, indent=2, default=str) + "\n")
            rows += rows_of(found, call)
            _write(folder, rows, records, facts)
    _write(folder, rows, records, {**facts, "finished": True})
    return Evaluation(folder.path, rows)


def _parsed(tasks: Sequence[str]) -> tuple[list[ProseTask], list[str]]:
    own, others = [], []
    for name in dict.fromkeys(name.strip() for name in tasks):
        try:
            task = parse_task(name)
        except ValueError as error:
            raise EvalError(f"--tasks: {error}") from None
        if task is None:
            others.append(name)
        else:
            own.append(task)
    if not own and not others:
        raise EvalError("--tasks: expected at least one")
    return own, others


def _prose(path: Path | None) -> str:
    if path is None:
        from lucid_attention.tasks.novel import packaged_novel

        return packaged_novel()
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise EvalError(f"--prose {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise EvalError(f"--prose {path}: is not UTF-8 text") from None


COLUMNS = ("task", "version", "length", "metric", "value", "stderr", "samples")


def _write(
    folder: ResultsFolder, rows: list[dict[str, Any]], records: list[dict[str, Any]], facts: dict[str, Any]
) -> None:  # fmt: skip
    """Everything so far."""
    folder.write_json("results.json", {**facts, "rows": rows})
    folder.write_csv("results.csv", COLUMNS, [[row[name] for name in COLUMNS] for row in rows])
    folder.write_text("results.md", table(rows))
    if records:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        folder.write_text("samples.jsonl", lines)
    if any(row["length"] is not None for row in rows):
        folder.write_bytes("accuracy.png", _plot(rows, str(facts["checkpoint"])))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a task a line, a length a column; other metrics below."""
    lengths = sorted({row["length"] for row in rows if row["length"] is not None})
    lines = []
    if lengths:
        lines += [
            "| accuracy, % | " + " | ".join(map(str, lengths)) + " |",
            "| --- |" + " --- |" * len(lengths),
        ]
        for task in dict.fromkeys(row["task"] for row in rows if row["length"] is not None):
            cells = {row["length"]: _percent(row) for row in rows if row["task"] == task}
            lines.append(f"| {task} | " + " | ".join(cells.get(n, "") for n in lengths) + " |")
    rest = [row for row in rows if row["length"] is None]
    if rest:
        lines += ["", "| task | metric | value | stderr |", "| --- | --- | --- | --- |"]
        lines += [f"| {r['task']} | {r['metric']} | {r['value']:.4g} | {r['stderr']:.2g} |" for r in rest]  # fmt: skip
    return "\n".join(lines) + "\n"


def _percent(row: dict[str, Any]) -> str:
    spread = "" if math.isnan(row["stderr"]) else f" ± {100 * row['stderr']:.1f}"
    return f"{100 * row['value']:.1f}{spread}"


def _plot(rows: list[dict[str, Any]], title: str) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2))
    for task in dict.fromkeys(row["task"] for row in rows if row["length"] is not None):
        points = sorted(
            (r["length"], 100 * r["value"], 0.0 if math.isnan(r["stderr"]) else 100 * r["stderr"])
            for r in rows
            if r["task"] == task and r["length"] is not None
        )
        x, y, e = zip(*points, strict=True)
        axis.errorbar(x, y, yerr=e, marker="o", ms=4, capsize=2, label=task)
    axis.set_xscale("log", base=2)
    ticks = sorted({row["length"] for row in rows if row["length"] is not None})
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.minorticks_off()
    axis.set(xlabel="tokens", ylabel="accuracy, %", ylim=(-3, 103), title=title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    return buffer.getvalue()
