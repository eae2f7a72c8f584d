"""A run's folder: made once, agreed on by every process, taken back after a mistake, its checkpoints whole."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from lucid_attention.results import FolderError, ResultsFolder, environment_facts

from .configuration import CHANGEABLE, TrainConfig, TrainError, read_yaml

__all__ = [
    "BEGUN",
    "PROSE",
    "absolute",
    "agreed",
    "check_unchanged",
    "keep_model",
    "last_checkpoint",
    "new_folder",
    "processes_of",
    "said_once",
    "set_aside_unfinished",
    "take_back",
    "write_whole",
]

Say = Callable[[str], None]
BEGUN = ".begun.yaml"
"""The settings a run began with."""
PROSE = "prose.txt"
"""What the task needles reads, if it is the user's."""


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


def set_aside_unfinished(folder: Path) -> None:
    """Out of the way of transformers, which would take them for the latest and delete whole ones before them."""
    whole = last_checkpoint(folder)
    latest = -1 if whole is None else int(whole.name.removeprefix("checkpoint-"))
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and (
            int(number) > latest or not (path / "trainer_state.json").is_file()
        ):
            target = folder / f"unfinished-{number}"
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)


def new_folder(out: Path | None, processes: int) -> Path:
    """A new or empty folder for a run of so many processes.

    Raises:
        TrainError, FolderError: it is in use.
    """
    if out is not None and (out / "config.yaml").is_file():
        raise TrainError(
            f"--out {out}: holds a training; go on with it by --resume {out}, or name a new folder"
        )
    folder = ResultsFolder.create(out, kind="train")
    folder.write_json("environment.json", {**environment_facts(), "processes": processes})
    return folder.path


def processes_of(folder: Path) -> int | None:
    """How many a run was begun with; None if that is not known."""
    try:
        found = json.loads((folder / "environment.json").read_text()).get("processes")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, int) else None


def agreed(out: Path | None, state: PartialState) -> Path:
    """The main process's folder, in every process."""
    if state.num_processes == 1:
        assert out is not None
        return out
    names = [str(out)]
    torch.distributed.broadcast_object_list(names, src=0)
    return Path(names[0])


@contextlib.contextmanager
def said_once(state: PartialState) -> Iterator[None]:
    """A mistake that the main process finds is every process's, so that none waits for another.

    The command writes out the main process's alone.
    """
    error: Exception | None = None
    try:
        yield
    except (TrainError, FolderError) as found:
        error = found
    if state.num_processes > 1:
        everyone: list[Any] = [None] * state.num_processes
        torch.distributed.all_gather_object(everyone, None if error is None else str(error))
        first = next((one for one in everyone if one is not None), None)
        if first is not None and error is None:
            error = TrainError(first)
    if error is not None:
        raise error


def absolute(config: TrainConfig) -> TrainConfig:
    """Files and folders of this machine by their whole names, so that a run can go on from anywhere."""
    changes: dict[str, Any] = {
        name: str(Path(value).expanduser().resolve())
        for name in ("init_from", "tokens_of", "tokenizer", "text")
        if (value := getattr(config, name)) is not None and Path(value).expanduser().exists()
    }
    text = config.text
    if text is not None and "text" not in changes and any(sign in text for sign in "*?["):
        changes["text"] = str(Path.cwd() / Path(text).expanduser())
    prose = (config.task_options or {}).get("prose")
    if isinstance(prose, str) and config.task_options is not None:
        whole = str(Path(prose).expanduser().resolve())
        changes["task_options"] = {**config.task_options, "prose": whole}
    return replace(config, **changes) if changes else config


def write_whole(path: Path, text: str) -> None:
    """A text file, whole or not there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def check_unchanged(folder: Path, settings: dict[str, Any]) -> None:
    """That a run goes on with the settings it began with; runs of earlier versions have not written them down.

    Raises:
        TrainError: ``config.yaml`` was changed by hand, in what may not change.
    """
    path = folder / BEGUN
    if not path.is_file():
        return
    begun = read_yaml(path)
    for name in sorted({*begun, *settings} - set(CHANGEABLE)):
        if begun.get(name) != settings.get(name):
            was, now = (repr(x[name]) if name in x else "not there" for x in (begun, settings))
            raise TrainError(
                f"{folder / 'config.yaml'}: {name} was {was} when the run began and is {now}; put it back, or begin a new run"
            )


def keep_model(folder: Path, step: int) -> Path | None:
    """``model/`` of fewer steps out of the way, by another name: it must not pass for the result, and is the user's."""
    model = folder / "model"
    if not model.exists():
        return None
    names = (f"model-before-step-{step + 1}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))  # fmt: skip
    kept = next(folder / name for name in names if not (folder / name).exists())
    model.rename(kept)
    return kept


def take_back(out: Path, made: bool) -> None:
    """After a mistake: nothing that `train` wrote is left, nor the folder, unless it was there before."""
    for name in ("config.yaml", BEGUN, PROSE, "environment.json"):
        (out / name).unlink(missing_ok=True)
    for name in ("tokenizer", "data"):
        shutil.rmtree(out / name, ignore_errors=True)
    if made:
        shutil.rmtree(out, ignore_errors=True)
