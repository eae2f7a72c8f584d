"""Launches by address pass on what Triton's own way passes on: every argument, in its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("launched.py")


LONG = [
    (20, 68, False, "few"),
    (64, 64, True, "few"),
    (64, 64, True, "many"),
    (68, 68, True, "few"),
    (68, 68, True, "many"),
    (128, 64, True, "many"),
    (64, 128, True, "some"),
    (128, 128, True, "few"),
    (128, 128, True, "some"),
    (256, 256, True, "many"),
]


@pytest.mark.parametrize(
    "sizes",
    [(16, 16, False, "few"), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in LONG)],
    ids=str,
)
def test_every_argument_is_in_its_place(sizes: tuple[int, int, bool, str]) -> None:
    root = SCRIPT.parents[3]
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps([sizes])],
        capture_output=True, text=True, env=environment, cwd=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert [line["kind"] for line in report] == ["plain", "masked", "packed"]
    for line in report:
        assert len(line["kernels"]) >= 5
        assert line["direct"] == [True, True]  # the solve's and the adjoint's call
        assert line["differ"] == []
