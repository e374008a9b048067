from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentgen.errors import InputError
from latentgen.pipelines.images import as_images, as_masks, for_each, padded
from latentgen.pipelines.vae_ops import to_numpy, to_pil, to_unit

LEVELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(LEVELS).permute(2, 0, 1)[None] / 127.5 - 1


def save(path: Path) -> Path:
    Image.fromarray(LEVELS).save(path)
    return path


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(LEVELS),
        LEVELS,
        LEVELS[None],
        LEVELS[..., ::-1].copy()[..., ::-1],
        LEVELS / 255,
        torch.from_numpy(LEVELS).permute(2, 0, 1),
        torch.from_numpy(LEVELS).permute(2, 0, 1)[None] / 255,
        [Image.fromarray(LEVELS)],
    ],
    ids=["PIL", "uint8", "batch", "backwards", "float64", "tensor", "float tensor", "list"],
)
def test_every_kind_of_image_is_the_same_tensor(image: Any) -> None:
    actual = as_images("image", image)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, EXPECTED, rtol=0, atol=1e-6)


def test_a_path_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "picture.png")
    for image in (path, str(path), [path]):
        torch.testing.assert_close(as_images("image", image), EXPECTED, rtol=0, atol=1e-6)


def test_several_images_are_a_batch() -> None:
    assert as_images("image", [LEVELS, LEVELS[None], Image.fromarray(LEVELS)]).shape == (3, 3, 6, 5)


def test_images_in_memory_are_read_as_files_are(tmp_path: Path) -> None:
    see_through = Image.fromarray(np.dstack([LEVELS, np.zeros((6, 5), np.uint8)]))
    assert torch.equal(as_images("image", see_through), torch.ones(1, 3, 6, 5))
    turned = Image.fromarray(LEVELS)
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    with Image.open(tmp_path / "turned.png") as image:
        assert as_images("image", image).shape == (1, 3, 5, 6)
    deep = Image.fromarray(np.full((2, 2), 257 * 51, np.uint16))
    torch.testing.assert_close(as_images("image", deep), torch.full((1, 3, 2, 2), 51 / 127.5 - 1))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([], "image "),
        (7, "not int"),
        (None, "not NoneType"),
        (LEVELS[..., :2], r"shape \[6, 5, 2\]"),
        (LEVELS.astype(np.int64), "int64"),
        (np.array(["a"]), "image .*<U1"),
        (np.full((2, 2, 3), np.nan), "from nan to nan"),
        (LEVELS.astype(np.float32), "in 0..1"),
        (EXPECTED, "in 0..1"),
        ([LEVELS, LEVELS[:4]], "5x6, 5x4"),
        (np.zeros((0, 4, 3), np.uint8), "4x0 pixels"),
        (np.zeros((1, 8193, 3), np.uint8), "8193x1 pixels"),
        ("missing.png", "missing.png"),
        (Image.new("F", (2, 2)), "no known range"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_image_is_refused(image: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_images("image", image)


def test_a_bomb_is_refused() -> None:
    with pytest.raises(InputError, match="67,108,864"):
        as_images("image", Image.new("1", (8193, 8192)))


MARKED = torch.zeros(1, 1, 6, 5)
MARKED[..., 2:4, 1:3] = 1


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray((MARKED[0, 0] * 255).numpy().astype(np.uint8)),
        MARKED[0, 0].numpy() * 0.5,
        MARKED[0, 0, :, :, None].numpy(),
        MARKED.bool(),
        MARKED[0],
        MARKED[0].numpy(),
        MARKED[0, 0] * 0.9 + 0.05,
    ],
    ids=["PIL", "array", "channel last", "bool", "channel first", "array of a batch", "soft"],
)
def test_every_kind_of_mask_is_the_same_tensor(mask: Any) -> None:
    assert torch.equal(as_masks("mask_image", mask, EXPECTED), MARKED)
    assert torch.equal(
        as_masks("mask_image", mask, EXPECTED.expand(2, -1, -1, -1)), MARKED.expand(2, -1, -1, -1)
    )


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"mask_image .*4x6.*5x6"):
        as_masks("mask_image", MARKED[..., :4], EXPECTED)
    with pytest.raises(InputError, match=r"mask_image .*2 .*1 "):
        as_masks("mask_image", MARKED.expand(2, -1, -1, -1), EXPECTED)
    with pytest.raises(InputError, match=r"mask_image .*shape"):
        as_masks("mask_image", torch.zeros(1, 3, 6, 5), EXPECTED)


def test_padding_repeats_the_border() -> None:
    grown = padded(EXPECTED, 4)
    assert grown.shape == (1, 3, 8, 8)
    assert torch.equal(grown[..., :6, :5], EXPECTED)
    assert torch.equal(grown[..., 6:, :5], EXPECTED[..., -1:, :].expand(-1, -1, 2, -1))
    assert padded(grown, 4) is grown or torch.equal(padded(grown, 4), grown)


def test_what_belongs_to_one_prompt_stands_together() -> None:
    assert for_each(torch.tensor([1, 2]), 6).tolist() == [1, 1, 1, 2, 2, 2]


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
