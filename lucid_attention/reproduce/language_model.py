"""Language-model loss by attention, head size and position encoding: a Llama of 34 million parameters, twins on the same rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from .experiment import Cell, Experiment, Row, Workplace, as_png, paired, spread_of
from .language import text_model, text_steps

__all__ = ["LanguageModel"]


class LanguageModel(Experiment):
    """Held-out loss after 29M tokens."""

    name = "language-model"
    claim = "lower loss with LUCID without position encoding (paper: .12) and with small heads (.1); with RoPE .013"
    gpu_minutes = 11.0
    cpu_minutes = None
    version = 3
    per_seed = True

    def cells(self, tiny: bool) -> list[Cell]:
        """Heads of 64 and 16 at the same width."""
        sizes = (16,) if tiny else (64, 16)
        positions = ("nope",) if tiny else ("rope", "nope")
        return [
            {"attention": attention, "position": position, "head_dim": head_dim}
            for head_dim, position, attention in itertools.product(sizes, positions, ("softmax", "lucid"))
        ]  # fmt: skip

    def steps(self, cell: Cell, tiny: bool) -> int:
        return text_steps(tiny)

    def run(self, cell: Cell, seeds: Sequence[int], place: Workplace, tick: Callable[[int], None]) -> list[Row]:  # fmt: skip
        found = text_model(
            place, self.steps(cell, place.tiny), seeds[0], tick, weights=False,
            attention=cell["attention"], position=cell["position"], head_dim=cell["head_dim"],
        )  # fmt: skip
        rates = sorted(entry["tokens_per_s"] for entry in found.log if "tokens_per_s" in entry)
        rate = rates[len(rates) // 2] if rates else math.nan
        return [
            {**found.facts, "seed": seeds[0], "step": int(entry["step"]), "loss": entry["eval_loss"], "tokens_per_s": rate}
            for entry in found.log
            if "eval_loss" in entry
        ]  # fmt: skip

    def summary(self, rows: list[Row]) -> str:
        """The last losses, paired; and what a step costs."""
        last = max(row["step"] for row in rows)
        lines = [
            "# Language-model loss",
            "",
            f"Held-out loss, nats a token, after {last} steps; mean ± standard deviation over seeds; LUCID - softmax: mean of the paired "
            "differences ± its standard error, bold where chance would give as much less than once in twenty times (Student's t, each by itself); seeds: how many it would take to tell a difference "
            "of this size.",
            "",
            "| position | head size | softmax | LUCID | LUCID - softmax | seeds | tokens/s, LUCID / softmax |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for position, head_dim in dict.fromkeys((r["position"], r["head_dim"]) for r in rows):
            mine = [r for r in rows if (r["position"], r["head_dim"], r["step"]) == (position, head_dim, last)]  # fmt: skip
            sides = {a: [r for r in mine if r["attention"] == a] for a in ("softmax", "lucid")}
            said = ["{:.4f} ± {:.4f}".format(*spread_of(s, "loss")) if s else "" for s in sides.values()]  # fmt: skip
            gap = paired(sides["lucid"], sides["softmax"], "loss")
            text = f"**{gap}**" if gap.counts else str(gap)
            rates = [sum(r["tokens_per_s"] for r in s) / len(s) if s else math.nan for s in sides.values()]  # fmt: skip
            need = gap.seeds_to_resolve
            lines.append(f"| {position} | {head_dim} | {said[0]} | {said[1]} | {text} | {need:g} | {rates[1] / rates[0]:.2f} |")  # fmt: skip
        return "\n".join(lines) + "\n"

    def plot(self, rows: list[Row]) -> bytes:
        """Held-out loss against steps, a panel for each setting, a line for each seed."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        settings = list(dict.fromkeys((r["position"], r["head_dim"]) for r in rows))
        figure, axes = plt.subplots(1, len(settings), figsize=(3.4 * len(settings), 3.2), squeeze=False, layout="constrained")  # fmt: skip
        for axis, (position, head_dim) in zip(axes[0], settings, strict=True):
            for attention, colour in (("softmax", "#56b4e9"), ("lucid", "#d55e00")):
                curves: dict[int, list[tuple[float, float]]] = {}
                for r in rows:
                    if (r["position"], r["head_dim"], r["attention"]) == (position, head_dim, attention):  # fmt: skip
                        curves.setdefault(r["seed"], []).append((r["step"], r["loss"]))
                for number, curve in enumerate(curves.values()):
                    axis.plot(*zip(*sorted(curve), strict=True), color=colour, lw=1, marker="o", ms=3, label=None if number else attention)  # fmt: skip
            axis.set(title=f"{position}, heads of {head_dim}", xlabel="step")
            axis.grid(alpha=0.3)
        axes[0, 0].set_ylabel("held-out loss")
        axes[0, 0].legend(frameon=False)
        return as_png(figure)
