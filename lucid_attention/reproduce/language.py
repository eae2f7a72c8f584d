"""What the experiments with language models share: a corpus and its tokens, models trained on it, and questions."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset

from lucid_attention.evaluate.prose import ProseTask
from lucid_attention.results import environment_facts
from lucid_attention.tasks import Sample
from lucid_attention.train import TrainConfig, TrainError, train
from lucid_attention.train.folder import write_whole
from lucid_attention.train.run import continue_training, prepare_tokens

from .corpus import CORPORA, corpus_id, write_corpus
from .experiment import ReproduceError, Workplace, locked, read_json

__all__ = [
    "AVERAGE",
    "DIFFERENCES",
    "LEARNING_RATE",
    "TextModel",
    "questions",
    "settings",
    "text_model",
    "text_steps",
    "train_cell",
]

_VERSION = 2
"""Goes up whenever the same settings would train another model."""

LEARNING_RATE = 1e-3
"""Of training on text, for both attentions; `lucid reproduce tuning` says how well it suits each."""

DIFFERENCES: dict[str, Any] = {"attention": "lucid", "kernel_scale": 1e-6}
"""A control: LUCID whose kernel is 1 for all keys, so that softmax attends to ``v_n - v_(n-1)``. What LUCID gains and this gains
too has nothing to do with keys that are alike: a small model also learns faster when it is shown what came just before."""

AVERAGE: dict[str, Any] = {**DIFFERENCES, "strength": 0.25}
"""A milder control: from ``v_n`` a moving average of what came before is taken, ``b sum_k (1 - b)^(k-1) v_(n-k)`` with ``b = .25``."""

_ROWS = 16
"""Of ``length`` tokens in a step."""

Log = list[dict[str, float]]


@dataclass(frozen=True)
class TextModel:
    """A model trained on text.

    Attributes:
        folder: of the checkpoint; log: of its training.
        facts: ``corpus``, the beginning of the text's SHA-256; ``commit`` and ``device`` of the training, whoever asks for it.
    """

    folder: Path
    log: Log
    facts: dict[str, str | None]

    @property
    def loss(self) -> float:
        """On held-out text, at the end."""
        return [entry["eval_loss"] for entry in self.log if "eval_loss" in entry][-1]

    def training_loss(self, step: int) -> float:
        """The mean of the last five that were logged until ``step``; they are of rows as they were met."""
        found = [e["loss"] for e in self.log if "loss" in e and e["step"] <= step]
        return sum(found[-5:]) / len(found[-5:]) if found else math.nan


TEXT = "libraries"
"""What experiments train on, where they do not compare texts."""


def settings(place: Workplace, *, text: str = TEXT, **changes: Any) -> TrainConfig:
    """34M parameters (8 layers of width 512, 16K tokens of vocabulary, tied), 2048 tokens a row, on a shared corpus.

    A token sees its whole row, as in the paper, whatever documents that holds.

    Args:
        text: "libraries", of which 900 steps see nine tenths, or "stdlib", which they go through 3.3 times.
        changes: of the configuration.
    """
    size: dict[str, Any] = {"layers": 8, "width": 512, "vocabulary": 16384, "length": 2048, "validation_share": 0.02}  # fmt: skip
    if place.tiny:
        size = {"layers": 2, "width": 64, "vocabulary": 320, "length": 64, "validation_share": 0.02}
    shared = place.shared / CORPORA[text]
    with locked(shared / "corpus"):
        if not (shared / "data" / "tokens.json").is_file():
            written = write_corpus(shared / "corpus.jsonl", libraries=text == "libraries", tiny=place.tiny)  # fmt: skip
            prepare_tokens(TrainConfig(text=str(written), vocabulary=size["vocabulary"]), shared)
        _check_tokens(shared / "data")
    return TrainConfig(
        tokens_of=str(shared), tie_embeddings=True, document_masks=False, **{**size, **changes}
    )


def _check_tokens(data: Path) -> None:
    """That the files are as long as they were written: of fewer tokens another model would be trained, of none not any."""
    remedy = f"delete {data} and run again"
    facts = read_json(data / "tokens.json", remedy, "dtype", "tokens", "documents")
    each = {"tokens": np.dtype(facts["dtype"]).itemsize, "documents": np.dtype(np.int64).itemsize}
    for name, bytes_of_one in each.items():
        path, size = data / f"{name}.bin", facts[name] * bytes_of_one
        there = path.stat().st_size if path.is_file() else 0
        if there != size:
            raise ReproduceError(f"{path}: expected {size:,} bytes, got {there:,}; {remedy}")


def text_steps(tiny: bool) -> int:
    """Of training on text: one number for all experiments, or they could not share a model."""
    return 4 if tiny else 900


def text_model(
    place: Workplace, steps: int, seed: int, tick: Callable[[int], None], *, learning_rate: float = LEARNING_RATE,
    weights: bool = True, text: str = TEXT, **changes: Any,
) -> TextModel:  # fmt: skip
    """A model trained on the corpus; one for all cells, and all experiments with the same ``--shared``, that ask for it.

    ``text`` and ``changes`` are of `settings`. What was trained is kept; a training that was stopped goes on; one that another process
    is at is waited for. Without ``weights`` its log is enough, which is small: ``facts.json`` and ``run/log.csv`` can be taken
    to another machine.
    """
    config = settings(place, text=text, **changes)
    corpus = corpus_id(place.shared / CORPORA[text] / "corpus.jsonl")
    if text == "libraries" and not place.tiny:
        _check_met_once(place.shared / CORPORA[text] / "data" / "tokens.json", config, steps)
    # What has its default is left out: a setting that is new to the package makes no other model.
    told = {
        **{f.name: value for f in dataclasses.fields(config) if (value := getattr(config, f.name)) != f.default},
        "tokens_of": corpus, "steps": steps, "seed": seed, "learning_rate": learning_rate,
        "device": place.device.type, "liger": find_spec("liger_kernel") is not None, "version": _VERSION,
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    folder = place.shared / "models" / name
    with locked(folder):
        kept, about = folder / "run", folder / "facts.json"
        log = _log(kept) if about.is_file() else []
        # A log may have come without its weights, and a training after it may have been stopped: then it is shorter.
        whole = bool(log) and log[-1]["step"] == steps
        if whole and (not weights or (kept / "model").is_dir()):
            if weights:
                _check_weights(folder)
            tick(steps)
        else:
            log = train_cell(place, config, steps, seed, folder, tick, learning_rate=learning_rate)
            device = torch.cuda.get_device_name() if place.device.type == "cuda" else "cpu"
            commit = environment_facts()["commit"]
            write_whole(about, json.dumps({**dataclasses.asdict(config), **told, "corpus": corpus, "commit": commit, "trained_on": device}))  # fmt: skip
        if (kept / "model").is_dir():
            # The checkpoints are three times the model's size, and nothing goes on from them any more.
            for part in (*kept.glob("checkpoint-*"), kept / "data"):
                shutil.rmtree(part, ignore_errors=True)
    facts = read_json(about, f"delete {folder} and run again", "corpus", "commit", "trained_on")
    return TextModel(kept / "model", log, {name: facts[name] for name in ("corpus", "commit", "trained_on")})  # fmt: skip


def _check_weights(folder: Path) -> None:
    """That there are weights, as long as they say."""
    path = folder / "run" / "model" / "model.safetensors"
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ReproduceError(f"{path}: expected the weights of a model, which cannot be read ({first}); delete {folder} and run again") from None  # fmt: skip


def _check_met_once(tokens: Path, config: TrainConfig, steps: int) -> None:
    """The text is as long as the libraries that are installed, and must not begin again within a training."""
    there = json.loads(tokens.read_text())["tokens"]
    needed = round(steps * _ROWS * config.length / (1 - config.validation_share))
    if there < needed:
        raise ReproduceError(
            f"the libraries' text: expected at least {needed:,} tokens, which {steps} steps meet once, got {there:,}; "
            "install the versions of constraints.txt, whose sources are longer"
        )


def train_cell(
    place: Workplace,
    config: TrainConfig,
    steps: int,
    seed: int,
    folder: Path,
    tick: Callable[[int], None],
    **arguments: Any,
) -> Log:
    """Train in ``folder``, or go on there; the log. The model is ``folder/run/model``."""
    cuda = place.device.type == "cuda"
    if cuda and (torch.cuda.device_count() > 1 or place.device.index not in (None, 0)):
        # The Trainer would spread a batch over all of them, and so make it larger.
        raise ReproduceError(
            f"--device {place.device}: expected one visible GPU, got {torch.cuda.device_count()}; set CUDA_VISIBLE_DEVICES to one, "
            "and start a process with the same --out for each other"
        )
    given: dict[str, Any] = {
        "max_steps": steps, "seed": seed, "per_device_train_batch_size": 2 if place.tiny else _ROWS, "learning_rate": LEARNING_RATE,
        "bf16": cuda, "use_cpu": not cuda, "torch_compile": cuda, "report_to": "none", "eval_steps": steps if place.tiny else 0.25,
        "save_steps": 0.5, "save_total_limit": 1, "per_device_eval_batch_size": 16, **arguments,
    }  # fmt: skip
    run = folder / "run"
    quiet: dict[str, Any] = {"say": lambda line: None, "quiet": True}
    try:
        if (run / "config.yaml").is_file():
            if (run / "data" / "tokens.json").is_file():
                _check_tokens(run / "data")
            outcome = continue_training(run, **quiet)
        else:
            shutil.rmtree(run, ignore_errors=True)  # killed before it had a configuration
            outcome = train(config, given, out=run, **quiet)
    except TrainError as error:
        raise ReproduceError(str(error)) from error
    if not outcome.finished:
        raise KeyboardInterrupt  # it was stopped and saved; the next run goes on
    tick(steps)
    return _log(run)


def _log(run: Path) -> Log:
    """Empty where there is none."""
    if not (run / "log.csv").is_file():
        return []
    with (run / "log.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def questions(place: Workplace, grid: Sequence[tuple[ProseTask, int]], prose: str, tokenizer: Any, number: int, seed: int) -> list[list[Sample]]:  # fmt: skip
    """For each task and length; the same for every model of these tokens, and others for every seed.

    Kept: making them takes a CPU longer than answering takes a GPU.
    """
    about = hashlib.sha256(prose.encode()).hexdigest()
    told = [[(task.name, task.version, length) for task, length in grid], number, seed, about, corpus_id(place.shared / CORPORA[TEXT] / "corpus.jsonl")]  # fmt: skip
    name = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
    path = place.shared / "questions" / f"{name}.pickle"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        if not path.is_file():
            workers = min(8, (os.cpu_count() or 1) // 2) if place.device.type == "cuda" else 0
            made = _Questions(grid, prose, tokenizer, number, seed)
            loader: Any = DataLoader(made, batch_size=None, num_workers=workers)
            partial = path.with_suffix(".partial")
            partial.write_bytes(pickle.dumps(list(loader)))
            partial.replace(path)
    found: list[list[Sample]] = pickle.loads(path.read_bytes())
    return found


@dataclass(frozen=True)
class _Questions(Dataset[list[Sample]]):
    grid: Sequence[tuple[ProseTask, int]]
    prose: str
    tokenizer: Any
    number: int
    seed: int

    def __len__(self) -> int:
        return len(self.grid)

    def __getitem__(self, index: int) -> list[Sample]:
        if index >= len(self.grid):
            raise IndexError(index)
        task, length = self.grid[index]
        return list(task.samples(self.prose, self.tokenizer, length, self.number, self.seed))
