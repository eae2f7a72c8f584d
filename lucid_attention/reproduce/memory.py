"""The updatable memory: accuracy far beyond the length that was trained, by keys, head size, correlation, position, depth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lucid_attention.tasks import updatable_memory
from lucid_attention.tasks.updatable_memory import IGNORED

from .experiment import Cell, Experiment, Row, Workplace
from .figures import COLOURS, as_png, legend, panels, seed_lines
from .replicas import Replayed, Replicas, clip_each
from .statistics import COUNTS, paired, said

__all__ = ["Memory"]

_CHUNK = 50  # steps whose data are drawn at once


class Memory(Experiment):
    """One or two layers of width 128, trained at one length, tested at up to 32 times that."""

    name = "memory"
    claim = "an updatable memory is kept at lengths far beyond training, softmax's is not"
    gpu_minutes = 24.0
    measured = True
    cpu_minutes = None
    version = 3

    values = 64
    width = 128
    batch = 32

    def cells(self, tiny: bool) -> list[Cell]:
        """Length and keys of the training grow together: 16 keys at 128, 128 at 512."""
        if tiny:
            return [self._cell(a, "nope", 8, 16, 1, 0.0) for a in ("softmax", "lucid")]
        kinds = list(itertools.product(("softmax", "lucid"), ("nope", "rope")))
        found = [self._cell(*kind, 16, 64, 1, 0.0) for kind in kinds]
        normed = [("softmax", "nope"), ("lucid", "nope"), ("softmax", "rope"), ("lucid", "rope")]
        found += [{**self._cell(*kind, 16, 64, 1, 0.0), "head_norm": True} for kind in normed]
        found += [self._cell(*kind, keys, 64, 1, 0.0) for keys in (128, 512) for kind in kinds]
        found += [self._cell(*kind, 128, 16, 1, 0.0) for kind in kinds]
        found += [self._cell(*kind, 128, 64, 2, 0.0) for kind in kinds]
        found += [self._cell(*kind, 128, 64, 1, c) for c in (0.5, 0.9) for kind in kinds]
        return found

    @staticmethod
    def _cell(attention: str, position: str, keys: int, head_dim: int, depth: int, cosine: float) -> Cell:  # fmt: skip
        return {"attention": attention, "position": position, "keys": keys, "head_dim": head_dim,
                "depth": depth, "cosine": cosine}  # fmt: skip

    def length(self, cell: Cell, tiny: bool) -> int:
        """Of the training."""
        return 32 if tiny else {16: 128, 128: 512, 512: 512}[cell["keys"]]

    def multiples(self, tiny: bool) -> tuple[int, ...]:
        """Test lengths, of the training's."""
        return (1, 4) if tiny else (1, 2, 4, 8, 16, 32)

    def steps(self, cell: Cell, tiny: bool) -> int:
        return 6 if tiny else 1500

    def run(self, cell: Cell, seeds: Sequence[int], place: Workplace, tick: Callable[[int], None]) -> list[Row]:  # fmt: skip
        device, tiny = place.device, place.tiny
        width = 32 if tiny else self.width
        model = Replicas(
            vocabularies=(cell["keys"], self.values + 1), outputs=self.values, width=width,
            heads=width // cell["head_dim"], depth=cell["depth"], attention=cell["attention"],
            position=cell["position"], seeds=seeds, cosine=cell["cosine"], head_norm=cell.get("head_norm", False),
        ).to(device)  # fmt: skip
        steps, length = self.steps(cell, tiny), self.length(cell, tiny)
        rate = torch.tensor(0.0, device=device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, capturable=device.type == "cuda")

        def train(key: Tensor, value: Tensor, target: Tensor) -> Tensor:
            logits = model(key, value)
            loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), ignore_index=IGNORED, reduction="none")  # fmt: skip
            asked = (target != IGNORED).flatten(1).sum(1)
            total = (loss.view(len(seeds), -1).sum(1) / asked).sum()
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            clip_each(model, 1.0)
            optimizer.step()
            return total.detach()

        step_of = Replayed(train, device)
        # A draw of its own for every seed, the same for both attentions.
        data = [torch.Generator().manual_seed(10_000 + seed) for seed in seeds]
        for first in range(0, steps, _CHUNK):
            number = min(_CHUNK, steps - first)
            draws = self._draw(cell, number * self.batch, length, data, device)
            batches = [x.view(len(seeds), number, self.batch, length) for x in draws]
            for step in range(first, first + number):
                rate.fill_(3e-3 * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps)))  # fmt: skip
                step_of(*(x[:, step - first] for x in batches))
            tick(number)
        return self._test(cell, model, seeds, length, device, tiny)

    @torch.no_grad()
    def _test(self, cell: Cell, model: Replicas, seeds: Sequence[int], length: int, device: torch.device, tiny: bool) -> list[Row]:  # fmt: skip
        rows = []
        for multiple in self.multiples(tiny):
            data = [torch.Generator().manual_seed(20_000 + 100 * seed + multiple) for seed in seeds]
            reach = multiple * length
            right, asked = (torch.zeros(len(seeds), device=device) for _ in range(2))
            number = max(1, (1 << (10 if tiny else 17)) // reach // 4)
            draws = self._draw(cell, 4 * number, reach, data, device)
            # Softmax divides by a sum that grows with the length: what a head returns may still be right and only too small.
            for gain in dict.fromkeys((1, multiple)):
                model.gain = float(gain)
                right.zero_(), asked.zero_()
                for key, value, target in zip(*(x.split(4, dim=1) for x in draws), strict=True):
                    late = target[..., reach * 3 // 4 :]
                    answer = model(key, value)[..., reach * 3 // 4 :, :].argmax(-1)
                    right += ((answer == late) & (late != IGNORED)).flatten(1).sum(1)
                    asked += (late != IGNORED).flatten(1).sum(1)
                accuracy = (right / asked).tolist()
                rows += [
                    {"seed": seed, "multiple": multiple, "length": reach, "gain": gain, "accuracy": accuracy[i]}
                    for i, seed in enumerate(seeds)
                ]  # fmt: skip
        model.gain = 1.0
        return rows

    def _draw(self, cell: Cell, batch: int, length: int, data: list[torch.Generator], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        draws = [updatable_memory(batch, length, keys=cell["keys"], values=self.values, generator=g, device=device) for g in data]  # fmt: skip
        return tuple(torch.stack([d[i] for d in draws]) for i in range(3))  # type: ignore[return-value]

    def summary(self, rows: list[Row]) -> str:
        """Accuracy with its deviation, and the paired difference at each length."""
        multiples = sorted({row["multiple"] for row in rows})
        lines = [
            "# Updatable memory",
            "",
            f"Accuracy on the last quarter of sequences, mean ± standard deviation over seeds; LUCID - softmax: {COUNTS}. "
            "Attention x length: the same models, in the test what attention adds multiplied by the length over the training's.",
            "",
            "| position | keys | head size | layers | cosine | head norm | attention | " + " | ".join(f"x{m}" for m in multiples) + " |",
            "|---|---|---|---|---|---|---|" + "---|" * len(multiples),
        ]  # fmt: skip
        for setting in dict.fromkeys(_setting(row) for row in rows):
            mine = [row for row in rows if _setting(row) == setting]
            label = " | ".join(map(str, setting[:-1])) + (" | yes" if setting[-1] else " | no")
            for attention, scaled in (("softmax", False), ("lucid", False), ("softmax", True), ("lucid", True)):  # fmt: skip
                ours = [r for r in mine if r["attention"] == attention and (not scaled or r["multiple"] > 1)]  # fmt: skip
                cells = [said((r for r in ours if (r["multiple"], r["gain"]) == (m, m if scaled else 1)), "accuracy") for m in multiples]  # fmt: skip
                lines.append(f"| {label} | {attention}{', attention x length' if scaled else ''} | " + " | ".join(cells) + " |")  # fmt: skip
            gaps = []
            for m in multiples:
                at = [r for r in mine if r["multiple"] == m and r["gain"] == 1]
                gaps.append(paired((r for r in at if r["attention"] == "lucid"), (r for r in at if r["attention"] == "softmax"), "accuracy").said())  # fmt: skip
            lines.append(f"| {label} | LUCID - softmax | " + " | ".join(gaps) + " |")
        return "\n".join(lines) + "\n"

    def plot(self, rows: list[Row]) -> bytes:
        """A panel for each setting: accuracy against length, every seed a thin line."""
        settings = list(dict.fromkeys(_setting(row) for row in rows))
        figure, axes = panels(len(settings), height=2.9, sharey=True)
        for axis, setting in zip(axes, settings, strict=True):
            for attention, colour in COLOURS.items():
                for scaled in (False, True):
                    mine = [r for r in rows if (_setting(r), r["attention"], r["gain"]) == (setting, attention, r["multiple"] if scaled else 1)]  # fmt: skip
                    label = attention + (", attention x length" if scaled else "")
                    seed_lines(axis, mine, "length", "accuracy", label=label, style=":" if scaled else "-", color=colour, alpha=0.7)  # fmt: skip
            position, keys, head_dim, depth, cosine, head_norm = setting
            axis.set_title(f"{position}, {keys} keys, D {head_dim}, {depth} layer{'s' if depth > 1 else ''}" + (f", cosine {cosine:g}" if cosine else "") + (", head norm" if head_norm else ""), fontsize=8)  # fmt: skip
            axis.set_xscale("log", base=2)
            axis.set_ylim(-0.03, 1.03)
        legend(axes, fontsize=8)
        figure.supxlabel("length (the first is the training's)")
        figure.supylabel("accuracy")
        return as_png(figure)


def _setting(row: Row) -> tuple[Any, ...]:
    return (*(row[name] for name in ("position", "keys", "head_dim", "depth", "cosine")), bool(row.get("head_norm")))  # fmt: skip
