"""Fixed, learned and scheduled strengths, under a real Trainer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from lucid_attention.hf import StrengthSchedule, enable, strengths
from lucid_attention.hf.strength import FixedStrength, LearnedStrength

STEPS = 8


class Tokens(Dataset):
    def __len__(self) -> int:
        return 2 * STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 96, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def trainer(model, path, callbacks=(), **kwargs) -> Trainer:
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.5,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **kwargs,
    }
    arguments = TrainingArguments(output_dir=str(path), **settings)
    return Trainer(
        model,
        arguments,
        train_dataset=Tokens(),
        eval_dataset=Tokens(),
        callbacks=list(callbacks),
    )


def theta(model) -> nn.Parameter:
    return model.model.layers[0].self_attn.lucid.strength_bias


# --- learned -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "gradient", "passes"),
    [
        (0.5, 1.0, True),
        (0.5, -1.0, True),
        (0.0, -1.0, True),  # a descent step goes up, inwards
        (0.0, 1.0, False),
        (-0.2, -1.0, True),
        (-0.2, 1.0, False),
        (1.0, 1.0, True),
        (1.0, -1.0, False),
        (1.3, 1.0, True),
        (1.3, -1.0, False),
    ],
)
def test_the_gradient_is_projected(value, gradient, passes):
    module = LearnedStrength(0.0, 1)
    nn.init.constant_(module.strength_bias, value)
    strength = module()
    assert strength.item() == pytest.approx(min(max(value, 0.0), 1.0))
    (strength * gradient).sum().backward()
    assert module.strength_bias.grad.item() == (gradient if passes else 0.0)


def test_it_starts_from_the_present_strength(build):
    model = enable(build("Llama"), strength="learned")
    assert strengths(model).tolist() == [[0.0, 0.0]] * 2
    enable(model, strength=torch.tensor([0.25, 0.5]))
    enable(model, strength="learned")
    assert strengths(model).tolist() == [[0.25, 0.5]] * 2
    parameter = theta(model)
    nn.init.constant_(parameter, 0.75)
    enable(model, strength="learned")  # an optimiser may hold it already
    assert theta(model) is parameter
    enable(model, strength=strengths(model))  # frozen as it is
    assert not list(model.model.layers[0].self_attn.lucid.parameters())
    assert strengths(model).tolist() == [[0.75, 0.75], [0.25, 0.5]]


def test_the_trainer_moves_it_without_decay(build, tmp_path):
    model = enable(build("Llama"), strength="learned")
    run = trainer(model, tmp_path)
    decayed = run.get_decay_parameter_names(model)
    assert "model.layers.0.self_attn.q_proj.weight" in decayed
    assert not [name for name in decayed if "lucid" in name]
    run.create_optimizer()
    groups = [g for g in run.optimizer.param_groups if any(p is theta(model) for p in g["params"])]
    assert [group["weight_decay"] for group in groups] == [0.0]
    run.train()
    assert (strengths(model) > 0).any() and (strengths(model) <= 1).all()


def test_training_from_zero_starts_at_the_softmax_loss(build, tmp_path):
    losses = []
    for lucid in (False, True):
        model = build("Llama")
        if lucid:
            enable(model, strength="learned")
        run = trainer(model, tmp_path)
        run.train()
        losses.append(run.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_frozen_strength_in_training_is_refused(build, ids):
    model = enable(build("Llama"), strength="learned")
    theta(model).requires_grad_(False)
    model.eval()(ids)
    with torch.no_grad():
        model.train()(ids)
    with pytest.raises(ValueError, match=r"frozen.*modules_to_save"):
        model.train()(ids)


def test_the_reference_argument_places_a_fixed_strength():
    module = FixedStrength([0.5, 0.25])
    value = module(torch.zeros(1))
    assert value.dtype == torch.float32 and value.tolist() == [0.5, 0.25]
    assert module(torch.zeros(1)) is value  # made once for a device
    assert FixedStrength(1.0)() is None and FixedStrength(0.5)() == 0.5
    assert "0.5" in repr(FixedStrength(0.5)) and "kv_heads=2" in repr(LearnedStrength(0.0, 2))


def test_a_step_after_inference_mode(build, ids):
    model = enable(build("Llama"), strength=torch.tensor([0.25, 0.5]))
    with torch.inference_mode():
        model(ids)
    model.train()(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.v_proj.weight.grad.abs().max() > 0


def test_a_rounded_strength_is_refused(build, ids):
    model = enable(build("Llama"), strength="learned")
    theta(model).data = theta(model).data.bfloat16()
    with pytest.raises(ValueError, match=r"must stay float32, got torch.bfloat16.*fully_shard"):
        model(ids)


def test_a_learning_rate_of_its_own(build, tmp_path):
    """The recipe of docs/hugging-face.md: Adam moves a strength by about its rate in a step."""
    moved = {}
    for own in (False, True):
        model = enable(build("Llama"), strength=torch.tensor([0.5, 0.5]))
        model = enable(model, strength="learned")
        run = trainer(model, tmp_path, learning_rate=2e-5, weight_decay=0.0)
        if own:
            strength = [p for name, p in model.named_parameters() if ".lucid." in name]
            others = [p for name, p in model.named_parameters() if ".lucid." not in name]
            groups = [{"params": others}, {"params": strength, "lr": 1e-2}]
            run.optimizer = torch.optim.AdamW(groups, lr=2e-5, weight_decay=0.0)
        run.train()
        moved[own] = (strengths(model) - 0.5).abs().max().item()
    assert 0 < moved[False] <= 1.1 * STEPS * 2e-5
    assert 0.01 <= moved[True] <= 1.1 * STEPS * 1e-2


# --- scheduled ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"steps": 4}, [0, 0.25, 0.5, 0.75, 1, 1]),
        ({"steps": 0.5}, [0, 0.25, 0.5, 0.75, 1, 1]),
        ({"start": 0.2, "end": 0.6, "steps": 2}, [0.2, 0.4, 0.6, 0.6, 0.6, 0.6]),
        ({"steps": 2, "shape": "cosine"}, [0, 0.5, 1, 1, 1, 1]),
        (
            {"steps": 1.0, "shape": "cosine"},
            [(1 - math.cos(math.pi * t / 8)) / 2 for t in range(6)],
        ),
    ],
)
def test_values_of_a_schedule(arguments, expected):
    schedule = StrengthSchedule(**arguments)
    assert [schedule.value(t, max_steps=8) for t in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"start": -0.1}, ValueError, "start: expected a strength in"),
        ({"end": 1.5}, ValueError, "end: expected a strength in"),
        ({"end": float("nan")}, ValueError, "end: expected a strength in"),
        ({"start": "0"}, TypeError, "start: expected a number, got str"),
        ({"steps": 0}, ValueError, "steps: expected an int >= 1"),
        ({"steps": 1.5}, ValueError, "steps: expected an int >= 1"),
        ({"steps": "9"}, TypeError, "steps: expected an int or a float"),
        ({"shape": "step"}, ValueError, 'shape: expected "linear" or "cosine"'),
    ],
)
def test_bad_schedules(arguments, error, message):
    with pytest.raises(error, match=message):
        StrengthSchedule(**arguments)


def test_the_trainer_packs_documents(build, tmp_path):
    """With transformers' flattening collator, whose batches may not be cached."""
    model = enable(build("Llama"), strength=0.0)
    run = trainer(model, tmp_path, [StrengthSchedule(steps=2)], max_steps=2)
    run.data_collator = DataCollatorWithFlattening()
    run.train()
    batch = run.data_collator([Tokens()[0], Tokens()[1]])
    apart = [model(Tokens()[i]["input_ids"][None], use_cache=False).logits for i in (0, 1)]
    packed = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("strength", [None, "learned"])
