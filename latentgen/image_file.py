"""Image files as people have them, read as 8-bit sRGB."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from latentgen.errors import InputError
from latentgen.files import quote

# The limit on a decompression bomb: 64 Mi pixels are 192 MiB as RGB.
MAX_PIXELS = 64 * 2**20
WHITE = (255, 255, 255)
# Colour space of an ICC profile -> the mode of Pillow that it applies to.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}


def read_image(path: Path, *, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Decode a whole file to RGB, upright, in sRGB.

    The orientation that EXIF tells of is applied, an ICC profile converted, 16-bit grey rescaled, transparency
    laid over `background`; of an animation the first frame is taken, with a warning. No metadata is kept.

    Raises:
        InputError: not an image, truncated, over 64 megapixels, or of a kind that has no clear reading as sRGB.
    """
    return _read(path, quote(path), background)


def read_image_bytes(data: bytes, name: str, *, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Decode the content of a file as :func:`read_image` does; `name` says in errors and warnings where it lies.

    Raises:
        InputError: as :func:`read_image`.
    """
    return _read(io.BytesIO(data), quote(name), background)


def _read(source: Path | io.BytesIO, name: str, background: tuple[int, int, int]) -> Image.Image:
    try:
        with Image.open(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"{name} has {image.width}x{image.height} pixels, over the limit of {MAX_PIXELS:,}; "
                    "make it smaller"
                )
            if getattr(image, "n_frames", 1) > 1:
                warnings.warn(f"{name} is animated; its first frame is used", stacklevel=3)
            image.load()
            return _upright(image, background)
    except InputError:
        raise
    except Image.DecompressionBombError as error:  # far over the limit; it does not tell the size
        raise InputError(
            f"{name} has more pixels than the limit of {MAX_PIXELS:,}; make it smaller"
        ) from error
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more, whatever parsing ran into.
    except Exception as error:
        # Pillow names the file, which in memory has no name that says anything.
        nameless = isinstance(error, UnidentifiedImageError) and not isinstance(source, Path)
        reason = "of no known format" if nameless else error
        raise InputError(f"{name} cannot be read as an image ({reason}); replace or remove it") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in memory as :func:`read_image` gives one from a file.

    Raises:
        InputError: over 64 megapixels, or of a kind that has no clear reading as sRGB.
    """
    if image.width * image.height > MAX_PIXELS:
        raise InputError(
            f"the image has {image.width}x{image.height} pixels, over the limit of {MAX_PIXELS:,}; make it smaller"
        )
    try:
        return _upright(image, WHITE)
    # A file that was opened and not yet decoded is decoded here, and fails as variously as in read_image.
    except Exception as error:
        raise InputError(f"the image cannot be read ({error}); replace it") from error


def _upright(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    picture = _over(ImageOps.exif_transpose(image), background)
    picture.info = {}
    return picture


def _over(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The image in sRGB, its transparent parts on a ground of one colour."""
    colours = _to_srgb(image)
    if not image.has_transparency_data:
        return colours
    ground = Image.new("RGB", image.size, background)
    ground.paste(colours, mask=image.convert("RGBA").getchannel("A"))
    return ground


def _to_srgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(levels.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; save it with 8 or 16 bits")
    if not (data := image.info.get("icc_profile")):
        return image.convert("RGB")
    profile: Any = ImageCms.ImageCmsProfile(io.BytesIO(data))  # the stubs know no colour space
    space = profile.profile.xcolor_space.strip()
    if space not in _MODES:
        raise ValueError(f"its ICC profile is for {space}; save it as sRGB")
    srgb = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image.convert(_MODES[space]), profile, srgb, outputMode="RGB")
    assert converted is not None  # None is for conversions in place
    return converted
