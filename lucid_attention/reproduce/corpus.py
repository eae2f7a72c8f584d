"""A text that is on every machine: the source of Python's standard library and a novel."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from pathlib import Path

__all__ = ["corpus_id", "write_corpus"]


def corpus_id(path: Path) -> str:
    """The beginning of its SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def write_corpus(path: Path, *, tiny: bool = False) -> Path:
    """One JSON line for each document, in an order that a hash of their names gives; kept if it is there.

    Some 30 MB, 9 million tokens where Python has its own tests with it; the content follows the installation, so `corpus_id` says
    which it was.
    """
    if path.is_file():
        return path
    from lucid_attention.tasks.novel import packaged_novel
    from lucid_attention.train.tasks import part_of

    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        file
        for file in root.rglob("*.py")
        if not {"site-packages", "dist-packages", "__pycache__"} & set(file.relative_to(root).parts)
    ]
    names = {str(file.relative_to(root)): file for file in files}
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as out:
        # Without its last fifth, in which the needles are hidden that models are tested with.
        novel = part_of(packaged_novel(), False)
        out.write(json.dumps({"text": novel[:50_000] if tiny else novel}) + "\n")
        for name in order[:20] if tiny else order:
            try:
                text = names[name].read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # tests of encodings
            if text.strip() and "\0" not in text:
                out.write(json.dumps({"text": text}) + "\n")
    partial.replace(path)
    return path
