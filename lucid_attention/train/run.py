"""A training from its configuration to its checkpoint."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

from lucid_attention.hf import StrengthSchedule, disable
from lucid_attention.results import FolderError

from . import configuration
from .configuration import (
    TrainConfig,
    TrainError,
    as_yaml,
    changed,
    read_yaml,
    split,
    training_arguments,
)
from .cost import flops_per_token, parameters, peak_flops
from .folder import (
    BEGUN,
    PROSE,
    absolute,
    agreed,
    check_unchanged,
    keep_model,
    last_checkpoint,
    new_folder,
    processes_of,
    said_once,
    set_aside_unfinished,
    take_back,
    write_whole,
)
from .model import build_model, can_fuse, check_fused_layers, use_fused_layers, use_fused_loss
from .precision import precision_kept
from .progress import Meter, ProgressLine, StopOnSignal, write_curves
from .tasks import MemoryRows, NeedleRows, read_prose
from .text import check_outside, check_tokenizer, documents_of, load_tokenizer
from .tokens import Rows, Shuffled, Tokens, write_tokens
from .trainer import (
    MeteredTrainer,
    accuracy,
    check_optimisation,
    check_strength,
    likeliest,
    stack,
)

__all__ = ["Outcome", "continue_training", "describe", "train"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How a training ended.

    Attributes:
        folder: of the run.
        step: optimiser steps done.
        finished: all of them.
        model: the trained checkpoint, a Hugging Face folder; None until all steps are done.
        loss: the last held-out loss, NaN without held-out data.
    """

    folder: Path
    step: int
    finished: bool
    model: Path | None
    loss: float


@precision_kept()
def train(
    config: TrainConfig,
    arguments: dict[str, Any] | None = None,
    *,
    out: Path | None = None,
    say: Say = lambda line: print(line, file=sys.stderr),
    quiet: bool = False,
) -> Outcome:
    """Train a language model with transformers' Trainer.

    In the folder: ``config.yaml``, ``tokenizer/``, ``data/`` (the tokens), ``checkpoint-STEP/`` (all that a run needs to go
    on), ``log.csv``, ``loss.png``, ``runs/`` (tensorboard) and, at the end, ``model/``: a Hugging Face checkpoint, of the LUCID
    class or, for softmax attention, of the stock class. Of fewer steps it is kept as ``model-before-step-N``. ``prose.txt`` is the
    user's prose of the task needles.

    Args:
        config: model, attention, data.
        arguments: of `transformers.TrainingArguments`.
        out: the folder, new or empty; None makes ``results/train-YYYYmmdd-HHMMSS``.
        say: is given lines for the user.
        quiet: no progress bars.

    Returns:
        An `Outcome`. After Ctrl-C or SIGTERM it is not finished, and `continue_training` goes on.

    Raises:
        TrainError, FolderError: before anything is trained: the configuration, the data or the folder; after it: the
            training diverged, so that no model is written.

    Example:
        >>> import tempfile, pathlib
        >>> from lucid_attention.train import TrainConfig, train
        >>> config = TrainConfig(task="memory", layers=1, width=32, head_dim=16, length=32)
        >>> arguments = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True}
        >>> folder = pathlib.Path(tempfile.mkdtemp(), "run")
        >>> outcome = train(config, arguments, out=folder, say=lambda line: None, quiet=True)
        >>> outcome.finished, sorted(p.name for p in outcome.model.iterdir())
        (True, ['config.json', 'generation_config.json', 'model.safetensors'])
    """
    given = dict(arguments or {})
    out = None if out is None else Path(out)
    state = PartialState()
    with said_once(state):
        # What is wrong with the settings, before a folder is made and a text is read.
        asked = training_arguments(given, Path("unused"), validate=False)
        check_fused_layers(config.fused_layers, compiled=asked.torch_compile)
        check_strength(config, asked, None)
        config = absolute(config)
        written = as_yaml(config, given)
        can_fuse("fused_loss", config.fused_loss, asked.device)
        can_fuse("fused_layers", config.fused_layers, asked.device)
        _sketch(config)
    made = out is None or not out.exists()
    with said_once(state):
        if state.is_main_process:
            out = new_folder(out, state.num_processes)
            # At once: whatever stops the run from here on, it can go on.
            write_whole(out / "config.yaml", written)
            write_whole(out / BEGUN, written)
    out = agreed(out, state)
    try:
        run = _Run(config, given, out, say, quiet)
        trainer = run.trainer()
    except (TrainError, FolderError):
        if state.is_main_process:
            take_back(out, made)
        raise
    return run(trainer, None)


