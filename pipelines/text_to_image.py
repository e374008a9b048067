"""Text to image: prompts to context, noise to latents, latents to images (arXiv:2112.10752)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from latentgen.checkpoints.folder import Checkpoint, CheckpointFolder, resolve
from latentgen.checkpoints.identify import StatedPrediction
from latentgen.checkpoints.single_file import SingleFile, with_vae
from latentgen.diffusion.guidance import is_guided
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import ConfigError, InputError
from latentgen.files import quote
from latentgen.memory import MemoryPolicy, explained_out_of_memory
from latentgen.models.text import TextEncoder
from latentgen.models.unet import UNet
from latentgen.models.vae import VAEDecoder, VAEEncoder
from latentgen.pipelines import adapting, loading
from latentgen.pipelines.arguments import (
    MAX_CLIP_SKIP,
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
    check_size_conditioning,
    output_folder,
)
from latentgen.pipelines.base import (
    DTypeName,
    resolve_device,
    resolve_dtype,
)
from latentgen.pipelines.conditioning import (
    BASE_TIME_IDS,
    REFINER_TIME_IDS,
    SizeConditioning,
    time_id_count,
    time_ids,
)
from latentgen.pipelines.denoising import PipelineStep, Run, completed, denoise, part_of_run

DEFAULT_STEPS = 25
_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class TextToImagePipeline:
    """The stages that make images from text, and where they run.

    Attributes:
        unet: denoises latents.
        decoder: turns latents into images.
        text_encoder: turns prompts into context, and for SDXL into a pooled state.
        scheduler: noise schedule, prediction type and default solver.
        memory: what to trade for memory.
        device: where the stages work. They stand there already, or on the CPU if `memory` offloads idle ones.
        load_encoder: gives the VAE's encoder, which drawing does without, when the pipeline is saved or handed on.
        force_zeros_for_empty_prompt: the model was trained with zeros in the place of an empty prompt (SDXL base);
            without a negative prompt guidance leads away from those.
        default_guidance_scale: what a call that names none is guided with.

    Raises:
        ConfigError: the stages do not fit together.
    """

    unet: UNet
    decoder: VAEDecoder
    text_encoder: TextEncoder
    scheduler: Scheduler
    memory: MemoryPolicy = field(default_factory=MemoryPolicy)
    device: torch.device = _CPU
    load_encoder: Callable[[], VAEEncoder] | None = None
    force_zeros_for_empty_prompt: bool = False
    default_guidance_scale: float = loading.SD_GUIDANCE_SCALE

    def __post_init__(self) -> None:
        unet, latent_channels = self.unet.config, self.decoder.config.latent_channels
        if unet.in_channels != latent_channels or unet.out_channels != latent_channels:
            raise ConfigError(
                f"text to image needs a UNet from and to the VAE's {latent_channels} latent channels, not "
                f"from {unet.in_channels} to {unet.out_channels} (inpainting has 9, x4 upscaling 7)"
            )
        if unet.class_embed_type or unet.num_class_embeds:
            raise ConfigError("text to image gives the UNet text alone; this one wants class labels, too")
        if unet.cross_attention_dim != self.text_encoder.context_width:
            raise ConfigError(
                f"cross_attention_dim {unet.cross_attention_dim} of the UNet and the width "
                f"{self.text_encoder.context_width} of the text encoder's context must be equal"
            )
        if self._time_ids not in (0, REFINER_TIME_IDS, BASE_TIME_IDS):
            raise ConfigError(
                f"projection_class_embeddings_input_dim {unet.projection_class_embeddings_input_dim} of the UNet must "
                f"be the {self.text_encoder.pooled_width} channels of the text encoder's pooled state and "
                f"{BASE_TIME_IDS} (SDXL base) or {REFINER_TIME_IDS} (refiner) times addition_time_embed_dim "
                f"{unet.addition_time_embed_dim}"
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
        vae: str | Path | None = None,
        memory: MemoryPolicy | None = None,
    ) -> TextToImagePipeline:
        """Load a pipeline from a folder in the diffusers layout, without the VAE's encoder.

        Stable Diffusion 1.x and 2.x, SDXL, its refiner, and what was distilled from them.

        Args:
            source: a folder, an id on the Hub ("owner/name"), or None for the embedded default model.
            dtype: of the stages; "auto" is float16 on CUDA and float32 elsewhere.
            device: "auto" is the best that the machine has.
            variant: which of several sets of weights, such as "fp16".
            revision: branch, tag or commit on the Hub.
            vae: a .safetensors file with the VAE to use in place of the folder's.
            memory: what to trade for memory.

        Raises:
            InputError: an argument is out of bounds.
            CheckpointError: what is wrong with the folder's files, in a subclass.
            ConfigError: a configuration holds what is not implemented.
            OfflineError: the Hub is needed and cannot be reached.
            MemoryBudgetError: the weights do not fit into memory.
        """
        checkpoint: Checkpoint = CheckpointFolder.open(resolve(source, revision=revision, variant=variant))
        if vae is not None:
            checkpoint = with_vae(checkpoint, vae)
        return cls.from_checkpoint(checkpoint, dtype=dtype, device=device, variant=variant, memory=memory)

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        prediction_type: StatedPrediction | None = None,
        vae: str | Path | None = None,
        ema: bool = False,
        dtype: DTypeName | torch.dtype = "auto",
        device: str | torch.device = "auto",
        memory: MemoryPolicy | None = None,
    ) -> TextToImagePipeline:
        """Load a pipeline from one .safetensors file in the original layout; needs no network.

        Args:
            path: the file: Stable Diffusion 1.x or 2.x, SDXL or its refiner.
            prediction_type: "epsilon" or "v_prediction", where the file does not say (SD 2.x).
            vae: a .safetensors file with the VAE to use in place of the file's own.
            ema: read the moving averages of the UNet's weights, where the file holds both.
            dtype: see :meth:`from_pretrained`.
            device: see :meth:`from_pretrained`.
            memory: see :meth:`from_pretrained`.

        Raises:
            InputError: an argument is out of bounds, or the file does not say what its UNet predicts.
            CheckpointError: what is wrong with the file, in a subclass.
            MemoryBudgetError: the weights do not fit into memory.
        """
        checkpoint = SingleFile.open(path, prediction_type=prediction_type, vae=vae, ema=ema)
        return cls.from_checkpoint(checkpoint, dtype=dtype, device=device, memory=memory)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: DTypeName | torch.dtype = "auto",
        device: str | torch.device = "auto",
        variant: str | None = None,
        memory: MemoryPolicy | None = None,
    ) -> TextToImagePipeline:
        """Load a pipeline from an opened checkpoint: a CheckpointFolder, a SingleFile, or parts of several.

        Arguments and errors are those of :meth:`from_pretrained`.
        """
        memory = MemoryPolicy() if memory is None else memory
        if not isinstance(memory, MemoryPolicy):
            raise InputError(
                f"memory={memory!r} must be a MemoryPolicy, such as MemoryPolicy(offload_idle=True)"
            )
        torch_device = resolve_device(device)
        torch_dtype = resolve_dtype(dtype, torch_device)
        loading.check_class(checkpoint, loading.TEXT_TO_IMAGE_CLASSES)
        placement = loading.Placement(
            torch_dtype,
            _CPU if memory.offload_idle else torch_device,
            variant,
            pack=memory.pack_weights and torch_device.type == "cpu",
        )
        with explained_out_of_memory(
            f"loading the weights of {quote(checkpoint.path)}",
            partial(loading.weight_bytes, checkpoint, placement),
            'use dtype="bfloat16", or MemoryPolicy(offload_idle=True, pack_weights=False)',
        ):
            unet = loading.load_unet(checkpoint, placement)
            decoder = loading.load_decoder(checkpoint, placement)
            text_encoder = loading.load_text_encoder(checkpoint, placement)
        encoder_placement = loading.Placement(torch_dtype, _CPU, variant)
        return cls(
            unet=unet,
            decoder=decoder,
            text_encoder=text_encoder,
            scheduler=loading.load_scheduler(checkpoint),
            memory=memory,
            device=torch_device,
            load_encoder=partial(loading.load_encoder, checkpoint, encoder_placement),
            force_zeros_for_empty_prompt=loading.forces_zeros(checkpoint),
            default_guidance_scale=loading.guidance_scale(checkpoint),
        )

    def with_lora(
        self, source: str | Path, weight: float = 1.0, *, name: str | None = None, merged: bool = False
    ) -> TextToImagePipeline:
        """The same pipeline with a LoRA (arXiv:2106.09685); this one stays as it is, and they share their weights.

        Args:
            source: a file of kohya or diffusers, or a folder of PEFT.
            weight: what the LoRA is multiplied by; may be negative.
            name: how to call it later; by default the name of the file.
            merged: add it to new copies of the weights that it changes: no time at each step, but for good.

        Raises:
            AdapterError: some of it has no place in this model, does not fit there, or the name is taken.
            CheckpointError: what is wrong with the file, in a subclass.
            InputError: the weight is out of bounds.
        """
        return self._adapted(adapting.with_lora(self, source, weight, name=name, merged=merged))

    def with_lora_weight(self, name: str, weight: float) -> TextToImagePipeline:
        """The same pipeline with another weight for one of its LoRAs; 0 switches it off.

        Raises:
            AdapterError: there is none of that name.
            InputError: the weight is out of bounds.
        """
        return self._adapted(adapting.with_lora_weight(self, name, weight))

    def without_lora(self, name: str) -> TextToImagePipeline:
        """The same pipeline without one of its LoRAs: bit for bit what it was before it had it.

        Raises:
            AdapterError: there is none of that name.
        """
        return self._adapted(adapting.without_lora(self, name))

    def with_embedding(self, source: str | Path, *, token: str | None = None) -> TextToImagePipeline:
        """The same pipeline with one more token that prompts can use (textual inversion, arXiv:2208.01618).

        Args:
            source: a .safetensors file of diffusers or A1111.
            token: what prompts write for it; by default its name in the file, or that of the file.

        Raises:
            AdapterError: it is for another family of models, or the token exists already.
            CheckpointError: what is wrong with the file, in a subclass.
        """
        return self._adapted(adapting.with_embedding(self, source, token=token))

    @property
    def loras(self) -> dict[str, float]:
        """The weight of each LoRA, by name."""
        return adapting.attached_loras(self)

    def _adapted(self, stages: adapting.AdaptedStages) -> TextToImagePipeline:
        return replace(self, unet=stages.unet, text_encoder=stages.text_encoder)

    def save_pretrained(self, folder: str | Path, *, variant: str | None = None) -> None:
        """Write a whole folder in the diffusers layout, which diffusers' pipeline of the same family loads.

        The VAE's encoder, which this pipeline does not hold, is taken from where the pipeline came from.

        Args:
            folder: where to write; made if need be.
            variant: part of the names of the weight files, such as "fp16".

        Raises:
            InputError: the pipeline was put together by hand and knows of no encoder, or has LoRAs that are not merged.
            OutputError: a file could not be written; it keeps its old content, as do those that follow it.
        """
        target = output_folder(folder)
        adapting.refuse_attached(self)
        loading.save_folder(
            target,
            unet=self.unet,
            encoder=self.encoder(),
            decoder=self.decoder,
            text_encoder=self.text_encoder,
            scheduler=self.scheduler,
            variant=variant,
            force_zeros_for_empty_prompt=self.force_zeros_for_empty_prompt,
            guidance_scale=self.default_guidance_scale,
        )

    def encoder(self) -> VAEEncoder:
        """The VAE's encoder, from where the pipeline came from.

        Raises:
            InputError: the pipeline was put together by hand and knows of none.
        """
        if self.load_encoder is None:
            raise InputError(
                "this pipeline was put together by hand, without the VAE's encoder; pass load_encoder=lambda: ... that"
                " gives it"
            )
        return self.load_encoder()

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = DEFAULT_STEPS,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        scheduler: str | Scheduler | None = None,
        latents: Tensor | None = None,
        denoising_start: float = 0.0,
        denoising_end: float = 1.0,
        clip_skip: int = 0,
        size_conditioning: SizeConditioning | None = None,
        output_type: OutputType = "pil",
        progress: bool = True,
    ) -> Iterator[PipelineStep]:
        """Make images of prompts, step by step: each step can show a preview, and the last one gives the result.

        Calling the pipeline takes the same arguments, runs to the end and gives an :class:`Output`. All arguments are
        checked at once, before the first step. To cancel, stop iterating.

        Args:
            prompt: one prompt or several; of any length, none is cut.
            negative_prompt: what to lead away from: one for all prompts or one for each; None is the empty prompt.
            height: pixels, a multiple of what one latent covers (8 in Stable Diffusion); by default the size
                that the model was trained at.
            width: likewise.
            num_inference_steps: steps of the solver, over the whole schedule.
            guidance_scale: scale of classifier-free guidance (arXiv:2207.12598, eq. 6, as 1 + w); 1 or less
                is no guidance, in half the time. By default the checkpoint's own, where it has one (the embedded
                model), else 7.5, or 5 for SDXL, as in diffusers.
            num_images_per_prompt: images of each prompt.
            seed: image i of the call gets seed + i; or one seed for each image; None draws one at random.
            scheduler: for this call, the name of a solver or a whole Scheduler; by default the checkpoint's.
            latents: [B, C, h, w] to start from, in place of what the seeds draw: standard normal noise, or with
                `denoising_start` what another pipeline ended with.
            denoising_start: 0..1, at which share of the schedule to begin, with the `latents` of a pipeline whose
                `denoising_end` was the same; how SDXL's refiner goes on where the base model stops.
            denoising_end: 0..1, at which share to stop; take `output_type="latent"` with it.
            clip_skip: how many more layers of the text encoder the prompts go without.
            size_conditioning: what SDXL is told of sizes.
            output_type: "pil", "np", "pt" or "latent"; see Output.
            progress: show a progress bar.

        Raises:
            InputError: an argument is out of bounds; nothing has been computed.
            NumericalError: NaN or infinity where an image was due; names the step.
            MemoryBudgetError: memory ran out; names the arguments that help.
        """
        prompts = as_prompts("prompt", prompt)
        guidance = check_guidance_scale(
            self.default_guidance_scale if guidance_scale is None else guidance_scale
        )
        per_prompt = check_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES_PER_PROMPT)
        seeds = check_seeds(seed, len(prompts) * per_prompt)
        shape = self._latent_shape(len(seeds), height, width, latents)
        chosen = self._choose(scheduler)
        most_steps = chosen.schedule.num_train_timesteps
        levels = chosen.levels(check_integer("num_inference_steps", num_inference_steps, 1, most_steps))
        steps = part_of_run(chosen, levels, denoising_start, denoising_end, latents)
        negatives = self._negatives(negative_prompt, len(prompts)) if is_guided(guidance) else ()
        factor = self.decoder.config.spatial_factor
        return denoise(
            self,
            Run(
                prompts=tuple(row for row in prompts for _ in range(per_prompt)),
                negatives=tuple(row for row in negatives for _ in range(per_prompt)),
                clip_skip=check_integer("clip_skip", clip_skip, 0, MAX_CLIP_SKIP),
                time_ids=time_ids(
                    check_size_conditioning(size_conditioning),
                    self._time_ids,
                    (shape[2] * factor, shape[3] * factor),
                    negatives=len(negatives) * per_prompt,
                    prompts=len(seeds),
                ),
                seeds=seeds,
                latents=None if latents is None else check_latents(latents, shape),
                shape=shape,
                scheduler=chosen,
                levels=levels,
                steps=steps,
                guidance_scale=guidance,
                output_type=check_output_type(output_type),
                progress=progress,
            ),
        )

    __call__ = completed(stream)

    @property
    def _time_ids(self) -> int:
        return time_id_count(self.unet.config, self.text_encoder.pooled_width)

    def _negatives(self, negative_prompt: str | Sequence[str] | None, count: int) -> Sequence[str | None]:
        if negative_prompt is None and self.force_zeros_for_empty_prompt:
            return [None] * count
        return as_negative_prompts("" if negative_prompt is None else negative_prompt, count)

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
