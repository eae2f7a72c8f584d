"""What a user meets first: imports, public names, docstrings' examples, the README's snippet."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lucid_attention

ROOT = Path(__file__).parent.parent


EXTRAS = {
    "transformers", "accelerate", "peft", "safetensors", "tokenizers",
    "typer", "rich", "matplotlib", "huggingface_hub", "datasets", "lm_eval",
}  # fmt: skip


def run_fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_needs_torch_only() -> None:
    """In a fresh process: no transformers, no kernels, no CUDA initialisation.

    PyTorch's own compiler imports Triton where it is installed, so that is not asked for here.
    """
    loaded = run_fresh(
        "import sys, lucid_attention, torch\n"
        "assert 'lucid_attention.precondition.kernels' not in sys.modules\n"
        "print(' '.join({name.split('.')[0] for name in sys.modules}))\n"
        "print(torch.cuda.is_initialized())"
    )
    modules, cuda = loaded.rsplit("\n", 1)
    assert not EXTRAS & set(modules.split())
    assert cuda == "False"
    assert run_fresh(
        "import sys\nsys.modules['transformers'] = sys.modules['triton'] = None\n"
        "import lucid_attention, torch\n"
        "x = torch.ones(1, 1, 3, 4)\nprint(lucid_attention.lucid_attention(x, x, x).shape)"
    ).endswith("([1, 1, 3, 4])")


def test_public_names() -> None:
    for name in lucid_attention.__all__:
        thing = getattr(lucid_attention, name)
        assert thing.__doc__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.\w+)?", lucid_attention.__version__)


MODULES = sorted(
    module.name for module in pkgutil.walk_packages(lucid_attention.__path__, "lucid_attention.")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_public_functions_have_examples_that_ran() -> None:
    finder = doctest.DocTestFinder()
    for function in ("precondition", "precondition_varlen", "lucid_attention", "lucid_attention_varlen"):  # fmt: skip
        (test,) = finder.find(getattr(lucid_attention, function), function)
        assert test.examples


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize(
    "page",
    ["README.md", "lucid_attention/precondition/README.md", "lucid_attention/decode/README.md"],
)
def test_snippets_run(page: str) -> None:
    found = snippets(page)
    assert found
    for snippet in found:
        exec(compile(snippet, page, "exec"), {})
