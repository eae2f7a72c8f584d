"""Pictures of experiments: panels, in which every seed is a line of its own."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from .experiment import Row

__all__ = ["COLOURS", "as_png", "legend", "panels", "seed_lines"]

COLOURS = {"softmax": "#56b4e9", "lucid": "#d55e00", "differences": "#009e73", "average": "#cc79a7"}


def panels(number: int, *, columns: int = 4, width: float = 3.4, height: float = 3.2, **options: Any) -> tuple[Any, list[Any]]:  # fmt: skip
    """A figure without a window, and as many axes with a grid."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(columns, number)
    lines = -(-number // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False, layout="constrained", **options)  # fmt: skip
    for axis in axes.flat[:number]:
        axis.grid(alpha=0.3)
    for axis in axes.flat[number:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:number])


def seed_lines(
    axis: Any, rows: Iterable[Row], x: str, y: str, *, label: str, style: str = "-", **options: Any
) -> None:
    """``y`` against ``x``, a line for each seed, one of them with the label."""
    curves: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(row["seed"], []).append((row[x], row[y]))
    for number, curve in enumerate(curves.values()):
        axis.plot(*zip(*sorted(curve), strict=True), style, lw=1, label=None if number else label, **options)  # fmt: skip


def legend(axes: list[Any], **options: Any) -> None:
    """In the first panel, of what any of them shows."""
    found = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}  # fmt: skip
    axes[0].legend(found.values(), found.keys(), frameon=False, **options)


def as_png(figure: Any) -> bytes:
    """A matplotlib figure, which is closed."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return buffer.getvalue()
