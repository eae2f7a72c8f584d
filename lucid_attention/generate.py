"""What `lucid generate` does: a checkpoint continues a prompt, the text as it comes, and how fast it came."""

from __future__ import annotations

import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed
from transformers.utils.peft_utils import find_adapter_config_file

from lucid_attention.hf import enable

__all__ = ["GenerateError", "Settings", "Summary", "generate", "load", "read_prompt"]

CACHES = ("dynamic", "static", "offloaded")
COLDEST = 1e-4
"""Scores over a lower temperature are not all finite in float32."""
DTYPES = ("auto", "float32", "bfloat16", "float16")


class GenerateError(ValueError):
    """Something the user can put right; its message is one line."""


@dataclass(frozen=True)
class Settings:
    """How to continue.

    Args:
        new_tokens: at most so many; fewer if the model ends its text.
        temperature: 0 takes the likeliest token each time; otherwise tokens are drawn.
        top_k, top_p: what is drawn from; None: all.
        seed: of the drawing.
        cache: "dynamic" grows; "static" is as large as it will be from the start, and on a GPU its steps are
            compiled; "offloaded" keeps all layers but one on the host.

    Raises:
        GenerateError: a value out of range.
    """

    new_tokens: int = 200
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    cache: str = "dynamic"

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise GenerateError(f"--new-tokens: expected 1 or more, got {self.new_tokens}")
        if not (self.temperature == 0 or COLDEST <= self.temperature < float("inf")):
            raise GenerateError(
                f"--temperature: expected 0 (the likeliest token) or {COLDEST:g} and more, got {self.temperature:g}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise GenerateError(f"--top-k: expected 1 or more, got {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise GenerateError(f"--top-p: expected a number in (0, 1], got {self.top_p:g}")
        if self.temperature == 0 and (self.top_k or self.top_p):
            raise GenerateError(
                "--top-k and --top-p say what to draw from: give a --temperature as well"
            )
        if not 0 <= self.seed < 2**32:
            raise GenerateError(f"--seed: expected 0 to 2^32 - 1, got {self.seed}")
        if self.cache not in CACHES:
            raise GenerateError(f"--cache: expected one of {', '.join(CACHES)}, got {self.cache!r}")


@dataclass
class Summary:
    """What happened; ``times``: when the prompt went in and when each token came out, in seconds."""

    model: str
    prompt_tokens: int
    times: list[float] = field(default_factory=list)
    interrupted: bool = False

    @property
    def new_tokens(self) -> int:
        return max(0, len(self.times) - 1)

    @property
    def first_token_seconds(self) -> float:
        return self.times[1] - self.times[0] if self.new_tokens else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """By the median interval between tokens, so that compiling does not count; NaN below two tokens."""
        gaps = [b - a for a, b in zip(self.times[1:-1], self.times[2:], strict=True)]
        return 1.0 / statistics.median(gaps) if gaps else float("nan")

    def __str__(self) -> str:
        parts = [f"{self.prompt_tokens} prompt tokens"]
        if self.new_tokens:
            parts.append(f"first token after {self.first_token_seconds:.2f} s")
        parts.append(f"{self.new_tokens} new tokens")
        if self.new_tokens > 1:
            parts.append(f"{self.tokens_per_second:.1f} tokens/s")
        return f"{self.model}: {', '.join(parts)}{', interrupted' if self.interrupted else ''}"


class _Streamer(TextStreamer):
    """Prints whole words as they are decided, and notes when."""

    def __init__(self, tokenizer: Any, summary: Summary) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.summary = summary

    def put(self, value: torch.Tensor) -> None:
        # The tokens are on the host here, so the step that made them is over.
        if self.summary.times:
            self.summary.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints it; what standard output's encoding does not have is escaped."""
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        super().on_finalized_text(text, stream_end=stream_end)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt itself, or a file's text; "-" is standard input.

    Raises:
        GenerateError: both or neither given, no such file, not UTF-8, nothing in it.
    """
    if (prompt is None) == (file is None):
        raise GenerateError("give either --prompt or --file")
    if prompt is not None:
        text, name = prompt, "--prompt"
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes of an argument that are no text
            raise GenerateError(f"{name}: is not UTF-8 text") from None
    else:
        assert file is not None
        name = f"--file {file}"
        try:
            if str(file) != "-":
                data = file.read_bytes()
            elif sys.stdin is None:
                raise GenerateError(f"{name}: standard input is closed")
            else:
                data = sys.stdin.buffer.read()
            text = data.decode("utf-8-sig")
        except OSError as error:
            raise GenerateError(f"{name}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise GenerateError(f"{name}: is not UTF-8 text") from None
    if not text.strip():
        raise GenerateError(f"{name}: is empty")
    return text


def load(
    name: str, *, dtype: str = "auto", device: str | None = None, strength: float | None = None
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, from a folder or from the hub.

    Args:
        name: a folder, or a model id.
        dtype: "auto" is the checkpoint's.
        device: None takes a CUDA device where there is one.
        strength: switch the model to LUCID of this strength, whatever its checkpoint says; the layers and the kernel
            scale of a LUCID checkpoint stay. None runs it as it was saved.

    Raises:
        GenerateError: no such model, not a causal language model, weights that lack something, LUCID cannot take it,
            no such device.
    """
    if dtype not in DTYPES:
        raise GenerateError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    name = str(name)
    path = Path(os.path.expanduser(name))  # noqa: PTH111 (Path's raises where there is no such user)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise GenerateError(f"{name}: no such folder")
    files = ("config.json", "adapter_config.json")
    if path.is_dir() and not any((path / file).is_file() for file in files):
        inside = path / "model"
        if (inside / "config.json").is_file():
            raise GenerateError(f"{name}: is the folder of a training; its checkpoint is {inside}")
        raise GenerateError(f"{name}: is no checkpoint (it has no config.json)")
    source = str(path) if path.is_dir() else name
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "meta":
        raise GenerateError("--device: expected a device that computes, got meta")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, missing = _from_pretrained(source, dtype)
    except (
        OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError,
    ) as error:  # fmt: skip
        first = str(error).strip().split("\n")[0]
        if path.is_dir() and not any(path.glob("token*")):
            first = "it has no tokenizer"
        elif "/" in name and path.parent.is_dir() and not path.is_dir():
            first = f"{path.parent} has no folder {path.name}, and {first}"
        raise GenerateError(f"{name}: cannot be loaded: {first}") from None
    if missing:
        raise GenerateError(
            f"{name}: is no complete causal language model: {len(missing)} tensors that it needs are not among its "
            f"weights ({missing[0]}{', ..' if len(missing) > 1 else ''}), and would be random or start anew"
        )
    try:
        if strength is not None:
            saved = getattr(model.config, "lucid", None) or {}
            kept = {key: saved[key] for key in ("layers", "kernel_scale") if key in saved}
            enable(model, strength=strength, **kept)
        model.to(device)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise GenerateError(f"{name}: {str(error).strip().splitlines()[0]}") from None
    return model.eval(), tokenizer


def _from_pretrained(source: str, dtype: str) -> tuple[Any, list[str]]:
    """A model, and the tensors that its weights lack; an adapter is merged into its base.

    transformers' own way with adapters says nothing of what the base lacks and forgets modules that were saved whole, such as
    learned strengths.
    """
    adapted = find_adapter_config_file(source) is not None
    base = source
    if adapted:
        from peft import PeftConfig, PeftModel

        base = PeftConfig.from_pretrained(source).base_model_name_or_path
    model, found = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, output_loading_info=True)
    if adapted:
        model = PeftModel.from_pretrained(model, source)
        if not hasattr(model, "merge_and_unload"):
            raise ValueError(
                "its adapter cannot be merged into its base, as one of prompts; expected LoRA or the like"
            )
        model = model.merge_and_unload()
    return model, sorted(found["missing_keys"])


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt's tokens, without the end of text that some tokenizers append: a model is to go on from here."""
    ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):  # fmt: skip
        return ids[:-1]
    return ids


