"""What the pipelines share: where they run, per-image noise, guidance over the UNet, decoding and results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Literal, NamedTuple, ParamSpec

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentgen.diffusion.guidance import classifier_free, is_guided
from latentgen.diffusion.prediction import Denoiser
from latentgen.diffusion.schedule import NoiseLevel
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import InputError, NumericalError
from latentgen.image import to_numpy, to_pil, to_unit
from latentgen.memory import MemoryPolicy, decode, resident, weight_bytes
from latentgen.models.unet import AddedConditioning, UNet
from latentgen.models.vae import VAEDecoder
from latentgen.pipelines.arguments import OutputType

DTypeName = Literal["auto", "float32", "float16", "bfloat16"]
Images = list[Image.Image] | np.ndarray | Tensor

P = ParamSpec("P")

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Output(NamedTuple):
    """What a call gives.

    Attributes:
        images: what `output_type` asked for: "pil" a list of images, "np" float32 [B, H, W, 3] in 0..1, "pt"
            float32 [B, 3, H, W] in 0..1 on the device, "latent" float32 [B, C, h, w] on the device. Prompts
            come in their order, the images of one prompt together.
        seeds: the seed of each image, which alone makes that image again.
    """

    images: Images
    seeds: tuple[int, ...]


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that was asked for; "auto" is the best one that the machine has.

    Raises:
        InputError: the name is not a device, or this machine has none of that kind.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(
            f'device={device!r} is not a device; use "auto", "cpu", "cuda", "cuda:1" or "mps"'
        ) from None
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    if (resolved.index or 0) >= counts.get(resolved.type, 0):
        there = ", ".join(name for name, count in counts.items() if count)
        raise InputError(f'device={device!r} is not there; this machine has: {there}. "auto" takes the best')
    return resolved


def resolve_dtype(dtype: DTypeName | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the stages; "auto" is float16 on CUDA and float32 elsewhere.

    Raises:
        InputError: not one of float32, float16, bfloat16.
    """
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    resolved = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in _DTYPES.values():
        raise InputError(f"dtype={dtype!r} is not supported; choose from auto, {', '.join(_DTYPES)}")
    return resolved


class ImageNoise:
    """Standard normal noise of which every image owns its part.

    Row i comes from a CPU generator seeded with seeds[i] alone, so an image depends neither on its neighbours
    nor on the device. It is what diffusers draws from a list of CPU generators.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._shape = (len(seeds), *shape)
        self._device = device

    def __call__(self) -> Tensor:
        """The next draw: float32 [B, C, h, w] on the device."""
        # A copy from pinned memory does not wait for the device.
        noise = torch.empty(self._shape, pin_memory=self._device.type == "cuda")
        for row, generator in zip(noise, self._generators, strict=True):
            row.normal_(generator=generator)
        return noise.to(self._device, non_blocking=True)


def decode_images(decoder: VAEDecoder, latents: Tensor, device: torch.device, memory: MemoryPolicy) -> Tensor:
    """Decode float32 latents [B, C, h, w] to images [B, 3, H, W], nominally in -1..1.

    The decoder of Stable Diffusion can overflow in float16; if it gives infinity or NaN, it runs once more in
    float32.

    Raises:
        NumericalError: the images are not finite in float32 either.
    """
    dtype = next(decoder.parameters()).dtype
    latents = latents.contiguous(memory_format=torch.channels_last)
    with resident(decoder, device, offload=memory.offload_idle):
        images = decode(decoder, latents.to(dtype), memory)
        if dtype != torch.float32 and not _finite(images):
            images = decode(_in_float32(decoder), latents, memory)
    if not _finite(images):
        raise NumericalError(
            "the decoder gave NaN or infinity, even in float32, for finite latents; check the VAE's weights"
        )
    return images


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _in_float32(decoder: VAEDecoder) -> VAEDecoder:
    """A copy, because other threads may be decoding with the original."""
    with torch.device("meta"):
        copy = VAEDecoder(decoder.config)
    copy.load_state_dict({name: tensor.float() for name, tensor in decoder.state_dict().items()}, assign=True)
    copy.attention_backend = decoder.attention_backend
    return copy.eval()


def export(images: Tensor, output_type: OutputType) -> Images:
    """Turn images [B, 3, H, W] in -1..1 into what `output_type` names."""
    match output_type:
        case "pil":
            return to_pil(images)
        case "np":
            return to_numpy(images)
        case "pt":
            return to_unit(images)
        case "latent":
            return images


class FiniteCheck:
    """Finds the step at which latents stopped being finite, without a synchronisation while they are made."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def watch(self, latents: Tensor) -> None:
        """Note the latents of the next step; one reduction on the device."""
        self._sums.append(latents.sum())

    def verify(self, total: int, dtype: torch.dtype) -> None:
        """Wait for the steps watched so far.

        Raises:
            NumericalError: naming the first step, of `total`, that gave NaN or infinity.
        """
        finite = torch.stack(self._sums).isfinite().tolist()
        if not all(finite):
            step = finite.index(False) + 1
            advice = (
                "check the weights and guidance_scale"
                if dtype == torch.float32
                else 'try dtype="bfloat16" or dtype="float32"'
            )
            raise NumericalError(f"the latents hold NaN or infinity from step {step} of {total} on; {advice}")


