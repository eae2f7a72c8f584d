"""The plots: real PNGs for whole and partial results, and conditions that tell the truth."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from lucid_attention.demo import plots
from lucid_attention.demo.configuration import DemoConfig
from lucid_attention.demo.language_model import LossCurve
from lucid_attention.demo.memory import CURVES, MemoryCurve, MemoryPoint
from lucid_attention.demo.plots import language_model_plot, memory_plot, summary_plot


def memory_curves(config: DemoConfig) -> list[MemoryCurve]:
    return [
        MemoryCurve(
            attention,
            positions,
            tuple(
                MemoryPoint(length, 0.9 - 0.1 * index - length / 4096, 100, 10)
                for length in config.memory.test_lengths
            ),
            final_loss=0.1,
            train_seconds=1.0,
            test_seconds=1.0,
        )
        for index, (attention, positions) in enumerate(CURVES)
    ]


def loss_curves() -> list[LossCurve]:
    return [
        LossCurve(
            attention,
            [(step, 7.0 - step / 300) for step in range(1, 750, 15)],
            [(step, 7.1 - step / 300) for step in range(0, 751, 75)],
            seconds=1.0,
            parameters=524_928,
        )
        for attention in ("LUCID", "softmax")
    ]


def pixels(png: bytes) -> np.ndarray:
    image: np.ndarray = imread(io.BytesIO(png))
    assert image.shape[0] >= 800
    assert image.shape[1] >= 1200
    return image[..., :3]


def amount(image: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(image * 255 - np.array(colour)).max(axis=-1) < 4).sum())


LUCID_COLOUR, SOFTMAX_COLOUR = (0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)


def test_every_curve_is_drawn() -> None:
    config = DemoConfig()
    curves = memory_curves(config)
    drawn = [pixels(memory_plot(curves[:count], config)) for count in (1, 2, 3, 4)]
    lucid = [amount(image, LUCID_COLOUR) for image in drawn]
    softmax = [amount(image, SOFTMAX_COLOUR) for image in drawn]
    assert 500 < lucid[0] == lucid[1] < lucid[2] == lucid[3]
    assert 0 == softmax[0] < softmax[1] == softmax[2] < softmax[3]


def test_an_interrupted_training_is_drawn() -> None:
    whole = loss_curves()
    partial = [whole[0], replace(whole[1], train=whole[1].train[:1], validation=[], seconds=None)]
    image = pixels(language_model_plot(partial, DemoConfig(), "a text"))
    assert amount(image, LUCID_COLOUR) > 500


def test_both_side_by_side() -> None:
    config = DemoConfig()
    image = pixels(summary_plot(memory_curves(config), loss_curves(), config, "a text"))
    middle = image.shape[1] // 2
    for half in (image[:, :middle], image[:, middle:]):
        assert amount(half, LUCID_COLOUR) > 500
        assert amount(half, SOFTMAX_COLOUR) > 500


@pytest.mark.parametrize("name", ["price $5 to $6.txt", "x" * 300, r"\alpha_{.txt"])
def test_any_file_name_is_a_title(name: str) -> None:
    pixels(language_model_plot(loss_curves(), DemoConfig(), name))


def test_lines_that_end_together_keep_their_names_apart() -> None:
    axes = Figure().subplots()
    axes.set_ylim(0, 1)
    ends = [(0.5, "a", "red"), (0.5, "b", "red"), (0.51, "c", "red"), (0.9, "d", "red")]
    plots._label_ends(axes, ends, gap=0.05)
    heights = {text.get_text(): text.xy[1] for text in axes.texts}
    assert heights == pytest.approx({"a": 0.5, "b": 0.55, "c": 0.6, "d": 0.9})


def test_the_small_print_follows_the_configuration() -> None:
    config = DemoConfig(seed=12)
    changed = replace(config, memory=replace(config.memory, keys=99, steps=77, test_positions=5000))
    said = plots.memory_conditions(changed)
    for number in ("99 keys", "77 steps", "5,000 positions", "one seed (12)", "30%"):
        assert number in said
    said = plots.language_model_conditions(loss_curves(), config)
    for number in ("0.52 M parameters", "750 steps of 8 x 128", "one seed (12)", "no claim"):
        assert number in said
