"""Load models from a checkpoint, and save them in a folder in the diffusers layout."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from torch import nn

from latentgen.checkpoints.folder import LAYOUT_VERSION, SCHEDULERS, TOKENIZERS
from latentgen.checkpoints.single_file import Checkpoint
from latentgen.checkpoints.weights import save_weights
from latentgen.diffusion.flow_matching import FlowSchedule
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import CheckpointNotFoundError, ConfigError, InputError, OutputError
from latentgen.files import quote, write_json
from latentgen.models.config import CLIPTextConfig, VAEConfig
from latentgen.models.layers import can_pack, pack_convolutions
from latentgen.models.pixels import ImageDecoder, ImageEncoder, PixelDecoder, PixelEncoder
from latentgen.models.text import CLIPText, TextEncoder, join_towers
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import DECODER_KEYS, ENCODER_KEYS, VAEDecoder, VAEEncoder
from latentgen.pipelines.arguments import check_guidance_scale

if TYPE_CHECKING:
    from latentgen.pipelines.base import Pipeline

VAEPart = TypeVar("VAEPart", VAEDecoder, VAEEncoder)
DTypeName = Literal["auto", "float32", "float16", "bfloat16"]
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Diffusers has no pixel-space pipelines with CLIP; with these class names it refuses the folder.
PIXEL_CLASS = "LatentgenPixelPipeline"
PIXEL_CONCAT_CLASS = "LatentgenPixelPairedPipeline"
PIXEL_UPSCALE_CLASS = "LatentgenPixelUpscalePipeline"
PIXEL_CLASSES = (PIXEL_CLASS, PIXEL_CONCAT_CLASS, PIXEL_UPSCALE_CLASS)
# The default guidance scale of most diffusers pipelines.
DEFAULT_GUIDANCE_SCALE = 7.5


class PipelineClass(NamedTuple):
    """Facts about a `_class_name` of `model_index.json`.

    Attributes:
        readers: our pipelines that load such a checkpoint; the first one does the same task.
        guidance_scale: diffusers' default.
        fixes_scheduler: diffusers corrects the scheduler settings of old folders; see load_scheduler.
    """

    readers: tuple[str, ...]
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE
    fixes_scheduler: bool = False


# Pipelines whose UNet takes only the noisy latents can load each other's checkpoints.
_FROM_TEXT = ("TextToImagePipeline", "ImageToImagePipeline", "InpaintPipeline")
_FROM_IMAGE = ("ImageToImagePipeline", "TextToImagePipeline", "InpaintPipeline")
PIPELINE_CLASSES: Mapping[str, PipelineClass] = {
    "StableDiffusionPipeline": PipelineClass(_FROM_TEXT, fixes_scheduler=True),
    "StableDiffusionXLPipeline": PipelineClass(_FROM_TEXT, 5.0),
    "StableDiffusionImg2ImgPipeline": PipelineClass(_FROM_IMAGE, fixes_scheduler=True),
    # Also the class of the SDXL refiner.
    "StableDiffusionXLImg2ImgPipeline": PipelineClass(_FROM_IMAGE, 5.0),
    "LatentConsistencyModelPipeline": PipelineClass(_FROM_TEXT, 8.5),
    PIXEL_CLASS: PipelineClass(_FROM_TEXT),
    "StableDiffusionInpaintPipeline": PipelineClass(("InpaintPipeline",), fixes_scheduler=True),
    "StableDiffusionXLInpaintPipeline": PipelineClass(("InpaintPipeline",)),
    "StableDiffusionInstructPix2PixPipeline": PipelineClass(
        ("InstructPix2PixPipeline", "ConcatImagePipeline")
    ),
    PIXEL_CONCAT_CLASS: PipelineClass(("ConcatImagePipeline",)),
    "StableDiffusionUpscalePipeline": PipelineClass(("UpscalePipeline",), 9.0),
    PIXEL_UPSCALE_CLASS: PipelineClass(("UpscalePipeline",), 9.0),
}
# The key of a checkpoint's own scale in model_index.json; diffusers ignores keys that begin with an underscore.
GUIDANCE_KEY = "_guidance_scale"
# Components that our pipelines load, and those that they ignore.
USED = ("unet", "vae", *SCHEDULERS, *TOKENIZERS, *TOKENIZERS.values())
_IGNORED = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")


class LoadOptions(NamedTuple):
    """How to load models: dtype, device, variant of the files, packing.

    `pack` makes packed copies of the weights of convolutions on a CPU; see MemoryPolicy. `as_in_file` keeps kernels in
    the layout of the file, mapped from it if the dtype allows: for networks that rarely run.
    """

    dtype: torch.dtype
    device: torch.device
    variant: str | None = None
    pack: bool = False
    as_in_file: bool = False


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device; "auto" is CUDA if there is one, then MPS, then the CPU.

    Raises:
        InputError: not a device, or this machine does not have it.
    """
    counts = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    available = [name for name, count in counts.items() if count]
    if device == "auto":
        return torch.device(available[0])
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        resolved = None
    if resolved is None or (resolved.index or 0) >= counts.get(resolved.type, 0):
        raise InputError(
            f'device={device!r} is not available; this machine has {", ".join(available)}; "auto" picks one'
        )
    return resolved


