"""What the assembler made of the kernels: no operand descriptor of a product from a kernel argument.

Triton 3.6's assembler spoiled a build that way; the solve of head sizes 17 and 40 then read memory that
was not its own. Values show such a thing on a card only, and only in the builds that a test happens to run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("machine_code.py")
PORTABLE = [(16, 16), (17, 40), (24, 64), (64, 32), (68, 68), (100, 56), (128, 68), (160, 36), (256, 256)]  # fmt: skip
HOPPER = [
    (64, 64),
    (128, 128),
    (128, 64),
    (64, 128),
    (68, 68),
    (96, 96),
    (256, 256),
    (136, 136),
    (192, 128),
]


def report_of(*jobs: object) -> list[dict[str, Any]]:
    root = SCRIPT.parents[3]
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(jobs)],
        capture_output=True, text=True, env=environment, cwd=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("sizes", PORTABLE, ids=str)
def test_portable_kernels(sizes: tuple[int, int]) -> None:
    found = report_of([*sizes, 300, False, False])
    assert {line["kernel"] for line in found} >= {"solve_kernel", "adjoint_kernel", "toward_kernel", "answer_kernel"}  # fmt: skip
    assert [line for line in found if line["spoiled"]] == []
    assert all(line["products"] for line in found if line["kernel"] == "solve_kernel")


@pytest.mark.parametrize(("sizes", "late"), [*((sizes, False) for sizes in HOPPER), ((64, 64), True)])  # fmt: skip
def test_hopper_kernels(sizes: tuple[int, int], late: bool) -> None:
    found = report_of([*sizes, 300, True, late])
    names = {line["kernel"] for line in found}
    assert "hopper_solve_kernel" in names
    one_sweep = sizes[1] <= sizes[0] <= 128
    assert ("hopper_adjoint_kernel" in names) == one_sweep
    assert ("hopper_toward_kernel" in names) == (not one_sweep)
    assert ("hopper_inverse_kernel" in names) == (max(sizes) <= 128)
    assert ("inverse_kernel" in names) == (max(sizes) > 128)
    assert not names & {"solve_kernel", "adjoint_kernel", "toward_kernel"}
    assert [line for line in found if line["spoiled"] or line["serialised"]] == []
    # What the instruction cache holds. The first builds are without a strength, which adds some 9 KB to the adjoint.
    first = {line["kernel"]: line["bytes"] for line in reversed(found)}
    assert {name for name, size in first.items() if size > 128 * 1024} == set()
    # Rows of 68 begin at multiples of 8 bytes only; one entry at a time costs five times as long.
    assert all(line["single"] == 0 for line in found if line["kernel"] == "finish_kernel")


@pytest.mark.parametrize(
    ("sizes", "blocks"), [*((sizes, "few") for sizes in HOPPER if max(sizes) <= 128), ((128, 128), "some"), ((68, 68), "some"), ((64, 128), "some")]
)  # fmt: skip
def test_hopper_kernels_of_few_blocks(sizes: tuple[int, int], blocks: str) -> None:
    """And of few chains: `hopper_links`."""
    found = report_of([*sizes, 300, True, False, "default", blocks])
    names = {line["kernel"] for line in found}
    apart = blocks == "few" or sizes[1] > sizes[0]
    assert ("hopper_adjoint_kernel" in names) == (not apart)
    assert ("hopper_toward_kernel" in names) == apart
    assert [line for line in found if line["spoiled"] or line["serialised"]] == []
    assert all(
        line["bytes"] <= 128 * 1024 for line in found if line["kernel"] != "hopper_adjoint_kernel"
    )
    # Half a word over a mark would be taken for a word.
    assert all(line["single"] == 0 for line in found if line["kernel"] == "hopper_solve_kernel")


@pytest.mark.parametrize("sizes", HOPPER, ids=str)
def test_hopper_kernels_in_high_precision(sizes: tuple[int, int]) -> None:
    found = report_of([*sizes, 300, True, False, "high"])
    names = {line["kernel"] for line in found}
    assert names >= {"hopper_solve_kernel", "hopper_toward_kernel"}
    assert not names & {"solve_kernel", "adjoint_kernel", "toward_kernel", "hopper_adjoint_kernel"}
    assert [line for line in found if line["spoiled"] or line["serialised"]] == []
    assert all(line["single"] == 0 for line in found if line["kernel"] == "finish_kernel")


DECODE = [  # head size, value size, query heads a KV head, tokens, page, ragged
    (64, 64, 8, 1, 0, False), (128, 128, 4, 1, 0, False), (128, 128, 4, 1, 64, True), (128, 64, 3, 4, 256, False),
    (80, 112, 7, 2, 0, True), (256, 256, 1, 1, 0, True), (64, 64, 7, 8, 0, False),
]  # fmt: skip


@pytest.mark.parametrize("hopper", [False, True])
def test_decode_kernels(hopper: bool) -> None:
    found = report_of(*[["decode", *case, hopper] for case in DECODE])
    assert len(found) == len(DECODE)
    name = "hopper_decode_kernel" if hopper else "decode_kernel"
    assert {line["kernel"] for line in found} == {name}
    assert [line for line in found if line["spoiled"]] == []
    if hopper:
        assert all(line["products"] for line in found)


def test_the_scan_finds_the_build_that_is_known_bad() -> None:
    """With the Triton of constraints.txt, 3.6.0; a newer one may need another build, or none of this file."""
    (line,) = report_of("known bad")
    assert line["spoiled"]
