"""Reproduce the evidence: experiments with seeds, spread and one command each."""

from .experiment import Experiment, ReproduceError, reproduce
from .registry import EXPERIMENTS

__all__ = ["EXPERIMENTS", "Experiment", "ReproduceError", "reproduce"]
