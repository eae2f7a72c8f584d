"""Synthetic tasks as rows of tokens that a language model can be trained on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lucid_attention.tasks import needles_in_prose, updatable_memory
from lucid_attention.tasks.seeding import seeded
from lucid_attention.tasks.updatable_memory import IGNORED

from .configuration import TrainError

__all__ = ["MemoryRows", "NeedleRows", "part_of", "read_prose"]

_OPTIONS: dict[str, Any] = {"keys": 64, "values": 64, "query_share": 0.3}
_TRAINING_ROWS, _VALIDATION_ROWS = 1 << 30, 256
_CHECKED_TOKENS = 1 << 12
"""Of needles, before a training begins."""


class MemoryRows(Dataset[dict[str, Tensor]]):
    """The updatable memory as text: ``key value key value ..``.

    A token pair is a write or, for ``query_share`` of them, a query, in which the value is the key's latest and is what
    has to be foretold from the key; only these have labels. Keys are the tokens ``0 .. keys - 1``, values come after them,
    then the blank, the value of a key that was never written. Row ``i`` is drawn from ``(seed, i)`` alone, so any
    number of rows can be had, in any order, and a run that goes on sees the rows it would have seen.

    Args:
        options: ``keys``, ``values``, ``query_share``.
        length: tokens in a row.
        seed: of the data.
        validation: rows that no training row equals.

    Raises:
        TrainError: an option that does not exist or is out of range.
    """

    def __init__(
        self, options: dict[str, Any] | None, length: int, *, seed: int, validation: bool = False
    ) -> None:
        unknown = set(options or {}) - set(_OPTIONS)
        if unknown:
            raise TrainError(
                f"task_options: expected {', '.join(_OPTIONS)}, got {', '.join(sorted(unknown))}"
            )
        self.options = {**_OPTIONS, **(options or {})}
        self.length, self.seed, self.validation = length, seed, validation
        try:
            asks = any(bool((self[index]["labels"] != IGNORED).any()) for index in range(64))
        except (ValueError, TypeError) as error:
            raise TrainError(f"task_options: {error}") from None
        if not asks:
            raise TrainError(
                f"task_options: of 64 rows none asks for a value that was written, with query_share {self.options['query_share']}, "
                f"{self.options['keys']} keys and length {length}; take a share between 0 and 1, fewer keys or a larger length"
            )

    @property
    def vocabulary(self) -> int:
        return int(self.options["keys"]) + int(self.options["values"]) + 1

    def __len__(self) -> int:
        return _VALIDATION_ROWS if self.validation else _TRAINING_ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        generator = seeded("memory", self.seed, self.validation, index)
        pairs = -(-self.length // 2)
        draw = updatable_memory(1, pairs, generator=generator, **self.options)
        keys, values = int(self.options["keys"]), int(self.options["values"])
        asked = draw.value[0] == values
        answer = torch.where(draw.target[0] == IGNORED, values, draw.target[0])
        value = keys + torch.where(asked, answer, draw.value[0])
        ids = torch.stack((draw.key[0], value), dim=-1).flatten()
        known = asked & (draw.target[0] != IGNORED)
        labels = torch.stack(
            (torch.full_like(value, IGNORED), torch.where(known, value, IGNORED)), dim=-1
        ).flatten()
        return {"input_ids": ids[: self.length], "labels": labels[: self.length]}


class NeedleRows(Dataset[dict[str, Tensor]]):
    """Needles in prose as rows: the text, the question and the answer, of which only the answer has labels.

    One sample fills a row as far as it goes; what is left is end-of-text tokens without labels. Row ``i`` is drawn from
    ``(seed, i)`` alone.

    Args:
        options: ``keys``, ``values``, ``queries`` of `needles_in_prose`; with ``vary`` (on by default) a row has 1 to
            ``keys`` names and asks for 1 to ``queries`` of them; ``prose``: a UTF-8 file, None: Jane Austen, Persuasion.
        length: tokens in a row.
        tokenizer: of the model.
        seed: of the data.
        validation: rows of the last fifth of the prose, of which training sees nothing.

    Raises:
        TrainError: an option that does not exist or is out of range, a row too short for what is asked.
    """

    def __init__(
        self,
        options: dict[str, Any] | None,
        length: int,
        tokenizer: Any,
        *,
        seed: int,
        validation: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {"keys": 1, "values": 1, "queries": 1, "vary": True, "prose": None}  # fmt: skip
        unknown = set(options or {}) - set(defaults)
        if unknown:
            raise TrainError(
                f"task_options: expected {', '.join(defaults)}, got {', '.join(sorted(unknown))}"
            )
        self.options = {**defaults, **(options or {})}
        self.length, self.tokenizer, self.seed, self.validation = length, tokenizer, seed, validation  # fmt: skip
        self.prose = part_of(read_prose(self.options["prose"]), validation)
        try:
            # The longest questions there are; the shorter the rows, the more they differ in what is left for prose.
            for index in range(min(len(self), max(4, min(256, _CHECKED_TOKENS // length)))):
                self._row(index, vary=False)
        except (ValueError, TypeError) as error:
            raise TrainError(f"task_options: {error}") from None

    def __len__(self) -> int:
        return _VALIDATION_ROWS if self.validation else _TRAINING_ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._row(index, vary=self.options["vary"])

    def _row(self, index: int, *, vary: bool) -> dict[str, Tensor]:
        generator = seeded("needles", self.seed, self.validation, index)
        keys, values, queries = (self.options[name] for name in ("keys", "values", "queries"))
        if vary:
            keys = int(torch.randint(1, keys + 1, (), generator=generator))
            queries = int(torch.randint(1, min(queries, keys) + 1, (), generator=generator))
        end = self.tokenizer.eos_token_id
        room = _TOKENS_A_NUMBER * queries * values + 2
        sample = needles_in_prose(
            self.prose, self.length - room, keys=keys, values=values, queries=queries,
            count=lambda text: len(self.tokenizer(text, verbose=False)["input_ids"]), generator=generator,
        )  # fmt: skip
        before = self.tokenizer(sample.prompt, verbose=False)["input_ids"]
        answer = [*self.tokenizer(f" {', '.join(sample.answers)}.")["input_ids"], end]
        rest = self.length - len(before) - len(answer)
        if rest < 0:
            raise ValueError(f"an answer of {len(answer)} tokens does not fit the row")
        ids = torch.tensor([*before, *answer, *[end] * rest])
        labels = torch.full_like(ids, IGNORED)
        labels[len(before) : len(before) + len(answer)] = torch.tensor(answer)
        return {"input_ids": ids, "labels": labels}


_END = re.compile(r"[.!?][\"'\u2019\u201d)\]]*\s+|\n+")
# Seven digits are seven tokens at most, with a comma and a space.
_TOKENS_A_NUMBER = 10


def read_prose(path: str | None) -> str:
    """A UTF-8 file, or the novel that comes with the package.

    Raises:
        TrainError: it cannot be read.
    """
    if path is None:
        from lucid_attention.tasks.novel import packaged_novel

        return packaged_novel()
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"task_options: prose {path}: cannot be read ({error})") from None


def part_of(prose: str, held_out: bool) -> str:
    """The last fifth of a text, or what is before it, cut where a sentence or a line ends.

    Raises:
        TrainError: there is no such place.
    """
    end = _END.search(prose, len(prose) * 4 // 5)
    if end is None or not prose[: end.end()].strip() or not prose[end.end() :].strip():
        raise TrainError(
            "task_options: prose has no end of a sentence or of a line in its last fifth, which is held out; give more text"
        )
    return prose[end.end() :] if held_out else prose[: end.end()]
