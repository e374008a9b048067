"""Files with the real keys and shapes of published checkpoints, for the tests: headers true, no data on the disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentgen.checkpoints.families import FAMILIES
from latentgen.checkpoints.io import TensorInfo, encode_header
from latentgen.checkpoints.key_map import ema_key_map, original_key_maps, to_original
from latentgen.models.config import VAEConfig
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import VAEDecoder, VAEEncoder

Shapes = Mapping[str, tuple[int, ...]]

# Buffers that CompVis' training stores with the weights.
BUFFERS: Shapes = {
    **dict.fromkeys(
        (
            "betas",
            "alphas_cumprod",
            "alphas_cumprod_prev",
            "sqrt_alphas_cumprod",
            "sqrt_one_minus_alphas_cumprod",
            "log_one_minus_alphas_cumprod",
            "sqrt_recip_alphas_cumprod",
            "sqrt_recipm1_alphas_cumprod",
            "posterior_variance",
            "posterior_log_variance_clipped",
            "posterior_mean_coef1",
            "posterior_mean_coef2",
        ),
        (1000,),
    ),
    "model_ema.decay": (),
    "model_ema.num_updates": (),
}
# Tensors of the text encoders that the pipelines do not read.
_TOWERS: Mapping[str, Shapes] = {
    "SD 1.x": {"cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77)},
    "SD 2.x": {
        "cond_stage_model.model.logit_scale": (),
        "cond_stage_model.model.text_projection": (1024, 1024),
        "cond_stage_model.model.transformer.resblocks.23.ln_1.weight": (1024,),
        "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight": (3072, 1024),
    },
    "SDXL base": {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": (1, 77),
        "conditioner.embedders.1.model.logit_scale": (),
        "denoiser.sigmas": (1000,),
    },
    "SDXL refiner": {"conditioner.embedders.0.model.logit_scale": (), "denoiser.sigmas": (1000,)},
    "SD x4 upscaler": {"cond_stage_model.model.logit_scale": (), "low_scale_model.betas": (1000,)},
}


def write_header(path: Path, shapes: Shapes, metadata: Mapping[str, str] | None = None) -> Path:
    """A valid file with these tensors; their bytes are a hole in a sparse file."""
    tensors = {name: TensorInfo("F16", tuple(shape), math.prod(shape) * 2) for name, shape in shapes.items()}
    head = encode_header(tensors, metadata or {})
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(info.nbytes for info in tensors.values()))
    return path


def family_configs(family: str) -> dict[str, dict[str, Any]]:
    return FAMILIES[family].component_configs(FAMILIES[family].prediction_type or "v_prediction")


@cache
def diffusers_shapes(family: str, component: str) -> Shapes:
    """The tensors of one component of a published family, by the names of the diffusers layout."""
    config = family_configs(family)[component]
    with torch.device("meta"):
        match component:
            case "unet":
                return _shapes(UNet(UNetConfig.from_json(config)))
            case "vae":
                fields = VAEConfig.from_json(config)
                return {**_shapes(VAEEncoder(fields)), **_shapes(VAEDecoder(fields))}
            case _:
                return _tower_shapes(config)


@cache
def original_shapes(family: str, *components: str, ema: bool = False) -> Shapes:
    """The tensors of a published family in the original layout; all components unless some are named."""
    maps = original_key_maps(family_configs(family))
    components = components or tuple(maps)
    result: dict[str, tuple[int, ...]] = {}
    for component in components:
        state = {
            name: torch.empty(shape, device="meta")
            for name, shape in diffusers_shapes(family, component).items()
        }
        key_map = ema_key_map(maps[component]) if ema else maps[component]
        result |= {key: tuple(tensor.shape) for key, tensor in to_original(state, key_map).items()}
    return result


def leftovers(family: str) -> Shapes:
    """The keys of a published family's files that no component reads."""
    bases = {"SD 1.x inpainting": "SD 1.x", "SD 1.x instruct-pix2pix": "SD 1.x"}
    bases |= {"SD 2.x inpainting": "SD 2.x", "SDXL base inpainting": "SDXL base"}
    return {**_TOWERS[bases.get(family, family)], **BUFFERS}


def to_original_file(
    states: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Components with their weights under diffusers' names as the content of a single file."""
    maps = original_key_maps(configs)
    return {
        key: tensor.contiguous()
        for component, state in states.items()
        for key, tensor in to_original(state, maps[component]).items()
    }


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _tower_shapes(config: Mapping[str, Any]) -> Shapes:
    """Of transformers' text towers, by the names that files have."""
    import transformers

    projected = config["architectures"] == ["CLIPTextModelWithProjection"]
    build = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    shapes = _shapes(build(transformers.CLIPTextConfig(**config)))
    prefixes = ("text_model.", "text_projection.")
    return {
        name if name.startswith(prefixes) else f"text_model.{name}": shape for name, shape in shapes.items()
    }
