"""The decoding benchmark's files: CSV, tables, plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.report import table, write_csv

Row = dict[str, Any]


def line(row: Row) -> str:
    """A row of ours as a line of progress."""
    return (
        f"  {row['batch']:3} x {row['kv_heads']:2} heads of {row['q_heads'] // row['kv_heads']:2}  D {row['head_dim']:3}  "
        f"context {row['context']:6}  {row['tokens']} new  {row['ms_p50'] * 1e3:7.1f} us  {row['rival']} "
        f"{row['rival_ms_p50'] * 1e3:7.1f}  ratio {row['ratio']:.3f}  {row['gb_per_s']:5.0f} GB/s "
        f"({row['copy_share']:.0%} of copy)"
    )


class Results:
    """Rows so far, written out whenever there are more."""

    def __init__(self, base: Path, facts: Row) -> None:
        self.base, self.facts = base, facts
        self.steps: list[Row] = []
        self.drift: list[Row] = []
        self.model: list[Row] = []

    def write(self) -> None:
        self.base.parent.mkdir(parents=True, exist_ok=True)
        self.base.with_suffix(".json").write_text(json.dumps(self.facts, indent=2) + "\n")
        slug = self.base.name.removeprefix("decode-")
        for name, rows in (("decode", self.steps), ("decode-drift", self.drift), ("decode-model", self.model)):  # fmt: skip
            if rows:
                write_csv(rows, self.base.with_name(f"{name}-{slug}.csv"))
        self.base.with_suffix(".md").write_text(
            tables(self.steps, self.model, self.drift, self.facts)
        )

    def plot(self) -> None:
        if self.steps:
            plot(self.steps, self.facts, self.base.with_suffix(".png"))
        if self.model:
            slug = self.base.name.removeprefix("decode-")
            plot_model(self.model, self.facts, self.base.with_name(f"decode-model-{slug}.png"))


def tables(steps: list[Row], model: list[Row], drift: list[Row], facts: Row) -> str:
    """Steps, the model, drift."""
    parts = [
        f"{facts['gpu']}, torch {facts['torch']}, Triton {facts['triton']}, commit {facts['commit']}, {facts['date']}; a "
        f"large device copy: {facts['copy_gb_per_s']} GB/s.\n"
    ]
    ours = [row for row in steps if row["impl"] == "lucid"]
    if ours:
        titles = "batch x KV heads | query heads a KV head | D | context | new tokens | LUCID, us | masked, us | best softmax, us | / softmax | GB/s | of copy | error of the output | of y"  # fmt: skip
        masked = {_shape(row): row["ms_p50"] for row in steps if row["impl"] == "lucid_masked"}
        lines = [
            [
                f"{row['batch']} x {row['kv_heads']}",
                str(row["q_heads"] // row["kv_heads"]),
                str(row["head_dim"]),
                str(row["context"]),
                str(row["tokens"]),
                f"{row['ms_p50'] * 1e3:.1f}",
                f"{masked[_shape(row)] * 1e3:.1f}" if _shape(row) in masked else "",
                f"{row['rival_ms_p50'] * 1e3:.1f} ({row['rival']})",
                f"**{row['ratio']:.3f}**",
                f"{row['gb_per_s']:.0f}",
                f"{row['copy_share']:.0%}",
                f"{row['output_err']:.1e}",
                f"{row['y_err']:.1e}",
            ]
            for row in ours
        ]
        parts += ["## One step\n", table(titles.split(" | "), lines)]
    if model:
        titles = "what | batch | context | attention | ms | tokens/s | time / best softmax"
        lines = [
            [
                row["what"], str(row["batch"]), str(row["context"]), row["attention"], f"{row['ms_p50']:.2f}",
                f"{row['tokens_per_s']:.0f}", f"**{row['time_ratio']:.3f}**",
            ]
            for row in model
        ]  # fmt: skip
        parts += ["## A model\n", table(titles.split(" | "), lines)]
    if drift:
        titles = (
            "D | prompt + decoded | cosine | cache of Y | error, decoded | one full solve | ratio"
        )
        lines = [
            [
                str(row["head_dim"]), f"{row['prompt']} + {row['decoded']}", f"{row['cosine']:g}", row["cache"],
                f"{row['err']:.1e}", f"{row['full_solve_err']:.1e}", f"**{row['ratio']:.2f}**",
            ]
            for row in drift
        ]  # fmt: skip
        parts += ["## Drift\n", table(titles.split(" | "), lines)]
    return "\n".join(parts)


def _shape(row: Row) -> tuple[Any, ...]:
    return tuple(row[n] for n in ("batch", "kv_heads", "q_heads", "head_dim", "context", "tokens"))


def plot(steps: list[Row], facts: Row, path: Path) -> None:
    """Rates of every shape, ours and the best softmax's, beside the copy's; and the ratio of times."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours = sorted(
        (row for row in steps if row["impl"] == "lucid"),
        key=lambda row: row["batch"] * row["kv_heads"] * row["context"] * row["head_dim"],
    )
    names = [
        f"{row['batch']}x{row['kv_heads']} D{row['head_dim']} {row['context'] / 1024:.3g}K"
        + (f" +{row['tokens']}" if row["tokens"] > 1 else "")
        for row in ours
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True)
    place = range(len(ours))
    rate = [row["gb_per_s"] for row in ours]
    left.barh([p + 0.2 for p in place], rate, 0.4, color="#d55e00", label="LUCID, appending")
    left.barh(
        [p - 0.2 for p in place], [r * row["ratio"] for r, row in zip(rate, ours, strict=True)],
        0.4, color="#56b4e9", label="best softmax",
    )  # fmt: skip
    left.axvline(facts["copy_gb_per_s"], color="#555555", lw=1, ls=":")
    left.set(yticks=list(place), yticklabels=names, title="GB/s (dotted: device copy)")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    right.barh(list(place), [row["ratio"] for row in ours], 0.6, color="#d55e00")
    right.axvline(1, color="#555555", lw=1)
    right.axvline(1.05, color="#999999", lw=1, ls=":")
    right.set(title="time of a LUCID step / the best softmax step")
    for axis in (left, right):
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    note = f"bfloat16 keys, float16 Y, batch x KV heads; {facts['gpu']}, commit {facts['commit']}, {facts['date']}."
    figure.text(0.01, 0.01, note, fontsize=7.5, color="#555555")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_model(model: list[Row], facts: Row, path: Path) -> None:
    """Tokens a second of a model's steps against the context, one row of the batch and more."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [row for row in model if row["what"] == "step"]
    colours = {"lucid": "#d55e00", "softmax_best": "#56b4e9", "sdpa": "#999999"}
    labels = {
        "lucid": "LUCID",
        "softmax_best": "best softmax",
        "sdpa": "softmax as in transformers",
    }
    figure, axis = plt.subplots(figsize=(6, 4.2))
    for name, colour in colours.items():
        for batch in sorted({row["batch"] for row in steps}):
            line = sorted(
                (row["context"], row["tokens_per_s"])
                for row in steps
                if row["attention"] == name and row["batch"] == batch
            )
            if line:
                axis.plot(*zip(*line, strict=True), marker="o", ms=4, color=colour,
                    ls="-" if batch == 1 else "--", label=f"{labels[name]}, batch {batch}")  # fmt: skip
    axis.set(
        xscale="log", yscale="log", xlabel="tokens cached", title="a 1.1B Llama: tokens a second"
    )
    axis.set_xticks(
        sorted({row["context"] for row in steps}),
        [f"{c / 1024:.3g}K" for c in sorted({row["context"] for row in steps})],
    )
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    note = f"{facts['gpu']}, commit {facts['commit']}, {facts['date']}."
    figure.text(0.01, 0.01, note, fontsize=7.5, color="#555555")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)
