"""Tiny random models of every tested family, and a dense LUCID to compare them with.

The oracle is a second attention function, registered under its own name and used by *stock* model
classes: it builds L from transformers' own 4-D eager mask, solves densely, and knows nothing of the
package under test.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from lucid_attention.hf import attention as hf_attention
from lucid_attention.hf.cache import LucidLayer

TOLERANCE = {"rtol": 1e-4, "atol": 3e-4}
"""Of logits, between two ways to the same."""
COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # large, so that attention is far from uniform and keys correlate
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 256,
}
# Odd head sizes where the family permits, sliding layers where it has them.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": None, "head_dim": 18},
    "Qwen2": {},
    "Qwen3": {"head_dim": 12},
    "Gemma2": {
        "head_dim": 20,
        "num_hidden_layers": 4,
        "sliding_window": 6,
        "query_pre_attn_scalar": 48,
        "attn_logit_softcapping": 5.0,
    },
    "Gemma3Text": {
        "head_dim": 16,
        "num_hidden_layers": 4,
        "sliding_window": 6,
        "query_pre_attn_scalar": 48,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "GptOss": {
        "head_dim": 14,
        "num_hidden_layers": 4,
        "sliding_window": 6,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "Olmo": {},
    "Olmo2": {},
    "Phi3": {"sliding_window": None},
    # Layers with and without RoPE.
    "SmolLM3": {"head_dim": 20, "no_rope_layers": [1, 0]},
}


def dense_lucid(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(Q K^T) L^-1 V, written out: every matrix in full, nothing shared with the package."""
    groups = query.shape[1] // key.shape[1]
    n, width = key.shape[-2:]
    seen = attention_mask[..., :n] > torch.finfo(attention_mask.dtype).min / 2
    oracle = module.config.oracle  # type: ignore[union-attr]
    if module.layer_idx in oracle["layers"]:
        strength = torch.as_tensor(oracle["strength"], dtype=key.dtype)
        normal = key * (key.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        scale = oracle["kernel_scale"] or width**-0.5
        kernel = (scale * (normal @ normal.mT - width)).exp()
        real = seen.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        lower = strength.reshape(-1, 1, 1) * (kernel * seen).tril(-1) + torch.eye(n)
        value = torch.linalg.solve_triangular(lower, value * real, upper=False)
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.mT * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    blind = scores.isneginf().all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)[..., :n]
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("lucid_dense_oracle", dense_lucid)
AttentionMaskInterface.register("lucid_dense_oracle", eager_mask)


def build(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A stock causal LM of a family, in eval mode, with random fp32 weights."""
    settings = {**COMMON, **FAMILIES.get(family, {}), **overrides}
    config = getattr(transformers, f"{family}Config")(**settings)
    model_class = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    torch.manual_seed(seed)
    model: PreTrainedModel = model_class(config)
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            nn.init.normal_(parameter, std=1.0)
    return model.eval()


def full_layers(model: PreTrainedModel) -> list[int]:
    types = getattr(model.config, "layer_types", None)
    count = model.config.num_hidden_layers
    return [i for i in range(count) if types is None or types[i] == "full_attention"]


def dense_twin(
    model: PreTrainedModel,
    layers: list[int] | None = None,
    strength: Any = 1.0,
    kernel_scale: float | None = None,
) -> PreTrainedModel:
    """A stock copy of a *stock* model whose attention is the dense oracle."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("lucid_dense_oracle")
    twin.config.oracle = {
        "layers": full_layers(model) if layers is None else layers,
        "strength": strength,
        "kernel_scale": kernel_scale,
    }
    return twin


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(name="build")
def build_fixture() -> Callable[..., PreTrainedModel]:
    return build


@pytest.fixture(name="dense_twin")
def dense_twin_fixture() -> Callable[..., PreTrainedModel]:
    return dense_twin


@pytest.fixture
def ids() -> Tensor:
    """Token ids `(2, 19)` without the special ones."""
    return torch.randint(3, 96, (2, 19), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def left_padded(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return mask


@pytest.fixture(autouse=True)
def fresh_warnings() -> Iterator[None]:
    """Every test sees the once-a-process warnings anew."""
    before = set(hf_attention._WARNED)
    hf_attention._WARNED.clear()
    yield
    hf_attention._WARNED.update(before)


def lucid_layers(cache) -> list[int]:
    return [i for i, layer in enumerate(cache.layers) if isinstance(layer, LucidLayer)]
