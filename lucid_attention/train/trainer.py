"""Transformers' Trainer, with tokens a second in its logs and a rate for learned strengths; what it does with rows and with answers."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, get_scheduler

from lucid_attention.hf import strengths
from lucid_attention.hf.strength import LearnedStrength

from .configuration import TrainConfig, TrainError
from .progress import Meter

__all__ = [
    "MeteredTrainer",
    "accuracy",
    "check_optimisation",
    "check_strength",
    "likeliest",
    "stack",
]

_LOSSES = "training_loss.json"


def check_optimisation(arguments: TrainingArguments, model: Any) -> None:
    """That there are such an optimiser and such a schedule; raises what transformers would raise when the run has begun."""
    Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=torch.optim.SGD([torch.zeros(1)], lr=1.0),
        num_warmup_steps=arguments.get_warmup_steps(arguments.max_steps),
        num_training_steps=arguments.max_steps,
        scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
    )


class MeteredTrainer(Trainer):
    """The Trainer, with tokens a second in its logs.

    Attributes:
        strength_moves: whether the logs have the mean strength too.
        strength_learning_rate: of learned strengths; None: there are none.
    """

    meter: Meter
    strength_moves: bool = False
    strength_learning_rate: float | None = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.meter.read(self.state.global_step, self.args.device))
            if self.strength_moves:
                logs["strength"] = strengths(self.model).mean().item()
        super().log(logs, start_time)

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """Without a loss for rows that ask for nothing, whose mean would be NaN and all others' with it."""
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        # Other processes would wait for the loss.
        if isinstance(labels, Tensor) and self.args.world_size == 1:
            loss = loss if bool((labels[:, 1:] != -100).any()) else None
        return loss, logits, labels

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """With the learned strengths in a group of their own, after the others: the first group's rate is the one that is logged."""
        made = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.strength_learning_rate is not None and made:
            named = (self.model if model is None else model).named_parameters()
            own = {id(p): p for name, p in named if name.endswith(LearnedStrength.PARAMETER) and p.requires_grad}  # fmt: skip
            found = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if not own.keys() <= found:
                raise TrainError(
                    f"optim: {self.args.optim} has no groups of parameters, so that a learned strength cannot have its own rate; "
                    "take another, such as adamw_torch, or a strength that is a number"
                )
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in own]
            optimizer.add_param_group({"params": list(own.values()), "lr": self.strength_learning_rate, "weight_decay": 0.0})  # fmt: skip
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.meter.step is None:
            self.meter.start(self.state.global_step)
        return super().training_step(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with _LeftOut(self.meter):
            return super().evaluate(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """The cache is off while training only: whoever loads a checkpoint wants to generate."""
        self.model.config.use_cache = True
        try:
            super().save_model(*args, **kwargs)
        finally:
            self.model.config.use_cache = self.args.use_cache

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with _LeftOut(self.meter):
            super()._save_checkpoint(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """And the losses since the last that was logged, which transformers forgets: the next would be of fewer steps."""
        super()._save_rng_state(output_dir)
        unsaid = self.accelerator.gather(self._tr_loss.detach()).mean().item()
        if self.args.should_save:
            kept = {"sum": unsaid, "since": self._globalstep_last_logged, "total": self._total_loss_scalar}  # fmt: skip
            (Path(output_dir) / _LOSSES).write_text(json.dumps(kept))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Where a training goes on, before its first step."""
        super()._load_rng_state(checkpoint)
        path = None if checkpoint is None else Path(checkpoint) / _LOSSES
        if path is not None and path.is_file():
            kept = json.loads(path.read_text())
            self._tr_loss.fill_(kept["sum"])
            self._globalstep_last_logged = kept["since"]
            self._total_loss_scalar = kept["total"]


def check_strength(
    config: TrainConfig, arguments: TrainingArguments, checkpoint: Path | None
) -> None:
    """Where a learned strength cannot be trained.

    Raises:
        TrainError: before anything is made or changed.
    """
    if config.strength != "learned":
        return
    remedy = "give a number, or strength_steps"
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    half = arguments.bf16 or arguments.fp16 or precision not in ("", "no")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1") and half:
        raise TrainError(
            f"strength: learned cannot be trained by FSDP in mixed precision, which would round it; {remedy}, or train in float32"
        )
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1")
    if deepspeed or arguments.deepspeed:
        raise TrainError(
            f"strength: learned has a learning rate of its own, which DeepSpeed's optimiser does not take; {remedy}"
        )
    saved = None if checkpoint is None else checkpoint / "optimizer.pt"
    if saved is not None and saved.is_file():
        groups = torch.load(saved, map_location="cpu", mmap=True, weights_only=True)["param_groups"]
        if len(groups) < 3:
            raise TrainError(
                "strength: this run is of an earlier version, in which a learned strength had the rate of all parameters; begin it anew"
            )


class _LeftOut:
    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def __enter__(self) -> None:
        self.since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.meter.leave_out(time.perf_counter() - self.since)


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def likeliest(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(-1)


def accuracy(prediction: Any) -> dict[str, float]:
    likeliest, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    asked = labels != -100
    return {"accuracy": float(np.mean(likeliest[asked] == labels[asked]))}
