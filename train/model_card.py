"""The card of a finished model: what it came from, by which recipe, and how to load it. It claims nothing else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from latentgen import __version__
from latentgen.checkpoints.folder import EMBEDDED_DEFAULT, TOKENIZERS
from latentgen.files import atomic_write, read_json
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.loading import (
    GUIDANCE_KEY,
    PIXEL_CLASS,
    PIXEL_CLASSES,
    PIXEL_PAIRED_CLASS,
    PIXEL_UPSCALE_CLASS,
    usual_guidance_scale,
)
from latentgen.train.config import FinetuneTask, TrainConfig
from latentgen.train.config.finetune import TextualInversionMethod
from latentgen.train.methods.lora import DIFFUSERS_FILE
from latentgen.train.methods.textual_inversion import EMBEDDING_FILE, SDXL_KEYS
from latentgen.train.validation import SHEET, latest_sheet

CARD = "README.md"
# How a run was carried on changes nothing of what was learnt.
_UNTOLD = (
    *("output_dir", "resume", "allow_changes", "checkpoint_every", "keep_checkpoints"),
    *("log_every", "workers", "trackers"),
)
_EMBEDDED = "EMBEDDED_DEFAULT"
# What a checkpoint says that it is -> the pipeline here that draws with it.
_OURS = {
    "StableDiffusionPipeline": "TextToImagePipeline",
    "StableDiffusionXLPipeline": "TextToImagePipeline",
    "StableDiffusionImg2ImgPipeline": "ImageToImagePipeline",
    "StableDiffusionXLImg2ImgPipeline": "ImageToImagePipeline",
    "StableDiffusionInpaintPipeline": "InpaintPipeline",
    "StableDiffusionXLInpaintPipeline": "InpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline": "InstructPix2PixPipeline",
    "StableDiffusionUpscalePipeline": "UpscalePipeline",
    PIXEL_CLASS: "TextToImagePipeline",
    PIXEL_PAIRED_CLASS: "PairedImagePipeline",
    PIXEL_UPSCALE_CLASS: "UpscalePipeline",
}
# Those whose models, if they are in latents, diffusers draws with in the same way.
_THEIRS = ("TextToImagePipeline", "ImageToImagePipeline", "InpaintPipeline", "InstructPix2PixPipeline")
# Those that are shown images: argument -> example.
_SHOWN: Mapping[str, Mapping[str, str]] = {
    "ImageToImagePipeline": {"image": "image.png"},
    "InpaintPipeline": {"image": "image.png", "mask_image": "mask.png"},
    "InstructPix2PixPipeline": {"image": "image.png"},
    "PairedImagePipeline": {"image": "image.png"},
    "UpscalePipeline": {"image": "small.png"},
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Kind:
    """What kind of model a folder holds.

    Attributes:
        title: for people.
        tags: for the Hub; the first is its task there, if it has one.
        ours: code that uses it with this library.
        theirs: code that uses it with diffusers; "" where its pipelines do not.
        has_task: whether the first tag is a task.
    """

    title: str
    tags: tuple[str, ...]
    ours: str
    theirs: str = ""
    has_task: bool = True


def write_card(
    folder: Path, config: TrainConfig, *, adapts: Pipeline | None, images: int, parameters: int, steps: int
) -> None:
    """Write `README.md` into the folder of a finished model, and beside it the newest sheet of validation prompts.

    The recipe is part of it, its folders by their last names alone. Of the images only their number is told, and of
    prompts those of the recipe: what a model was trained and measured on may be private.

    Args:
        folder: what an objective has saved.
        config: the recipe.
        adapts: the pipeline whose model was taught something that is saved without it; None for a whole model.
        images: how many it learnt from.
        parameters: how many numbers were learnt.
        steps: optimiser steps done.

    Raises:
        OutputError: the folder cannot be written.
    """
    kind = _kind(folder, config, adapts)
    validation = config.validation
    sheet = latest_sheet(config.output_dir) if validation is not None and validation.prompts else None
    if sheet is not None:
        with atomic_write(folder / SHEET) as target, sheet.open("rb") as source:
            shutil.copyfileobj(source, target)
    recipe = _shown(config.model_dump(exclude=set(_UNTOLD)))
    header = yaml.safe_dump(_header(kind, config), sort_keys=False)
    sections = [
        f"---\n{header}---",
        f"# {config.output_dir.resolve().name}",
        f"{kind.title}, trained with latentgen {__version__}.",
        _facts(config, images, parameters, steps),
        "Its licence, what it is good for, and what it must not be used for, only those who trained it know.",
        *_samples(config, sheet is not None),
        "## Use\n\nRun in the folder of this card; elsewhere name the folder in the place of `.`.",
        f"```python\n{kind.ours}```",
        *([f"With diffusers:\n\n```python\n{kind.theirs}```"] if kind.theirs else []),
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```",
    ]
    with atomic_write(folder / CARD) as file:
        file.write(("\n\n".join(sections) + "\n").encode())


def _kind(folder: Path, config: TrainConfig, adapts: Pipeline | None) -> Kind:
    if adapts is not None:
        return _adapter(folder, config, adapts)
    index = read_json(folder / "model_index.json")
    name = str(index["_class_name"])
    if name == "AutoencoderKL":
        return Kind(
            "An autoencoder",
            ("autoencoder",),
            "from latentgen import TextToImagePipeline\n\n"
            "# With a model that was trained in its latents:\n"
            '# TextToImagePipeline.from_pretrained(MODEL, vae="vae/diffusion_pytorch_model.safetensors")\n',
            'from diffusers import AutoencoderKL\n\nvae = AutoencoderKL.from_pretrained(".", subfolder="vae")\n',
            has_task=False,
        )
    ours = "PairedImagePipeline" if config.task.kind == "paired" else _OURS[name]
    use = Use(ours, name, _example_prompt(config), index.get(GUIDANCE_KEY))
    return Kind(
        "An upscaler" if ours == "UpscalePipeline" else f"A model of {use.task.replace('-', ' ')}",
        (use.task,),
        use.ours(),
        use.theirs() if ours in _THEIRS and name not in PIXEL_CLASSES else "",
    )


def _adapter(folder: Path, config: TrainConfig, adapts: Pipeline) -> Kind:
    """What is loaded on top of the model that it was trained from."""
    name, scale = adapts.diffusers_class, adapts.default_guidance_scale
    method = config.task.method if isinstance(config.task, FinetuneTask) else None
    use = Use(
        type(adapts).__name__,
        name,
        _example_prompt(config),
        None if scale == usual_guidance_scale(name) else scale,
        source=_Source.of(config),
        has_scheduler=(folder / "scheduler").is_dir(),
        scheduler=str(adapts.scheduler.to_config()["_class_name"]),
    )
    if isinstance(method, TextualInversionMethod):
        title, tag = "An embedding (textual inversion)", "textual_inversion"
        ours, theirs = f'.with_embedding("{EMBEDDING_FILE}")', _load_embedding(adapts, method.token)
    else:
        title, tag = "A LoRA", "lora"
        ours = f'.with_lora("{DIFFUSERS_FILE}")'
        theirs = f'pipe.load_lora_weights(".", weight_name="{DIFFUSERS_FILE}")\n'
    return Kind(f"{title} for {_origin(config)}", (use.task, tag), use.ours(ours), use.theirs(theirs))


def _load_embedding(adapts: Pipeline, token: str) -> str:
    """What diffusers does to use the vectors of a token; of SDXL each text encoder is given its own."""
    if not adapts.is_sdxl:
        return f'pipe.load_textual_inversion("{EMBEDDING_FILE}")\n'
    loads = "".join(
        f'pipe.load_textual_inversion(vectors["{key}"], token={token!r}, text_encoder=pipe.{encoder}, '
        f"tokenizer=pipe.{TOKENIZERS[encoder]})\n"
        for encoder, key in SDXL_KEYS.items()
    )
    return f'vectors = load_file("{EMBEDDING_FILE}")\n{loads}'


class _Source(NamedTuple):
    """What `from_pretrained`, or `from_single_file`, is given: code.

    Attributes:
        place: the first argument; "" for the embedded default model.
        variant: of the weights.
        prediction_type: what a single file does not say.
    """

    place: str = '"."'
    variant: str | None = None
    prediction_type: str | None = None

    @classmethod
    def of(cls, config: TrainConfig) -> _Source:
        """What training began with."""
        base, task = config.init_from, config.task
        if base is None or base.resolve() == EMBEDDED_DEFAULT:
            return cls("")
        place = f'"{_hub_id(base) or f"path/to/{base.name}"}"'
        return (
            cls(place, task.variant, task.prediction_type) if isinstance(task, FinetuneTask) else cls(place)
        )

    @property
    def loader(self) -> str:
        """The method that reads it."""
        is_file = self.place.endswith(('.safetensors"', '.ckpt"'))
        return "from_single_file" if is_file else "from_pretrained"

    def arguments(self, **others: str | None) -> str:
        """All arguments, with those that one library alone takes."""
        named = {"variant": self.variant, **others}
        return ", ".join(
            [*filter(None, [self.place]), *(f'{key}="{value}"' for key, value in named.items() if value)]
        )


_OWN_FOLDER = _Source()


@dataclass(frozen=True)
class Use:
    """How a model makes an image: code for both libraries.

    Attributes:
        pipeline: the class of this library.
        diffusers_class: that of diffusers.
        prompt: an example.
        guidance_scale: that of the model, if it is not the usual one of diffusers.
        source: what is loaded.
        has_scheduler: whether the folder of the card says how an adapted model is sampled.
        scheduler: the class of that scheduler.
    """

    pipeline: str
    diffusers_class: str
    prompt: str
    guidance_scale: object = None
    source: _Source = _OWN_FOLDER
    has_scheduler: bool = False
    scheduler: str = ""

    @property
    def task(self) -> str:
        """That of the Hub."""
        return "image-to-image" if self._images else "text-to-image"

    def ours(self, adapted: str = "") -> str:
        """With this library; `adapted` are calls that follow the loading."""
        imports, names, call = "", self.pipeline, [repr(self.prompt), *self._shown("{}")]
        if self.has_scheduler:
            imports, names = "import json\nfrom pathlib import Path\n\n", f"{self.pipeline}, Scheduler"
            call.append("scheduler=scheduler")
        read = (
            'scheduler = Scheduler.from_config(json.loads(Path("scheduler/scheduler_config.json").read_text()))\n'
            if self.has_scheduler
            else ""
        )
        arguments = self.source.arguments(prediction_type=self.source.prediction_type)
        return (
            f"{imports}from latentgen import {names}\n\n"
            f"pipeline = {self.pipeline}.{self.source.loader}({arguments}){adapted}\n{read}"
            f'pipeline({", ".join([*call, "seed=0"])}).images[0].save("result.png")\n'
        )

    def theirs(self, adapt: str = "") -> str:
        """With diffusers; `adapt` are lines that follow the loading."""
        names = [self.diffusers_class, *([self.scheduler] if self.has_scheduler else [])]
        imports = [
            "import torch",
            f"from diffusers import {', '.join(sorted(names))}",
            *(["from diffusers.utils import load_image"] if self._images else []),
            *([] if self.source.place else [f"from latentgen.checkpoints.folder import {_EMBEDDED}"]),
            *(["from safetensors.torch import load_file"] if "load_file(" in adapt else []),
        ]
        if self.has_scheduler:
            adapt += f'pipe.scheduler = {self.scheduler}.from_pretrained(".", subfolder="scheduler")\n'
        elif self.source.prediction_type is not None:
            adapt += (
                "pipe.scheduler = type(pipe.scheduler).from_config(\n"
                f'    pipe.scheduler.config, prediction_type="{self.source.prediction_type}"\n)\n'
            )
        scale = [] if self.guidance_scale is None else [f"guidance_scale={self.guidance_scale}"]
        call = [repr(self.prompt), *self._shown("load_image({})"), *scale, "generator=generator"]
        return (
            "\n".join(imports)
            + f"\n\npipe = {self.diffusers_class}.{self.source.loader}({self.source.arguments() or _EMBEDDED})\n"
            + f"{adapt}generator = torch.Generator().manual_seed(0)\n"
            + f'pipe({", ".join(call)}).images[0].save("result.png")\n'
        )

    @property
    def _images(self) -> Mapping[str, str]:
        return _SHOWN.get(self.pipeline, {})

    def _shown(self, form: str) -> list[str]:
        """The arguments that are images, their files in this form."""
        quoted = {name: f'"{file}"' for name, file in self._images.items()}
        return [f"{name}={form.format(file)}" for name, file in quoted.items()]


def _example_prompt(config: TrainConfig) -> str:
    """A prompt of the recipe; that of a new token holds it."""
    task, validation = config.task, config.validation
    prompts = validation.prompts if validation is not None else ()
    if isinstance(task, FinetuneTask) and isinstance(task.method, TextualInversionMethod):
        token = task.method.token
        return next((prompt for prompt in prompts if token in prompt), f"a picture of {token}")
    return prompts[0] if prompts else "a picture"


def _header(kind: Kind, config: TrainConfig) -> dict[str, Any]:
    """What the Hub reads; a base model is named if it is one of the Hub's."""
    hub_id = _hub_id(config.init_from)
    return {
        "library_name": "diffusers" if kind.theirs else "latentgen",
        **({"pipeline_tag": kind.tags[0]} if kind.has_task else {}),
        "tags": [*kind.tags, "latentgen"],
        **({"base_model": hub_id} if hub_id else {}),
    }


