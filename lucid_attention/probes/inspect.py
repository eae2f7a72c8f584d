"""What `lucid inspect` does: maps and numbers of a checkpoint on a text, as pictures, a page and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lucid_attention.results import ResultsFolder, environment_facts

from .capture import LayerTensors, capture
from .diagnostics import HeadDiagnosis, diagnose
from .maps import attention_maps
from .page import map_image, page

__all__ = ["InspectError", "Inspection", "inspect_text"]

MOST_TOKENS = 1024
"""Of maps: more cannot be told apart on a screen."""
_MOST_LAYERS = 3


class InspectError(ValueError):
    """Something the user can put right; its message is one line."""


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        folder: with ``maps.png``, ``page.html``, ``diagnostics.csv`` and ``diagnostics.json``.
        rows: the diagnostics.
        note: about the model and the text.
    """

    folder: Path
    rows: list[HeadDiagnosis]
    note: str


def inspect_text(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    out: Path | None = None,
    needle: str | None = None,
    layers: Sequence[int] | None = None,
    strength: float | None = None,
) -> Inspection:
    """Draw a model's attention on a text before and after preconditioning, and measure it.

    Args:
        model, tokenizer: a transformers decoder, LUCID or softmax.
        text: at most 1024 tokens.
        out: the folder, new or empty; None makes ``results/inspect-YYYYmmdd-HHMMSS``.
        needle: a part of the text that its last token ought to attend to, for the hit rate.
        layers: whose maps are drawn; None: the first, the middle and the last. All layers are measured.
        strength: instead of the model's own; a softmax model is looked at as if it were LUCID of strength 1.

    Raises:
        InspectError: a text too short or too long, a needle that is not in it, a layer that does not exist.
        FolderError: the folder is in use.
    """
    out = None if out is None else Path(out)
    ResultsFolder.check(out)
    if layers is not None and not list(layers):
        raise InspectError("layers: expected at least one, or None, got none")
    if not tokenizer.is_fast:
        raise InspectError(
            f"the tokenizer, {type(tokenizer).__name__}, does not say where its tokens are in the text: a fast one is needed"
        )
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if not 2 <= len(ids) <= MOST_TOKENS:
        raise InspectError(f"the text: expected 2 to {MOST_TOKENS} tokens, got {len(ids)}")
    places = _needle_tokens(text, needle, offsets)
    tensor = torch.tensor([ids], device=model.device)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    try:
        captured = capture(model, tensor)
        shown = _shown(captured, layers)
        rows = diagnose(model, tensor, needle=places, strength=strength)
    except ValueError as error:
        raise InspectError(str(error)) from None
    except IndexError:
        if most is None or len(ids) <= most:
            raise
        raise InspectError(
            f"the text: the model does not go beyond its {most} positions, and these are {len(ids)} tokens"
        ) from None
    for layer in captured:
        if not all(bool(x.isfinite().all()) for x in (layer.query, layer.key, layer.value)):
            raise InspectError(
                f"the model: the queries, keys or values of layer {layer.layer} are not finite on this text; nothing can be drawn"
            )
    kind = type(model).__name__
    lucid = sum(layer.strength is not None for layer in captured)
    note = f"{kind}, {lucid} of {len(captured)} full-attention layers LUCID"
    if strength is not None:
        note += f", looked at with strength {strength:g}"
    elif lucid < len(captured):
        note += "; softmax layers are looked at as if they were LUCID of strength 1"
    note += f"; {len(ids)} tokens"
    folder = ResultsFolder.create(out, kind="inspect")
    tokens = _pieces(text, tokenizer, ids, offsets)
    maps: list[dict[str, Any]] = []
    means: list[tuple[int, Tensor, Tensor]] = []
    for layer in shown:
        sums: list[Tensor] = []
        for head in range(layer.query.shape[0]):
            both = [x.cpu() for x in attention_maps(layer, head, strength)]
            sums = both if not sums else [s + x for s, x in zip(sums, both, strict=True)]
            maps.append(
                {
                    "layer": layer.layer,
                    "head": head,
                    "kv_head": head // layer.group,
                    "before": map_image(both[0]),
                    "after": map_image(both[1]),
                }
            )
        before, after = (x / layer.query.shape[0] for x in sums)
        means.append((layer.layer, before, after))
    table = [_jsonable(asdict(row)) for row in rows]
    folder.write_text("page.html", page("Attention before and after preconditioning", note, tokens, maps, table, places))  # fmt: skip
    folder.write_bytes("maps.png", _picture(means, note, places))
    folder.write_csv("diagnostics.csv", list(table[0]), [list(row.values()) for row in table])
    folder.write_json(
        "diagnostics.json",
        {"note": note, "text": text, "needle": needle, "rows": table, **environment_facts()},
    )
    return Inspection(folder.path, rows, note)


def _needle_tokens(text: str, needle: str | None, offsets: list[tuple[int, int]]) -> list[int]:
    """Positions of the tokens that overlap the needle's first occurrence."""
    if needle is None:
        return []
    start = text.find(needle) if needle else -1
    if start < 0:
        raise InspectError(f"--needle: is not in the text: {needle!r}")
    end = start + len(needle)
    return [i for i, (a, b) in enumerate(offsets) if a < end and b > start]


def _pieces(text: str, tokenizer: Any, ids: list[int], offsets: list[tuple[int, int]]) -> list[str]:
    """Each token's part of the text; a character that several tokens share is the first one's."""
    pieces, end = [], 0
    for token, (a, b) in zip(ids, offsets, strict=True):
        pieces.append(text[max(a, end) : b] if a < b else tokenizer.decode([token]))
        end = max(end, b)
    return pieces


def _shown(captured: list[LayerTensors], layers: Sequence[int] | None) -> list[LayerTensors]:
    if not captured:
        raise InspectError("the model has no full-attention layer")
    if layers is None:
        last = len(captured) - 1
        picked = sorted({round(last * k / (_MOST_LAYERS - 1)) for k in range(_MOST_LAYERS)})
        return [captured[i] for i in picked]
    known = {layer.layer: layer for layer in captured}
    for index in layers:
        if index not in known:
            raise InspectError(
                f"--layers: expected full-attention layers, {', '.join(map(str, known))}, got {index}"
            )
    return [known[index] for index in layers]


def _jsonable(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(x, float) and not math.isfinite(x) else x
        for name, x in row.items()
    }


def _picture(means: list[tuple[int, Tensor, Tensor]], note: str, needle: list[int]) -> bytes:
    """A row for each layer: the mean over its heads before, after, and what the preconditioner changed."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import PowerNorm, SymLogNorm

    figure, axes = plt.subplots(
        len(means), 3, figsize=(11, 3.6 * len(means) + 0.5), squeeze=False, layout="constrained"
    )
    for row, (index, before, after) in zip(axes, means, strict=True):
        size = float(max(after.abs().max(), before.abs().max()))
        row[0].imshow(before.numpy(), cmap="Oranges", norm=PowerNorm(0.5, 0.0, size))
        for axis, values in ((row[1], after), (row[2], after - before)):
            axis.imshow(
                values.numpy(), cmap="RdBu_r", norm=SymLogNorm(size / 100, vmin=-size, vmax=size)
            )
        row[0].set_ylabel(f"layer {index}\nquery")
        for axis in row:
            axis.set_xlabel("key")
            for place in needle[:1] + needle[-1:]:
                axis.axvline(place, color="black", lw=0.4)
    for axis, title in zip(axes[0], ("attention A", "weights on values, A L$^{-1}$", "difference"), strict=True):  # fmt: skip
        axis.set_title(title)
    figure.suptitle(note, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return buffer.getvalue()
