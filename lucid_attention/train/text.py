"""Texts and tokenizers: read, and refused by name before anything is trained."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lucid_attention.tasks.novel import packaged_novel

from .configuration import TrainConfig, TrainError

__all__ = ["check_outside", "check_tokenizer", "documents_of", "load_tokenizer", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
NOVEL = "novel"
"""The text that comes with the package, where no file or folder has this name."""
_SAMPLE = 100_000_000
"""Characters that a tokenizer is trained on at most: more changes little and takes long."""


def check_outside(source: str | None, folder: Path) -> None:
    """That a run does not read what it writes; a file that is named is what was meant.

    Raises:
        TrainError: the folder is among the text.
    """
    if source is None or (source == NOVEL and not Path(NOVEL).exists()):
        return
    if Path(source).expanduser().is_file():
        return
    folder = folder.resolve()
    if any(folder in path.resolve().parents for path in _files(source)):
        raise TrainError(
            f"text {source}: has the folder of the run in it, {folder}; name an --out outside, or a narrower pattern"
        )


def documents_of(config: TrainConfig) -> Iterator[str]:
    """The documents of ``config.text`` or ``config.dataset``, one by one, in an order that is always the same.

    Raises:
        TrainError: nothing there, empty, not UTF-8, no such column, no network.
    """
    if config.dataset is not None:
        yield from _of_dataset(config.dataset)
        return
    assert config.text is not None
    if config.text == NOVEL and not Path(NOVEL).exists():
        yield packaged_novel()
        return
    for path in _files(config.text):
        if path.suffix.lower() == ".jsonl":
            yield from _of_lines(path)
            continue
        text = _read(path)
        if text.strip():
            yield text


def _files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if any(sign in source for sign in "*?[") and not path.exists():
        pattern = str(path.relative_to(path.anchor) if path.anchor else path)
        found = sorted(name for name in Path(path.anchor).glob(pattern) if name.is_file())
    elif path.is_dir():
        found = sorted(
            name
            for name in _below(path)
            if name.is_file()
            and not any(part.startswith(".") for part in name.relative_to(path).parts)
        )
    elif path.is_file():
        found = [path]
    else:
        raise TrainError(
            f"text {source}: no such file or folder; expected a text file, a .jsonl file, a folder, a pattern, or {NOVEL}, which comes with the package"
        )
    if not found:
        raise TrainError(f"text {source}: no files there")
    return found


def _below(path: Path) -> Iterator[Path]:
    """All that is in a folder; `Path.rglob` would pass over what cannot be read."""

    def refuse(error: OSError) -> None:
        raise TrainError(f"text {error.filename}: cannot be read ({error.strerror})")

    for folder, _, names in os.walk(path, onerror=refuse):
        yield from (Path(folder, name) for name in names)


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TrainError(
            f"text {path}: is not UTF-8 text (byte {error.start}: {error.reason}); convert it with iconv -t utf-8, or "
            "name the text files by a pattern such as folder/**/*.txt"
        ) from None
    except OSError as error:
        raise TrainError(f"text {path}: cannot be read ({error.strerror})") from None
    if "\0" in text:
        raise TrainError(
            f"text {path}: is binary (it has zero bytes); name the text files by a pattern such as folder/**/*.txt"
        )
    return text


def _of_lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError):
                    text = None
                if not isinstance(text, str):
                    raise TrainError(
                        f'text {path}, line {number}: expected a JSON object with a string "text"'
                    )
                if text.strip():
                    # JSON may hold half of a surrogate pair, which no encoding does.
                    yield text.encode("utf-8", "replace").decode()
    except UnicodeDecodeError:
        raise TrainError(f"text {path}: is not UTF-8 text") from None


def _of_dataset(name: str) -> Iterator[str]:
    if find_spec("datasets") is None:
        raise TrainError(
            f"dataset {name}: needs the datasets library (pip install datasets), or give text instead"
        )
    import datasets

    repository, _, configuration = name.partition(":")
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") and not Path(repository).exists():
        raise TrainError(
            f"dataset {name}: HF_HUB_OFFLINE is set, so it cannot be fetched; unset it, or give text instead"
        )
    try:
        rows = datasets.load_dataset(repository, configuration or None, split="train")
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise TrainError(f"dataset {name}: cannot be loaded: {first}") from None
    if "text" not in rows.column_names:
        raise TrainError(
            f'dataset {name}: expected a column "text", got {", ".join(rows.column_names)}'
        )
    for row in rows:
        if row["text"] and row["text"].strip():
            yield row["text"].encode("utf-8", "replace").decode()


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text has tokens, and they give it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (line for text in texts for line in text.splitlines(keepends=True))
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def load_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that the configuration names, or that of its checkpoint, or one trained on the text.

    Raises:
        TrainError: it cannot be loaded, or has no token that ends a text.
    """
    if config.tokenizer == "train" and config.init_from is None:
        return train_tokenizer(_sample(config), config.vocabulary)
    source = config.tokenizer if config.tokenizer != "train" else config.init_from
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().split("\n")[0]
        raise TrainError(f"tokenizer {source}: cannot be loaded: {first}") from None
    if tokenizer.eos_token_id is None:
        raise TrainError(
            f"tokenizer {source}: has no end-of-text token (eos_token), which must part the documents"
        )
    return tokenizer


def check_tokenizer(config: TrainConfig, tokenizer: Any) -> None:
    """That a checkpoint goes on with its own tokens, where it says what they are.

    Raises:
        TrainError: the same numbers are other tokens.
    """
    if config.init_from is None or tokenizer is None:
        return
    if config.tokenizer == "train" and config.tokens_of is None:
        return  # it is the checkpoint's
    try:
        own: Any = AutoTokenizer.from_pretrained(config.init_from)
    except (OSError, ValueError, KeyError, ImportError):
        return  # it has none
    known, given = own.get_vocab(), tokenizer.get_vocab()
    other = next((token for token, number in given.items() if known.get(token) != number), None)
    if other is not None:
        source = (
            f"tokens_of {config.tokens_of}" if config.tokens_of else f"tokenizer {config.tokenizer}"
        )
        raise TrainError(
            f"{source}: {other!r} is its token {given[other]}, and of the checkpoint {config.init_from} "
            f"{known.get(other, 'there is none')}; give the tokenizer that the checkpoint was trained with"
        )


def _sample(config: TrainConfig) -> Iterator[str]:
    """The beginning of the data, without what may be held out."""
    documents = documents_of(config)
    seen = 0
    for text in documents:
        room = _SAMPLE - seen
        # A single book is a single document: its end is held out.
        kept = text[: min(room, int(len(text) * (1 - config.validation_share)))]
        seen += len(kept)
        yield kept
        if seen >= _SAMPLE:
            return
