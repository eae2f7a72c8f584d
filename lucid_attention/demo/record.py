"""Everything one run has found so far, and its JSON and CSV form."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lucid_attention.results import ResultsFolder, environment_facts
from lucid_attention.tasks.updatable_memory import VERSION as TASK_VERSION

from .configuration import DemoConfig
from .language_model import CheckpointCheck, LossCurve
from .memory import MemoryCurve

__all__ = ["DemoRecord"]


@dataclass
class DemoRecord:
    """The state of one run; :meth:`save` may be called at any time.

    Attributes:
        config: every size and the seed.
        text: name of the text.
        text_characters: how much of it is used.
        text_note: something the user should know about it, or an empty string.
        status: ``"running"`` until the end, so that a run that died says so.
        memory: finished curves.
        losses: finished curves and the one being trained.
        checkpoint: None until it was checked.
    """

    config: DemoConfig
    text: str
    text_characters: int
    text_note: str
    status: Literal["running", "complete", "interrupted"] = "running"
    memory: list[MemoryCurve] = field(default_factory=list)
    losses: list[LossCurve] = field(default_factory=list)
    checkpoint: CheckpointCheck | None = None
    environment: dict[str, Any] = field(default_factory=environment_facts)
    started: float = field(default_factory=time.perf_counter)

    def save(self, folder: ResultsFolder) -> None:
        """Write ``results.json``, ``memory.csv``, ``loss.csv`` and ``generated.txt``.

        A file whose part has not begun is left out.
        """
        folder.write_json("results.json", self._as_json())
        if self.memory:
            folder.write_csv(
                "memory.csv",
                ("attention", "positions", "length", "accuracy", "queries", "sequences"),
                (
                    (curve.attention, curve.positions, *asdict(point).values())
                    for curve in self.memory
                    for point in curve.points
                ),
            )
        if self.losses:
            folder.write_csv(
                "loss.csv",
                ("attention", "measured_on", "step", "nats_per_token"),
                (
                    (curve.attention, part, step, loss)
                    for curve in self.losses
                    for part, pairs in (("training", curve.train), ("held-out", curve.validation))
                    for step, loss in pairs
                ),
            )
        if self.checkpoint is not None:
            folder.write_text(
                "generated.txt",
                f"Prompt (from the held-out text):\n\n{self.checkpoint.prompt}\n\n"
                f"Continuation:\n\n{self.checkpoint.continuation}\n",
            )

    def _as_json(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "seconds": time.perf_counter() - self.started,
            "environment": self.environment,
            "config": asdict(self.config),
            "memory": {
                "task": "updatable_memory",
                "task_version": TASK_VERSION,
                "measured_on": "answerable queries in the last quarter of each sequence",
                "curves": [asdict(curve) for curve in self.memory],
            },
            "language_model": {
                "text": self.text,
                "text_characters": self.text_characters,
                "text_note": self.text_note,
                "loss_unit": "nats per token",
                "curves": [asdict(curve) for curve in self.losses],
                "checkpoint": None
                if self.checkpoint is None
                else {**asdict(self.checkpoint), "passed": self.checkpoint.passed},
            },
        }
