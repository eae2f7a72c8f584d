"""The simulated schedule: its order is the kernels', its bounds are right."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.schedule import END, MULTIPROCESSORS, START, in_order, makespan


@pytest.mark.parametrize(("chains", "blocks"), [(1, 7), (5, 40), (200, 3), (64, 20)])
def test_every_block_once_after_those_before_it(chains: int, blocks: int) -> None:
    places = list(in_order(chains, blocks))
    assert len(set(places)) == len(places) == chains * blocks
    for chain in range(chains):
        assert [row for c, row in places if c == chain] == list(range(blocks))


def test_bounds() -> None:
    # One chain: every block waits for the one before it, which leaves a unit and the end for each.
    alone = makespan(1, 9) * 9 * (4 + START + END) / MULTIPROCESSORS
    assert alone == START + END + 8 * (1 + END)
    # Blocks of one row: nothing waits, and the work is divided evenly.
    assert makespan(4 * MULTIPROCESSORS, 1) == 1
    for chains, blocks in ((32, 32), (8, 128)):
        assert makespan(chains, blocks) > makespan(chains, blocks, waits=False) > 1
