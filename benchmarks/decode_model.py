"""A model's decoding step and prefill, LUCID beside softmax attention: tokens a second.

A Llama of 1.1 billion parameters (22 layers, width 2048, 32 query and 4 KV heads), random weights, bfloat16. The
step is the whole model's, with a static cache, as one CUDA graph. Softmax is run in two ways: as transformers does
(``sdpa``: its static cache comes with a mask, for which it repeats the KV heads), and as well as PyTorch can (``best``:
the same cache cut to its length, no mask, grouped heads, cuDNN). The latter is the rival.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from benchmarks.gpu import Contestant, captured, in_turn
from benchmarks.solve import quantiles

STEPS = ((1, 4096), (1, 32768), (16, 32768), (1, 131072))
"""Rows of a batch, and the tokens that each has cached."""
PREFILL = 131072
BEST = "softmax_best"


def best_softmax(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:  # fmt: skip
    """Softmax attention without a mask: causal for a prompt, over the whole buffer for a token."""
    causal = query.shape[2] > 1
    if causal:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=scaling, enable_gqa=True
        )
    return output.transpose(1, 2).contiguous(), None


def models(quick: bool, device: str = "cuda") -> dict[str, Any]:
    """The same random weights with each attention."""
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        LlamaConfig,
        LlamaForCausalLM,
    )

    from lucid_attention.hf import enable

    AttentionInterface.register(BEST, best_softmax)
    AttentionMaskInterface.register(BEST, lambda *args, **kwargs: None)
    size = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512} if quick else {
        "num_hidden_layers": 22, "hidden_size": 2048, "intermediate_size": 5632
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=32000, num_attention_heads=size["hidden_size"] // 64,
        num_key_value_heads=max(1, size["hidden_size"] // 512), max_position_embeddings=2 * PREFILL, **size,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        stock = LlamaForCausalLM(config).bfloat16().eval()
    found = {"sdpa": stock, BEST: copy.deepcopy(stock), "lucid": enable(copy.deepcopy(stock))}
    found[BEST].set_attn_implementation(BEST)
    return found


def filled(model: Any, batch: int, context: int, lucid: bool) -> Any:
    """A static cache with one place left, filled row by row of the batch."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=context)
    ids = torch.randint(0, 32000, (batch, context - 1), device=model.device)
    one = StaticCache(config=model.config, max_cache_len=context)
    model(ids[:1], past_key_values=one, logits_to_keep=1)
    if batch == 1:
        return one
    # Tokens do not matter for time: the first row's cache for all of them.
    model(ids[:, :1], past_key_values=cache, logits_to_keep=1)
    for layer, first in zip(cache.layers, one.layers, strict=True):
        layer.keys.copy_(first.keys.expand_as(layer.keys))
        layer.values.copy_(first.values.expand_as(layer.values))
        layer.cumulative_length.copy_(first.cumulative_length)
        if lucid and layer.y_scale is not None:
            layer.y_scale.copy_(first.y_scale.expand_as(layer.y_scale))
    return cache


def step_of(model: Any, batch: int, context: int, lucid: bool) -> Any:
    """One more token of every row as a CUDA graph; it writes the same place every time."""
    cache = filled(model, batch, context, lucid)
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    position = torch.full((batch, 1), context - 1, device=model.device)
    mask = torch.ones(batch, context, dtype=torch.int64, device=model.device)
    kept = [layer.cumulative_length.clone() for layer in cache.layers]

    def step() -> Tensor:
        for layer, length in zip(cache.layers, kept, strict=True):
            layer.cumulative_length.copy_(length)
        logits: Tensor = model(
            ids, position_ids=position, attention_mask=mask, past_key_values=cache
        ).logits
        return logits

    replay = captured(step)

    def again(alive: object = step) -> object:
        return replay()  # what the step holds: a graph keeps none of it alive

    return again


@torch.no_grad()
def run(quick: bool, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of steps, then of prefills."""
    steps, prefill = (((1, 256), (2, 512)), 1024) if quick else (STEPS, PREFILL)
    found = models(quick)
    for batch, context in tqdm(steps, desc="tokens a second"):
        calls = {
            name: Contestant(step_of(model, batch, context, name == "lucid"), budget_ms=300.0)
            for name, model in found.items()
        }
        yield from rows(in_turn(calls), "step", batch, context, batch, facts)
        del calls
        torch.cuda.empty_cache()
    ids = torch.randint(0, 32000, (1, prefill), device="cuda")
    calls = {}
    for name in (BEST, "lucid"):
        model = found[name]

        def call(model: Any = model) -> None:
            model(ids, use_cache=True, logits_to_keep=1)

        call()
        calls[name] = Contestant(call, budget_ms=20000.0 if not quick else 300.0)
    yield from rows(in_turn(calls), "prefill", 1, prefill, prefill, facts)


def rows(
    times: dict[str, list[float]], what: str, batch: int, context: int, tokens: int, facts: dict[str, Any]
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One for each attention, with its time over the rival's."""
    found = {name: quantiles(seconds) for name, seconds in times.items() if seconds}
    rival = found.get(BEST, (math.nan,) * 3)[1]
    for name, (low, middle, high) in found.items():
        yield {
            **{name: facts[name] for name in ("commit", "date", "gpu", "torch")},
            "what": what,
            "batch": batch,
            "context": context,
            "attention": name,
            "ms_p20": low,
            "ms_p50": middle,
            "ms_p80": high,
            "tokens_per_s": tokens / middle * 1e3,
            "time_ratio": middle / rival,
        }
