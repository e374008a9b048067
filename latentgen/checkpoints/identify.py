"""Identifies weights by the names and shapes in the header of their file."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

from latentgen.checkpoints.io import TensorInfo

Kind = Literal["checkpoint", "unet", "vae", "text encoder", "adapter", "embedding", "other model", "unknown"]
Layout = Literal["original", "diffusers"]
# What the metadata of a single file can declare; no published file predicts the sample.
DeclaredPrediction = Literal["epsilon", "v_prediction"]

# Width of the text context -> family. Sources: the published unet/config.json of each model.
_FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL base", 1280: "SDXL refiner"}
# Input channels of the UNet that say what is concatenated to the four latents.
_TASKS = {5: "depth-to-image", 7: "x4 upscaler", 8: "instruct-pix2pix", 9: "inpainting"}
# The prefix of every key in checkpoints converted from pickles, once or twice.
_STATE_DICT = "state_dict."
# The first convolution of a UNet, and what the file is.
_UNETS: tuple[tuple[str, Kind, Layout, str], ...] = (
    (
        "model.diffusion_model.input_blocks.0.0.weight",
        "checkpoint",
        "original",
        "a single file in the original layout",
    ),
    ("input_blocks.0.0.weight", "unet", "original", "a UNet in the original layout"),
    ("conv_in.weight", "unet", "diffusers", "a UNet"),
)
_VAE_SIGNS: dict[Layout, str] = {
    "original": "decoder.norm_out.weight",
    "diffusers": "decoder.conv_norm_out.weight",
}
_VAE_PREFIXES = ("", "first_stage_model.", "vae.")
# open_clip's CLIP has the text tower at the top level, its CustomTextCLIP in the submodule `text`.
_OPEN_CLIP_PREFIXES = ("", "text.")
# Source: https://github.com/Stability-AI/ModelSpec; kohya's scripts write them.
_PREDICTIONS: Mapping[str, DeclaredPrediction] = {
    "epsilon": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "stable-diffusion-v2-512": "epsilon",
    "stable-diffusion-v2-768-v": "v_prediction",
}
# Family -> prefixes of ss_base_model_version and modelspec.architecture.
_TARGETS = {
    "SD 1.x": ("sd_v1", "stable-diffusion-v1"),
    "SD 2.x": ("sd_v2", "stable-diffusion-v2"),
    "SDXL base": ("sdxl_", "stable-diffusion-xl-v1"),
    "Stable Diffusion 3.x": ("sd3", "stable-diffusion-3"),
    "Flux": ("flux",),
}
# Empty tensors in later files of SDXL that declare how they were trained.
_V_PREDICTION = {"v_pred", "model.v_pred"}
_ZERO_SNR = {"ztsnr", "model.ztsnr"}

# Adapters that are not read -> suffixes of their names.
UNSUPPORTED_ADAPTERS: Mapping[str, tuple[str, ...]] = {
    "LoHa": tuple(f".hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    "LoKr": tuple(f".lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")),
    "OFT": (".oft_blocks", ".oft_diag", ".oft_r", ".oft_R.weight"),
    "DoRA": (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
    "LoCon (CP decomposition)": (".lora_mid.weight",),
    "full difference": (".diff", ".diff_b", ".w_norm", ".b_norm"),
    "IA3": (".on_input", ".ia3_l"),
    "GLoRA": (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"),
    "LoRA of an embedding": (".lora_embedding_A", ".lora_embedding_B"),
    "LoRA with a bias": (".lora_up.bias", ".lora_B.bias"),
}
# Suffixes of names -> adapter.
_ADAPTERS = {
    **{ends: f"an unsupported adapter ({kind})" for kind, ends in UNSUPPORTED_ADAPTERS.items()},
    (".lora_down.weight",): "a LoRA adapter in kohya's format",
    (".lora_A.weight", ".lora_A.default.weight"): "a LoRA adapter in the {} format",
    (".lora.down.weight", "_lora.down.weight", ".lora_linear_layer.down.weight"): (
        "a LoRA adapter in the old diffusers format"
    ),
}
_PEFT = "base_model.model."
# Suffixes of the down projection, which reads a layer's input.
_DOWN = ("down.weight", "lora_A.weight", "lora_A.default.weight")
# Substrings of names -> model, specific before general.
_OTHERS = {
    "control_model.": "a ControlNet in the original layout",
    "input_hint_block.": "a ControlNet in the original layout",
    "controlnet_cond_embedding.": "a ControlNet in the diffusers layout",
    "control_all_x_embedder.": "a ControlNet",
    "adapter.body.": "a T2I-Adapter",
    "ip_adapter.": "an IP-Adapter",
    "motion_modules.": "an AnimateDiff motion module",
    ".time_stack.": "Stable Video Diffusion",
    "txt_in.individual_token_refiner.": "HunyuanVideo",
    "distilled_guidance_layer.": "Chroma",
    "double_blocks.": "Flux",
    "single_transformer_blocks.": "Flux in the diffusers layout",
    "joint_blocks.": "Stable Diffusion 3.x",
    ".attn.add_k_proj.": "Stable Diffusion 3.x in the diffusers layout",
    "double_layers.": "AuraFlow",
    "clip_txt_mapper.": "Stable Cascade",
    "effnet_mapper.": "Stable Cascade, stage B",
    "patchify_proj.": "LTX-Video",
    "head.modulation": "Wan",
    "cap_embedder.": "Lumina",
    "adaln_single.": "PixArt or Sana",
    "noise_augmentor.": "SD 2.1 unCLIP",
    "depth_model.": "SD 2 depth-to-image",
    "edm_mean": "Playground v2.5",
    "position_net.": "GLIGEN",
    "encoder_hid_proj.": "a UNet with image or prior conditioning (Kandinsky, IP-Adapter)",
    "encoder.block.0.layer.0.SelfAttention.": "a T5 text encoder",
    "vision_model.": "a CLIP image encoder",
    "visual.transformer.": "a CLIP image encoder",
    "body.0.rdb1.": "an ESRGAN upscaler",
    "RDB1.conv1.": "an ESRGAN upscaler",
}


class Identity(NamedTuple):
    """What the weights in a file are.

    Attributes:
        kind: what they can be used as.
        name: a description, such as "a VAE with 4 latent channels".
        family: of a checkpoint or UNet, "custom" for a context of another width; of an adapter, that of its base model.
        layout: "original" or "diffusers", where the kind has both.
        key_prefix: a prefix of every key that carries no meaning ("state_dict.").
        component_prefix: the prefix of the keys of a VAE, or of open_clip's text tower.
    """

    kind: Kind
    name: str
    family: str | None = None
    layout: Layout | None = None
    key_prefix: str = ""
    component_prefix: str = ""


def identify(tensors: Mapping[str, TensorInfo]) -> Identity:
    """Identify the tensors of a file; ``kind`` is "unknown" if no known model matches."""
    key_prefix = _key_prefix(tensors)
    tensors = {name.removeprefix(key_prefix): info for name, info in tensors.items()}
    for match in (_adapter, _embedding, _open_clip, _other, _unet, _vae, _text_encoder):
        if identity := match(tensors):
            return identity._replace(key_prefix=key_prefix)
    return Identity("unknown", "an unknown architecture", key_prefix=key_prefix)


def likely_architecture(tensors: Mapping[str, TensorInfo]) -> str | None:
    """A description of what ``tensors`` probably are; None if no known model matches."""
    identity = identify(tensors)
    return None if identity.kind == "unknown" else identity.name


def declared_prediction(names: Collection[str], metadata: Mapping[str, str]) -> DeclaredPrediction | None:
    """What the network of a single file predicts, if the file declares it; the weights do not tell."""
    if _V_PREDICTION & set(names):
        return "v_prediction"
    declared = _PREDICTIONS.get(metadata.get("modelspec.prediction_type", ""))
    return declared or _PREDICTIONS.get(metadata.get("modelspec.architecture", "").partition("/")[0])


def declared_target(metadata: Mapping[str, str]) -> str | None:
    """The family that an adapter declares as its base model."""
    declared = (metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", ""))
    return next(
        (family for family, starts in _TARGETS.items() if any(d.startswith(starts) for d in declared)), None
    )


def has_zero_terminal_snr(names: Collection[str]) -> bool:
    """Whether a single file declares that its schedule ends in pure noise."""
    return bool(_ZERO_SNR & set(names))


def _key_prefix(names: Collection[str]) -> str:
    prefixes = (_STATE_DICT * 2, _STATE_DICT)
    return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)), "")


def _adapter(tensors: Mapping[str, TensorInfo]) -> Identity | None:
    name = next(
        (name for ends, name in _ADAPTERS.items() if any(key.endswith(ends) for key in tensors)), None
    )
    if name is None:
        return None
    name = name.format("peft" if any(key.startswith(_PEFT) for key in tensors) else "diffusers")
    target = _adapter_target(tensors)
    return Identity("adapter", f"{name}, for {target}" if target else name, target)


def _adapter_target(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The family of an adapter's base model."""
    if any("single_transformer_blocks" in key or "double_blocks" in key for key in tensors):
        return "Flux"
    if any("joint_blocks" in key or "add_k_proj" in key for key in tensors):
        return "Stable Diffusion 3.x"
    for key, info in tensors.items():
        if "attn2" in key and "to_k" in key and key.endswith(_DOWN) and info.shape:
            return _FAMILIES.get(info.shape[-1])
    if any(key.startswith(("lora_te2_", "text_encoder_2.")) for key in tensors):
        return "SDXL base"
    return None


