"""Load models from a checkpoint, and save them in a folder in the diffusers layout."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from latentgen.checkpoints.folder import LAYOUT_VERSION, SCHEDULERS, TOKENIZERS
from latentgen.checkpoints.single_file import Checkpoint
from latentgen.checkpoints.weights import save_weights
from latentgen.diffusion.flow_matching import FlowSchedule
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import CheckpointNotFoundError, ConfigError, InputError
from latentgen.files import quote, write_json
from latentgen.models.config import CLIPTextConfig, VAEConfig
from latentgen.models.mkldnn_conv import can_pack, pack_convolutions
from latentgen.models.pixels import ImageDecoder, ImageEncoder, PixelDecoder, PixelEncoder
from latentgen.models.text import CLIPText, TextEncoder, join_towers
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import DECODER_KEYS, ENCODER_KEYS, VAEDecoder, VAEEncoder
from latentgen.pipelines.arguments import check_guidance_scale

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
# A checkpoint's own, in model_index.json; diffusers ignores keys that begin with an underscore.
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
    with torch.device("meta"):
        decoder = VAEDecoder(VAEConfig.from_json(checkpoint.config("vae")))
    _load(decoder, checkpoint, "vae", options, prefixes=DECODER_KEYS, ignored_prefixes=ENCODER_KEYS)
    return decoder


def load_encoder(checkpoint: Checkpoint, options: LoadOptions) -> ImageEncoder:
    """The encoder of a checkpoint's VAE; in pixel space a PixelEncoder."""
    if _is_pixel_space(checkpoint):
        return PixelEncoder()
    with torch.device("meta"):
        encoder = VAEEncoder(VAEConfig.from_json(checkpoint.config("vae")))
    _load(encoder, checkpoint, "vae", options, prefixes=ENCODER_KEYS, ignored_prefixes=DECODER_KEYS)
    return encoder


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
    return join_towers([_load_tower(checkpoint, name, options) for name in names])


def _load_tower(checkpoint: Checkpoint, component: str, options: LoadOptions) -> CLIPText:
    tower = CLIPText.from_weights(
        CLIPTextConfig.from_json(checkpoint.config(component)),
        checkpoint.tokenizer(TOKENIZERS[component]),
        checkpoint.weights(component, options.variant),
        layer="penultimate" if _is_sdxl(checkpoint) else "last",
        dtype=options.dtype,
        device=options.device,
    )
    tower.model.requires_grad_(False)
    return tower


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
    prefixes: tuple[str, ...] = ("",),
    ignored_prefixes: tuple[str, ...] = (),
) -> None:
    checkpoint.weights(component, options.variant).load_into(
        module,
        prefixes=prefixes,
        ignored_prefixes=ignored_prefixes,
        dtype=options.dtype,
        device=options.device,
        memory_format=_kernel_layout(options),
    )
    module.eval().requires_grad_(False)
    if options.pack and can_pack(options.dtype):
        pack_convolutions(module)


def _kernel_layout(options: LoadOptions) -> torch.memory_format:
    """The memory format of convolution weights.

    Weights in another format than the images are converted at every call. Packed ones are not, and for float16 on a CPU
    it costs no time: both stay mapped from the file.
    """
    stays_mapped = options.pack and (can_pack(options.dtype) or options.dtype == torch.float16)
    return torch.preserve_format if stays_mapped or options.as_in_file else torch.channels_last


WEIGHTS_STEM = "diffusion_pytorch_model"
_NONE = [None, None]
# Optional components of diffusers' SD and SDXL pipelines that ours do not have.
SD_INDEX: Mapping[str, object] = {
    "feature_extractor": _NONE,
    "safety_checker": _NONE,
    "requires_safety_checker": False,
}
SDXL_INDEX: Mapping[str, object] = {"feature_extractor": _NONE, "image_encoder": _NONE}


