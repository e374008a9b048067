"""The model card of a trained model: its base, how it was trained, and code that uses it. It claims nothing else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
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
from latentgen.train.config import FinetuneTask, FullMethod, TextualInversionMethod, TrainConfig
from latentgen.train.methods.lora import DIFFUSERS_FILE
from latentgen.train.methods.textual_inversion import EMBEDDING_FILE, SDXL_KEYS
from latentgen.train.validation import SHEET, latest_sheet

CARD = "README.md"
_TEMPLATE = "model_card.md.jinja"
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


def write_card(
    folder: Path, config: TrainConfig, *, pipeline: Pipeline | None, images: int, parameters: int, steps: int
) -> None:
    """Write `README.md` into the folder of a trained model, and next to it the newest sheet of validation prompts.

    The training and validation data may be private: the card has the recipe with only the last part of each path, only
    the number of the images, and no captions except the recipe's prompts. `pipeline` is the one that an adapter was
    trained on.

    Raises:
        OutputError: the folder cannot be written.
    """
    use, validation = _usage(folder, config, pipeline), config.validation
    prompts = validation.prompts if validation is not None else ()
    sheet = latest_sheet(config.output_dir) if prompts else None
    if sheet is not None:
        with atomic_write(folder / SHEET) as target, sheet.open("rb") as source:
            shutil.copyfileobj(source, target)
    diffusers_class, hub_task, hub_id = use["diffusers_class"], _hub_task(use), _hub_id(config.init_from)
    header = {
        "library_name": "diffusers" if diffusers_class else "latentgen",
        **({"pipeline_tag": hub_task} if hub_task else {}),
        "tags": [*([hub_task] if hub_task else []), *use.get("tags", ()), "latentgen"],
        **({"base_model": hub_id} if hub_id else {}),
    }
    text = Path(__file__).with_name(_TEMPLATE).read_text("utf-8")
    template = jinja2.Template(text, trim_blocks=True, keep_trailing_newline=True)
    card = template.render(
        header=yaml.safe_dump(header, sort_keys=False),
        name=config.output_dir.resolve().name,
        use=use,
        config=config,
        version=__version__,
        base=_base_name(config),
        image_count=f"{images:,}",
        steps=f"{steps:,}",
        batch_size=f"{config.batch_size:,}",
        parameters=f"{parameters:,}",
        sheet=None if sheet is None else SHEET,
        prompts=[" ".join(text.split()) for text in prompts],
        prompt=repr(_example_prompt(config)),
        images=_IMAGES.get(use["pipeline"], {}),
        diffusers_classes=sorted({diffusers_class, use.get("scheduler", diffusers_class)}, key=str),
        recipe=yaml.safe_dump(_public(config.model_dump(exclude=set(_OMITTED_FIELDS))), sort_keys=False),
    )
    with atomic_write(folder / CARD) as file:
        file.write(card.encode())


def _usage(folder: Path, config: TrainConfig, base: Pipeline | None) -> dict[str, Any]:
    """How to use what is in the folder, for the template: a whole model, or an adapter that is attached to `base`.

    `pipeline` is latentgen's class, None if none loads it; `diffusers_class` is diffusers' class, None if it cannot run
    the model; `guidance_scale` is the model's, if it differs from diffusers' default; `scheduler` is the class of the
    scheduler in an adapter's folder. `loader` loads the model, or the base of an adapter, from `arguments`.
    """
    task = config.task
    if base is None or not isinstance(task, FinetuneTask) or isinstance(task.method, FullMethod):
        return _model_usage(folder, config)
    method = task.method
    name, scale = base.diffusers_class, base.default_guidance_scale
    use: dict[str, Any] = {
        "title": f"A LoRA for {_base_name(config)}",
        "tags": ["lora"],
        "pipeline": type(base).__name__,
        "diffusers_class": name,
        "guidance_scale": None if scale == default_guidance_scale_of(name) else scale,
        "attach": f'.with_lora("{DIFFUSERS_FILE}")',
        "diffusers_attach": [f'pipe.load_lora_weights(".", weight_name="{DIFFUSERS_FILE}")'],
        "loader": "from_pretrained",
    }
    if isinstance(method, TextualInversionMethod):
        use |= {
            "title": f"An embedding (textual inversion) for {_base_name(config)}",
            "tags": ["textual_inversion"],
            "attach": f'.with_embedding("{EMBEDDING_FILE}")',
            "diffusers_attach": _load_embedding(base, method.token),
        }
    if (folder / "scheduler").is_dir():
        use["scheduler"] = str(base.scheduler.to_config()["_class_name"])
    path = config.init_from
    if path is None or path.resolve() == EMBEDDED_DEFAULT:
        return use
    model = _hub_id(path) or f"path/to/{path.name}"
    if model.endswith((".safetensors", ".ckpt")):
        use["loader"] = "from_single_file"
    variant = [f'variant="{task.variant}"'] if task.variant else []
    return {**use, "arguments": [f'"{model}"', *variant], "prediction_type": task.prediction_type}


def _model_usage(folder: Path, config: TrainConfig) -> dict[str, Any]:
    if not (folder / "model_index.json").is_file():  # an objective that saves only its weights
        return {"title": "A model", "pipeline": None, "diffusers_class": None}
    index = read_json(folder / "model_index.json")
    name = str(index["_class_name"])
    if name == "AutoencoderKL":
        return {"title": "An autoencoder", "tags": ["autoencoder"], "pipeline": name, "diffusers_class": name}
    pipeline = "ConcatImagePipeline" if config.task.kind == "paired" else PIPELINE_CLASSES[name].readers[0]
    runs_in_diffusers = pipeline in _SHARED and name not in PIXEL_CLASSES
    use = {
        "pipeline": pipeline,
        "diffusers_class": name if runs_in_diffusers else None,
        "guidance_scale": index.get(GUIDANCE_KEY),
        "loader": "from_pretrained",
        "arguments": ['"."'],
    }
    purpose = str(_hub_task(use)).replace("-", " ")
    return {**use, "title": "An upscaler" if pipeline == "UpscalePipeline" else f"A model for {purpose}"}


def _load_embedding(base: Pipeline, token: str) -> list[str]:
    """Code for diffusers, which takes the vectors of each text encoder of SDXL separately."""
    if not base.is_sdxl:
        return [f'pipe.load_textual_inversion("{EMBEDDING_FILE}")']
    loads = (
        f'pipe.load_textual_inversion(vectors["{key}"], token={token!r}, text_encoder=pipe.{encoder}, '
        f"tokenizer=pipe.{TOKENIZERS[encoder]})"
        for encoder, key in SDXL_KEYS.items()
    )
    return [f'vectors = load_file("{EMBEDDING_FILE}")', *loads]


def _hub_task(use: Mapping[str, Any]) -> str | None:
    """The Hub's name of what a pipeline does."""
    if use["pipeline"] in (None, "AutoencoderKL"):
        return None
    return "image-to-image" if use["pipeline"] in _IMAGES else "text-to-image"


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
