"""Evaluate a checkpoint: this project's tasks, and lm-evaluation-harness."""

from .run import EvalError, Evaluation, evaluate

__all__ = ["EvalError", "Evaluation", "evaluate"]
