"""The GPU benchmarks' tables and plot, from their rows."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SHORT = {"forward": "fwd", "backward": "bwd", "forward+backward": "fwd + bwd"}


def slug(gpu: str) -> str:
    """A GPU's name for a file: "NVIDIA H200" is h200."""
    return gpu.lower().removeprefix("nvidia ").replace(" ", "-")


def write_csv(rows: list[Row], path: Path) -> None:
    """Rows with five digits; None is an empty cell."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def line(rows: list[Row]) -> str:
    """The last row of our own as a line of progress."""
    row = next(row for row in reversed(rows) if row["impl"] in ("triton", "lucid_attention"))
    return (
        f"  {row['batch']} x {row['kv_heads']:2} heads  D {row['head_dim']:3}  N {row['seq']:6}  "
        f"{row['pass']:16} {row['ms_p50']:8.3f} ms  sdpa {row['sdpa_ms_p50']:8.3f} "
        f"({row['sdpa_backend']})  ratio {row['ratio']:5.2f}  graphs {row['graph_ratio']:5.2f}  {row['tflops']:4.0f} TFLOP/s  "
        f"extra {row['extra_ratio']:.2f}"
    )


def _ms(value: float) -> str:
    if math.isnan(value):
        return "failed"
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _number(value: float, form: str, around: str = "") -> str:
    return "" if math.isnan(value) else around + format(value, form) + around


def table(titles: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    titles = list(titles)
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"


def _same_call(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("dtype", "batch", "kv_heads", "q_heads", "head_dim", "seq", "pass"))  # fmt: skip


def _in_run(facts: Row) -> str:
    return (
        f"{facts['gpu']}, torch {facts['torch']}, Triton {facts['triton']}, commit "
        f"{facts['commit']}, {facts['date']}"
    )


def solve_tables(rows: list[Row], stages: list[Row], facts: Row) -> str:
    """All shapes: the solve, LUCID attention, and the solve's kernels."""
    found = {(_same_call(row), row["impl"]): row for row in rows}
    solve, attention = [], []
    for row in rows:
        if row["impl"] == "triton":
            names = ("triton-high", "dense", "blocked")
            others = [found.get((_same_call(row), impl)) for impl in names]
            steps = row["us_per_step"]
            solve.append(
                [
                    str(row["head_dim"]) + (" fp32" if row["dtype"] == "float32" else ""),
                    str(row["batch"] * row["kv_heads"]),
                    str(row["seq"]),
                    SHORT[row["pass"]],
                    _ms(row["ms_p50"]),
                    f"{_ms(row['sdpa_ms_p50'])} ({row['sdpa_backend'] or 'none'})",
                    _number(row["ratio"], ".2f", "**"),
                    _number(row["graph_ratio"], ".2f"),
                    _number(row["tflops"], ".0f"),
                    _number(row["peak_share"], ".0%"),
                    _number(row["extra_mib"], ".0f"),
                    _number(row["extra_ratio"], ".2f"),
                    *("" if other is None else _ms(other["ms_p50"]) for other in others),
                    _number(row["rel_err"], ".1e"),
                    "" if steps is None else _number(steps, ".2f"),
                ]
            )
        elif row["impl"] == "lucid_attention":
            same = found.get((_same_call(row), f"lucid_attention-{row['sdpa_backend']}"), row)
            attention.append(
                [
                    f"{row['q_heads']} / {row['kv_heads']}",
                    str(row["head_dim"]),
                    str(row["batch"]),
                    str(row["seq"]),
                    SHORT[row["pass"]],
                    _ms(row["ms_p50"]),
                    _ms(same["ms_p50"]),
                    f"{_ms(row['sdpa_ms_p50'])} ({row['sdpa_backend'] or 'none'})",
                    _number(row["ratio"], ".2f"),
                    _number(same["ratio"], ".2f", "**"),
                    _number(same["graph_ratio"], ".2f"),
                    _number(row["extra_mib"], ".0f"),
                ]
            )
    parts = [f"{_in_run(facts)}; a large matrix product: {facts['matmul_tflops']} TFLOP/s.\n"]
    if solve:
        titles = "D | chains | N | pass | solve, ms | SDPA, ms | / SDPA | both in CUDA graphs | TFLOP/s | of peak | extra MiB | / value | precision high, ms | dense, ms | blocked, ms | error | us a step"  # fmt: skip
        parts += ["## The solve\n", table(titles.split(" | "), solve)]
    if attention:
        titles = "heads, query / KV | D | batch | N | pass | LUCID attention, ms | in SDPA's back end, ms | SDPA, ms | / SDPA | in its back end | both in CUDA graphs | extra MiB"  # fmt: skip
        parts += ["## LUCID attention\n", table(titles.split(" | "), attention)]
    if stages:
        parts += ["## Where the solve's time goes\n", stage_table(stages)]
    return "\n".join(parts)