def _hub_id(origin: Path | None) -> str | None:
    """The id on the Hub of the model that training began with, if it has one: "owner/name"."""
    if origin is None:
        return None
    for part in origin.parts:  # a snapshot in the Hub's cache
        kind, _, rest = part.partition("--")
        if kind == "models" and rest:
            return rest.replace("--", "/", 1)
    text = origin.as_posix()
    return text if _HUB_ID.fullmatch(text) and not origin.exists() else None


def _origin(config: TrainConfig) -> str:
    """What training began with, in words."""
    origin = config.init_from
    is_default = config.task.kind == "finetune" if origin is None else origin.resolve() == EMBEDDED_DEFAULT
    if is_default:
        return "the default model of latentgen"
    return "random weights" if origin is None else _hub_id(origin) or origin.name


def _facts(config: TrainConfig, images: int, parameters: int, steps: int) -> str:
    rows = {
        "Trained from": _origin(config),
        "Images": f"{images:,}",
        "Steps": f"{steps:,}, {config.batch_size:,} images in each",
        "Learnt": f"{parameters:,} parameters" + (", averaged over the steps" if config.ema_decay else ""),
        "Seed": str(config.seed),
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _samples(config: TrainConfig, has_sheet: bool) -> list[str]:
    validation = config.validation
    if validation is None or not has_sheet:
        return []
    prompts = "\n".join(
        f"{number}. `{' '.join(text.split())}`" for number, text in enumerate(validation.prompts, 1)
    )
    return [f"## Samples\n\n![One image of each prompt, in their order]({SHEET})\n\n{prompts}"]


def _shown(value: Any) -> Any:
    """A recipe as YAML has it, without where on this machine its folders are."""
    if isinstance(value, Path):
        return value.name
    if isinstance(value, Mapping):
        return {name: _shown(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(part) for part in value]
    return value
