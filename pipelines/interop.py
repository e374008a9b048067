"""Convert loaded pipelines from and to diffusers, with shared weights.

Needs diffusers (`pip install "latentgen[train]"`), unlike the rest of inference.
"""

# diffusers exports its names lazily, which checkers cannot follow.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from latentgen.checkpoints.folder import TOKENIZERS
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import CheckpointMismatchError, InputError
from latentgen.memory import MemoryPolicy
from latentgen.models.config import CLIPTextConfig, VAEConfig
from latentgen.models.layers import can_pack, pack_convolutions
from latentgen.models.pixels import PixelDecoder
from latentgen.models.text import CLIPText, ContextLayer, TextEncoder, join_towers
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import DECODER_KEYS, ENCODER_KEYS, VAEDecoder, VAEEncoder
from latentgen.pipelines import load_save
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.image_to_image import ImageToImagePipeline
from latentgen.pipelines.inpaint import InpaintPipeline
from latentgen.pipelines.instruct_pix2pix import InstructPix2PixPipeline
from latentgen.pipelines.load_save import named_towers
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.pipelines.upscale import UpscalePipeline

if TYPE_CHECKING:
    from diffusers import (
        DiffusionPipeline,
        LatentConsistencyModelPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
        StableDiffusionInstructPix2PixPipeline,
        StableDiffusionPipeline,
        StableDiffusionUpscalePipeline,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLInpaintPipeline,
        StableDiffusionXLPipeline,
    )

    TextToImage = StableDiffusionPipeline | StableDiffusionXLPipeline | LatentConsistencyModelPipeline
    ImageToImage = StableDiffusionImg2ImgPipeline | StableDiffusionXLImg2ImgPipeline
    Inpaint = StableDiffusionInpaintPipeline | StableDiffusionXLInpaintPipeline

_OURS: tuple[type[Pipeline], ...] = (
    TextToImagePipeline,
    ImageToImagePipeline,
    InpaintPipeline,
    InstructPix2PixPipeline,
    UpscalePipeline,
)
# The class of a diffusers pipeline -> ours for the same task.
_FROM_DIFFUSERS = {
    name: next(ours for ours in _OURS if ours.__name__ == known.readers[0])
    for name, known in load_save.PIPELINE_CLASSES.items()
    if name not in load_save.PIXEL_CLASSES
}


@overload
def from_diffusers(pipe: TextToImage, *, memory: MemoryPolicy | None = None) -> TextToImagePipeline: ...
@overload
def from_diffusers(pipe: ImageToImage, *, memory: MemoryPolicy | None = None) -> ImageToImagePipeline: ...
@overload
def from_diffusers(pipe: Inpaint, *, memory: MemoryPolicy | None = None) -> InpaintPipeline: ...
@overload
def from_diffusers(
    pipe: StableDiffusionInstructPix2PixPipeline, *, memory: MemoryPolicy | None = None
) -> InstructPix2PixPipeline: ...
@overload
def from_diffusers(
    pipe: StableDiffusionUpscalePipeline, *, memory: MemoryPolicy | None = None
) -> UpscalePipeline: ...
def from_diffusers(pipe: DiffusionPipeline, *, memory: MemoryPolicy | None = None) -> Pipeline:
    """A pipeline that shares the weights of a loaded diffusers pipeline, on its device and in its dtype.

    Nothing is copied: later changes of the weights of one change the other. `pipe` itself is not changed.

    Args:
        pipe: a diffusers pipeline; the result is ours for the same task. For another task over the same weights use
            `from_pipeline`: `TextToImagePipeline.from_pipeline(from_diffusers(refiner))`.
        memory: how to save memory; on a CPU, convolutions get packed copies of their weights unless
            `pack_weights=False`.

    Raises:
        InputError: an unsupported class of pipeline, or its weights are not all on one device.
        ConfigError: a configuration has values that are not supported.
        CheckpointMismatchError: a module's weights do not match its configuration, such as with adapters loaded.
    """
    name = type(pipe).__name__
    ours = _FROM_DIFFUSERS.get(name)
    if ours is None:
        raise InputError(f"a {name} cannot be converted; supported are {', '.join(_FROM_DIFFUSERS)}")
    memory = MemoryPolicy() if memory is None else memory
    parts = pipe.components
    device = _one_device(parts)
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_json(_fields(parts["unet"])))
        vae_config = VAEConfig.from_json(_fields(parts["vae"]))
        decoder, encoder = VAEDecoder(vae_config), VAEEncoder(vae_config)
    _share(unet, parts["unet"])
    _share(decoder, parts["vae"], prefixes=DECODER_KEYS)
    _share(encoder, parts["vae"], prefixes=ENCODER_KEYS)
    if memory.pack_weights and device.type == "cpu" and can_pack(unet.conv_in.weight.dtype):
        pack_convolutions(unet)
        pack_convolutions(decoder)
    sdxl = "XL" in name
    extra: dict[str, Any] = {}
    if ours is UpscalePipeline:
        extra = {
            "low_res_scheduler": Scheduler.from_config(_fields(parts["low_res_scheduler"])),
            "max_noise_level": pipe.config["max_noise_level"],
        }
    return ours(
        unet=unet,
        decoder=decoder,
        text_encoder=_text_encoder(parts, layer="penultimate" if sdxl else "last"),
        scheduler=Scheduler.from_config(_fields(parts["scheduler"])),
        memory=memory,
        device=device,
        load_encoder=lambda: encoder,
        force_zeros_for_empty_prompt=sdxl and bool(pipe.config["force_zeros_for_empty_prompt"]),
        default_guidance_scale=load_save.default_guidance_scale_of(name),
        **extra,
    )


