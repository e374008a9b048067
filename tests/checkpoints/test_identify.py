"""What a file is said to be: one file with real key names for each kind that people have."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentgen.checkpoints.families import FAMILIES
from latentgen.checkpoints.identify import (
    Identity,
    declared_prediction,
    declared_target,
    has_zero_terminal_snr,
    identify,
    likely_architecture,
)
from latentgen.checkpoints.io import TensorInfo, read_header
from tests.checkpoints.single_files import Shapes, diffusers_shapes, leftovers, original_shapes, write_header


def read(tmp_path: Path, shapes: Shapes) -> Identity:
    return identify(read_header(write_header(tmp_path / "some.safetensors", shapes)))


def vae(family: str, prefix: str) -> Shapes:
    shapes = original_shapes(family, "vae")
    return {prefix + key.removeprefix("first_stage_model."): shape for key, shape in shapes.items()}


def bare_unet(family: str) -> Shapes:
    shapes = original_shapes(family, "unet")
    return {key.removeprefix("model.diffusion_model."): shape for key, shape in shapes.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key_prefix", ["", "state_dict."])
def test_checkpoints(tmp_path: Path, family: str, key_prefix: str) -> None:
    shapes = {**leftovers(family), **original_shapes(family), **original_shapes(family, "unet", ema=True)}
    found = read(tmp_path, {key_prefix + key: shape for key, shape in shapes.items()})
    assert (found.kind, found.family, found.layout) == ("checkpoint", family, "original")
    assert found.key_prefix == key_prefix
    assert found.name.startswith(f"a single file in the original layout, {family} (")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_unets_by_themselves(tmp_path: Path, family: str, layout: str) -> None:
    shapes = diffusers_shapes(family, "unet") if layout == "diffusers" else bare_unet(family)
    found = read(tmp_path, shapes)
    assert (found.kind, found.family, found.layout) == ("unet", family, layout)


@pytest.mark.parametrize("family", ["SD 1.x", "SD x4 upscaler"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_vaes_in_the_original_layout(tmp_path: Path, family: str, prefix: str) -> None:
    found = read(tmp_path, {**vae(family, prefix), f"{prefix}loss.logvar": ()})
    assert found == Identity(
        "vae", "a VAE with 4 latent channels", layout="original", component_prefix=prefix
    )


@pytest.mark.parametrize("family", ["SD 1.x", "SD x4 upscaler"])
def test_vaes_in_the_diffusers_layout(tmp_path: Path, family: str) -> None:
    found = read(tmp_path, diffusers_shapes(family, "vae"))
    assert found == Identity("vae", "a VAE with 4 latent channels", layout="diffusers")


@pytest.mark.parametrize(
    ("family", "component", "width"),
    [
        ("SD 1.x", "text_encoder", 768),
        ("SD 2.x", "text_encoder", 1024),
        ("SDXL base", "text_encoder_2", 1280),
    ],
)
@pytest.mark.parametrize("layout", ["prefixed", "flat", "original"])
def test_text_encoders(tmp_path: Path, family: str, component: str, width: int, layout: str) -> None:
    shapes = diffusers_shapes(family, component)
    match layout:
        case "flat":
            shapes = {key.removeprefix("text_model."): shape for key, shape in shapes.items()}
        case "original" if width > 768:
            keys = original_shapes(family, component)
            shapes = {key.partition(".model.")[2]: shape for key, shape in keys.items()}
    found = read(tmp_path, shapes)
    assert found.kind == "text encoder"
    assert found.name.endswith(f"of width {width}")


@pytest.mark.parametrize("key_prefix", ["", "state_dict."])
@pytest.mark.parametrize("prefix", ["", "text."])
@pytest.mark.parametrize(
    "image_tower", [(), ("visual.transformer.resblocks.0.ln_1.weight",), ("visual.layer1.0.bn1.bias",)]
)
def test_models_of_open_clip(
    tmp_path: Path, key_prefix: str, prefix: str, image_tower: tuple[str, ...]
) -> None:
    keys = original_shapes("SD 2.x", "text_encoder")
    shapes = {key_prefix + prefix + key.partition(".model.")[2]: shape for key, shape in keys.items()}
    shapes |= {key_prefix + key: (1280,) for key in (*image_tower, "logit_scale")}
    name = "an OpenCLIP text encoder of width 1024" + (" with its image encoder" if image_tower else "")
    expected = Identity(
        "text encoder", name, layout="original", key_prefix=key_prefix, component_prefix=prefix
    )
    assert read(tmp_path, shapes) == expected


# Key -> shape of a few tensors of each file; the others of its kind look alike.
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
KOHYA_SDXL = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
KOHYA_TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
ATTN2 = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
_LORA = "a LoRA adapter in"
# Keys -> the width of the input of each, and the name.
LORAS: list[tuple[tuple[str, ...], int, str]] = [
    ((f"{KOHYA}.lora_down.weight", f"{KOHYA}.alpha"), 768, f"{_LORA} kohya's format, for SD 1.x"),
    ((f"{KOHYA}.lora_down.weight",), 1024, f"{_LORA} kohya's format, for SD 2.x"),
    ((f"{KOHYA_SDXL}.lora_down.weight",), 2048, f"{_LORA} kohya's format, for SDXL base"),
    (("lora_te2_a_mlp_fc1.lora_down.weight",), 1280, f"{_LORA} kohya's format, for SDXL base"),
    ((f"{KOHYA_TEXT}.lora_down.weight",), 768, f"{_LORA} kohya's format"),
    (("lora_unet_double_blocks_0.lora_down.weight",), 3072, f"{_LORA} kohya's format, for Flux"),
    (("lora_unet_joint_blocks_0.lora_down.weight",), 99, f"{_LORA} kohya's format, for Stable Diffusion 3.x"),
    ((f"unet.{ATTN2}.to_k.lora_A.weight",), 768, f"{_LORA} the diffusers format, for SD 1.x"),
    (("text_encoder_2.a.fc1.lora_A.weight",), 1280, f"{_LORA} the diffusers format, for SDXL base"),
    ((f"unet.{ATTN2}.to_k.lora.down.weight",), 768, f"{_LORA} the old diffusers format, for SD 1.x"),
    ((f"{ATTN2}.processor.to_k_lora.down.weight",), 768, f"{_LORA} the old diffusers format, for SD 1.x"),
    (("a.single_transformer_blocks.0.to_k.lora_A.weight",), 99, f"{_LORA} the diffusers format, for Flux"),
    ((f"base_model.model.{ATTN2}.to_k.lora_A.weight",), 768, f"{_LORA} the peft format, for SD 1.x"),
    ((f"base_model.model.{ATTN2}.to_k.lora_A.default.weight",), 1024, f"{_LORA} the peft format, for SD 2.x"),
    ((f"{KOHYA}.lora_down.weight", f"{KOHYA}.dora_scale"), 768, "an unsupported adapter (DoRA), for SD 1.x"),
    ((f"{KOHYA}.hada_w1_a", f"{KOHYA}.hada_w1_b"), 768, "an unsupported adapter (LoHa)"),
    ((f"{KOHYA}.lokr_w1",), 768, "an unsupported adapter (LoKr)"),
    ((f"{KOHYA}.oft_blocks",), 768, "an unsupported adapter (OFT)"),
]


@pytest.mark.parametrize(("keys", "width", "name"), LORAS)
def test_adapters(tmp_path: Path, keys: tuple[str, ...], width: int, name: str) -> None:
    target = name.partition(", for ")[2] or None
    assert read(tmp_path, dict.fromkeys(keys, (8, width))) == Identity("adapter", name, target)


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        ({"emb_params": (2, 768)}, "SD 1.x, 2 vectors per token"),
        ({"emb_params": (1, 1024)}, "SD 2.x, 1 vector per token"),
        ({"<cat-toy>": (768,)}, "SD 1.x, 1 vector per token"),
        ({"<style>": (8, 1280)}, "SDXL base, 8 vectors per token"),
        ({"string_to_param.*": (4, 768)}, "SD 1.x, 4 vectors per token"),
        ({"clip_l": (8, 768), "clip_g": (8, 1280)}, "SDXL base, 8 vectors per token"),
        ({"clip_l": (768,), "clip_g": (1280,)}, "SDXL base, 1 vector per token"),
    ],
)
def test_embeddings(tmp_path: Path, shapes: Shapes, name: str) -> None:
    family = name.partition(",")[0]
    assert read(tmp_path, shapes) == Identity(
        "embedding", f"a textual-inversion embedding for {name}", family
    )


# A key of the file, and what the file is.
OTHERS = {
    "control_model.input_blocks.0.0.weight": "a ControlNet in the original layout",
    "input_hint_block.0.weight": "a ControlNet in the original layout",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet in the diffusers layout",
    "adapter.body.0.resnets.0.block1.weight": "a T2I-Adapter",
    "ip_adapter.1.to_k_ip.weight": "an IP-Adapter",
    "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": "Flux",
    "double_blocks.0.img_attn.norm.key_norm.scale": "Flux",
    "single_transformer_blocks.0.attn.to_q.weight": "Flux in the diffusers layout",
    "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": "Stable Diffusion 3.x",
    "transformer_blocks.0.attn.add_k_proj.weight": "Stable Diffusion 3.x in the diffusers layout",
    "model.diffusion_model.distilled_guidance_layer.in_proj.bias": "Chroma",
    "double_layers.0.attn.w1q.weight": "AuraFlow",
    "clip_txt_mapper.weight": "Stable Cascade",
    "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias": "HunyuanVideo",
    "model.diffusion_model.patchify_proj.weight": "LTX-Video",
    "head.modulation": "Wan",
    "cap_embedder.0.weight": "Lumina",
    "adaln_single.linear.weight": "PixArt or Sana",
    "down_blocks.0.motion_modules.0.temporal_transformer.norm.bias": "an AnimateDiff motion module",
    "model.diffusion_model.input_blocks.1.1.time_stack.0.attn1.to_q.weight": "Stable Video Diffusion",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "a T5 text encoder",
    "vision_model.embeddings.class_embedding": "a CLIP image encoder",
    "model.1.sub.0.RDB1.conv1.0.weight": "an ESRGAN upscaler",
    "body.0.rdb1.conv1.weight": "an ESRGAN upscaler",
}


@pytest.mark.parametrize("key", OTHERS)
def test_other_models(tmp_path: Path, key: str) -> None:
    found = read(tmp_path, {key: (8,), "another.weight": (8, 8)})
    assert found.name == OTHERS[key]
    assert found.kind == "other model"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("control_model.input_blocks.0.0.weight", "a ControlNet in the original layout"),
        ("noise_augmentor.betas", "SD 2.1 unCLIP"),
        ("depth_model.model.pretrained.model.norm.weight", "SD 2 depth-to-image"),
        ("edm_mean", "Playground v2.5"),
        ("model.diffusion_model.input_blocks.1.1.time_stack.0.norm1.weight", "Stable Video Diffusion"),
    ],
)
def test_similar_models_are_distinguished(tmp_path: Path, key: str, name: str) -> None:
    family = "SDXL base" if key == "edm_mean" else "SD 2.x"
    found = read(tmp_path, {**original_shapes(family), key: (4,)})
    assert (found.name, found.family) == (name, None)


@pytest.mark.parametrize(
    "shapes",
    [
        {"conv_in.weight": (3,), "decoder.conv_in.weight": (2, 2)},
        {"emb_params": (2, 999)},
        {"a": (768,), "b": (768,)},
        {"state_dict.state_dict.state_dict.model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
    ],
)
def test_unknown_weights(tmp_path: Path, shapes: Shapes) -> None:
    assert read(tmp_path, shapes).kind == "unknown"


@pytest.mark.parametrize(
    ("names", "metadata", "expected"),
    [
        ((), {}, None),
        ((), {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ((), {"modelspec.prediction_type": "v"}, "v_prediction"),
        ((), {"modelspec.prediction_type": "unheard of"}, None),
        ((), {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
        ((), {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "v_prediction"),
        ((), {"modelspec.architecture": "stable-diffusion-xl-v1-base"}, None),
        (("v_pred",), {}, "v_prediction"),
        (("v_pred",), {"modelspec.prediction_type": "epsilon"}, "v_prediction"),
        (("not_v_pred",), {}, None),
    ],
)
def test_declared_predictions(names: tuple[str, ...], metadata: dict[str, str], expected: str | None) -> None:
    assert declared_prediction(names, metadata) == expected


def test_zero_terminal_snr() -> None:
    assert has_zero_terminal_snr(["a", "ztsnr"])
    assert not has_zero_terminal_snr(["a", "v_pred"])


def info(*shape: int) -> TensorInfo:
    return TensorInfo("F16", shape, 2)


@pytest.mark.parametrize(
    ("in_channels", "context", "family"),
    [(9, 768, "SD 1.x inpainting"), (4, 256, "custom"), (3, None, "unconditional")],
)
def test_families(in_channels: int, context: int | None, family: str) -> None:
    tensors = {
        "conv_in.weight": info(320, in_channels, 3, 3),
        "down_blocks.0.resnets.0.norm1.weight": info(320),
    }
    if context is not None:
        tensors["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"] = info(1280, context)
    assert identify(tensors).family == family
    assert f"a UNet, {family} ({in_channels} input channels" in str(likely_architecture(tensors))


def test_a_vae_of_another_width(tmp_path: Path) -> None:
    found = read(tmp_path, {"decoder.conv_in.weight": (512, 16, 3, 3)})
    assert found == Identity("vae", "a VAE with 16 latent channels")


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"ss_base_model_version": "sd_v1"}, "SD 1.x"),
        ({"ss_base_model_version": "sd_v2_768_v"}, "SD 2.x"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL base"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "SDXL base"),
        ({"modelspec.architecture": "stable-diffusion-v1/textual-inversion"}, "SD 1.x"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "SD 2.x"),
        ({"ss_base_model_version": "flux1"}, "Flux"),
        ({"ss_base_model_version": "something"}, None),
        ({}, None),
    ],
)
def test_declared_base_model_of_adapters(metadata: dict[str, str], family: str | None) -> None:
    assert declared_target(metadata) == family