def _embedding(tensors: Mapping[str, TensorInfo]) -> Identity | None:
    """Textual inversion (arXiv:2208.01618): a vector for each token, for one tower or for both of SDXL."""
    is_pair = tensors.keys() == {"clip_l", "clip_g"}
    names = ["clip_g"] if is_pair else [name for name in tensors if name.startswith("string_to_param.")]
    names = names or (list(tensors) if len(tensors) == 1 else [])
    *vectors, width = (_shape(tensors, names[0]) if len(names) == 1 else ()) or (0,)
    if len(vectors) > 1 or width not in _FAMILIES:
        return None
    family = "SDXL base" if width == 1280 else _FAMILIES[width]
    count = math.prod(vectors)
    name = f"a textual-inversion embedding for {family}, {count} vector{'' if count == 1 else 's'} per token"
    return Identity("embedding", name, family)


def _open_clip(tensors: Mapping[str, TensorInfo]) -> Identity | None:
    """A model saved by open_clip: both towers, or only the text tower."""
    for prefix in _OPEN_CLIP_PREFIXES:
        embedding = _shape(tensors, f"{prefix}token_embedding.weight")
        if len(embedding) == 2 and f"{prefix}positional_embedding" in tensors:
            images = " with its image encoder" if any(key.startswith("visual.") for key in tensors) else ""
            name = f"an OpenCLIP text encoder of width {embedding[1]}{images}"
            return Identity("text encoder", name, layout="original", component_prefix=prefix)
    return None


