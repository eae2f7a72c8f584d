"""Generated tasks: data only, no model, so that any model can be measured on them.

Each task is versioned (its ``VERSION`` changes whenever the same seed would give other data) and
draws everything from a :class:`torch.Generator`.
"""

from __future__ import annotations

from .needles import needles_in_prose
from .prose import Needle, Sample, score
from .tracking import variable_tracking
from .two_phase import TwoPhaseBatch, two_phase
from .updatable_memory import MemoryBatch, updatable_memory

__all__ = [
    "MemoryBatch",
    "Needle",
    "Sample",
    "TwoPhaseBatch",
    "needles_in_prose",
    "score",
    "two_phase",
    "updatable_memory",
    "variable_tracking",
]
