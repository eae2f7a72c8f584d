"""A training from its configuration to its checkpoint."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
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
from lucid_attention.results import ResultsFolder, environment_facts

from . import configuration
from .configuration import TrainConfig, TrainError, as_yaml, split, training_arguments
from .cost import flops_per_token, parameters, peak_flops
from .model import build_model, use_fused_loss
from .progress import Meter, ProgressLine, StopOnSignal, write_curves
from .tasks import MemoryRows, NeedleRows
from .text import documents_of, load_tokenizer
from .tokens import Rows, Shuffled, Tokens, write_tokens
from .trainer import MeteredTrainer, accuracy, likeliest, stack

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
    class or, for softmax attention, of the stock class.

    Args:
        config: model, attention, data.
        arguments: of `transformers.TrainingArguments`.
        out: the folder, new or empty; None makes ``results/train-YYYYmmdd-HHMMSS``.
        say: is given lines for the user.
        quiet: no progress bars.

    Returns:
        An `Outcome`. After Ctrl-C or SIGTERM it is not finished, and `continue_training` goes on.

    Raises:
        TrainError, FolderError: before anything is trained: the configuration, the data or the folder.

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
    training_arguments(
        given, Path("unused"), validate=False
    )  # what is wrong with them, before a folder is made
    state = PartialState()
    if state.is_main_process:
        out = _new_folder(out)
    out = _agreed(out, state)
    try:
        run = _Run(config, given, out, say, quiet)
    except BaseException:
        if state.is_main_process:
            _remove_if_unused(out)
        raise
    return run(None)


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
        TrainError: no such run, or a setting that may not change.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise TrainError(f"{folder}: is no folder of lucid train (it has no config.yaml)")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise TrainError(f"--set {change}: expected key=value")
        if name not in configuration.CHANGEABLE:
            raise TrainError(
                f"{name}: cannot change when a training goes on; what can: {', '.join(configuration.CHANGEABLE)}"
            )
        content[name] = yaml.safe_load(value)
    config, given = split(content)
    return _Run(config, given, folder, say, quiet)(last_checkpoint(folder, say))


def describe(config: TrainConfig, given: dict[str, Any]) -> list[str]:
    """What would be trained, without data or weights: parameters, flops, tokens.

    Raises:
        TrainError: as `train`.
    """
    # Counted here, trained elsewhere: this machine need not have what it takes.
    here = {name: value for name, value in given.items() if name not in ("bf16", "fp16", "tf32")}
    arguments = training_arguments({**here, "use_cpu": True}, Path("unused"), validate=False)
    vocabulary = config.vocabulary
    if config.task == "memory":
        vocabulary = MemoryRows(config.task_options, config.length, seed=0).vocabulary
    model = build_model(
        config, vocabulary if config.init_from is None else 0, seed=0, device="meta"
    )
    return _facts(model, config, arguments)


def last_checkpoint(folder: Path, say: Say = lambda line: None) -> Path | None:
    """The latest checkpoint that was written to its end: ``trainer_state.json`` is written last."""
    found = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if not number.isdigit():
            continue
        try:
            whole = json.loads((path / "trainer_state.json").read_text())["global_step"] == int(
                number
            )
        except (OSError, ValueError, KeyError):
            whole = False
        if whole:
            found.append((int(number), path))
        else:
            say(f"{path.name} was not written to its end and is left out")
    return max(found)[1] if found else None


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
            shutil.copytree(source / "data", data, dirs_exist_ok=True)
        else:
            say("reading the text")
            made = load_tokenizer(config)
            made.save_pretrained(place)
            write_tokens(documents_of(config), made, data, quiet=quiet)
    return AutoTokenizer.from_pretrained(place), Tokens.load(data)


class _Run:
    """Everything that `Trainer` needs, made and checked."""

    def __init__(
        self, config: TrainConfig, given: dict[str, Any], out: Path, say: Say, quiet: bool
    ) -> None:
        self.config, self.given, self.out, self.quiet = config, given, out, quiet
        self.state = PartialState()
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
            self.tokenizer = load_tokenizer(config)
            arguments = (config.task_options, config.length, self.tokenizer)
            self.training = NeedleRows(*arguments, seed=seed)
            self.held_out = NeedleRows(*arguments, seed=seed, validation=True)
            vocabulary = len(self.tokenizer)
        else:
            # The main process makes the tokens, the others find them.
            with self.state.main_process_first():
                self.tokenizer, tokens = prepare_tokens(config, out, say=self.say, quiet=quiet)
            self.training, self.held_out = self._rows(tokens)
            assert self.tokenizer is not None
            vocabulary = len(self.tokenizer)
            if self.config.tokenizer == "train" and self.config.init_from is None:
                vocabulary = max(vocabulary, config.vocabulary)
        self.arguments = training_arguments(self.given, out, validate=self.held_out is not None)
        self.model: Any = build_model(config, vocabulary, seed=seed, tokenizer=self.tokenizer)
        loss = use_fused_loss(self.model, config.fused_loss, self.arguments.device)
        if self.state.is_main_process:
            (out / "config.yaml").write_text(as_yaml(config, given), encoding="utf-8")
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

    def __call__(self, checkpoint: Path | None) -> Outcome:
        meter = Meter(
            self._tokens_per_step(),
            flops_per_token(self.model, self.config.length)["total"],
            peak_flops(self.arguments.device),
        )
        stop = StopOnSignal()
        callbacks: list[Any] = [ProgressLine(quiet=self.quiet)]
        if self.state.num_processes == 1:
            callbacks.append(stop)
        if self.config.attention == "lucid" and self.config.strength_steps:
            strength = self.config.strength
            assert not isinstance(strength, str)
            callbacks.append(StrengthSchedule(0.0, strength, steps=self.config.strength_steps))
        asks = self.config.task is not None
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
        trainer.remove_callback(PrinterCallback)
        disable_progress_bar()  # of each file that is written
        trainer.meter = meter
        if checkpoint is not None:
            self.say(f"going on from {checkpoint.name}")
        try:
            if self.state.num_processes == 1:
                with stop:
                    trainer.train(
                        resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
                    )
            else:
                trainer.train(
                    resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
                )
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
        trainer.save_model(str(partial))
        if self.state.is_main_process:
            if self.config.attention == "softmax":
                stock = disable(AutoModelForCausalLM.from_pretrained(partial))
                shutil.rmtree(partial)
                stock.save_pretrained(partial)  # type: ignore[operator]
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(partial)
            (partial / "training_args.bin").unlink(missing_ok=True)
            if target.exists():
                shutil.rmtree(target)  # of this run, when it goes on to more steps
            partial.rename(target)
        self.state.wait_for_everyone()
        return target


def _facts(model: Any, config: TrainConfig, arguments: TrainingArguments) -> list[str]:
    """Lines about the model and the training."""
    count, flops = parameters(model), flops_per_token(model, config.length)
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


def _new_folder(out: Path | None) -> Path:
    if out is not None and (out / "config.yaml").is_file():
        raise TrainError(
            f"--out {out}: holds a training; go on with it by --resume {out}, or name a new folder"
        )
    folder = ResultsFolder.create(out, kind="train")
    folder.write_json("environment.json", environment_facts())
    return folder.path


def _agreed(out: Path | None, state: PartialState) -> Path:
    """The main process's folder, in every process."""
    if state.num_processes == 1:
        assert out is not None
        return out
    names = [str(out)]
    torch.distributed.broadcast_object_list(names, src=0)
    return Path(names[0])


def _remove_if_unused(out: Path) -> None:
    """A folder without a configuration holds nothing that a user could go on with."""
    if not (out / "config.yaml").exists():
        shutil.rmtree(out, ignore_errors=True)
