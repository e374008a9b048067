"""The memory policy of a pipeline: offloading, sliced and tiled decoding, and hints when memory runs out."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from latentgen.deprecated import renamed_arguments, warn_renamed
from latentgen.errors import InputError, LatentgenError, MemoryBudgetError
from latentgen.models.attention import AttentionBackend
from latentgen.models.pixels import ImageDecoder

Decode = Callable[[Tensor], Tensor]

SMALLEST_TILE = 8
# Side of the tiles of the retry after running out of memory: 512 pixels at eight a latent.
FALLBACK_TILE = 64
# Messages of failed allocations where torch raises no OutOfMemoryError: on the CPU, and on MPS.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


@dataclass(frozen=True)
class MemoryPolicy:
    """Options that trade time, or in one marked case exactness, for memory.

    Attributes:
        attention: backend of the UNet and the VAE. "auto" takes the best that is installed; "sdpa" is torch's own,
            "xformers" needs that package, "chunked" computes the queries in chunks and needs the least memory.
        offload_idle: keep every stage in host memory and move it to the device only while it runs. Exact; costs one
            transfer of each stage per call. Such a pipeline serves one call at a time.
        sequential_guidance: evaluate the branches of guidance, such as the unconditional and the conditional one, one
            after the other. Exact up to rounding; a step takes a little longer.
        vae_slicing: decode the images of a batch one after the other. Exact, and rarely slower.
        pack_weights: on a CPU, keep a second copy of the weights of convolutions in the layout of its kernels. Exact
            up to rounding, and faster; without it, less memory.
        decode_tile: decode in overlapping square tiles of this side, counted in latents (64 is 512 pixels at
            eight pixels a latent). APPROXIMATE: each tile is normalized by its own statistics, so tone may
            drift between tiles; their overlaps are blended. None decodes whole images.

    Raises:
        InputError: a field has an invalid value.
    """

    attention: AttentionBackend = "auto"
    offload_idle: bool = False
    sequential_guidance: bool = False
    vae_slicing: bool = True
    pack_weights: bool = True
    decode_tile: int | None = None

    def __post_init__(self) -> None:
        if self.attention not in get_args(AttentionBackend):
            allowed = ", ".join(get_args(AttentionBackend))
            raise InputError(f"attention={self.attention!r} is not a backend; choose from {allowed}")
        flags = {
            "offload_idle": self.offload_idle,
            "sequential_guidance": self.sequential_guidance,
            "vae_slicing": self.vae_slicing,
            "pack_weights": self.pack_weights,
        }
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise InputError(f"{name}={value!r} must be True or False")
        tile = self.decode_tile
        if tile is not None and (not isinstance(tile, int) or isinstance(tile, bool) or tile < SMALLEST_TILE):
            raise InputError(
                f"decode_tile={tile!r} must be None or a whole number of latents, {SMALLEST_TILE} at least"
            )

    @property
    def guide_one_by_one(self) -> bool:
        """Deprecated: `sequential_guidance`."""
        warn_renamed("MemoryPolicy.guide_one_by_one", "sequential_guidance")
        return self.sequential_guidance

    @property
    def decode_one_by_one(self) -> bool:
        """Deprecated: `vae_slicing`."""
        warn_renamed("MemoryPolicy.decode_one_by_one", "vae_slicing")
        return self.vae_slicing


MemoryPolicy.__init__ = renamed_arguments(
    guide_one_by_one="sequential_guidance", decode_one_by_one="vae_slicing"
)(MemoryPolicy.__init__)


@contextmanager
def on_device(module: nn.Module, device: torch.device, *, offload: bool) -> Iterator[None]:
    """Place the tensors of `module` on `device`; with `offload`, only inside the ``with`` block.

    Inference does not change weights, so the copies on the device are dropped and never copied back;
    memory-mapped weights stay memory-mapped on the host.
    """
    if not offload or all(parameter.device == device for parameter in module.parameters()):
        yield
        return
    originals = [
        (owner, name, tensor)
        for owner in module.modules()
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
    ]
    try:
        for owner, name, original in originals:
            copy = original.detach().to(device)
            setattr(
                owner,
                name,
                nn.Parameter(copy, requires_grad=False) if isinstance(original, nn.Parameter) else copy,
            )
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is a failed allocation, on any device, that has no hint yet."""
    if isinstance(error, LatentgenError):
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _OUT_OF_MEMORY)


@contextmanager
def oom_hint(work: str, at_least: Callable[[], int], advice: str) -> Iterator[None]:
    """Turn an out-of-memory error in the ``with`` block into one that says what to change.

    Args:
        work: what was being done, and for how much.
        at_least: returns a lower bound of the bytes needed; called only when memory runs out.
        advice: the options that reduce the need.

    Raises:
        MemoryBudgetError: in place of torch's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryBudgetError(
            f"out of memory while {work}, which needs at least {at_least() / 1e9:.2f} GB; {advice}"
        ) from error


def weight_bytes(module: nn.Module) -> int:
    """The size of a module's weights."""
    return sum(parameter.nbytes for parameter in module.parameters())


