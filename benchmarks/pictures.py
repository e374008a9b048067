"""The pictures of the docs that the embedded cascade draws, as it draws them now.

    python -m benchmarks.pictures cascade docs/cascade.png            what its stages draw of some prompts
    python -m benchmarks.pictures noise_levels docs/noise_levels.png  one image upscaled at four noise levels

In the first, the last row is the third one enlarged by Lanczos, to compare the fourth with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from latentgen import CascadePipeline, UpscalePipeline

PROMPTS = (
    *("tiger face", "slice of pizza", "rocket", "hot beverage", "automobile", "penguin"),
    *("strawberry", "sunflower on a blue background", "castle", "owl"),
)
NOISE_LEVELS = (0, 100, 200, 350)
NOISE_PROMPTS = ("owl", "tiger face", "bicycle")
SEED = 11
SIDE, GAP, MARGIN = 128, 8, 96
INK, PAPER = (60, 60, 60), (255, 255, 255)


def main() -> int:
    """Draw one of the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", choices=("cascade", "noise_levels"))
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    rows = cascade_rows() if options.picture == "cascade" else noise_level_rows()
    sheet(rows).save(options.output, optimize=True)
    return 0


def cascade_rows() -> list[tuple[str, list[Image.Image]]]:
    """A row for each stage, and one for the third enlarged."""
    seeds = [SEED] * len(PROMPTS)
    stages = [
        _pictures(result.images) for result in CascadePipeline.from_pretrained().stream(PROMPTS, seed=seeds)
    ]
    names = ("outline\n16x16", "upscaled\n64x64", "refined\n64x64", "upscaled\n128x128")
    enlarged = [image.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for image in stages[2]]
    return [*zip(names, stages, strict=True), ("refined,\nLanczos", enlarged)]


def noise_level_rows() -> list[tuple[str, list[Image.Image]]]:
    """The 64x64 images of a cascade, and a row for each noise level that they are upscaled at."""
    cascade = CascadePipeline.from_pretrained()
    results = cascade.stream(NOISE_PROMPTS, seed=[SEED] * len(NOISE_PROMPTS))
    inputs = next(_pictures(result.images) for result in results if result.index == 2)
    upscale = UpscalePipeline.from_pretrained()
    rows = [("input", inputs)]
    for level in NOISE_LEVELS:
        output = upscale(list(NOISE_PROMPTS), image=inputs, noise_level=level, seed=[SEED] * len(inputs))
        images = _pictures(output.images)
        small = [
            image.resize(one.size, Image.Resampling.BOX) for image, one in zip(images, inputs, strict=True)
        ]
        error = np.square(np.subtract(np.asarray(small, np.float64), np.asarray(inputs, np.float64))).mean()
        print(f"level {level:3}: downscaled, {10 * np.log10(255**2 / error):.1f} dB to the input")
        rows.append((f"level {level}", images))
    return rows


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Labeled rows of images, all enlarged to one size without smoothing."""
    columns = max(len(images) for _, images in rows)
    paper = Image.new("RGB", (MARGIN + columns * (SIDE + GAP), len(rows) * (SIDE + GAP)), PAPER)
    draw = ImageDraw.Draw(paper)
    for row, (label, images) in enumerate(rows):
        top = row * (SIDE + GAP)
        draw.text((GAP, top + SIDE // 2 - 14), label, fill=INK, font=ImageFont.load_default(size=14))
        for column, image in enumerate(images):
            large = image.resize((SIDE, SIDE), Image.Resampling.NEAREST)
            paper.paste(large, (MARGIN + column * (SIDE + GAP), top))
    return paper


def _pictures(images: object) -> list[Image.Image]:
    assert isinstance(images, list)
    return images


if __name__ == "__main__":
    sys.exit(main())