@dataclass(frozen=True, eq=False)
class PipelineStep:
    """One step of a run that is under way.

    Attributes:
        index: number of the step, from 0.
        total: how many steps the run has.
        latents: float32 [B, C, h, w], the latents after this step.
        x0: float32 [B, C, h, w], where the denoiser expects the run to end.
        seeds: the seed of each image.
    """

    index: int
    total: int
    latents: Tensor
    x0: Tensor
    seeds: tuple[int, ...]
    _finish: Callable[[Tensor], Images]

    @property
    def is_last(self) -> bool:
        """Whether `images` gives the result rather than a preview."""
        return self.index == self.total - 1

    def images(self) -> Images:
        """The result at the last step, a preview of it before, as the call's `output_type` has it.

        Raises:
            NumericalError: the latents or the images hold NaN or infinity; names the step.
        """
        return self._finish(self.latents if self.is_last else self.x0)


def completed(stream: Callable[P, Iterator[PipelineStep]]) -> Callable[P, Output]:
    """What runs a stream to its end and gives its result: the call of a pipeline, with the arguments of its stream."""

    @wraps(stream)
    def call(*args: P.args, **kwargs: P.kwargs) -> Output:
        (last,) = deque(stream(*args, **kwargs), maxlen=1)
        return Output(last.images(), last.seeds)

    return call


def denoising_bytes(unet: UNet, rows: int, pixels: int) -> int:
    """A lower bound of the memory of a step: the weights, and four feature maps at the highest resolution.

    Args:
        rows: what the UNet sees at once, two of each image with guidance.
        pixels: latent pixels of one image.
    """
    maps = 4 * rows * pixels * unet.config.block_out_channels[0]
    return weight_bytes(unet) + maps * unet.conv_in.weight.element_size()


def build_denoiser(
    unet: UNet,
    context: Tensor,
    added: AddedConditioning | None,
    levels: Sequence[NoiseLevel],
    scheduler: Scheduler,
    guidance_scale: float,
) -> Denoiser:
    """A denoiser for one run over `levels`, with all that is constant over the run computed once.

    Args:
        context: [B, S, D], or with guidance [2B, S, D]: of the negative prompts, then of the prompts.
        added: what SDXL's UNet is given besides, for the same rows.
    """
    dtype = unet.conv_in.weight.dtype
    index_of = {level.timestep: index for index, level in enumerate(levels[:-1])}
    timesteps = torch.tensor([level.timestep for level in levels[:-1]], device=context.device)
    constants = unet.constants(context.to(dtype), timesteps, added=added)
    guided = is_guided(guidance_scale)

    def predict(x: Tensor, level: NoiseLevel) -> tuple[Tensor | None, Tensor]:
        output = unet.step(x.to(dtype), constants, index_of[level.timestep]).float()
        if not guided:
            return None, output
        unconditional, conditional = output.chunk(2)
        return unconditional, conditional

    return classifier_free(predict, scheduler.prediction_type, guidance_scale)
