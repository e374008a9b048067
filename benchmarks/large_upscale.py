"""A large image upscaled in tiles: the memory that it takes at its peak, and whether a border shows.

    python -m benchmarks.large_upscale [--model FOLDER] [--side 1024] [--steps 4] [--output FILE]

The image is a page of emoji of random sizes. At each border of tiles the mean jump between the pixels
on either side is compared with those between neighboring pixels nearby. Ends with 1 where one is larger than all of
these. Needs Debian's `fonts-noto-color-emoji` and `unicode-cldr-core`, and the `train` extra.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from latentgen.checkpoints.cascade import open_cascade
from latentgen.checkpoints.folder import EMBEDDED_DEFAULT
from latentgen.pipelines.tiles import tile_starts
from latentgen.pipelines.upscale import DEFAULT_TILE, UpscalePipeline
from latentgen.train.data.emoji import GROUNDS, EmojiSet, GlyphPlacement

CELL = 118
# How many columns or rows on either side of a border are its neighbors.
NEIGHBOURS = 12


def main() -> int:
    """Upscale, print the figures, and compare the jumps."""
    arguments = _arguments()
    image = page(arguments.side, seed=0)
    if arguments.model is None:
        pipeline = UpscalePipeline.from_checkpoint(open_cascade(EMBEDDED_DEFAULT)[1][1])
    else:
        pipeline = UpscalePipeline.from_pretrained(arguments.model)
    before, start = _peak_megabytes(), time.perf_counter()
    result = pipeline("", image=image, num_inference_steps=arguments.steps, seed=7, tile=arguments.tile)
    seconds, peak = time.perf_counter() - start, _peak_megabytes()
    assert isinstance(result.images, list)
    large = result.images[0]
    if arguments.output:
        large.save(arguments.output)
    size = f"{image.width}x{image.height} to {large.width}x{large.height}"
    print(f"{size} in {seconds:.0f} s; peak {peak:.0f} MB, of which before the call {before:.0f} MB")
    ratios = border_jumps(np.asarray(large, dtype=np.float32), arguments.tile, pipeline.scale)
    print(
        f"jump at a border over the largest next to it: {max(ratios):.2f} at most, over {len(ratios)} borders"
    )
    return int(max(ratios) > 1)


def page(side: int, seed: int) -> Image.Image:
    """A square page of emoji on grounds of all colors, whose own edges are at no tile's border."""
    rng = random.Random(seed)
    emoji = EmojiSet(image_size=CELL)
    paper = Image.new("RGB", (side, side))
    for top in range(-40, side, CELL):
        for left in range(-29, side, CELL):
            placement = GlyphPlacement(size=rng.randint(CELL // 3, CELL), ground=rng.choice(list(GROUNDS)))
            paper.paste(emoji.render(rng.randrange(len(emoji)), placement), (left, top))
    return paper


def border_jumps(image: np.ndarray, tile: int, scale: int) -> list[float]:
    """For each border of tiles of an image [H, W, 3]: its mean jump over the largest among its neighbors."""
    ratios = []
    for axis in (0, 1):
        jumps = np.abs(np.diff(image, axis=axis)).mean(axis=(1 - axis, 2))
        length = image.shape[axis] // scale
        edges = {at for first in tile_starts(length, tile, tile // 4) for at in (first, first + tile)}
        borders = {at * scale - 1 for at in edges if 0 < at < length}
        for border in borders:
            nearby = range(max(0, border - NEIGHBOURS), min(len(jumps), border + NEIGHBOURS + 1))
            ratios.append(jumps[border] / max(jumps[place] for place in nearby if place not in borders))
    return ratios


def _peak_megabytes() -> float:
    """Of the process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="a large image upscaled in tiles")
    parser.add_argument(
        "--model", type=Path, help="an upscaler's folder; by default that of the embedded cascade"
    )
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tile", type=int, default=DEFAULT_TILE)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
