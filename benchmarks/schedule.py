"""How long the order of blocks alone keeps a GPU from being busy: a simulation, on any machine.

    python -m benchmarks.schedule

Programs take tickets in the order of `plan.rounds`, as Hopper's kernels do: block row ``p`` of a chain takes
``START``, then a unit of time for each block before it, once that one is done, then ``END``. Writes
``schedule.csv`` into ``benchmarks/results``: the time until all are done, relative to the work divided by the
multiprocessors. ``parts``: the last eighth of the rows of blocks split over so many programs, each but the last of which hands
over its sum in a unit. ``waits`` "no": blocks need not wait for others.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.solve import RESULTS
from lucid_attention.precondition.kernels.plan import Geometry, rounds

MULTIPROCESSORS = 132
START, END, HANDED_OVER = 1.0, 2.0, 1.0
SHAPES = [(256, 16), (32, 32), (8, 32), (1, 64), (8, 128), (16, 128), (8, 256), (16, 256)]


def in_order(chains: int, blocks: int) -> Iterator[tuple[int, int]]:
    """Tickets as (chain, row of blocks); what ``place_ticket`` computes on the device."""
    wide, deep = rounds(Geometry(torch.empty(1, chains, 128 * blocks, 1, device="meta"), 128))
    low, high = 0, deep
    while low < blocks:
        for first in range(0, chains, wide):
            for row in range(low, min(high, blocks)):
                for chain in range(first, min(first + wide, chains)):
                    yield chain, row
        low, high, wide = high, 2 * high, max(wide // 2, 1)


def makespan(chains: int, blocks: int, *, parts: int = 1, waits: bool = True) -> float:
    """Time until all blocks are done, over the work without the splitting's, divided by the multiprocessors."""
    done: dict[tuple[int, int], float] = {}
    free = [0.0] * MULTIPROCESSORS
    for chain, row in in_order(chains, blocks):
        pieces = parts if row >= blocks * 7 // 8 else 1
        cuts = [row * piece // pieces for piece in range(pieces + 1)]
        sums = 0.0
        for piece in range(pieces):
            now = heapq.heappop(free) + START
            for before in range(cuts[piece], cuts[piece + 1]):
                now = (max(now, done[chain, before]) if waits else now) + 1
            if piece < pieces - 1:
                now += HANDED_OVER
                sums = max(sums, now)
            else:
                now = max(now, sums) + END
                done[chain, row] = now
            heapq.heappush(free, now)
    work = chains * blocks * ((blocks - 1) / 2 + START + END)
    return max(free) / (work / MULTIPROCESSORS)


def main(out: Path = RESULTS) -> None:
    rows: list[dict[str, Any]] = []
    for chains, blocks in SHAPES:
        for parts, waits in ((1, True), (1, False), (2, True), (3, True)):
            relative = makespan(chains, blocks, parts=parts, waits=waits)
            rows.append(
                {
                    "chains": chains, "seq": 128 * blocks, "parts": parts,
                    "waits": "yes" if waits else "no", "relative": round(relative, 3),
                }
            )  # fmt: skip
            print(*rows[-1].values())
    report.write_csv(rows, out / "schedule.csv")


if __name__ == "__main__":
    main()
