"""Tiles: what is local comes out as if it were done at once, and nothing jumps where tiles meet."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgen.pipelines.tiles import in_tiles

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(8, 16), st.integers(1, 3))
def test_what_is_local_comes_out_as_if_done_at_once(height: int, width: int, tile: int, factor: int) -> None:
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))

    def enlarge(rows: slice, columns: slice) -> torch.Tensor:
        return x[..., rows, columns].repeat_interleave(factor, -1).repeat_interleave(factor, -2)

    result = in_tiles(enlarge, x.shape, tile=tile, device=CPU, factor=factor)
    torch.testing.assert_close(result, enlarge(slice(None), slice(None)), rtol=1e-6, atol=1e-6)


def test_no_tile_is_larger_than_asked_and_all_are_inside() -> None:
    seen = []

    def work(rows: slice, columns: slice) -> torch.Tensor:
        seen.append((rows, columns))
        return torch.ones(1, rows.stop - rows.start, columns.stop - columns.start)

    in_tiles(work, (1, 50, 70), tile=16, device=CPU)
    assert len(seen) == 4 * 6
    assert all(rows.stop - rows.start == 16 and columns.stop - columns.start == 16 for rows, columns in seen)
    assert all(rows.start >= 0 and rows.stop <= 50 for rows, _ in seen)
    assert all(columns.start >= 0 and columns.stop <= 70 for _, columns in seen)


@pytest.mark.parametrize("tile", [8, 16, 64])
def test_tiles_that_disagree_are_blended_without_a_jump(tile: int) -> None:
    values = iter(range(10_000))

    def work(rows: slice, columns: slice) -> torch.Tensor:
        return torch.full((1, rows.stop - rows.start, columns.stop - columns.start), next(values) % 2)

    result = in_tiles(work, (1, 3 * tile, 3 * tile), tile=tile, device=CPU)
    steepest = 1 / (tile // 4)
    for dim in (-1, -2):
        assert result.diff(dim=dim).abs().max() <= steepest + 1e-6
