"""The data as tokens on disk, and as rows packed with documents."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lucid_attention.tasks.seeding import seeded

from .configuration import TrainError

__all__ = ["Rows", "Shuffled", "Tokens", "write_tokens"]

IGNORED = -100
_BATCH = 256
_WITHOUT_END = 1 << 40


@dataclass(frozen=True)
class Tokens:
    """A tokenised text, mapped from disk.

    Attributes:
        ids: ``(tokens,)``; every document ends with the tokenizer's end-of-text token.
        starts: int64 ``(documents,)``, where each begins.
    """

    ids: np.ndarray[Any, Any]
    starts: np.ndarray[Any, Any]

    @classmethod
    def load(cls, folder: Path) -> Tokens:
        """What `write_tokens` left in a folder."""
        facts = json.loads((folder / "tokens.json").read_text())
        ids = np.memmap(folder / "tokens.bin", dtype=facts["dtype"], mode="r")
        return cls(ids, np.fromfile(folder / "documents.bin", dtype=np.int64))

    def part(self, begin: int, end: int) -> Tokens:
        """Tokens ``begin:end``; a document that is cut begins there."""
        inside = (self.starts > begin) & (self.starts < end)
        starts = (
            np.concatenate(([0], self.starts[inside] - begin)) if end > begin else self.starts[:0]
        )
        return Tokens(self.ids[begin:end], starts.astype(np.int64))


def write_tokens(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    quiet: bool = False,
) -> Tokens:
    """Tokenise documents into a folder, so that a run that goes on sees exactly the same; then map them.

    An interrupt leaves the folder without ``tokens.json``, and the next run begins anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    small = len(tokenizer) <= 1 << 16
    dtype = np.dtype(np.uint16 if small else np.uint32)
    starts, total = [], 0
    bar = tqdm(desc="tokens", unit=" tokens", unit_scale=True, disable=quiet or None, leave=False)
    with (folder / "tokens.bin").open("wb") as file, bar:
        batch: list[str] = []

        def flush() -> None:
            nonlocal total
            # A whole text is longer than any model's limit, which the tokenizer would warn of.
            # And a text that happens to hold "<|endoftext|>" does not end there.
            encoded = tokenizer(
                batch, add_special_tokens=False, split_special_tokens=True, verbose=False
            )["input_ids"]
            for ids in encoded:
                ids = [*ids, tokenizer.eos_token_id]
                starts.append(total)
                total += len(ids)
                np.asarray(ids, dtype=dtype).tofile(file)
                bar.update(len(ids))
            batch.clear()

        for text in documents:
            batch.append(text)
            if len(batch) >= _BATCH:
                flush()
        if batch:
            flush()
    np.asarray(starts, dtype=np.int64).tofile(folder / "documents.bin")
    if total == 0:
        raise TrainError("text: is empty")
    facts = {"dtype": dtype.name, "tokens": total, "documents": len(starts)}
    partial = folder / ".tokens.json.partial"
    partial.write_text(json.dumps(facts) + "\n")
    partial.replace(folder / "tokens.json")
    return Tokens.load(folder)


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of ``length`` tokens, one after another; what is left at the end is dropped.

    Each has ``input_ids`` and ``labels`` (the model shifts them); with document masks also ``position_ids``, which
    restart at 0 in every document, and no label for a document's first token, which nothing before it foretells.
    """

    def __init__(self, tokens: Tokens, length: int, *, document_masks: bool) -> None:
        self.tokens, self.length, self.document_masks = tokens, length, document_masks

    def __len__(self) -> int:
        return len(self.tokens.ids) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin = index * self.length
        ids = torch.from_numpy(self.tokens.ids[begin : begin + self.length].astype(np.int64))
        if not self.document_masks:
            return {"input_ids": ids, "labels": ids.clone()}
        place = np.arange(begin, begin + self.length)
        starts = self.tokens.starts
        own = starts[np.searchsorted(starts, place, side="right") - 1]
        position = torch.from_numpy(place - np.maximum(own, begin))
        return {
            "input_ids": ids,
            "labels": ids.masked_fill(position == 0, IGNORED),
            "position_ids": position,
        }


class Shuffled(Dataset[dict[str, Tensor]]):
    """Rows in a new order in every epoch, without end, to be read in sequence.

    Which row comes when depends on ``seed`` alone: not on the batch size, the number of processes, the steps that were asked
    for, or where a training was stopped.
    """

    def __init__(self, rows: Rows, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return _WITHOUT_END

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, place = divmod(index, len(self.rows))
        if epoch != self._epoch:
            generator = seeded("rows", self.seed, epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.rows), generator=generator)
        return self.rows[int(self._order[place])]
