"""LUCID attention: softmax attention over preconditioned values (arXiv 2602.10410)."""

from .attention import lucid_attention, lucid_attention_varlen
from .decode import decode_workspace, lucid_attention_with_kvcache
from .precondition import precondition, precondition_varlen
from .version import __version__

__all__ = [
    "__version__",
    "decode_workspace",
    "lucid_attention",
    "lucid_attention_varlen",
    "lucid_attention_with_kvcache",
    "precondition",
    "precondition_varlen",
]
