"""Image files of every kind become the same 8-bit sRGB picture; written ones carry their generation parameters."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from latentgen import image_file
from latentgen.errors import InputError, OutputError
from latentgen.generation_parameters import GenerationParameters
from latentgen.image_file import check_output, read_image, save_image

COLOR = (200, 40, 90)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
_EXIF_ORIENTATION = 0x0112
PARAMETERS = GenerationParameters(
    prompt="slice of pizza", steps=25, sampler="Euler a", guidance_scale=7.5, seed=7, width=12, height=8
)


@pytest.fixture
def picture() -> Image.Image:
    """One color, 6x4, with a black corner at the top left."""
    image = Image.new("RGB", (6, 4), COLOR)
    image.putpixel((0, 0), (0, 0, 0))
    return image


def save_palette(image: Image.Image, path: Path) -> None:
    image.quantize(16).save(path)


def save_cmyk(image: Image.Image, path: Path) -> None:
    image.convert("CMYK").save(path)


def save_with_profile(image: Image.Image, path: Path) -> None:
    image.save(path, icc_profile=SRGB)


@pytest.mark.parametrize("save", [save_palette, save_cmyk, save_with_profile])
def test_color_modes(save: Callable[[Image.Image, Path], None], picture: Image.Image, tmp_path: Path):
    path = tmp_path / "image.tif"
    save(picture, path)
    actual = read_image(path)
    assert actual.mode == "RGB"
    np.testing.assert_allclose(np.asarray(actual), np.asarray(picture), atol=1)


@pytest.mark.parametrize("mode", ["L", "P", "LA"])
def test_color_profile_on_another_mode(mode: str, picture: Image.Image, tmp_path: Path):
    gray = picture.convert("L")
    gray.convert(mode).save(tmp_path / "image.png", icc_profile=SRGB)
    actual = read_image(tmp_path / "image.png")
    np.testing.assert_allclose(np.asarray(actual), np.asarray(gray.convert("RGB")), atol=1)


def test_sixteen_bits_are_rescaled(tmp_path: Path):
    levels = np.linspace(0, 65535, 24).round().astype(np.uint16).reshape(4, 6)
    Image.fromarray(levels).save(tmp_path / "image.png")
    actual = np.asarray(read_image(tmp_path / "image.png"))
    np.testing.assert_allclose(actual[..., 1], levels / 257, atol=0.5)


def test_transparency_lies_on_the_background(picture: Image.Image, tmp_path: Path):
    alpha = Image.new("L", picture.size, 255)
    alpha.putpixel((5, 3), 0)
    alpha.putpixel((4, 3), 51)
    picture.putalpha(alpha)
    picture.save(tmp_path / "image.png")
    actual = read_image(tmp_path / "image.png", background=(10, 20, 250))
    assert actual.getpixel((1, 1)) == COLOR
    assert actual.getpixel((5, 3)) == (10, 20, 250)
    blend = [0.2 * color + 0.8 * ground for color, ground in zip(COLOR, (10, 20, 250), strict=True)]
    np.testing.assert_allclose(actual.getpixel((4, 3)), blend, atol=1)
    assert read_image(tmp_path / "image.png").getpixel((5, 3)) == (255, 255, 255)


def test_orientation_is_applied_and_metadata_dropped(picture: Image.Image, tmp_path: Path):
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION] = 6  # the camera lay on its side
    exif[0x010E] = "where I live"
    picture.save(tmp_path / "image.png", exif=exif, icc_profile=SRGB)
    actual = read_image(tmp_path / "image.png")
    assert actual.size == (4, 6)
    assert actual.getpixel((3, 0)) == (0, 0, 0)
    assert not actual.getexif()
    assert not actual.info


def test_first_frame_of_an_animation(picture: Image.Image, tmp_path: Path):
    frames = [Image.new("RGB", picture.size, (0, 0, level)) for level in (0, 100, 200)]
    picture.save(tmp_path / "image.webp", save_all=True, append_images=frames, lossless=True)
    with pytest.warns(UserWarning, match="animated"):
        actual = read_image(tmp_path / "image.webp")
    assert actual.getpixel((3, 3)) == COLOR


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n" + b"x" * 64])
def test_not_an_image(content: bytes, tmp_path: Path):
    (tmp_path / "image.png").write_bytes(content)
    with pytest.raises(InputError, match=r"image\.png"):
        read_image(tmp_path / "image.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_truncated(suffix: str, tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"image{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="truncated"):
        read_image(path)


def test_decompression_bomb(monkeypatch: pytest.MonkeyPatch, picture: Image.Image, tmp_path: Path):
    monkeypatch.setattr(image_file, "MAX_PIXELS", 23)
    picture.save(tmp_path / "image.png")
    with pytest.raises(InputError, match=r"6x4 pixels.* 23"):
        read_image(tmp_path / "image.png")


def test_the_error_of_pillow_for_bombs_names_our_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.new("RGB", (6, 4)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11)
    with pytest.raises(InputError, match=r"large\.png.*67,108,864"):
        read_image(tmp_path / "large.png")


def test_unknown_range_is_refused(tmp_path: Path):
    Image.new("F", (4, 4)).save(tmp_path / "image.tif")
    with pytest.raises(InputError, match="no known range"):
        read_image(tmp_path / "image.tif")


def test_missing_file(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.png"):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize("prompt", ["crème brûlée", "ピザ 🍕\nsecond line"])
def test_png_carries_the_parameters(prompt: str, picture: Image.Image, tmp_path: Path):
    parameters = replace(PARAMETERS, prompt=prompt)
    save_image(picture, tmp_path / "out.png", parameters)
    with Image.open(tmp_path / "out.png") as read:
        assert GenerationParameters.from_text(read.info["parameters"]) == parameters
        np.testing.assert_array_equal(np.asarray(read), np.asarray(picture))


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_other_formats_carry_the_parameters_as_exif(suffix: str, picture: Image.Image, tmp_path: Path):
    parameters = replace(PARAMETERS, prompt="ピザ 🍕")
    save_image(picture, tmp_path / f"out{suffix}", parameters)
    with Image.open(tmp_path / f"out{suffix}") as read:
        comment = read.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"UNICODE\0"
    assert GenerationParameters.from_text(comment[8:].decode("utf-16-be")) == parameters


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_without_parameters_nothing_is_said(suffix: str, picture: Image.Image, tmp_path: Path):
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "secret place"
    picture.info.update(
        exif=exif.tobytes(), comment=b"secret place", parameters="secret place", xmp=b"secret place"
    )
    save_image(picture, tmp_path / f"out{suffix}")
    assert b"secret" not in (tmp_path / f"out{suffix}").read_bytes()


def test_text_that_cannot_be_written_leaves_no_file(picture: Image.Image, tmp_path: Path):
    with pytest.raises(InputError):
        save_image(picture, tmp_path / "out.png", replace(PARAMETERS, prompt="nul \0 inside"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out.gif", ""])
@pytest.mark.parametrize("write", [check_output, lambda path: save_image(Image.new("RGB", (8, 8)), path)])
def test_unknown_formats_are_refused(name: str, write, tmp_path: Path):
    with pytest.raises(OutputError, match=r"\.png, \.jpg"):
        write(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_check_output_finds_what_cannot_be_written_and_leaves_nothing(tmp_path: Path):
    check_output(tmp_path / "new" / "folder" / "out.PNG")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    for name in ("file/out.png", "folder.png", f"{'n' * 300}.png", "nul\0.png"):
        with pytest.raises(OutputError, match="cannot write"):
            check_output(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_check_output_finds_a_read_only_folder(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot write"):
        check_output(tmp_path / "out.png")
