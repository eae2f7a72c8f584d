"""Synthetic tasks as rows of tokens that a language model can be trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lucid_attention.tasks import updatable_memory
from lucid_attention.tasks.updatable_memory import IGNORED

from .configuration import TrainError

__all__ = ["MemoryRows"]

_OPTIONS: dict[str, Any] = {"keys": 64, "values": 64, "query_share": 0.3}
_TRAINING_ROWS, _VALIDATION_ROWS = 1 << 30, 256
_STRIDE = 1 << 31


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
            self[0]
        except (ValueError, TypeError) as error:
            raise TrainError(f"task_options: {error}") from None

    @property
    def vocabulary(self) -> int:
        return int(self.options["keys"]) + int(self.options["values"]) + 1

    def __len__(self) -> int:
        return _VALIDATION_ROWS if self.validation else _TRAINING_ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = index + (_TRAINING_ROWS if self.validation else 0)
        generator = torch.Generator().manual_seed(self.seed * _STRIDE + place)
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
