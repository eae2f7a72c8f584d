"""Bars that a log file can hold: plain lines, the last one complete."""

from __future__ import annotations

import pytest

from lucid_attention.demo import progress as progress_module
from lucid_attention.demo.progress import progress


def test_outside_a_terminal_a_bar_is_plain_lines(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "_LOG_SECONDS", 0.0)
    with progress("counting", 4) as advance:
        for _ in range(4):
            advance(1)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) >= 4
    assert all(line.startswith("counting: ") for line in lines)
    assert "0/4" in lines[0]
    assert "4/4" in lines[-1]
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_a_long_run_is_not_a_line_a_step(capfd: pytest.CaptureFixture[str]) -> None:
    with progress("counting", 500) as advance:
        for _ in range(500):
            advance(1)
    lines = capfd.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3
    assert "500/500" in lines[-1]
