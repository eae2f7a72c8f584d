"""Moving a trained softmax model to LUCID: at once, by a schedule, with a learned strength, in some layers only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from lucid_attention.hf import strengths
from lucid_attention.train import TrainConfig

from .experiment import Cell, Experiment, Row, Workplace
from .figures import as_png, legend, panels, seed_lines
from .language import settings, text_model, text_steps, train_cell
from .statistics import COUNTS, paired, said, several_texts

__all__ = ["Moving"]

WAYS: dict[str, dict[str, Any]] = {
    "softmax": {"attention": "softmax"},
    "abrupt": {},
    "schedule": {"strength_steps": 0.6},
    "learned": {"strength": "learned", "strength_learning_rate": 2e-2},
    "half": {"lucid_layers": "half"},
}
"""How the training goes on; a schedule's steps are a share of it. At its rate a learned strength could be 1 as early as the
scheduled one is."""


class Moving(Experiment):
    """A softmax model of 34M parameters, trained on 29M tokens, and then on 18 % more in every way."""

    name = "moving"
    claim = "a trained softmax model can be moved to LUCID; a schedule or a learned strength avoids the jump"
    gpu_minutes = 6.0
    measured = True
    cpu_minutes = None
    version = 5
    per_seed = True

    def cells(self, tiny: bool) -> list[Cell]:
        """All ways of one model in one cell: they begin from the same checkpoint."""
        return [{"position": position} for position in (("nope",) if tiny else ("rope", "nope"))]

    def lengths(self, tiny: bool) -> tuple[int, int]:
        """Steps of softmax, and of going on."""
        return text_steps(tiny), 4 if tiny else 160

    def steps(self, cell: Cell, tiny: bool) -> int:
        first, then = self.lengths(tiny)
        return first + len(WAYS) * then

    def run(self, cell: Cell, seeds: Sequence[int], place: Workplace, tick: Callable[[int], None]) -> list[Row]:  # fmt: skip
        first, then = self.lengths(place.tiny)
        seed = seeds[0]
        base = text_model(place, first, seed, tick, attention="softmax", position=cell["position"])
        config = settings(place)
        every = then if place.tiny else then // 8
        planned = {*range(0, then, every), then}
        rows: list[Row] = []
        for way, given in WAYS.items():
            changes = dict(given)
            if "strength_steps" in changes:
                changes["strength_steps"] = max(1, round(changes["strength_steps"] * then))
            if "lucid_layers" in changes:
                changes["lucid_layers"] = tuple(range(1, config.layers, 2))
            moved = TrainConfig(
                tokens_of=config.tokens_of, init_from=str(base.folder), length=config.length,
                validation_share=config.validation_share, document_masks=False, **changes,
            )  # fmt: skip
            # Evaluated before the first step too: what the switch itself costs.
            log = train_cell(
                place, moved, then, seed + 1000, place.work / way, tick,
                eval_on_start=True, eval_steps=every, warmup_steps=0.1,
                torch_compile=False,  # takes longer than it saves in so few steps
            )  # fmt: skip
            about = {
                "seed": seed,
                "way": way,
                "corpus": base.facts["corpus"],
                **_strength(place.work / way, way),
            }
            rows.append({**about, "step": -1, "loss": base.loss})
            # A training that an earlier version went on with was evaluated there, too: what was found first counts.
            losses = {int(e["step"]): e["eval_loss"] for e in reversed(log) if "eval_loss" in e}
            rows += [{**about, "step": step, "loss": losses[step]} for step in sorted(planned)]
        return rows

    def summary(self, rows: list[Row]) -> str:
        """Losses after the switch and at the end, paired with softmax that trained on."""
        last = max(row["step"] for row in rows)
        lines = [
            "# Moving a softmax model to LUCID",
            "",
            f"Held-out loss, nats a token: before, switched and untrained, and after {last} more steps; mean ± standard deviation over seeds; "
            f"against softmax that trained on: {COUNTS}. Strength: at the end, the mean over KV heads of LUCID layers; its lowest and its highest.",
            "",
            f"| position | way | before | switched | after {last} | way - softmax | strength |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for position in dict.fromkeys(row["position"] for row in rows):
            for way in WAYS:
                mine = [r for r in rows if (r["position"], r["way"]) == (position, way)]
                stages = [[r for r in mine if r["step"] == step] for step in (-1, 0, last)]
                rival = [r for r in rows if (r["position"], r["way"], r["step"]) == (position, "softmax", last)]  # fmt: skip
                gap = "" if way == "softmax" else paired(stages[2], rival, "loss").said(with_seeds=True)  # fmt: skip
                losses = " | ".join(said(stage, "loss", 4) for stage in stages)
                strength = ""
                if mine and way != "softmax":
                    low, high = (
                        min(r["strength_low"] for r in mine),
                        max(r["strength_high"] for r in mine),
                    )
                    strength = f"{said(stages[2], 'strength')} ({low:.3f} to {high:.3f})"
                lines.append(f"| {position} | {way} | {losses} | {gap} | {strength} |")
        return "\n".join([*lines, *several_texts(rows)]) + "\n"

    def plot(self, rows: list[Row]) -> bytes:
        """Held-out loss against steps after the switch, every seed a line."""
        positions = list(dict.fromkeys(row["position"] for row in rows))
        colours = dict(zip(WAYS, ("#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#e69f00"), strict=True))  # fmt: skip
        figure, axes = panels(len(positions), width=5, height=3.8)
        for axis, position in zip(axes, positions, strict=True):
            for way, colour in colours.items():
                mine = [r for r in rows if (r["position"], r["way"]) == (position, way) and r["step"] >= 0]  # fmt: skip
                seed_lines(axis, mine, "step", "loss", label=way, color=colour, marker="o", ms=3)
            axis.set(title=position, xlabel="steps after the switch")
        axes[0].set_ylabel("held-out loss")
        legend(axes)
        return as_png(figure)


def _strength(folder: Path, way: str) -> dict[str, float]:
    """Of LUCID at the end: a strength that hardly moved is softmax, whatever its loss."""
    if way == "softmax":
        return {"strength": 0.0, "strength_low": 0.0, "strength_high": 0.0}
    found = strengths(AutoModelForCausalLM.from_pretrained(folder / "run" / "model"))
    return {"strength": found.mean().item(), "strength_low": found.min().item(), "strength_high": found.max().item()}  # fmt: skip
