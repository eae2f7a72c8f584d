"""How precise float32 products are, which is a matter of the process: a training gives it back as it was."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator

import torch
from transformers.utils.import_utils import enable_tf32

__all__ = ["precision_kept"]


@contextlib.contextmanager
def precision_kept() -> Iterator[None]:
    """TrainingArguments with ``torch_compile`` or ``tf32``, and accelerate, let float32 products be TensorFloat-32, in the whole
    process and for good. After a training they are what they were, and the next one is asked anew.
    """
    paths = ["", "cuda.matmul", "cudnn", "cudnn.conv", "cudnn.rnn", "mkldnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"]  # fmt: skip
    name = "fp32_precision"
    if not hasattr(torch.backends, name):  # before torch 2.9
        paths, name = ["cuda.matmul", "cudnn"], "allow_tf32"
    places = [operator.attrgetter(path)(torch.backends) if path else torch.backends for path in paths]  # fmt: skip
    before = [getattr(place, name) for place in places]
    legacy = _matmul_precision()
    try:
        yield
    finally:
        if legacy is not None and _matmul_precision() != legacy:
            torch.set_float32_matmul_precision(legacy)
        # Those that others inherit from come first.
        for place, value in zip(places, before, strict=True):
            if getattr(place, name) != value:
                setattr(place, name, value)
        # transformers remembers that it has turned the switch, and would not do so again.
        getattr(enable_tf32, "cache_clear", lambda: None)()


def _matmul_precision() -> str | None:
    """By torch's older switch, which cannot be read while it and the newer ones disagree."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
