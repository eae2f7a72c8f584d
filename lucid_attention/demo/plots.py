"""The demo's plots: accuracy against length, loss curves, and both side by side.

Colours are vermillion and blue of the Okabe-Ito palette; line style and marker repeat what colour
says, so that the plots can be read without colour.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .configuration import DemoConfig, MemoryConfig
from .language_model import LossCurve
from .memory import MemoryCurve

__all__ = ["language_model_plot", "memory_plot", "summary_plot"]

_COLOURS = {"LUCID": "#D55E00", "softmax": "#0072B2"}
_LINES = {"NoPE": "-", "RoPE": (0, (4, 2))}
_MARKERS = {"NoPE": "o", "RoPE": "s"}
_TEXT, _FAINT, _GRID = "#222222", "#666666", "#E3E3E3"
_DPI = 160
_SINGLE = {"left": 0.1, "right": 0.79, "top": 0.76, "bottom": 0.14}
_MEMORY_TITLE = "Updatable memory: accuracy beyond the training length"


def memory_plot(curves: Sequence[MemoryCurve], config: DemoConfig) -> bytes:
    """Accuracy against length for the curves there are, as PNG."""
    figure = Figure(figsize=(8.0, 5.4), dpi=_DPI)
    axes = figure.subplots()
    figure.subplots_adjust(**_SINGLE)
    _heading(axes, _MEMORY_TITLE, memory_conditions(config))
    _draw_memory(axes, curves, config.memory)
    return _png(figure)


def language_model_plot(curves: Sequence[LossCurve], config: DemoConfig, text: str) -> bytes:
    """Training and held-out loss for the curves there are, as PNG."""
    figure = Figure(figsize=(8.0, 5.4), dpi=_DPI)
    axes = figure.subplots()
    figure.subplots_adjust(**_SINGLE)
    _heading(axes, _language_model_title(text), language_model_conditions(curves, config))
    _draw_losses(axes, curves)
    return _png(figure)


def summary_plot(
    memory: Sequence[MemoryCurve], losses: Sequence[LossCurve], config: DemoConfig, text: str
) -> bytes:
    """Both plots side by side, for a README, as PNG."""
    figure = Figure(figsize=(13.6, 5.4), dpi=_DPI)
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.06, right=0.905, top=0.76, bottom=0.14, wspace=0.48)
    _heading(left, _MEMORY_TITLE, memory_conditions(config))
    _heading(right, _language_model_title(text), language_model_conditions(losses, config))
    _draw_memory(left, memory, config.memory)
    _draw_losses(right, losses)
    return _png(figure)


def memory_conditions(config: DemoConfig) -> str:
    """The conditions of the memory plot, in small print."""
    memory = config.memory
    return (
        f"Each position writes a value under one of {memory.keys} keys or "
        f"({memory.query_share:.0%}) asks for a key's latest value.\n"
        f"One layer, width {memory.width}, heads: {memory.heads}; {memory.steps} steps of "
        f"{memory.batch} sequences; same weights, data and order; one seed ({config.seed}).\n"
        f"Accuracy on the last quarter of each sequence, {memory.test_positions:,} positions at "
        "each length. NoPE: no position encoding."
    )


def language_model_conditions(curves: Sequence[LossCurve], config: DemoConfig) -> str:
    """The conditions of the loss plot, in small print."""
    model = config.language_model
    parameters = max((curve.parameters or 0 for curve in curves), default=0)
    return (
        f"{parameters / 1e6:.2f} M parameters, {model.layers} layers, width {model.width}, "
        f"{model.vocabulary} BPE tokens; {model.steps} steps of {model.batch} x {model.context} "
        f"tokens.\nBoth start from the same weights and see the same data in the same order; one "
        f"seed ({config.seed}),\na tiny model: a check that training works, no claim about which "
        "is better."
    )


def _language_model_title(text: str) -> str:
    # A user's file name can be of any length; "$" would start a formula.
    short = text if len(text) <= 32 else text[:31] + "\u2026"
    return f"A tiny Llama learning: {short}".replace("$", r"\$")


def _draw_memory(axes: Axes, curves: Sequence[MemoryCurve], config: MemoryConfig) -> None:
    _style(axes)
    ends = []
    for curve in curves:
        lengths = [point.length for point in curve.points]
        accuracies = [point.accuracy for point in curve.points]
        axes.plot(
            lengths,
            accuracies,
            color=_COLOURS[curve.attention],
            linestyle=_LINES[curve.positions],
            marker=_MARKERS[curve.positions],
            markersize=5,
            linewidth=2,
            clip_on=False,
            zorder=3,
        )
        ends.append((accuracies[-1], curve.name, _COLOURS[curve.attention]))
    axes.set_xscale("log", base=2)
    doublings = [
        length
        for length in config.test_lengths
        if length % config.train_length == 0 and (length // config.train_length).bit_count() == 1
    ]
    axes.set_xticks(
        doublings,
        [
            f"{length}\n" + ("trained" if length == config.train_length else f"{times}x")
            for length in doublings
            for times in [length // config.train_length]
        ],
    )
    axes.xaxis.minorticks_off()
    axes.set_xlim(config.test_lengths[0], config.test_lengths[-1])
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0], ["0", "20", "40", "60", "80", "100 %"])
    axes.set_xlabel("sequence length", color=_FAINT)
    axes.set_ylabel("queries answered with the latest value", color=_FAINT)
    _label_ends(axes, ends, gap=0.055)


def _draw_losses(axes: Axes, curves: Sequence[LossCurve]) -> None:
    _style(axes)
    ends = []
    last_step = 1
    for curve in curves:
        colour = _COLOURS[curve.attention]
        if curve.train:
            axes.plot(*zip(*curve.train, strict=True), color=colour, linewidth=1, alpha=0.45)
        if curve.validation:
            axes.plot(
                *zip(*curve.validation, strict=True),
                color=colour,
                linewidth=2,
                linestyle=_LINES["NoPE" if curve.attention == "LUCID" else "RoPE"],
                marker=_MARKERS["NoPE" if curve.attention == "LUCID" else "RoPE"],
                markersize=5,
                clip_on=False,
                zorder=3,
            )
            step, loss = curve.validation[-1]
            last_step = max(last_step, step)
            ends.append((loss, f"{curve.attention} {loss:.3f}", colour))
    axes.set_xlim(0, last_step)
    axes.set_xlabel("training step", color=_FAINT)
    axes.set_ylabel("loss (nats per token)", color=_FAINT)
    axes.text(
        0.98,
        0.97,
        "thick, with markers: held-out text\nthin: training batches",
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=9,
        color=_FAINT,
    )
    low, high = axes.get_ylim()
    _label_ends(axes, ends, gap=0.055 * (high - low))


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], *, gap: float) -> None:
    """Name each line beside its right end, moved apart where ends are closer than ``gap``."""
    lowest = -float("inf")
    for height, name, colour in sorted(ends):
        lowest = max(height, lowest + gap)
        axes.annotate(
            name,
            (1.0, lowest),
            xycoords=("axes fraction", "data"),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=10,
            fontweight="bold",
            annotation_clip=False,
        )


def _style(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_FAINT, labelsize=9, length=0, pad=6)


def _heading(axes: Axes, title: str, conditions: str) -> None:
    """A title, and under it the conditions in small print, both above the axes at their left."""
    figure = axes.figure
    left, top = axes.get_position().x0, axes.get_position().y1
    figure.text(
        left, top + 0.035, conditions, fontsize=8.5, color=_FAINT, va="bottom", linespacing=1.45
    )
    figure.text(
        left,
        0.965,
        title,
        fontsize=13,
        fontweight="bold",
        color=_TEXT,
        va="top",
        parse_math=False,  # a file name may hold dollar signs
    )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()
