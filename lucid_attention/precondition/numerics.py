"""The two conventions that every implementation shares."""

from __future__ import annotations

import torch
from torch import Tensor

KEY_EPS = 1e-6
"""Added to a key's mean square before its root."""


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that the arithmetic runs in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
