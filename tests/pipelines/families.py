"""Tiny random pipelines of diffusers for every published family: the true structure, in few channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from latentgen.checkpoints.families import FAMILIES, WEIGHT_COMPONENTS
from latentgen.diffusion.scheduler import Scheduler
from tests.checkpoints.single_files import to_original_file
from tests.conftest import build_tokenizer

# The published configurations with these fields changed, and channels divided: depths, block types, projections and
# the numbers of heads stay what they are.
UNET_DIVISORS = {"SD 1.x": 10, "SD 2.x": 8, "SD x4": 8, "SDXL": 8}
TIME_WIDTH = 8
STEPS = 10
KINDS = {
    **{f"{family}, {kind}": (family, kind) for family in ("SD 2.x",) for kind in ("epsilon", "v_prediction")},
    **{
        family: (family, known.prediction_type) for family, known in FAMILIES.items() if known.prediction_type
    },
}


def build(name: str) -> Any:
    """A pipeline of diffusers of one of the KINDS, the same at every call."""
    import diffusers

    family, prediction_type = KINDS[name]
    assert prediction_type is not None
    configs = FAMILIES[family].component_configs(prediction_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        parts = _towers(configs)
        parts["unet"] = diffusers.UNet2DConditionModel.from_config(_unet(family, configs)).eval()
        parts["vae"] = diffusers.AutoencoderKL.from_config(_vae(configs["vae"])).eval()
    for component in ("scheduler", "low_res_scheduler"):
        if component in configs:
            scheduler = getattr(diffusers, str(configs[component]["_class_name"]))
            parts[component] = scheduler.from_config(configs[component])
    pipeline = getattr(diffusers, FAMILIES[family].pipeline_class)
    extra = {key: value for key, value in FAMILIES[family].index.items() if key in _parameters(pipeline)}
    if "SDXL" in family:
        absent = {"text_encoder": None, "tokenizer": None} if "text_encoder" not in parts else {}
        extra |= {"add_watermarker": False, **absent}
    else:
        extra |= {"safety_checker": None, "feature_extractor": None}
        if "requires_safety_checker" in _parameters(pipeline):
            extra["requires_safety_checker"] = False
    pipe = pipeline(**parts, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(pipe: Any, folder: Path) -> tuple[Path, Path]:
    """The folder that diffusers writes, and one file in the original layout with the same weights."""
    pipe.save_pretrained(folder / "folder")
    names = [name for name in WEIGHT_COMPONENTS if pipe.components.get(name) is not None]
    states = {name: as_in_files(name, pipe.components[name].state_dict()) for name in names}
    configs = {name: json.loads((folder / "folder" / name / "config.json").read_text()) for name in names}
    save_file(to_original_file(states, configs), folder / "single.safetensors")
    return folder / "folder", folder / "single.safetensors"


def as_in_files(component: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of the files, which CLIP's text towers do not have in memory in every version of transformers."""
    prefixes = ("text_model.", "text_projection.")
    if not component.startswith("text_encoder"):
        return state
    return {
        name if name.startswith(prefixes) else f"text_model.{name}": tensor for name, tensor in state.items()
    }


def arguments(pipe: Any, side: int = 8) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a call needs besides the prompt, for our pipeline and for that of diffusers."""
    name, factor = type(pipe).__name__, 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    rng = np.random.default_rng(0)
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1))
    picture = Image.fromarray(rng.integers(0, 256, (side * factor, side * factor, 3), dtype=np.uint8))
    mask = Image.new("L", picture.size)
    mask.paste(255, (factor, factor, 5 * factor, 3 * factor))
    if "Inpaint" in name:
        size = {"height": side * factor, "width": side * factor}
        inputs = {"image": picture, "mask_image": mask}
        return inputs, inputs | size | {"strength": 1.0}
    if "Pix2Pix" in name:
        return {"image": picture}, {"image": picture}
    if "Upscale" in name:
        inputs = {"image": picture.resize((2 * side, 2 * side)), "noise_level": 30}
        return inputs, inputs
    if "Img2Img" in name:
        # Halfway through, latents of diffusers' Euler are scaled by 1 / alpha.
        half, ours = (
            {"denoising_start": 0.5},
            Scheduler.from_config({**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__}),
        )
        levels = ours.levels(STEPS)
        start = levels[ours.steps_before(levels, 0.5)]
        return half | {"latents": latents}, half | {"image": latents / start.alpha}
    return {"latents": latents}, {"latents": latents}


def composited(image: np.ndarray, inputs: dict[str, Any]) -> np.ndarray:
    """The result of diffusers [B, H, W, 3], with the pixels of the image where the mask of a call is black."""
    if "mask_image" not in inputs:
        return image
    mask = np.asarray(inputs["mask_image"])[None, :, :, None] > 127
    return np.where(mask, image, np.asarray(inputs["image"], dtype=np.float32) / 255)


def _parameters(function: Any) -> set[str]:
    import inspect

    return set(inspect.signature(function.__init__).parameters)


def _unet(family: str, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    divisor = next(divisor for name, divisor in UNET_DIVISORS.items() if family.startswith(name))
    config = dict(configs["unet"])
    towers = [_tower(configs[name]) for name in ("text_encoder", "text_encoder_2") if name in configs]
    config["block_out_channels"] = [channels // divisor for channels in config["block_out_channels"]]
    config["cross_attention_dim"] = sum(tower["hidden_size"] for tower in towers)
    config["norm_num_groups"] = 4
    config["sample_size"] = 8
    if "SDXL" in family:
        ids = 5 if "refiner" in family else 6
        config["addition_time_embed_dim"] = TIME_WIDTH
        config["projection_class_embeddings_input_dim"] = towers[-1]["projection_dim"] + ids * TIME_WIDTH
    return config


def _vae(config: dict[str, Any]) -> dict[str, Any]:
    channels = [channels // 16 for channels in config["block_out_channels"]]
    return {**config, "block_out_channels": channels, "norm_num_groups": 4, "sample_size": 64}


def _tower(config: dict[str, Any]) -> dict[str, Any]:
    width = 2 * config["num_attention_heads"]
    return {**config, "hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}


def _towers(configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    import transformers

    parts: dict[str, Any] = {}
    for name, tokenizer_name in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if name not in configs:
            continue
        tokenizer = build_tokenizer()
        if configs[name]["hidden_act"] == "gelu":
            tokenizer.add_special_tokens({"pad_token": "!"})
        ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = transformers.CLIPTextConfig(**_tower(configs[name]) | ids | {"vocab_size": len(tokenizer)})
        projects = configs[name]["architectures"] == ["CLIPTextModelWithProjection"]
        model = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
        parts |= {name: model(config).eval(), tokenizer_name: tokenizer}
    return parts
