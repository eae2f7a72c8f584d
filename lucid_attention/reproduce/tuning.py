"""The learning rate that suits each attention: twins at one rate are a fair comparison only if it suits both."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from .experiment import Cell, Experiment, Row, Workplace
from .figures import COLOURS, as_png, legend, panels, seed_lines
from .language import LEARNING_RATE, text_model, text_steps
from .statistics import paired, said, several_texts, spread_of

__all__ = ["Tuning"]


class Tuning(Experiment):
    """The 34M model after 29M tokens, each met once, at four learning rates."""

    name = "tuning"
    claim = "the learning rate of all experiments with language models suits both attentions alike"
    gpu_minutes = 17.0
    cpu_minutes = None
    measured = True
    version = 3
    per_seed = True

    def cells(self, tiny: bool) -> list[Cell]:
        """Half to four times the rate of the other experiments, which share the models at that rate."""
        factors = (1.0, 4.0) if tiny else (1.0, 0.5, 2.0, 4.0)
        positions = ("rope",) if tiny else ("rope", "nope")
        return [
            {"attention": attention, "position": position, "rate": LEARNING_RATE * factor}
            for factor, position, attention in itertools.product(factors, positions, ("softmax", "lucid"))
        ]  # fmt: skip

    def steps(self, cell: Cell, tiny: bool) -> int:
        return text_steps(tiny)

    def run(self, cell: Cell, seeds: Sequence[int], place: Workplace, tick: Callable[[int], None]) -> list[Row]:  # fmt: skip
        found = text_model(
            place, self.steps(cell, place.tiny), seeds[0], tick, learning_rate=cell["rate"], weights=False,
            attention=cell["attention"], position=cell["position"],
        )  # fmt: skip
        return [{**found.facts, "seed": seeds[0], "loss": found.loss}]

    def summary(self, rows: list[Row]) -> str:
        """Losses by rate; and the comparison of each attention at its own best rate."""
        rates = sorted({row["rate"] for row in rows})
        lines = [
            "# Learning rates",
            "",
            "Held-out loss; mean ± standard deviation over seeds; in bold the best rate of each attention. LUCID - softmax: each at its own "
            "best rate, chosen by these same losses, mean of the paired differences ± its standard error.",
            "",
            "| position | attention | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
            "|---|---|" + "---|" * len(rates),
        ]
        for position in dict.fromkeys(row["position"] for row in rows):
            best: dict[str, list[Row]] = {}
            for attention in ("softmax", "lucid"):
                mine = [r for r in rows if (r["position"], r["attention"]) == (position, attention)]
                cells = {rate: [r for r in mine if r["rate"] == rate] for rate in rates}
                means = {rate: spread_of(c, "loss") for rate, c in cells.items() if c}
                if not means:
                    continue
                most = max(map(len, cells.values()))
                lowest = min((r for r in means if len(cells[r]) == most), key=lambda r: means[r][0])
                best[attention] = cells[lowest]
                texts = {rate: said(cell, "loss", 4) for rate, cell in cells.items()}
                texts[lowest] = f"**{texts[lowest]}**"
                lines.append(f"| {position} | {attention} | " + " | ".join(texts.values()) + " |")
            if len(best) == 2:
                gap = paired(best["lucid"], best["softmax"], "loss")
                lines.append(f"| {position} | LUCID - softmax | {gap} |" + " |" * (len(rates) - 1))
        return "\n".join([*lines, *several_texts(rows)]) + "\n"

    def plot(self, rows: list[Row]) -> bytes:
        """Held-out loss against the rate, every seed a line."""
        positions = list(dict.fromkeys(row["position"] for row in rows))
        rates = sorted({row["rate"] for row in rows})
        figure, axes = panels(len(positions), width=4.2, height=3.6)
        for axis, position in zip(axes, positions, strict=True):
            for attention, colour in COLOURS.items():
                mine = [r for r in rows if (r["position"], r["attention"]) == (position, attention)]
                seed_lines(axis, mine, "rate", "loss", label=attention, color=colour, marker="o", ms=3)  # fmt: skip
            axis.set_xscale("log", base=2)
            axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
            axis.set(title=position, xlabel="learning rate")
        axes[0].set_ylabel("held-out loss")
        legend(axes)
        return as_png(figure)