def resolve_dtype(dtype: DTypeName | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the weights; "auto" is float16 on CUDA and float32 elsewhere.

    Raises:
        InputError: not one of float32, float16, bfloat16.
    """
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    resolved = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in _DTYPES.values():
        raise InputError(f"dtype={dtype!r} is not supported; choose from auto, {', '.join(_DTYPES)}")
    return resolved


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Turn Python's garbage collector off: scanning all objects of all libraries would take longer than loading."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def classes_read_by(pipeline: str) -> tuple[str, ...]:
    """The `_class_name`s of the checkpoints that a pipeline of ours loads."""
    return tuple(name for name, known in PIPELINE_CLASSES.items() if pipeline in known.readers)


def check_class(checkpoint: Checkpoint, classes: Sequence[str]) -> None:
    """Check that the `_class_name` of a checkpoint is among those that a pipeline loads, and its components.

    Raises:
        ConfigError: another class of pipeline, or an unknown component.
    """
    index = f"{quote(checkpoint.path)}, model_index.json"
    actual = checkpoint.model_index.get("_class_name")
    if actual not in classes:
        known = PIPELINE_CLASSES.get(str(actual))
        fix = f"load it with {known.readers[0]}" if known else f"this pipeline loads {', '.join(classes)}"
        raise ConfigError(f"{index}: _class_name is {quote(actual)}; {fix}")
    if unknown := [name for name in checkpoint.components if name not in USED + _IGNORED]:
        raise ConfigError(f"{index}: {quote(unknown[0])} is not a known component of {actual}")


def forces_zeros(checkpoint: Checkpoint) -> bool:
    """Whether a model was trained with zeros for an empty prompt, as SDXL's are by default."""
    flag = checkpoint.model_index.get("force_zeros_for_empty_prompt", _is_sdxl(checkpoint))
    if not isinstance(flag, bool):
        raise ConfigError(
            f"{quote(checkpoint.path)}: force_zeros_for_empty_prompt in model_index.json is {quote(flag)}; it must be "
            "true or false"
        )
    return flag and _is_sdxl(checkpoint)


def guidance_scale(checkpoint: Checkpoint) -> float:
    """The default guidance scale of a checkpoint, else of its pipeline class.

    Raises:
        ConfigError: the checkpoint's value is invalid.
    """
    usual = default_guidance_scale_of(str(checkpoint.model_index.get("_class_name")))
    value: Any = checkpoint.model_index.get(GUIDANCE_KEY, usual)
    try:
        return check_guidance_scale(value)
    except InputError as error:
        raise ConfigError(f"{quote(checkpoint.path)}, {GUIDANCE_KEY} in model_index.json: {error}") from None


def default_guidance_scale_of(diffusers_class: str) -> float:
    """The default guidance scale of a diffusers pipeline."""
    known = PIPELINE_CLASSES.get(diffusers_class)
    return known.guidance_scale if known else DEFAULT_GUIDANCE_SCALE


def _is_sdxl(checkpoint: Checkpoint) -> bool:
    name = checkpoint.model_index.get("_class_name")
    return name in PIPELINE_CLASSES and "XL" in str(name)


def load_unet(checkpoint: Checkpoint, options: LoadOptions) -> UNet:
    """The UNet of a checkpoint."""
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_json(checkpoint.config("unet")))
    _load(unet, checkpoint, "unet", options)
    return unet


