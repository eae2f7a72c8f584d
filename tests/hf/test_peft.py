"""LoRA models: enabled before or after wrapping, trained, saved, merged."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lucid_attention.hf import disable, enable, strengths
from lucid_attention.hf.strength import LearnedStrength

peft = pytest.importorskip("peft")


def lora(model, **kwargs):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **kwargs)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped


def test_enabling_a_wrapped_model(build, ids):
    before, after = lora(enable(build("Llama"))), enable(lora(build("Llama")))
    assert isinstance(after, peft.PeftModel)
    assert after.config is after.get_base_model().config is after.get_base_model().model.config
    assert after.config.lucid == before.config.lucid
    assert torch.equal(after(ids).logits, before(ids).logits)
    assert (after(ids).logits - disable(before)(ids).logits).abs().max() > 0.05

    after.train()(ids, labels=ids).loss.backward()
    trained = [name for name, p in after.named_parameters() if p.grad is not None]
    assert trained and all("lora_" in name for name in trained)
    after.eval()
    expected = after.generate(input_ids=ids, max_new_tokens=8, use_cache=False)
    assert torch.equal(after.generate(input_ids=ids, max_new_tokens=8), expected)
    assert torch.equal(after.merge_and_unload().generate(ids, max_new_tokens=8), expected)


def test_learned_strengths_train_and_are_saved_with_the_adapter(build, ids, tmp_path):
    base = enable(build("Llama"), strength="learned")
    model = lora(copy.deepcopy(base), modules_to_save=["lucid"]).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()
    assert (strengths(model) > 0).any()
    enable(model, strength="learned", kernel_scale=0.2, precision="high")
    with model.disable_adapter():
        assert torch.equal(strengths(model), strengths(base))
    assert not torch.equal(strengths(model), strengths(base))
    with model.disable_adapter():  # the copy that is in use then is told as well
        modules = [m for m in model.modules() if isinstance(m, LearnedStrength)]
    assert len(modules) == 4
    assert {(m.kernel_scale, m.precision) for m in modules} == {(0.2, "high")}
    assert enable(model, strength="learned") is model  # allowed: they are trained
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(strengths(loaded), strengths(model))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_learned_strengths_that_would_be_lost_are_refused(build, ids):
    with pytest.raises(ValueError, match=r"neither train nor save.*modules_to_save=\['lucid'\]"):
        enable(lora(build("Llama")), strength="learned")
    with pytest.raises(ValueError, match=r"neither train nor save.*modules_to_save=\['lucid'\]"):
        enable(lora(enable(build("Llama"))).get_base_model(), strength="learned")
    model = lora(enable(build("Llama"), strength="learned")).train()
    with pytest.raises(ValueError, match=r"frozen.*modules_to_save=\['lucid'\]"):
        model(ids)


def test_a_fixed_strength_of_a_wrapped_model_can_change(build, ids):
    model = lora(enable(build("Llama"), strength=0.0))
    softmax = model(ids).logits
    enable(model, strength=0.5)
    assert strengths(model).unique().tolist() == [0.5]
    assert (model(ids).logits - softmax).abs().max() > 0.01


def test_a_disabled_adapter_in_training(build, ids):
    """A reference pass in the middle of training (DPO): the original strength is frozen, but the
    adapter's copy is the one that is trained.
    """
    model = lora(enable(build("Llama"), strength="learned"), modules_to_save=["lucid"]).train()
    with model.disable_adapter():
        reference = model(ids).logits
    expected = enable(build("Llama"), strength=0.0)(ids).logits
    torch.testing.assert_close(reference, expected, rtol=1e-5, atol=1e-5)
    model(ids, labels=ids).loss.backward()


def test_an_adapter_comes_back_on_a_base_saved_as_lucid(build, ids, tmp_path):
    """The recipe of docs/hugging-face.md."""
    enable(build("Llama"), strength=0.75).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = lora(base, task_type="CAUSAL_LM").eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert strengths(loaded).unique().tolist() == [0.75]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_enabling_a_wrapped_softmax_model_warns_that_adapters_do_not_say_so(build, recwarn):
    enable(lora(enable(build("Llama"))))
    assert not [w for w in recwarn if "adapter" in str(w.message)]
    with pytest.warns(UserWarning, match=r"adapter alone does not save.*get_peft_model"):
        enable(lora(build("Llama")))


def test_peft_knows_no_target_modules_of_lucid_model_types(build):
    """Why docs/hugging-face.md names them."""
    with pytest.raises(ValueError, match=r"target_modules"):
        peft.get_peft_model(enable(build("Llama")), peft.LoraConfig(r=4))
