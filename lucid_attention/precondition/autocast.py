"""Autocast as SDPA treats it: inputs are cast on the way in, nothing is rounded inside."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def autocast(tensor: Tensor) -> Tensor:
    """Cast as autocast casts the inputs of ``F.scaled_dot_product_attention``: not float64.

    It runs before the arguments are checked, as autocast does, so that float32 keys (after a RoPE
    in float32) go with half-precision values; what is not a floating tensor is left to the checks.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return tensor
    device = tensor.device.type
    if device == "meta":  # it has no autocast, and asking raises
        return tensor
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Autocast would round the operands of every product inside to half precision."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