@precision_kept()
def continue_training(
    folder: Path,
    changes: Iterable[str] = (),
    *,
    say: Say = lambda line: print(line, file=sys.stderr),
    quiet: bool = False,
) -> Outcome:
    """Go on with a run that was stopped or killed, from its last whole checkpoint, as if nothing had happened.

    Order of the data, weights, optimiser, schedule and random numbers are those of the uninterrupted run.

    Args:
        folder: of the run.
        changes: ``"key=value"`` for settings that change nothing that was done (`configuration.CHANGEABLE`).
        say, quiet: as for `train`.

    Raises:
        TrainError: no such run, or a setting that may not change, by ``changes`` or in ``config.yaml`` by hand.
    """
    folder = Path(folder)
    path = folder / "config.yaml"
    if not path.is_file():
        raise TrainError(f"{folder}: is no folder of lucid train (it has no config.yaml)")
    new = changed(changes)
    for name in new:
        if name not in configuration.CHANGEABLE:
            raise TrainError(
                f"{name}: cannot change when a training goes on; what can: {', '.join(configuration.CHANGEABLE)}"
            )
    content = {**read_yaml(path), **new}
    state = PartialState()
    processes = processes_of(folder)
    if processes not in (None, state.num_processes):
        raise TrainError(
            f"{folder}: was trained by {processes} processes, got {state.num_processes}: another number would see other rows"
        )
    check_unchanged(folder, content)
    config, given = split(content)
    arguments = training_arguments(given, folder, validate=False)
    checkpoint = last_checkpoint(folder, say if state.is_main_process else lambda line: None)
    check_strength(config, arguments, checkpoint)
    done = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
    if done > arguments.max_steps:
        raise TrainError(f"max_steps: {done} steps are done already, got {arguments.max_steps}")
    run = _Run(config, given, folder, say, quiet, checkpoint)
    trainer = run.trainer()
    if state.is_main_process:
        set_aside_unfinished(folder)
        if new:
            write_whole(path, as_yaml(config, given))
    state.wait_for_everyone()
    return run(trainer, checkpoint)


@precision_kept()
def describe(config: TrainConfig, given: dict[str, Any]) -> list[str]:
    """What would be trained, without data or weights: parameters, flops, tokens.

    Raises:
        TrainError: as `train`.
    """
    # Counted here, trained elsewhere: this machine need not have what it takes.
    here = {name: value for name, value in given.items() if name not in ("bf16", "fp16", "tf32")}
    arguments = training_arguments({**here, "use_cpu": True}, Path("unused"), validate=False)
    check_fused_layers(config.fused_layers, compiled=arguments.torch_compile)
    return _facts(_sketch(config), config, arguments)


def _sketch(config: TrainConfig) -> Any:
    """The model without weights."""
    vocabulary = config.vocabulary
    if config.init_from is not None:
        vocabulary = 0
    elif config.task == "memory":
        vocabulary = MemoryRows(config.task_options, config.length, seed=0).vocabulary
    elif config.tokenizer != "train":
        vocabulary = len(load_tokenizer(config))
    return build_model(config, vocabulary, seed=0, device="meta")


def prepare_tokens(
    config: TrainConfig, folder: Path, *, say: Say = lambda line: None, quiet: bool = False
) -> tuple[Any, Tokens]:
    """A run's tokenizer and tokens: those in its folder, or copied, or made now.

    Raises:
        TrainError: the text, the tokenizer or the earlier run cannot be used.
    """
    data, place = folder / "data", folder / "tokenizer"
    if not (data / "tokens.json").is_file():
        if config.tokens_of is not None:
            source = Path(config.tokens_of)
            if not (source / "data" / "tokens.json").is_file():
                raise TrainError(f"tokens_of {source}: is no folder of lucid train with its tokens")
            shutil.copytree(source / "tokenizer", place, dirs_exist_ok=True)
            # Whole or not there: a copy that was cut off would be other data.
            partial = folder / ".data.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source / "data", partial)
            shutil.rmtree(data, ignore_errors=True)
            partial.rename(data)
        else:
            say("reading the text")
            check_outside(config.text, folder)
            made = load_tokenizer(config)
            made.save_pretrained(place)
            write_tokens(documents_of(config), made, data, quiet=quiet)
    return AutoTokenizer.from_pretrained(place), Tokens.load(data)


