"""Image files as people have them, given to a pipeline: read as they look, or refused by name before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentgen import ImageToImagePipeline
from latentgen.errors import InputError

SIZE = (20, 14)


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> ImageToImagePipeline:
    return ImageToImagePipeline.from_pretrained(tiny_checkpoint, device="cpu")


def gradient() -> Image.Image:
    """Grey, so that all colour modes hold it; bright to the right."""
    levels = np.linspace(0, 255, SIZE[0]).round().astype(np.uint8)
    return Image.fromarray(np.tile(levels, (SIZE[1], 1)))


def redraw(pipeline: ImageToImagePipeline, image: object) -> np.ndarray:
    output = pipeline(
        "a cat", image=image, strength=0.5, num_inference_steps=4, seed=7, output_type="np", progress=False
    )
    return np.asarray(output.images)


def save_sixteen_bits(path: Path) -> None:
    Image.fromarray(np.asarray(gradient()).astype(np.uint16) * 257).save(path)


def save_palette(path: Path) -> None:
    gradient().convert("P").save(path)


def save_transparent(path: Path) -> None:
    """All of it visible; what lies beyond is white anyway."""
    image = gradient().convert("RGBA")
    image.putalpha(255)
    image.save(path)


def save_animated(path: Path) -> None:
    gradient().convert("RGB").save(path, save_all=True, append_images=[Image.new("RGB", SIZE)], lossless=True)


def save_rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    gradient().transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


@pytest.mark.filterwarnings("ignore:.*is animated")
@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("sixteen.png", save_sixteen_bits),
        ("palette.png", save_palette),
        ("alpha.png", save_transparent),
        ("animated.webp", save_animated),
        ("rotated.png", save_rotated),
        ("grey.png", lambda path: gradient().save(path)),
    ],
)
def test_every_kind_of_file_is_drawn_from_as_it_looks(
    name: str, save: Callable[[Path], None], pipeline: ImageToImagePipeline, tmp_path: Path
) -> None:
    save(tmp_path / name)
    result = redraw(pipeline, tmp_path / name)
    assert result.shape == (1, SIZE[1], SIZE[0], 3)
    np.testing.assert_allclose(result, redraw(pipeline, gradient().convert("RGB")), atol=1e-5)


def test_cmyk_is_read_as_colours(pipeline: ImageToImagePipeline, tmp_path: Path) -> None:
    path = tmp_path / "print.tif"
    picture = gradient().convert("CMYK")
    picture.save(path)
    np.testing.assert_allclose(redraw(pipeline, path), redraw(pipeline, picture.convert("RGB")), atol=1e-5)


def test_what_is_transparent_is_white(pipeline: ImageToImagePipeline, tmp_path: Path) -> None:
    path = tmp_path / "clear.png"
    Image.new("RGBA", SIZE, (0, 0, 0, 0)).save(path)
    np.testing.assert_allclose(
        redraw(pipeline, path), redraw(pipeline, Image.new("RGB", SIZE, "white")), atol=1e-5
    )


def truncated(path: Path) -> None:
    gradient().convert("RGB").resize((400, 300)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def huge(path: Path) -> None:
    Image.new("1", (10_000, 8_000)).save(path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("cut.jpg", truncated, "cannot be read as an image"),
        ("empty.png", lambda path: path.write_bytes(b""), "cannot be read as an image"),
        ("page.png", lambda path: path.write_text("<html>"), "cannot be read as an image"),
        ("bomb.png", huge, "67,108,864"),
    ],
)
def test_what_is_no_image_is_refused_by_name(
    name: str,
    write: Callable[[Path], object],
    message: str,
    pipeline: ImageToImagePipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path / name)
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *given: pytest.fail("a stage was run"))
    with pytest.raises(InputError, match=message) as caught:
        pipeline.stream("a cat", image=tmp_path / name)
    assert name in str(caught.value)
