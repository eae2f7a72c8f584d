"""Which implementation serves a call: the rule behind ``impl="auto"``, and refusals by name."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType

import torch
from torch import Tensor

from . import blocked_calls

LARGEST_HEAD_DIM = 256
TESTED = (("NVIDIA H100", (9, 0), "3.6.0"), ("NVIDIA H200", (9, 0), "3.6.0"))
"""(card, compute capability, Triton) that the GPU tests were run on."""

KNOWN_BAD: tuple[tuple[tuple[int, int], str, str, str], ...] = ()
"""(compute capability, first bad Triton, first good Triton, what goes wrong): refused by name.

Triton 3.4 to 3.7.0 miscompile ``tl.dot(tl.trans(x), y)`` on Hopper where ``x`` is a product's result
(flash-linear-attention, issues 640 and 984). These kernels never form it, and `tests/test_gpu.py`
compares every gradient with float64 on the card, so no pair is listed.
"""


def choose(impl: str, key: Tensor, value: Tensor, past_key: Tensor | None = None) -> ModuleType:
    """The module whose ``solve_*`` and ``adjoint_*`` serve this call.

    ``auto`` takes the GPU kernels wherever they run and ``blocked`` elsewhere; ``triton`` raises a
    ValueError that says why where they do not.
    """
    if impl != "blocked":
        reason = why_no_kernels(key, value, interpreter=impl == "triton")
        if reason is None and not (impl == "auto" and _short_chunk(key, past_key)):
            return _kernels()
        if impl == "triton":
            raise ValueError(
                f"impl='triton' cannot serve this call: {reason}. Use impl='auto' or impl='blocked'."
            )
    return blocked_calls


@functools.cache
def _kernels() -> ModuleType:
    """Triton is asked for when a kernel first is."""
    return importlib.import_module(".kernels.launch", __package__)


def why_no_kernels(key: Tensor, value: Tensor, *, interpreter: bool = False) -> str | None:
    """Why the GPU kernels cannot take these operands, or None.

    Args:
        interpreter: also take operands on the CPU if TRITON_INTERPRET=1 (slow: for tests).
    """
    if key.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels take float16, bfloat16 and float32, got {key.dtype}"
    widest = max(key.shape[-1], value.shape[-1])
    if widest > LARGEST_HEAD_DIM:
        return f"the kernels take head sizes up to {LARGEST_HEAD_DIM}, got {widest}"
    if interpreter and key.device.type == "cpu" and _interpreted():
        return None
    if key.device.type != "cuda":
        return f"the kernels run on CUDA devices, got a tensor on {key.device.type!r}"
    return _why_not_device(key.device.index)


def _short_chunk(key: Tensor, past_key: Tensor | None) -> bool:
    """Whether this is a decoding step: less than a block of rows after a past.

    The kernels give a block of rows to one program, which would read the whole past alone; torch's
    products spread it over the card.
    """
    return past_key is not None and key.shape[2] < 128


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@functools.cache
def _interpreted() -> bool:
    """Whether TRITON_INTERPRET asked for Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _why_not_device(index: int | None) -> str | None:
    if torch.version.hip is not None:
        return "the kernels were written for NVIDIA GPUs and have not been tried on AMD's"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'lucid-attention[triton]')"
    import triton

    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"the kernels need compute capability 8.0, this GPU has {capability}"
    version = _version(triton.__version__)
    if version < (3, 4):
        return f"the kernels need Triton 3.4, got {triton.__version__}"
    for bad, first, good, what in KNOWN_BAD:
        if capability == bad and _version(first) <= version < _version(good):
            return (
                f"Triton {triton.__version__} on compute capability {capability} gives wrong "
                f"results ({what}); Triton {good} is good"
            )
    if not any(capability == tested and triton.__version__ == v for _, tested, v in TESTED):
        cards = ", ".join(f"{card} with Triton {v}" for card, _, v in TESTED)
        warnings.warn(
            f"lucid_attention: the GPU kernels were tested on {cards}; this is "
            f"{torch.cuda.get_device_name(index)} with Triton {triton.__version__}. They are used; "
            f"impl='blocked' avoids them.",
            stacklevel=2,
        )
    return None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:3] if part.isdigit())
