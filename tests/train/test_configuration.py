"""Configuration files: what they give, and that every mistake in one is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import SchedulerType

from lucid_attention.train.configuration import (
    TrainConfig,
    TrainError,
    as_yaml,
    load_config,
    split,
    training_arguments,
)

RECIPES = Path(__file__).parents[2] / "recipes"


def test_sizes_follow_from_the_dial() -> None:
    assert TrainConfig(text="x", layers=12).size() == {
        "layers": 12, "width": 768, "head_dim": 64, "heads": 12, "kv_heads": 12, "mlp_width": 2048,
    }  # fmt: skip
    paper = TrainConfig(text="x", layers=22, width=2048, heads=32, kv_heads=4, head_dim=68, mlp_width=5632)  # fmt: skip
    assert paper.size()["head_dim"] == 68 and paper.size()["kv_heads"] == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "linear"}, "attention: expected one of lucid, softmax, got 'linear'"),
        ({"position": "alibi"}, "position: expected one of rope, nope"),
        ({"fused_loss": "yes"}, "fused_loss: expected one of"),
        ({"fused_layers": "yes"}, "fused_layers: expected one of"),
        ({"layers": 0}, "layers: expected a whole number, at least 1, got 0"),
        ({"layers": 2.5}, "layers: expected a whole number"),
        ({"width": "wide"}, "width: expected a whole number"),
        ({"heads": True}, "heads: expected a whole number"),
        ({"width": 100}, "heads: width 100 is no multiple of head_dim 64; give heads"),
        ({"heads": 8, "kv_heads": 3}, "kv_heads: 8 query heads are no multiple of 3"),
        ({"head_dim": 17, "heads": 2}, "head_dim: rope needs an even one, got 17"),
        ({"strength": 1.5}, r"strength: expected a number in \[0, 1\], got 1.5"),
        ({"strength": "big"}, "strength: expected a number"),
        ({"strength": "learned", "strength_steps": 5}, "strength_steps: a learned strength"),
        ({"strength_steps": -1}, "strength_steps: expected 0 or more"),
        ({"strength_steps": 1.5}, "strength_steps: expected a whole number"),
        ({"attention": "softmax", "strength": 0.5}, "strength: softmax attention has none"),
        ({"attention": "softmax", "kernel_scale": 0.5}, "kernel_scale: softmax attention has none"),
        ({"solve_precision": "highest"}, "solve_precision: expected one of default, high, got 'highest'"),
        ({"attention": "softmax", "solve_precision": "high"}, "solve_precision: softmax attention has none"),
        ({"kernel_scale": 0}, "kernel_scale: expected a number above 0, got 0"),
        ({"kernel_scale": "wide"}, "kernel_scale: expected a number above 0, got 'wide'"),
        ({"lucid_layers": (9,)}, "lucid_layers: expected indices below 8, got 9"),
        ({"position": "nope", "rope_theta": 1e4}, "rope_theta: position is nope"),
        ({"task": "memory"}, "text, dataset, task, tokens_of: expected exactly one of them, got text and task"),
        ({"text": None}, "expected exactly one of them, got none"),
        ({"text": None, "task": "chess"}, "task: expected one of memory, needles, got 'chess'"),
        ({"task_options": {"keys": 3}}, "task_options: there is no task"),
        ({"text": None, "task": "needles"}, "tokenizer: the task needles has no text"),
        ({"text": None, "task": "memory", "vocabulary": 5}, "vocabulary: a task brings its own"),
        ({"validation_share": 1.0}, "validation_share: expected a number"),
        ({"length": 1}, "length: expected at least 2"),
        ({"text": 5}, "text: expected a text, got 5"),
        ({"init_from": "x", "layers": 4}, "layers: the checkpoint of init_from says how large"),
    ],
)  # fmt: skip
def test_bad_values(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        TrainConfig(**{"text": "x", **settings})


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "text: a.txt\nlayers: 4\nlearning_rate: 3e-4\nlucid_layers: [1, 2]\nmax_steps: 7\n"
    )
    config, arguments = load_config(path, ["attention=lucid", "layers=6", "max_steps=9"])
    assert (config.layers, config.lucid_layers) == (6, (1, 2))
    assert arguments == {"learning_rate": 3e-4, "max_steps": 9}
    again = split(yaml.safe_load(as_yaml(config, arguments)))
    assert again == (config, arguments)
    made = training_arguments(arguments, tmp_path, validate=True)
    assert (made.max_steps, made.learning_rate, made.weight_decay) == (9, 3e-4, 0.1)
    assert made.eval_strategy == "steps"


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("text: a\nlerning_rate: 1", [], "lerning_rate: is neither .* did you mean learning_rate?"),
        ("text: a\nnum_train_epochs: 2", [], "num_train_epochs: give max_steps"),
        ("text: a\noutput_dir: x", [], "output_dir: is decided by lucid train"),
        ("just words", [], "expected lines of the form"),
        ("a: [1", [], "is not YAML"),
        ("text: a", ["layers"], "--set layers: expected key=value"),
        ("text: a", ["layers=[1"], "the value is not YAML"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, changes: list[str], message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(TrainError, match=message):
        load_config(path, changes)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="no such file"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"text: caf\xe9\n")
    with pytest.raises(TrainError, match="cannot be read"):
        load_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("learning_rate: fast", "learning_rate: expected a number above 0, got 'fast'"),
        ("learning_rate: 0", "learning_rate: expected a number above 0"),
        ("max_steps: many", "max_steps: expected a whole number, at least 1, got 'many'"),
        ("max_steps: -1", "max_steps: expected a whole number, at least 1, got -1"),
        ("max_steps: 0", "max_steps: expected"),
        ("seed: x", "seed: expected a whole number"),
        ("seed: -1", "seed: expected a whole number"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size: expected"),
        ("lucid_layers: 3", "lucid_layers: expected a list of layer indices, got 3"),
        ("lucid_layers: [a]", "lucid_layers: expected a list"),
        ("lucid_layers: []", "lucid_layers: expected a list"),
        ("task_options: 5", "task_options: expected key: value pairs"),
        ("rope_theta: abc", "rope_theta: expected a number above 0"),
        ("rope_theta: -5", "rope_theta: expected a number above 0"),
        ("document_masks: maybe", "document_masks: expected true or false"),
        ("strength: null", "strength: expected a number"),
    ],
)
def test_values_that_transformers_would_take(tmp_path: Path, settings: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"text: a\n{settings}\n")
    with pytest.raises(TrainError, match=message):
        training_arguments(load_config(path)[1], tmp_path, validate=False)


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("text: a\nmax_steps: 1e2\nadam_epsilon: 1e-12\nsave_strategy: no\n")
    assert load_config(path)[1] == {"max_steps": 100, "adam_epsilon": 1e-12, "save_strategy": "no"}
    kept = load_config(path, ["eval_strategy=no"])
    assert split(yaml.safe_load(as_yaml(*kept))) == kept


def test_settings_of_python(tmp_path: Path) -> None:
    kept = as_yaml(TrainConfig(text="a"), {"lr_scheduler_type": SchedulerType.COSINE})
    assert yaml.safe_load(kept)["lr_scheduler_type"] == "cosine"
    with pytest.raises(TrainError, match="cannot be written down"):
        as_yaml(TrainConfig(text="a"), {"report_to": object()})


def test_bad_training_arguments(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="TrainingArguments: "):
        training_arguments({"lr_scheduler_type": "zigzag"}, tmp_path, validate=False)


@pytest.mark.parametrize("name", ["tiny", "small", "paper-1b", "paper-1b-long"])
def test_recipes_are_read(name: str) -> None:
    config, arguments = load_config(RECIPES / f"{name}.yaml")
    assert config.attention == "lucid" and arguments["max_steps"] > 0
    made = training_arguments({**arguments, "bf16": False, "use_cpu": True}, RECIPES, validate=True)
    # transformers would evaluate eight rows of 65,536 tokens at once.
    assert made.per_device_eval_batch_size == made.per_device_train_batch_size
