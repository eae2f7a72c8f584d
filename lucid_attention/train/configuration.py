"""What a training is: one small dataclass, and TrainingArguments; both from one flat YAML file."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

__all__ = ["TrainConfig", "TrainError", "load_config", "training_arguments"]

ATTENTIONS = ("lucid", "softmax")
POSITIONS = ("rope", "nope")
TASKS = ("memory", "needles")
FUSED = ("auto", "liger", "none")
PRECISIONS = ("default", "high")


class TrainError(ValueError):
    """Something the user can put right; its message is one line."""


@dataclass(frozen=True)
class TrainConfig:
    """The model, its attention and its data; everything else is `transformers.TrainingArguments`.

    Args:
        attention: "lucid", or "softmax": the same code with strength 0, which costs what softmax costs.
        strength: of LUCID, in [0, 1], or "learned" (one parameter a KV head, from 0).
        kernel_scale: of LUCID, above 0; None is the checkpoint's, or one over the root of the head size
            (`lucid_attention.hf.enable`).
        solve_precision: of the solve, as ``precision`` of `lucid_attention.precondition`: "high" does not round ``P`` to float16, for
            1.1 to 1.6 times the solve's time forward (few heads: up to 2.3). It is not saved with the model.
        strength_learning_rate: of a learned strength, which AdamW (other optimisers less, or not) moves by about so much a step, whatever
            its gradient: at the rate of other parameters it would hardly leave 0. It follows the schedule of ``learning_rate`` and has no weight decay.
        strength_steps: optimiser steps over which a fixed strength rises from 0; 0: it is there from the start.
        lucid_layers: indices of the layers that are LUCID; None: all, or those of a LUCID checkpoint.
        position: "rope", or "nope": no position encoding.
        init_from: a checkpoint (folder or hub id) to go on from, LUCID or softmax; it says how large the model is,
            and its tokenizer is used. None: random weights.
        layers: the dial of a model's size: what is not given follows from it.
        width: None is ``64 * layers``.
        head_dim: of queries, keys and values.
        heads: None is ``width / head_dim``; kv_heads: None is ``heads``; mlp_width: None is ``8/3 width``, rounded up
            to a multiple of 64.
        rope_theta: None is 10000, or what the checkpoint has.
        tie_embeddings: whether the output layer is the embedding.
        text: a UTF-8 text file, a .jsonl file with a "text" in every line, a folder, or a pattern (``books/**/*.txt``);
            every file or line is a document. "novel": the one that comes with the package.
        dataset: a name for the ``datasets`` library, instead: ``NAME`` or ``NAME:CONFIGURATION``, with a column "text".
        task: "memory", instead: the updatable memory of `lucid_attention.tasks`, with ``task_options`` ``keys``,
            ``values`` and ``query_share``; or "needles": needles in prose with the tokenizer of ``init_from`` or ``tokenizer``, with
            ``keys``, ``values``, ``queries``, ``vary`` and ``prose`` (see `lucid_attention.train.tasks`).
        tokens_of: the folder of an earlier run, instead: its tokenizer and tokens are copied, so that twins need not make them
            again.
        tokenizer: "train" makes a byte-level BPE of ``vocabulary`` entries from the training text; otherwise a
            folder or hub id.
        vocabulary: of the tokenizer that is trained, and then of the model, however many entries were found.
        validation_share: of the tokens, from the end of the data, held out.
        length: tokens in a row; a row is packed with documents.
        document_masks: whether a token sees its own document only.
        fused_loss: "liger" never forms the logits in training (liger-kernel, on a GPU), "none" forms them, "auto" is "liger" where
            it is installed.
        fused_layers: the same for norms and gated MLPs, of which liger-kernel makes one kernel each.

    Raises:
        TrainError: a value out of range, or two that exclude each other.
    """

    attention: str = "lucid"
    strength: float | str = 1.0
    kernel_scale: float | None = None
    solve_precision: str = "default"
    strength_learning_rate: float = 1e-2
    strength_steps: int = 0
    lucid_layers: tuple[int, ...] | None = None
    position: str = "rope"
    init_from: str | None = None
    layers: int = 8
    width: int | None = None
    head_dim: int = 64
    heads: int | None = None
    kv_heads: int | None = None
    mlp_width: int | None = None
    rope_theta: float | None = None
    tie_embeddings: bool = False
    text: str | None = None
    dataset: str | None = None
    task: str | None = None
    tokens_of: str | None = None
    task_options: dict[str, Any] | None = None
    tokenizer: str = "train"
    vocabulary: int = 16384
    validation_share: float = 0.01
    length: int = 2048
    document_masks: bool = True
    fused_loss: str = "auto"
    fused_layers: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("attention", ATTENTIONS),
            ("position", POSITIONS),
            ("fused_loss", FUSED),
            ("fused_layers", FUSED),
            ("solve_precision", PRECISIONS),
        ):
            if getattr(self, name) not in allowed:
                raise TrainError(
                    f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name in ("init_from", "text", "dataset", "task", "tokens_of", "tokenizer"):
            value = getattr(self, name)
            if not (isinstance(value, str) or (value is None and name != "tokenizer")):
                raise TrainError(f"{name}: expected a text, got {value!r}")
        for name in _COUNTS:
            _check_count(name, getattr(self, name), optional=name in _OPTIONAL)
        for name in ("tie_embeddings", "document_masks"):
            if not isinstance(getattr(self, name), bool):
                raise TrainError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        if isinstance(self.lucid_layers, list):
            object.__setattr__(self, "lucid_layers", tuple(self.lucid_layers))
        layers, theta = self.lucid_layers, self.rope_theta
        if layers is not None and not (
            isinstance(layers, tuple) and layers and all(type(x) is int for x in layers)
        ):
            raise TrainError(f"lucid_layers: expected a list of layer indices, got {layers!r}")
        if theta is not None and (not _is_number(theta) or not 0 < theta < float("inf")):
            raise TrainError(f"rope_theta: expected a number above 0, got {theta!r}")
        rate = self.strength_learning_rate
        if not _is_number(rate) or not 0 < rate < float("inf"):
            raise TrainError(f"strength_learning_rate: expected a number above 0, got {rate!r}")
        scale = self.kernel_scale
        if scale is not None and (not _is_number(scale) or not 0 < scale < float("inf")):
            raise TrainError(f"kernel_scale: expected a number above 0, got {scale!r}")
        if not (self.task_options is None or isinstance(self.task_options, dict)):
            raise TrainError(f"task_options: expected key: value pairs, got {self.task_options!r}")
        for name in ("strength", "validation_share"):
            value = getattr(self, name)
            if not (_is_number(value) or (name == "strength" and isinstance(value, str))):
                raise TrainError(f"{name}: expected a number, got {value!r}")
        if isinstance(self.strength_steps, bool) or not isinstance(self.strength_steps, int):
            raise TrainError(
                f"strength_steps: expected a whole number, got {self.strength_steps!r}"
            )
        if self.strength_steps < 0:
            raise TrainError(f"strength_steps: expected 0 or more, got {self.strength_steps}")
        self._check_attention()
        self._check_data()
        if self.init_from is not None:
            fixed = [n for n in _SIZES if getattr(self, n) != _DEFAULTS[n]]
            if fixed:
                raise TrainError(
                    f"{fixed[0]}: the checkpoint of init_from says how large the model is; leave {fixed[0]} out"
                )
        else:
            self._check_heads()

    def _check_attention(self) -> None:
        if isinstance(self.strength, str):
            if self.strength != "learned":
                raise TrainError(
                    f'strength: expected a number in [0, 1] or "learned", got {self.strength!r}'
                )
            if self.strength_steps:
                raise TrainError(
                    "strength_steps: a learned strength starts at 0 and has no schedule"
                )
        elif (
            self.attention == "lucid"
            and self.strength_learning_rate != _DEFAULTS["strength_learning_rate"]
        ):
            raise TrainError(
                "strength_learning_rate: only a learned strength has one; give strength: learned, or leave it out"
            )
        elif isinstance(self.strength, bool) or not 0.0 <= self.strength <= 1.0:
            raise TrainError(f"strength: expected a number in [0, 1], got {self.strength!r}")
        if self.attention == "softmax":
            for name in (
                "strength",
                "kernel_scale",
                "solve_precision",
                "strength_learning_rate",
                "strength_steps",
                "lucid_layers",
            ):
                if getattr(self, name) != _DEFAULTS[name]:
                    raise TrainError(f"{name}: softmax attention has none; leave it out")
        if self.position == "nope" and self.rope_theta is not None:
            raise TrainError("rope_theta: position is nope; leave rope_theta out")

    def _check_data(self) -> None:
        sources = ("text", "dataset", "task", "tokens_of")
        given = [name for name in sources if getattr(self, name) is not None]
        if len(given) != 1:
            raise TrainError(
                "text, dataset, task, tokens_of: expected exactly one of them, got "
                + (" and ".join(given) if given else "none")
            )
        if self.task is not None and self.task not in TASKS:
            raise TrainError(f"task: expected one of {', '.join(TASKS)}, got {self.task!r}")
        if self.task_options is not None and self.task is None:
            raise TrainError("task_options: there is no task")
        if self.tokens_of is not None and self.tokenizer != "train":
            raise TrainError("tokenizer: tokens_of brings its own; leave tokenizer out")
        if self.task == "needles" and self.init_from is None and self.tokenizer == "train":
            raise TrainError(
                "tokenizer: the task needles has no text to make one from; give tokenizer or init_from"
            )
        if self.task == "memory":
            for name in ("tokenizer", "vocabulary", "init_from"):
                if getattr(self, name) != _DEFAULTS[name]:
                    raise TrainError(f"{name}: a task brings its own vocabulary; leave {name} out")
        if not 0.0 <= self.validation_share < 1.0:
            raise TrainError(
                f"validation_share: expected a number in [0, 1), got {self.validation_share!r}"
            )
        if self.length < 2:
            raise TrainError(f"length: expected at least 2 tokens, got {self.length}")

    def _check_heads(self) -> None:
        size = self.size()
        if size["head_dim"] % 2 and self.position == "rope":
            raise TrainError(f"head_dim: rope needs an even one, got {self.head_dim}")
        if self.heads is None and size["width"] % self.head_dim:
            raise TrainError(
                f"heads: width {size['width']} is no multiple of head_dim {self.head_dim}; give heads"
            )
        if size["heads"] % size["kv_heads"]:
            raise TrainError(
                f"kv_heads: {size['heads']} query heads are no multiple of {size['kv_heads']} KV heads"
            )
        if self.lucid_layers is not None:
            for index in self.lucid_layers:
                if not -self.layers <= index < self.layers:
                    raise TrainError(
                        f"lucid_layers: expected indices below {self.layers}, got {index}"
                    )

    def size(self) -> dict[str, int]:
        """The sizes of a new model, those that follow from ``layers`` included."""
        width = self.width or 64 * self.layers
        heads = self.heads or max(1, width // self.head_dim)
        return {
            "layers": self.layers,
            "width": width,
            "head_dim": self.head_dim,
            "heads": heads,
            "kv_heads": self.kv_heads or heads,
            "mlp_width": self.mlp_width or -(-8 * width // 3 // 64) * 64,
        }


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
_SIZES = ("layers", "width", "head_dim", "heads", "kv_heads", "mlp_width", "position", "tie_embeddings", "vocabulary")  # fmt: skip
_COUNTS = ("layers", "width", "head_dim", "heads", "kv_heads", "mlp_width", "vocabulary", "length")
_OPTIONAL = ("width", "heads", "kv_heads", "mlp_width")

# Where the house's habit is not transformers'.
_TRAINING: dict[str, Any] = {
    "max_steps": 1000,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.06,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "per_device_train_batch_size": 8,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 2,
    "eval_steps": 0.1,
    "seed": 1,
    "report_to": "tensorboard" if find_spec("tensorboard") else "none",
    # Or a loss that is no number any more would be written down as 0.
    "logging_nan_inf_filter": False,
}
# What `train` decides itself.
_RESERVED = ("output_dir", "disable_tqdm", "remove_unused_columns", "resume_from_checkpoint", "use_liger_kernel", "do_train", "prediction_loss_only", "train_sampling_strategy", "data_seed")  # fmt: skip
_RANGES = (
    ("weight_decay", 0, float("inf")), ("adam_beta1", 0, 1), ("adam_beta2", 0, 1), ("adam_epsilon", 0, float("inf")),
    ("max_grad_norm", 0, float("inf")), ("per_device_eval_batch_size", 1, float("inf")),
    ("dataloader_num_workers", 0, float("inf")), ("eval_delay", 0, float("inf")), ("warmup_steps", 0, float("inf")),
)  # fmt: skip
# What may be changed when a training goes on, because it changes nothing that was done.
CHANGEABLE = ("max_steps", "logging_steps", "save_steps", "eval_steps", "save_total_limit", "report_to")  # fmt: skip


def load_config(path: Path, changes: Iterable[str] = ()) -> tuple[TrainConfig, dict[str, Any]]:
    r"""A configuration file: a `TrainConfig` and keyword arguments for `training_arguments`.

    The file is flat YAML; a key is a field of `TrainConfig` or of `transformers.TrainingArguments`.

    Args:
        path: the file.
        changes: ``"key=value"``, over what the file says.

    Raises:
        TrainError: no such file, not YAML, an unknown key, a bad value.

    Example:
        >>> import tempfile, pathlib
        >>> from lucid_attention.train import load_config
        >>> path = pathlib.Path(tempfile.mkdtemp(), "mine.yaml")
        >>> _ = path.write_text("text: novel.txt\nlayers: 4\nlearning_rate: 1e-3\n")
        >>> config, arguments = load_config(path, ["attention=softmax"])
        >>> config.attention, config.size()["width"], arguments["learning_rate"]
        ('softmax', 256, 0.001)
    """
    content = read_yaml(Path(path))
    content.update(changed(changes))
    return split(content)


def changed(changes: Iterable[str]) -> dict[str, Any]:
    """What ``key=value`` pairs say.

    Raises:
        TrainError: no equals sign, a value that is not YAML.
    """
    found = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise TrainError(f"--set {change}: expected key=value")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise TrainError(f"--set {change}: the value is not YAML") from None
    return found


class _Once(yaml.SafeLoader):
    """YAML whose keys are there once; PyYAML would take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.YAMLError(f"{key.value} is there twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A flat YAML file.

    Raises:
        TrainError: it cannot be read.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Once)
    except FileNotFoundError:
        raise TrainError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise TrainError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise TrainError(f"{path}: expected lines of the form `key: value`")
    return content


