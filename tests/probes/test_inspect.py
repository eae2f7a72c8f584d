"""`lucid inspect`: its files, its page in a real browser, and that mistakes are named."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from lucid_attention import cli
from lucid_attention.hf import disable, enable
from lucid_attention.probes import attention_maps, capture
from lucid_attention.probes.inspect import InspectError, inspect_text
from lucid_attention.results import FolderError
from lucid_attention.train.text import train_tokenizer

TEXT = (
    "the cat </script><b>sat</b> on the mat. The number of the red door is 1234. naïve birds & sing"
)
NEEDLE = "red door is 1234"


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    tokenizer = train_tokenizer([TEXT * 3], 300)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)  # fmt: skip
    torch.manual_seed(0)
    return enable(AutoModelForCausalLM.from_config(config)).eval(), tokenizer


def data_of(page: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    data: dict[str, Any] = json.loads(found)
    return data


def test_files(parts: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = parts
    found = inspect_text(model, tokenizer, TEXT, out=tmp_path / "out", needle=NEEDLE)
    assert {p.name for p in found.folder.iterdir()} == {"page.html", "maps.png", "diagnostics.csv", "diagnostics.json"}  # fmt: skip
    rows = list(csv.DictReader((found.folder / "diagnostics.csv").open()))
    assert len(rows) == 8 and rows[0]["layer"] == "0" and 0 < float(rows[0]["hit_rate"]) < 1
    saved = json.loads((found.folder / "diagnostics.json").read_text())
    assert saved["text"] == TEXT and len(saved["rows"]) == 8 and saved["torch"] == torch.__version__
    assert Image.open(found.folder / "maps.png").size[0] > 1000
    page = (found.folder / "page.html").read_text()
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)  # nothing from elsewhere
    data = data_of(page)
    assert "".join(data["tokens"]) == TEXT
    assert "".join(data["tokens"][i] for i in data["needle"]).strip() == NEEDLE
    assert {(m["layer"], m["head"]) for m in data["maps"]} == {(x, h) for x in (0, 2, 3) for h in range(4)}  # fmt: skip
    # A map's bytes give the weights back.
    one = next(m for m in data["maps"] if (m["layer"], m["head"]) == (2, 1))
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    exact = attention_maps(capture(model, ids, layers=[2])[0], 1)
    for side, weights in zip((one["before"], one["after"]), exact, strict=True):
        raw = base64.b64decode(side["image"].removeprefix("data:image/png;base64,"))
        x = (np.asarray(Image.open(io.BytesIO(raw))).astype(float) - 128) / 127
        assert np.abs(np.sign(x) * x * x * side["largest"] - weights.numpy()).max() < 0.01 * side["largest"]  # fmt: skip


def test_softmax_models_and_chosen_layers(parts: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = parts
    import copy

    softmax = disable(copy.deepcopy(model))
    found = inspect_text(softmax, tokenizer, TEXT, out=tmp_path / "out", layers=[1])
    assert "0 of 4 full-attention layers LUCID" in found.note
    assert "looked at as if they were LUCID of strength 1" in found.note
    data = data_of((found.folder / "page.html").read_text())
    assert {m["layer"] for m in data["maps"]} == {1} and data["rows"][0]["hit_rate"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "t"}, "expected 2 to 1024 tokens, got 1"),
        ({"text": "the cat " * 2000}, "expected 2 to 1024 tokens, got"),
        ({"needle": "unicorn"}, "--needle: is not in the text: 'unicorn'"),
        ({"needle": ""}, "--needle: is not in the text: ''"),
        ({"layers": [9]}, "--layers: expected full-attention layers, 0, 1, 2, 3, got 9"),
        ({"strength": 2.0}, "strength"),
    ],
)
def test_bad_input(
    parts: tuple[Any, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InspectError, match=message):
        inspect_text(*parts, **{"text": TEXT, "out": tmp_path / "out", **changes})
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_drawn(parts: tuple[Any, Any], tmp_path: Path) -> None:
    import copy

    from transformers import ByT5Tokenizer

    model, tokenizer = parts
    with pytest.raises(InspectError, match="ByT5Tokenizer, does not say where its tokens are"):
        inspect_text(model, ByT5Tokenizer(), TEXT, out=tmp_path / "out")
    broken = copy.deepcopy(model)
    broken.model.layers[2].self_attn.v_proj.weight.data[0] = float("nan")
    with pytest.raises(InspectError, match="layer 2 are not finite"):
        inspect_text(broken, tokenizer, TEXT, out=tmp_path / "out")


def test_nothing_is_overwritten(parts: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FolderError, match="is not empty"):
        inspect_text(*parts, TEXT, out=tmp_path)


def test_the_command(parts: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = parts
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    app = cli.build_app()

    def lucid(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["inspect", str(tmp_path / "model"), *arguments])
        return result.exit_code, result.output

    out = tmp_path / "out"
    code, text = lucid("--prompt", TEXT, "--needle", NEEDLE, "--layers", "0,3", "--out", str(out))
    assert code == 0 and "LucidLlamaForCausalLM, 4 of 4" in text and (out / "page.html").exists()
    assert lucid("--prompt", TEXT, "--layers", "x")[0] == 2
    assert lucid()[0] == 2
    code, text = lucid("--prompt", TEXT, "--out", str(out))
    assert code == 2 and "is not empty" in text


@pytest.mark.browser
def test_the_page_in_a_browser(parts: tuple[Any, Any], tmp_path: Path) -> None:
    """Chromium runs the page: maps are drawn, the text is shown as it is, a click chooses a token."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)  # fmt: skip
    assert browser, "needs chromium or google-chrome (Debian: apt install chromium)"
    found = inspect_text(*parts, TEXT, out=tmp_path / "out", needle=NEEDLE)
    page = found.folder / "page.html"
    probe = """<script>
      const wait = setInterval(() => {
        if (document.body.dataset.ready !== "0.0") return;
        clearInterval(wait);
        const pixel = (id, x, y) => [...document.getElementById(id).getContext("2d").getImageData(x, y, 1, 1).data];
        document.body.dataset.first = pixel("before", 0, 0).join();
        document.body.dataset.future = pixel("before", 5, 0).join();
        document.getElementById("text").children[3].click();
        document.body.dataset.clicked = document.getElementById("read").textContent;
        document.getElementById("layer").value = "3";
        document.getElementById("layer").dispatchEvent(new Event("change"));
      }, 20);
    </script></body>"""
    page.write_text(page.read_text().replace("</body>", probe))
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom", page.as_uri()]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert 'data-ready="3.0"' in dom
    assert 'data-first="213,94,0,255"' in dom and 'data-future="255,255,255,255"' in dom
    assert re.search(r'data-clicked="query 3 ', dom)
    assert dom.count('class="needle"') > 2
    shown = dom.split('attends to">')[1].split("</div>")[0]
    assert html.unescape(re.sub(r"<[^>]*>", "", shown)) == TEXT
    assert len(re.findall(r'<tr data-layer="\d"|<tr[^>]*data-kv=', dom)) == 8