def load_decoder(checkpoint: Checkpoint, options: LoadOptions) -> ImageDecoder:
    """The decoder of a checkpoint's VAE; in pixel space a PixelDecoder."""
    if _is_pixel_space(checkpoint):
        return PixelDecoder()
    return _load_vae(VAEDecoder, checkpoint, options, ENCODER_KEYS)


def load_encoder(checkpoint: Checkpoint, options: LoadOptions) -> ImageEncoder:
    """The encoder of a checkpoint's VAE; in pixel space a PixelEncoder."""
    if _is_pixel_space(checkpoint):
        return PixelEncoder()
    return _load_vae(VAEEncoder, checkpoint, options, DECODER_KEYS)


def _load_vae(
    part: type[VAEPart], checkpoint: Checkpoint, options: LoadOptions, ignored: tuple[str, ...]
) -> VAEPart:
    with torch.device("meta"):
        module = part(VAEConfig.from_json(checkpoint.config("vae")))
    _load(module, checkpoint, "vae", options, ignored_prefixes=ignored)
    return module


def _is_pixel_space(checkpoint: Checkpoint) -> bool:
    name = checkpoint.model_index.get("_class_name")
    if name not in PIXEL_CLASSES:
        return False
    if "vae" in checkpoint.components:
        raise ConfigError(
            f"{quote(checkpoint.path)}, model_index.json: a {name} is in pixel space and has no vae; remove "
            "that entry, or correct _class_name"
        )
    return True


def load_text_encoder(checkpoint: Checkpoint, options: LoadOptions) -> TextEncoder:
    """The text encoder of a checkpoint, or SDXL's pair, with the tokenizers."""
    names = [name for name in TOKENIZERS if name in checkpoint.components]
    if not names:
        components = ", ".join(checkpoint.components)
        raise CheckpointNotFoundError(
            f"{quote(checkpoint.path)} has no text_encoder; its components are: {components}"
        )
    towers = [
        CLIPText.from_weights(
            CLIPTextConfig.from_json(checkpoint.config(name)),
            checkpoint.tokenizer(TOKENIZERS[name]),
            checkpoint.weights(name, options.variant),
            layer="penultimate" if _is_sdxl(checkpoint) else "last",
            dtype=options.dtype,
            device=options.device,
        )
        for name in names
    ]
    for tower in towers:
        tower.model.requires_grad_(False)
    return join_towers(towers)


def load_scheduler(checkpoint: Checkpoint) -> Scheduler:
    """The scheduler of a checkpoint.

    Old Stable Diffusion folders have steps_offset 0 and clip_sample true, which the model was not trained with; like
    diffusers' StableDiffusionPipeline, read them as 1 and false.
    """
    scheduler = Scheduler.from_config(checkpoint.config("scheduler"))
    known = PIPELINE_CLASSES.get(str(checkpoint.model_index.get("_class_name")))
    if known is None or not known.fixes_scheduler or isinstance(scheduler.schedule, FlowSchedule):
        return scheduler
    return replace(scheduler, steps_offset=1, clipping=replace(scheduler.clipping, clip_sample=False))


def weight_bytes(checkpoint: Checkpoint, options: LoadOptions) -> int:
    """A lower bound of the memory of a pipeline: the weights of the UNet and the text encoders."""
    names = ("unet", *(name for name in TOKENIZERS if name in checkpoint.components))
    tensors = (checkpoint.weights(name, options.variant).tensors() for name in names)
    count = sum(math.prod(info.shape) for infos in tensors for info in infos.values())
    return count * options.dtype.itemsize


