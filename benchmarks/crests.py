"""A concept that the embedded model does not know: a crest of two colors, drawn with Pillow.

    python -m benchmarks.crests configs/train/crests      write the training set to that folder

A heater shield, parted per pale teal and orange, with a white star: turned, moved and scaled a little, half of the
images on white and half on one of five colors.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from latentgen.train.data.emoji import GROUNDS

SIDE = 64
COUNT = 20
NAME = "vexil shield"
TRAINED_GROUNDS = ("blue", "green", "yellow", "pink", "black")
_LEFT, _RIGHT, _RIM, _STAR = (0, 128, 120), (240, 130, 20), (50, 40, 60), (255, 255, 255)
# Drawn so many times as large, and then averaged down.
_FINER = 8


class Placement(NamedTuple):
    """The crest's height and offset from the center, in pixels, and its rotation, in degrees."""

    size: float = 52
    across: float = 0
    down: float = 0
    turn: float = 0


def crest(placement: Placement, ground: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """The crest, RGB of 64x64."""
    side = SIDE * _FINER
    layer = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(layer)
    half = placement.size * _FINER / 2
    outline = [(side / 2 + x * half, side / 2 + y * half) for x, y in _shield()]
    draw.polygon(outline, fill=_LEFT)
    right = Image.new("RGBA", layer.size, _RIGHT)
    behind = Image.new("L", layer.size)
    ImageDraw.Draw(behind).polygon(outline, fill=255)
    behind.paste(0, (0, 0, side // 2, side))
    layer.paste(right, mask=behind)
    draw.line([*outline, outline[0], outline[1]], fill=_RIM, width=int(half * 0.12), joint="curve")
    draw.polygon([(side / 2 + x * half, side * 0.47 + y * half) for x, y in _star(0.36)], fill=_STAR)
    layer = layer.rotate(
        placement.turn,
        Image.Resampling.BICUBIC,
        translate=(round(placement.across * _FINER), round(placement.down * _FINER)),
    )
    image = Image.new("RGBA", layer.size, (*ground, 255))
    image.alpha_composite(layer)
    return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)


def _shield() -> list[tuple[float, float]]:
    """The outline of a heater shield, in -1..1: straight above, two arcs that meet in a point below."""
    arc = [math.pi / 2 * step / 24 for step in range(25)]
    right = [(0.84 * math.cos(angle) ** 0.8, -0.15 + 1.15 * math.sin(angle)) for angle in arc]
    return [(-0.84, -1.0), (0.84, -1.0), *right, *((-x, y) for x, y in reversed(right[:-1]))]


def _star(radius: float) -> list[tuple[float, float]]:
    """A star of five points that stands on two of them."""
    radii = [radius, radius * 0.4] * 5
    angles = [-math.pi / 2 + math.pi / 5 * point for point in range(10)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def training_set() -> list[tuple[Image.Image, str]]:
    """The images with their captions."""
    rng = random.Random(0)
    images = []
    for number in range(COUNT):
        placement = Placement(rng.uniform(46, 56), rng.uniform(-3, 3), rng.uniform(-3, 3), rng.uniform(-6, 6))
        if number % 2:
            ground = TRAINED_GROUNDS[number // 2 % len(TRAINED_GROUNDS)]
            images.append((crest(placement, GROUNDS[ground]), f"{NAME} on a {ground} background"))
        else:
            images.append((crest(placement), NAME))
    return images


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (image, text) in enumerate(training_set()):
        name = f"{number:02}.png"
        image.save(folder / name, optimize=True)
        rows.append(json.dumps({"file_name": name, "text": text}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows), "utf-8")


if __name__ == "__main__":
    main()
