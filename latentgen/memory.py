"""The memory policy of a pipeline, offloading, and hints when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn

from latentgen.deprecated import renamed_arguments, warn_renamed
from latentgen.errors import InputError, LatentgenError, MemoryBudgetError
from latentgen.models.attention import AttentionBackend

SMALLEST_TILE = 8
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
        for name in ("offload_idle", "sequential_guidance", "vae_slicing", "pack_weights"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={getattr(self, name)!r} must be True or False")
        tile = self.decode_tile
        if tile is not None and (not isinstance(tile, int) or isinstance(tile, bool) or tile < SMALLEST_TILE):
            raise InputError(f"decode_tile={tile!r} must be None or a whole number from {SMALLEST_TILE}")

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
            is_parameter = isinstance(original, nn.Parameter)
            setattr(owner, name, nn.Parameter(copy, requires_grad=False) if is_parameter else copy)
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
