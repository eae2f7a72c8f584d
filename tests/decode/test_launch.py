"""Which kernel a call gets, from shapes alone."""

from __future__ import annotations

import math

import pytest
import torch

from lucid_attention.decode import launch


def test_hoppers_kernel_has_room_for_all_that_the_kernels_take() -> None:
    """Two tiles of each ring at least, in shared memory, at every width and number of rows."""
    pytest.importorskip("triton")
    from lucid_attention.decode import hopper

    for width in (16, 64, 68, 128, 160, 256):
        for value_width in (16, 64, 68, 128, 132, 192, 256):
            for used in range(2, 65):
                query = torch.empty(1, used - 1, 1, width)
                key, value = torch.empty(1, 1, 1, width), torch.empty(1, 1, 1, value_width)
                if launch.why_not_this_many(query, key, value) is None:
                    rows = max(16, 1 << (used - 1).bit_length())
                    d, e = hopper.columns_of(width), hopper.columns_of(value_width)
                    tile, stages = hopper.tile_for(rows, d, e, 0)
                    assert stages >= 2 and stages % 2 == 0, (width, value_width, used)
                    assert tile in (64, 128)


def test_too_many_rows_or_tokens_are_said() -> None:
    key = torch.empty(1, 1, 17, 64)
    assert "up to 16 new tokens" in str(launch.why_not_this_many(key, key, key))
    query, key = torch.empty(1, 33, 2, 64), torch.empty(1, 1, 2, 64)
    assert "up to 64 at this value width, got 68" in str(launch.why_not_this_many(query, key, key))
    wide = torch.empty(1, 1, 2, 256)
    assert "up to 32" in str(launch.why_not_this_many(query, key, wide))


def test_programs_of_hoppers_kernel() -> None:
    """All multiprocessors, or half of them where these read fast enough and parts are added up in fewer rounds; never more than there are tiles."""
    pytest.importorskip("triton")
    from lucid_attention.decode.hopper import programs_for, rounds_of

    # By hand: 16 parts at once of 9 rows and 64 columns; 4 of 17 rows and 128 columns, 132 = 12 x 11 and 64 = 8 x 8 of them.
    assert [rounds_of(n, 9, 64) for n in (1, 16, 17, 33, 48, 49)] == [0, 1, 2, 3, 3, 2]
    assert [rounds_of(n, 17, 128) for n in (132, 66, 64, 12)] == [6, 5, 4, 3]
    H100, H200 = 3352.3, 4916.7  # GB/s
    assert programs_for(132, H100, 4, 1000, False, 9, 64) == (64, 16)
    assert programs_for(132, H200, 4, 1000, False, 9, 64) == (132, 33)
    assert programs_for(132, H100, 1, 1000, False, 17, 128) == (64, 64)
    assert programs_for(132, H200, 1, 1000, False, 17, 128) == (132, 132)
    assert programs_for(132, H100, 8, 1000, False, 5, 128) == (128, 16)
    assert programs_for(132, H100, 4, 1000, False, 9, 128) == (132, 33)
    assert programs_for(132, H100, 4, 3, False, 9, 64) == (12, 3)
    # More heads than multiprocessors; rows of several lengths.
    assert programs_for(132, H100, 200, 5, False, 5, 128) == (132, 0)
    assert programs_for(132, H100, 40, 1000, True, 5, 128) == (132, 0)
    for rate in (H100, H200, math.inf):
        for chains in range(1, 140):
            for used in (2, 9, 33):
                programs, each = programs_for(132, rate, chains, 1000, False, used, 128)
                assert programs <= 132 and programs == (chains * each if each else 132)


def test_a_triton_that_does_not_know_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding goes on, with all multiprocessors."""
    testing = pytest.importorskip("triton.testing")
    monkeypatch.delattr(testing, "get_dram_gbps")
    assert launch.memory_rate.__wrapped__(torch.device("cuda", 0)) == math.inf
