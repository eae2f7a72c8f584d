"""Generated tasks: data only, no model, so that any model can be measured on them.

Each task is versioned (its ``VERSION`` changes whenever the same seed would give other data) and
draws everything from a :class:`torch.Generator`.
"""

from __future__ import annotations

from .updatable_memory import MemoryBatch, updatable_memory

__all__ = ["MemoryBatch", "updatable_memory"]
