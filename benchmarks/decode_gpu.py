"""Decoding on a GPU beside softmax attention: one step against a cache, a model's tokens a second, drift.

    make bench-decode                                    # everything
    python -m benchmarks.decode_gpu --part step          # or model, or drift

Writes ``decode-GPU.csv`` (steps), ``decode-model-GPU.csv``, ``decode-drift-GPU.csv``, ``.json`` (conditions), ``.md``
(tables) and ``.png`` into ``benchmarks/results`` (or ``--out``), after each shape what there is so far.

A step is timed as a model runs it: a CUDA graph of calls one after another, each with a cache of its own (a layer's),
at least 1 GiB of them, so that none finds its cache on the chip. The rivals are PyTorch's softmax attention
over the same caches, one query a head, grouped heads enabled, with each of its back ends, and flex attention; the
fastest counts. They are not asked to append keys and values; ours does. "Masked": the same with a key mask of ones, which
transformers hands down with a static cache. Copy: a large device-to-device copy in the
same run, bytes read plus bytes written.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from tqdm import tqdm

from benchmarks import decode_drift, decode_model, decode_report, report
from benchmarks.accuracy import relative_error
from benchmarks.gpu import Contestant, attempt, captured, in_turn
from benchmarks.solve import RESULTS, conditions, quantiles
from lucid_attention import decode_workspace, lucid_attention_with_kvcache

GIB = 1 << 30
LEAST_BYTES = GIB
LEAST_CALLS = 2
RIVALS = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
LARGEST_ERROR = {
    "y": 1e-3,
    "output": 4e-3,
}  # against float64; a bfloat16 output is rounded to 1.7e-3


@dataclass(frozen=True)
class Step:
    """One decoding step: rows of the batch, KV heads, query heads of each, head size, cached tokens, new ones."""

    batch: int
    kv_heads: int
    group: int
    head_dim: int
    context: int
    tokens: int = 1

    @property
    def cache_bytes(self) -> int:
        return 4 * self.batch * self.kv_heads * self.context * self.head_dim


STEPS = [
    Step(8, 8, 4, 128, 32768),
    Step(1, 8, 4, 128, 32768),
    Step(1, 8, 4, 128, 131072),
    Step(1, 4, 8, 128, 131072),
    Step(16, 4, 8, 64, 32768),
    Step(1, 4, 8, 64, 32768),
    Step(1, 4, 8, 64, 131072),
    Step(1, 8, 4, 128, 4096),
    Step(32, 8, 4, 128, 4096),
    Step(64, 8, 4, 128, 2048),
    Step(1, 32, 1, 128, 32768),
    Step(1, 1, 16, 128, 131072),
    Step(1, 8, 4, 68, 32768),
    Step(1, 8, 2, 256, 32768),
    Step(1, 8, 4, 128, 32768, tokens=4),
]
QUICK = [Step(1, 2, 4, 64, 1000), Step(2, 2, 1, 68, 300)]


class Layers:
    """Caches of as many layers as it takes, and what a step brings to each."""

    def __init__(self, step: Step, device: str = "cuda") -> None:
        self.step = step
        calls = max(LEAST_CALLS, math.ceil(LEAST_BYTES / step.cache_bytes))
        # Long rows of small calls say nothing new.
        self.calls = min(calls, 64)
        normal = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
        heads = (step.batch, step.kv_heads)
        torch.manual_seed(step.context)
        centre = normal(*heads, 1, step.head_dim)
        size = (*heads, step.context, step.head_dim)
        self.keys, self.ys, self.values = [], [], []
        for _ in range(self.calls):
            # Keys with pairwise cosine 0.5, as in the accuracy tests.
            self.keys.append((0.5**0.5 * (normal(size) + centre)).to(torch.bfloat16))
            values = normal(size)
            self.ys.append(values.half())
            self.values.append(values)
        new = (*heads, step.tokens, step.head_dim)
        self.query = normal(step.batch, step.kv_heads * step.group, step.tokens, step.head_dim)
        self.key, self.value = normal(new) * 0.5**0.5 + 0.5**0.5 * centre, normal(new)
        self.length = torch.full((1,), step.context - step.tokens, dtype=torch.int32, device=device)
        self.scale = torch.ones(heads, dtype=torch.float32, device=device)
        self.workspace = decode_workspace(*heads, device)
        self.ones = torch.ones(step.batch, step.context, dtype=torch.bool, device=device)

    def lucid(self, layer: int, key_mask: Tensor | None = None) -> Tensor:
        return lucid_attention_with_kvcache(
            self.query, self.key, self.value, self.keys[layer], self.ys[layer], self.length, key_mask=key_mask,
            y_scale=self.scale, workspace=self.workspace, impl="triton" if self.query.is_cuda else "blocked",
        )  # fmt: skip

    def masked(self, layer: int) -> Tensor:
        return self.lucid(layer, self.ones)

    def softmax(self, layer: int) -> Tensor:
        return F.scaled_dot_product_attention(
            self.query, self.keys[layer], self.values[layer], enable_gqa=self.step.group > 1
        )

    def all(self, one: Callable[[int], Tensor]) -> None:
        for layer in range(self.calls):
            one(layer)


def gate(step: Step) -> dict[str, float]:
    """Relative errors of the output and the new rows against float64; exits where one is too large."""
    layers = Layers(step)
    past = step.context - step.tokens
    keys, exact = layers.keys[0].double(), layers.ys[0].double()
    new = [x.double() for x in (layers.query, layers.key, layers.value)]
    expected = lucid_attention_with_kvcache(*new, keys, exact, past, impl="blocked")
    output = layers.lucid(0)
    found = {
        "output": relative_error(output, expected),
        "y": relative_error(layers.ys[0][:, :, past:], exact[:, :, past:]),
    }
    for name, largest in LARGEST_ERROR.items():
        if not found[name] <= largest:
            raise SystemExit(f"{step}: the {name} is off by {found[name]:.1e}; nothing is timed.")
    return found


def flex(layers: Layers) -> Callable[[int], Tensor] | None:
    """Flex attention's decoding kernel, compiled for these shapes."""
    if layers.step.group * layers.step.tokens & (layers.step.group * layers.step.tokens - 1):
        return None
    torch._dynamo.reset()
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda i: compiled(layers.query, layers.keys[i], layers.values[i], enable_gqa=True)


