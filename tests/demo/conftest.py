"""Sizes that run the whole demo in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from lucid_attention.demo.configuration import DemoConfig, LanguageModelConfig, MemoryConfig

TINY_MEMORY = MemoryConfig(
    keys=8,
    values=8,
    width=16,
    train_length=16,
    test_lengths=(16, 24, 32),
    steps=4,
    batch=4,
    warmup_steps=2,
    test_positions=256,
)
TINY_LANGUAGE_MODEL = LanguageModelConfig(
    vocabulary=300,
    width=16,
    mlp_width=16,
    layers=2,
    heads=2,
    kv_heads=1,
    context=16,
    steps=4,
    batch=2,
    warmup_steps=1,
    evaluations=2,
    minimum_characters=400,
    prompt_tokens=4,
    new_tokens=6,
)


@pytest.fixture
def tiny() -> DemoConfig:
    return DemoConfig(memory=TINY_MEMORY, language_model=TINY_LANGUAGE_MODEL, seed=3)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Enough words for a tiny model, every sentence another one."""
    path = tmp_path / "words.txt"
    sentences = [f"Sentence {n} counts {n * n} stars over hill {n % 7}." for n in range(60)]
    path.write_text("\n\n".join(sentences), encoding="utf-8")
    return path