def _other(tensors: Mapping[str, TensorInfo]) -> Identity | None:
    for sign, name in _OTHERS.items():
        if any(sign in key for key in tensors):
            return Identity("other model", name)
    return None


def _unet(tensors: Mapping[str, TensorInfo]) -> Identity | None:
    """A UNet, alone or in a whole checkpoint, by its input channels and the width of its context."""
    is_diffusers = any(name.startswith("down_blocks.") for name in tensors)
    for conv_in, kind, layout, name in _UNETS:
        shape = _shape(tensors, conv_in)
        if len(shape) != 4 or (layout == "diffusers" and not is_diffusers):
            continue
        contexts = (info.shape for name, info in tensors.items() if name.endswith(".attn2.to_k.weight"))
        context = next((shape[-1] for shape in contexts if shape), None)
        family = _unet_family(context, shape[1])
        width = "no context" if context is None else f"context {context}"
        return Identity(kind, f"{name}, {family} ({shape[1]} input channels, {width})", family, layout)
    return None


def _unet_family(context: int | None, in_channels: int) -> str:
    if in_channels == 7:
        return "SD x4 upscaler"
    family = "unconditional" if context is None else _FAMILIES.get(context, "custom")
    return f"{family} {_TASKS[in_channels]}" if in_channels in _TASKS else family


def _vae(tensors: Mapping[str, TensorInfo]) -> Identity | None:
    for prefix in _VAE_PREFIXES:
        decoder = _shape(tensors, f"{prefix}decoder.conv_in.weight")
        if len(decoder) == 4:
            layouts: list[Layout] = [name for name, sign in _VAE_SIGNS.items() if prefix + sign in tensors]
            name = f"a VAE with {decoder[1]} latent channels"
            return Identity("vae", name, layout=next(iter(layouts), None), component_prefix=prefix)
    return None


def _text_encoder(tensors: Mapping[str, TensorInfo]) -> Identity | None:
    for prefix in ("text_model.", ""):
        if len(embedding := _shape(tensors, f"{prefix}embeddings.token_embedding.weight")) == 2:
            return Identity("text encoder", f"a CLIP text encoder of width {embedding[1]}")
    return None


def _shape(tensors: Mapping[str, TensorInfo], name: str) -> tuple[int, ...]:
    return tensors[name].shape if name in tensors else ()
