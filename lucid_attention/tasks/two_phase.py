"""The two-phase task: first copy the input, then give the running mean; can attention unlearn the diagonal?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_generator, check_numbers

__all__ = ["PHASES", "VERSION", "TwoPhaseBatch", "two_phase"]

VERSION = 1
"""Goes up whenever the same arguments and seed would give other data."""

PHASES = ("copy", "mean")


class TwoPhaseBatch(NamedTuple):
    """One batch, on the CPU.

    Attributes:
        digits: int64 ``(batch, length)``, in [0, 10).
        target: float32 ``(batch, length)``: the digit itself, or the mean of it and all before it.
    """

    digits: Tensor
    target: Tensor


def two_phase(
    batch: int, length: int = 10, *, phase: str, generator: torch.Generator
) -> TwoPhaseBatch:
    """Draw sequences of digits with the targets of one phase; the loss is the squared error.

    Args:
        batch: sequences, at least 0; length: digits in each, at least 0.
        phase: "copy" or "mean".
        generator: source of all randomness, a CPU generator.

    Raises:
        ValueError: a size or a phase that does not exist.
        TypeError: no generator, or a size that is no int.

    Source: arXiv 2602.10410: one layer of width 256, one head, no position encoding, Adam at 1e-4, batches of 64; 30,000 steps of
    copying, then 10,000 to 30,000 of the running mean.

    Example:
        >>> import torch
        >>> from lucid_attention.tasks import two_phase
        >>> batch = two_phase(1, 4, phase="mean", generator=torch.Generator().manual_seed(0))
        >>> torch.equal(batch.target[0, 1], batch.digits[0, :2].float().mean())
        True
    """
    check_numbers(("batch", batch, 0), ("length", length, 0))
    check_generator(generator)
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
    digits = torch.randint(10, (batch, length), generator=generator)
    if phase == "copy":
        return TwoPhaseBatch(digits, digits.float())
    return TwoPhaseBatch(digits, digits.cumsum(-1) / torch.arange(1, length + 1).float())
