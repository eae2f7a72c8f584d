"""LUCID attention of new tokens over a cache of keys and preconditioned values."""

from .api import decode_workspace, lucid_attention_with_kvcache

__all__ = ["decode_workspace", "lucid_attention_with_kvcache"]
