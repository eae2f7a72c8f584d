"""Language-model loss by attention, head size and position encoding: a Llama of 34 million parameters, twins on the same rows."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lucid_attention.train import TrainConfig, TrainError, train
from lucid_attention.train.run import continue_training, prepare_tokens

from .corpus import corpus_id, write_corpus
from .experiment import Cell, Experiment, Row, paired, spread_of

__all__ = ["LanguageModel", "settings", "train_cell"]


def settings(tiny: bool, shared: Path, **changes: Any) -> TrainConfig:
    """34M parameters (8 layers of width 512, 16K tokens of vocabulary, tied), 2048 tokens a row.

    ``shared`` holds the corpus' tokens, which are made once.
    """
    size: dict[str, Any] = {"layers": 8, "width": 512, "vocabulary": 16384, "length": 2048, "validation_share": 0.02}  # fmt: skip
    if tiny:
        size = {"layers": 2, "width": 64, "vocabulary": 320, "length": 64, "validation_share": 0.02}
    if not (shared / "data" / "tokens.json").is_file():
        text = write_corpus(shared / "corpus.jsonl", tiny=tiny)
        prepare_tokens(TrainConfig(text=str(text), vocabulary=size["vocabulary"]), shared)
    return TrainConfig(tokens_of=str(shared), tie_embeddings=True, **{**size, **changes})


def train_cell(
    config: TrainConfig,
    steps: int,
    seed: int,
    device: torch.device,
    tiny: bool,
    work: Path,
    tick: Callable[[int], None],
    **arguments: Any,
) -> list[dict[str, float]]:
    """Train in a folder, or go on there; its log."""
    given: dict[str, Any] = {
        "max_steps": steps, "seed": seed, "per_device_train_batch_size": 2 if tiny else 32, "learning_rate": 1e-3,
        "bf16": device.type == "cuda", "use_cpu": device.type == "cpu", "report_to": "none", "eval_steps": 1.0 if tiny else 0.25,
        "save_steps": 0.25, "save_total_limit": 1, "per_device_eval_batch_size": 16, **arguments,
    }  # fmt: skip
    run = work / "run"
    quiet: dict[str, Any] = {"say": lambda line: None, "quiet": True}
    if (run / "config.yaml").is_file():
        outcome = continue_training(run, **quiet)
    else:
        outcome = train(config, given, out=run, **quiet)
    if not outcome.finished:
        raise KeyboardInterrupt  # it was stopped and saved; the next run goes on
    tick(steps)
    with (run / "log.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


class LanguageModel(Experiment):
    """Held-out loss after 59M tokens."""

    name = "language-model"
    claim = "lower loss with LUCID without position encoding (paper: .12) and with small heads (.1); with RoPE .013"
    gpu_minutes = 25.0
    cpu_minutes = None
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
        return 4 if tiny else 900

    def run(self, cell: Cell, seeds: Sequence[int], device: torch.device, tiny: bool, tick: Callable[[int], None], work: Path) -> list[Row]:  # fmt: skip
        config = settings(tiny, work.parent, attention=cell["attention"], position=cell["position"], head_dim=cell["head_dim"])  # fmt: skip
        try:
            log = train_cell(config, self.steps(cell, tiny), seeds[0], device, tiny, work, tick)
        except TrainError as error:
            raise RuntimeError(f"{cell}: {error}") from error
        rates = sorted(entry["tokens_per_s"] for entry in log if "tokens_per_s" in entry)
        rate = rates[len(rates) // 2] if rates else math.nan
        return [
            {
                "seed": seeds[0], "step": int(entry["step"]), "loss": entry["eval_loss"], "tokens_per_s": rate,
                "corpus": corpus_id(work.parent / "corpus.jsonl"),
            }
            for entry in log
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
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        plt.close(figure)
        return buffer.getvalue()
