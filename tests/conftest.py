"""Shared test set-up: threads, hypothesis profile, keys that exercise LUCID, GPU skipping."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Two pytest workers share two cores: more threads a worker only makes them wait for each other.
torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Without a GPU the Triton kernels are tested in Triton's interpreter (read when they are imported).
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

hypothesis.settings.register_profile("house", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: run `make test-gpu` on a machine with one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _card_shared() -> Iterator[None]:
    """What a test leaves in torch's cache is lost to the other workers on the card."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 1 << 30:
        torch.cuda.empty_cache()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill freshly allocated memory with NaN, so that reading it unwritten shows."""
    # On a GPU the oracle's matrix products would want an environment variable of cuBLAS.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


Keys = Callable[..., Tensor]


def make_keys(
    kind: str, *shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Tensor:
    """Keys ``(..., seq, head_dim)`` of a named kind.

    ``cosX``: every pair has cosine X; ``identical``; ``repeated``: eight keys written over and over;
    ``zero``; ``huge`` (1e4) and ``tiny`` (1e-20); ``mixed``: some of each in one sequence.
    """
    random = torch.randn(*shape, dtype=torch.float64)
    shared = torch.randn(*shape[:-2], 1, shape[-1], dtype=torch.float64).expand(shape)
    if kind.startswith("cos"):
        cosine = float(kind[3:])
        keys = math.sqrt(cosine) * shared + math.sqrt(1 - cosine) * random
    elif kind == "identical":
        keys = shared.clone()
    elif kind == "repeated":
        pick = torch.randint(0, 8, (shape[-2],))
        keys = random[..., pick.clamp(max=max(0, shape[-2] - 1)), :]
    elif kind == "zero":
        keys = torch.zeros(shape, dtype=torch.float64)
    elif kind == "huge":
        keys = 1e4 * random
    elif kind == "tiny":
        keys = 1e-20 * random
    elif kind == "mixed":
        keys = random.clone()
        keys[..., 1::4, :] = 0.0
        keys[..., 2::4, :] = shared[..., 2::4, :]
        keys[..., 3::4, :] *= 1e4
    else:
        raise ValueError(kind)
    return keys.to(device=device, dtype=dtype)


HARD_KEYS = ("cos0", "cos0.5", "cos0.8", "cos0.99", "identical", "repeated", "zero", "huge", "tiny", "mixed")  # fmt: skip


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``|got - expected|_F / |expected|_F``; infinite where something is not finite."""
    got, expected = got.double(), expected.double()
    if not bool(got.isfinite().all()):
        return math.inf
    norm = expected.norm().item()
    difference = (got - expected).norm().item()
    return difference / norm if norm > 0 else difference


class Asked(TorchDispatchMode):
    """What the operators of the solve are asked for, by their names: precisions, and tokens of past."""

    def __init__(self) -> None:
        super().__init__()
        self.precisions: dict[str, set[str]] = {}
        self.pasts: list[int] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function.name().startswith("lucid_attention::precondition"):
            names = [argument.name for argument in function._schema.arguments]
            given = dict(zip(names, args, strict=True))
            name = function.name().split("::")[1]
            self.precisions.setdefault(name, set()).add(given["precision"])
            if name == "precondition":
                past = given["past_key"]
                self.pasts.append(0 if past is None else past.shape[2])
        return function(*args, **(kwargs or {}))
