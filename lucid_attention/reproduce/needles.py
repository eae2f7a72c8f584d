"""Needles in prose with a small language model: trained on text, then on the task, and tested beyond the length of both."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lucid_attention.evaluate.prose import ProseTask, parse_task, run_task
from lucid_attention.train import TrainConfig
from lucid_attention.train.tasks import part_of, read_prose

from .experiment import Cell, Experiment, Row, Workplace
from .figures import as_png, panels
from .language import DIFFERENCES, questions, settings, text_model, text_steps, train_cell
from .statistics import COUNTS, paired, said, several_texts, spread_of

__all__ = ["Needles"]

SIDES = ("softmax", "lucid", "softmax+10%", "differences", "moved")
"""The third trains softmax for a tenth more steps, of text and of the task; the next is the control `DIFFERENCES`; the last a softmax
model that is moved to LUCID while it learns the task, its strength rising from 0 to 1 in the first half."""


def parsed(text: str) -> ProseTask:
    """A task of this project."""
    found = parse_task(text)
    assert found is not None
    return found


class Needles(Experiment):
    """34M parameters with RoPE: 29M tokens of text, then 600 steps of the task with 1 to 10 needles, at 2048 tokens."""

    name = "needles"
    claim = "more needles are found, and at longer lengths, than with softmax or with softmax and 10 % more steps"
    gpu_minutes = 12.0
    measured = True
    cpu_minutes = None
    version = 5
    per_seed = True

    def cells(self, tiny: bool) -> list[Cell]:
        """A model for each side and seed."""
        return [{"attention": side} for side in (("softmax", "lucid", "moved") if tiny else SIDES)]

    def lengths(self, cell: Cell, tiny: bool) -> tuple[int, int]:
        """Steps of text and of the task."""
        text, task = text_steps(tiny), 4 if tiny else 600
        more = 1.1 if cell["attention"].endswith("+10%") else 1.0
        return round(text * more), round(task * more)

    def grid(self, tiny: bool) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Needles, lengths, and samples of each."""
        return ((1, 2), (200,), 2) if tiny else ((1, 2, 4, 6, 10), (1024, 2048, 4096, 8192), 100)

    def steps(self, cell: Cell, tiny: bool) -> int:
        return sum(self.lengths(cell, tiny))

    def run(self, cell: Cell, seeds: Sequence[int], place: Workplace, tick: Callable[[int], None]) -> list[Row]:  # fmt: skip
        side, seed = cell["attention"], seeds[0]
        first, then = self.lengths(cell, place.tiny)
        keys, lengths, number = self.grid(place.tiny)
        # A cell of tiny rows would not hold a needle.
        length: dict[str, Any] = {"length": 256} if place.tiny else {}
        softmax: dict[str, Any] = {"attention": "softmax"}
        changes = {
            "lucid": {"attention": "lucid"},
            "differences": DIFFERENCES,
            "moved": {"attention": "lucid", "strength_steps": then // 2},
        }.get(side, softmax)
        text = text_model(place, first, seed, tick, **(softmax if side == "moved" else changes), **length)  # fmt: skip
        task = TrainConfig(
            task="needles", task_options={"keys": keys[-1], "queries": keys[-1]}, init_from=str(text.folder),
            length=settings(place, **length).length, **changes,
        )  # fmt: skip
        cuda = place.device.type == "cuda"
        workers = min(8, (os.cpu_count() or 1) // 2) if cuda else 0
        log = train_cell(
            place, task, then, seed, place.work / "task", tick, learning_rate=5e-4, dataloader_num_workers=workers,
        )  # fmt: skip
        folder = place.work / "task" / "run" / "model"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        dtype = torch.bfloat16 if cuda else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(place.device).eval()
        prose = part_of(read_prose(None), True)
        grid = [(parsed(f"needles:keys={count}"), length) for count in keys for length in lengths]
        samples = questions(place, grid, prose, tokenizer, number, seed)
        about = {"seed": seed, "text_loss": text.loss, "corpus": text.facts["corpus"],
                 "task_accuracy": [e["eval_accuracy"] for e in log if "eval_accuracy" in e][-1]}  # fmt: skip
        rows = []
        for (asked, reach), made in zip(grid, samples, strict=True):
            found, _ = run_task(
                asked, model, tokenizer, prose, reach, number=number, batch_size=2 if place.tiny else max(1, (1 << 19) // reach),
                seed=seed, quiet=True, samples=made,
            )  # fmt: skip
            rows.append({**about, "needles": asked.options["keys"], "length": reach, "accuracy": found["value"]})  # fmt: skip
        return rows

    def summary(self, rows: list[Row]) -> str:
        """Accuracy by needles and length, and paired differences."""
        counts = sorted({row["needles"] for row in rows})
        lengths = sorted({row["length"] for row in rows})
        lines = [
            "# Needles in prose",
            "",
            f"Accuracy, mean ± standard deviation over seeds; lucid - softmax: {COUNTS}. Both trainings were at 2048 tokens. "
            "A model that takes any of N needles is right 1/N of the times. All: the mean over the numbers of needles.",
            "",
            "| needles | side | " + " | ".join(map(str, lengths)) + " |",
            "|---|---|" + "---|" * len(lengths),
        ]  # fmt: skip

        def at(side: str, count: int | str, length: int) -> list[Row]:
            mine = [r for r in rows if (r["attention"], r["length"]) == (side, length)]
            if count != "all":
                return [r for r in mine if r["needles"] == count]
            seeds: dict[int, list[Row]] = {}
            for row in mine:
                seeds.setdefault(row["seed"], []).append(row)
            # A seed that lacks a number of needles has another mean.
            return [{"seed": s, "accuracy": spread_of(own, "accuracy")[0]} for s, own in seeds.items() if len(own) == len(counts)]  # fmt: skip

        for count in (*counts, "all"):
            for side in SIDES:
                texts = [said(at(side, count, length), "accuracy") for length in lengths]
                if any(texts):
                    lines.append(f"| {count} | {side} | " + " | ".join(texts) + " |")
            for ours, rival in (
                ("lucid", "softmax"),
                ("lucid", "softmax+10%"),
                ("lucid", "differences"),
                ("moved", "softmax"),
            ):
                texts = [paired(at(ours, count, n), at(rival, count, n), "accuracy").said() for n in lengths]  # fmt: skip
                if any(texts):
                    lines.append(f"| {count} | {ours} - {rival} | " + " | ".join(texts) + " |")
        lines += ["", "| side | held-out loss on text |", "|---|---|"]
        for side in SIDES:
            mine = {r["seed"]: r for r in rows if r["attention"] == side}
            if mine:
                lines.append(f"| {side} | {said(mine.values(), 'text_loss', 4)} |")
        return "\n".join([*lines, *several_texts(rows)]) + "\n"

    def plot(self, rows: list[Row]) -> bytes:
        """Heat maps of accuracy, a panel for each side."""
        counts = sorted({row["needles"] for row in rows})
        lengths = sorted({row["length"] for row in rows})
        sides = [side for side in SIDES if any(row["attention"] == side for row in rows)]
        figure, axes = panels(len(sides), columns=5, width=3.4, height=3.4)
        for axis, side in zip(axes, sides, strict=True):
            axis.grid(False)
            table: list[list[float]] = []
            for count in counts:
                cells = [[r for r in rows if (r["attention"], r["needles"], r["length"]) == (side, count, n)] for n in lengths]  # fmt: skip
                table.append([spread_of(c, "accuracy")[0] if c else float("nan") for c in cells])
            shown: Any = axis.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for y, line in enumerate(table):
                for x, value in enumerate(line):
                    axis.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black", fontsize=8)  # fmt: skip
            axis.set_xticks(range(len(lengths)), [str(n) for n in lengths])
            axis.set_yticks(range(len(counts)), [str(n) for n in counts])
            axis.set(title=side, xlabel="tokens")
        axes[0].set_ylabel("needles")
        figure.colorbar(shown, ax=axes, label="accuracy")
        return as_png(figure)