def test_a_schedule_needs_fixed_strengths(strength, build, tmp_path):
    model = build("Llama") if strength is None else enable(build("Llama"), strength=strength)
    with pytest.raises(ValueError, match=r"StrengthSchedule: expected.*enable\(model, strength"):
        trainer(model, tmp_path, [StrengthSchedule()]).train()


def test_a_checkpoint_and_a_resumed_run_continue_the_schedule(build, ids, tmp_path):
    def start(path, **kwargs):
        model = enable(build("Gemma2"), strength=0.0)
        schedule = StrengthSchedule(steps=6, shape="cosine")
        return model, trainer(
            model, path, [schedule], save_strategy="steps", save_steps=4, **kwargs
        )

    whole, run = start(tmp_path / "whole")
    run.train()
    assert whole.config.lucid["strength"] == 1.0 and strengths(whole).unique().tolist() == [1.0]

    checkpoint = tmp_path / "whole" / "checkpoint-4"
    half = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    expected = StrengthSchedule(steps=6, shape="cosine").value(4, STEPS)
    assert half.config.lucid == {"layers": [1, 3], "strength": expected} and 0 < expected < 1
    assert torch.equal(strengths(half), torch.full((2, 2), expected))
    live = enable(build("Gemma2"), strength=expected)
    live.load_state_dict(half.state_dict())
    assert torch.equal(half(ids).logits, live(ids).logits)

    resumed, again = start(tmp_path / "resumed")
    again.train(resume_from_checkpoint=str(checkpoint))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    rest = [entry["loss"] for entry in again.state.log_history[4:] if "loss" in entry]
    assert rest == [e["loss"] for e in run.state.log_history[4:] if "loss" in e] and len(rest) == 4


