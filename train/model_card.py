"""The model card of a trained model: its base, how it was trained, and code that uses it. It claims nothing else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from latentgen import __version__
from latentgen.checkpoints.folder import EMBEDDED_DEFAULT, TOKENIZERS
from latentgen.files import atomic_write, read_json
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.load_save import (
    GUIDANCE_KEY,
    PIPELINE_CLASSES,
    PIXEL_CLASSES,
    default_guidance_scale_of,
)
from latentgen.train.config import FinetuneTask, LoRAMethod, TextualInversionMethod, TrainConfig
from latentgen.train.methods.lora import DIFFUSERS_FILE
from latentgen.train.methods.textual_inversion import EMBEDDING_FILE, SDXL_KEYS
from latentgen.train.validation import SHEET, latest_sheet

CARD = "README.md"
# Fields that do not change what is trained.
_OMITTED_FIELDS = (
    *("output_dir", "resume", "allow_changes", "checkpoint_every", "keep_checkpoints"),
    *("log_every", "workers", "trackers"),
)
# Pipelines that take images: argument -> example.
_IMAGES: Mapping[str, Mapping[str, str]] = {
    "ImageToImagePipeline": {"image": "image.png"},
    "InpaintPipeline": {"image": "image.png", "mask_image": "mask.png"},
    "InstructPix2PixPipeline": {"image": "image.png"},
    "ConcatImagePipeline": {"image": "image.png"},
    "UpscalePipeline": {"image": "small.png"},
}
# Pipelines whose models in latents run in diffusers, too.
_SHARED = ("TextToImagePipeline", "ImageToImagePipeline", "InpaintPipeline", "InstructPix2PixPipeline")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_TEMPLATE = """\
---
{header}---

# {name}

{title}, trained with latentgen {version}.

| | |
|---|---|
| Trained from | {base} |
| Images | {images:,} |
| Steps | {steps:,}, {batch_size:,} images in each |
| Trained | {parameters:,} parameters{averaged} |
| Seed | {seed} |

Only those who trained this model know its license, what it is good for, and what it must not be used for.

{samples}{use}{diffusers}## Recipe

```yaml
{recipe}```
"""
_SAMPLES = "## Samples\n\n![One image of each prompt, in this order]({sheet})\n\n{prompts}\n\n"
_USE = """\
## Use

Run this in the folder of this card, or replace `.` with the path of the folder.

```python
{code}```

"""
_DIFFUSERS = "With diffusers:\n\n```python\n{code}```\n\n"

_CODE = """\
{imports}from latentgen import {names}

pipeline = {pipeline}.{loader}({source}){adapter}
{scheduler}pipeline({call}seed=0).images[0].save("result.png")
"""
_DIFFUSERS_CODE = """\
import torch
from diffusers import {names}
{imports}
pipe = {pipeline}.{loader}({source})
{adapter}{scheduler}generator = torch.Generator().manual_seed(0)
pipe({call}generator=generator).images[0].save("result.png")
"""
_READ_SCHEDULER = (
    'scheduler = Scheduler.from_config(json.loads(Path("scheduler/scheduler_config.json").read_text()))\n'
)
_AUTOENCODER_CODE = """\
from latentgen import TextToImagePipeline

