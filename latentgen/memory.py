"""What a run may trade for memory, and the machinery that makes the trades."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
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
from latentgen.tiling import in_tiles

Decode = Callable[[Tensor], Tensor]

SMALLEST_TILE = 8
# The side of the tiles that a decoder which ran out of memory goes on with: 512 pixels at eight a latent.
FALLBACK_TILE = 64
# How torch tells of a failed allocation where it does not raise OutOfMemoryError: on the CPU, and on MPS.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


@dataclass(frozen=True)
class MemoryPolicy:
    """The knobs that trade time, or with one marked exception exactness, for memory.

    Attributes:
        attention: how the UNet and the VAE compute attention. "auto" takes what the machine has; "sdpa" is torch's own,
            "xformers" needs that package, "chunked" works through the queries piece by piece and needs least.
        offload_idle: keep every stage in the memory of the host and bring it to the device only while it
            works. Exact; costs one transfer of each stage a call. Such a pipeline serves one call at a time.
        sequential_guidance: evaluate the branches of guidance, such as the unconditional and the conditional one, one
            after the other. Exact up to rounding; a step takes a little longer.
        vae_slicing: decode the images of a batch one after the other. Exact, and rarely slower.
        pack_weights: on a CPU, keep a second copy of the weights of convolutions in the layout of its kernels. Exact
            up to rounding, and faster; without it, less memory.
        decode_tile: decode in overlapping square tiles of this side, counted in latents (64 is 512 pixels at
            eight pixels a latent). APPROXIMATE: each tile is normalised by its own statistics, so tone may
            drift between tiles; their overlaps are blended. None decodes whole images.

    Raises:
        InputError: a knob holds a value that it cannot take.
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
    """Hold the tensors of `module` on `device`; with `offload`, only inside the ``with`` block.

    Weights do not change while they work, so their copies on the device are dropped and never written back;
    memory-mapped weights stay memory-mapped at home.
    """
    if not offload or all(parameter.device == device for parameter in module.parameters()):
        yield
        return
    homes = [
        (owner, name, tensor)
        for owner in module.modules()
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
    ]
    try:
        for owner, name, home in homes:
            copy = home.detach().to(device)
            setattr(
                owner,
                name,
                nn.Parameter(copy, requires_grad=False) if isinstance(home, nn.Parameter) else copy,
            )
        yield
    finally:
        for owner, name, home in homes:
            setattr(owner, name, home)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on any device, and was not explained yet."""
    if isinstance(error, LatentgenError):
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _OUT_OF_MEMORY)


@contextmanager
def oom_hint(work: str, at_least: Callable[[], int], advice: str) -> Iterator[None]:
    """Let running out of memory in the ``with`` block end in an error that says what helps.

    Args:
        work: what was being done, and for how much.
        at_least: gives a lower bound of the bytes that this needs; asked only when they were not there.
        advice: the flags that make it need less.

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
    """Decode latents [B, C, h, w] to images [B, 3, H, W] in -1..1, as sparingly as `policy` asks.

    If memory runs out, it goes on with the next knob, once and with a warning: images one by one, or else tiles.

    Raises:
        MemoryBudgetError: memory ran out all the same.
    """
    batch, _, height, width = latents.shape
    sparing = _next_knob(latents, policy)
    if sparing is not None:
        try:
            return _decode(decoder, latents, policy)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Out of the handler, whose exception would keep the tensors of the first attempt alive.
        warnings.warn(
            f"out of memory while decoding; going on with vae_slicing={sparing.vae_slicing}, "
            f"decode_tile={sparing.decode_tile}",
            stacklevel=2,
        )
        policy = sparing
    factor = decoder.config.spatial_factor
    work = f"decoding {batch} image(s) of {width * factor}x{height * factor} pixels"
    advice = (
        "use MemoryPolicy(offload_idle=True, vae_slicing=True, decode_tile=...) with a small tile such as "
        '32, a smaller height and width, or dtype="bfloat16"'
    )
    with oom_hint(work, partial(_decoder_bytes, decoder, latents, policy), advice):
        return _decode(decoder, latents, policy)


def _next_knob(latents: Tensor, policy: MemoryPolicy) -> MemoryPolicy | None:
    """The first saving that `policy` leaves open and that would make a difference; None if there is none."""
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

    Approximate: the group normalisation and the attention of the decoder see one tile at a time.

    Args:
        decoder: maps latents [B, C, h, w] to images [B, 3, h * factor, w * factor].
        latents: what to decode.
        tile: side of a tile in latents; a side of the latents that is shorter is taken whole.
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
