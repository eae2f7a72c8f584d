"""Does a seed give the same training twice? What a difference between two models is worth depends on it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence

import torch

from .experiment import Cell, Experiment, Row, Workplace
from .figures import COLOURS, as_png, panels, seed_lines
from .language import settings, train_cell

__all__ = ["Repeat"]

RUNS = 2


class Repeat(Experiment):
    """The 34M model with RoPE, twice from the same seed, with kernels as they come and with those that add in a fixed order."""

    name = "repeat"
    claim = "two runs of one seed differ because backward passes add in no fixed order; in a fixed order they are equal bit for bit"
    gpu_minutes = 3.0
    measured = True
    cpu_minutes = None
    version = 3
    per_seed = True

    def cells(self, tiny: bool) -> list[Cell]:
        """Both attentions, each with and without ``torch.use_deterministic_algorithms``."""
        return [
            {"attention": attention, "deterministic": deterministic}
            for deterministic, attention in itertools.product((False, True), ("softmax", "lucid"))
        ]

    def steps(self, cell: Cell, tiny: bool) -> int:
        return RUNS * self._each(tiny)

    def _each(self, tiny: bool) -> int:
        return 4 if tiny else 200

    def run(self, cell: Cell, seeds: Sequence[int], place: Workplace, tick: Callable[[int], None]) -> list[Row]:  # fmt: skip
        config = settings(place, attention=cell["attention"])
        steps = self._each(place.tiny)
        rows: list[Row] = []
        # cuBLAS asks once in a process, at its first product, whichever cell that is in.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        with _fixed_order() if cell["deterministic"] else contextlib.nullcontext():
            for run in range(1, RUNS + 1):
                folder = place.work / f"run{run}"
                log = train_cell(
                    place, config, steps, seeds[0], folder, tick, eval_steps=steps, save_steps=steps,
                    logging_steps=1 if place.tiny else 5,
                )  # fmt: skip
                weights = (folder / "run" / "model" / "model.safetensors").read_bytes()
                rates = sorted(e["tokens_per_s"] for e in log if "tokens_per_s" in e)
                about = {"seed": seeds[0], "run": run, "weights": hashlib.sha256(weights).hexdigest()[:16], "tokens_per_s": rates[len(rates) // 2] if rates else math.nan}  # fmt: skip
                rows += [
                    {**about, "kind": kind, "step": int(entry["step"]), "loss": entry[kind]}
                    for entry in log
                    for kind in ("loss", "eval_loss")
                    if kind in entry
                ]
        return rows

    def summary(self, rows: list[Row]) -> str:
        """When two runs part, and how far they get from each other."""
        lines = [
            "# Does a seed repeat?",
            "",
            f"Two runs of each seed, {max(r['step'] for r in rows)} steps. Parted: the first step in the log at which their training losses differ, the earliest of all "
            "seeds. Apart: the largest difference in a logged training loss, and the mean difference (without its sign) in the held-out loss at the end. "
            "Equal: of how many seeds the weights at the end are the same bits.",
            "",
            "| attention | adds in a fixed order | seeds | parted | apart, training | apart, held out | equal | tokens/s |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for attention, deterministic in dict.fromkeys((r["attention"], r["deterministic"]) for r in rows):  # fmt: skip
            mine = [r for r in rows if (r["attention"], r["deterministic"]) == (attention, deterministic)]  # fmt: skip
            gaps = _gaps(mine)
            parted = [step for (_, kind, step), gap in gaps.items() if kind == "loss" and gap > 0]
            training = max((gap for (_, kind, _), gap in gaps.items() if kind == "loss"), default=math.nan)  # fmt: skip
            end = max(r["step"] for r in mine)
            held_out = [gap for (_, kind, step), gap in gaps.items() if (kind, step) == ("eval_loss", end)]  # fmt: skip
            bits: dict[int, set[str]] = {}
            for r in mine:
                bits.setdefault(r["seed"], set()).add(r["weights"])
            equal = sum(len(found) == 1 for found in bits.values())
            rate = sum(float(r["tokens_per_s"]) for r in mine) / len(mine)
            when = f"step {min(parted)}" if parted else "never"
            lines.append(
                f"| {attention} | {'yes' if deterministic else 'no'} | {len(bits)} | {when} | {training:.1e} | "
                f"{sum(held_out) / max(1, len(held_out)):.1e} | {equal} of {len(bits)} | {rate:,.0f} |"
            )
        return "\n".join(lines) + "\n"

    def plot(self, rows: list[Row]) -> bytes:
        """The distance of two runs' training losses against steps, a line for each seed."""
        figure, (axis,) = panels(1, width=6, height=3.8)
        for attention, colour in COLOURS.items():
            for deterministic, style in ((False, "-"), (True, ":")):
                mine = [r for r in rows if (r["attention"], r["deterministic"]) == (attention, deterministic)]  # fmt: skip
                gaps = [{"seed": seed, "step": step, "gap": gap} for (seed, kind, step), gap in _gaps(mine).items() if kind == "loss"]  # fmt: skip
                seed_lines(axis, gaps, "step", "gap", label=f"{attention}{', fixed order' if deterministic else ''}", style=style, color=colour)  # fmt: skip
        axis.set_yscale("symlog", linthresh=1e-6)
        axis.set(xlabel="step", title="distance of the losses of two runs of a seed")
        axis.legend(frameon=False, fontsize=8)
        return as_png(figure)


def _gaps(rows: Sequence[Row]) -> dict[tuple[int, str, int], float]:
    """``|loss of run 1 - loss of run 2|`` by seed, kind and step."""
    found: dict[tuple[int, str, int], list[float]] = {}
    for r in rows:
        found.setdefault((r["seed"], r["kind"], r["step"]), []).append(float(r["loss"]))
    return {place: abs(losses[0] - losses[1]) for place, losses in found.items() if len(losses) == RUNS}  # fmt: skip


@contextlib.contextmanager
def _fixed_order() -> Iterator[None]:
    """Kernels that give the same bits every time, or an error where there is none."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