def decode(decoder: ImageDecoder, latents: Tensor, policy: MemoryPolicy) -> Tensor:
    """Decode latents [B, C, h, w] to images [B, 3, H, W] in -1..1, as `policy` says.

    If memory runs out, retries once, with a warning: one image at a time, or else in tiles.

    Raises:
        MemoryBudgetError: memory runs out again.
    """
    batch, _, height, width = latents.shape
    fallback = _fallback_policy(latents, policy)
    if fallback is not None:
        try:
            return _decode(decoder, latents, policy)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler: its exception would keep the tensors of the first attempt alive.
        warnings.warn(
            f"out of memory while decoding; retrying with vae_slicing={fallback.vae_slicing}, "
            f"decode_tile={fallback.decode_tile}",
            stacklevel=2,
        )
        policy = fallback
    factor = decoder.config.spatial_factor
    work = f"decoding {batch} image(s) of {width * factor}x{height * factor} pixels"
    advice = (
        "use MemoryPolicy(offload_idle=True, vae_slicing=True, decode_tile=...) with a small tile such as "
        '32, a smaller height and width, or dtype="bfloat16"'
    )
    with oom_hint(work, partial(_decoder_bytes, decoder, latents, policy), advice):
        return _decode(decoder, latents, policy)


def _fallback_policy(latents: Tensor, policy: MemoryPolicy) -> MemoryPolicy | None:
    """The policy to retry with, or None if nothing would save memory."""
    if len(latents) > 1 and not policy.vae_slicing:
        return replace(policy, vae_slicing=True)
    if max(latents.shape[2:]) > FALLBACK_TILE and policy.decode_tile is None:
        return replace(policy, decode_tile=FALLBACK_TILE)
    return None


def _decoder_bytes(decoder: ImageDecoder, latents: Tensor, policy: MemoryPolicy) -> int:
    """A lower bound: the weights, and the widest resnet block's input, skip and output at full resolution."""
    tile = policy.decode_tile or max(latents.shape[2:])
    pixels = math.prod(min(side, tile) * decoder.config.spatial_factor for side in latents.shape[2:])
    rows = 1 if policy.vae_slicing else len(latents)
    channels = sum(decoder.config.block_out_channels[:2])
    return weight_bytes(decoder) + rows * pixels * channels * latents.element_size()


def _decode(decoder: ImageDecoder, latents: Tensor, policy: MemoryPolicy) -> Tensor:
    decode_rows: Decode = decoder
    if policy.decode_tile is not None and max(latents.shape[2:]) > policy.decode_tile:
        warnings.warn(
            f"decoding in tiles of {policy.decode_tile} latents is approximate: tone may drift between tiles",
            stacklevel=3,
        )
        decode_rows = partial(
            decode_in_tiles, decoder, tile=policy.decode_tile, factor=decoder.config.spatial_factor
        )
    if policy.vae_slicing and len(latents) > 1:
        return torch.cat([decode_rows(row) for row in latents.split(1)])
    return decode_rows(latents)


def decode_in_tiles(decoder: Decode, latents: Tensor, *, tile: int, factor: int) -> Tensor:
    """Decode latents [B, C, h, w] in square tiles that overlap by a quarter, blended linearly.

    Approximate: the decoder's group normalization and attention see one tile at a time.

    Args:
        decoder: maps latents [B, C, h, w] to images [B, 3, h * factor, w * factor].
        latents: what to decode.
        tile: side of a tile in latents; a shorter side of the latents is one tile.
        factor: image pixels per latent pixel, along each side.

    Returns:
        float32 images [B, 3, h * factor, w * factor].
    """
    batch, _, height, width = latents.shape
    return in_tiles(
        lambda rows, columns: decoder(latents[..., rows, columns]),
        (batch, 3, height, width),
        tile=tile,
        device=latents.device,
        factor=factor,
    )


def in_tiles(
    work: Callable[[slice, slice], Tensor],
    shape: Sequence[int],
    *,
    tile: int,
    device: torch.device,
    factor: int = 1,
) -> Tensor:
    """Apply `work` to square tiles that overlap by a quarter, and blend the results linearly.

    Args:
        work: returns the result [..., h * factor, w * factor] for h rows and w columns of its input.
        shape: [..., height, width]: leading dimensions of the result, height and width of the input.
        tile: side of a tile; a shorter side of the input is one tile.
        device: of the result.
        factor: pixels of the result per pixel of the input, along each side.

    Returns:
        float32 [..., height * factor, width * factor].
    """
    *leading, height, width = shape
    overlap = max(tile // 4, 1)
    sides = min(tile, height), min(tile, width)
    down, across = (_ramp(side * factor, overlap * factor) for side in sides)
    mask = (down[:, None] * across).to(device)
    total = torch.zeros((*leading, height * factor, width * factor), device=device)
    weights = torch.zeros(total.shape[-2:], device=device)
    for top, left in itertools.product(tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)):
        piece = work(slice(top, top + sides[0]), slice(left, left + sides[1]))
        rows = slice(top * factor, (top + sides[0]) * factor)
        columns = slice(left * factor, (left + sides[1]) * factor)
        total[..., rows, columns] += piece * mask
        weights[rows, columns] += mask
    return total.div_(weights)


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles begin along one side; the last one ends with the side."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def _ramp(length: int, overlap: int) -> Tensor:
    """Weights [length] that rise from both ends over `overlap` pixels and are never 0."""
    distance = torch.arange(length, dtype=torch.float32) + 0.5
    return (torch.minimum(distance, length - distance) / overlap).clamp(max=1)
