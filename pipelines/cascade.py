"""Cascades: a base model and upscalers that run one after the other (arXiv:2106.15282)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal, NamedTuple, ParamSpec, Self, cast

import torch
from torch import Tensor

from latentgen.checkpoints.cascade import INDEX, StageEntry, open_cascade
from latentgen.checkpoints.folder import resolve
from latentgen.diffusion.schedule import MAX_TRAIN_TIMESTEPS
from latentgen.diffusion.solver_names import canonical_name
from latentgen.errors import ConfigError, InputError
from latentgen.files import quote
from latentgen.memory import MemoryPolicy
from latentgen.pipelines.arguments import (
    MAX_IMAGES_PER_PROMPT,
    MAX_SEED,
    OutputType,
    as_prompts,
    check_fraction,
    check_guidance_scale,
    check_integer,
    check_output_type,
    check_seeds,
    match_count,
)
from latentgen.pipelines.call import DEFAULT_STEPS
from latentgen.pipelines.image_to_image import DEFAULT_STRENGTH, ImageToImagePipeline
from latentgen.pipelines.load_save import DTypeName, check_class
from latentgen.pipelines.sampling_loop import Images, Output, export
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.pipelines.upscale import DEFAULT_NOISE_LEVEL, UpscalePipeline
from latentgen.prompts import DEFAULT_SYNTAX, PromptSyntax

P = ParamSpec("P")

# Distance between the seeds of an image's stages, so that no two stages use the same noise.
_SEED_STRIDE = 0x9E37_79B9_7F4A_7C15

StageKind = Literal["draw", "upscale", "redraw"]
StagePipeline = TextToImagePipeline | ImageToImagePipeline | UpscalePipeline


@dataclass(frozen=True)
class StageSettings:
    """Settings of one stage of a cascade.

    Attributes:
        num_inference_steps: steps of the solver.
        guidance_scale: scale of classifier-free guidance; None is the pipeline's default.
        scheduler: the name of a solver; None is the pipeline's own.
        noise_level: for upscalers, the timestep to noise the previous stage's image to: higher values invent more
            detail and hide more flaws.
        strength: for image to image, above 0 to 1, the fraction of the steps to take.

    Raises:
        InputError: a value is out of range.
    """

    num_inference_steps: int = DEFAULT_STEPS
    guidance_scale: float | None = None
    scheduler: str | None = None
    noise_level: int = DEFAULT_NOISE_LEVEL
    strength: float = DEFAULT_STRENGTH

    def __post_init__(self) -> None:
        check_integer("num_inference_steps", self.num_inference_steps, 1, MAX_TRAIN_TIMESTEPS)
        check_integer("noise_level", self.noise_level, 0, MAX_TRAIN_TIMESTEPS - 1)
        if check_fraction("strength", self.strength) == 0:
            raise InputError("strength=0 would leave the stage's input unchanged; it must be above 0")
        if self.guidance_scale is not None:
            check_guidance_scale(self.guidance_scale)
        if self.scheduler is not None:
            canonical_name(self.scheduler)


@dataclass(frozen=True)
class CascadeStage:
    """One stage of a cascade: how to load its pipeline, and its default settings.

    Attributes:
        name: its name, such as the name of its folder.
        load: returns the pipeline; called when the stage runs, and the pipeline is released afterwards.
        settings: its settings unless a call passes others.
    """

    name: str
    load: Callable[[], StagePipeline]
    settings: StageSettings = StageSettings()


class StageResult(NamedTuple):
    """The output of one stage of a cascade.

    Attributes:
        index: number of the stage, from 0.
        total: number of stages.
        name: name of the stage.
        kind: "draw" is text to image, "redraw" image to image at the same resolution.
        images: in the form of the call's `output_type`; see Output.
        seeds: the seed of each image, for the whole cascade.
        settings: the settings used, without None.
    """

    index: int
    total: int
    name: str
    kind: StageKind
    images: Images
    seeds: tuple[int, ...]
    settings: StageSettings


def _last(stream: Callable[P, Iterator[StageResult]]) -> Callable[P, StageResult]:
    """Turn a stream into a function that runs all stages and returns the last result."""

    @wraps(stream)
    def call(*args: P.args, **kwargs: P.kwargs) -> StageResult:
        (last,) = deque(stream(*args, **kwargs), maxlen=1)
        return last

    return call


@dataclass(frozen=True, eq=False)
class CascadePipeline:
    """Generates images with several models, each of which takes the output of the one before.

    The first stage is text to image, in latents or in pixel space; the others are upscalers, or refine at the same
    resolution (image to image). Only the stage that runs is in memory.

    Attributes:
        stages: in the order in which they run.

    Raises:
        InputError: there are no stages.
    """

    stages: tuple[CascadeStage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise InputError("a cascade needs at least one stage")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        dtype: DTypeName | torch.dtype = "auto",
        device: str | torch.device = "auto",
        variant: str | None = None,
        memory: MemoryPolicy | None = None,
    ) -> Self:
        """Open a folder with a `cascade.json`; see :mod:`latentgen.checkpoints.cascade`. Weights are loaded later.

        Args:
            source: the folder, or None for the embedded cascade.
            dtype, device, variant, memory: see :meth:`TextToImagePipeline.from_pretrained`.

        Raises:
            CheckpointError: a file is missing or damaged; the subclass says how.
            ConfigError: a stage is of the wrong kind for its place, or its settings are out of range.
            InputError: the source is not a folder.
        """
        opened = open_cascade(resolve(source, variant=variant))
        stages = []
        for index, (entry, checkpoint) in enumerate(opened):
            stage_class = _class_of(index, entry)
            check_class(checkpoint, stage_class.supported_classes)
            load = partial(
                stage_class.from_checkpoint,
                checkpoint,
                dtype=dtype,
                device=device,
                variant=variant,
                memory=memory,
            )
            stages.append(CascadeStage(checkpoint.path.name, load, _settings(entry)))
        return cls(tuple(stages))

    @classmethod
    def from_pipelines(cls, *pipelines: StagePipeline) -> Self:
        """A cascade of pipelines that stay in memory.

        Raises:
            InputError: there are no pipelines, the first is not text to image, or a later one is.
        """
        for index, pipeline in enumerate(pipelines):
            if isinstance(pipeline, TextToImagePipeline) != (index == 0):
                raise InputError(
                    f"stage {index} of a cascade cannot be a {type(pipeline).__name__}: the first is a "
                    "TextToImagePipeline, the others are UpscalePipelines or ImageToImagePipelines"
                )
        named = enumerate(pipelines)
        return cls(tuple(CascadeStage(f"stage {index}", _returns(pipeline)) for index, pipeline in named))

    def loaded(self) -> Self:
        """The same cascade with all stages kept in memory, which is faster for several calls."""
        loaded = tuple(replace(stage, load=_returns(stage.load())) for stage in self.stages)
        return replace(self, stages=loaded)

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        prompt_syntax: PromptSyntax = DEFAULT_SYNTAX,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        settings: Sequence[StageSettings] | None = None,
        output_type: OutputType = "pil",
        progress: bool = True,
    ) -> Iterator[StageResult]:
        """Generate stage by stage and yield each stage's result; the last one is the cascade's.

        Calling the cascade takes the same arguments and returns the last result. To cancel, stop iterating.

        Args:
            prompt: one prompt or several, used by every stage.
            negative_prompt: one for all prompts or one for each.
            prompt_syntax: see :meth:`TextToImagePipeline.stream`.
            num_images_per_prompt: images per prompt.
            seed: image i of the call gets seed + i; or one seed for each image; None draws one at random.
            settings: settings of each stage, instead of the cascade's own.
            output_type: "pil", "np" or "pt"; see Output.
            progress: show a progress bar for each stage.

        Raises:
            InputError: an argument is invalid; raised before anything is computed.
            NumericalError, MemoryBudgetError, CheckpointError: as for the pipelines of the stages.
        """
        prompts = as_prompts("prompt", prompt)
        negatives = match_count(
            "negative_prompt", as_prompts("negative_prompt", negative_prompt), len(prompts)
        )
        per_prompt = check_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES_PER_PROMPT)
        if check_output_type(output_type) == "latent":
            raise InputError('output_type="latent" is not for cascades; use "pil", "np" or "pt"')
        chosen = [stage.settings for stage in self.stages] if settings is None else list(settings)
        if len(chosen) != len(self.stages) or not all(isinstance(item, StageSettings) for item in chosen):
            raise InputError(f"settings must be {len(self.stages)} StageSettings, one for each stage")
        seeds = check_seeds(seed, len(prompts) * per_prompt)
        return self._run(
            [text for text in prompts for _ in range(per_prompt)],
            seeds,
            chosen,
            output_type,
            negative_prompt=[text for text in negatives for _ in range(per_prompt)],
            prompt_syntax=prompt_syntax,
            progress=progress,
        )

    def _run(
        self,
        prompts: Sequence[str],
        seeds: tuple[int, ...],
        settings: Sequence[StageSettings],
        output_type: OutputType,
        **options: Any,
    ) -> Iterator[StageResult]:
        images: Tensor | None = None
        for index, (stage, chosen) in enumerate(zip(self.stages, settings, strict=True)):
            pipeline = stage.load()
            kind, chosen = _kind_of(pipeline), _complete(chosen, pipeline)
            call: Callable[..., Output] = pipeline
            if kind == "upscale":
                call = partial(pipeline, image=images, noise_level=chosen.noise_level)
            elif kind == "redraw":
                call = partial(pipeline, image=images, strength=chosen.strength)
            output = call(
                prompts,
                num_inference_steps=chosen.num_inference_steps,
                guidance_scale=chosen.guidance_scale,
                scheduler=chosen.scheduler,
                seed=[(seed + index * _SEED_STRIDE) % (MAX_SEED + 1) for seed in seeds],
                output_type="pt",
                **options,
            )
            images = cast(Tensor, output.images)
            del pipeline, call  # before the next is loaded
            yield StageResult(
                index, len(self.stages), stage.name, kind, export(images, output_type), seeds, chosen
            )

    __call__ = _last(stream)


def _kind_of(pipeline: StagePipeline) -> StageKind:
    if isinstance(pipeline, TextToImagePipeline):
        return "draw"
    return "upscale" if isinstance(pipeline, UpscalePipeline) else "redraw"


def _class_of(index: int, entry: StageEntry) -> type[StagePipeline]:
    if index == 0:
        return TextToImagePipeline
    return UpscalePipeline if entry.strength is None else ImageToImagePipeline


def _settings(entry: StageEntry) -> StageSettings:
    """The settings of an entry; missing ones have their defaults."""
    try:
        return StageSettings(**entry.model_dump(exclude={"folder"}, exclude_none=True))
    except InputError as error:
        raise ConfigError(f"{INDEX}, stage {quote(entry.folder)}: {error}") from None


def _complete(settings: StageSettings, pipeline: StagePipeline) -> StageSettings:
    """The settings with the pipeline's own values instead of None."""
    scale, scheduler = settings.guidance_scale, settings.scheduler
    return replace(
        settings,
        guidance_scale=pipeline.default_guidance_scale if scale is None else scale,
        scheduler=pipeline.scheduler.name if scheduler is None else canonical_name(scheduler),
    )


def _returns(pipeline: StagePipeline) -> Callable[[], StagePipeline]:
    return lambda: pipeline
