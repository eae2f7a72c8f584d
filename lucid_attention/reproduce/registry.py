"""All experiments, by name."""

from __future__ import annotations

from .experiment import Experiment
from .language_model import LanguageModel
from .memory import Memory
from .moving import Moving
from .needles import Needles
from .repeat import Repeat
from .tuning import Tuning
from .two_phase import TwoPhase

__all__ = ["EXPERIMENTS"]

EXPERIMENTS: dict[str, Experiment] = {
    one.name: one
    for one in (Memory(), TwoPhase(), Repeat(), Tuning(), LanguageModel(), Needles(), Moving())
}
