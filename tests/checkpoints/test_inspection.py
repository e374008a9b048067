"""Inspection of checkpoints and adapters."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentgen.checkpoints.inspection import inspect
from latentgen.errors import CheckpointNotFoundError
from tests.checkpoints.single_files import leftovers, original_shapes, write_header


def test_folder_written_by_diffusers(tiny_checkpoint: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_checkpoint)
    found = inspect(tiny_checkpoint)
    assert {name: part.parameters for name, part in found.parts.items()} == {
        name: sum(parameter.numel() for parameter in getattr(pipeline, name).parameters())
        for name in ("text_encoder", "unet", "vae")
    }
    assert found.facts == {"scheduler": "DDIMScheduler", "prediction type": "epsilon"}
    assert (found.family, found.dtypes) == ("custom", ("F32",))
    assert found.nbytes == 4 * found.parameters
    lines = found.lines()
    assert f"parameters: {found.parameters:,}" in lines
    assert "scheduler: DDIMScheduler" in lines
    assert any(line.startswith("vae: a VAE with 4 latent channels; ") for line in lines)
    assert any(line.startswith("text_encoder: a CLIP text encoder of width 32; ") for line in lines)
    assert all("\n" not in line for line in lines)


def test_folder_with_variants_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    for name in ("unet", "vae"):
        stem = folder / name / "diffusion_pytorch_model"
        shutil.move(f"{stem}.safetensors", f"{stem}.fp16.safetensors")
    assert inspect(folder).parts["unet"].variants == ("fp16",)
    assert any(
        line.startswith("unet: ") and line.endswith("variants: fp16") for line in inspect(folder).lines()
    )


def test_folder_without_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(
        tiny_checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors")
    )
    with pytest.raises(CheckpointNotFoundError, match="has weights"):
        inspect(folder)


def test_the_weights_of_one_component(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 4).half(), "b": torch.zeros(2), "c": torch.zeros(5).half()}
    save_file(tensors, tmp_path / "some.safetensors", metadata={"modelspec.prediction_type": "v"})
    found = inspect(tmp_path / "some.safetensors")
    assert (found.parameters, found.nbytes, found.dtypes) == (19, 42, ("F16", "F32"))
    assert found.facts == {"scheduler": "not stored", "prediction type": "v_prediction"}
    assert "family: an unknown architecture" in found.lines()


@pytest.mark.parametrize("key_prefix", ["", "state_dict."])
def test_single_file_in_the_original_layout(tmp_path: Path, key_prefix: str) -> None:
    shapes = {**original_shapes("SDXL base"), **leftovers("SDXL base")}
    shapes = {key_prefix + key: shape for key, shape in shapes.items()}
    found = inspect(write_header(tmp_path / "xl.safetensors", shapes))
    assert found.family == "SDXL base, a single file in the original layout"
    assert (found.facts["prediction type"], found.dtypes) == ("epsilon", ("F16",))
    assert found.parts["unet"].parameters == 2_567_463_684
    assert found.parts["vae"].architecture == "a VAE with 4 latent channels"
    assert found.parts["text_encoder"].architecture == "a CLIP text encoder of width 768"
    assert found.parts["text_encoder_2"].architecture.endswith("of width 1280")
    assert "other" in found.parts
    assert any(
        line.startswith("unet: a UNet in the original layout, SDXL base (4 ") for line in found.lines()
    )


# A LoRA of SD 1.x with two ranks, for the UNet and the text encoder.
KOHYA = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (8, 768, 320, 4.0),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v": (16, 768, 320, 1.0),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (8, 768, 768, None),
}


def kohya_file(path: Path, metadata: dict[str, str] | None = None) -> Path:
    tensors = {}
    for name, (rank, inputs, outputs, alpha) in KOHYA.items():
        tensors[f"{name}.lora_down.weight"] = torch.ones(rank, inputs).half()
        tensors[f"{name}.lora_up.weight"] = torch.ones(outputs, rank).half()
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, metadata)
    return path


def test_a_lora_of_kohya(tmp_path: Path) -> None:
    found = inspect(kohya_file(tmp_path / "style.safetensors", {"ss_tag_frequency": "{a\n" + "x" * 10**6}))
    assert found.family == "a LoRA adapter in kohya's format, for SD 1.x"
    lines = found.lines()
    for line in (
        "target: SD 1.x",
        "format: kohya",
        "rank: 8 to 16",
        "alpha: 1 to 8",
        "layers: 3 (2 in unet, 1 in text_encoder)",
    ):
        assert line in lines
    assert not any(line.startswith(("scheduler", "prediction type")) for line in lines)
    (metadata,) = (line for line in lines if line.startswith("metadata "))
    assert metadata.startswith("metadata ss_tag_frequency: {a\\nx")
    assert len(metadata) < 300


def test_the_target_that_a_lora_states(tmp_path: Path) -> None:
    tensors = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 768),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(3072, 4),
    }
    path = tmp_path / "style.safetensors"
    save_file(tensors, path)
    assert "target: not stored" in inspect(path).lines()
    save_file(tensors, path, {"ss_base_model_version": "sdxl_base_v1-0"})
    assert "target: SDXL base" in inspect(path).lines()


def test_folders_of_loras(tmp_path: Path) -> None:
    """As peft and diffusers write them."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=768,
        norm_num_groups=8,
    )
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_k", "to_v"])
    model = get_peft_model(unet, config)
    model.save_pretrained(tmp_path / "peft" / "unet")
    layers = sum(name.endswith(("to_k.lora_A", "to_v.lora_A")) for name, _ in model.named_modules())
    assert layers > 10
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "diffusers",
        unet_lora_layers=get_peft_model_state_dict(model.base_model.model),
        unet_lora_adapter_metadata=config.to_dict() | {"target_modules": ["to_k", "to_v"]},
    )
    for folder, part in (("peft", "unet"), ("peft/unet", "weights"), ("diffusers", "weights")):
        found = inspect(tmp_path / folder)
        expected = {
            "target": "SD 1.x",
            "format": folder.partition("/")[0],
            "rank": "4",
            "alpha": "6",
            "layers": f"{layers} ({layers} in unet)",
        }
        assert found.facts == expected, folder
        assert list(found.parts) == [part]
        assert found.parts[part].tensors == 2 * layers


