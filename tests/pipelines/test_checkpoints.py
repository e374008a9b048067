"""Pipelines with adapters, another VAE, and guidance scales of their own, against diffusers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from latentgen import TextToImagePipeline, to_diffusers
from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.errors import AdapterError, ConfigError, InputError
from tests.conftest import build_pipeline
from tests.pipelines.drawing import difference, draw, draw_theirs

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.2")


def test_another_vae(tiny_checkpoint: Path, tmp_path: Path) -> None:
    state = load_file(tiny_checkpoint / "vae" / "diffusion_pytorch_model.safetensors")
    state["decoder.conv_out.bias"] = torch.tensor([0.5, -0.5, 0.0])
    save_file(state, tmp_path / "vae.safetensors")
    theirs = build_pipeline()
    theirs.vae.load_state_dict(state)
    ours = TextToImagePipeline.from_pretrained(
        tiny_checkpoint, vae=tmp_path / "vae.safetensors", dtype="float32", device="cpu"
    )
    assert difference(draw(ours), draw_theirs(theirs)) <= 1e-4


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random LoRAs of the UNet and the text encoder, made by peft and saved by diffusers."""
    folder, files = tmp_path_factory.mktemp("loras"), {}
    for seed, name in enumerate(("style", "face")):
        pipe = build_pipeline()
        torch.manual_seed(seed)
        config = LoraConfig(r=3, lora_alpha=5, init_lora_weights="gaussian", target_modules=list(LAYERS))
        pipe.unet.add_adapter(config)
        text_config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj", "fc1"])
        pipe.text_encoder.add_adapter(text_config)
        for module in (pipe.unet, pipe.text_encoder):
            for key, parameter in module.named_parameters():
                if ".lora_" in key:
                    torch.nn.init.normal_(parameter, std=0.15)
        states = {module: get_peft_model_state_dict(module) for module in (pipe.unet, pipe.text_encoder)}
        type(pipe).save_lora_weights(
            folder / name,
            unet_lora_layers=states[pipe.unet],
            text_encoder_lora_layers=states[pipe.text_encoder],
            unet_lora_adapter_metadata=config.to_dict(),
            text_encoder_lora_adapter_metadata=text_config.to_dict(),
        )
        files[name] = folder / name / "pytorch_lora_weights.safetensors"
    return files


@pytest.fixture
def ours(tiny_checkpoint: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(tiny_checkpoint, dtype="float32", device="cpu")


def test_loras_give_the_image_of_diffusers(ours: TextToImagePipeline, loras: dict[str, Path]) -> None:
    theirs = build_pipeline()
    plain = draw(ours)
    for name, path in loras.items():
        theirs.load_lora_weights(path, adapter_name=name)
    theirs.set_adapters(["style", "face"], [0.8, -0.3])
    both = ours.with_lora(loras["style"], 0.8, name="style").with_lora(loras["face"], 1.0, name="face")
    both = both.with_lora_weight("face", -0.3)
    assert both.loras == {"style": 0.8, "face": -0.3}
    assert difference(draw(both), draw_theirs(theirs)) <= 1e-4
    assert difference(draw(both), plain) > 1e-3
    assert difference(draw(ours), plain) == 0
    assert difference(draw(both.without_lora("style").without_lora("face")), plain) == 0
    merged = ours.with_lora(loras["style"], 0.8, merged=True).with_lora(loras["face"], -0.3, merged=True)
    assert merged.loras == {}
    assert difference(draw(merged), draw(both)) <= 1e-4
    assert difference(draw(ours), plain) == 0


def test_attached_loras_are_not_lost(
    ours: TextToImagePipeline, loras: dict[str, Path], tmp_path: Path
) -> None:
    adapted = ours.with_lora(loras["style"], name="style")
    with pytest.raises(InputError, match="style"):
        adapted.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="style"):
        to_diffusers(adapted)
    with pytest.raises(AdapterError, match="'style'"):
        adapted.with_lora(loras["face"], name="style")
    with pytest.raises(AdapterError, match="'face'"):
        adapted.without_lora("face")
    merged = ours.with_lora(loras["style"], merged=True)
    merged.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert difference(draw(again), draw(merged)) == 0


def test_a_lora_of_another_family_changes_nothing(ours: TextToImagePipeline, tmp_path: Path) -> None:
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file(
        {f"{key}.lora_down.weight": torch.ones(2, 768), f"{key}.lora_up.weight": torch.ones(320, 2)},
        tmp_path / "other.safetensors",
    )
    with pytest.raises(AdapterError, match="another family"):
        ours.with_lora(tmp_path / "other.safetensors")


def test_an_embedding_gives_the_image_of_diffusers(ours: TextToImagePipeline, tmp_path: Path) -> None:
    torch.manual_seed(3)
    save_file({"<toy>": torch.randn(3, 32)}, tmp_path / "toy.safetensors")
    theirs = build_pipeline()
    theirs.load_textual_inversion(tmp_path / "toy.safetensors")
    prompt = "a cat and a <toy>"
    extended = ours.with_embedding(tmp_path / "toy.safetensors")
    assert difference(draw(extended, prompt), draw_theirs(theirs, prompt)) <= 1e-4
    assert difference(draw(extended, prompt), draw(ours, prompt)) > 1e-3


def test_a_checkpoint_may_have_a_guidance_scale_of_its_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    usual = TextToImagePipeline.from_pretrained(tiny_checkpoint, dtype="float32", device="cpu")
    assert usual.default_guidance_scale == 7.5
    assert difference(draw(usual), draw(usual, guidance_scale=7.5)) == 0
    replace(usual, default_guidance_scale=2.0).save_pretrained(tmp_path)
    own = TextToImagePipeline.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert own.default_guidance_scale == 2.0
    assert difference(draw(own), draw(usual, guidance_scale=2.0)) == 0
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert difference(draw(own), draw_theirs(theirs, guidance_scale=2.0)) <= 1e-4


@pytest.mark.parametrize("value", ["3", -1.0, None])
def test_a_guidance_scale_that_is_none_is_refused(tiny_checkpoint: Path, value: object) -> None:
    opened = CheckpointFolder.open(tiny_checkpoint)
    wrong = CheckpointFolder(opened.path, {**opened.model_index, "_guidance_scale": value})
    with pytest.raises(ConfigError, match="_guidance_scale"):
        TextToImagePipeline.from_checkpoint(wrong, device="cpu")
