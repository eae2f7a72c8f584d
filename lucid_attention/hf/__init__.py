"""LUCID attention in any Hugging Face decoder. Importing this registers the name "lucid" with
transformers' attention and mask interfaces, and the LUCID checkpoint classes with its Auto classes.
"""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from .attention import lucid_attention_forward
from .cache import LucidCache
from .checkpoint import IMPLEMENTATION, register_families
from .enable import disable, enable, install_in_transformers, strengths
from .masks import lucid_mask
from .strength import StrengthSchedule

__all__ = ["LucidCache", "StrengthSchedule", "disable", "enable", "strengths"]

AttentionInterface.register(IMPLEMENTATION, lucid_attention_forward)
# Without a mask function of its own the implementation would get no mask at all, and padding would
# be ignored without a word.
AttentionMaskInterface.register(IMPLEMENTATION, lucid_mask)
register_families()
install_in_transformers()
