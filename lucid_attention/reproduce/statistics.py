"""Means over seeds, and differences between twins."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .experiment import Row

__all__ = ["COUNTS", "Paired", "paired", "quantile", "said", "several_texts", "spread_of"]

COUNTS = (
    "mean of the paired differences ± its standard error, bold where chance would give as much less than once in twenty times "
    "(Student's t, each by itself)"
)
"""What a table says of its differences."""


@dataclass(frozen=True)
class Paired:
    """A difference between two settings over the same seeds.

    Attributes:
        mean, error: of the differences; the error is the standard error of their mean.
        seeds: how many.
    """

    mean: float
    error: float
    seeds: int

    @property
    def counts(self) -> bool:
        """Whether chance alone would give a difference as large less than once in twenty times, by Student's t.

        Of three seeds that takes 4.3 standard errors: two would be exceeded in 18 % of all cases in which there is nothing.
        """
        return self.seeds >= 3 and abs(self.mean) > quantile(self.seeds) * self.error

    @property
    def seeds_to_resolve(self) -> float:
        """How many seeds of this spread would make this mean count."""
        if self.seeds < 2 or self.mean == 0 or not math.isfinite(self.mean):
            return math.inf
        spread = self.error * math.sqrt(self.seeds)
        for number in range(3, 1000):
            if abs(self.mean) > quantile(number) * spread / math.sqrt(number):
                return number
        return math.inf

    def said(self, *, with_seeds: bool = False) -> str:
        """For a table, bold where it counts; empty without seeds."""
        if self.seeds == 0:
            return ""
        told = with_seeds or self.seeds == 1
        text = str(self) if told else f"{self.mean:+.3f} ± {self.error:.3f}"
        return f"**{text}**" if self.counts else text

    def __str__(self) -> str:
        if self.seeds == 1:  # it has no spread
            return f"{self.mean:+.3f} (one seed)"
        return f"{self.mean:+.3f} ± {self.error:.3f} ({self.seeds} seeds)"


# Two-sided 5 %, by degrees of freedom from 1 on.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def quantile(seeds: int) -> float:
    """Student's t for a mean of so many differences, two-sided, 5 %; beyond ten degrees of freedom to .5 %."""
    degrees = seeds - 1
    return _STUDENT[degrees - 1] if degrees <= len(_STUDENT) else 1.96 + 2.6 / degrees


def paired(ours: Iterable[Row], theirs: Iterable[Row], metric: str) -> Paired:
    """Ours minus theirs, seed by seed; seeds that only one side has are left out."""
    right = {row["seed"]: float(row[metric]) for row in theirs}
    gaps = [float(row[metric]) - right[row["seed"]] for row in ours if row["seed"] in right]
    if not gaps:
        return Paired(math.nan, math.nan, 0)
    mean = sum(gaps) / len(gaps)
    if len(gaps) < 2:
        return Paired(mean, math.nan, len(gaps))
    spread = math.sqrt(sum((g - mean) ** 2 for g in gaps) / (len(gaps) - 1))
    return Paired(mean, spread / math.sqrt(len(gaps)), len(gaps))


def spread_of(rows: Iterable[Row], metric: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    values = [float(row[metric]) for row in rows]
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))


def said(rows: Iterable[Row], metric: str, digits: int = 3, *, seeds: int | None = None) -> str:
    """``mean ± standard deviation`` for a table; empty without rows; with their number if it is one or not ``seeds``."""
    rows = list(rows)
    if not rows:
        return ""
    mean, deviation = spread_of(rows, metric)
    number = "" if seeds in (None, len(rows)) else f" ({len(rows)} of {seeds} seeds)"
    if len(rows) == 1:  # it has no spread
        return f"{mean:.{digits}f}{number or ' (one seed)'}"
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}{number}"


def several_texts(rows: Iterable[Row]) -> list[str]:
    """A warning, where models of one kind of text have learnt from different installations' files."""
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(str(row.get("text", "")), set()).add(str(row["corpus"]))
    return [
        f"Not one text{f' ({text})' if text else ''}: {', '.join(sorted(corpora))}, by the beginning of their SHA-256. Means over seeds are of different texts."
        for text, corpora in found.items()
        if len(corpora) > 1
    ]