def split(content: dict[str, Any]) -> tuple[TrainConfig, dict[str, Any]]:
    """Flat settings into ours and those of TrainingArguments."""
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name, value in content.items():
        value = _number(value)
        if value is False and str(name).endswith("_strategy"):
            value = "no"  # which YAML reads as false
        if name in _DEFAULTS:
            ours[name] = (
                tuple(value) if name == "lucid_layers" and isinstance(value, list) else value
            )
        elif name == "num_train_epochs":
            raise TrainError(
                "num_train_epochs: give max_steps; lucid train says how often the data are seen"
            )
        elif name in _RESERVED:
            raise TrainError(f"{name}: is decided by lucid train; leave it out")
        elif name in known:
            theirs[name] = value
        else:
            close = difflib.get_close_matches(str(name), [*_DEFAULTS, *known], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TrainError(
                f"{name}: is neither a setting of lucid train nor of TrainingArguments{hint}"
            )
    try:
        return TrainConfig(**ours), theirs
    except TypeError as error:
        raise TrainError(str(error)) from None


def training_arguments(given: dict[str, Any], out: Path, validate: bool) -> TrainingArguments:
    """TrainingArguments of a run in ``out``; ``validate``: there is held-out data.

    Raises:
        TrainError: transformers does not take them.
    """
    settings = {**_TRAINING, "dataloader_pin_memory": torch.cuda.is_available(), **given}
    _check_arguments(settings)
    # transformers' 8 would be 8 rows of 64K.
    settings.setdefault("per_device_eval_batch_size", settings["per_device_train_batch_size"])
    if not validate:
        if settings.pop("load_best_model_at_end", False) and given.get("eval_strategy") == "no":
            raise TrainError("load_best_model_at_end: eval_strategy is no; leave one of them out")
        settings["eval_strategy"] = "no"
        if settings["save_strategy"] == "best":
            settings["save_strategy"] = "steps"
    else:
        settings.setdefault("eval_strategy", "steps")
    try:
        return TrainingArguments(
            output_dir=str(out),
            disable_tqdm=True,
            remove_unused_columns=False,
            # The data sets bring their own order.
            train_sampling_strategy="sequential",
            **settings,
        )
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        raise TrainError(f"TrainingArguments: {' '.join(str(error).split())}") from None


def _check_arguments(settings: dict[str, Any]) -> None:
    """What transformers would take and then not, or for ever."""
    for name in ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"):
        if name in settings:
            _check_count(name, settings[name], optional=False)
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        if str(settings.get(name)) in ("epoch", "IntervalStrategy.EPOCH", "SaveStrategy.EPOCH"):
            raise TrainError(
                f"{name}: expected steps or no, got epoch: rows are drawn without an end, so no epoch ends"
            )
    if settings.get("save_only_model"):
        raise TrainError(
            "save_only_model: a run could not go on from such a checkpoint as if nothing had happened; leave it out "
            "(save_total_limit says how many are kept)"
        )
    if settings.get("fp16") and not torch.cuda.is_available():
        raise TrainError("fp16: there is no GPU here; take bf16, or leave it out")
    for name, least, below in _RANGES:
        value = settings.get(name)
        if value is not None and not (_is_number(value) and least <= value < below):
            wanted = f"at least {least}" if below == float("inf") else f"in [{least}, {below})"
            raise TrainError(f"{name}: expected a number {wanted}, got {value!r}")
    _check_reports(settings["report_to"])
    if "optim_args" in settings and not isinstance(settings["optim_args"], (str, type(None))):
        raise TrainError(
            f"optim_args: expected a text like a=1,b=2, got {settings['optim_args']!r}"
        )
    seed = settings["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise TrainError(f"seed: expected a whole number from 0 to 2^32 - 1, got {seed!r}")
    rate = settings["learning_rate"]
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
        raise TrainError(f"learning_rate: expected a number above 0, got {rate!r}")


def _check_reports(asked: Any) -> None:
    """Before the run: transformers would look for them when it has begun."""
    from transformers.integrations import get_available_reporting_integrations

    there = get_available_reporting_integrations()
    for name in [asked] if isinstance(asked, str) else asked or []:
        if name not in ("none", "all", *there):
            raise TrainError(
                f"report_to: {name} is not installed; expected none, all or one of {', '.join(sorted(there)) or 'none'}"
            )


def as_yaml(config: TrainConfig, given: dict[str, Any]) -> str:
    """The file that gives both back, with what differs from the defaults.

    Raises:
        TrainError: a setting that YAML cannot hold.
    """
    ours = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
        if value != _DEFAULTS[name]
    }
    plain = {n: v.value if isinstance(v, enum.Enum) else v for n, v in given.items()}
    try:
        return yaml.safe_dump({**ours, **plain}, sort_keys=False)
    except yaml.YAMLError as error:
        raise TrainError(f"TrainingArguments: cannot be written down: {error}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_count(name: str, value: Any, *, optional: bool) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TrainError(f"{name}: expected a whole number, at least 1, got {value!r}")


def _number(value: Any) -> Any:
    """YAML reads 1e-3 as a string, because it wants a dot."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)  # 1e2 steps
    return value