class _Run:
    """Everything that `Trainer` needs, made and checked."""

    def __init__(
        self,
        config: TrainConfig,
        given: dict[str, Any],
        out: Path,
        say: Say,
        quiet: bool,
        checkpoint: Path | None = None,
    ) -> None:
        self.config, self.given, self.out, self.quiet = config, given, out, quiet
        self.state = PartialState()
        self.stop = StopOnSignal()
        self.say = say if self.state.is_main_process else lambda line: None
        seed = int(given.get("seed", 1))
        self.tokenizer: Any = None
        self.training: Any
        self.held_out: Any
        if config.task == "memory":
            options, length = config.task_options, config.length
            self.training = MemoryRows(options, length, seed=seed)
            self.held_out = MemoryRows(options, length, seed=seed, validation=True)
            vocabulary = self.training.vocabulary
        elif config.task == "needles":
            with said_once(self.state):
                if self.state.is_main_process and not (out / "tokenizer").is_dir():
                    load_tokenizer(config).save_pretrained(out / "tokenizer")
                options = self._task_options()
            self.tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
            with said_once(self.state):
                arguments = (options, config.length, self.tokenizer)
                self.training = NeedleRows(*arguments, seed=seed)
                self.held_out = NeedleRows(*arguments, seed=seed, validation=True)
            vocabulary = len(self.tokenizer)
        else:
            # The main process makes the tokens, the others find them.
            with said_once(self.state):
                if self.state.is_main_process:
                    prepare_tokens(config, out, say=self.say, quiet=quiet)
            self.tokenizer, tokens = prepare_tokens(config, out, quiet=True)
            with said_once(self.state):
                self.training, self.held_out = self._rows(tokens)
            assert self.tokenizer is not None
            vocabulary = len(self.tokenizer)
            if self.config.tokenizer == "train" and self.config.init_from is None:
                vocabulary = max(vocabulary, config.vocabulary)
        with said_once(self.state):
            self.arguments = training_arguments(self.given, out, validate=self.held_out is not None)
            if checkpoint is None:
                check_tokenizer(config, self.tokenizer)
        # A run that goes on has all of its model, whatever became of the checkpoint it began from.
        begun = config
        if checkpoint is not None and config.init_from is not None:
            begun = replace(config, init_from=str(checkpoint), rope_theta=None)
        compiled = self.arguments.torch_compile
        if compiled:
            # It keeps a few variants of a layer in a process, and would then run the next one uncompiled.
            torch.compiler.reset()
            if config.fused_layers == "auto" and find_spec("liger_kernel") is not None:
                self.say("fused_layers: none, torch_compile fuses the same")
        with said_once(self.state):
            self.model: Any = build_model(begun, vocabulary, seed=seed, tokenizer=self.tokenizer)
            loss = use_fused_loss(self.model, config.fused_loss, self.arguments.device)
            use_fused_layers(self.model, config.fused_layers, self.arguments.device, compiled=compiled)  # fmt: skip
        for line in _facts(self.model, config, self.arguments):
            self.say(line)
        # The rows of a task are drawn one by one, so that any order will do.
        self.shuffled = Shuffled(self.training, seed) if config.task is None else self.training
        if config.task is None:
            unique = len(self.training) * config.length
            seen = self.arguments.max_steps * self._tokens_per_step()
            self.say(f"data: {unique:,} tokens to train on, seen {seen / unique:.2f} times")
        if loss == "none" and config.length * vocabulary > 1 << 29:
            gib = 4 * config.length * vocabulary / 2**30
            self.say(f"the logits of a row are {gib:.1f} GiB: liger-kernel would not form them")

    def trainer(self) -> MeteredTrainer:
        """What trains.

        Raises:
            TrainError: transformers finds only now that it cannot: an optimiser, a schedule, a reporter.
        """
        peak = peak_flops(self.arguments.device)
        meter = Meter(
            self._tokens_per_step(),
            flops_per_token(self.model, self.config.length, is_lucid=_is_lucid(self.config))[
                "total"
            ],
            peak and peak * self.arguments.world_size,
        )
        callbacks: list[Any] = [ProgressLine(quiet=self.quiet)]
        if self.state.num_processes == 1:
            callbacks.append(self.stop)
        if self.config.attention == "lucid" and self.config.strength_steps:
            strength = self.config.strength
            assert not isinstance(strength, str)
            callbacks.append(StrengthSchedule(0.0, strength, steps=self.config.strength_steps))
        asks = self.config.task is not None
        try:
            check_optimisation(self.arguments, self.model)
            with _compiled_by_layer():
                trainer = MeteredTrainer(
                    model=self.model,
                    args=self.arguments,
                    train_dataset=self.shuffled,
                    eval_dataset=self.held_out,
                    processing_class=self.tokenizer,
                    data_collator=stack,
                    callbacks=callbacks,
                    compute_metrics=accuracy if asks else None,
                    preprocess_logits_for_metrics=likeliest if asks else None,
                )
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise TrainError(f"TrainingArguments: {' '.join(str(error).split())}") from error
        trainer.remove_callback(PrinterCallback)
        disable_progress_bar()  # of each file that is written
        trainer.meter = meter
        learned = self.config.strength == "learned"
        trainer.strength_moves = learned or bool(self.config.strength_steps)
        trainer.strength_learning_rate = self.config.strength_learning_rate if learned else None
        return trainer

    def __call__(self, trainer: MeteredTrainer, checkpoint: Path | None) -> Outcome:
        start = None if checkpoint is None else str(checkpoint)
        done = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
        if checkpoint is not None:
            self.say(f"going on from {checkpoint.name}")
            if done == self.arguments.max_steps:
                # transformers would take one more step before it looks.
                return self._finished(trainer, checkpoint)
            # It was done when the run began, and is in the log.
            trainer.args.eval_on_start = False
        if self.state.is_main_process and (kept := keep_model(self.out, done)):
            self.say(f"the model of fewer steps is kept: {kept}")
        try:
            with self.stop if self.state.num_processes == 1 else contextlib.nullcontext():
                trainer.train(resume_from_checkpoint=start)
        finally:
            if self.state.is_main_process and trainer.state.log_history:
                write_curves(trainer.state.log_history, self.out, self._title())
        step = trainer.state.global_step
        finished = step >= self.arguments.max_steps
        losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
        model = self._save(trainer) if finished else None
        if not finished:
            self.say(
                f"stopped at step {step} of {self.arguments.max_steps}; lucid train --resume {self.out} goes on"
            )
        return Outcome(self.out, step, finished, model, losses[-1] if losses else math.nan)

    def _task_options(self) -> dict[str, Any] | None:
        """With the prose as it was when the run began, from the run's folder."""
        options = self.config.task_options
        prose = (options or {}).get("prose")
        if options is None or prose is None:
            return options
        held = self.out / PROSE
        if self.state.is_main_process and not held.is_file():
            write_whole(held, read_prose(prose))
        return {**options, "prose": str(held)}

    def _rows(self, tokens: Tokens) -> tuple[Rows, Rows | None]:
        total = len(tokens.ids)
        length, share = self.config.length, self.config.validation_share
        cut = total - (max(length, round(total * share)) if share else 0)
        masks = self.config.document_masks
        training = Rows(tokens.part(0, max(cut, 0)), length, document_masks=masks)
        batch = self.arguments_batch()
        if cut < 0 or len(training) < batch:
            held = f", {total - cut:,} of them held out" if share else ""
            raise TrainError(
                f"text: is too short, {total:,} tokens{held}: expected at least {batch} rows of {length} to train on (one "
                "batch); give more text, or a smaller length or batch"
            )
        held_out = Rows(tokens.part(cut, total), length, document_masks=masks) if share else None
        return training, held_out

    def _finished(self, trainer: MeteredTrainer, checkpoint: Path) -> Outcome:
        """All steps are done; the model may not have been saved."""
        model = self.out / "model"
        if not model.is_dir():
            trainer._load_from_checkpoint(str(checkpoint))
            model = self._save(trainer)
        history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        if self.state.is_main_process:
            write_curves(history, self.out, self._title())
        losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        loss = losses[-1] if losses else math.nan
        return Outcome(self.out, self.arguments.max_steps, True, model, loss)

    def arguments_batch(self) -> int:
        """Rows in a step of this process."""
        return training_arguments(self.given, self.out, validate=False).train_batch_size

    def _tokens_per_step(self) -> int:
        a = self.arguments
        rows = a.train_batch_size * a.gradient_accumulation_steps * a.world_size
        return rows * self.config.length

    def _title(self) -> str:
        size = self.config.attention
        return f"{size}, {parameters(self.model)['total'] / 1e6:.1f}M parameters"

    def _save(self, trainer: Trainer) -> Path:
        """``model/``, whole or not there."""
        target, partial = self.out / "model", self.out / ".model.partial"
        weights: Any = trainer.model
        if not all(bool(weight.isfinite().all()) for weight in weights.parameters()):
            raise TrainError(
                f"{self.out}: the training diverged, the weights are not finite, and no model was written; log.csv says since "
                "when; begin again with a lower learning_rate, or a longer warmup"
            )
        trainer.save_model(str(partial))
        if self.state.is_main_process:
            if self.config.attention == "softmax":
                stock = disable(AutoModelForCausalLM.from_pretrained(partial))
                shutil.rmtree(partial)
                stock.save_pretrained(partial)  # type: ignore[operator]
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(partial)
            (partial / "training_args.bin").unlink(missing_ok=True)
            keep_model(self.out, self.arguments.max_steps)
            partial.rename(target)
        self.state.wait_for_everyone()
        return target


