"""The text of the language-model part: read, checked, tokenised and cut before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lucid_attention.tasks.novel import packaged_novel
from lucid_attention.train.text import train_tokenizer

from .configuration import LanguageModelConfig

__all__ = ["Corpus", "TextError", "prepare_corpus", "read_text"]

MAXIMUM_CHARACTERS = 5_000_000


class TextError(ValueError):
    """The text cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class Corpus:
    """A tokenised text.

    Attributes:
        name: for plots and tables.
        characters: of the text used.
        tokenizer: byte-level BPE trained on the training part.
        train: int64 ``(tokens,)``, the beginning of the text.
        validation: int64 ``(tokens,)``, its held-out end.
        prompt: int64 ``(1, prompt_tokens)``, how the held-out part begins.
        note: something the user should know about the text, or an empty string.
    """

    name: str
    characters: int
    tokenizer: PreTrainedTokenizerFast
    train: Tensor
    validation: Tensor
    prompt: Tensor
    note: str


def read_text(path: Path) -> str:
    """The text of a user's file, at most ``MAXIMUM_CHARACTERS + 1`` characters of it.

    Raises:
        TextError: the file is missing, a folder, unreadable, empty, binary or not UTF-8.
    """
    try:
        if not path.exists():
            raise TextError(f"--text {path}: no such file")
        if path.is_dir():
            raise TextError(f"--text {path}: is a folder; name one plain-text file")
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MAXIMUM_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise TextError(
            f"--text {path}: is not UTF-8 text ({error.reason}); name a plain-text file, "
            "or convert it with iconv -t utf-8"
        ) from None
    except OSError as error:
        raise TextError(f"--text {path}: cannot be read ({error.strerror})") from None
    if "\0" in text:
        raise TextError(f"--text {path}: is binary (it has zero bytes); name a plain-text file")
    if not text.strip():
        raise TextError(f"--text {path}: is empty")
    return text


def prepare_corpus(path: Path | None, config: LanguageModelConfig) -> Corpus:
    """Read the novel or the user's file, train a tokenizer on it and cut off its end.

    The end of the text, ``config.validation_share`` of it, is held out: neither the model nor the
    tokenizer is trained on it.

    Args:
        path: the user's file, None for the packaged novel.
        config: vocabulary, context, shares and least length.

    Raises:
        TextError: see :func:`read_text`; also when the text is too short.
    """
    if path is None:
        name, text = "Jane Austen, Persuasion", packaged_novel()
    else:
        name, text = path.name, read_text(path)
    text, note = _shortened(text)
    source = f"--text {path}" if path is not None else name
    if len(text) < config.minimum_characters:
        raise TextError(
            f"{source}: is too short, {len(text):,} characters; "
            f"at least {config.minimum_characters:,} are needed"
        )

    cut = _paragraph_start(text, int(len(text) * (1 - config.validation_share)))
    tokenizer = train_tokenizer([text[:cut]], config.vocabulary)
    train = _encode(tokenizer, text[:cut])
    validation = _encode(tokenizer, text[cut:])
    for part, tokens in (("its beginning", train), ("its held-out end", validation)):
        if len(tokens) < config.context:
            raise TextError(
                f"{source}: is too short or too repetitive, {part} is {len(tokens):,} tokens; "
                f"at least {config.context:,} are needed"
            )
    return Corpus(
        name=name,
        characters=len(text),
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        prompt=validation[None, : config.prompt_tokens],
        note=note,
    )


def _shortened(text: str) -> tuple[str, str]:
    if len(text) <= MAXIMUM_CHARACTERS:
        return text, ""
    return text[:MAXIMUM_CHARACTERS], f"only the first {MAXIMUM_CHARACTERS:,} characters are used"


def _paragraph_start(text: str, position: int) -> int:
    """The start of the next paragraph within 2,000 characters, else ``position`` itself."""
    found = text.find("\n\n", position, position + 2_000)
    return position if found < 0 or not text[found:].strip() else found + 2


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids, dtype=torch.int64)
