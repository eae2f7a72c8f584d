"""Needles and variable tracking on a model, at any length: the tasks of `lucid_attention.tasks` that are prose."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from lucid_attention.generate import prompt_ids
from lucid_attention.tasks import (
    Sample,
    needles,
    needles_in_prose,
    score,
    tracking,
    variable_tracking,
)
from lucid_attention.tasks.seeding import seeded

__all__ = ["TASKS", "ProseTask", "parse_task"]

TASKS: dict[str, tuple[Callable[..., Sample], int]] = {
    "needles": (needles_in_prose, needles.VERSION),
    "tracking": (variable_tracking, tracking.VERSION),
}
# Seven digits are three to seven tokens in any tokenizer with digits, a name as many.
_TOKENS_AN_ANSWER = 12
_SHOWN = 400
"""Characters of a prompt's end that are kept: the question."""


@dataclass(frozen=True)
class ProseTask:
    """A task with its dials.

    Attributes:
        name: as the user wrote it: ``needles:keys=4:queries=2``.
        make: a generator of `lucid_attention.tasks`; options: its dials; version: of the task.
    """

    name: str
    make: Callable[..., Sample]
    options: dict[str, int]
    version: int

    def samples(self, prose: str, tokenizer: Any, length: int, number: int, seed: int) -> Iterator[Sample]:  # fmt: skip
        """``number`` of them; sample ``i`` depends on the task as it is spelled, the length, ``seed`` and ``i`` alone.

        ``length`` is of prompt and answer together, in the tokenizer's tokens.

        Raises:
            ValueError: too short for one of them, or dials that do not go together.
        """

        def count(text: str) -> int:
            return len(tokenizer(text, verbose=False)["input_ids"])

        for index in range(number):
            generator = seeded(self.name, length, seed, index)
            # What it will be answered with is known only when it is made: leave room for the most.
            room = self.new_tokens
            dials = {**self.options, "count": count, "generator": generator}
            try:
                sample = self.make(prose, length - room, **dials)
            except ValueError as error:
                if not str(error).startswith("length"):
                    raise
                raise ValueError(
                    f"sample {index} of {self.name} does not fit {length} tokens, of which {room} are for the answer: {error}"
                ) from None
            yield sample

    @property
    def answers(self) -> int:
        """How many things are asked for."""
        if self.make is needles_in_prose:
            return self.options.get("values", 1) * self.options.get("queries", 1)
        return self.options.get("hops", 4) + 1

    @property
    def new_tokens(self) -> int:
        """As many as an answer may take."""
        return _TOKENS_AN_ANSWER * self.answers + 8


def parse_task(text: str) -> ProseTask | None:
    """A task of this project with its dials; None for any other name.

    Raises:
        ValueError: a dial that does not exist, or is no number.
    """
    name, *dials = text.split(":")
    if name not in TASKS:
        return None
    make, version = TASKS[name]
    given = inspect.signature(make).parameters
    known = [n for n in given if n not in ("prose", "length", "count", "generator")]
    options = {}
    for dial in dials:
        key, equals, value = dial.partition("=")
        if key not in known or not equals or not (value.isascii() and value.isdigit()):
            raise ValueError(
                f"{text}: expected {name}, or dials such as {name}:{known[0]}=4; {name} has {', '.join(known)}, got {dial!r}"
            )
        options[key] = int(value)
    return ProseTask(text, make, options, version)


@torch.no_grad()
def run_task(
    task: ProseTask,
    model: Any,
    tokenizer: Any,
    prose: str,
    length: int,
    *,
    number: int,
    batch_size: int,
    seed: int,
    quiet: bool,
    samples: list[Sample] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Accuracy of one task at one length: a row, and what was asked and said; ``samples``: made already."""
    samples = samples or list(task.samples(prose, tokenizer, length, number, seed))
    # Padding is masked: without a token for it any will do.
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(token for token in pads if token is not None)
    said: list[str] = []
    tokens: list[int] = []
    bar = tqdm(total=number, desc=f"{task.name} at {length}", disable=quiet or None, leave=False)
    with bar:
        for start in range(0, number, batch_size):
            prompts = [s.prompt for s in samples[start : start + batch_size]]
            ids = [prompt_ids(tokenizer, p) for p in prompts]
            tokens += map(len, ids)
            longest = max(map(len, ids))
            # Padding on the left, where it changes nothing.
            rows = torch.tensor([[pad] * (longest - len(row)) + row for row in ids])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
            output = model.generate(
                rows.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=task.new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_k=None,
                top_p=None,
                pad_token_id=pad,
            )
            said += tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
            bar.update(len(prompts))
    scores = [score(sample, text) for sample, text in zip(samples, said, strict=True)]
    mean = sum(scores) / number
    spread = math.nan  # of one sample
    if number > 1:
        spread = math.sqrt(sum((x - mean) ** 2 for x in scores) / (number - 1) / number)
    row = {
        "task": task.name,
        "version": task.version,
        "length": length,
        "metric": "accuracy",
        "value": mean,
        "stderr": spread,
        "samples": number,
    }
    records = [
        {
            "task": task.name,
            "length": length,
            "index": index,
            "prompt_tokens": size,
            "end_of_prompt": sample.prompt[-_SHOWN:],
            "answers": list(sample.answers),
            "depths": [round(n.depth, 4) for n in sample.needles if n.value in sample.answers or n.key in sample.answers],
            "said": text,
            "score": x,
        }
        for index, (sample, size, text, x) in enumerate(zip(samples, tokens, said, scores, strict=True))
    ]  # fmt: skip
    return row, records