@contextlib.contextmanager
def _compiled_by_layer() -> Iterator[None]:
    """What ``torch_compile`` compiles is a layer, once for all layers, and each of the other parts by itself, not the model around
    them: it takes seconds instead of minutes, and leaves liger-kernel's loss alone, which reads a number back. accelerate's
    plugin has an argument for it, which transformers' Trainer does not pass on; so accelerate is told by its variable.
    """
    name = "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _facts(model: Any, config: TrainConfig, arguments: TrainingArguments) -> list[str]:
    """Lines about the model and the training."""
    count = parameters(model)
    flops = flops_per_token(model, config.length, is_lucid=_is_lucid(config))
    rows = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    per_step = rows * config.length
    c = model.config
    total = per_step * arguments.max_steps
    strength = "learned" if config.strength == "learned" else f"{config.strength:g}"
    everywhere = "" if arguments.world_size == 1 else f" on {arguments.world_size} processes"
    kind = "softmax" if config.attention == "softmax" else f"LUCID (strength {strength})"
    return [
        f"model: {kind}, {count['total']:,} parameters: {c.num_hidden_layers} layers of width {c.hidden_size}, "
        f"{c.num_attention_heads} heads ({c.num_key_value_heads} KV) of {getattr(c, 'head_dim', None) or c.hidden_size // c.num_attention_heads}, "
        f"MLP {c.intermediate_size}, vocabulary {c.vocab_size:,}, {'no position encoding' if getattr(c, 'no_rope_layers', None) is not None and not any(c.no_rope_layers) else 'RoPE'}",
        f"training: {arguments.max_steps:,} steps of {rows} x {config.length:,} tokens{everywhere}, {total:,} in all",
        f"flops a token: {flops['total']:.3g} (matrices {flops['matmul'] / flops['total']:.0%}, attention "
        f"{flops['attention'] / flops['total']:.0%}, solve {flops['solve'] / flops['total']:.0%}); "
        f"{flops['total'] * total:.3g} in all",
        f"weights, gradients and AdamW's moments in float32: {16 * count['total'] / 2**30:.2f} GiB, activations not counted",
    ]


def _is_lucid(config: TrainConfig) -> bool:
    """At the end of the training, whatever a schedule begins with."""
    return config.attention == "lucid" and config.strength != 0.0
