"""What every experiment is: cells that are run one by one, kept as they finish, and summed up over seeds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from lucid_attention.results import ResultsFolder, environment_facts

__all__ = [
    "Cell",
    "Experiment",
    "ReproduceError",
    "Workplace",
    "locked",
    "read_json",
    "reproduce",
]

Row = dict[str, Any]
Cell = dict[str, Any]
"""What is varied, by name; JSON holds it."""


class ReproduceError(ValueError):
    """Something the user can put right; its message is one line."""


@dataclass(frozen=True)
class Workplace:
    """Where a cell is run.

    Attributes:
        device: of the models.
        tiny: a size that checks the machinery.
        work: a folder for the cell alone, which outlives an interrupt and goes when the cell is finished.
        shared: a folder for what other cells can use too.
    """

    device: torch.device
    tiny: bool
    work: Path
    shared: Path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time: the others wait. Gone with the process, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield


def read_json(path: Path, remedy: str, *names: str) -> dict[str, Any]:
    """What an earlier run wrote: an object with these names.

    Raises:
        ReproduceError: it holds something else, as after a full disk or a copy that was cut off. It may be the user's only copy of
            what is left, and so stays.
    """
    got = "something else"
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict) and found.keys() >= set(names):
            return found
    except ValueError as error:
        got = f"a damaged file ({error})"
    within = f" with {', '.join(names)}" if names else ""
    raise ReproduceError(f"{path}: expected a JSON object{within}, got {got}; {remedy}")


class Experiment(ABC):
    """One group of claims.

    Attributes:
        name: on the command line.
        claim: what it is about, in a line.
        gpu_minutes, cpu_minutes: what it takes at full size, where seeds are cells what one of them takes; None: too long to be
            useful. ``measured``: by a run, not estimated.
        version: goes up when the same settings would give other results.
        per_seed: whether every seed is a cell of its own, kept by itself.
    """

    name: str
    claim: str
    gpu_minutes: float
    cpu_minutes: float | None
    measured: bool = False
    version: int = 1
    per_seed: bool = False

    @abstractmethod
    def cells(self, tiny: bool) -> list[Cell]:
        """Every setting, the cheap ones first."""

    @abstractmethod
    def run(self, cell: Cell, seeds: Sequence[int], place: Workplace, tick: Callable[[int], None]) -> list[Row]:  # fmt: skip
        """Rows of one cell, each with its ``seed``; ``tick`` is told of steps."""

    @abstractmethod
    def steps(self, cell: Cell, tiny: bool) -> int:
        """How often ``tick`` will be told of one."""

    @abstractmethod
    def summary(self, rows: list[Row]) -> str:
        """Markdown: what was found, with spread, and verdicts."""

    @abstractmethod
    def plot(self, rows: list[Row]) -> bytes:
        """A PNG."""


def reproduce(
    experiment: Experiment,
    *,
    out: Path | None = None,
    seeds: int = 3,
    device: str | None = None,
    tiny: bool = False,
    shared: Path | None = None,
    only: str | None = None,
    most_seconds: float | None = None,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    quiet: bool = False,
) -> Path:
    """Run an experiment, or go on with one that was stopped in the same folder.

    Each cell's rows are written when it is finished, ``cells/ID.json``, and a run that goes on leaves out the cells that are
    there. Then ``results.csv``, ``summary.md`` and ``plot.png``, of all cells so far. Processes with the same folder, one for
    each GPU, say, share the cells among them.

    Args:
        experiment: from `EXPERIMENTS`.
        out: the folder: new, empty, or of this experiment with the same size and seeds, or, where a seed is a cell, fewer seeds;
            None makes ``results/NAME-...``.
        seeds: 1 to ``seeds``.
        device: None takes a CUDA device where there is one.
        tiny: a size that checks the machinery, not the claim.
        shared: a folder that keeps the corpus and the models trained on it, for other experiments too; None keeps them until
            this one is finished.
        only: run such cells alone, ``"position=rope,head_dim=64"``; the tables are of all that are finished.
        most_seconds: no cell is begun after so long.
        say, quiet: lines for the user; no progress bar.

    Returns:
        The folder.

    Raises:
        ReproduceError: fewer than one seed, no such device, a ``shared`` that is no folder, no cell that ``only`` describes, a folder of
            another run, a damaged file of an earlier one, or a training that cannot begin or go on.
        FolderError: a folder that holds something else.
    """
    if seeds < 1:
        raise ReproduceError(f"--seeds: expected 1 or more, got {seeds}")
    size = "tiny" if tiny else "full"
    place_of = _device(device)
    if shared is not None:
        _check_shared(shared, size)
    identity = {"experiment": experiment.name, "version": experiment.version, "seeds": seeds, "tiny": tiny}  # fmt: skip
    cells = experiment.cells(tiny)
    if experiment.per_seed:
        cells = _seeded(cells, seeds)
    asked = cells if only is None else _chosen(cells, only)
    folder = _folder(out, experiment, identity)
    load(folder.path, cells)  # what cannot be read is said now, not after the first cell
    waiting = [cell for cell in asked if not _file(folder, cell).is_file()]
    if len(waiting) < len(asked):
        say(f"{len(asked) - len(waiting)} of {len(asked)} cells are there already")
    began = time.monotonic()
    total = sum(experiment.steps(cell, tiny) for cell in waiting)
    busy = 0
    with tqdm(total=total, desc=experiment.name, unit="step", disable=quiet or None) as bar:
        for cell in waiting:
            if most_seconds is not None and time.monotonic() - began > most_seconds:
                say(f"the time is over; the same command goes on ({out or folder.path})")
                break
            lock = FileLock(_lock(folder, _identity(cell)), timeout=0)
            try:
                lock.acquire()
            except Timeout:
                busy += 1
                continue
            try:
                if _file(folder, cell).is_file():
                    continue
                bar.set_postfix_str(", ".join(map(str, cell.values()))[:60])
                own = [cell["seed"]] if experiment.per_seed else list(range(1, seeds + 1))
                work = folder.path / "work" / _identity(cell)
                place = Workplace(place_of, tiny, work, (shared or folder.path / "work") / size)
                for path in (place.work, place.shared):
                    path.mkdir(parents=True, exist_ok=True)
                _run(experiment, cell, own, place, folder, bar.update)
            finally:
                lock.release()
            _write(folder, experiment, tiny)
    if busy:
        say(f"{busy} cells are another process's; its end writes what both have found")
    if _write(folder, experiment, tiny):
        shutil.rmtree(folder.path / "work", ignore_errors=True)
    return folder.path


def _device(name: str | None) -> torch.device:
    """Tried, before a folder is made."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ReproduceError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    try:
        found = torch.device(name)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise ReproduceError(f"--device {name}: cannot be used ({first}); take another, such as cpu") from None  # fmt: skip
    return found


