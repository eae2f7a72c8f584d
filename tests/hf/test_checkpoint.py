"""Checkpoints say that they are LUCID: they come back as they were, or fail loudly."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lucid_attention.hf import checkpoint, enable, strengths


def fresh_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment
    )


def same_after_reload(model, ids, path, loader=AutoModelForCausalLM):
    model.save_pretrained(path)
    loaded = loader.from_pretrained(path).eval()
    assert type(loaded) is type(model) and type(loaded.config) is type(model.config)
    assert loaded.config.lucid == model.config.lucid
    assert torch.equal(strengths(loaded), strengths(model))
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], model(ids)[0])
    return loaded


def test_round_trip_of_every_family(family, build, ids, tmp_path):
    model = enable(build(family), strength=0.625)
    same_after_reload(model, ids, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["attn_implementation"] == "lucid"
    assert written["model_type"] == f"lucid_{type(model).lucid_stock_class.config_class.model_type}"
    assert written["lucid"] == model.config.lucid
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, type(model.base_model)) and base.config.lucid == model.config.lucid


@pytest.mark.parametrize(
    "strength",
    [None, 0.0, 1 / 3, torch.tensor([0.1, 0.7]), torch.tensor([[0.1, 0.2]]), "learned"],
    ids=["LUCID", "zero", "a third", "per head", "per layer and head", "learned"],
)
def test_layers_and_strengths_come_back(strength, build, ids, tmp_path):
    model = enable(build("Llama"), layers=[1], strength=strength)
    if isinstance(strength, str):
        nn.init.constant_(model.model.layers[1].self_attn.lucid.strength_bias, 0.3)
        assert strengths(model).tolist() == [[pytest.approx(0.3)] * 2]
    loaded = same_after_reload(model, ids, tmp_path)
    assert not hasattr(loaded.model.layers[0].self_attn, "lucid")


@pytest.mark.parametrize("strength", [None, "learned"])
def test_a_kernel_scale_comes_back(strength, build, ids, tmp_path):
    model = enable(build("Llama"), layers=[1], strength=strength, kernel_scale=0.1)
    if strength:
        nn.init.constant_(model.model.layers[1].self_attn.lucid.strength_bias, 0.7)
    loaded = same_after_reload(model, ids, tmp_path)
    assert loaded.config.lucid["kernel_scale"] == 0.1
    before = loaded(ids).logits
    assert (enable(loaded, layers=[1], strength=strength)(ids).logits - before).abs().max() > 1e-3


def test_a_fixed_strength_is_not_rounded_by_a_cast(build, ids, tmp_path):
    model = enable(build("Llama"), strength=0.123456789).bfloat16()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16 and loaded.config.lucid["strength"] == 0.123456789
    same_after_reload(loaded.eval(), ids, tmp_path)


def test_a_learned_strength_stays_fp32(build, ids, tmp_path):
    value = 1.0 - 2.0**-12  # bf16 would round it to 1
    model = enable(build("Llama"), strength="learned")
    for layer in model.model.layers:
        nn.init.constant_(layer.self_attn.lucid.strength_bias, value)
    for cast in (model.bfloat16, lambda: model.to(torch.float16), model.half, model.bfloat16):
        cast()
        assert strengths(model).unique().tolist() == [value]
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, "auto"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        theta = loaded.model.layers[0].self_attn.lucid.strength_bias
        assert loaded.lm_head.weight.dtype == torch.bfloat16 and theta.dtype == torch.float32
        assert strengths(loaded).unique().tolist() == [value]
        same_after_reload(loaded.eval(), ids, tmp_path)


def test_other_heads_come_back(build, tmp_path, ids):
    model = enable(transformers.Qwen3ForSequenceClassification(build("Qwen3").config).eval())
    same_after_reload(model, ids, tmp_path, transformers.AutoModelForSequenceClassification)
    model = enable(transformers.LlamaForQuestionAnswering(build("Llama").config).eval())
    assert isinstance(model.transformer, checkpoint.LucidModelMixin)  # another name for its decoder
    same_after_reload(model, ids, tmp_path / "qa", transformers.AutoModelForQuestionAnswering)


def test_attn_implementation_lucid_by_itself(build, ids, tmp_path):
    stock = build("Llama")
    expected = enable(build("Llama"))(ids).logits
    fresh = AutoModelForCausalLM.from_config(stock.config, attn_implementation="lucid")
    assert type(fresh).__name__ == "LucidLlamaForCausalLM"
    stock.save_pretrained(tmp_path / "stock")
    for loader in (AutoModelForCausalLM, LlamaForCausalLM):
        model = loader.from_pretrained(tmp_path / "stock", attn_implementation="lucid").eval()
        assert model.config.lucid == {"layers": [0, 1], "strength": 1.0}
        assert torch.equal(model(ids).logits, expected)  # the first forward pass, cache included
        # Saved before any forward pass, the marker is there as well.
        again = loader.from_pretrained(tmp_path / "stock", attn_implementation="lucid")
        same_after_reload(again, ids, tmp_path / loader.__name__)


def test_a_softmax_checkpoint_can_start_with_learned_strengths(build, ids, tmp_path):
    stock = build("Llama")
    stock.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.lucid = {"layers": [1], "strength": "learned"}
    model = LlamaForCausalLM.from_pretrained(
        tmp_path, config=config, attn_implementation="lucid", dtype=torch.bfloat16
    )
    assert strengths(model).tolist() == [[0.0, 0.0]]
    assert model.model.layers[1].self_attn.lucid.strength_bias.dtype == torch.float32


def test_a_lucid_config_by_itself(ids):
    config = checkpoint.LucidLlamaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(config)
    assert model.config.lucid["layers"] == [0] and config._attn_implementation == "lucid"
    assert isinstance(pickle.loads(pickle.dumps(config)), LlamaConfig)


def test_a_lucid_model_refuses_other_attention(build, tmp_path):
    model = enable(build("Llama"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'expected "lucid".*disable'):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    with pytest.raises(ValueError, match=r'expected "lucid".*disable'):
        model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r'expected "lucid".*disable'):
        model.config._attn_implementation = "sdpa"
    assert model.config._attn_implementation == "lucid"


@pytest.mark.parametrize(
    ("family", "loader"),
    [
        ("Llama", "AutoModelForCausalLM"),
        ("Llama", "LlamaForCausalLM"),
        ("Llama", "LlamaModel"),
        ("Granite", "AutoModelForCausalLM"),
        ("Granite", "GraniteForCausalLM"),
    ],
)
def test_no_class_loads_a_lucid_checkpoint_as_softmax(family, loader, build, tmp_path):
    (granite() if family == "Granite" else enable(build("Llama"))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'expected "lucid" for a LUCID model, got \'sdpa\''):
        getattr(transformers, loader).from_pretrained(tmp_path, attn_implementation="sdpa")


def test_saving_the_model_around_an_enabled_decoder(build, ids, tmp_path):
    """`enable(model.model)` sees the decoder only; the checkpoint says LUCID all the same."""
    config = build("Llama").config
    model, twin = build("Llama"), LlamaForCausalLM(config)
    enable(model.model, layers=[1], strength=0.25)
    logits = model(ids).logits
    assert torch.equal(enable(build("Llama"), layers=[1], strength=0.25)(ids).logits, logits)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, logits)
    assert loaded.config.lucid == {"layers": [1], "strength": 0.25}
    twin.save_pretrained(tmp_path / "twin")
    assert "lucid" not in (tmp_path / "twin" / "config.json").read_text()


class Reader(transformers.PreTrainedModel):
    """A user's own model with a decoder inside, which is not its base model."""

    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.reader = transformers.LlamaModel(config)
        self.post_init()


