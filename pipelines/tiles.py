"""Work in overlapping tiles, blended where they overlap."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def in_tiles(
    work: Callable[[slice, slice], Tensor],
    shape: Sequence[int],
    *,
    tile: int,
    device: torch.device,
    factor: int = 1,
) -> Tensor:
    """Apply `work` to square tiles that overlap by a quarter, and blend the results linearly.

    Args:
        work: returns the result [..., h * factor, w * factor] for h rows and w columns of its input.
        shape: [..., height, width]: leading dimensions of the result, height and width of the input.
        tile: side of a tile; a shorter side of the input is one tile.
        device: of the result.
        factor: pixels of the result per pixel of the input, along each side.

    Returns:
        float32 [..., height * factor, width * factor].
    """
    *leading, height, width = shape
    overlap = max(tile // 4, 1)
    sides = min(tile, height), min(tile, width)
    down, across = (_ramp(side * factor, overlap * factor) for side in sides)
    mask = (down[:, None] * across).to(device)
    total = torch.zeros((*leading, height * factor, width * factor), device=device)
    weights = torch.zeros(total.shape[-2:], device=device)
    for top, left in itertools.product(tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)):
        piece = work(slice(top, top + sides[0]), slice(left, left + sides[1]))
        rows = slice(top * factor, (top + sides[0]) * factor)
        columns = slice(left * factor, (left + sides[1]) * factor)
        total[..., rows, columns] += piece * mask
        weights[rows, columns] += mask
    return total.div_(weights)


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles begin along one side; the last one ends with the side."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def _ramp(length: int, overlap: int) -> Tensor:
    """Weights [length] that rise from both ends over `overlap` pixels and are never 0."""
    distance = torch.arange(length, dtype=torch.float32) + 0.5
    return (torch.minimum(distance, length - distance) / overlap).clamp(max=1)
