"""Cascades: a base model draws the outline, and upscalers add detail, one after the other (arXiv:2106.15282)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Literal, NamedTuple, ParamSpec, Self, cast

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
    DTypeName,
    OutputType,
    as_negative_prompts,
    as_prompts,
    check_fraction,
    check_guidance_scale,
    check_integer,
    check_output_type,
    check_seeds,
)
from latentgen.pipelines.base import DEFAULT_STEPS
from latentgen.pipelines.image_to_image import DEFAULT_STRENGTH, ImageToImagePipeline
from latentgen.pipelines.load_save import check_class
from latentgen.pipelines.sampling_loop import Images, Output, export
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.pipelines.upscale import DEFAULT_NOISE_LEVEL, UpscalePipeline
from latentgen.prompt_syntax import DEFAULT_SYNTAX, PromptSyntax

P = ParamSpec("P")

# So far apart are the seeds of an image's stages, that no stage draws the noise of another.
_SEED_STRIDE = 0x9E37_79B9_7F4A_7C15

StageKind = Literal["draw", "upscale", "redraw"]
StagePipeline = TextToImagePipeline | ImageToImagePipeline | UpscalePipeline


@dataclass(frozen=True)
class StageSettings:
    """How one stage of a cascade is run.

    Attributes:
        num_inference_steps: steps of the solver.
        guidance_scale: of classifier-free guidance; None is the stage's own.
        scheduler: the name of a solver; None is the stage's own.
        noise_level: for upscalers, the timestep to which the image of the stage before is noised: higher invents more
            detail and forgives more mistakes.
        strength: for image to image, above 0 to 1: how much of it is drawn anew.

    Raises:
        InputError: a value is out of bounds.
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
            raise InputError("strength=0 would leave a stage nothing to do; it must be above 0")
        if self.guidance_scale is not None:
            check_guidance_scale(self.guidance_scale)
        if self.scheduler is not None:
            canonical_name(self.scheduler)


@dataclass(frozen=True)
class CascadeStage:
    """One stage: how to get its pipeline, and how it is run where a call does not say.

    Attributes:
        name: what to call it, such as the name of its folder.
        load: gives the pipeline; the cascade asks when the stage's turn has come, and forgets it afterwards.
        settings: of its runs.
    """

    name: str
    load: Callable[[], StagePipeline]
    settings: StageSettings = StageSettings()


class StageResult(NamedTuple):
    """What one stage of a cascade has drawn.

    Attributes:
        index: of the stage, from 0.
        total: how many stages there are.
        name: of the stage.
        kind: what it did: drew from text, drew what there was larger, or anew at the same size.
        images: as the call's `output_type` has them; see Output.
        seeds: the seed of each image, of the whole cascade.
        settings: how the stage was run, with nothing left open.
    """

    index: int
    total: int
    name: str
    kind: StageKind
    images: Images
    seeds: tuple[int, ...]
    settings: StageSettings


def _last(stream: Callable[P, Iterator[StageResult]]) -> Callable[P, StageResult]:
    """What runs all stages and gives the result of the last."""

    @wraps(stream)
    def call(*args: P.args, **kwargs: P.kwargs) -> StageResult:
        (last,) = deque(stream(*args, **kwargs), maxlen=1)
        return last

    return call


