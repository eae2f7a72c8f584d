"""The language-model part: twins, loss curves, the checkpoint's round trip and the cache check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lucid_attention.demo.configuration import DemoConfig
from lucid_attention.demo.language_model import (
    CheckpointCheck,
    LossCurve,
    build_model,
    check_checkpoint,
    train_twin,
)
from lucid_attention.demo.text import Corpus, prepare_corpus


@pytest.fixture
def corpus(text_file: Path, tiny: DemoConfig) -> Corpus:
    return prepare_corpus(text_file, tiny.language_model)


def test_twins_share_weights_and_nothing_else(tiny: DemoConfig) -> None:
    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    lucid, softmax, other = (
        build_model(attention, tiny.language_model, 300, seed=seed)
        for attention, seed in (("LUCID", 1), ("softmax", 1), ("softmax", 2))
    )
    assert torch.equal(before, torch.random.get_rng_state())
    weights, twin = lucid.state_dict(), softmax.state_dict()
    assert weights.keys() == twin.keys()
    assert all(torch.equal(weights[name], twin[name]) for name in weights)
    assert not torch.equal(
        twin["model.embed_tokens.weight"], other.state_dict()["model.embed_tokens.weight"]
    )
    tokens = torch.arange(40)[None] % 7
    assert not torch.allclose(lucid(tokens).logits, softmax(tokens).logits, atol=1e-6)


def test_training_fills_the_curve(corpus: Corpus, tiny: DemoConfig, tmp_path: Path) -> None:
    config = replace(tiny.language_model, steps=30, learning_rate=1e-2)
    curves, units, scratch = {}, [], tmp_path / "scratch"
    for name, attention in (("a", "LUCID"), ("b", "LUCID"), ("c", "softmax")):
        curves[name] = LossCurve(attention)
        model = train_twin(
            curves[name], corpus, config, seed=3, scratch=scratch, advance=units.append
        )
        assert not model.training
    assert units == [1] * 90
    first = curves["a"]
    assert [step for step, _ in first.train] == list(range(1, 31))
    assert [step for step, _ in first.validation] == [0, 15, 30]
    assert first.validation[-1][1] < first.validation[0][1] - 0.5
    assert first.seconds is not None
    assert first.seconds > 0
    assert first.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert first.train == curves["b"].train
    assert first.validation == curves["b"].validation
    assert first.train != curves["c"].train
    # The same batches in the same order: before the first update the twins differ by attention
    # alone, which at initialisation is far less than one batch differs from another.
    assert abs(first.train[0][1] - curves["c"].train[0][1]) < 0.02
    assert list(scratch.rglob("*")) == []


def test_the_checkpoint_comes_back_as_lucid(
    corpus: Corpus, tiny: DemoConfig, tmp_path: Path
) -> None:
    config = tiny.language_model
    model = build_model("LUCID", config, len(corpus.tokenizer), seed=3).eval()
    units: list[int] = []
    check = check_checkpoint(
        model, corpus, config, folder=tmp_path / "checkpoint", seed=3, advance=units.append
    )
    assert check.implementation == "lucid"
    assert check.largest_logit_difference == 0.0
    assert check.compared_tokens == check.equal_tokens == config.new_tokens
    assert check.cache_layers == ("LucidDynamicLayer",)
    assert check.passed
    assert sum(units) == 3 * config.new_tokens
    assert check.prompt == corpus.tokenizer.decode(corpus.prompt[0])
    assert check.continuation
    assert (tmp_path / "checkpoint" / "tokenizer.json").exists()
    again = check_checkpoint(model, corpus, config, folder=tmp_path / "other", seed=3)
    assert again == check


def test_a_softmax_checkpoint_does_not_pass(
    corpus: Corpus, tiny: DemoConfig, tmp_path: Path
) -> None:
    config = tiny.language_model
    model = build_model("softmax", config, len(corpus.tokenizer), seed=3).eval()
    check = check_checkpoint(model, corpus, config, folder=tmp_path / "checkpoint", seed=3)
    assert check.implementation == "sdpa"
    assert not check.cache_is_lucid
    assert not check.passed


@pytest.mark.parametrize(
    "fault",
    [
        {"implementation": "sdpa"},
        {"largest_logit_difference": 1e-7},
        {"largest_logit_difference": float("nan")},
        {"equal_tokens": 9},
        {"cache_is_lucid": False},
    ],
)
def test_every_fault_fails_the_check(fault: dict[str, object]) -> None:
    good = CheckpointCheck(
        implementation="lucid",
        largest_logit_difference=0.0,
        compared_tokens=10,
        equal_tokens=10,
        cache_layers=("LucidDynamicLayer",),
        cache_is_lucid=True,
        prompt="a",
        continuation="b",
    )
    assert good.passed
    assert not replace(good, **fault).passed  # type: ignore[arg-type]