def _check_shared(shared: Path, size: str) -> None:
    """That there can be such folders; makes none."""
    try:
        whole = shared / size
        there = next(p for p in (whole, *whole.parents) if p.exists() or p.is_symlink())
        if not there.is_dir():
            raise ReproduceError(f"--shared {shared}: expected a folder, and {there} is none; name another folder")  # fmt: skip
        if not os.access(there, os.W_OK | os.X_OK):
            raise ReproduceError(f"--shared {shared}: {there} cannot be written to; name another folder")  # fmt: skip
    except OSError as error:
        raise ReproduceError(f"--shared {shared}: cannot be used ({error.strerror}); name another folder") from None  # fmt: skip


def _seeded(cells: Sequence[Cell], seeds: int) -> list[Cell]:
    return [{**cell, "seed": seed} for seed in range(1, seeds + 1) for cell in cells]


def _chosen(cells: Sequence[Cell], only: str) -> list[Cell]:
    """The cells with these values; what a cell does not say is empty."""
    found = list(cells)
    for part in only.split(","):
        name, equals, value = (text.strip() for text in part.partition("="))
        if not equals:
            raise ReproduceError(f"--only {part}: expected NAME=VALUE,NAME=VALUE")
        if not any(name in cell for cell in cells):
            known = ", ".join(dict.fromkeys(name for cell in cells for name in cell))
            raise ReproduceError(f"--only {name}: no cell has it, but {known}")
        left = [cell for cell in found if str(cell.get(name, "")) == value]
        if not left:
            there = ", ".join(dict.fromkeys(str(cell.get(name, "(empty)")) for cell in found))
            raise ReproduceError(f"--only {part}: no such cell, {name} is one of {there}")
        found = left
    return found


