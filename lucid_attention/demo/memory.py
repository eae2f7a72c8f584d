"""The memory part: train four one-layer models at one length, test them at longer ones.

Models this small keep one core busy, not two, so :func:`all_curves` trains several side by side.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lucid_attention.tasks.updatable_memory import IGNORED, updatable_memory

from .configuration import MemoryConfig
from .memory_model import Attention, MemoryModel, Positions

__all__ = [
    "CURVES",
    "MemoryCurve",
    "MemoryPoint",
    "all_curves",
    "measure",
    "train_and_test",
    "train_model",
]

CURVES: tuple[tuple[Attention, Positions], ...] = (
    ("LUCID", "NoPE"),
    ("softmax", "NoPE"),
    ("LUCID", "RoPE"),
    ("softmax", "RoPE"),
)

Advance = Callable[[int], None]
"""Called with the number of units of work just finished."""


@dataclass(frozen=True)
class MemoryPoint:
    """Accuracy at one length, over ``queries`` answered queries in ``sequences`` sequences."""

    length: int
    accuracy: float
    queries: int
    sequences: int


@dataclass(frozen=True)
class MemoryCurve:
    """One trained model: its accuracy at every tested length and what it took."""

    attention: Attention
    positions: Positions
    points: tuple[MemoryPoint, ...]
    final_loss: float
    train_seconds: float
    test_seconds: float

    @property
    def name(self) -> str:
        """For tables and legends, e.g. ``"LUCID, NoPE"``."""
        return f"{self.attention}, {self.positions}"


def all_curves(
    config: MemoryConfig, *, seed: int, advance: Advance = lambda _: None
) -> Iterator[MemoryCurve]:
    """Train and test the models of ``CURVES``; yields each curve as soon as it is finished.

    As many models run at a time, one thread each, as torch may use threads. An exception raised
    in the caller while it waits (a KeyboardInterrupt), or by ``advance``, stops them all.

    Args:
        config: sizes.
        seed: of weights and data, the same for all.
        advance: called with 1 after each training step and each tested length, by one thread at a
            time.
    """
    stop, lock = threading.Event(), threading.Lock()

    def advance_or_stop(units: int) -> None:
        with lock:
            if stop.is_set():
                raise _StoppedError
            advance(units)

    def work(attention: Attention, positions: Positions) -> MemoryCurve:
        torch.set_num_threads(1)
        return train_and_test(attention, positions, config, seed=seed, advance=advance_or_stop)

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(min(threads, len(CURVES))) as pool:
        try:
            for future in as_completed([pool.submit(work, *kind) for kind in CURVES]):
                yield future.result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(threads)


class _StoppedError(Exception):
    """Ends a model's training because the caller no longer waits for it."""


def train_and_test(
    attention: Attention,
    positions: Positions,
    config: MemoryConfig,
    *,
    seed: int,
    advance: Advance = lambda _: None,
) -> MemoryCurve:
    """Train one model at ``config.train_length`` and test it at every test length.

    The weights a model starts from, its training batches and its test sequences depend on ``seed``
    alone, so models that differ in ``attention`` or ``positions`` get identical ones.

    Args:
        attention, positions: which model.
        config: sizes.
        seed: of weights and data.
        advance: called with 1 after each training step and after each tested length.
    """
    started = time.perf_counter()
    model, final_loss = train_model(attention, positions, config, seed=seed, advance=advance)
    trained = time.perf_counter()
    points = measure(model, config, seed=seed, advance=advance)
    return MemoryCurve(
        attention=attention,
        positions=positions,
        points=points,
        final_loss=final_loss,
        train_seconds=trained - started,
        test_seconds=time.perf_counter() - trained,
    )


def train_model(
    attention: Attention,
    positions: Positions,
    config: MemoryConfig,
    *,
    seed: int,
    advance: Advance = lambda _: None,
) -> tuple[MemoryModel, float]:
    """The trained model and its loss on the last training batch."""
    model = MemoryModel(
        keys=config.keys,
        values=config.values,
        width=config.width,
        heads=config.heads,
        attention=attention,
        positions=positions,
        generator=torch.Generator().manual_seed(seed),
    )
    data = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, config))
    loss_value = math.nan
    for _ in range(config.steps):
        draw = updatable_memory(
            config.batch,
            config.train_length,
            keys=config.keys,
            values=config.values,
            query_share=config.query_share,
            generator=data,
        )
        logits = model(draw.key, draw.value)
        loss = F.cross_entropy(logits.flatten(0, 1), draw.target.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        loss_value = loss.item()
        advance(1)
    return model, loss_value


@torch.no_grad()
def measure(
    model: MemoryModel, config: MemoryConfig, *, seed: int, advance: Advance = lambda _: None
) -> tuple[MemoryPoint, ...]:
    """Accuracy on the answerable queries in the last quarter of each test sequence."""
    points = []
    for length in config.test_lengths:
        # One generator a length: a point does not change when other lengths are added or removed.
        data = torch.Generator().manual_seed(seed + 2 + length)
        sequences = max(1, config.test_positions // length)
        at_once = max(1, 8192 // length)
        right = queries = 0
        for start in range(0, sequences, at_once):
            draw = updatable_memory(
                min(at_once, sequences - start),
                length,
                keys=config.keys,
                values=config.values,
                query_share=config.query_share,
                generator=data,
            )
            target = draw.target[:, length * 3 // 4 :]
            asked = target != IGNORED
            answer = model(draw.key, draw.value)[:, length * 3 // 4 :].argmax(dim=-1)
            right += int((answer[asked] == target[asked]).sum())
            queries += int(asked.sum())
        accuracy = right / queries if queries else math.nan
        points.append(MemoryPoint(length, accuracy, queries, sequences))
        advance(1)
    return tuple(points)


def _warm_cosine(step: int, config: MemoryConfig) -> float:
    """Linear warm-up times a cosine decay to zero, as a factor on the learning rate."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    return warm * 0.5 * (1.0 + math.cos(math.pi * step / config.steps))
