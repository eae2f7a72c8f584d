"""Needles in prose: numbers under names, scattered over a text, of which some are asked for at its end."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .checks import check_generator, check_numbers
from .prose import Sample, scatter, words, words_of

__all__ = ["VERSION", "needles_in_prose"]

VERSION = 2
"""Goes up whenever the same arguments and seed would give other data."""

# A name is one of each: 48 x 48 of them.
_COLOURS = words_of(
    "amber azure black blue bronze brown copper coral crimson cream dark dusky emerald fawn "
    "golden green grey hazel indigo ivory jade khaki lemon light lilac lime maroon mauve mild "
    "navy ochre olive orange pale pearl pink plum purple red rosy ruby rusty scarlet silver "
    "tawny teal violet white"
)
_THINGS = words_of(
    "anchor apple arrow badger barrel basket beacon bell bridge bucket candle castle cedar "
    "cellar clock cloud compass cradle crown door dragon drum eagle engine falcon feather "
    "fiddle flute forest fountain garden harbour helmet island kettle ladder lantern lion "
    "meadow mirror needle orchard pebble river saddle shadow tower window"
)


def needles_in_prose(
    prose: str,
    length: int,
    *,
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    count: Callable[[str], int] = words,
    generator: torch.Generator,
) -> Sample:
    """Hide ``keys * values`` numbers in a text and ask for those of ``queries`` names.

    Args:
        prose: real text to hide them in; it is cut at sentences, begun at a random one, and gone through again if it is short.
        length: of the prompt at most, in units of ``count``; the text is as long as it can be.
        keys: names in the text; values: numbers under each; queries: names asked for, at most ``keys``.
        count: the length of a text: words, or ``lambda text: len(tokenizer(text).input_ids)``.
        generator: source of all randomness, a CPU generator.

    Returns:
        A `Sample`; its needles' keys are names, and their values numbers. Its prompt ends with the beginning of the answer, which
        says the names again in the needles' words, as RULER's does: what is asked is whether a model finds the right one of
        alike sentences, not whether it can follow a question.

    Raises:
        ValueError: a number out of range, a text without sentences, needles and question longer than ``length``.
        TypeError: a number that is no int, or no generator.

    Source: the multi-key, multi-value, multi-query needle tasks of RULER (arXiv 2404.06654), in this project's words; with
    one of each, the single needle.

    Example:
        >>> import torch
        >>> from lucid_attention.tasks import needles_in_prose, score
        >>> prose = "It was late. The rain had stopped. Nobody came to the door. She closed the book."
        >>> sample = needles_in_prose(prose, 60, keys=2, generator=torch.Generator().manual_seed(0))
        >>> needle = sample.needles[0]
        >>> sample.prompt[needle.start : needle.end], len(sample.needles), score(sample, sample.answers[0])
        ('The number of the grey beacon is 1296130.', 2, 1.0)
    """
    check_numbers(
        ("length", length, 1), ("keys", keys, 1), ("values", values, 1), ("queries", queries, 1)
    )
    check_generator(generator)
    if queries > keys:
        raise ValueError(f"queries must be at most keys ({keys}), got {queries}")
    if keys > len(_COLOURS) * len(_THINGS):
        raise ValueError(f"keys must be at most {len(_COLOURS) * len(_THINGS)}, got {keys}")
    names = torch.randperm(len(_COLOURS) * len(_THINGS), generator=generator)[:keys].tolist()
    named = [f"{_COLOURS[n // len(_THINGS)]} {_THINGS[n % len(_THINGS)]}" for n in names]
    numbers: list[int] = []
    while len(numbers) < keys * values:  # distinct, so that no answer is right by chance
        number = int(torch.randint(1_000_000, 10_000_000, (), generator=generator))
        if number not in numbers:
            numbers.append(number)
    hidden = [(named[i // values], str(number)) for i, number in enumerate(numbers)]
    hidden = [hidden[i] for i in torch.randperm(len(hidden), generator=generator).tolist()]
    asked = tuple(named[i] for i in torch.randperm(keys, generator=generator)[:queries].tolist())
    lines = [(key, value, f"The number of the {key} is {value}.") for key, value in hidden]
    prompt, found = scatter(prose, length, lines, _question(asked, values), count, generator)
    answers = tuple(value for name in asked for key, value in hidden if key == name)
    return Sample(prompt, answers, found)


def _question(asked: tuple[str, ...], values: int) -> str:
    listed = ", ".join(f"the {name}" for name in asked)
    many = len(asked) * values > 1
    what = "Which numbers belong to" if many else "Which number belongs to"
    begun = f"The numbers of {listed} are" if many else f"The number of {listed} is"
    return f"\n\nQuestion: {what} {listed}?\nAnswer: {begun}"
