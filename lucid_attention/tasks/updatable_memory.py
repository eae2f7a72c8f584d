"""An updatable key-value memory: every query asks for the latest value written under its key."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_generator, check_numbers

__all__ = ["IGNORED", "VERSION", "MemoryBatch", "latest_values", "updatable_memory"]

VERSION = 1
"""Goes up whenever the same arguments and seed would give other data."""

IGNORED = -100
"""Target where nothing is asked; ``torch.nn.functional.cross_entropy`` skips it by default."""


class MemoryBatch(NamedTuple):
    """One batch of the task; every tensor is int64 of shape ``(batch, length)``.

    Attributes:
        key: the key written to or asked for, in ``[0, keys)``.
        value: the value written, in ``[0, values)``; the blank, ``values``, at a query.
        target: the answer at a query whose key was written before, ``IGNORED`` elsewhere.
    """

    key: Tensor
    value: Tensor
    target: Tensor


def updatable_memory(
    batch: int,
    length: int,
    *,
    keys: int,
    values: int = 64,
    query_share: float = 0.3,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> MemoryBatch:
    """Draw sequences of writes and queries.

    Every position independently is a query with probability ``query_share``, else a write; its key
    is uniform over ``keys``, a written value uniform over ``values``. The target at a query is the
    value of the latest earlier write to the same key. Memory is linear in ``batch * length``.

    Args:
        batch: number of sequences, at least 0.
        length: positions in each, at least 0.
        keys: number of distinct keys, at least 1.
        values: number of distinct values, at least 1.
        query_share: probability of a query, in [0, 1].
        generator: source of all randomness, a CPU generator; the same state gives the same batch on every device.
        device: where the answers are found (for large batches a GPU is many times faster) and the batch lies.

    Returns:
        A :class:`MemoryBatch`.

    Raises:
        ValueError: an argument is out of its range, or ``generator`` is not on the CPU.
        TypeError: a size is not an int, or ``generator`` not a :class:`torch.Generator`.

    Source: this project's own task: what a memory that only averages cannot do.

    Example:
        >>> import torch
        >>> from lucid_attention.tasks import updatable_memory
        >>> draw = updatable_memory(2, 10, keys=3, generator=torch.Generator().manual_seed(0))
        >>> draw.target.shape
        torch.Size([2, 10])
    """
    check_numbers(
        ("batch", batch, 0), ("length", length, 0), ("keys", keys, 1), ("values", values, 1)
    )
    if not 0.0 <= query_share <= 1.0:
        raise ValueError(f"query_share must be a probability in [0, 1], got {query_share}")
    check_generator(generator)

    shape = (batch, length)
    key = torch.randint(keys, shape, generator=generator)
    written = torch.randint(values, shape, generator=generator)
    is_query = torch.rand(shape, generator=generator) < query_share
    key, written, is_query = key.to(device), written.to(device), is_query.to(device)

    latest = latest_values(key, written, ~is_query)
    return MemoryBatch(
        key=key,
        value=written.masked_fill(is_query, values),
        target=latest.masked_fill(~is_query, IGNORED),
    )


def latest_values(key: Tensor, value: Tensor, is_write: Tensor) -> Tensor:
    """The value last written under each position's key, strictly before that position.

    Args:
        key: ``(batch, length)``, integers.
        value: ``(batch, length)``, integers; read only where ``is_write``.
        is_write: bool ``(batch, length)``.

    Returns:
        ``(batch, length)``, value's dtype; ``IGNORED`` where the key was not written before.

    Example:
        >>> import torch
        >>> from lucid_attention.tasks.updatable_memory import latest_values
        >>> key, value = torch.tensor([[7, 7, 5, 7]]), torch.tensor([[1, 2, 3, 4]])
        >>> latest_values(key, value, torch.tensor([[True, True, False, False]]))
        tensor([[-100,    1, -100,    2]])
    """
    # A stable sort brings each key's positions together in their order of time, so "the latest
    # write to this key" becomes a running maximum over neighbours and no N x N table is needed.
    sorted_key, order = key.sort(dim=-1, stable=True)
    place = torch.arange(key.shape[-1], device=key.device).expand_as(key)
    before = torch.full_like(place[..., :1], -1)

    write_place = torch.where(is_write.gather(-1, order), place, -1)
    last_write = torch.cat((before, write_place), dim=-1).cummax(dim=-1).values[..., :-1]

    starts_group = torch.ones_like(is_write)
    starts_group[..., 1:] = sorted_key[..., 1:] != sorted_key[..., :-1]
    group_start = torch.where(starts_group, place, 0).cummax(dim=-1).values

    found = value.gather(-1, order).gather(-1, last_write.clamp(min=0))
    found = found.masked_fill(last_write < group_start, IGNORED)
    return torch.empty_like(value).scatter_(-1, order, found)