def _load(
    module: nn.Module,
    checkpoint: Checkpoint,
    component: str,
    options: LoadOptions,
    *,
    ignored_prefixes: tuple[str, ...] = (),
) -> None:
    # Convolution weights in another memory format than the images are converted at every call. Packed ones are not, and
    # for float16 on a CPU it costs no time: both stay mapped from the file.
    stays_mapped = options.pack and (can_pack(options.dtype) or options.dtype == torch.float16)
    checkpoint.weights(component, options.variant).load_into(
        module,
        ignored_prefixes=ignored_prefixes,
        dtype=options.dtype,
        device=options.device,
        memory_format=(torch.preserve_format if stays_mapped or options.as_in_file else torch.channels_last),
    )
    module.eval().requires_grad_(False)
    if options.pack and can_pack(options.dtype):
        pack_convolutions(module)


WEIGHTS_STEM = "diffusion_pytorch_model"
# In model_index.json, an optional component of diffusers' pipelines that ours do not have.
ABSENT = [None, None]


def save_folder(
    pipeline: Pipeline, folder: str | Path, index: Mapping[str, object], variant: str | None
) -> None:
    """Write a folder that diffusers loads; `model_index.json` is written last.

    In pixel space there is no `vae`, and diffusers can load only the single components.

    Args:
        pipeline: its models and schedulers are written.
        folder: where to write; created if missing.
        index: further entries of `model_index.json`.
        variant: suffix in the names of the weight files.

    Raises:
        InputError: the pipeline is in pixel space, and its class needs a VAE; nothing was written.
        OutputError: a file could not be written; that file and the ones after it keep their old content.
    """
    if not isinstance(folder, str | Path) or not str(folder) or "\0" in str(folder):
        raise OutputError(f"cannot write to {quote(folder)}: pass the path of a folder")
    name, folder = pipeline.diffusers_class, Path(folder)
    encoder, decoder = pipeline.encoder(), pipeline.decoder
    if isinstance(decoder, PixelDecoder) and name not in PIXEL_CLASSES:
        raise InputError(
            f"a {name} in pixel space cannot be saved: the class needs a VAE; text to image, image "
            "concatenation and upscaling without SDXL's conditioning have pixel-space classes"
        )
    save_weights(pipeline.unet.state_dict(), folder / "unet", WEIGHTS_STEM, variant=variant)
    write_json(folder / "unet" / "config.json", pipeline.unet.config.to_json())
    components: dict[str, object] = {"unet": ["diffusers", "UNet2DConditionModel"]}
    if not isinstance(decoder, PixelDecoder):
        vae = {**encoder.state_dict(), **decoder.state_dict()}
        save_weights(vae, folder / "vae", WEIGHTS_STEM, variant=variant)
        write_json(folder / "vae" / "config.json", decoder.config.to_json())
        components["vae"] = ["diffusers", "AutoencoderKL"]
    for component, tower in named_towers(pipeline.unet, pipeline.text_encoder).items():
        tower.save(folder / component, folder / TOKENIZERS[component], variant=variant)
        projected = "WithProjection" if tower.config.projects else ""
        components[component] = ["transformers", f"CLIPTextModel{projected}"]
        components[TOKENIZERS[component]] = ["transformers", "CLIPTokenizer"]
    for component, scheduler in pipeline.schedulers.items():
        config = scheduler.to_config()
        write_json(folder / component / "scheduler_config.json", config)
        components[component] = ["diffusers", config["_class_name"]]
    entries: dict[str, object] = {"_class_name": name, **LAYOUT_VERSION}
    if pipeline.default_guidance_scale != default_guidance_scale_of(name):
        entries[GUIDANCE_KEY] = pipeline.default_guidance_scale
    write_json(folder / "model_index.json", {**index, **entries, **components})


def named_towers(unet: UNet, text_encoder: TextEncoder) -> dict[str, CLIPText]:
    """Text encoders by component name; SDXL's refiner has only the second one."""
    is_refiner = len(text_encoder.towers) == 1 and unet.config.addition_embed_type
    return dict(zip(list(TOKENIZERS)[1 if is_refiner else 0 :], text_encoder.towers, strict=False))
