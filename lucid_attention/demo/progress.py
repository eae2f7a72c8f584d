"""One progress bar for terminals and log files alike."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

__all__ = ["progress"]

_LOG_SECONDS = 10.0


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; yields the function that moves it on by so many units.

    In a terminal the bar redraws itself; elsewhere (a CI log, a file) it is a new plain line at
    the start, every ten seconds and at the end.

    Args:
        description: what is being done.
        total: units of work in all.
    """
    with _bar(description, total) as bar:

        def advance(units: int) -> None:
            bar.update(units)

        yield advance


def _bar(description: str, total: int) -> tqdm[None]:
    if sys.stderr.isatty():
        return tqdm(total=total, desc=description, dynamic_ncols=True)
    return tqdm(
        total=total,
        desc=description,
        file=_Lines(sys.stderr),
        ascii=True,
        ncols=79,
        mininterval=_LOG_SECONDS,
        # tqdm's adaptive step would skip lines when the work slows down.
        miniters=1,
    )


class _Lines:
    """A text stream on which each redraw of a bar becomes a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()
