"""What the probes say, against what is worked out by other means."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GptOssConfig, LlamaConfig

from lucid_attention.hf import disable, enable
from lucid_attention.precondition import reference
from lucid_attention.probes import attention_maps, capture, diagnose, lower_factor
from lucid_attention.probes import maps as maps_module
from lucid_attention.probes.capture import LayerTensors
from lucid_attention.probes.diagnostics import condition_number
from tests.conftest import HARD_KEYS, make_keys


def llama(**changes: Any) -> Any:
    sizes = {"vocab_size": 60, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 14, "initializer_range": 0.2}  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**sizes, **changes})).eval()


IDS = torch.arange(3, 53)[None]


@pytest.mark.parametrize("strength", [None, 0.3, "learned"])
def test_maps_give_the_layers_output(strength: Any) -> None:
    """``A Y`` and ``A L^-1 V`` are both what the attention function returns."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = enable(llama(), strength=strength)
    if strength == "learned":
        for layer in model.model.layers:
            layer.self_attn.lucid.strength_bias.data = torch.tensor([0.2, 0.9])
    outputs = {}
    real = ALL_ATTENTION_FUNCTIONS["lucid"]

    def record(module: Any, *args: Any, **kwargs: Any) -> Any:
        outputs[module.layer_idx] = real(module, *args, **kwargs)
        return outputs[module.layer_idx]

    ALL_ATTENTION_FUNCTIONS["lucid"] = record
    try:
        found = capture(model, IDS)
    finally:
        del ALL_ATTENTION_FUNCTIONS["lucid"]
    assert [x.layer for x in found] == [0, 1]
    for layer in found:
        for head in range(4):
            before, after = attention_maps(layer, head)
            exact = outputs[layer.layer][0][0, :, head].double()
            value = layer.value[head // 2].double()
            torch.testing.assert_close(after @ value, exact, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(before.sum(1), torch.ones(50, dtype=torch.float64))
            assert (before.triu(1) == 0).all() and (after.triu(1) == 0).all()
    assert ALL_ATTENTION_FUNCTIONS["lucid"] is real  # nothing is left behind


def test_a_softmax_model_is_looked_at_as_it_is() -> None:
    model = disable(enable(llama()))
    (layer,) = capture(model, IDS, layers=[1])
    assert layer.strength is None and layer.layer == 1
    before, after = attention_maps(layer, 0, strength=0.0)
    assert torch.equal(before, after)
    rows = diagnose(model, IDS)
    assert [(r.is_lucid, r.strength) for r in rows] == [(False, 1.0)] * 4
    eager = disable(enable(llama()), "eager")
    with pytest.raises(ValueError, match="its attention is 'eager', which cannot be watched"):
        capture(eager, IDS)


def test_sinks_softcaps_and_sliding_layers() -> None:
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "head_dim": 8,
             "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8}  # fmt: skip
    gpt = enable(AutoModelForCausalLM.from_config(GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=1)))  # fmt: skip
    found = capture(gpt.eval(), IDS)
    assert len(found) == 2 and found[0].sinks is not None
    assert (attention_maps(found[0], 0)[0].sum(1) < 1).all()
    gemma = Gemma3TextConfig(**sizes, attn_logit_softcapping=0.01, query_pre_attn_scalar=4, layer_types=["full_attention"] * 4)  # fmt: skip
    (layer,) = capture(enable(AutoModelForCausalLM.from_config(gemma)).eval(), IDS, layers=[2])
    assert layer.scale == 0.5
    capped = LayerTensors(0, layer.query, layer.key, layer.value, layer.scale, None, softcap=1e-9)
    uniform = attention_maps(capped, 0)[0]
    torch.testing.assert_close(uniform[-1], torch.full((50,), 0.02, dtype=torch.float64))


@pytest.mark.parametrize("kind", HARD_KEYS)
@pytest.mark.parametrize("scale", [None, 0.1])
def test_the_factor_is_the_operators(kind: str, scale: float | None) -> None:
    key = make_keys(kind, 2, 90, 12)
    value = torch.randn(2, 90, 5, dtype=torch.float64)
    layer = LayerTensors(0, key, key, value, 0.3, torch.tensor([0.4, 1.0]), kernel_scale=scale)
    exact = reference.precondition(
        key[None], value[None], kernel_scale=scale or 12**-0.5, strength=torch.tensor([0.4, 1.0]),
        key_mask=None, past=None,
    )[0]  # fmt: skip
    for head in (0, 1):
        solved = torch.linalg.solve_triangular(lower_factor(layer, head), value[head], upper=False)
        torch.testing.assert_close(solved, exact[head], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", HARD_KEYS)
@pytest.mark.parametrize("length", [2, 130])
def test_condition_numbers(kind: str, length: int) -> None:
    key = make_keys(kind, 1, length, 12)
    factor = lower_factor(LayerTensors(0, key, key, key, 1.0, None), 0)
    values = torch.linalg.svdvals(factor)
    exact = float(values[0] / values[-1])
    assert 0.98 * exact < condition_number(factor) <= exact * (1 + 1e-9)


def test_diagnostics_by_other_means() -> None:
    model = enable(llama(), strength=0.7)
    needle = [10, 11, 30]
    rows = diagnose(model, IDS, needle=needle)
    assert [(r.layer, r.kv_head) for r in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    layer = capture(model, IDS)[1]
    row = rows[3]
    key, value = layer.key[1].double(), layer.value[1].double()
    unit = key / key.norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    off = ~torch.eye(50, dtype=torch.bool)
    assert row.mean_key_cosine == pytest.approx(float(cosines[off].mean()), abs=1e-5)
    below = (0.7 * torch.exp(14**0.5 * (cosines - 1))).tril(-1)
    assert row.row_sum == pytest.approx(float(below.sum(1).mean()), rel=1e-4)
    exact = torch.linalg.solve(below + torch.eye(50), value)
    assert row.norm_ratio == pytest.approx(float(exact.norm() / value.norm()), rel=1e-4)
    maps = [attention_maps(layer, head) for head in (2, 3)]
    assert row.hit_rate == pytest.approx(sum(float(a[-1, needle].sum()) for a, _ in maps) / 2)
    assert row.hit_rate_preconditioned == pytest.approx(
        sum(float(b[-1, needle].sum()) for _, b in maps) / 2
    )
    assert row.sink == pytest.approx(sum(float(a[1:, 0].mean()) for a, _ in maps) / 2)
    assert 0 < row.solve_error < 1e-5
    assert all(math.isnan(r.hit_rate) for r in diagnose(model, IDS))
    softmax = diagnose(model, IDS, strength=0.0)[3]
    assert (softmax.norm_ratio, softmax.row_sum, softmax.condition) == pytest.approx((1, 0, 1))
    assert asdict(softmax)["strength"] == 0.0


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    model = enable(llama())
    with pytest.raises(ValueError, match=r"input_ids: expected one text, \(1, N\), got \(2, 5\)"):
        capture(model, torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"layers: expected full-attention layers, \[0, 1\], got 7"):  # fmt: skip
        capture(model, IDS, layers=[7])
    with pytest.raises(ValueError, match="expected at least 2 tokens, got 1"):
        diagnose(model, IDS[:, :1])
    with pytest.raises(ValueError, match=r"needle: expected positions in \[0, 50\), got \[50\]"):
        diagnose(model, IDS, needle=[50])
    monkeypatch.setattr(maps_module, "LONGEST", 20)
    with pytest.raises(ValueError, match="expected at most 20 tokens to write maps out, got 50"):
        diagnose(model, IDS)
