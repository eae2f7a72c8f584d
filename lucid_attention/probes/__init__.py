"""Look inside a model: what its layers attend to, what the preconditioner changes, how well it is solved."""

from .capture import LayerTensors, capture
from .diagnostics import HeadDiagnosis, diagnose
from .maps import attention_maps, lower_factor

__all__ = [
    "HeadDiagnosis",
    "LayerTensors",
    "attention_maps",
    "capture",
    "diagnose",
    "lower_factor",
]