def to_diffusers(pipeline: Pipeline) -> DiffusionPipeline:
    """A diffusers pipeline of the same family that shares the weights of a pipeline.

    Only the VAE's encoder, which text to image does not load, may have to be read.

    Raises:
        InputError: the pipeline is in pixel space, has no VAE encoder, or has LoRAs that are not merged; it is an
            upscaler whose latents are smaller than its input, which diffusers lacks; diffusers is not installed.
    """
    decoder = pipeline.decoder
    if isinstance(decoder, PixelDecoder):
        raise InputError(
            "diffusers' Stable Diffusion pipelines need a VAE, and this pipeline is in pixel space; save_pretrained "
            "writes a folder whose UNet, text encoder and scheduler diffusers and transformers can load"
        )
    if isinstance(pipeline, UpscalePipeline) and pipeline.scale != decoder.spatial_factor:
        raise InputError(
            f"diffusers' upscaler needs latents as large as the input; this UNet takes "
            f"{pipeline.unet.config.in_channels} channels (space-to-depth)"
        )
    try:
        import diffusers
    except ImportError as error:
        raise InputError(
            f'to_diffusers needs diffusers ({error}); install it with pip install "latentgen[train]"'
        ) from error
    pipeline.refuse_attached_loras()
    with torch.device("meta"):
        unet: Any = diffusers.UNet2DConditionModel.from_config(pipeline.unet.config.to_json())
        vae: Any = diffusers.AutoencoderKL.from_config(decoder.config.to_json())
    _share(unet, pipeline.unet)
    _share(vae, pipeline.encoder().to(pipeline.device), decoder)
    towers = named_towers(pipeline.unet, pipeline.text_encoder)
    configs = {name: scheduler.to_config() for name, scheduler in pipeline.schedulers.items()}
    parts: dict[str, Any] = {
        "unet": unet,
        "vae": vae,
        **{
            name: getattr(diffusers, str(config["_class_name"])).from_config(config)
            for name, config in configs.items()
        },
        **{name: tower.model for name, tower in towers.items()},
        **{TOKENIZERS[name]: tower.tokenizer for name, tower in towers.items()},
    }
    # Names that our own code gives, not names from a file.
    theirs: Any = getattr(diffusers, pipeline.diffusers_class)
    if isinstance(pipeline, UpscalePipeline):
        upscaler = theirs(**parts, max_noise_level=pipeline.max_noise_level)
        # The constructor replaces every scaling factor other than the published upscaler's.
        vae.register_to_config(scaling_factor=decoder.config.scaling_factor)
        return upscaler
    if not pipeline.is_sdxl:
        return theirs(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    absent: dict[str, Any] = {
        name: None for tower in TOKENIZERS.items() for name in tower if name not in parts
    }
    if pipeline.diffusers_class != "StableDiffusionXLPipeline":
        absent["requires_aesthetics_score"] = pipeline.uses_aesthetic_score
    zeros = pipeline.force_zeros_for_empty_prompt
    return theirs(**parts, **absent, force_zeros_for_empty_prompt=zeros, add_watermarker=False)


def _fields(component: Any) -> dict[str, Any]:
    """A component's configuration with the _class_name that its file has."""
    return {**component.config, "_class_name": type(component).__name__}


def _share(stage: nn.Module, *sources: nn.Module, prefixes: tuple[str, ...] = ("",)) -> None:
    """Assign a module on the meta device the sources' weights whose names begin with a prefix, without copying."""
    state: dict[str, Tensor] = {}
    for source in sources:
        state |= {name: tensor for name, tensor in source.state_dict().items() if name.startswith(prefixes)}
    try:
        stage.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointMismatchError(
            f"the weights of the {type(sources[0]).__name__} do not match its configuration; unload adapters first "
            f"(pipe.unload_lora_weights()): {' '.join(str(error).split())[:200]}"
        ) from None
    stage.eval().requires_grad_(False)


def _text_encoder(parts: Mapping[str, Any], layer: ContextLayer) -> TextEncoder:
    """The text encoders of a diffusers pipeline; both libraries use transformers' modules."""
    towers = []
    for name, tokenizer in TOKENIZERS.items():
        if (model := parts.get(name)) is not None:
            fields = model.config.to_dict() | {"architectures": [type(model).__name__]}
            towers.append(CLIPText(CLIPTextConfig.from_json(fields), model, parts[tokenizer], layer=layer))
    if not towers:
        raise InputError("the diffusers pipeline has no text encoder; load it with one")
    return join_towers(towers)


def _one_device(parts: Mapping[str, Any]) -> torch.device:
    modules = {name: parts[name] for name in load_save.USED if isinstance(parts.get(name), nn.Module)}
    devices = {name: next(module.parameters()).device for name, module in modules.items()}
    if len(set(devices.values())) != 1 or torch.device("meta") in devices.values():
        actual = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise InputError(
            f"the weights of the diffusers pipeline must be on one device, not {actual}; move it with "
            "pipe.to(...), without offloading"
        )
    return next(iter(devices.values()))
