"""A training step of the 1B model on a GPU, LUCID beside softmax attention: time, tokens a second, memory.

    make bench-train                                       # 4K, 32K, 128K, head sizes 68 and 64
    python -m benchmarks.train_gpu --lengths 4096 --head-dims 64

The model is that of ``recipes/paper-1b.yaml`` (22 layers, width 2048, 32 query and 4 KV heads), weights and AdamW's moments in
float32, bfloat16 autocast, random tokens, 16,384 of them a step or one row; gradient checkpointing from 32K on; liger-kernel's fused
loss (128K needs it), norms and MLPs where it is installed. A step is forward, backward and the fused AdamW. One model takes both parts in turn: softmax is
LUCID of strength 0, which solves nothing, with the same attention kernels. Writes ``train-GPU.csv``, ``.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import report
from benchmarks.gpu import attempt
from benchmarks.solve import RESULTS, conditions, quantiles
from lucid_attention.hf import enable
from lucid_attention.train.configuration import TrainConfig
from lucid_attention.train.cost import flops_per_token, parameters, peak_flops
from lucid_attention.train.model import build_model, use_fused_layers, use_fused_loss

TOKENS = 16384  # what fits into 80 GB without checkpointing
CHECKPOINTED = 32768
LEAST_ROUNDS, MOST_ROUNDS, BUDGET_S = 2, 9, 30.0
STRENGTHS = {"softmax": 0.0, "lucid": 1.0}
VOCABULARY = 32000


def paper(head_dim: int, length: int) -> TrainConfig:
    """The paper's 1B model, with any head size."""
    return TrainConfig(
        text="random", layers=22, width=2048, heads=32, kv_heads=4, head_dim=head_dim, mlp_width=5632,
        vocabulary=VOCABULARY, length=length,
    )  # fmt: skip


class Stepper:
    """A model and its optimiser, and a step of them with either attention."""

    def __init__(self, config: TrainConfig, vocabulary: int, device: str) -> None:
        self.device, self.vocabulary = torch.device(device), vocabulary
        self.model: Any = build_model(config, vocabulary, seed=0, device=device).train()
        self.loss = use_fused_loss(self.model, "auto", self.device)
        self.layers = use_fused_layers(self.model, "auto", self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=device == "cuda")

    def at(self, length: int) -> None:
        """Go on with rows of this length."""
        self.length, self.rows = length, max(1, TOKENS // length)
        self.ids = torch.randint(self.vocabulary, (self.rows, length), device=self.device)
        if length >= CHECKPOINTED:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def take(self, attention: str) -> None:
        """Go on with this attention."""
        enable(self.model, strength=STRENGTHS[attention])

    def step(self, attention: str) -> Tensor:
        self.take(attention)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss: Tensor = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(stepper: Stepper, head_dim: int, length: int, facts: dict[str, Any]) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each attention. Steps are taken in turn, so that a drift of the clocks meets both alike."""
    stepper.at(length)
    memory: dict[str, float] = {}
    found: dict[str, list[float]] = {}
    stepper.step("softmax")  # makes AdamW's moments, which both sides are to count
    for name in STRENGTHS:
        torch.cuda.reset_peak_memory_stats()
        stepper.step(name)
        memory[name] = torch.cuda.max_memory_allocated() / 2**30
        found[name] = [timed(functools.partial(stepper.step, name))]
    rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, round(BUDGET_S / sum(map(sum, found.values())))))
    for _, name in itertools.product(range(rounds - 1), STRENGTHS):
        found[name].append(timed(functools.partial(stepper.step, name)))
    times = {name: quantiles(each) for name, each in found.items()}
    rows = []
    for name, (low, middle, high) in times.items():
        stepper.take(name)
        flops = flops_per_token(stepper.model, length)["total"]
        tokens = stepper.rows * length
        rows.append(
            {
                **{key: facts[key] for key in ("commit", "date", "gpu", "torch", "triton")},
                "parameters": parameters(stepper.model)["total"],
                "head_dim": head_dim,
                "length": length,
                "rows": stepper.rows,
                "checkpointing": length >= CHECKPOINTED,
                "fused_loss": stepper.loss,
                "fused_layers": stepper.layers,
                "attention": name,
                "ms_p20": low,
                "ms_p50": middle,
                "ms_p80": high,
                "tokens_per_s": tokens / middle * 1e3,
                "mfu": tokens * flops / middle * 1e3 / (facts["peak_flops"] or float("nan")),
                "memory_gib": memory[name],
                "steps": rounds,
                "ratio": middle / times["softmax"][1],
            }
        )
    return rows


def tables(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        [
            str(r["head_dim"]), str(r["length"]), f"{r['rows']}", "yes" if r["checkpointing"] else "no", r["fused_loss"], r["fused_layers"],
            r["attention"], f"{r['ms_p50']:.0f}", f"{r['tokens_per_s']:.0f}", f"{r['mfu']:.0%}", f"{r['memory_gib']:.1f}",
            f"**{r['ratio']:.3f}**",
        ]
        for r in rows
    ]  # fmt: skip
    titles = "head size | length | rows | checkpointing | fused loss | fused layers | attention | ms a step | tokens/s | MFU | GiB | / softmax"
    head = f"{facts['gpu']}, torch {facts['torch']}, commit {facts['commit']}, {facts['date']}.\n\n"
    return head + report.table(titles.split(" | "), lines)


def main() -> None:
    """Read the command line, measure, write after each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[68, 64])
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.train_gpu needs a CUDA device.")
    import triton

    facts: dict[str, Any] = conditions("cuda")
    facts["gpu"] = facts.pop("device")
    facts |= {"triton": triton.__version__, "peak_flops": peak_flops(torch.device("cuda"))}
    base = options.out / f"train-{report.slug(facts['gpu'])}"
    base.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for head_dim in options.head_dims:
        stepper = Stepper(paper(head_dim, max(options.lengths)), VOCABULARY, "cuda")
        for length in tqdm(options.lengths, desc=f"head size {head_dim}"):
            action = functools.partial(measure, stepper, head_dim, length, facts)
            rows += attempt(f"D {head_dim}, {length}", action) or []
            torch.cuda.empty_cache()
            if rows:
                report.write_csv(rows, base.with_suffix(".csv"))
                base.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
                base.with_suffix(".md").write_text(tables(rows, facts))
        del stepper, action
        gc.collect()  # a model has cycles
        torch.cuda.empty_cache()
    print(tables(rows, facts))


if __name__ == "__main__":
    main()
