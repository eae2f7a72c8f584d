"""Which kernel a call gets, from shapes alone."""

from __future__ import annotations

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
