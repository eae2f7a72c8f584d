"""Statistics, tables and controls of the evidence, by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lucid_attention import precondition
from lucid_attention.reproduce import (
    EXPERIMENTS,
    language,
)
from lucid_attention.reproduce.statistics import paired, quantile, said, spread_of
from tests.conftest import make_keys, relative_error


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_full_sizes_are_listed(name: str) -> None:
    one = EXPERIMENTS[name]
    cells = one.cells(False)
    assert len({json.dumps(cell, sort_keys=True) for cell in cells}) == len(cells)
    for cell in cells:
        if cell.get("attention") in ("softmax", "lucid"):
            twin = {**cell, "attention": "lucid" if cell["attention"] == "softmax" else "softmax"}
            assert twin in cells
        assert one.steps(cell, False) > 100
    assert one.gpu_minutes < 30


def test_the_legend_has_what_any_panel_shows() -> None:
    from lucid_attention.reproduce.figures import legend, panels, seed_lines

    _, axes = panels(2)
    for axis, names in zip(axes, (("softmax",), ("softmax", "differences")), strict=True):
        for name in names:
            seed_lines(axis, [{"seed": 1, "x": 0, "y": 0}], "x", "y", label=name)
    legend(axes)
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["softmax", "differences"]  # fmt: skip


def test_tables_of_what_is_there_by_hand() -> None:
    """Seeds that lack a part are left out of a mean over the parts; a setting with fewer steps stays in the table."""
    from lucid_attention.reproduce.language_model import LanguageModel
    from lucid_attention.reproduce.needles import Needles

    accuracy = {("softmax", 1): (0.5, 0.1), ("lucid", 1): (0.7, 0.2), ("softmax", 2): (0.4, 0.0), ("lucid", 2): (0.9,)}  # fmt: skip
    made = [
        {"attention": side, "seed": seed, "needles": needles, "length": 8, "accuracy": value, "text_loss": 2.0, "corpus": "a" if seed == 1 else "b"}
        for (side, seed), values in accuracy.items() for needles, value in zip((1, 2), values, strict=False)
    ]  # fmt: skip
    text = Needles().summary(made)
    assert (
        "| all | softmax | 0.250 ± 0.071 |" in text and "| all | lucid | 0.450 (one seed) |" in text
    )
    assert "| all | lucid - softmax | +0.150 (one seed) |" in text
    assert "| 1 | lucid - softmax | +0.350 ± 0.150 |" in text

    assert "Not one text: a, b, by the beginning" in text
    about = {"position": "rope", "head_dim": 64, "training_loss": 1.0, "tokens_per_s": 1e3, "corpus": "a"}  # fmt: skip
    losses = [
        {**about, "text": text, "attention": side, "seed": seed, "step": step, "loss": seed + step + (side == "lucid")}
        for text, last in (("stdlib", 20), ("libraries", 10)) for seed in (1, 2) for side in ("softmax", "lucid") for step in sorted({10, last})
        if (text, side, seed) != ("libraries", "lucid", 2)
    ]  # fmt: skip
    table = LanguageModel().summary(losses)
    assert "| libraries | rope | 64 | lucid - softmax | +1.000 (one seed) |  | +0.000 (one seed) | inf | x 1.00 |" in table  # fmt: skip
    assert "| stdlib | rope | 64 | lucid - softmax | **+1.000 ± 0.000** |" not in table  # two seeds
    assert "| stdlib | rope | 64 | lucid - softmax | +1.000 ± 0.000 | +1.000 ± 0.000 |" in table
    assert "| libraries | rope | 64 | lucid | 12.000 (1 of 2 seeds) |" in table and "Not one text" not in table  # fmt: skip


def test_training_losses_by_hand() -> None:
    log = [{"step": float(step), "loss": float(step)} for step in range(10, 90, 10)]
    model = language.TextModel(Path(), [*log, {"step": 80.0, "eval_loss": 7.0}], {})
    assert model.training_loss(70) == 50.0 and model.training_loss(20) == 15.0
    assert math.isnan(model.training_loss(9)) and model.loss == 7.0


@pytest.mark.parametrize("kind", ["cos0", "cos0.9", "identical", "zero"])
def test_the_control_is_blind_to_keys(kind: str) -> None:
    """Its values are differences, whatever the keys: to the first order in the scale."""
    key, value = make_keys(kind, 1, 2, 300, 64), torch.randn(1, 2, 300, 64, dtype=torch.float64)
    solved = precondition(key, value, kernel_scale=language.DIFFERENCES["kernel_scale"])
    expected = torch.cat((value[:, :, :1], value.diff(dim=2)), dim=2)
    assert relative_error(solved, expected) < 1e-3


def test_the_milder_control_is_a_moving_average() -> None:
    """Of strength b: from each value, what came before it, with weights that fall by 1 - b."""
    key, value = make_keys("cos0.9", 1, 1, 200, 64), torch.randn(1, 1, 200, 64, dtype=torch.float64)
    setting = {name: language.AVERAGE[name] for name in ("kernel_scale", "strength")}
    solved, average = precondition(key, value, **setting), torch.zeros(64, dtype=torch.float64)
    for n in range(200):
        expected = value[0, 0, n] - average
        assert relative_error(solved[0, 0, n], expected) < 1e-3
        average = 0.75 * average + 0.25 * value[0, 0, n]


def rows(values: dict[int, float]) -> list[dict[str, Any]]:
    return [{"seed": seed, "x": value} for seed, value in values.items()]


def test_paired_differences_by_hand() -> None:
    gap = paired(rows({1: 3.0, 2: 5.0, 3: 4.0}), rows({3: 1.0, 2: 2.0, 1: 1.0, 9: 0.0}), "x")
    assert (gap.mean, gap.seeds) == (pytest.approx(8 / 3), 3)
    assert gap.error == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))
    assert gap.counts and str(gap) == "+2.667 ± 0.333 (3 seeds)"
    assert gap.said() == "**+2.667 ± 0.333**" and gap.said(with_seeds=True) == f"**{gap}**"
    assert said(rows({1: 1.0, 2: 3.0}), "x", 2) == "2.00 ± 1.41" and said([], "x") == ""
    small = paired(rows({1: 0.1, 2: -0.1, 3: 0.3}), rows({1: 0, 2: 0, 3: 0}), "x")
    assert not small.counts and small.said() == "+0.100 ± 0.115"
    # t(17) * 0.2 / sqrt(18) = 2.11 * 0.2 / 4.24 < 0.1
    assert small.seeds_to_resolve == 18
    nothing = paired(rows({1: math.nan, 2: 1.0, 3: 2.0}), rows({1: 0, 2: 0, 3: 0}), "x")
    assert not nothing.counts and nothing.seeds_to_resolve == math.inf
    # Two standard errors of three seeds are chance in 18 % of all cases.
    assert not paired(rows({1: 1.0, 2: 2.0, 3: 0.0}), rows({1: 0, 2: 0, 3: -1.0}), "x").counts
    exact = {2: 12.706, 3: 4.303, 11: 2.228, 12: 2.201, 31: 2.042, 101: 1.984}
    assert all(quantile(n) == pytest.approx(t, rel=0.005) for n, t in exact.items())
    assert not paired(
        rows({1: 9.0, 2: 9.0}), rows({1: 0, 2: 0}), "x"
    ).counts  # two seeds are too few
    alone = paired(rows({1: 1.0}), rows({1: 0.0}), "x")
    assert math.isnan(alone.error) and alone.said() == alone.said(with_seeds=True) == "+1.000 (one seed)"  # fmt: skip
    assert said(rows({1: 5.65854}), "x", 4) == said(rows({1: 5.65854}), "x", 4, seeds=1) == "5.6585 (one seed)"  # fmt: skip
    assert said(rows({1: 5.65854}), "x", 4, seeds=2) == "5.6585 (1 of 2 seeds)"
    apart = paired(rows({1: 1.0}), rows({2: 0.0}), "x")
    assert apart.seeds == 0 and apart.said() == ""
    assert spread_of(rows({1: 1.0, 2: 3.0}), "x") == (2.0, pytest.approx(math.sqrt(2)))


def test_two_runs_of_a_seed_by_hand() -> None:
    """Equal until step 10, then .25 apart; the other seed never. What was evaluated before the end does not count."""
    from lucid_attention.reproduce.repeat import Repeat

    made = [
        {"attention": "lucid", "deterministic": False, "seed": seed, "run": run, "kind": kind, "step": step, "tokens_per_s": 5.0,
         "weights": f"w{run if seed == 1 else 0}", "loss": 2.0 + (0.25 if (seed, run) == (1, 2) and step >= 10 else 0.0)}
        for seed in (1, 2) for run in (1, 2) for kind, step in (("loss", 5), ("loss", 10), ("eval_loss", 5), ("eval_loss", 10))
    ]  # fmt: skip
    assert "| lucid | no | 2 | step 10 | 2.5e-01 | 1.2e-01 | 1 of 2 | 5 |" in Repeat().summary(made)
    assert "| lucid | no | 1 | never | 0.0e+00 | 0.0e+00 | 1 of 1 | 5 |" in Repeat().summary([r for r in made if r["seed"] == 2])  # fmt: skip