def test_adapters_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    path = kohya_file(tmp_path / "style.safetensors")
    tensors = load_file(path)
    save_file({**tensors, f"{next(iter(KOHYA))}.dora_scale": torch.ones(320, 1)}, path)
    found = inspect(path)
    assert found.family == "an unsupported adapter (DoRA), for SD 1.x"
    (line,) = (line for line in found.lines() if line.startswith("problem: "))
    assert "DoRA" in line
    save_file({"<cat>": torch.full((2, 768), float("nan"))}, path)
    assert any(line.startswith("problem: ") and "NaN" in line for line in inspect(path).lines())


@pytest.mark.parametrize(
    ("tensors", "facts"),
    [
        (
            {"<cat>": torch.ones(768)},
            {"target": "SD 1.x", "token": "<cat>", "vectors per token": "1", "width": "768 (text_encoder)"},
        ),
        (
            {"clip_l": torch.ones(3, 768), "clip_g": torch.ones(3, 1280)},
            {
                "target": "SDXL base",
                "token": "some",
                "vectors per token": "3",
                "width": "768 (text_encoder), 1280 (text_encoder_2)",
            },
        ),
    ],
)
def test_embeddings(tmp_path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, str]) -> None:
    save_file(tensors, tmp_path / "some.safetensors")
    found = inspect(tmp_path / "some.safetensors")
    assert found.facts == facts
    assert all(f"{fact}: {value}" in found.lines() for fact, value in facts.items())
