"""Lines on logarithmic axes, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 1000, 700
# The frame of the plot, in pixels: left, top, right, bottom; the legend is to its right.
FRAME = (90, 30, 770, 620)
# Drawn at so many times the size, which smooths the lines.
SCALE = 3
FOREGROUND, GRID = "#222222", "#dddddd"
FONT_SIZE = 16

Point = tuple[float, float]


def log_log_plot(
    path: Path,
    lines: Mapping[str, tuple[str, Sequence[Point]]],
    *,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[int],
    legend: str,
) -> None:
    """Write a PNG of lines, each a name for the legend with a color and its points; every second one is dashed.

    The axes reach over whole powers of ten in y, and from the first to the last of x_ticks; legend is its heading.
    """
    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    draw = ImageDraw.Draw(image)
    values = [y for _, points in lines.values() for _, y in points]
    bottom, top = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    left, right = math.log10(x_ticks[0]) - 0.05, math.log10(x_ticks[-1]) + 0.05

    def place(x: float, y: float) -> Point:
        across, up = (math.log10(x) - left) / (right - left), (math.log10(y) - bottom) / (top - bottom)
        return (
            (FRAME[0] + across * (FRAME[2] - FRAME[0])) * SCALE,
            (FRAME[3] - up * (FRAME[3] - FRAME[1])) * SCALE,
        )

    _axes(draw, place, x_ticks, range(bottom, top + 1), x_label)
    draw.text(((FRAME[2] + 15) * SCALE, (FRAME[1] + 10) * SCALE), legend, FOREGROUND, _font(), anchor="lm")
    for row, (name, (color, points)) in enumerate(lines.items(), start=1):
        dashed = row % 2 == 0
        placed = [place(*point) for point in points]
        _line(draw, placed, color, dashed)
        y = (FRAME[1] + 10 + 28 * row) * SCALE
        sample = [((FRAME[2] + 15) * SCALE, y), ((FRAME[2] + 60) * SCALE, y)]
        _line(draw, sample, color, dashed)
        draw.text(((FRAME[2] + 70) * SCALE, y), name, FOREGROUND, _font(), anchor="lm")
    _upright(image, y_label)
    image = image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    image.quantize(128).save(path, optimize=True)


def _axes(
    draw: ImageDraw.ImageDraw,
    place: Callable[[float, float], Point],
    x_ticks: Sequence[int],
    powers: range,
    x_label: str,
) -> None:
    for power in powers:
        (_, y) = place(x_ticks[0], 10.0**power)
        draw.line([(FRAME[0] * SCALE, y), (FRAME[2] * SCALE, y)], GRID, SCALE)
        draw.text(((FRAME[0] - 8) * SCALE, y), f"1e{power}", FOREGROUND, _font(), anchor="rm")
    for tick in x_ticks:
        (x, _) = place(tick, 10.0 ** powers[0])
        draw.line([(x, FRAME[1] * SCALE), (x, FRAME[3] * SCALE)], GRID, SCALE)
        draw.text((x, (FRAME[3] + 10) * SCALE), str(tick), FOREGROUND, _font(), anchor="mt")
    draw.rectangle([side * SCALE for side in FRAME], outline=FOREGROUND, width=SCALE)
    middle = (FRAME[0] + FRAME[2]) / 2
    draw.text((middle * SCALE, (FRAME[3] + 42) * SCALE), x_label, FOREGROUND, _font(), anchor="mt")


def _line(draw: ImageDraw.ImageDraw, points: Sequence[Point], color: str, dashed: bool) -> None:
    """A line through points, with a dot at each."""
    on, off = (8 * SCALE, 6 * SCALE) if dashed else (1, 0)
    for (x, y), (x_end, y_end) in pairwise(points):
        length = math.hypot(x_end - x, y_end - y)
        begin = 0.0
        while begin < length:
            end = min(length, begin + on) if off else length
            ends = [(x + (x_end - x) * at / length, y + (y_end - y) * at / length) for at in (begin, end)]
            draw.line(ends, color, 2 * SCALE)
            begin = end + off
    for x, y in points:
        radius = 4 * SCALE
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], color)


def _upright(image: Image.Image, text: str) -> None:
    """A label along the vertical axis."""
    label = Image.new("RGB", (200 * SCALE, 24 * SCALE), "white")
    ImageDraw.Draw(label).text((100 * SCALE, 12 * SCALE), text, FOREGROUND, _font(), anchor="mm")
    middle = (FRAME[1] + FRAME[3]) // 2
    image.paste(label.rotate(90, expand=True), (8 * SCALE, (middle - 100) * SCALE))


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE * SCALE)
