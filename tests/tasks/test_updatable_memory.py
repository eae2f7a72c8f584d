"""The generated task: hand-checked answers, a solver that must be right everywhere, bad input."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

from lucid_attention.tasks import MemoryBatch, updatable_memory
from lucid_attention.tasks.updatable_memory import IGNORED, VERSION, latest_values


def draw(batch: int, length: int, *, seed: int = 0, **options: Any) -> MemoryBatch:
    options = {"keys": 5, "values": 7, **options}
    return updatable_memory(batch, length, generator=torch.Generator().manual_seed(seed), **options)


def solve(key: list[int], value: list[int], *, blank: int) -> list[int]:
    """A dictionary is the whole memory; it sees only what a model sees."""
    memory: dict[int, int] = {}
    answers = []
    for k, v in zip(key, value, strict=True):
        if v == blank:
            answers.append(memory.get(k, IGNORED))
        else:
            answers.append(IGNORED)
            memory[k] = v
    return answers


def test_hand_checked_answers() -> None:
    key = torch.tensor([[3, 3, 3, 1, 3, 1, 3], [0, 1, 0, 1, 2, 0, 2]])
    value = torch.tensor([[5, 9, 6, 9, 9, 4, 9], [9, 1, 2, 9, 9, 9, 9]])
    is_write = value != 9
    expected = [
        [IGNORED, 5, 5, IGNORED, 6, IGNORED, 6],
        [IGNORED, IGNORED, IGNORED, 1, IGNORED, 2, IGNORED],
    ]
    assert latest_values(key, value, is_write).tolist() == expected


@pytest.mark.parametrize(
    ("length", "keys", "query_share"),
    [(1, 1, 0.5), (2, 1, 0.5), (129, 1, 0.3), (500, 16, 0.3), (300, 4096, 0.6), (64, 3, 1.0)],
)
def test_a_solver_answers_everything(length: int, keys: int, query_share: float) -> None:
    sample = draw(8, length, keys=keys, query_share=query_share, seed=length)
    for key, value, target in zip(*(part.tolist() for part in sample), strict=True):
        assert solve(key, value, blank=7) == target


def test_shares_and_ranges() -> None:
    sample = draw(32, 1000, keys=11, query_share=0.3)
    is_query = sample.value == 7
    assert abs(is_query.double().mean().item() - 0.3) < 0.02
    assert sample.key.unique().tolist() == list(range(11))
    assert sample.value[~is_query].unique().tolist() == list(range(7))
    assert (sample.target[~is_query] == IGNORED).all()
    # After 1000 positions every one of 11 keys has long been written.
    assert (sample.target[is_query] != IGNORED).double().mean() > 0.95
    assert all(part.dtype == torch.int64 for part in sample)


def test_the_seed_decides() -> None:
    first, again, other = draw(4, 50, seed=1), draw(4, 50, seed=1), draw(4, 50, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.key, other.key)


def test_version_1_draws_the_same_data_for_ever() -> None:
    sample = draw(3, 40, seed=123)
    digest = hashlib.sha256(torch.stack(list(sample)).numpy().tobytes()).hexdigest()
    assert (VERSION, digest[:16]) == (1, "51f14f9e18e084a5")


def test_memory_is_linear_in_length() -> None:
    length = 1 << 17  # an N x N table would need 16 GiB even at one byte an entry
    sample = draw(1, length, keys=128)
    assert sample.target.shape == (1, length)
    assert (sample.target != IGNORED).double().mean() > 0.25


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0), (0, 0)])
def test_empty_batches(batch: int, length: int) -> None:
    assert draw(batch, length).target.shape == (batch, length)


def test_without_queries_nothing_is_asked() -> None:
    sample = draw(2, 20, query_share=0.0)
    assert (sample.target == IGNORED).all()
    assert (sample.value < 7).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": -1}, "batch must be at least 0, got -1"),
        ({"length": -2}, "length must be at least 0, got -2"),
        ({"keys": 0}, "keys must be at least 1, got 0"),
        ({"values": 0}, "values must be at least 1, got 0"),
        ({"query_share": 1.5}, "query_share must be a probability in .0, 1., got 1.5"),
        ({"query_share": float("nan")}, "query_share must be a probability"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"batch": 1, "length": 4, "keys": 2, **options}
    batch, length = arguments.pop("batch"), arguments.pop("length")
    with pytest.raises(ValueError, match=message):
        updatable_memory(batch, length, generator=torch.Generator(), **arguments)


def test_a_seed_is_not_a_generator() -> None:
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator, got int; pass"):
        updatable_memory(1, 4, keys=2, generator=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["batch", "length", "keys", "values"])
@pytest.mark.parametrize("wrong", [2.5, "2", True])
def test_sizes_are_integers(name: str, wrong: Any) -> None:
    arguments: dict[str, Any] = {"batch": 1, "length": 4, "keys": 2, name: wrong}
    with pytest.raises(TypeError, match=f"{name} must be an int, got {type(wrong).__name__}"):
        updatable_memory(
            arguments.pop("batch"),
            arguments.pop("length"),
            generator=torch.Generator(),
            **arguments,
        )


def test_a_generator_elsewhere() -> None:
    with pytest.raises(ValueError, match=r"must be a CPU generator, got one on meta.*move the"):
        updatable_memory(1, 4, keys=2, generator=MetaGenerator())


class MetaGenerator(torch.Generator):
    """A generator of another device, on a machine that may have none."""

    device = torch.device("meta")


@pytest.mark.gpu
def test_another_device_gives_the_same_batch() -> None:
    here, there = (
        updatable_memory(3, 1000, keys=7, generator=torch.Generator().manual_seed(1), device=device)
        for device in ("cpu", "cuda")
    )
    for ours, theirs in zip(here, there, strict=True):
        assert theirs.is_cuda and torch.equal(ours, theirs.cpu())
