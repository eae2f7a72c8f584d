"""The command line: help, version, exit codes, and a real Ctrl-C in a real process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lucid_attention
from lucid_attention import cli

# The real command at tiny sizes; bars report often so that the test knows how far it has come.
CHILD = """
from dataclasses import replace
from lucid_attention import cli
from lucid_attention.demo import configuration, progress
memory = configuration.MemoryConfig(
    keys=8, values=8, width=16, train_length=16, test_lengths=(16, 32), steps=4, batch=4,
    warmup_steps=2, test_positions=256,
)
language_model = configuration.LanguageModelConfig(
    vocabulary=300, width=16, mlp_width=16, heads=2, kv_heads=1, context=16, steps=60_000, batch=2,
    warmup_steps=1, evaluations=60_000, minimum_characters=400, new_tokens=6,
)
tiny = configuration.DemoConfig(memory=memory, language_model=language_model)
configuration.DemoConfig.quick = staticmethod(lambda *, seed: replace(tiny, seed=seed))
progress._LOG_SECONDS = 0.1
cli.main()
"""


def lucid(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.build_app(), list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def test_version() -> None:
    assert lucid("--version") == (0, f"lucid-attention {lucid_attention.__version__}\n")


def test_help_tells_what_runs_how_long_and_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    code, text = lucid("demo", "--help")
    assert code == 0
    for said in ("--out", "--text", "--seed", "--quick", "minutes on two quiet", "results.json"):
        assert said in text
    for said in ("memory.csv", "loss.csv", "summary.png", "checkpoint", "Ctrl-C", "130"):
        assert said in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b"\x80\x81" * 20_000, "is not UTF-8 text"),
        (b"words\0" * 20_000, "is binary"),
        (b"Too short.", "is too short, 10 characters; at least 20,000 are needed"),
    ],
)
def test_bad_text_is_one_line_and_nothing_is_written(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "bad.txt").write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    code, output = lucid("demo", "--text", "bad.txt")
    assert code == 2
    assert output.startswith("lucid demo: --text bad.txt: ")
    assert message in output
    assert output.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = lucid("demo", "--text", str(tmp_path))
    assert code == 2
    assert output == f"lucid demo: --text {tmp_path}: is a folder; name one plain-text file\n"
    assert not any(tmp_path.iterdir())


def test_a_used_results_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    code, output = lucid("demo", "--out", str(tmp_path))
    assert code == 2
    assert output == f"lucid demo: --out {tmp_path}: is not empty; name a new or an empty folder\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_negative_seed_is_refused() -> None:
    code, output = lucid("demo", "--seed", "-1")
    assert code == 2
    assert "--seed" in output


def test_missing_extras_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_NEEDED", ("typer", "no_such_library_a", "no_such_library_b"))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err == (
        "lucid: needs no_such_library_a, no_such_library_b; "
        "run: pip install 'lucid-attention[demo]'\n"
    )


def test_importing_the_command_needs_torch_only() -> None:
    code = (
        "import sys, lucid_attention.cli\n"
        "extra = {'typer', 'rich', 'matplotlib', 'transformers'} & set(sys.modules)\n"
        "assert not extra, extra"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("\n".join(f"Sentence {n} counts {n * n} stars." for n in range(60)))
    out, log = tmp_path / "out", tmp_path / "log.txt"
    command = [sys.executable, "-c", CHILD, "demo", "--quick", "--seed", "7"]
    with log.open("w") as stream:
        child = subprocess.Popen(
            [*command, "--text", str(words), "--out", str(out)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # A shell may start its background jobs with SIGINT ignored; the test must not inherit.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        try:
            deadline = time.monotonic() + 120
            while "Llama, LUCID" not in log.read_text() or not (out / "memory.png").exists():
                assert child.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            time.sleep(1.0)
            child.send_signal(signal.SIGINT)
            code = child.wait(timeout=60)
        finally:
            child.kill()
    said = log.read_text()
    assert code == 130, said
    assert "Traceback" not in said
    assert f"Results in {out}: loss.csv, memory.csv, memory.png, results.json" in said
    results = json.loads((out / "results.json").read_text())
    assert results["status"] == "interrupted"
    assert results["config"]["seed"] == 7
    assert len(results["memory"]["curves"]) == 4
    assert results["language_model"]["curves"][0]["seconds"] is None
    assert not list(out.glob(".*"))