def stage_table(stages: list[Row]) -> str:
    """A line for each call, a column for each kernel: milliseconds and share of the call."""
    where = ("dtype", "head_dim", "batch", "kv_heads", "seq", "pass")
    kernels = list(dict.fromkeys(row["kernel"] for row in stages))
    kernels.sort(key=lambda name: (name in ("others", "gaps"), name == "gaps"))
    calls: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in stages:
        cell = f"{_ms(row['ms'])} ({100 * row['share']:.0f} %)"
        calls.setdefault(tuple(row[name] for name in where), {})[row["kernel"]] = cell
    lines = [
        [
            f"{width}{' fp32' if dtype == 'float32' else ''}",
            str(batch * heads),
            str(seq),
            SHORT[which],
            *(cells.get(name, "") for name in kernels),
        ]
        for (dtype, width, batch, heads, seq, which), cells in calls.items()
    ]
    named = (name.removesuffix("_kernel").replace("_", " ") for name in kernels)
    return table(["D", "chains", "N", "pass", *named], lines)


def precision_table(rows: list[Row], facts: Row) -> str:
    """Relative errors by dtype, head size, length and kind of keys."""
    lines = [
        [
            row["dtype"],
            row["precision"],
            str(row["head_dim"]),
            str(row["seq"]),
            f"{row['keys']} {row['cosine']:g}",
            *(_number(row[name], ".1e") for name in ("y", "y_rounded", "dv", "dk")),
        ]
        for row in sorted(rows, key=lambda row: (row["dtype"], row["precision"], row["head_dim"]))
    ]
    titles = "inputs | precision | D | N | keys | Y | Y, rounded to the inputs' dtype | dV | dK"
    return table(titles.split(" | "), lines) + f"\n{_in_run(facts)}.\n"


def curve(rows: list[Row], head_dim: int, which: str) -> list[Row]:
    """Our bfloat16 rows of 8 chains or more along N; of several at one N the one with most chains."""
    best: dict[int, Row] = {}
    for row in rows:
        chains = row["batch"] * row["kv_heads"]
        if (row["impl"], row["pass"], row["head_dim"], row["dtype"]) != ("triton", which, head_dim, "bfloat16"):  # fmt: skip
            continue
        known = best.get(row["seq"])
        if chains >= 8 and (known is None or chains > known["batch"] * known["kv_heads"]):
            best[row["seq"]] = row
    return [best[seq] for seq in sorted(best)]


def plot(rows: list[Row], facts: Row, path: Path) -> None:
    """Left: time over SDPA's, against N; right: rates of both."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
    ours, theirs = {64: "#e69f00", 128: "#d55e00"}, {64: "#56b4e9", 128: "#0072b2"}
    styles = {"forward": ("-", "forward"), "forward+backward": ("--", "forward + backward")}
    lengths: set[int] = set()
    for head_dim in (64, 128):
        for which, (style, label) in styles.items():
            along = curve(rows, head_dim, which)
            at = [row["seq"] for row in along]
            lengths.update(at)
            name = f"D {head_dim}, {label}"
            left.plot(at, [row["ratio"] for row in along], style, color=ours[head_dim], marker="o", ms=4, label=name)  # fmt: skip
            right.plot(at, [row["tflops"] for row in along], style, color=ours[head_dim], marker="o", ms=4, label=f"solve, {name}")  # fmt: skip
            rates = [row["tflops"] * row["ratio"] for row in along]
            right.plot(at, rates, style, color=theirs[head_dim], marker="s", ms=3, label=f"SDPA, {name}")  # fmt: skip
    left.axhline(1, color="#555555", lw=1)
    peak = facts["matmul_tflops"]
    right.axhline(peak, color="#999999", lw=1, ls=":")
    left.set(title="time of the solve / softmax attention (SDPA)", ylim=(0, None))
    right.set(title=f"TFLOP/s, causal count (dotted: matrix product, {peak:.0f})", ylim=(0, None))
    for axis in (left, right):
        axis.set(xscale="log", xlabel="sequence length")
        axis.set_xticks(sorted(lengths), [f"{n // 1024}K" if n >= 1024 else str(n) for n in sorted(lengths)])  # fmt: skip
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    if lengths:
        left.legend(frameon=False, fontsize=8)
        right.legend(frameon=False, fontsize=7, ncols=2, loc="lower right")
    figure.text(0.01, 0.01, f"bfloat16, 8 to 256 chains, key cosine 0.8; {_in_run(facts)}.", fontsize=7.5, color="#555555")  # fmt: skip
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)
