"""The memory part: what twins share, what is counted, and that LUCID's model learns the task."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lucid_attention.demo.configuration import DemoConfig, MemoryConfig
from lucid_attention.demo.memory import (
    CURVES,
    all_curves,
    measure,
    train_and_test,
    train_model,
)
from lucid_attention.demo.memory_model import Attention, MemoryModel, Positions, rotate
from lucid_attention.tasks.updatable_memory import updatable_memory


def build(attention: Attention, positions: Positions, seed: int = 0) -> MemoryModel:
    return MemoryModel(
        keys=8,
        values=8,
        width=16,
        heads=2,
        attention=attention,
        positions=positions,
        generator=torch.Generator().manual_seed(seed),
    )


def test_the_four_curves_are_all_combinations() -> None:
    assert sorted(CURVES) == sorted((a, p) for a in ("LUCID", "softmax") for p in ("NoPE", "RoPE"))


def test_twins_start_from_the_same_weights() -> None:
    models = [build(*kind, seed=5).state_dict() for kind in CURVES]
    for other in models[1:]:
        assert models[0].keys() == other.keys()
        assert all(torch.equal(models[0][name], other[name]) for name in other)
    assert not torch.equal(
        models[0]["read_out.weight"], build("LUCID", "NoPE", seed=6).state_dict()["read_out.weight"]
    )


@pytest.mark.parametrize("positions", ["NoPE", "RoPE"])
@pytest.mark.parametrize("attention", ["LUCID", "softmax"])
def test_models_are_causal_and_differ(attention: Attention, positions: Positions) -> None:
    draw = updatable_memory(2, 20, keys=8, values=8, generator=torch.Generator().manual_seed(1))
    model = build(attention, positions)
    whole = model(draw.key, draw.value)
    assert whole.shape == (2, 20, 8)
    torch.testing.assert_close(whole[:, :11], model(draw.key[:, :11], draw.value[:, :11]))
    for kind in CURVES:
        same = torch.allclose(whole, build(*kind)(draw.key, draw.value), atol=1e-6)
        assert same == (kind == (attention, positions))


def test_rotary_scores_depend_on_distance_only() -> None:
    query, key = torch.randn(1, 1, 8).expand(1, 6, 8), torch.randn(1, 1, 8).expand(1, 6, 8)
    scores = (rotate(query) @ rotate(key).mT)[0]
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores[0].std() > 1e-3
    torch.testing.assert_close(rotate(query).norm(dim=-1), query.norm(dim=-1))


class _Oracle(torch.nn.Module):
    """Answers from a dictionary; wrong, on purpose, before ``wrong_until``."""

    def __init__(self, values: int, wrong_until: int) -> None:
        super().__init__()
        self.values = values
        self.wrong_until = wrong_until

    def forward(self, key: Tensor, value: Tensor) -> Tensor:
        logits = torch.zeros(*key.shape, self.values)
        for row in range(key.shape[0]):
            memory: dict[int, int] = {}
            for place in range(key.shape[1]):
                k, v = int(key[row, place]), int(value[row, place])
                if v < self.values:
                    memory[k] = v
                elif k in memory:
                    wrong = int(place < self.wrong_until)
                    logits[row, place, (memory[k] + wrong) % self.values] = 1.0
        return logits


def test_accuracy_counts_the_last_quarter_only(tiny: DemoConfig) -> None:
    config = replace(tiny.memory, test_lengths=(16, 32))
    at_16, at_32 = measure(_Oracle(8, wrong_until=12), config, seed=0)  # type: ignore[arg-type]
    assert at_16.accuracy == 1.0
    assert (at_16.sequences, at_32.sequences) == (16, 8)
    # At length 32 the last quarter begins at 24, past the wrong answers; 28 spoils half of it.
    assert at_32.accuracy == 1.0
    spoiled = measure(_Oracle(8, wrong_until=28), config, seed=0)  # type: ignore[arg-type]
    assert spoiled[0].accuracy == 0.0
    assert 0.2 < spoiled[1].accuracy < 0.8
    assert spoiled[1].queries == at_32.queries > 10


def test_a_length_does_not_depend_on_the_other_lengths(tiny: DemoConfig) -> None:
    model = build("softmax", "NoPE")
    every = measure(model, tiny.memory, seed=0)
    alone = measure(model, replace(tiny.memory, test_lengths=(32,)), seed=0)
    assert alone == every[-1:]


def test_same_seed_same_curve_and_every_step_is_reported(tiny: DemoConfig) -> None:
    units: list[int] = []
    first = train_and_test("LUCID", "RoPE", tiny.memory, seed=3, advance=units.append)
    again = train_and_test("LUCID", "RoPE", tiny.memory, seed=3)
    other = train_and_test("LUCID", "RoPE", tiny.memory, seed=4)
    assert units == [1] * (tiny.memory.steps + len(tiny.memory.test_lengths))
    assert first.points == again.points
    assert first.final_loss == again.final_loss != other.final_loss
    assert first.name == "LUCID, RoPE"


@pytest.mark.parametrize("threads", [1, 2])
def test_all_curves_side_by_side_are_those_one_by_one(threads: int, tiny: DemoConfig) -> None:
    alone = {
        (attention, positions): train_and_test(attention, positions, tiny.memory, seed=3)
        for attention, positions in CURVES
    }
    units: list[int] = []
    torch.set_num_threads(threads)
    try:
        curves = list(all_curves(tiny.memory, seed=3, advance=units.append))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    assert len(units) == 4 * (tiny.memory.steps + len(tiny.memory.test_lengths))
    assert len(curves) == 4
    for curve in curves:
        expected = alone[curve.attention, curve.positions]
        assert curve.points == expected.points
        assert curve.final_loss == pytest.approx(expected.final_loss, rel=1e-5)


def test_leaving_early_stops_every_model(tiny: DemoConfig) -> None:
    endless = replace(tiny.memory, steps=10**9)
    before = threading.active_count()
    started = 0

    def advance(units: int) -> None:
        nonlocal started
        started += units
        if started == 20:
            raise KeyboardInterrupt

    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(all_curves(endless, seed=3, advance=advance))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert threading.active_count() == before


def test_lucid_learns_what_softmax_cannot() -> None:
    """16 keys at length 64: far apart after a few seconds of training (lucid.md has .48 and 1.0)."""
    config = MemoryConfig(
        keys=16,
        values=16,
        width=32,
        train_length=64,
        test_lengths=(64,),
        steps=250,
        batch=32,
        warmup_steps=30,
        learning_rate=6e-3,
        test_positions=8192,
    )
    accuracy = {}
    for attention in ("LUCID", "softmax"):
        model, _ = train_model(attention, "NoPE", config, seed=0)
        accuracy[attention] = measure(model, config, seed=0)[0].accuracy
    assert accuracy["LUCID"] > 0.95
    assert accuracy["LUCID"] > accuracy["softmax"] + 0.2
