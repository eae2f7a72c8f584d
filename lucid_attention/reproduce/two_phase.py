"""Two phases: a model that has learnt to copy is asked for the running mean. Can its attention leave the diagonal?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lucid_attention.tasks import two_phase

from .experiment import Cell, Experiment, Row, Workplace
from .figures import COLOURS, as_png, legend, panels, seed_lines
from .replicas import Replayed, Replicas
from .statistics import COUNTS, paired, said

__all__ = ["TwoPhase", "off_diagonal"]

_TITLES = {"mse": "mean squared error", "off_diagonal": "Jacobian of attention off the diagonal"}
_CHUNK = 500  # steps whose data are drawn at once, and whose errors are averaged


class TwoPhase(Experiment):
    """One layer of width 256, one head, no positions, ten digits, Adam at 1e-4, batches of 64, as the paper has it.

    With scores divided by the square root of the head size, as attention has them, and as they are: what learning to copy does
    to attention depends on how far it can saturate.
    """

    name = "two-phase"
    claim = "after learning to copy, LUCID learns the running mean and softmax does not (paper: 0 against 1.2 to 1.3)"
    gpu_minutes = 13.0
    cpu_minutes = 480.0
    version = 2

    length, batch = 10, 64

    def cells(self, tiny: bool) -> list[Cell]:
        """Both attentions, scaled and not."""
        return [
            {"attention": attention, "scores": scores}
            for scores in ("scaled", "plain")
            for attention in ("softmax", "lucid")
        ]

    def phases(self, tiny: bool) -> dict[str, int]:
        """Steps of each."""
        return {"copy": 4, "mean": 4} if tiny else {"copy": 30_000, "mean": 30_000}

    def steps(self, cell: Cell, tiny: bool) -> int:
        return sum(self.phases(tiny).values())

    def run(self, cell: Cell, seeds: Sequence[int], place: Workplace, tick: Callable[[int], None]) -> list[Row]:  # fmt: skip
        device, tiny = place.device, place.tiny
        model = Replicas(
            vocabularies=(10,), outputs=1, width=32 if tiny else 256, heads=1, depth=1,
            attention=cell["attention"], position="nope", seeds=seeds, scale=1.0 if cell["scores"] == "plain" else None,
        ).to(device)  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, capturable=device.type == "cuda")

        def train(digits: Tensor, target: Tensor) -> Tensor:
            each = (model(digits)[..., 0] - target).square().flatten(1).mean(1)
            optimizer.zero_grad(set_to_none=True)
            each.sum().backward()
            optimizer.step()
            return each.detach()

        step_of = Replayed(train, device)
        data = [torch.Generator().manual_seed(30_000 + seed) for seed in seeds]
        chunk = 2 if tiny else _CHUNK
        rows: list[Row] = []
        done = 0
        kept = place.work / "state.pt"
        if kept.is_file():
            state = torch.load(kept, map_location=device)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            for group in optimizer.param_groups:
                group["capturable"] = device.type == "cuda"  # whatever device it was saved on
            for generator, was in zip(data, state["data"], strict=True):
                generator.set_state(was.cpu())
            rows, done = state["rows"], state["done"]
            tick(done)
        before = 0
        for phase, steps in self.phases(tiny).items():
            if done == before:
                rows += self._rows(phase, 0, done, model, seeds, None)
            for start in range(max(0, done - before), steps, chunk):
                draws = [two_phase(chunk * self.batch, self.length, phase=phase, generator=g) for g in data]  # fmt: skip
                shape = (len(seeds), chunk, self.batch, self.length)
                digits = torch.stack([d.digits for d in draws]).to(device).view(shape)
                target = torch.stack([d.target for d in draws]).to(device).view(shape)
                errors = torch.zeros(len(seeds), device=device)
                for step in range(chunk):
                    errors += step_of(digits[:, step], target[:, step])
                done += chunk
                rows += self._rows(phase, start + chunk, done, model, seeds, errors / chunk)
                if done % (2 if tiny else 5000) == 0:
                    partial = kept.with_suffix(".partial")
                    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rows": rows, "done": done,
                                "data": [g.get_state() for g in data]}, partial)  # fmt: skip
                    partial.replace(kept)
                tick(chunk)  # last: what stops a run here finds it saved
            before += steps
        return rows

    def _rows(self, phase: str, step: int, total: int, model: Replicas, seeds: Sequence[int], errors: Tensor | None) -> list[Row]:  # fmt: skip
        probe = off_diagonal(model, self.length).tolist() if step % 5000 == 0 or errors is None else None  # fmt: skip
        return [
            {
                "seed": seed, "phase": phase, "step": step, "total": total,
                "mse": None if errors is None else float(errors[i]),
                "off_diagonal": None if probe is None else probe[i],
            }
            for i, seed in enumerate(seeds)
        ]  # fmt: skip

    def summary(self, rows: list[Row]) -> str:
        """Errors at the ends of the phases, and how much of attention's Jacobian is off the diagonal."""
        lines = [
            "# Two phases",
            "",
            "Mean squared error over the last 500 steps, and the share of the Jacobian of attention's output by its input that is off the "
            f"diagonal; mean ± standard deviation over seeds; LUCID - softmax: {COUNTS}.",
            "",
            "| scores | phase | steps | measure | softmax | LUCID | LUCID - softmax |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        ends = {phase: max(r["step"] for r in rows if r["phase"] == phase) for phase in ("copy", "mean")}  # fmt: skip
        marks = [
            ("copy", ends["copy"]),
            ("mean", min(10_000, ends["mean"])),
            ("mean", ends["mean"]),
        ]
        kinds = dict.fromkeys(row["scores"] for row in rows)
        for scores, (phase, step), metric in itertools.product(kinds, dict.fromkeys(marks), ("mse", "off_diagonal")):  # fmt: skip
            at = [r for r in rows if (r["scores"], r["phase"], r["step"]) == (scores, phase, step) and r[metric] is not None]  # fmt: skip
            sides = {a: [r for r in at if r["attention"] == a] for a in ("softmax", "lucid")}
            if not at:
                continue
            texts = " | ".join(said(side, metric, 4) for side in sides.values())
            gap = paired(sides["lucid"], sides["softmax"], metric).said(with_seeds=True)
            lines.append(f"| {scores} | {phase} | {step:,} | {metric} | {texts} | {gap} |")
        return "\n".join(lines) + "\n"

    def plot(self, rows: list[Row]) -> bytes:
        """Errors and the probe against all steps, a line for each seed."""
        kinds = list(dict.fromkeys(row["scores"] for row in rows))
        figure, axes = panels(2 * len(kinds), columns=2, width=5, height=3.6, sharex=True)
        for axis, (scores, (metric, title)) in zip(axes, itertools.product(kinds, _TITLES.items()), strict=True):  # fmt: skip
            for attention, colour in COLOURS.items():
                mine = [r for r in rows if (r["attention"], r["scores"]) == (attention, scores) and r[metric] is not None]  # fmt: skip
                seed_lines(axis, mine, "total", metric, label=attention, color=colour, alpha=0.8)
            switch = max((r["total"] for r in rows if r["phase"] == "copy"), default=0)
            axis.axvline(switch, color="#555555", ls=":", lw=1)
            axis.set(title=f"{title}, {scores} scores")
            if metric == "mse":
                axis.set_yscale("log")
        figure.supxlabel("step (dotted: from copying to the mean)", fontsize=9)
        legend(axes)
        return as_png(figure)


def off_diagonal(model: Replicas, length: int, draws: int = 16) -> Tensor:
    """The share of ``sum_ij ||d o_i / d x_j||^2`` with ``j != i``, of the first block's attention, for each replica.

    Squared Frobenius norms by random cotangents: for ``v ~ N(0, I)`` the mean of ``||J_ij^T v||^2`` is ``||J_ij||^2``.
    """
    parameter = next(model.parameters())
    device, replicas = parameter.device, parameter.shape[0]
    generator = torch.Generator().manual_seed(0)
    digits = torch.randint(10, (1, draws, length), generator=generator).to(device)
    with torch.no_grad():
        hidden = model.embed(digits.expand(replicas, -1, -1))
    squares = torch.zeros(replicas, length, length, device=device)
    for place in range(length):
        given = hidden.clone().requires_grad_()
        output = model.attend(given, 0)[:, :, place]
        cotangent = torch.randn(1, *output.shape[1:], generator=generator).to(device)
        (gradient,) = torch.autograd.grad(output, given, cotangent.expand_as(output))
        squares[:, place] = gradient.square().sum(-1).mean(1)
    diagonal = squares.diagonal(dim1=1, dim2=2).sum(1)
    return 1 - diagonal / squares.sum((1, 2))
