"""Questions about sentences that are scattered over real prose: what the needle tasks have in common."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Needle", "Sample", "scatter", "score", "sentences_of", "words", "words_of"]


@dataclass(frozen=True)
class Needle:
    """One scattered sentence, ``prompt[start:end]``.

    Attributes:
        key: what it is about: a name.
        value: what it says of it.
        depth: 0 at the beginning of the text, 1 at its end.
    """

    key: str
    value: str
    start: int
    end: int
    depth: float


@dataclass(frozen=True)
class Sample:
    """One question about one text.

    Attributes:
        prompt: text, question and the beginning of the answer; a model goes on from here.
        answers: everything that was asked for; `score` looks for it in what a model says.
        needles: the scattered sentences, in the text's order.
    """

    prompt: str
    answers: tuple[str, ...]
    needles: tuple[Needle, ...]


def score(sample: Sample, said: str) -> float:
    """The share of the answers that occur, as whole words in any case, in what a model said.

    RULER looks for them as parts of words as well. Commas between thousands do not count.

    Example:
        >>> from lucid_attention.tasks import Sample, score
        >>> score(Sample("", ("12", "34"), ()), "12 and 345.")
        0.5
        >>> score(Sample("", ("1234567", "7654321"), ()), "1234567,7,654,321")
        1.0
    """
    said = said.casefold()
    found = {
        word
        for text in (said, re.sub(r"(?<=\d),(?=\d{3}\b)", "", said))
        for word in re.findall(r"\w+", text)
    }
    return sum(answer.casefold() in found for answer in sample.answers) / len(sample.answers)


def words_of(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


def words(text: str) -> int:
    """The length of a text in words."""
    return len(words_of(text))


_LONGEST = 2000
"""Characters of a sentence; twice what Jane Austen needs. What is longer is cut at words."""
_PIECE = 150


@functools.lru_cache(maxsize=8)  # the same text serves thousands of samples
def sentences_of(prose: str) -> tuple[str, ...]:
    """The sentences of a text, each on one line; what has no sentences (code, lists) in pieces of some words.

    Raises:
        ValueError: there are none.
    """
    text = " ".join(prose.split())
    ends = r"(?<=[.!?]['\"”’]) |(?<=[.!?]) |(?<=[。！？][”’」』]) ?|(?<=[。！？])(?![”’」』]) ?"
    found = tuple(p for s in re.split(ends, text) if s for p in _pieces(s))
    if not found:
        raise ValueError("prose must have at least one sentence, got none")
    return found


def _pieces(sentence: str) -> list[str]:
    if len(sentence) <= _LONGEST:
        return [sentence]
    return re.findall(rf"\S(?:.{{0,{_PIECE - 2}}}\S)?(?= |$)|\S{{{_PIECE}}}", sentence)


def scatter(
    prose: str,
    length: int,
    lines: Sequence[tuple[str, str, str]],
    question: str,
    count: Callable[[str], int],
    generator: torch.Generator,
) -> tuple[str, tuple[Needle, ...]]:
    """The longest prompt of at most ``length``: prose with lines between its sentences, and a question.

    Args:
        lines: ``(key, value, sentence)``, in the order in which they will stand; at random depths.

    Raises:
        ValueError: lines and question alone are longer.
    """
    sentences = sentences_of(prose)
    first = int(torch.randint(len(sentences), (), generator=generator))
    places = torch.rand(len(lines), generator=generator).sort().values.tolist()

    def prompt(size: int) -> tuple[str, tuple[Needle, ...]]:
        parts: list[str] = []
        found: list[tuple[str, str, int, int]] = []
        at, waiting = 0, list(zip(places, lines, strict=True))
        for number in range(size + 1):
            while waiting and (number == size or waiting[0][0] * (size + 1) < number + 1):
                key, value, line = waiting.pop(0)[1]
                found.append((key, value, at, at + len(line)))
                parts.append(line)
                at += len(line) + 1
            if number < size:
                parts.append(sentences[(first + number) % len(sentences)])
                at += len(parts[-1]) + 1
        body = " ".join(parts)
        needles = tuple(Needle(*n, depth=n[2] / max(1, len(body))) for n in found)
        return body + question, needles

    least = count(prompt(0)[0])
    if least > length:
        raise ValueError(
            f"length must hold the sentences to be found and the question, {least}, got {length}"
        )
    # Begin at a guess: counting is what takes long. Lengths grow with the sentences, so the search ends at the same place.
    some = min(len(sentences), 64)
    each = max(1.0, (count(prompt(some)[0]) - least) / some)
    low, high = 0, max(1, int((length - least) / each))
    step = max(1, high // 32)
    while count(prompt(high)[0]) <= length:
        low, high = high, high + step
        step *= 2
    while high - low > step and high > step and count(prompt(high - step)[0]) > length:
        high -= step
    low = max(low, high - step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(prompt(middle)[0]) <= length else (low, middle)
    return prompt(low)
