"""The card of a finished model: what it came from, by which recipe, and how to load it. It claims nothing else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from latentgen import __version__
from latentgen.checkpoints.folder import EMBEDDED_DEFAULT
from latentgen.files import atomic_write, read_json
from latentgen.pipelines.loading import GUIDANCE_KEY, READS
from latentgen.train.config import TrainConfig
from latentgen.train.samples import SHEET, latest_sheet

CARD = "README.md"
# How a run was carried on changes nothing of what was learnt.
_UNTOLD = (
    *("output_dir", "resume", "allow_changes", "checkpoint_every", "keep_checkpoints"),
    *("log_every", "workers", "trackers"),
)
_LORA = "pytorch_lora_weights.safetensors"
_EMBEDDING = "learned_embeds.safetensors"
_EMBEDDED = "EMBEDDED_DEFAULT"
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


def write_card(folder: Path, config: TrainConfig, *, images: int, parameters: int, steps: int) -> None:
    """Write `README.md` into the folder of a finished model, and beside it the newest sheet of validation prompts.

    The recipe is part of it, its folders by their last names alone. Of the images only their number is told, and of
    prompts those of the recipe: what a model was trained and measured on may be private.

    Args:
        folder: what an objective has saved.
        config: the recipe.
        images: how many it learnt from.
        parameters: how many numbers were learnt.
        steps: optimiser steps done.

    Raises:
        OutputError: the folder cannot be written.
    """
    kind = _kind(folder, config)
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


def _kind(folder: Path, config: TrainConfig) -> Kind:
    prompt = _example_prompt(config)
    if (folder / _LORA).is_file():
        return _adapter(
            config,
            "A LoRA",
            "lora",
            f'.with_lora("{_LORA}")',
            f'pipe.load_lora_weights(".", weight_name="{_LORA}")',
        )
    if (folder / _EMBEDDING).is_file():
        return _adapter(
            config,
            "An embedding (textual inversion)",
            "textual_inversion",
            f'.with_embedding("{_EMBEDDING}")',
            f'pipe.load_textual_inversion("{_EMBEDDING}")',
        )
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
    if name == "StableDiffusionUpscalePipeline":
        call = f'pipeline({prompt!r}, image="small.png", seed=0)'
        return Kind("An upscaler", ("image-to-image",), _ours("UpscalePipeline", call))
    if name not in READS["TextToImagePipeline"]:
        ours = "InpaintPipeline" if "Inpaint" in name else "InstructPix2PixPipeline"
        if config.task.kind == "paired":
            ours = "PairedImagePipeline"
        mask = ', mask_image="mask.png"' if ours == "InpaintPipeline" else ""
        call = f'pipeline({prompt!r}, image="image.png"{mask}, seed=0)'
        return Kind("A model of image to image", ("image-to-image",), _ours(ours, call))
    return Kind(
        "A model of text to image",
        ("text-to-image",),
        _ours("TextToImagePipeline", f"pipeline({prompt!r}, seed=0)"),
        _theirs('"."', prompt, index.get(GUIDANCE_KEY)) if name == "StableDiffusionPipeline" else "",
    )


def _ours(pipeline: str, call: str, source: str = '"."', adapted: str = "") -> str:
    return (
        f"from latentgen import {pipeline}\n\npipeline = {pipeline}.{_loader(source)}({source}){adapted}\n"
        f'{call}.images[0].save("result.png")\n'
    )


def _theirs(source: str, prompt: str, guidance_scale: object = None, adapt: str = "") -> str:
    imports = "import torch\nfrom diffusers import StableDiffusionPipeline\n"
    if source == _EMBEDDED:
        imports += f"from latentgen.checkpoints.folder import {_EMBEDDED}\n"
    scale = "" if guidance_scale is None else f"guidance_scale={guidance_scale}, "
    return (
        f"{imports}\npipe = StableDiffusionPipeline.{_loader(source)}({source})\n{adapt}"
        "generator = torch.Generator().manual_seed(0)\n"
        f'pipe({prompt!r}, {scale}generator=generator).images[0].save("result.png")\n'
    )


def _loader(source: str) -> str:
    return "from_single_file" if source.endswith(('.safetensors"', '.ckpt"')) else "from_pretrained"


def _adapter(config: TrainConfig, title: str, tag: str, ours: str, theirs: str) -> Kind:
    """What is loaded on top of the model that it was trained from."""
    prompt, base = _example_prompt(config), config.init_from
    source = ""
    if base is not None and base.resolve() != EMBEDDED_DEFAULT:
        source = f'"{_hub_id(base) or f"path/to/{base.name}"}"'
    return Kind(
        f"{title} for {_origin(config)}",
        ("text-to-image", tag),
        _ours("TextToImagePipeline", f"pipeline({prompt!r}, seed=0)", source, ours),
        _theirs(source or _EMBEDDED, prompt, adapt=f"{theirs}\n"),
    )


def _example_prompt(config: TrainConfig) -> str:
    validation = config.validation
    return validation.prompts[0] if validation is not None and validation.prompts else "a picture"


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
