"""LUCID attention: softmax attention over preconditioned values (arXiv 2602.10410)."""

from .attention import lucid_attention, lucid_attention_varlen
from .precondition import precondition, precondition_varlen
from .version import __version__

__all__ = [
    "__version__",
    "lucid_attention",
    "lucid_attention_varlen",
    "precondition",
    "precondition_varlen",
]
