"""Attention maps as one HTML page that needs nothing else: data, style and script are in it."""

from __future__ import annotations

import base64
import html
import io
import json
from importlib import resources
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["map_image", "page"]


def map_image(weights: Tensor) -> dict[str, Any]:
    """A map as an image of one byte a weight: the sign and the root of its size, 128 is 0.

    Returns:
        ``image``: a PNG as a data URI; ``largest``: the weight that 255 stands for, and 1 its negative.
    """
    from PIL import Image

    values = weights.numpy()
    largest = float(np.abs(values).max()) or 1.0
    scaled = np.sign(values) * np.sqrt(np.abs(values) / largest)
    pixels = np.rint(128 + 127 * scaled).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode="L").save(buffer, format="PNG", optimize=True)
    return {
        "image": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(),
        "largest": largest,
    }


def page(
    title: str,
    note: str,
    tokens: list[str],
    maps: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    needle: list[int],
) -> str:
    """The page.

    Args:
        title, note: what was looked at, with which model.
        tokens: of the text.
        maps: for each ``layer`` and ``head``: ``before`` and ``after``, from `map_image`.
        rows: the diagnostics, numbers by name.
        needle: positions that are marked.
    """
    template = (resources.files("lucid_attention.probes") / "page.html").read_text("utf-8")
    data = {"tokens": tokens, "maps": maps, "rows": rows, "needle": needle}
    # A "</script>" in the text must not end the script that holds it.
    encoded = json.dumps(data).replace("<", "\\u003c")
    for name, content in (("TITLE", html.escape(title)), ("NOTE", html.escape(note)), ("DATA", encoded)):  # fmt: skip
        template = template.replace(f"@{name}@", content)
    return template
