"""What a training says while it runs, and the curves it leaves."""

from __future__ import annotations

import csv
import math
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["Meter", "ProgressLine", "StopOnSignal", "write_curves"]


class Meter:
    """Tokens a second, share of the peak and memory between two logs, what else took time left out."""

    def __init__(self, tokens_per_step: int, flops_per_token: float, peak: float | None) -> None:
        self.tokens_per_step, self.flops_per_token, self.peak = (
            tokens_per_step,
            flops_per_token,
            peak,
        )
        self.step: int | None = None
        self.since = self.elsewhere = 0.0

    def start(self, step: int) -> None:
        """Training goes on from here."""
        self.step, self.since, self.elsewhere = step, time.perf_counter(), 0.0

    def leave_out(self, seconds: float) -> None:
        """So long something else was done: an evaluation, a checkpoint."""
        self.elsewhere += seconds

    def read(self, step: int, device: torch.device) -> dict[str, float]:
        """Since the last reading; a log waits for the device, so the host's clock will do."""
        if self.step is None or step <= self.step:
            return {}
        now = time.perf_counter()
        seconds = max(now - self.since - self.elsewhere, 1e-9)
        rate = (step - self.step) * self.tokens_per_step / seconds
        found = {"tokens_per_s": rate}
        if self.peak is not None:
            found["mfu"] = rate * self.flops_per_token / self.peak
        if device.type == "cuda":
            found["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        self.start(step)
        return found


class ProgressLine(TrainerCallback):
    """One line: steps, the last losses, tokens a second, share of the peak, memory."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.bar: Any = None
        self.shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        hidden = self.quiet or not state.is_world_process_zero
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit="step", disable=hidden or None
        )  # fmt: skip

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self.bar is None:
            return  # an evaluation before training
        for name, text in (
            ("loss", "{:.3f}"),
            ("eval_loss", "{:.3f}"),
            ("eval_accuracy", "{:.3f}"),
            ("strength", "{:.3f}"),
            ("tokens_per_s", "{:,.0f}"),
            ("mfu", "{:.1%}"),
            ("memory_gib", "{:.1f}"),
        ):
            if name in (logs or {}):
                short = {"tokens_per_s": "tokens/s", "memory_gib": "GiB"}.get(name, name)
                self.shown[short] = text.format((logs or {})[name])
        self.bar.set_postfix(self.shown)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar.close()


class StopOnSignal(TrainerCallback):
    """Ctrl-C or a scheduler's SIGTERM: the step in progress is finished and saved; the second time ends at once.

    In one process only: several would stop at different steps and wait for each other for ever.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write("stopping after this step; again to stop at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.asked:
            control.should_save = True
            control.should_training_stop = True


COLUMNS = ("step", "loss", "eval_loss", "eval_accuracy", "strength", "learning_rate", "grad_norm", "tokens_per_s", "mfu", "memory_gib")  # fmt: skip


def write_curves(history: list[dict[str, float]], folder: Path, title: str) -> None:
    """``log.csv`` and, of two points or more, ``loss.png``."""
    rows = [entry for entry in history if "loss" in entry or "eval_loss" in entry]
    partial = folder / ".log.csv.partial"
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(folder / "log.csv")
    lines = {
        label: [(r["step"], r[name]) for r in rows if math.isfinite(r.get(name, math.nan))]
        for name, label in (("loss", "training"), ("eval_loss", "held out"))
    }
    if all(len(points) < 2 for points in lines.values()):
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    for (label, points), colour in zip(lines.items(), ("#999999", "#d55e00"), strict=True):
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, label=label, lw=1.5)
    axis.set(xlabel="step", ylabel="loss, nats a token", title=title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=150)
    plt.close(figure)
