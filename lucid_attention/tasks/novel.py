"""Real prose that comes with the package."""

from __future__ import annotations

from importlib import resources

__all__ = ["packaged_novel"]


def packaged_novel() -> str:
    """Jane Austen's *Persuasion*; ``data/PROVENANCE.md`` says where it comes from."""
    novel = resources.files("lucid_attention.tasks") / "data" / "persuasion.txt"
    return novel.read_text(encoding="utf-8")
