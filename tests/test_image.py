from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from latentgen.errors import InputError, OutputError
from latentgen.generation_parameters import GenerationParameters
from latentgen.image_file import check_output, save_image
from latentgen.pipelines.vae_ops import to_numpy, to_pil, to_unit

PARAMETERS = GenerationParameters(
    prompt="slice of pizza", steps=25, sampler="Euler a", guidance_scale=7.5, seed=7, width=12, height=8
)


@pytest.fixture
def picture() -> Image.Image:
    return to_pil(torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0)))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numpy_is_unit_range_with_channels_last(dtype: torch.dtype):
    images = torch.tensor([-1.0, 0.0, 1.0], dtype=dtype).reshape(1, 3, 1, 1).expand(2, 3, 4, 5)
    pixels = to_numpy(to_unit(images))
    assert pixels.shape == (2, 4, 5, 3)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels[1, 3, 4], [0.0, 0.5, 1.0])


def test_pil_rounds_as_diffusers_does():
    from diffusers.image_processor import VaeImageProcessor

    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(1)) * 2.4 - 1.2
    expected = VaeImageProcessor().postprocess(images, output_type="pil")
    for ours, theirs in zip(to_pil(to_unit(images)), expected, strict=True):
        assert (ours.mode, ours.size) == ("RGB", (12, 8))
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


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


def test_check_output_leaves_nothing_behind(tmp_path: Path):
    check_output(tmp_path / "new" / "folder" / "out.PNG")
    assert list(tmp_path.iterdir()) == []


def test_check_output_finds_what_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    for path in (
        tmp_path / "file" / "out.png",
        tmp_path / "folder.png",
        tmp_path / f"{'n' * 300}.png",
        "nul\0.png",
    ):
        with pytest.raises(OutputError, match="cannot write"):
            check_output(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_check_output_finds_a_read_only_folder(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot write"):
        check_output(tmp_path / "out.png")
