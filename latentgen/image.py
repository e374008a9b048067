"""From tensors to pictures: images in -1..1 become arrays, PIL images, and files that carry their recipe."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from latentgen.errors import InputError, NumericalError, OutputError
from latentgen.files import atomic_write, quote
from latentgen.prompts import check_prompts

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from latentgen.recipe import Recipe

# File suffix -> format of PIL.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_LOSSY_QUALITY = 95


def to_unit(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in -1..1, of any float dtype, as float32 in 0..1 on the same device.

    Values outside -1..1 are clipped: a decoder overshoots a little at saturated colours.
    """
    return (images.float() / 2 + 0.5).clamp(0, 1)


def to_numpy(images: Tensor) -> np.ndarray:
    """Images [B, 3, H, W] in -1..1 as float32 [B, H, W, 3] in 0..1, clipped.

    Raises:
        InputError: not a tensor of this shape.
        NumericalError: the images hold NaN or infinity.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images must have the shape [B, 3, H, W]; found {list(images.shape)}")
    if not images.isfinite().all():
        raise NumericalError("the images hold NaN or infinity; decode them in float32")
    return unit_to_numpy(to_unit(images.detach()))


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images [B, 3, H, W] in -1..1 as 8-bit RGB, rounded to the nearest level.

    Raises:
        InputError, NumericalError: as :func:`to_numpy`.
    """
    return numpy_to_pil(to_numpy(images))


def unit_to_numpy(images: Tensor) -> np.ndarray:
    """Images [B, 3, H, W] in 0..1 as an array [B, H, W, 3] of the same values."""
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
    """An array [B, H, W, 3] in 0..1 as 8-bit RGB, rounded to the nearest level: what came from 8 bits is as it was."""
    return [Image.fromarray(levels) for levels in (images * 255).round().astype("uint8")]


def check_output(path: str | Path) -> None:
    """Find out before the work whether :func:`save_image` can write to ``path``; nothing is left behind.

    Raises:
        OutputError: no such format, ``path`` is a folder, or its folder cannot be written.
    """
    path = Path(path)
    _format_of(path)
    try:
        with suppress(FileNotFoundError):
            path.stat()  # finds the names that the file system cannot take
        if path.is_dir():
            raise OutputError(f"cannot write {quote(path)}: it is a folder; give the name of a file")
        # Folders that are missing are made when the image is saved.
        nearest = next((folder for folder in path.absolute().parents if folder.exists()), path.parent)
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OutputError:
        raise
    except (OSError, ValueError) as error:
        raise OutputError(
            f"cannot write {quote(path)}: {error}; choose a folder that can be written"
        ) from error


def save_image(image: Image.Image, path: str | Path, recipe: Recipe | None = None) -> None:
    """Write a picture whole or not at all; the suffix of ``path`` names the format, one of FORMATS.

    The recipe goes where other programs look for it: the text chunk ``parameters`` of a PNG file, the EXIF
    field UserComment of the others. EXIF, GPS and comments that came with ``image`` are not written.

    Raises:
        OutputError: no such format, or the file cannot be written; what stood there before is intact.
        InputError: the recipe holds NUL or half of a surrogate pair.
    """
    path = Path(path)
    file_format = _format_of(path)
    text = None
    if recipe is not None:
        text = recipe.to_text()
        check_prompts((text,))
    with atomic_write(path) as file:
        if file_format == "PNG":
            image.save(file, file_format, pnginfo=_png_text(text))
        else:
            # Without `comment` Pillow copies the one that came with the image.
            image.save(file, file_format, quality=_LOSSY_QUALITY, exif=_exif_comment(text), comment=b"")


def _format_of(path: Path) -> str:
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise OutputError(
            f"cannot write {quote(path)}: {path.suffix!r} is no known format; use one of {', '.join(FORMATS)}"
        ) from None


def _png_text(text: str | None) -> PngInfo:
    chunks = PngInfo()
    if text is not None:
        chunks.add_text("parameters", text)  # tEXt where Latin-1 suffices, else iTXt in UTF-8
    return chunks


def _exif_comment(text: str | None) -> Image.Exif:
    exif = Image.Exif()
    if text is not None:
        comment = b"UNICODE\0" + text.encode("utf-16-be")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif
