"""The language-model part: train a tiny LUCID Llama and its softmax twin, save, load, generate."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from lucid_attention.hf import enable
from lucid_attention.hf.cache import LucidLayer

from .configuration import LanguageModelConfig
from .text import Corpus

__all__ = [
    "Attention",
    "CheckpointCheck",
    "LossCurve",
    "build_model",
    "check_checkpoint",
    "train_twin",
]

Attention = Literal["softmax", "LUCID"]
Advance = Callable[[int], None]


@dataclass
class LossCurve:
    """Losses of one training in nats a token; filled while it runs, so an interrupt keeps them.

    Attributes:
        attention: ``"LUCID"`` or ``"softmax"``.
        train: (step, mean loss since the entry before) pairs.
        validation: (step, loss on the held-out text) pairs, the first before any training.
        seconds: of training, measuring the held-out text included; None until it is done.
        parameters: of the model.
    """

    attention: Attention
    train: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class CheckpointCheck:
    """What the reloaded LUCID checkpoint did.

    Attributes:
        implementation: the attention that the Auto class gave the reloaded model.
        largest_logit_difference: reloaded model against the one in memory, over the prompt.
        compared_tokens: greedy tokens generated with and without the cache.
        equal_tokens: how many of them agree before the first difference.
        cache_layers: class names of the layers in the cache that ``generate`` made by itself.
        cache_is_lucid: all of them hold preconditioned values.
        prompt, continuation: text; the continuation is sampled with the cache.
    """

    implementation: str
    largest_logit_difference: float
    compared_tokens: int
    equal_tokens: int
    cache_layers: tuple[str, ...]
    cache_is_lucid: bool
    prompt: str
    continuation: str

    @property
    def passed(self) -> bool:
        """LUCID came back with identical logits, and its cache changes no token."""
        return (
            self.implementation == "lucid"
            and self.largest_logit_difference == 0.0
            and self.equal_tokens == self.compared_tokens
            and self.cache_is_lucid
        )


def build_model(
    attention: Attention, config: LanguageModelConfig, vocabulary: int, *, seed: int
) -> PreTrainedModel:
    """A fresh Llama; the two kinds of attention get identical weights from the same seed."""
    llama = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=4 * config.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(llama)
    if attention == "LUCID":
        enable(model)
    return model


def train_twin(
    curve: LossCurve,
    corpus: Corpus,
    config: LanguageModelConfig,
    *,
    seed: int,
    scratch: Path,
    advance: Advance = lambda _: None,
) -> PreTrainedModel:
    """Train one model with transformers' Trainer on the CPU.

    Args:
        curve: says which attention; its losses are filled in as training goes on.
        corpus: the text.
        config: sizes.
        seed: of the initial weights and of the order of the data.
        scratch: a folder the Trainer may call its own; nothing is saved in it.
        advance: called with 1 after each training step.
    """
    model = build_model(curve.attention, config, len(corpus.tokenizer), seed=seed)
    curve.parameters = model.num_parameters()
    every = max(1, config.steps // config.evaluations)
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch,
        per_device_eval_batch_size=4 * config.batch,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        weight_decay=0.1,
        logging_steps=max(1, config.steps // 60),
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=True,
        prediction_loss_only=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        # Windows start at any token, so that a small text is not seen again in the same cuts.
        train_dataset=_Windows(corpus.train, config.context, stride=1),
        eval_dataset=_Windows(corpus.validation, config.context, stride=config.context),
        callbacks=[_Record(curve, advance)],
    )
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    curve.seconds = time.perf_counter() - started
    return model.eval()


@torch.no_grad()
def check_checkpoint(
    model: PreTrainedModel,
    corpus: Corpus,
    config: LanguageModelConfig,
    *,
    folder: Path,
    seed: int,
    advance: Advance = lambda _: None,
) -> CheckpointCheck:
    """Save the trained LUCID model, load it through the Auto class and generate.

    Args:
        model: trained, LUCID, in eval mode.
        corpus: for its tokenizer and prompt.
        config: how many tokens to generate.
        folder: where the checkpoint goes; it must not exist.
        seed: of the sampled continuation.
        advance: called with the number of tokens just generated; three times
            ``config.new_tokens`` in all.
    """
    with _without_transformers_bars():
        _save(model, corpus, folder)
        reloaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    difference = (reloaded(corpus.prompt).logits - model(corpus.prompt).logits).abs().max()

    prompt_length = corpus.prompt.shape[1]
    greedy = {
        use_cache: reloaded.generate(
            corpus.prompt,
            attention_mask=torch.ones_like(corpus.prompt),
            do_sample=False,
            use_cache=use_cache,
            min_new_tokens=config.new_tokens,
            max_new_tokens=config.new_tokens,
            return_dict_in_generate=True,
            streamer=_Tick(advance),
        )
        for use_cache in (True, False)
    }
    cached, uncached = (greedy[use].sequences[0, prompt_length:] for use in (True, False))
    layers = greedy[True].past_key_values.layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sampled = reloaded.generate(
            corpus.prompt,
            attention_mask=torch.ones_like(corpus.prompt),
            do_sample=True,
            temperature=0.8,
            top_k=50,
            min_new_tokens=config.new_tokens,
            max_new_tokens=config.new_tokens,
            streamer=_Tick(advance),
        )
    return CheckpointCheck(
        implementation=str(reloaded.config._attn_implementation),
        largest_logit_difference=float(difference),
        compared_tokens=len(uncached),
        equal_tokens=int((cached == uncached).long().cumprod(0).sum()),
        cache_layers=tuple(sorted({type(layer).__name__ for layer in layers})),
        cache_is_lucid=all(isinstance(layer, LucidLayer) for layer in layers),
        prompt=corpus.tokenizer.decode(corpus.prompt[0]),
        continuation=corpus.tokenizer.decode(sampled[0, prompt_length:]),
    )


def _save(model: PreTrainedModel, corpus: Corpus, folder: Path) -> None:
    """Save model and tokenizer so that an interrupt leaves the whole folder or none."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        model.save_pretrained(partial)
        corpus.tokenizer.save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _without_transformers_bars() -> Iterator[None]:
    """Keep transformers from drawing bars of its own across ours, for milliseconds of work."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class _Windows(Dataset[dict[str, Tensor]]):
    """Windows of ``context`` tokens, one every ``stride``; the model shifts the labels itself."""

    def __init__(self, tokens: Tensor, context: int, *, stride: int) -> None:
        self.windows = tokens.unfold(0, context, stride)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class _Record(TrainerCallback):
    """Copies the Trainer's losses into a curve and moves the progress bar."""

    def __init__(self, curve: LossCurve, advance: Advance) -> None:
        self.curve = curve
        self.advance = advance

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.advance(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.curve.train.append((state.global_step, float(logs["loss"])))
        if "eval_loss" in logs:
            self.curve.validation.append((state.global_step, float(logs["eval_loss"])))


class _Tick(BaseStreamer):
    """Moves the progress bar on as tokens are generated."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance
        self.saw_prompt = False

    def put(self, value: Tensor) -> None:
        if self.saw_prompt:
            self.advance(value.numel())
        self.saw_prompt = True

    def end(self) -> None:
        pass
