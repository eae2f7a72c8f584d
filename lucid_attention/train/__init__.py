"""Train a language model with LUCID or softmax attention: transformers' Trainer, configured by one small file."""

from .configuration import TrainConfig, TrainError, load_config
from .run import Outcome, train

__all__ = ["Outcome", "TrainConfig", "TrainError", "load_config", "train"]