def test_saving_a_model_that_hides_a_lucid_one_is_refused(build, tmp_path):
    model = Reader(build("Llama").config)
    enable(model.reader)
    with pytest.raises(ValueError, match=r"model: Reader contains a LUCID model.*by itself"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_config_is_not_shared_between_lucid_models(build):
    first = enable(build("Llama"), strength=0.75)
    for make in (type(first), AutoModelForCausalLM.from_config):
        second = make(first.config)
        assert second.config == first.config and second.config is not first.config
        assert second.config is second.model.config is second.model.layers[0].self_attn.config
        enable(second, layers=[1], strength=0.25)
        assert first.config.lucid == {"layers": [0, 1], "strength": 0.75}
        assert strengths(first).unique().tolist() == [0.75]


def test_an_untested_family_from_its_lucid_config():
    model = granite()
    again = AutoModelForCausalLM.from_config(model.config)
    assert type(again) is type(model) and again.config.lucid == model.config.lucid


def test_a_lucid_setting_of_another_form():
    config = LlamaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1)
    config.lucid = True
    with pytest.raises(TypeError, match=r"config.lucid: expected .*layers.*got True"):
        AutoModelForCausalLM.from_config(config, attn_implementation="lucid")


def test_attention_weights_are_refused_on_load(build, tmp_path):
    enable(build("Llama")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"output_attentions: .*never formed.*disable"):
        AutoModelForCausalLM.from_pretrained(tmp_path, output_attentions=True)


