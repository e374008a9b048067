"""Read image files as 8-bit sRGB, and write images to files with their generation parameters."""

from __future__ import annotations

import io
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from latentgen.errors import InputError, OutputError
from latentgen.files import atomic_write, quote
from latentgen.prompts import check_prompts

if TYPE_CHECKING:
    from latentgen.generation_parameters import GenerationParameters

# The limit on a decompression bomb: 64 Mi pixels are 192 MiB as RGB.
MAX_PIXELS = 64 * 2**20
WHITE = (255, 255, 255)
# Color space of an ICC profile -> the mode of Pillow that it applies to.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
# File suffix -> format of PIL.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_LOSSY_QUALITY = 95


def read_image(path: Path, *, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Decode a whole file to RGB, upright, in sRGB.

    Applies EXIF orientation, converts ICC profiles, rescales 16-bit gray, composites transparency over `background`,
    and takes the first frame of an animation, with a warning. No metadata is kept.

    Raises:
        InputError: not an image, truncated, over 64 megapixels, or of a kind that cannot be converted to sRGB.
    """
    return _read(path, quote(path), background)


def read_image_bytes(data: bytes, name: str, *, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Decode the content of a file as :func:`read_image` does; `name` is for errors and warnings."""
    return _read(io.BytesIO(data), quote(name), background)


def _read(source: Path | io.BytesIO, name: str, background: tuple[int, int, int]) -> Image.Image:
    try:
        with Image.open(source) as image:
            _check_pixels(image, name)
            if getattr(image, "n_frames", 1) > 1:
                warnings.warn(f"{name} is animated; its first frame is used", stacklevel=3)
            image.load()
            return _upright(image, background)
    except InputError:
        raise
    except Image.DecompressionBombError as error:  # far over the limit; the error has no size
        raise InputError(f"{name} has more than {MAX_PIXELS:,} pixels; make it smaller") from error
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more.
    except Exception as error:
        # Pillow's message contains the name of the file, or for bytes in memory the repr of an object.
        is_unnamed = isinstance(error, UnidentifiedImageError) and not isinstance(source, Path)
        reason = "unknown format" if is_unnamed else error
        raise InputError(f"{name} cannot be read as an image ({reason}); replace or remove it") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image in memory as :func:`read_image` converts files, with the same errors."""
    _check_pixels(image, "the image")
    try:
        return _upright(image, WHITE)
    # A file that was opened but not decoded is decoded here, with errors as in read_image.
    except Exception as error:
        raise InputError(f"the image cannot be read ({error}); replace it") from error


def _check_pixels(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise InputError(
            f"{name} has {image.width}x{image.height} pixels, more than {MAX_PIXELS:,}; make it smaller"
        )


def _upright(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The image upright, in sRGB, composited over a background color, without metadata."""
    image = ImageOps.exif_transpose(image)
    picture = _to_srgb(image)
    if image.has_transparency_data:
        opaque = picture
        picture = Image.new("RGB", image.size, background)
        picture.paste(opaque, mask=image.convert("RGBA").getchannel("A"))
    picture.info = {}
    return picture


def _to_srgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(levels.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; save it with 8 or 16 bits")
    if not (data := image.info.get("icc_profile")):
        return image.convert("RGB")
    profile: Any = ImageCms.ImageCmsProfile(io.BytesIO(data))  # the stubs know no color space
    space = profile.profile.xcolor_space.strip()
    if space not in _MODES:
        raise ValueError(f"its ICC profile is for {space}; save it as sRGB")
    srgb = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image.convert(_MODES[space]), profile, srgb, outputMode="RGB")
    assert converted is not None  # None is for conversions in place
    return converted


def check_output(path: str | Path) -> None:
    """Raise OutputError if :func:`save_image` cannot write to ``path``; creates nothing."""
    path = Path(path)
    _format_of(path)
    try:
        with suppress(FileNotFoundError):
            path.stat()  # raises for names that the file system cannot take
        if path.is_dir():
            raise OutputError(f"cannot write {quote(path)}: it is a folder; pass the name of a file")
        # Missing folders are created when the image is saved.
        nearest = next((folder for folder in path.absolute().parents if folder.exists()), path.parent)
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OutputError:
        raise
    except (OSError, ValueError) as error:
        raise OutputError(
            f"cannot write {quote(path)}: {error}; choose a folder that can be written"
        ) from error


def save_image(image: Image.Image, path: str | Path, parameters: GenerationParameters | None = None) -> None:
    """Write an image atomically; the suffix of ``path`` is one of FORMATS.

    The parameters are written where other programs look for them: the text chunk ``parameters`` of a PNG file, the EXIF
    field UserComment of the others. EXIF, GPS and comments that came with ``image`` are not written.

    Raises:
        OutputError: no such format, or the file cannot be written; an existing file is never damaged.
        InputError: the parameters have a NUL or an unpaired surrogate.
    """
    path = Path(path)
    file_format = _format_of(path)
    text = None
    if parameters is not None:
        text = parameters.to_text()
        check_prompts((text,))
    with atomic_write(path) as file:
        if file_format == "PNG":
            chunks = PngInfo()
            if text is not None:
                chunks.add_text("parameters", text)  # tEXt where Latin-1 suffices, else iTXt in UTF-8
            image.save(file, file_format, pnginfo=chunks)
        else:
            exif = Image.Exif()
            if text is not None:
                comment = b"UNICODE\0" + text.encode("utf-16-be")
                exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
            # Without `comment` Pillow copies the one that came with the image.
            image.save(file, file_format, quality=_LOSSY_QUALITY, exif=exif, comment=b"")


def _format_of(path: Path) -> str:
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise OutputError(
            f"cannot write {quote(path)}: {path.suffix!r} is not a supported format; use one of {', '.join(FORMATS)}"
        ) from None