def measure(step: Step, facts: dict[str, Any], with_flex: bool) -> list[dict[str, Any]]:
    """A row for each contestant."""
    errors = gate(step)
    layers = Layers(step)
    calls: dict[str, Contestant] = {}

    def enter(name: str, one: Callable[[int], Tensor] | None, backend: SDPBackend | None = None) -> None:  # fmt: skip
        if one is None:
            return
        replay = attempt(name, lambda: captured(lambda: layers.all(one)), backend)
        if replay is not None:
            calls[name] = Contestant(replay, budget_ms=120.0)

    enter("lucid", layers.lucid)
    enter("lucid_masked", layers.masked)
    for name, backend in RIVALS.items():
        enter(name, layers.softmax, backend)
    if with_flex:
        enter("flex", attempt("flex", lambda: flex(layers)))
    times = in_turn(calls)
    found = {name: quantiles(seconds) for name, seconds in times.items() if seconds}
    rivals = {name: ms[1] for name, ms in found.items() if not name.startswith("lucid")}
    best = min(rivals, key=lambda name: rivals[name]) if rivals else ""
    rows = []
    for name, (low, middle, high) in found.items():
        each = middle / layers.calls
        rate = step.cache_bytes / each / 1e6
        ours = name == "lucid"
        rows.append(
            {
                **{name: facts[name] for name in ("commit", "date", "gpu", "torch", "triton")},
                "batch": step.batch,
                "kv_heads": step.kv_heads,
                "q_heads": step.kv_heads * step.group,
                "head_dim": step.head_dim,
                "context": step.context,
                "tokens": step.tokens,
                "layers": layers.calls,
                "impl": name,
                "ms_p20": low / layers.calls,
                "ms_p50": each,
                "ms_p80": high / layers.calls,
                "gb_per_s": rate,
                "copy_share": rate / facts["copy_gb_per_s"],
                "rival": best,
                "rival_ms_p50": rivals.get(best, math.nan) / layers.calls,
                "ratio": middle / rivals.get(best, math.nan),
                "output_err": errors["output"] if ours else None,
                "y_err": errors["y"] if ours else None,
            }
        )
    return rows


def copy_rate() -> float:
    """GB/s of a large device copy, read plus written."""
    source = torch.empty(2 * GIB, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    seconds = in_turn({"copy": Contestant(lambda: target.copy_(source))})["copy"]
    return 2 * source.nbytes / float(torch.tensor(seconds).median()) / 1e9


def run(parts: set[str], options: argparse.Namespace) -> None:
    """Measure and write."""
    import triton

    facts: dict[str, Any] = conditions("cuda")
    facts["gpu"] = facts.pop("device")
    facts |= {
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "copy_gb_per_s": round(copy_rate(), 1),
        "timing": "CUDA graphs of one call a layer, at least 1 GiB of caches; device events around a replay, "
        "rivals in turn, 3 rounds; 20th, 50th, 80th percentile, divided by the calls",
        "key_cosine": 0.5,
    }
    results = decode_report.Results(options.out / f"decode-{report.slug(facts['gpu'])}", facts)
    if "step" in parts:
        for step in tqdm(QUICK if options.quick else STEPS, desc="steps"):
            found = attempt(str(step), functools.partial(measure, step, facts, options.flex)) or []
            results.steps += found
            for row in found:
                if row["impl"] == "lucid":
                    tqdm.write(decode_report.line(row))
            torch.cuda.empty_cache()
            results.write()
    if "drift" in parts:
        results.drift = decode_drift.run(options.quick, facts)
        results.write()
    if "model" in parts:
        for row in decode_model.run(options.quick, facts):
            results.model.append(row)
            results.write()
    results.plot()
    print(results.base.with_suffix(".md").read_text())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few small shapes only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write")
    parser.add_argument("--part", choices=("step", "model", "drift", "all"), default="all")
    parser.add_argument("--no-flex", dest="flex", action="store_false", help="without flex attention, which compiles for long")  # fmt: skip
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.decode_gpu needs a CUDA device.")
    run({"step", "model", "drift"} if options.part == "all" else {options.part}, options)


if __name__ == "__main__":
    main()
