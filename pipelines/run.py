"""A call that is checked and ready to be run: what it asks for, how it begins, and the stages that it runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from latentgen.memory import MemoryPolicy
from latentgen.models.pixels import ImageDecoder
from latentgen.models.text import TextEncoder
from latentgen.models.unet import UNet
from latentgen.pipelines.arguments import OutputType
from latentgen.pipelines.conditioning import SizeConditioning
from latentgen.pipelines.guiding import Guided
from latentgen.pipelines.keeping import Kept
from latentgen.pipelines.request import Request, Sampling


class Stages(Protocol):
    """The stages of a pipeline, and where they run."""

    @property
    def unet(self) -> UNet: ...

    @property
    def decoder(self) -> ImageDecoder: ...

    @property
    def text_encoder(self) -> TextEncoder: ...

    @property
    def memory(self) -> MemoryPolicy: ...

    @property
    def device(self) -> torch.device: ...


class ImageNoise:
    """Standard normal noise of which every image owns its part.

    Row i comes from a CPU generator seeded with seeds[i] alone, so an image depends neither on its neighbours
    nor on the device. It is what diffusers draws from a list of CPU generators.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._device = device

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next draw of each image, `shape` [C, h, w]: float32 [B, C, h, w] on the device."""
        # A copy from pinned memory does not wait for the device.
        noise = torch.empty((len(self._generators), *shape), pin_memory=self._device.type == "cuda")
        for row, generator in zip(noise, self._generators, strict=True):
            row.normal_(generator=generator)
        return noise.to(self._device, non_blocking=True)


class Beginning(NamedTuple):
    """What the loop begins with.

    Attributes:
        latents: float32 [B, C, h, w], standing at the first noise level.
        channels: what is concatenated to the latents at each step, [B, K, h, w], or where the rows of a guidance differ
            [rows * B, K, h, w].
        class_labels: what the UNet is told besides the timestep, [1].
        kept: what of an image is kept.
    """

    latents: Tensor
    channels: Tensor | None = None
    class_labels: Tensor | None = None
    kept: Kept | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """One call, checked.

    Attributes:
        request: the images that are to be made.
        sampling: the steps.
        guided: what becomes of the outputs for one image, and the texts that they are for.
        shape: of the latents, [B, C, h, w].
        begin: makes what the loop begins with; draws its noise from what each image owns.
        size: height and width in pixels of the images, which are cropped to it.
        output_type: what becomes of the latents.
        progress: whether to show a progress bar.
        size_conditioning: what SDXL is told.
        composite: what becomes of the images [B, 3, H, W] in 0..1, where they are no result by themselves.
        tile: side, in latents, of the overlapping tiles in which larger latents are denoised and decoded; each step
            blends what they give (arXiv:2302.08113), so that neighbours agree. None takes all latents whole.
    """

    request: Request
    sampling: Sampling
    guided: Guided
    shape: tuple[int, int, int, int]
    begin: Callable[[ImageNoise], Beginning]
    size: tuple[int, int]
    output_type: OutputType
    progress: bool
    size_conditioning: SizeConditioning = field(default_factory=SizeConditioning)
    composite: Callable[[Tensor], Tensor] | None = None
    tile: int | None = None

    @property
    def is_tiled(self) -> bool:
        """Whether the latents are larger than a tile."""
        return self.tile is not None and max(self.shape[2:]) > self.tile