def test_a_learned_run_resumes_exactly(build, tmp_path):
    def start(path):
        model = enable(build("Llama"), strength="learned")
        return model, trainer(model, path, save_strategy="steps", save_steps=4)

    whole, run = start(tmp_path / "whole")
    run.train()
    resumed, again = start(tmp_path / "resumed")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert torch.equal(strengths(whole), strengths(resumed))
    last = AutoModelForCausalLM.from_pretrained(get_last_checkpoint(str(tmp_path / "whole")))
    assert torch.equal(strengths(last), strengths(whole))


def test_the_best_checkpoint_comes_back_with_its_strength(build, tmp_path):
    """A step so large that training only makes the model worse: the best checkpoint is the first."""
    model = enable(build("Llama"), strength=0.0)
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    arguments |= {"save_steps": 1, "load_best_model_at_end": True, "learning_rate": 1.0}
    run = trainer(model, tmp_path, [StrengthSchedule(steps=4)], max_steps=4, **arguments)
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    assert model.config.lucid["strength"] == 0.25 and strengths(model).unique().tolist() == [0.25]
    best = AutoModelForCausalLM.from_pretrained(run.state.best_model_checkpoint)
    assert best.config.lucid == model.config.lucid
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-5)


def test_the_best_strength_without_a_config_beside_the_weights(build, tmp_path):
    """PEFT saves adapters only; then the schedule says what the strength was."""
    model = enable(build("Llama"), strength=1.0)
    state = TrainerState(max_steps=8, best_global_step=2, best_model_checkpoint=str(tmp_path))
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments.load_best_model_at_end = True
    StrengthSchedule(steps=4).on_train_end(arguments, state, TrainerControl(), model=model)
    assert strengths(model).unique().tolist() == [0.5]


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_label_smoothing_shifts_the_labels(family, build, ids, tmp_path):
    """The Trainer goes by the name of the model's class."""
    losses = []
    for lucid in (False, True):
        model = enable(build(family), strength=0.0) if lucid else build(family)
        run = trainer(model, tmp_path, label_smoothing_factor=0.1)
        losses.append(run.compute_loss(model, {"input_ids": ids, "labels": ids}).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# --- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strength", "error", "message"),
    [
        (1.5, ValueError, r"strength: expected values in \[0, 1\]"),
        (float("nan"), ValueError, r"strength: expected values in \[0, 1\]"),
        (torch.tensor([0.5, -0.1]), ValueError, r"strength: expected values in \[0, 1\]"),
        (torch.ones(3), ValueError, r"got shape \(3,\)"),
        ("strong", ValueError, "got 'strong'"),
        (True, TypeError, "got bool"),
        ({}, TypeError, "got dict"),
        (torch.ones(2, dtype=torch.complex64), TypeError, "complex64"),
    ],
)
def test_bad_strengths(strength, error, message, build):
    model = build("Llama")
    with pytest.raises(error, match=message):
        enable(model, strength=strength)
    assert type(model).__name__ == "LlamaForCausalLM"  # refused before anything was changed


def test_strengths_of_a_softmax_model(build):
    with pytest.raises(ValueError, match=r"expected a LUCID model"):
        strengths(build("Llama"))
