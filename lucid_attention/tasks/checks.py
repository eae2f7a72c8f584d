"""Checks that all tasks share."""

from __future__ import annotations

import torch


def check_numbers(*numbers: tuple[str, int, int]) -> None:
    """``(name, number, least)``: TypeError for what is no int, ValueError for what is too small."""
    for name, number, least in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must be an int, got {type(number).__name__} {number!r}")
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")


def check_generator(generator: torch.Generator) -> None:
    """TypeError or ValueError unless it is a generator on the CPU."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator, got {type(generator).__name__}; "
            "pass torch.Generator().manual_seed(seed)"
        )
    if generator.device.type != "cpu":
        raise ValueError(
            f"generator must be a CPU generator, got one on {generator.device}: the batch is drawn "
            "on the CPU, so that a seed gives the same data everywhere; pass "
            "torch.Generator().manual_seed(seed) and move the batch"
        )
