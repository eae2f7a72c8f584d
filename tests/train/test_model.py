"""The models of a training: sizes, weights, attention, what they cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from lucid_attention.hf import disable, enable, strengths
from lucid_attention.train.configuration import TrainConfig, TrainError, load_config
from lucid_attention.train.cost import flops_per_token, parameters, peak_flops
from lucid_attention.train.model import build_model, use_fused_layers, use_fused_loss
from lucid_attention.train.text import train_tokenizer
from lucid_attention.train.tokens import Rows, Tokens
from tests.conftest import Asked

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {"text": "x", "layers": 2, "width": 48, "heads": 4, "kv_heads": 2, "head_dim": 18, "length": 64}  # fmt: skip


def small(**settings: object) -> TrainConfig:
    return TrainConfig(**{**SMALL, **settings})


def test_the_papers_model_has_the_papers_size() -> None:
    config, _ = load_config(RECIPES / "paper-1b.yaml")
    model = build_model(config, config.vocabulary, seed=0, device="meta")
    assert parameters(model)["total"] == 1_113_024_512
    assert model.config.head_dim == 68 and len(model.config.lucid["layers"]) == 22


def test_attentions_begin_from_the_same_weights() -> None:
    models = [build_model(small(attention=a), 50, seed=3) for a in ("lucid", "softmax")]
    for a, b in zip(*(m.state_dict().values() for m in models), strict=True):
        assert torch.equal(a, b)
    assert (strengths(models[0]) == 1).all() and (strengths(models[1]) == 0).all()
    other = build_model(small(), 50, seed=4)
    assert not torch.equal(other.lm_head.weight, models[0].lm_head.weight)


@pytest.mark.parametrize("position", ["rope", "nope"])
def test_softmax_is_softmax(position: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows: the same losses and gradients as the stock model, document by document; nothing is solved."""
    from lucid_attention.hf import attention

    model = build_model(small(attention="softmax", position=position), 50, seed=1)
    twin = disable(build_model(small(position=position), 50, seed=1))
    tokens = Tokens(torch.randint(50, (128,)).numpy().astype("uint16"), torch.tensor([0, 20, 21, 90]).numpy())  # fmt: skip
    row = {name: x[None] for name, x in Rows(tokens, 128, document_masks=True)[0].items()}

    def solved(*_: object, **__: object) -> None:
        raise AssertionError("softmax attention solves nothing")

    monkeypatch.setattr(attention, "precondition_varlen", solved)
    monkeypatch.setattr(attention, "precondition", solved)
    loss = model(**row, use_cache=False).loss
    model(input_ids=row["input_ids"], use_cache=False)
    monkeypatch.undo()
    total, count = torch.zeros(()), 0
    for start, end in ((0, 20), (20, 21), (21, 90), (90, 128)):
        if end - start < 2:
            continue
        ids = row["input_ids"][:, start:end]
        total = total + twin(input_ids=ids, labels=ids).loss * (end - start - 1)
        count += end - start - 1
    torch.testing.assert_close(loss, total / count)
    loss.backward()
    (total / count).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_without_positions_there_are_none() -> None:
    """One layer without position encoding: the last token's logits do not depend on the order of those before it."""
    ids = torch.randint(50, (1, 20))
    mixed = torch.cat((ids[:, :19].flip(1), ids[:, 19:]), dim=1)
    differ = {}
    for position in ("rope", "nope"):
        model = build_model(
            small(attention="softmax", position=position, layers=1), 50, seed=1
        ).eval()
        logits = [model(input_ids=x).logits[0, -1] for x in (ids, mixed)]
        differ[position] = not torch.allclose(*logits, atol=1e-6)
    assert differ == {"rope": True, "nope": False}


def test_strengths() -> None:
    assert (strengths(build_model(small(strength=0.25), 50, seed=0)) == 0.25).all()
    learned = build_model(small(strength="learned", lucid_layers=(1,)), 50, seed=0)
    assert learned.config.lucid == {"layers": [1], "strength": "learned"}
    assert (strengths(build_model(small(strength_steps=10), 50, seed=0)) == 0).all()


def test_kernel_scales(tmp_path: Path) -> None:
    """A LUCID checkpoint keeps its own, unless another is asked for."""
    model = build_model(small(kernel_scale=0.2), 50, seed=5)
    assert model.config.lucid["kernel_scale"] == 0.2
    model.save_pretrained(tmp_path)
    for asked, expected in ((None, 0.2), (0.5, 0.5)):
        config = TrainConfig(text="x", init_from=str(tmp_path), kernel_scale=asked)
        assert build_model(config, 50, seed=0).config.lucid["kernel_scale"] == expected


def test_solve_precision() -> None:
    """Forward and backward; it is the training's, not the checkpoint's."""
    for precision in ("default", "high"):
        model = build_model(small(solve_precision=precision), 50, seed=0)
        with Asked() as asked:
            loss = model(input_ids=torch.arange(20)[None], labels=torch.arange(20)[None]).loss
            loss.backward()
        assert asked.precisions.keys() >= {"precondition", "precondition_backward"}
        assert all(given == {precision} for given in asked.precisions.values())
        assert "precision" not in model.config.lucid