def _run(experiment: Experiment, cell: Cell, seeds: Sequence[int], place: Workplace, folder: ResultsFolder, tick: Callable[[int], None]) -> None:  # fmt: skip
    """A cell, and its file."""
    started = time.perf_counter()
    found = experiment.run(cell, seeds, place, tick)
    seconds = time.perf_counter() - started
    device = torch.cuda.get_device_name() if place.device.type == "cuda" else "cpu"
    record = {"cell": cell, "rows": found, "seconds": round(seconds, 2), "device": device, **environment_facts()}  # fmt: skip
    target = _file(folder, cell)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(record) + "\n")
    partial.replace(target)
    shutil.rmtree(place.work, ignore_errors=True)


def _lock(folder: ResultsFolder, name: str) -> Path:
    """A file that stays: one that is removed while another process waits for it locks nothing."""
    path = folder.path / ".locks" / f"{name}.lock"
    path.parent.mkdir(exist_ok=True)
    return path


def _write(folder: ResultsFolder, experiment: Experiment, tiny: bool) -> bool:
    """What is finished, after every cell: whatever stops a run later, it is there. Whether that is all.

    Another process may have more seeds here than this one.
    """
    with FileLock(_lock(folder, "tables")):
        cells = experiment.cells(tiny)
        if experiment.per_seed:
            cells = _seeded(cells, _marked(folder.path / "experiment.json")["seeds"])
        rows = load(folder.path, cells)
        if rows:
            names = list(dict.fromkeys(name for row in rows for name in row))
            table = [[row.get(name, "") for name in names] for row in rows]
            folder.write_csv("results.csv", names, table)
            folder.write_text("summary.md", experiment.summary(rows))
            folder.write_bytes("plot.png", experiment.plot(rows))
        return all(_file(folder, cell).is_file() for cell in cells)


def load(folder: Path, cells: Sequence[Cell]) -> list[Row]:
    """The rows of all finished cells, each with what was varied, in the cells' order."""
    rows = []
    for cell in cells:
        path = folder / "cells" / f"{_identity(cell)}.json"
        if path.is_file():
            record = read_json(path, "delete it, and the same command runs its cell again", "commit", "device", "rows")  # fmt: skip
            about = {"commit": record["commit"], "device": record["device"]}
            rows += [{**cell, **about, **row} for row in record["rows"]]
    return rows


def _folder(out: Path | None, experiment: Experiment, identity: dict[str, Any]) -> ResultsFolder:
    """Made, or gone on with; of processes that begin together, one makes it. Its lock cannot be in a folder that has to be empty."""
    name = hashlib.sha256(str("" if out is None else out.resolve()).encode()).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir()) / f"lucid-reproduce-{name}.lock", mode=0o666):
        folder = _made(out, experiment, identity)
    (folder.path / "cells").mkdir(exist_ok=True)
    return folder


def _made(out: Path | None, experiment: Experiment, identity: dict[str, Any]) -> ResultsFolder:
    marker = None if out is None else out / "experiment.json"
    if marker is not None and marker.is_file():
        found = _marked(marker)
        if found.keys() != identity.keys() or not isinstance(found["seeds"], int):
            raise ReproduceError(f"--out {out}: its experiment.json is not of lucid reproduce; name another folder")  # fmt: skip
        if experiment.per_seed and found == {**identity, "seeds": found["seeds"]} and found["seeds"] < identity["seeds"]:  # fmt: skip
            ResultsFolder(marker.parent).write_json(marker.name, identity)
        elif found != identity:
            raise ReproduceError(
                f"--out {out}: holds {_said(found)}, not {_said(identity)}; name another folder"
            )
        return ResultsFolder(marker.parent)
    folder = ResultsFolder.create(out, kind=experiment.name)
    folder.write_json("experiment.json", identity)
    return folder


def _marked(marker: Path) -> dict[str, Any]:
    return read_json(marker, "name another folder, or delete this one and run again")


def _said(identity: dict[str, Any]) -> str:
    size = "tiny " if identity["tiny"] else ""
    return f"{size}{identity['experiment']} (version {identity['version']}, {identity['seeds']} seeds)"  # fmt: skip


def _file(folder: ResultsFolder, cell: Cell) -> Path:
    return folder.path / "cells" / f"{_identity(cell)}.json"


def _identity(cell: Cell) -> str:
    text = json.dumps(cell, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
