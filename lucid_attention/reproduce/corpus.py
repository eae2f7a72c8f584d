"""Texts that are on every machine that trains: the sources of Python, or of the libraries too, and a novel."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from .experiment import ReproduceError

__all__ = ["CORPORA", "corpus_id", "write_corpus"]

CORPORA = {"stdlib": "stdlib", "libraries": "libraries-2"}
"""Names of texts, and of their folders, which change with what `write_corpus` takes."""

_LIBRARIES = ("torch", "transformers", "sympy", "numpy", "networkx", "accelerate")
"""What a training needs, and what that needs: they are installed wherever one is run."""


def corpus_id(path: Path) -> str:
    """The beginning of its SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def write_corpus(path: Path, *, libraries: bool = False, tiny: bool = False) -> Path:
    """One JSON line for each document, in an order that a hash of their names gives; kept if it is there.

    Some 30 MB, 9 million tokens where Python has its own tests with it; with ``libraries`` some 140 MB, more than any
    experiment reads once. The content follows the installation, so `corpus_id` says which it was.

    With ``libraries`` a document is left out when more than half of its lines of 30 characters and more are in those before it:
    libraries copy from themselves (three quarters of such lines of transformers are in several of its files), and a text that is
    met once should not come again under another name.

    Raises:
        ReproduceError: a library that the text is made of is not installed.
    """
    if path.is_file():
        return path
    from lucid_attention.tasks.novel import packaged_novel
    from lucid_attention.train.tasks import part_of

    standard = Path(sysconfig.get_paths()["stdlib"])
    names = _sources(standard, without={"site-packages", "dist-packages"})
    for library in _LIBRARIES if libraries else ():
        spec = find_spec(library)
        if spec is None or not spec.submodule_search_locations:
            raise ReproduceError(
                f"{library}: is not installed, and its sources are part of the text; pip install {library}"
            )
        for folder in spec.submodule_search_locations:
            found = _sources(Path(folder))
            names |= {f"{library}/{name}": file for name, file in found.items()}
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    partial, known = path.with_suffix(".partial"), set[str]()
    with partial.open("w", encoding="utf-8") as out:
        # Without its last fifth, in which the needles are hidden that models are tested with.
        novel = part_of(packaged_novel(), False)
        out.write(json.dumps({"text": novel[:50_000] if tiny else novel}) + "\n")
        for name in order[:20] if tiny else order:
            try:
                text = names[name].read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # tests of encodings
            if not text.strip() or "\0" in text:
                continue
            if libraries:
                lines = {line for line in map(str.strip, text.split("\n")) if len(line) >= 30}
                if 2 * len(lines & known) > len(lines):
                    continue
                known |= lines
            out.write(json.dumps({"text": text}) + "\n")
    partial.replace(path)
    return path


def _sources(root: Path, without: frozenset[str] | set[str] = frozenset()) -> dict[str, Path]:
    """Python files by their place under ``root``."""
    unwanted = {"__pycache__", *without}
    files = {str(file.relative_to(root)): file for file in root.rglob("*.py")}
    return {name: file for name, file in files.items() if not unwanted & set(Path(name).parts)}