def describe(model: Any) -> str:
    """The model's class, its LUCID layers, dtype and device."""
    lucid = getattr(model.config, "lucid", None)
    layers = model.config.get_text_config().num_hidden_layers
    kind = "softmax attention"
    if isinstance(lucid, dict):
        kind = f"LUCID in {len(lucid['layers'])} of {layers} layers"
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{type(model).__name__} ({kind}, {dtype}, {model.device})"


def generate(model: Any, tokenizer: Any, prompt: str, settings: Settings) -> Summary:
    """Continue the prompt on standard output; Ctrl-C ends it early.

    Returns:
        A `Summary`, whose text is a line for the user.

    Raises:
        GenerateError: the prompt has no tokens, or one that the model does not know; there is no GPU to offload from;
            the checkpoint's generation settings do not go with this; the model does not go on beyond the positions it
            was made for.
    """
    ids = prompt_ids(tokenizer, prompt)
    length = len(ids)
    if length == 0:
        raise GenerateError("the prompt has no tokens")
    known = model.get_input_embeddings().weight.shape[0]
    largest = max(ids)
    if largest >= known:
        raise GenerateError(
            f"the tokenizer is another model's: it made token {largest} of the prompt, and the model knows {known}"
        )
    if settings.cache == "offloaded" and model.device.type != "cuda":
        raise GenerateError(
            f"--cache: offloaded moves the cache off a CUDA device, and the model is on {model.device}"
        )
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and length + settings.new_tokens > most:
        print(
            f"lucid generate: {length} prompt and {settings.new_tokens} new tokens are more than the {most} "
            "positions of the model; what comes after them may be worse",
            file=sys.stderr,
        )
    summary = Summary(describe(model), length)
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    # What a checkpoint's own settings may ask for and a stream cannot have: beams, of which nothing can be shown before
    # they end, several texts, several tokens at once, more than tokens, another cache.
    how |= {"num_beams": 1, "num_return_sequences": 1, "prompt_lookup_num_tokens": None}
    how |= {"output_attentions": False, "return_dict_in_generate": False}
    how["cache_implementation"] = None if settings.cache == "dynamic" else settings.cache
    if settings.temperature > 0:
        how |= {"do_sample": True, "temperature": settings.temperature}
        how |= {"top_k": settings.top_k or 0, "top_p": settings.top_p or 1.0}
    if tokenizer.pad_token_id is None and model.generation_config.pad_token_id is None:
        how["pad_token_id"] = tokenizer.eos_token_id
    set_seed(settings.seed)
    streamer = _Streamer(tokenizer, summary)
    summary.times.append(time.perf_counter())
    rows = torch.tensor([ids], device=model.device)
    try:
        model.generate(
            rows, attention_mask=torch.ones_like(rows), max_new_tokens=settings.new_tokens,
            streamer=streamer, tokenizer=tokenizer, **how,
        )  # fmt: skip
    except KeyboardInterrupt:
        streamer.end()
        summary.interrupted = True
    except (ValueError, TypeError, ImportError) as error:
        if summary.times[1:]:
            streamer.end()  # what was said stays, on a line of its own
        raise GenerateError(str(error).strip().split("\n")[0] or type(error).__name__) from error
    except IndexError:
        if most is None or length + settings.new_tokens <= most:
            raise
        raise GenerateError(
            f"the model does not go beyond its {most} positions ({length} prompt tokens, {settings.new_tokens} new "
            "ones asked for)"
        ) from None
    # The first thing that a streamer is given is the prompt.
    del summary.times[1:2]
    return summary
