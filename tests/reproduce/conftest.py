"""Tiny runs, and what several of them share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lucid_attention.reproduce import (
    EXPERIMENTS,
    corpus,
    language,
    reproduce,
)
from lucid_attention.train import tasks


def run(name: str, out: Path, **changes: Any) -> Path:
    return reproduce(EXPERIMENTS[name], out=out, tiny=True, device="cpu", say=lambda line: None, quiet=True, **changes)  # fmt: skip


@pytest.fixture(autouse=True)
def few_rows_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tasks: what is found is not looked at, and making rows takes longer than the tiny models."""
    monkeypatch.setattr(tasks, "_VALIDATION_ROWS", 32)


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The tiny texts, without and with the libraries: written once, all sources of a dozen libraries are looked at for them."""
    folder = tmp_path_factory.mktemp("corpora")
    return {
        libraries: corpus.write_corpus(
            folder / f"{libraries}.jsonl", libraries=libraries, tiny=True
        )
        for libraries in (False, True)
    }


def copying(corpora: dict[bool, Path]) -> Callable[..., Path]:
    """In the place of `write_corpus`."""

    def copied(path: Path, *, libraries: bool, tiny: bool) -> Path:
        assert tiny
        return Path(shutil.copy(corpora[libraries], path))

    return copied


@pytest.fixture
def copied_corpora(corpora: dict[bool, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Experiments find their texts written; whether that repeats is `test_a_tiny_run`'s, of language-model."""
    monkeypatch.setattr(language, "write_corpus", copying(corpora))


@pytest.fixture(scope="session")
def language_run(
    corpora: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, int]:
    """A run of language-model, what it shares, and how many models it trained; not to be changed."""
    folder = tmp_path_factory.mktemp("language")
    trained: list[Any] = []
    real = language.train_cell

    def counted(*args: Any, **kwargs: Any) -> Any:
        trained.append(args)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "train_cell", counted)
        patch.setattr(language, "write_corpus", copying(corpora))
        out = run("language-model", folder / "first", seeds=1, shared=folder / "shared")
    return out, folder / "shared", len(trained)
