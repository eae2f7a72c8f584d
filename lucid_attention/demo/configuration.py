"""Every size of the demo in one place; the tests run the same code with tiny ones."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["DemoConfig", "LanguageModelConfig", "MemoryConfig"]


@dataclass(frozen=True)
class MemoryConfig:
    """Sizes of the updatable key-value memory part.

    Attributes:
        keys, values, query_share: of the task, see ``tasks.updatable_memory``.
        width, heads: of the one-layer model.
        train_length: positions per training sequence.
        test_lengths: positions per test sequence, ascending; the first is the training length.
        steps, batch, learning_rate, warmup_steps: of the training.
        test_positions: positions tested at each length, so ``test_positions / length`` sequences.
    """

    keys: int = 128
    values: int = 64
    query_share: float = 0.3
    width: int = 64
    heads: int = 1
    train_length: int = 128
    test_lengths: tuple[int, ...] = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
    steps: int = 400
    batch: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    test_positions: int = 65536


@dataclass(frozen=True)
class LanguageModelConfig:
    """Sizes of the language-model part.

    Attributes:
        vocabulary: byte-level BPE tokens, trained on the text itself; at least 256 bytes + 1.
        width, mlp_width, layers, heads, kv_heads: of the Llama.
        context: tokens per training sequence.
        steps, batch, learning_rate, warmup_steps: of the training.
        evaluations: how many times the held-out text is measured during training.
        validation_share: share of the text, its end, that is held out.
        minimum_characters: shortest text accepted.
        prompt_tokens, new_tokens: of the generated text and of the cache check.
    """

    vocabulary: int = 1024
    width: int = 128
    mlp_width: int = 384
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    context: int = 128
    steps: int = 750
    batch: int = 8
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    evaluations: int = 10
    validation_share: float = 0.1
    minimum_characters: int = 20_000
    prompt_tokens: int = 16
    new_tokens: int = 160


@dataclass(frozen=True)
class DemoConfig:
    """Both parts and the seed that everything random in them starts from."""

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    seed: int = 1

    @classmethod
    def quick(cls, *, seed: int = 1) -> DemoConfig:
        """A look at everything in about a quarter of the time; its models are undertrained."""
        return cls(
            memory=MemoryConfig(steps=100, test_lengths=(128, 256, 512), test_positions=32768),
            language_model=LanguageModelConfig(steps=150, evaluations=5, new_tokens=60),
            seed=seed,
        )
