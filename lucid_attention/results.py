"""The results folder of one run: dated, never overwritten, each file whole or not there."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["FolderError", "ResultsFolder", "environment_facts"]


class FolderError(ValueError):
    """The results folder cannot be made; the message is one line for the user."""


class ResultsFolder:
    """A new folder and the only way a command writes into it.

    Attributes:
        path: of the folder, which exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def check(out: Path | None) -> None:
        """Raise what :meth:`create` would raise for a folder already in use; makes nothing.

        Raises:
            FolderError: ``out`` is a file, a folder with something in it, or cannot be looked at.
        """
        try:
            if out is None or not out.exists():
                return
            if not out.is_dir():
                raise FolderError(f"--out {out}: is a file; name a new or an empty folder")
            if any(out.iterdir()):
                raise FolderError(f"--out {out}: is not empty; name a new or an empty folder")
            if not os.access(out, os.W_OK | os.X_OK):
                raise FolderError(f"--out {out}: cannot be written to; name another folder")
        except OSError as error:
            raise FolderError(f"--out {out}: cannot be used ({error.strerror})") from None

    @classmethod
    def create(
        cls,
        out: Path | None,
        *,
        kind: str,
        base: Path = Path("results"),
        now: datetime | None = None,
    ) -> ResultsFolder:
        """Make ``out``, or ``base/KIND-YYYYmmdd-HHMMSS`` with a suffix if that is taken.

        Raises:
            FolderError: as :meth:`check`, or the folder cannot be made.
        """
        cls.check(out)
        try:
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                return cls(out)
            stamp = (now or datetime.now()).strftime(f"{kind}-%Y%m%d-%H%M%S")
            for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
                try:
                    (base / (stamp + suffix)).mkdir(parents=True)
                except FileExistsError:
                    continue
                return cls(base / (stamp + suffix))
        except OSError as error:
            wanted = out if out is not None else base
            raise FolderError(f"{wanted}: cannot be made ({error.strerror})") from None
        raise FolderError(f"{base / stamp}: this name and 998 more after it are taken")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        self._replace(name, text.encode("utf-8"))

    def write_json(self, name: str, content: Any) -> None:
        """Write JSON; a number that JSON cannot hold (NaN, infinities) becomes null."""
        self.write_text(name, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")

    def write_csv(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write a CSV file with one header line."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
        self.write_text(name, buffer.getvalue())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a binary file."""
        self._replace(name, content)

    def _replace(self, name: str, content: bytes) -> None:
        # An interrupt between open and close must not leave half a file under the real name.
        temporary = self.path / f".{name}.partial"
        try:
            temporary.write_bytes(content)
            temporary.replace(self.path / name)
        finally:
            temporary.unlink(missing_ok=True)


def environment_facts() -> dict[str, Any]:
    """What a reader needs to judge or repeat the numbers; names no user, host or path."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("transformers", "accelerate", "lucid-attention")},
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """$LUCID_COMMIT, for a copy that is not what its git says it is; else the commit of the source tree the package is imported from,
    ``-dirty`` if it was changed.
    """
    if os.environ.get("LUCID_COMMIT"):
        return os.environ["LUCID_COMMIT"]
    root = Path(__file__).resolve().parents[1]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    description = subprocess.run(
        [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return description.stdout.strip() or None


def _finite(content: Any) -> Any:
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content