# With a model that was trained in its latents:
# TextToImagePipeline.from_pretrained(MODEL, vae="vae/diffusion_pytorch_model.safetensors")
"""
_AUTOENCODER_DIFFUSERS_CODE = """\
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained(".", subfolder="vae")
"""


class _Usage(NamedTuple):
    """What kind of model a folder holds, and code that uses it; "" where there is none."""

    title: str
    tags: tuple[str, ...]
    code: str
    diffusers_code: str
    pipeline_tag: str | None = None


def write_card(
    folder: Path, config: TrainConfig, *, pipeline: Pipeline | None, images: int, parameters: int, steps: int
) -> None:
    """Write `README.md` into the folder of a trained model, and next to it the newest sheet of validation prompts.

    The recipe is included with the last names of its folders alone, the images with their number alone, and no captions
    but the prompts of the recipe: what a model was trained and validated on may be private.

    Args:
        folder: what an objective has saved.
        config: the recipe.
        pipeline: what an adapter was trained on.
        images: how many it was trained on.
        parameters: how many were trained.
        steps: optimizer steps done.

    Raises:
        OutputError: the folder cannot be written.
    """
    usage, validation = _usage(folder, config, pipeline), config.validation
    prompts = validation.prompts if validation is not None else ()
    sheet = latest_sheet(config.output_dir) if prompts else None
    if sheet is not None:
        with atomic_write(folder / SHEET) as target, sheet.open("rb") as source:
            shutil.copyfileobj(source, target)
    numbered = (f"{number}. `{' '.join(text.split())}`" for number, text in enumerate(prompts, 1))
    hub_id = _hub_id(config.init_from)
    header = {
        "library_name": "diffusers" if usage.diffusers_code else "latentgen",
        **({"pipeline_tag": usage.pipeline_tag} if usage.pipeline_tag else {}),
        "tags": [*usage.tags, "latentgen"],
        **({"base_model": hub_id} if hub_id else {}),
    }
    card = _TEMPLATE.format(
        header=yaml.safe_dump(header, sort_keys=False),
        name=config.output_dir.resolve().name,
        title=usage.title,
        version=__version__,
        base=_base_name(config),
        images=images,
        steps=steps,
        batch_size=config.batch_size,
        parameters=parameters,
        averaged=", averaged over the steps" if config.ema_decay else "",
        seed=config.seed,
        samples="" if sheet is None else _SAMPLES.format(sheet=SHEET, prompts="\n".join(numbered)),
        use=_USE.format(code=usage.code) if usage.code else "",
        diffusers=_DIFFUSERS.format(code=usage.diffusers_code) if usage.diffusers_code else "",
        recipe=yaml.safe_dump(_public(config.model_dump(exclude=set(_OMITTED_FIELDS))), sort_keys=False),
    )
    with atomic_write(folder / CARD) as file:
        file.write(card.encode())


def _usage(folder: Path, config: TrainConfig, base: Pipeline | None) -> _Usage:
    """How to use what is in the folder: a whole model, or an adapter that is attached to `base`."""
    method = config.task.method if isinstance(config.task, FinetuneTask) else None
    if base is not None and isinstance(method, TextualInversionMethod):
        title, tags = "An embedding (textual inversion)", ("textual_inversion",)
        attach = f'.with_embedding("{EMBEDDING_FILE}")', _load_embedding(base, method.token)
    elif base is not None and isinstance(method, LoRAMethod):
        load = f'pipe.load_lora_weights(".", weight_name="{DIFFUSERS_FILE}")\n'
        title, tags, attach = "A LoRA", ("lora",), (f'.with_lora("{DIFFUSERS_FILE}")', load)
    else:
        return _model_usage(folder, config)
    name, scale, scheduler = base.diffusers_class, base.default_guidance_scale, None
    if (folder / "scheduler").is_dir():
        scheduler = str(base.scheduler.to_config()["_class_name"])
    code, diffusers_code = _pipeline_code(
        config,
        (type(base).__name__, name),
        guidance_scale=None if scale == default_guidance_scale_of(name) else scale,
        attach=attach,
        scheduler=scheduler,
    )
    hub_task = _hub_task(type(base).__name__)
    return _Usage(f"{title} for {_base_name(config)}", (hub_task, *tags), code, diffusers_code, hub_task)


def _model_usage(folder: Path, config: TrainConfig) -> _Usage:
    if not (folder / "model_index.json").is_file():  # an objective that saves its weights alone
        return _Usage("A model", (), "", "")
    index = read_json(folder / "model_index.json")
    name = str(index["_class_name"])
    if name == "AutoencoderKL":
        return _Usage("An autoencoder", ("autoencoder",), _AUTOENCODER_CODE, _AUTOENCODER_DIFFUSERS_CODE)
    pipeline = "ConcatImagePipeline" if config.task.kind == "paired" else PIPELINE_CLASSES[name].readers[0]
    code, diffusers_code = _pipeline_code(config, (pipeline, name), guidance_scale=index.get(GUIDANCE_KEY))
    hub_task = _hub_task(pipeline)
    what = "An upscaler" if pipeline == "UpscalePipeline" else f"A model for {hub_task.replace('-', ' ')}"
    runs_in_diffusers = pipeline in _SHARED and name not in PIXEL_CLASSES
    return _Usage(what, (hub_task,), code, diffusers_code if runs_in_diffusers else "", hub_task)


def _load_embedding(base: Pipeline, token: str) -> str:
    """Code for diffusers, which takes the vectors of each text encoder of SDXL separately."""
    if not base.is_sdxl:
        return f'pipe.load_textual_inversion("{EMBEDDING_FILE}")\n'
    loads = "".join(
        f'pipe.load_textual_inversion(vectors["{key}"], token={token!r}, text_encoder=pipe.{encoder}, '
        f"tokenizer=pipe.{TOKENIZERS[encoder]})\n"
        for encoder, key in SDXL_KEYS.items()
    )
    return f'vectors = load_file("{EMBEDDING_FILE}")\n{loads}'


def _pipeline_code(
    config: TrainConfig,
    classes: tuple[str, str],
    *,
    guidance_scale: object,
    attach: tuple[str, str] | None = None,
    scheduler: str | None = None,
) -> tuple[str, str]:
    """Code that generates an image, for this library and for diffusers.

    Args:
        config: the recipe.
        classes: the pipelines, here and in diffusers.
        guidance_scale: the model's, if it is not the default of diffusers.
        attach: code that attaches an adapter to the base model of the recipe; None if the folder holds a whole model.
        scheduler: the class of the scheduler in the folder of an adapter.
    """
    task, base = config.task, config.init_from
    (pipeline, diffusers_class), (code, diffusers_code) = classes, attach or ("", "")
    source, variant, prediction_type = '"."', None, None
    if attach is not None and (base is None or base.resolve() == EMBEDDED_DEFAULT):
        source = ""
    elif attach is not None and base is not None:
        source = f'"{_hub_id(base) or f"path/to/{base.name}"}"'
        if isinstance(task, FinetuneTask):
            variant, prediction_type = task.variant, task.prediction_type
    loader = "from_single_file" if source.endswith(('.safetensors"', '.ckpt"')) else "from_pretrained"
    arguments = [source] * bool(source) + [f'variant="{variant}"'] * bool(variant)
    prompt, images = repr(_example_prompt(config)), _IMAGES.get(pipeline, {})
    call = [prompt, *(f'{name}="{file}"' for name, file in images.items())]
    ours = _CODE.format(
        imports="import json\nfrom pathlib import Path\n\n" if scheduler else "",
        names=f"{pipeline}, Scheduler" if scheduler else pipeline,
        pipeline=pipeline,
        loader=loader,
        source=", ".join(arguments + [f'prediction_type="{prediction_type}"'] * bool(prediction_type)),
        adapter=code,
        scheduler=_READ_SCHEDULER if scheduler else "",
        call="".join(f"{argument}, " for argument in call + ["scheduler=scheduler"] * bool(scheduler)),
    )
    imports = [
        *(["from diffusers.utils import load_image"] if images else []),
        *([] if source else ["from latentgen.checkpoints.folder import EMBEDDED_DEFAULT"]),
        *(["from safetensors.torch import load_file"] if "load_file(" in diffusers_code else []),
    ]
    set_scheduler = ""
    if scheduler:
        set_scheduler = f'pipe.scheduler = {scheduler}.from_pretrained(".", subfolder="scheduler")\n'
    elif prediction_type:
        set_scheduler = (
            "pipe.scheduler = type(pipe.scheduler).from_config(\n"
            f'    pipe.scheduler.config, prediction_type="{prediction_type}"\n)\n'
        )
    call = [prompt, *(f'{name}=load_image("{file}")' for name, file in images.items())]
    call += [] if guidance_scale is None else [f"guidance_scale={guidance_scale}"]
    theirs = _DIFFUSERS_CODE.format(
        names=", ".join(sorted({diffusers_class, scheduler or diffusers_class})),
        imports="".join(f"{line}\n" for line in imports),
        pipeline=diffusers_class,
        loader=loader,
        source=", ".join(arguments) or "EMBEDDED_DEFAULT",
        adapter=diffusers_code,
        scheduler=set_scheduler,
        call="".join(f"{argument}, " for argument in call),
    )
    return ours, theirs


def _hub_task(pipeline: str) -> str:
    return "image-to-image" if pipeline in _IMAGES else "text-to-image"


def _example_prompt(config: TrainConfig) -> str:
    """A prompt of the recipe, with the token that textual inversion has trained."""
    task, validation = config.task, config.validation
    prompts = validation.prompts if validation is not None else ()
    if isinstance(task, FinetuneTask) and isinstance(task.method, TextualInversionMethod):
        token = task.method.token
        return next((prompt for prompt in prompts if token in prompt), f"a picture of {token}")
    return prompts[0] if prompts else "a picture"


def _hub_id(base: Path | None) -> str | None:
    """The id of a base model on the Hub, "owner/name", if it has one."""
    if base is None:
        return None
    for part in base.parts:  # a snapshot in the Hub's cache
        kind, _, rest = part.partition("--")
        if kind == "models" and rest:
            return rest.replace("--", "/", 1)
    text = base.as_posix()
    return text if _HUB_ID.fullmatch(text) and not base.exists() else None


def _base_name(config: TrainConfig) -> str:
    base = config.init_from
    is_default = config.task.kind == "finetune" if base is None else base.resolve() == EMBEDDED_DEFAULT
    if is_default:
        return "the default model of latentgen"
    return "random weights" if base is None else _hub_id(base) or base.name


def _public(value: Any) -> Any:
    """A part of a recipe for YAML, without the paths of this machine."""
    if isinstance(value, Path):
        return value.name
    if isinstance(value, Mapping):
        return {name: _public(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_public(part) for part in value]
    return value
