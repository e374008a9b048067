"""The images and masks of a call: check them, convert them to tensors on the CPU, and encode them to latents.

Checks raise InputError, which names the argument, its value, what is allowed and the fix.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentgen.errors import InputError, NumericalError
from latentgen.image_file import read_image, to_rgb
from latentgen.memory import on_device
from latentgen.models.pixels import ImageEncoder
from latentgen.models.vae import Gaussian, VAEEncoder
from latentgen.pipelines.arguments import MAX_SIDE
from latentgen.pipelines.vae_ops import dtype_of, in_float32, is_finite

ImageInput = str | Path | Image.Image | np.ndarray | Tensor
ImagesInput = ImageInput | Sequence[ImageInput]


def as_images(name: str, images: ImagesInput) -> Tensor:
    """Images as float32 [B, 3, H, W] in -1..1.

    Args:
        name: name of the argument.
        images: one image, or several of the same size. An image is a path, a PIL image, an array [H, W, 3] or a tensor
            [3, H, W], of uint8 or of floats in 0..1; arrays and tensors can also hold a batch.
    """
    return as_unit_images(name, images) * 2 - 1


def as_unit_images(name: str, images: ImagesInput) -> Tensor:
    """Images as float32 [B, 3, H, W] in 0..1, 8-bit values divided by 255; the arguments are those of `as_images`."""
    return _joined(name, [_as_unit(name, image, 3) for image in _items(images)])


def as_masks(name: str, masks: ImagesInput, images: Tensor) -> Tensor:
    """Masks of images [B, 3, H, W] as float32 [B, 1, H, W]: 1 where the mask is 0.5 or more, 0 elsewhere.

    Args:
        name: name of the argument.
        masks: one for all images or one for each, of their size. A mask is a path, a PIL image, an array
            [H, W] or [H, W, 1], or a tensor [H, W] or [1, H, W], of bool, of uint8 or of floats in 0..1; arrays
            [B, H, W(, 1)] and tensors [B(, 1), H, W] hold a batch.
        images: the images that they belong to.
    """
    values = _joined(name, [_as_unit(name, mask, 1) for mask in _items(masks)])
    if values.shape[2:] != images.shape[2:]:
        raise InputError(
            f"{name} is {_size(values)} pixels, the image {_size(images)}; they must have the same size"
        )
    if len(values) not in (1, len(images)):
        raise InputError(
            f"{name} has {len(values)} entries for {len(images)} images; pass one or one for each"
        )
    return (values >= 0.5).float().expand(len(images), -1, -1, -1)


def padded(images: Tensor, multiple: int) -> Tensor:
    """Pad images [B, C, H, W] so that their sides are multiples, by repeating the right and lower borders."""
    height, width = images.shape[2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def for_each(rows: Tensor, count: int) -> Tensor:
    """Repeat rows [B, ...] to [count, ...]; the copies of a row are adjacent."""
    return rows.repeat_interleave(count // len(rows), dim=0)


def encode_images(encoder: ImageEncoder, images: Tensor, device: torch.device, count: int) -> Gaussian:
    """Encode images [B, 3, H, W] in -1..1, one by one, to the float32 distribution of their latents.

    It has `count` rows, the same number for each image. The encoder is on the device only while it runs. Like the
    decoder it runs again in float32 if needed.

    Raises:
        NumericalError: the latents are not finite in float32 either.
    """
    dtype = dtype_of(encoder)
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    with on_device(encoder, device, offload=True):
        posterior = _encode(encoder, images.to(dtype))
        if (
            isinstance(encoder, VAEEncoder)
            and dtype != torch.float32
            and not is_finite(torch.stack(posterior))
        ):
            posterior = _encode(in_float32(encoder), images)
    if not is_finite(torch.stack(posterior)):
        raise NumericalError(
            "the encoder's output has NaN or infinity, even in float32, for finite images; check the VAE's weights"
        )
    return Gaussian(for_each(posterior.mean, count), for_each(posterior.logvar, count))


def _encode(encoder: ImageEncoder, images: Tensor) -> Gaussian:
    means, logvars = zip(*(encoder(image) for image in images.split(1)), strict=True)
    return Gaussian(torch.cat(means).float(), torch.cat(logvars).float())


def _items(images: ImagesInput) -> Sequence[ImageInput]:
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return images
    return [images]


def _joined(name: str, batches: Sequence[Tensor]) -> Tensor:
    if not batches:
        raise InputError(f"{name} is an empty list; pass at least one")
    if len(sizes := {_size(batch): None for batch in batches}) > 1:
        raise InputError(
            f"{name} has images of different sizes ({', '.join(sizes)}); use one call for each size"
        )
    joined = torch.cat(list(batches))
    if not min(joined.shape) > 0 or max(joined.shape[2:]) > MAX_SIDE:
        raise InputError(f"{name} is {_size(joined)} pixels; each side must be from 1 to {MAX_SIDE}")
    return joined


def _size(images: Tensor) -> str:
    return f"{images.shape[-1]}x{images.shape[-2]}"


def _as_unit(name: str, image: ImageInput, channels: int) -> Tensor:
    """Float32 [B, channels, H, W] in 0..1; a single channel may be left out."""
    if isinstance(image, str | Path | Image.Image):
        picture = to_rgb(image) if isinstance(image, Image.Image) else read_image(Path(image))
        return _from_pil(picture if channels == 3 else picture.convert("L"))
    values, is_array = _values(name, image), isinstance(image, np.ndarray)
    if channels == 1 and values.ndim == 3 and not (is_array and values.shape[-1] == 1):
        values = values[..., None] if is_array else values[:, None]  # [B, H, W] without a channel
    if channels == 1 and values.ndim == 2:
        values = values[..., None] if is_array else values[None]
    values = values[None] if values.ndim == 3 else values
    if is_array and values.ndim == 4:
        values = values.permute(0, 3, 1, 2)
    if values.ndim != 4 or values.shape[1] != channels:
        raise InputError(
            f"{name} has shape {list(image.shape)}; an array must be [H, W, {channels}] or [B, H, W, {channels}], a "
            f"tensor [{channels}, H, W] or [B, {channels}, H, W]"
        )
    return values


def _from_pil(picture: Image.Image) -> Tensor:
    values = np.asarray(picture, dtype=np.float32) / 255
    return torch.from_numpy(values.reshape(picture.height, picture.width, -1)).permute(2, 0, 1)[None]


def _values(name: str, image: object) -> Tensor:
    """Convert an array or tensor to float32 in 0..1."""
    if not isinstance(image, np.ndarray | Tensor):
        raise InputError(
            f"{name} must be a path, a PIL image, an array, a tensor or a list of these, not {type(image).__name__}"
        )
    try:
        # A copy, because torch refuses arrays with negative strides and warns about read-only ones.
        values = torch.as_tensor(image.copy() if isinstance(image, np.ndarray) else image).detach().cpu()
    except TypeError as error:
        raise InputError(f"{name} is an array of {image.dtype}, which cannot hold pixels: {error}") from None
    if values.dtype == torch.uint8:
        return values.float() / 255
    if values.dtype != torch.bool and not values.is_floating_point():
        raise InputError(f"{name} has dtype {values.dtype}; pass uint8 in 0..255, or floats in 0..1")
    values = values.float()
    # Written so that NaN fails too.
    if values.numel() and not bool(((values >= 0) & (values <= 1)).all()):
        raise InputError(
            f"{name} has values from {values.min():.4g} to {values.max():.4g}; floats must be finite and in 0..1"
        )
    return values