def test_strengths_without_values(build):
    config = enable(build("Llama"), strength="learned").config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"model: .*meta device"):
        strengths(model)
    config.lucid["strength"] = 0.25
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert strengths(model).tolist() == [[0.25, 0.25]] * 2


STOCK = """
import sys, transformers
for argument in sys.argv[1:]:
    loader, path = argument.split("=", 1)
    try:
        getattr(transformers, loader).from_pretrained(path)
        print("LOADED", argument)
    except ValueError as error:
        print("lucid" in str(error), loader)
"""


def test_a_process_without_the_package_fails_loudly(build, tmp_path):
    enable(build("Llama")).save_pretrained(tmp_path / "llama")
    granite().save_pretrained(tmp_path / "granite")
    result = fresh_process(
        STOCK,
        f"AutoModelForCausalLM={tmp_path}/llama",
        f"LlamaForCausalLM={tmp_path}/llama",
        f"AutoConfig={tmp_path}/llama",
        f"AutoModelForCausalLM={tmp_path}/granite",
    )
    assert result.stdout.splitlines() == [
        "True AutoModelForCausalLM",
        "True LlamaForCausalLM",
        "True AutoConfig",
        "True AutoModelForCausalLM",
    ], result.stderr


def granite():
    """A LUCID model of a family that is not in the table of tested ones."""
    config = transformers.GraniteConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = enable(transformers.GraniteForCausalLM(config), layers=[1], strength="learned")
    nn.init.constant_(model.model.layers[1].self_attn.lucid.strength_bias, 0.5)
    return model.eval()


RELOAD = """
import sys, torch, lucid_attention.hf
from transformers import AutoModelForCausalLM
path = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(path).eval()
ids, logits = torch.load(path + "/expected.pt")
assert "Lucid" in type(model).__name__, type(model)
assert torch.equal(model(ids).logits, logits)
assert type(torch.load(path + "/model.pt", weights_only=False)) is type(model)
sys.path.insert(0, path)
mine = torch.load(path + "/mine.pt", weights_only=False)
import users_module
assert type(mine).__name__ == "LucidMine" and isinstance(mine, users_module.Mine)
assert mine.config.lucid == {"layers": [1], "strength": 0.5}
print("SAME")
"""


def test_an_untested_family_and_a_user_class_come_back_in_a_fresh_process(
    build, ids, tmp_path, monkeypatch
):
    with pytest.warns(UserWarning, match=r"not tested with GraniteForCausalLM"):
        model = granite()
    model.save_pretrained(tmp_path)
    torch.save((ids, model(ids).logits.detach()), tmp_path / "expected.pt")
    torch.save(model, tmp_path / "model.pt")
    (tmp_path / "users_module.py").write_text(
        "import transformers\nclass Mine(transformers.LlamaForCausalLM):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    users_module = importlib.import_module("users_module")
    mine = enable(users_module.Mine(build("Llama").config), layers=[1], strength=0.5)
    torch.save(mine, tmp_path / "mine.pt")
    result = fresh_process(RELOAD, str(tmp_path))
    assert "SAME" in result.stdout, result.stderr


def test_a_tokenizer_loads_from_the_checkpoint(build, tmp_path):
    from tokenizers import Tokenizer, models

    words = {"<unk>": 0, "a": 1, "b": 2}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    enable(build("Llama")).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("b")["input_ids"] == tokenizer("b")["input_ids"] == [2]


def test_unknown_names_of_the_checkpoint_module():
    with pytest.raises(AttributeError, match=r"LucidNothing"):
        checkpoint.LucidNothing  # noqa: B018
