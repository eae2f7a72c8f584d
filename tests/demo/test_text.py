"""Reading texts: the packaged novel, what is held out, and one clear line for each bad file."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch

from lucid_attention.demo import text as text_module
from lucid_attention.demo.configuration import DemoConfig, LanguageModelConfig
from lucid_attention.demo.text import TextError, prepare_corpus, read_text
from lucid_attention.tasks.novel import packaged_novel


def test_the_packaged_novel_is_persuasion() -> None:
    novel = packaged_novel()
    assert 460_000 < len(novel) < 470_000
    assert novel.startswith("Persuasion\n\nby\n\nJane Austen\n\n(1818)\n\nChapter 1\n\nSir Walter")
    assert novel.endswith("national importance.\n\nFinis\n")
    assert novel.count("Chapter ") == 24
    assert "Gutenberg" not in novel
    assert novel.isascii()
    note = (resources.files("lucid_attention.tasks") / "data" / "PROVENANCE.md").read_text()
    assert hashlib.sha256(novel.encode()).hexdigest() in note
    assert f"{len(novel):,} characters" in note


def test_the_novel_becomes_tokens_and_a_prompt() -> None:
    config = LanguageModelConfig()
    corpus = prepare_corpus(None, config)
    tokenizer = corpus.tokenizer
    assert corpus.name == "Jane Austen, Persuasion"
    assert len(tokenizer) == config.vocabulary
    share = len(corpus.validation) / (len(corpus.validation) + len(corpus.train))
    assert abs(share - config.validation_share) < 0.01
    training, held_out = tokenizer.decode(corpus.train), tokenizer.decode(corpus.validation)
    assert training + held_out == packaged_novel()
    assert training.endswith("\n\n")
    assert corpus.prompt.shape == (1, config.prompt_tokens)
    assert torch.equal(corpus.prompt[0], corpus.validation[: config.prompt_tokens])
    assert corpus.note == ""


@pytest.mark.parametrize("content", ["Zoë naïve — “quotes”, 日本語, 🙂\n", "plain ascii words\n"])
def test_any_utf8_text_survives_the_tokenizer(
    content: str, tmp_path: Path, tiny: DemoConfig
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n * n} {content}" for n in range(120)), encoding="utf-8")
    corpus = prepare_corpus(path, tiny.language_model)
    tokens = torch.cat((corpus.train, corpus.validation))
    assert corpus.tokenizer.decode(tokens) == path.read_text(encoding="utf-8")
    assert corpus.name == "text.txt"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfwords")
    assert read_text(path) == "words"


def test_long_texts_are_cut_and_say_so(
    text_file: Path, tiny: DemoConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "MAXIMUM_CHARACTERS", 1500)
    corpus = prepare_corpus(text_file, tiny.language_model)
    assert corpus.characters == 1500
    assert corpus.note == "only the first 1,500 characters are used"


BAD_TEXTS = {
    "missing": (None, "no such file"),
    "empty": (b"", "is empty"),
    "only spaces": (b" \n\n\t ", "is empty"),
    "latin-1": ("Zoë ".encode("latin-1") * 400, "is not UTF-8 text .*; name a plain-text file"),
    "gzip": (b"\x1f\x8b\x08\x00" * 400, "is not UTF-8 text"),
    "zero bytes": (b"words\0words" * 400, "is binary"),
    "too short": (b"Too few words.", "is too short, 14 characters; at least 400 are needed"),
    "repetitive": (b"a" * 3000, "is too short or too repetitive, its beginning is"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_bad_texts(kind: str, tmp_path: Path, tiny: DemoConfig) -> None:
    content, message = BAD_TEXTS[kind]
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TextError, match=message) as caught:
        prepare_corpus(path, replace(tiny.language_model, vocabulary=400))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_too_short_an_end_is_named(text_file: Path, tiny: DemoConfig) -> None:
    config = replace(tiny.language_model, validation_share=0.005)
    with pytest.raises(TextError, match=r"too repetitive, its held-out end is .* at least 16 are"):
        prepare_corpus(text_file, config)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="is a folder; name one plain-text file"):
        read_text(tmp_path)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "loop.txt"
    path.symlink_to(path)
    with pytest.raises(TextError, match=r"loop.txt: (no such file|cannot be read)"):
        read_text(path)


def test_a_path_that_cannot_be_looked_at() -> None:
    with pytest.raises(TextError, match=r"--text x+: cannot be read \(File name too long\)"):
        read_text(Path("x" * 300))
