"""Does decoding drift? Errors of ``Y`` against float64 after a prefill and thousands of decoded tokens.

The prompt is solved by the kernels and cached, then tokens are added one by one, each solved from what the cache
holds. Beside it, on the same tokens: one full solve by the kernels. ``dtype``: what ``Y`` is cached in, float16
with a power-of-two scale for each head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.precision_gpu import make_keys
from lucid_attention import decode_workspace, lucid_attention_with_kvcache, precondition

KINDS = (("shared", 0.5), ("shared", 0.8))
PROMPT, DECODED = 32768, 4096
WIDTHS = (64, 128)


def errors(got: Tensor, exact: Tensor, start: int) -> list[float]:
    """Relative Frobenius error of each head's rows from ``start`` on."""
    got, exact = got[0, :, start:].double(), exact[0, :, start:]
    found: list[float] = ((got - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))).tolist()
    return found


def decoded(key: Tensor, value: Tensor, prompt: int, dtype: torch.dtype) -> Tensor:
    """``Y`` of all tokens, those after the prompt one by one; float32."""
    first = precondition(key[:, :, :prompt], value[:, :, :prompt], out_dtype=torch.float32)
    scale = torch.ones(key.shape[:2], device=key.device)
    if dtype == torch.float16:
        scale = torch.exp2(torch.frexp(first.abs().amax((2, 3))).exponent.float() + 5)
    key_cache = torch.zeros_like(key)
    y_cache = torch.zeros_like(value, dtype=dtype)
    key_cache[:, :, :prompt] = key[:, :, :prompt]
    y_cache[:, :, :prompt] = first / scale[:, :, None, None]
    new = [x[:, :, :1].clone() for x in (key, key, value)]
    length = torch.full((1,), prompt, dtype=torch.int32, device=key.device)
    workspace = decode_workspace(key.shape[0], key.shape[1], key.device)
    step = functools.partial(
        lucid_attention_with_kvcache, *new, key_cache, y_cache, length, y_scale=scale, workspace=workspace
    )  # fmt: skip
    for position in range(prompt, key.shape[2]):
        for held, given in zip(new, (key, key, value), strict=True):
            held.copy_(given[:, :, position : position + 1])
        step()
        length += 1
    return y_cache.float() * scale[:, :, None, None]


@torch.no_grad()
def run(quick: bool, facts: dict[str, Any], device: str = "cuda") -> list[dict[str, Any]]:
    """A row for each head size, kind of keys and dtype of the cache."""
    prompt, more = (200, 40) if quick else (PROMPT, DECODED)
    rows = []
    for width in tqdm((64,) if quick else WIDTHS, desc="drift"):
        torch.manual_seed(width)
        key = make_keys(KINDS, prompt + more, width, device).to(torch.bfloat16)
        value = torch.randn_like(key)
        exact = precondition(key.double(), value.double(), impl="blocked")
        solved = errors(precondition(key, value, out_dtype=torch.float32), exact, prompt)
        for dtype in (torch.float16, torch.float32, torch.bfloat16):
            found = errors(decoded(key, value, prompt, dtype), exact, prompt)
            for (_, cosine), one, all_ in zip(KINDS, found, solved, strict=True):
                rows.append(
                    {
                        **{name: facts[name] for name in ("commit", "date", "gpu")},
                        "head_dim": width,
                        "prompt": prompt,
                        "decoded": more,
                        "cosine": cosine,
                        "cache": str(dtype).removeprefix("torch."),
                        "err": one,
                        "full_solve_err": all_,
                        "ratio": one / all_,
                    }
                )
    return rows
