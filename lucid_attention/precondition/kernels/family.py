"""Which of the two families of kernels serves a call: Hopper's own, in Gluon, or the portable ones."""

from __future__ import annotations

import functools

import torch
import triton

HOPPER_WIDTHS = frozenset(
    {(64, 64), (64, 128), (128, 64), (128, 128), (80, 80), (96, 96)}
    | {(144, 144), (160, 160), (192, 192), (256, 256), (192, 128)}
)
"""Of keys and values in workspaces: head sizes of 33 to 64 and 97 to 128, 65 to 80 or 81 to 96 where both are, and so 129 to 144, 145 to 160,
161 to 192 and 193 to 256; keys of 161 to 192 with values of 97 to 128. The kernels compile for other pairs, too, which no test has
compared with float64 on a card."""
NARROW = 128
"""Wider keys or values have blocks of 64 rows in the portable kernels, which all pasts go through, and of 128 in Hopper's:
a call with such a past takes the portable ones throughout."""


@functools.cache
def has_hopper_kernels(device: torch.device) -> bool:
    """Gluon's interface changes with every Triton: 3.6 was tested."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) == (9, 0)
        and triton.__version__.startswith("3.6.")
    )


def is_hoppers(
    dtype: torch.dtype, key_width: int, value_width: int, device: torch.device, *, past: bool
) -> bool:
    """Whether Hopper's kernels serve workspaces of this dtype and these widths."""
    return (
        dtype == torch.float16
        and (key_width, value_width) in HOPPER_WIDTHS
        and not (past and max(key_width, value_width) > NARROW)
        and has_hopper_kernels(device)
    )