@dataclass(frozen=True, eq=False)
class CascadePipeline:
    """Images drawn by several models, each of which sees what the one before has drawn, smaller.

    The first stage draws from text, in latents or in pixels; the others are upscalers, or draw anew at the same size
    what is not yet good (image to image). Only the stage that works is in memory.

    Attributes:
        stages: in the order in which they draw.

    Raises:
        InputError: there is no stage.
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
        """Open a folder with a `cascade.json`; see :mod:`latentgen.checkpoints.cascade`. Weights are read later.

        Args:
            source: the folder, or None for the embedded cascade.
            dtype: of the stages; see :meth:`TextToImagePipeline.from_pretrained`, as for the others.
            device: where they work.
            variant: which of several sets of weights.
            memory: what to trade for memory.

        Raises:
            CheckpointError: what is wrong with the folder's files, in a subclass.
            ConfigError: a stage is of a kind that has no place there, or its settings are out of bounds.
            InputError: the source is no folder.
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
        """A cascade of pipelines that are in memory, and stay there.

        Raises:
            InputError: there are none, or they are not one that draws from text and then others.
        """
        for index, pipeline in enumerate(pipelines):
            if isinstance(pipeline, TextToImagePipeline) != (index == 0):
                raise InputError(
                    f"stage {index} of a cascade cannot be a {type(pipeline).__name__}: the first is a "
                    "TextToImagePipeline, the others are UpscalePipelines or ImageToImagePipelines"
                )
        return cls(
            tuple(
                CascadeStage(f"stage {index}", partial(_itself, pipeline))
                for index, pipeline in enumerate(pipelines)
            )
        )

    def loaded(self) -> Self:
        """The same cascade with all stages in memory, which draws image after image sooner."""
        return replace(
            self, stages=tuple(replace(stage, load=partial(_itself, stage.load())) for stage in self.stages)
        )

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
        """Draw, stage by stage: each result can be looked at, and the last one is that of the cascade.

        Calling the cascade takes the same arguments and gives the last result. To cancel, stop iterating.

        Args:
            prompt: one prompt or several, which every stage is told.
            negative_prompt: what to lead away from, one for all prompts or one for each.
            prompt_syntax: see :meth:`TextToImagePipeline.stream`, as for the others.
            num_images_per_prompt: images of each prompt.
            seed: image i of the call gets seed + i; or one seed for each image; None draws one at random.
            settings: how each stage is run, in place of what the cascade says.
            output_type: "pil", "np" or "pt"; see Output.
            progress: show a progress bar for each stage.

        Raises:
            InputError: an argument is out of bounds; nothing has been computed.
            NumericalError, MemoryBudgetError, CheckpointError: as for the pipelines of the stages.
        """
        prompts = as_prompts("prompt", prompt)
        negatives = as_negative_prompts(negative_prompt, len(prompts))
        per_prompt = check_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES_PER_PROMPT)
        if check_output_type(output_type) == "latent":
            raise InputError('output_type="latent" is for one model; a cascade gives "pil", "np" or "pt"')
        given = [stage.settings for stage in self.stages] if settings is None else list(settings)
        if len(given) != len(self.stages) or not all(isinstance(item, StageSettings) for item in given):
            raise InputError(f"settings must hold {len(self.stages)} StageSettings, one for each stage")
        call = _Call(
            prompts=tuple(text for text in prompts for _ in range(per_prompt)),
            negatives=tuple(text for text in negatives for _ in range(per_prompt)),
            prompt_syntax=prompt_syntax,
            seeds=check_seeds(seed, len(prompts) * per_prompt),
            progress=progress,
        )
        return self._run(call, given, output_type)

    def _run(
        self, call: _Call, settings: Sequence[StageSettings], output_type: OutputType
    ) -> Iterator[StageResult]:
        images: Tensor | None = None
        for index, (stage, chosen) in enumerate(zip(self.stages, settings, strict=True)):
            pipeline = stage.load()
            kind = _kind_of(pipeline)
            chosen = _complete(chosen, pipeline)
            images = call.draw(pipeline, index, chosen, images)
            del pipeline  # before the next is loaded
            result = export(images, output_type)
            yield StageResult(index, len(self.stages), stage.name, kind, result, call.seeds, chosen)

    __call__ = _last(stream)


@dataclass(frozen=True)
class _Call:
    """What all stages of a call are told; one entry for each image."""

    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    prompt_syntax: PromptSyntax
    seeds: tuple[int, ...]
    progress: bool

    def draw(
        self, pipeline: StagePipeline, index: int, settings: StageSettings, images: Tensor | None
    ) -> Tensor:
        """The images [B, 3, H, W] in 0..1 of a stage, from those of the stage before."""
        seeds = [(seed + index * _SEED_STRIDE) % (MAX_SEED + 1) for seed in self.seeds]
        call: Callable[..., Output]
        if isinstance(pipeline, TextToImagePipeline):
            call = pipeline
        else:
            assert images is not None  # the first stage alone draws from text, as the cascade has made sure
            call = (
                partial(pipeline, image=images, noise_level=settings.noise_level)
                if isinstance(pipeline, UpscalePipeline)
                else partial(pipeline, image=images, strength=settings.strength)
            )
        output = call(
            list(self.prompts),
            negative_prompt=list(self.negatives),
            prompt_syntax=self.prompt_syntax,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            scheduler=settings.scheduler,
            seed=seeds,
            output_type="pt",
            progress=self.progress,
        )
        return cast(Tensor, output.images)


def _kind_of(pipeline: StagePipeline) -> StageKind:
    if isinstance(pipeline, TextToImagePipeline):
        return "draw"
    return "upscale" if isinstance(pipeline, UpscalePipeline) else "redraw"


def _class_of(index: int, entry: StageEntry) -> type[StagePipeline]:
    if index == 0:
        return TextToImagePipeline
    return UpscalePipeline if entry.strength is None else ImageToImagePipeline


def _settings(entry: StageEntry) -> StageSettings:
    """The settings of an entry; what it leaves out is as usual."""
    stated = {
        name: value for name, value in entry.model_dump(exclude={"folder"}).items() if value is not None
    }
    try:
        return StageSettings(**stated)
    except InputError as error:
        raise ConfigError(f"{INDEX}, stage {quote(entry.folder)}: {error}") from None


def _complete(settings: StageSettings, pipeline: StagePipeline) -> StageSettings:
    """The settings with the stage's own where they leave something open."""
    scale, scheduler = settings.guidance_scale, settings.scheduler
    return replace(
        settings,
        guidance_scale=pipeline.default_guidance_scale if scale is None else scale,
        scheduler=pipeline.scheduler.name if scheduler is None else canonical_name(scheduler),
    )


def _itself(pipeline: StagePipeline) -> StagePipeline:
    return pipeline
