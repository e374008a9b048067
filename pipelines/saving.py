"""Stages into a folder in the diffusers layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from latentgen.checkpoints.folder import LAYOUT_VERSION, TOKENIZERS, save_weights, write_json
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import InputError
from latentgen.models.pixels import ImageDecoder, ImageEncoder, PixelDecoder
from latentgen.models.text import CLIPText, TextEncoder
from latentgen.models.unet import UNet
from latentgen.pipelines.loading import GUIDANCE_KEY, PIXEL_CLASSES, usual_guidance_scale

WEIGHTS_STEM = "diffusion_pytorch_model"
_NONE = [None, None]
# What diffusers' pipelines of SD and of SDXL can have besides the stages, and have not here.
SD_INDEX: Mapping[str, object] = {
    "feature_extractor": _NONE,
    "safety_checker": _NONE,
    "requires_safety_checker": False,
}
SDXL_INDEX: Mapping[str, object] = {"feature_extractor": _NONE, "image_encoder": _NONE}


def redrawing_entries(towers: int, is_told_a_score: bool) -> dict[str, object]:
    """What `model_index.json` says besides of a pipeline of SDXL's that begins with an image.

    Args:
        towers: how many text encoders it has; the refiner has the second one alone.
        is_told_a_score: see Pipeline.
    """
    entries: dict[str, object] = {"requires_aesthetics_score": is_told_a_score}
    return entries | {"text_encoder": _NONE, "tokenizer": _NONE} if towers == 1 else entries


def class_entries(diffusers_class: str, guidance_scale: float | None) -> dict[str, object]:
    """What `model_index.json` says of the pipeline's class, and of a guidance scale that is not the usual one."""
    own = guidance_scale not in (None, usual_guidance_scale(diffusers_class))
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
    """Write a folder that diffusers loads; `model_index.json`, which names the pipeline's class, comes last.

    Of what works on pixels there is no `vae`, and diffusers loads no more than the single components.

    Args:
        folder: where to write; made if need be.
        unet: a stage, as are the next three.
        encoder: of the VAE.
        decoder: of the VAE.
        text_encoder: one tower, or SDXL's two.
        schedulers: component -> scheduler.
        index: what `model_index.json` holds besides the components: `_class_name` and the like. What works on
            pixels needs one of the classes for it.
        variant: part of the names of the weight files.

    Raises:
        InputError: the pipeline works on pixels, and its class needs a VAE; nothing was written.
        OutputError: a file could not be written; it keeps its old content, as do those that follow it.
    """
    if isinstance(decoder, PixelDecoder) and index["_class_name"] not in PIXEL_CLASSES:
        raise InputError(
            f"a {index['_class_name']} that works on pixels cannot be saved: that class needs a VAE; text to "
            "image, paired images and upscaling, without the conditioning of SDXL, have classes for pixels"
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
    """The component that each tower is: SDXL's refiner has the second one alone."""
    names = (
        list(TOKENIZERS)
        if len(text_encoder.towers) == 2 or not unet.config.addition_embed_type
        else list(TOKENIZERS)[1:]
    )
    return dict(zip(names, text_encoder.towers, strict=False))