def test_from_a_checkpoint(tmp_path: Path) -> None:
    stock = disable(build_model(small(), 50, seed=5))
    stock.save_pretrained(tmp_path / "stock")
    enable(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")).save_pretrained(tmp_path / "lucid")  # fmt: skip
    for source in ("stock", "lucid"):
        for attention in ("lucid", "softmax"):
            config = TrainConfig(
                text="x", init_from=str(tmp_path / source), attention=attention, length=128,
                rope_theta=64000.0,
            )  # fmt: skip
            model = build_model(config, 50, seed=0)
            assert torch.equal(model.lm_head.weight, stock.lm_head.weight)
            assert (strengths(model) == (1 if attention == "lucid" else 0)).all()
            assert model.config.max_position_embeddings == 128
            assert model.config.rope_parameters["rope_theta"] == 64000.0
            frequency = model.model.rotary_emb.inv_freq[1]
            torch.testing.assert_close(frequency, torch.tensor(64000.0 ** (-2 / 18)))
    config = TrainConfig(text="x", init_from=str(tmp_path / "stock"))
    with pytest.raises(TrainError, match=r"tokenizer: has 51 tokens and the checkpoint .* only 50"):
        build_model(config, 51, seed=0)
    with pytest.raises(TrainError, match=r"init_from .*: cannot be loaded"):
        build_model(TrainConfig(text="x", init_from=str(tmp_path / "none")), 50, seed=0)


def test_fused_loss_is_refused_where_it_cannot_be_had() -> None:
    model = build_model(small(), 50, seed=0)
    cpu = torch.device("cpu")
    assert use_fused_loss(model, "none", cpu) == use_fused_loss(model, "auto", cpu) == "none"
    with pytest.raises(TrainError, match=r"fused_loss: liger-kernel.*; take fused_loss: none"):
        use_fused_loss(model, "liger", cpu)
    assert use_fused_layers(model, "none", cpu) == use_fused_layers(model, "auto", cpu) == "none"
    with pytest.raises(TrainError, match=r"fused_layers: liger-kernel.*; take fused_layers: none"):
        use_fused_layers(model, "liger", cpu)


@pytest.mark.parametrize("position", ["rope", "nope"])
def test_fused_layers_are_one_models(position: str) -> None:
    """A model made later has its family's own, and runs; an activation that liger-kernel's MLP does not have is left alone."""
    config = replace(small(), position=position)
    stock = repr(build_model(config, 50, seed=0))
    ours: Any = build_model(config, 50, seed=0)
    assert use_fused_layers(ours, "liger", torch.device("cuda")) == "liger"  # nothing is run
    assert "LigerRMSNorm" in repr(ours.model.norm)
    assert "Liger" in ours.model.layers[0].mlp.forward.__qualname__
    theirs: Any = build_model(config, 50, seed=0)
    assert repr(theirs) == stock and "Liger" not in stock
    assert "Liger" not in theirs.model.layers[0].mlp.forward.__qualname__
    assert torch.isfinite(theirs(input_ids=torch.arange(20)[None]).logits).all()
    theirs.config.hidden_act = "gelu"
    use_fused_layers(theirs, "liger", torch.device("cuda"))
    assert "LigerRMSNorm" in repr(theirs.model.norm)
    assert "Liger" not in theirs.model.layers[0].mlp.forward.__qualname__


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_torch_counts(tied: bool) -> None:
    """Matrix products by PyTorch's counter; attention, which it counts in full, by the formula."""
    config = small(attention="softmax", tie_embeddings=tied, length=64)
    model = build_model(config, 50, seed=0)
    stock = disable(model, "eager")
    ids = torch.randint(50, (1, 64))
    with FlopCounterMode(display=False) as counter:
        stock(input_ids=ids, labels=ids).loss.backward()
    heads, layers = config.size()["heads"], 2
    # QK^T and PV, not causal, forward and twice that backward; the angles of RoPE, which are a product of matrices in transformers
    # 5.17 and not in 5.23.
    attention = layers * heads * 2 * 3 * (2 * 64 * 64 * 18)
    angles = 2 * 64 * 9
    weights = sum(p.numel() for n, p in stock.named_parameters() if p.dim() == 2 and "embed" not in n)  # fmt: skip
    weights += stock.lm_head.weight.numel() if tied else 0
    assert counter.get_total_flops() - (6 * 64 * weights + attention) in (0, angles)
    norms = sum(p.numel() for p in stock.parameters() if p.dim() == 1)
    found = flops_per_token(enable(stock), 64)
    assert found["matmul"] == 6 * (weights + norms)
    assert found["attention"] == 7 * 64 * 18 * heads * 2
    assert found["solve"] == 7 * 64 * 18 * 2 * 2
    rising = build_model(small(strength_steps=5), 50, seed=0)
    assert flops_per_token(rising, 64)["solve"] == 0
    assert flops_per_token(rising, 64, is_lucid=True)["solve"] == found["solve"]
    assert peak_flops(torch.device("cpu")) is None


def test_a_tokenizer_names_the_end(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a b c"], 300)
    model = build_model(small(), len(tokenizer), seed=0, tokenizer=tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