def img2img_index(towers: int, uses_aesthetic_score: bool) -> dict[str, object]:
    """Further entries of `model_index.json` for SDXL's pipelines that take an image.

    Args:
        towers: the number of text encoders; the refiner has only the second one.
        uses_aesthetic_score: see Pipeline.
    """
    entries: dict[str, object] = {"requires_aesthetics_score": uses_aesthetic_score}
    return entries | {"text_encoder": _NONE, "tokenizer": _NONE} if towers == 1 else entries


def class_entries(diffusers_class: str, guidance_scale: float | None) -> dict[str, object]:
    """The entries of `model_index.json` for the class, and for a guidance scale other than the class's default."""
    own = guidance_scale not in (None, default_guidance_scale_of(diffusers_class))
    entries: dict[str, object] = {"_class_name": diffusers_class, **LAYOUT_VERSION}
    return entries | {GUIDANCE_KEY: guidance_scale} if own else entries


def save_folder(
    folder: Path,
    *,
    unet: UNet,
    encoder: ImageEncoder,
    decoder: ImageDecoder,
    text_encoder: TextEncoder,
    schedulers: Mapping[str, Scheduler],
    index: Mapping[str, object],
    variant: str | None,
) -> None:
    """Write a folder that diffusers loads; `model_index.json` is written last.

    In pixel space there is no `vae`, and diffusers can load only the single components.

    Args:
        folder: where to write; created if missing.
        unet: the UNet.
        encoder: the VAE's encoder.
        decoder: the VAE's decoder.
        text_encoder: one tower, or SDXL's two.
        schedulers: component -> scheduler.
        index: the entries of `model_index.json` other than the components, such as `_class_name`, which in pixel space
            must be one of PIXEL_CLASSES.
        variant: suffix in the names of the weight files.

    Raises:
        InputError: the pipeline is in pixel space, and its class needs a VAE; nothing was written.
        OutputError: a file could not be written; that file and the ones after it keep their old content.
    """
    if isinstance(decoder, PixelDecoder) and index["_class_name"] not in PIXEL_CLASSES:
        raise InputError(
            f"a {index['_class_name']} in pixel space cannot be saved: the class needs a VAE; text to image, image "
            "concatenation and upscaling without SDXL's conditioning have pixel-space classes"
        )
    save_weights(unet.state_dict(), folder / "unet", WEIGHTS_STEM, variant=variant)
    write_json(folder / "unet" / "config.json", unet.config.to_json())
    components: dict[str, object] = {"unet": ["diffusers", "UNet2DConditionModel"]}
    if not isinstance(decoder, PixelDecoder):
        vae = {**encoder.state_dict(), **decoder.state_dict()}
        save_weights(vae, folder / "vae", WEIGHTS_STEM, variant=variant)
        write_json(folder / "vae" / "config.json", decoder.config.to_json())
        components["vae"] = ["diffusers", "AutoencoderKL"]
    for name, tower in named_towers(unet, text_encoder).items():
        tower.save(folder / name, folder / TOKENIZERS[name], variant=variant)
        projected = "WithProjection" if tower.config.projects else ""
        components[name] = ["transformers", f"CLIPTextModel{projected}"]
        components[TOKENIZERS[name]] = ["transformers", "CLIPTokenizer"]
    for name, scheduler in schedulers.items():
        config = scheduler.to_config()
        write_json(folder / name / "scheduler_config.json", config)
        components[name] = ["diffusers", config["_class_name"]]
    write_json(folder / "model_index.json", {**index, **components})


def named_towers(unet: UNet, text_encoder: TextEncoder) -> dict[str, CLIPText]:
    """Text encoders by component name; SDXL's refiner has only the second one."""
    names = (
        list(TOKENIZERS)
        if len(text_encoder.towers) == 2 or not unet.config.addition_embed_type
        else list(TOKENIZERS)[1:]
    )
    return dict(zip(names, text_encoder.towers, strict=False))
