"""Language-model loss by attention, head size and position encoding: a Llama of 34 million parameters, twins on the same rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from .experiment import Cell, Experiment, Row, Workplace
from .figures import COLOURS, as_png, legend, panels, seed_lines
from .language import AVERAGE, DIFFERENCES, TextModel, text_model, text_steps
from .statistics import COUNTS, Paired, paired, said, several_texts, spread_of

__all__ = ["LanguageModel"]

CONTROLS = {"differences": DIFFERENCES, "average": AVERAGE}
"""Sides that see no keys."""


class LanguageModel(Experiment):
    """Held-out loss after 29M tokens."""

    name = "language-model"
    claim = "lower loss with LUCID without position encoding (paper: .12) and with small heads (.1); with RoPE .013"
    gpu_minutes = 18.0
    measured = True
    cpu_minutes = None
    version = 4
    per_seed = True

    def cells(self, tiny: bool) -> list[Cell]:
        """Heads of 64 and 16 at the same width, on a text that is met 3.3 times and on one that is met once, there with controls."""
        sizes = (16,) if tiny else (64, 16)
        positions = ("nope",) if tiny else ("rope", "nope")
        found: list[Cell] = [
            {"attention": attention, "position": position, "head_dim": head_dim}
            for head_dim, position, attention in itertools.product(sizes, positions, ("softmax", "lucid"))
        ]  # fmt: skip
        found += [{**cell, "text": "libraries"} for cell in found]
        controls: list[Cell] = [
            {"attention": control, "position": position, "head_dim": sizes[0], "text": "libraries"}
            for control, position in itertools.product(CONTROLS, positions)
        ]  # fmt: skip
        return found + controls

    def steps(self, cell: Cell, tiny: bool) -> int:
        return text_steps(tiny)

    def run(self, cell: Cell, seeds: Sequence[int], place: Workplace, tick: Callable[[int], None]) -> list[Row]:  # fmt: skip
        side = CONTROLS.get(cell["attention"], {"attention": cell["attention"]})
        found = text_model(
            place, self.steps(cell, place.tiny), seeds[0], tick, weights=False,
            text=cell.get("text", "stdlib"), position=cell["position"], head_dim=cell["head_dim"], **side,
        )  # fmt: skip
        return self.rows_of(found, seeds[0])

    @staticmethod
    def rows_of(found: TextModel, seed: int) -> list[Row]:
        """One for each evaluation."""
        rates = sorted(entry["tokens_per_s"] for entry in found.log if "tokens_per_s" in entry)
        rate = rates[len(rates) // 2] if rates else math.nan
        return [
            {**found.facts, "seed": seed, "step": int(entry["step"]), "loss": entry["eval_loss"],
             "training_loss": found.training_loss(int(entry["step"])), "tokens_per_s": rate}
            for entry in found.log
            if "eval_loss" in entry
        ]  # fmt: skip

    def summary(self, rows: list[Row]) -> str:
        """Losses at each evaluation, paired; on training rows; and what a step costs."""
        steps = sorted({row["step"] for row in rows})
        lines = [
            "# Language-model loss",
            "",
            f"Held-out loss, nats a token, after so many steps; mean ± standard deviation over seeds; one side less another: {COUNTS}; "
            "seeds: how many it would take to tell the last difference. "
            "Training: the loss on the last rows that were trained on, as they were met. Controls that see no keys: differences, softmax attention over v_n - v_(n-1), and average, over v_n less a moving average of what came before.",
            "",
            "| text | position | head size | | " + " | ".join(map(str, steps)) + " | training | seeds | tokens/s |",
            "|---|---|---|---|" + "---|" * len(steps) + "---|---|---|",
        ]  # fmt: skip
        for setting in dict.fromkeys(_setting(r) for r in rows):
            sides = {a: [r for r in rows if (_setting(r), r["attention"]) == (setting, a)] for a in COLOURS}  # fmt: skip
            label = " | ".join(map(str, setting))
            seeds = len({r["seed"] for mine in sides.values() for r in mine})
            last = max(r["step"] for mine in sides.values() for r in mine)
            for attention, mine in sides.items():
                if not mine:
                    continue
                texts = [said((r for r in mine if r["step"] == step), "loss", seeds=seeds) for step in steps]  # fmt: skip
                training = said((r for r in mine if r["step"] == last), "training_loss", seeds=seeds)  # fmt: skip
                rate = spread_of(mine, "tokens_per_s")[0]
                lines.append(f"| {label} | {attention} | {' | '.join(texts)} | {training} | | {rate / 1e3:,.0f}K |")  # fmt: skip
            pairs = [("lucid", "softmax"), *((c, "softmax") for c in CONTROLS), *(("lucid", c) for c in CONTROLS)]  # fmt: skip
            for ours, rival in pairs:
                gaps = [_gap(sides, ours, rival, step, "loss") for step in steps]
                if not any(gap.seeds for gap in gaps):
                    continue
                need = _gap(sides, ours, rival, last, "loss").seeds_to_resolve
                gaps.append(_gap(sides, ours, rival, last, "training_loss"))
                ratio = spread_of(sides[ours], "tokens_per_s")[0] / spread_of(sides[rival], "tokens_per_s")[0]  # fmt: skip
                lines.append(f"| {label} | {ours} - {rival} | {' | '.join(g.said() for g in gaps)} | {need:g} | x {ratio:.2f} |")  # fmt: skip
        return "\n".join([*lines, *several_texts(rows)]) + "\n"

    def plot(self, rows: list[Row]) -> bytes:
        """Held-out loss against steps, a panel for each setting, a line for each seed."""
        settings = list(dict.fromkeys(_setting(r) for r in rows))
        figure, axes = panels(len(settings))
        for axis, setting in zip(axes, settings, strict=True):
            for attention, colour in COLOURS.items():
                mine = [r for r in rows if (_setting(r), r["attention"]) == (setting, attention)]
                seed_lines(axis, mine, "step", "loss", label=attention, color=colour, marker="o", ms=3)  # fmt: skip
            text, position, head_dim = setting
            axis.set(title=f"{text}: {position}, heads of {head_dim}", xlabel="step")
        axes[0].set_ylabel("held-out loss")
        legend(axes)
        return as_png(figure)


def _setting(row: Row) -> tuple[str, str, int]:
    return row.get("text", "stdlib"), row["position"], row["head_dim"]


def _gap(sides: dict[str, list[Row]], ours: str, rival: str, step: int, metric: str) -> Paired:
    left, right = ([r for r in sides[side] if r["step"] == step] for side in (ours, rival))
    return paired(left, right, metric)
