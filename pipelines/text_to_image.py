"""Text to image: prompts to context, noise to latents, latents to images (arXiv:2112.10752)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from latentgen.checkpoint import CheckpointFolder, resolve
from latentgen.diffusion.guidance import is_guided
from latentgen.diffusion.schedule import NoiseLevel
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import ConfigError, InputError
from latentgen.files import quote
from latentgen.memory import MemoryPolicy, explained_out_of_memory, resident
from latentgen.models.text import CLIPText
from latentgen.models.unet import UNet
from latentgen.models.vae import VAEDecoder
from latentgen.pipelines import loading
from latentgen.pipelines.arguments import (
    MAX_IMAGES_PER_PROMPT,
    OutputType,
    as_negative_prompts,
    as_prompts,
    check_guidance_scale,
    check_integer,
    check_latents,
    check_output_type,
    check_seeds,
    check_side,
    output_folder,
)
from latentgen.pipelines.base import (
    DTypeName,
    FiniteCheck,
    ImageNoise,
    Images,
    Output,
    PipelineStep,
    build_denoiser,
    decode_images,
    denoising_bytes,
    export,
    join_contexts,
    resolve_device,
    resolve_dtype,
)

DEFAULT_STEPS = 25
DEFAULT_GUIDANCE_SCALE = 7.5
_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class TextToImagePipeline:
    """The stages that make images from text, and where they run.

    Attributes:
        unet: denoises latents.
        decoder: turns latents into images.
        text_encoder: turns prompts into context.
        scheduler: noise schedule, prediction type and default solver.
        memory: what to trade for memory.
        device: where the stages work. They stand there already, or on the CPU if `memory` offloads idle ones.
        source: the folder that the stages came from; saving takes the VAE's encoder from it.
        source_variant: which of the folder's sets of weights they are, such as "fp16".

    Raises:
        ConfigError: the stages do not fit together.
    """

    unet: UNet
    decoder: VAEDecoder
    text_encoder: CLIPText
    scheduler: Scheduler
    memory: MemoryPolicy = field(default_factory=MemoryPolicy)
    device: torch.device = _CPU
    source: CheckpointFolder | None = None
    source_variant: str | None = None

    def __post_init__(self) -> None:
        unet, latent_channels = self.unet.config, self.decoder.config.latent_channels
        if unet.in_channels != latent_channels or unet.out_channels != latent_channels:
            raise ConfigError(
                f"text to image needs a UNet from and to the VAE's {latent_channels} latent channels, not "
                f"from {unet.in_channels} to {unet.out_channels} (inpainting has 9, x4 upscaling 7)"
            )
        if unet.addition_embed_type or unet.class_embed_type or unet.num_class_embeds:
            raise ConfigError(
                "text to image gives the UNet text alone; this one wants more (SDXL, class labels)"
            )
        if unet.cross_attention_dim != self.text_encoder.config.hidden_size:
            raise ConfigError(
                f"cross_attention_dim {unet.cross_attention_dim} of the UNet and hidden_size "
                f"{self.text_encoder.config.hidden_size} of the text encoder must be equal"
            )
        self.unet.attention_backend = self.memory.attention
        self.decoder.attention_backend = self.memory.attention

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        dtype: DTypeName | torch.dtype = "auto",
        device: str | torch.device = "auto",
        variant: str | None = None,
        revision: str | None = None,
        memory: MemoryPolicy | None = None,
    ) -> TextToImagePipeline:
        """Load a pipeline from a folder in the diffusers layout, without the VAE's encoder.

        Args:
            source: a folder, an id on the Hub ("owner/name"), or None for the embedded default model.
            dtype: of the stages; "auto" is float16 on CUDA and float32 elsewhere.
            device: "auto" is the best that the machine has.
            variant: which of several sets of weights, such as "fp16".
            revision: branch, tag or commit on the Hub.
            memory: what to trade for memory.

        Raises:
            InputError: an argument is out of bounds.
            CheckpointError: what is wrong with the folder's files, in a subclass.
            ConfigError: a configuration holds what is not implemented.
            OfflineError: the Hub is needed and cannot be reached.
            MemoryBudgetError: the weights do not fit into memory.
        """
        memory = MemoryPolicy() if memory is None else memory
        if not isinstance(memory, MemoryPolicy):
            raise InputError(
                f"memory={memory!r} must be a MemoryPolicy, such as MemoryPolicy(offload_idle=True)"
            )
        torch_device = resolve_device(device)
        torch_dtype = resolve_dtype(dtype, torch_device)
        folder = CheckpointFolder.open(resolve(source, revision=revision, variant=variant))
        loading.check_class(folder, "StableDiffusionPipeline")
        placement = loading.Placement(
            torch_dtype,
            _CPU if memory.offload_idle else torch_device,
            variant,
            pack=memory.pack_weights and torch_device.type == "cpu",
        )
        with explained_out_of_memory(
            f"loading the weights of {quote(folder.path)}",
            partial(loading.weight_bytes, folder, placement),
            'use dtype="bfloat16", or MemoryPolicy(offload_idle=True, pack_weights=False)',
        ):
            unet = loading.load_unet(folder, placement)
            decoder = loading.load_decoder(folder, placement)
            text_encoder = loading.load_text_encoder(folder, placement)
        return cls(
            unet=unet,
            decoder=decoder,
            text_encoder=text_encoder,
            scheduler=loading.load_scheduler(folder),
            memory=memory,
            device=torch_device,
            source=folder,
            source_variant=variant,
        )

    def save_pretrained(self, folder: str | Path, *, variant: str | None = None) -> None:
        """Write a whole folder in the diffusers layout, which diffusers' StableDiffusionPipeline loads.

        The VAE's encoder, which no pipeline holds, is taken from the folder that this one came from.

        Args:
            folder: where to write; made if need be.
            variant: part of the names of the weight files, such as "fp16".

        Raises:
            InputError: the pipeline was put together by hand and has no source for the VAE's encoder.
            OutputError: a file could not be written; it keeps its old content, as do those that follow it.
        """
        if self.source is None:
            raise InputError(
                "this pipeline was not loaded from a folder, so there is no VAE encoder to save; pass "
                "source=CheckpointFolder.open(...) of the folder that the VAE came from"
            )
        target = output_folder(folder)
        placement = loading.Placement(_dtype_of(self.decoder), _CPU, self.source_variant)
        encoder = loading.load_encoder(self.source, placement)
        loading.save_folder(
            target,
            unet=self.unet,
            encoder=encoder,
            decoder=self.decoder,
            text_encoder=self.text_encoder,
            scheduler=self.scheduler,
            variant=variant,
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = DEFAULT_STEPS,
        guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        scheduler: str | Scheduler | None = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        progress: bool = True,
    ) -> Output:
        """Make images of prompts.

        Args:
            prompt: one prompt or several; of any length, none is cut.
            negative_prompt: what to lead away from: one for all prompts or one for each.
            height: pixels, a multiple of what one latent covers (8 in Stable Diffusion); by default the size
                that the model was trained at.
            width: likewise.
            num_inference_steps: steps of the solver.
            guidance_scale: scale of classifier-free guidance (arXiv:2207.12598, eq. 6, as 1 + w); 1 or less
                is no guidance, in half the time.
            num_images_per_prompt: images of each prompt.
            seed: image i of the call gets seed + i; or one seed for each image; None draws one at random.
            scheduler: for this call, the name of a solver or a whole Scheduler; by default the checkpoint's.
            latents: standard normal noise [B, C, h, w] to start from, in place of what the seeds draw.
            output_type: "pil", "np", "pt" or "latent"; see Output.
            progress: show a progress bar.

        Raises:
            InputError: an argument is out of bounds; nothing has been computed.
            NumericalError: NaN or infinity where an image was due; names the step.
            MemoryBudgetError: memory ran out; names the arguments that help.
        """
        steps = self.stream(
            prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            scheduler=scheduler,
            latents=latents,
            output_type=output_type,
            progress=progress,
        )
        (last,) = deque(steps, maxlen=1)
        return Output(last.images(), last.seeds)

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = DEFAULT_STEPS,
        guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        scheduler: str | Scheduler | None = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        progress: bool = True,
    ) -> Iterator[PipelineStep]:
        """The same as a call, step by step: each step can show a preview, and the last one gives the result.

        Arguments and errors are those of a call, and are checked at once. To cancel, stop iterating.
        """
        prompts = as_prompts("prompt", prompt)
        negatives = as_negative_prompts(negative_prompt, len(prompts))
        guidance = check_guidance_scale(guidance_scale)
        per_prompt = check_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES_PER_PROMPT)
        seeds = check_seeds(seed, len(prompts) * per_prompt)
        shape = self._latent_shape(len(seeds), height, width, latents)
        chosen = self._choose(scheduler)
        most_steps = chosen.schedule.num_train_timesteps
        steps = check_integer("num_inference_steps", num_inference_steps, 1, most_steps)
        rows = (*negatives, *prompts) if is_guided(guidance) else prompts
        return self._denoise(
            _Run(
                rows=tuple(row for row in rows for _ in range(per_prompt)),
                seeds=seeds,
                latents=None if latents is None else check_latents(latents, shape),
                shape=shape,
                scheduler=chosen,
                levels=chosen.levels(steps),
                guidance_scale=guidance,
                output_type=check_output_type(output_type),
                progress=progress,
            )
        )

    def _latent_shape(
        self, count: int, height: int | None, width: int | None, latents: Tensor | None
    ) -> tuple[int, int, int, int]:
        """[B, C, h, w] from the size asked for, else that of given latents, else that of the training."""
        factor = self.decoder.config.spatial_factor
        size = self.unet.config.sample_size
        if isinstance(latents, Tensor) and latents.ndim == 4:
            size = (latents.shape[2], latents.shape[3])
        if size is not None:
            default_height, default_width = size if isinstance(size, tuple) else (size, size)
            height = default_height * factor if height is None else height
            width = default_width * factor if width is None else width
        if height is None or width is None:
            raise InputError(
                "give height and width; the checkpoint does not say at which size it was trained"
            )
        height, width = check_side("height", height, factor), check_side("width", width, factor)
        return (count, self.unet.config.in_channels, height // factor, width // factor)

    def _choose(self, scheduler: str | Scheduler | None) -> Scheduler:
        if isinstance(scheduler, str):
            return self.scheduler.with_solver(scheduler)
        if scheduler is None:
            return self.scheduler
        if not isinstance(scheduler, Scheduler):
            raise InputError(f"scheduler must be a name or a Scheduler, not {type(scheduler).__name__}")
        return scheduler

    @torch.inference_mode()
    def _denoise(self, run: _Run) -> Iterator[PipelineStep]:
        count, _, height, width = run.shape
        factor = self.decoder.config.spatial_factor
        with explained_out_of_memory(
            f"denoising {count} image(s) of {width * factor}x{height * factor} pixels",
            partial(denoising_bytes, self.unet, len(run.rows), height * width),
            'use fewer images at once, a smaller height and width, MemoryPolicy(attention="chunked", '
            'offload_idle=True, pack_weights=False), guidance_scale=1 or dtype="bfloat16"',
        ):
            yield from self._steps(run)

    def _steps(self, run: _Run) -> Iterator[PipelineStep]:
        noise = ImageNoise(run.seeds, run.shape[1:], self.device)
        latents = run.scheduler.initial(
            noise() if run.latents is None else run.latents.to(self.device), run.levels
        ).contiguous(memory_format=torch.channels_last)
        context = self._encode(run.rows)
        total = len(run.levels) - 1
        check = FiniteCheck()
        last: PipelineStep | None = None
        finish = partial(self._finish, run.output_type, check, total)
        with (
            resident(self.unet, self.device, offload=self.memory.offload_idle),
            tqdm(total=total, desc="denoising", disable=not run.progress) as bar,
        ):
            denoiser = build_denoiser(self.unet, context, run.levels, run.scheduler, run.guidance_scale)
            for step in run.scheduler.sample(denoiser, latents, run.levels, noise):
                check.watch(step.latents)
                bar.update()
                current = PipelineStep(step.index, total, step.latents, step.x0, run.seeds, finish)
                if current.is_last:
                    last = current
                else:
                    yield current
        # The UNet has left the device by now, so that decoding has the room.
        if last is not None:
            yield last

    def _encode(self, rows: Sequence[str]) -> Tensor:
        """The context [B, S, D] of each row; equal rows are encoded once."""
        distinct = list(dict.fromkeys(rows))
        with resident(self.text_encoder.model, self.device, offload=self.memory.offload_idle):
            context = self.text_encoder.encode(distinct).context
            if context.shape[1] > self.text_encoder.window:
                context = join_contexts([self.text_encoder.encode([row]).context for row in distinct])
        return context[[distinct.index(row) for row in rows]]

    @torch.inference_mode()
    def _finish(self, output_type: OutputType, check: FiniteCheck, total: int, latents: Tensor) -> Images:
        check.verify(total, _dtype_of(self.unet))
        if output_type == "latent":
            return latents
        return export(decode_images(self.decoder, latents, self.device, self.memory), output_type)


@dataclass(frozen=True, eq=False)
class _Run:
    """The checked arguments of one call; rows are the prompts of all images, the negative ones first."""

    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    latents: Tensor | None
    shape: tuple[int, int, int, int]
    scheduler: Scheduler
    levels: tuple[NoiseLevel, ...]
    guidance_scale: float
    output_type: OutputType
    progress: bool


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
