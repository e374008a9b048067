"""What a checkpoint is said to be."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentgen.errors import CheckpointNotFoundError, InputError
from latentgen.headers import TensorInfo
from latentgen.identify import likely_architecture, unet_kind
from latentgen.inspection import inspect


def test_folder_written_by_diffusers(tiny_checkpoint: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_checkpoint)
    found = inspect(tiny_checkpoint)
    assert {name: part.parameters for name, part in found.parts.items()} == {
        name: sum(parameter.numel() for parameter in getattr(pipeline, name).parameters())
        for name in ("text_encoder", "unet", "vae")
    }
    assert (found.scheduler, found.prediction_type) == ("DDIMScheduler", "epsilon")
    assert (found.family, found.dtypes) == ("custom", ("F32",))
    assert found.nbytes == 4 * found.parameters
    lines = found.lines()
    assert f"parameters: {found.parameters:,}" in lines
    assert "scheduler: DDIMScheduler" in lines
    assert any(line.startswith("vae: a VAE with 4 latent channels; ") for line in lines)
    assert any(line.startswith("text_encoder: a CLIP text encoder of width 32; ") for line in lines)
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("", InputError),
        (5, InputError),
        ("x" * 5000, CheckpointNotFoundError),
        ("x\0", CheckpointNotFoundError),
    ],
)
def test_what_is_no_path_is_refused(path: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        inspect(path)


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


def test_single_file(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 4).half(), "b": torch.zeros(2), "c": torch.zeros(5).half()}
    path = tmp_path / "some.safetensors"
    save_file(tensors, path, metadata={"modelspec.prediction_type": "v"})
    found = inspect(path)
    assert (found.parameters, found.nbytes, found.dtypes) == (19, 42, ("F16", "F32"))
    assert found.prediction_type == "v"
    assert "family: an architecture that is not known here" in found.lines()


def info(*shape: int) -> TensorInfo:
    return TensorInfo("F16", shape, 2)


@pytest.mark.parametrize(
    ("in_channels", "context", "family"),
    [
        (4, 768, "SD 1.x"),
        (9, 768, "SD 1.x inpainting"),
        (8, 768, "SD 1.x instruct-pix2pix"),
        (4, 1024, "SD 2.x"),
        (9, 1024, "SD 2.x inpainting"),
        (4, 2048, "SDXL base"),
        (4, 1280, "SDXL refiner"),
        (7, 1024, "SD x4 upscaler"),
        (4, 256, "custom"),
        (3, None, "unconditional"),
    ],
)
def test_families(in_channels: int, context: int | None, family: str) -> None:
    tensors = {
        "conv_in.weight": info(320, in_channels, 3, 3),
        "down_blocks.0.resnets.0.norm1.weight": info(320),
    }
    if context is not None:
        tensors["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"] = info(1280, context)
    kind = unet_kind(tensors)
    assert kind is not None
    assert kind.family == family


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"model.diffusion_model.input_blocks.0.0.weight": info(320, 4, 3, 3)}, "original layout"),
        ({"lora_unet_down_blocks_0.lora_down.weight": info(4, 320)}, "a LoRA adapter"),
        ({"decoder.conv_in.weight": info(512, 16, 3, 3)}, "a VAE with 16 latent channels"),
        (
            {"text_model.embeddings.token_embedding.weight": info(49408, 768)},
            "CLIP text encoder of width 768",
        ),
        ({"embeddings.token_embedding.weight": info(9, 768)}, "CLIP text encoder of width 768"),
    ],
)
def test_architectures(tensors: dict[str, TensorInfo], expected: str) -> None:
    assert expected in str(likely_architecture(tensors))


def test_unknown_tensors_have_no_likely_architecture() -> None:
    assert likely_architecture({"conv_in.weight": info(3), "decoder.conv_in.weight": info(2, 2)}) is None
