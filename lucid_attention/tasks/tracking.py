"""Variable tracking: names handed on from one to the next in prose; which of them hold a number?"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .checks import check_generator, check_numbers
from .prose import Sample, scatter, words

__all__ = ["VERSION", "variable_tracking"]

VERSION = 1
"""Goes up whenever the same arguments and seed would give other data."""


def variable_tracking(
    prose: str,
    length: int,
    *,
    chains: int = 1,
    hops: int = 4,
    count: Callable[[str], int] = words,
    generator: torch.Generator,
) -> Sample:
    """Scatter ``chains`` of assignments over a text: a number to a name, that name to the next, and so on.

    Args:
        prose: real text to scatter them in, cut at sentences.
        length: of the prompt at most, in units of ``count``.
        chains: of assignments, of which one is asked for; hops: names after the first in each.
        count, generator: as for `needles_in_prose`.

    Returns:
        A `Sample`; its answers are the ``hops + 1`` names of one chain, and a needle's key and value are a name and what
        it was given.

    Raises:
        ValueError, TypeError: as for `needles_in_prose`.

    Source: the variable tracking of RULER (arXiv 2404.06654), in this project's words.

    Example:
        >>> import torch
        >>> from lucid_attention.tasks import variable_tracking
        >>> prose = "It was late. The rain had stopped. Nobody came to the door."
        >>> sample = variable_tracking(prose, 60, hops=2, generator=torch.Generator().manual_seed(0))
        >>> len(sample.answers), len(sample.needles)
        (3, 3)
    """
    check_numbers(("length", length, 1), ("chains", chains, 1), ("hops", hops, 0))
    check_generator(generator)
    each = hops + 1
    if chains * each > 26**3:
        raise ValueError(f"chains * (hops + 1) must be at most {26**3}, got {chains * each}")
    codes = torch.randperm(26**3, generator=generator)[: chains * each].tolist()
    names = ["".join(chr(65 + code // 26**k % 26) for k in (2, 1, 0)) for code in codes]
    numbers = torch.randperm(90_000, generator=generator)[:chains].add(10_000).tolist()
    # Chains are interleaved, each in its own order.
    shuffled = torch.randperm(chains * each, generator=generator)
    turns = (shuffled // each).tolist()
    done, steps = [0] * chains, []
    for chain in turns:
        place = chain * each + done[chain]
        given = str(numbers[chain]) if done[chain] == 0 else names[place - 1]
        steps.append((names[place], given))
        done[chain] += 1
    lines = [
        (name, given, f"VAR {name} = {'' if given.isdigit() else 'VAR '}{given}.")
        for name, given in steps
    ]
    question = (
        f"\n\nQuestion: Which variables hold {numbers[0]}, at first or from another variable?\n"
        "Answer: They are"
    )
    prompt, found = scatter(prose, length, lines, question, count, generator)
    return Sample(prompt, tuple(names[:each]), found)
