"""What a checkpoint is said to be."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentgen.checkpoints.inspection import inspect
from latentgen.errors import CheckpointNotFoundError, InputError
from tests.checkpoints.single_files import leftovers, original_shapes, write_header


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
    assert found.prediction_type == "v_prediction"
    assert "family: an architecture that is not known here" in found.lines()


@pytest.mark.parametrize("wrapper", ["", "state_dict."])
def test_single_file_in_the_original_layout(tmp_path: Path, wrapper: str) -> None:
    shapes = {**original_shapes("SDXL base"), **leftovers("SDXL base")}
    shapes = {wrapper + key: shape for key, shape in shapes.items()}
    found = inspect(write_header(tmp_path / "xl.safetensors", shapes))
    assert found.family == "SDXL base, a single file in the original layout"
    assert (found.prediction_type, found.dtypes) == ("epsilon", ("F16",))
    assert found.parts["unet"].parameters == 2_567_463_684
    assert found.parts["vae"].architecture == "a VAE with 4 latent channels"
    assert found.parts["text_encoder"].architecture == "a CLIP text encoder of width 768"
    assert found.parts["text_encoder_2"].architecture.endswith("of width 1280")
    assert "other" in found.parts
    assert any(
        line.startswith("unet: a UNet in the original layout, SDXL base (4 ") for line in found.lines()
    )


def test_prediction_type_of_a_single_file(tmp_path: Path) -> None:
    path = write_header(tmp_path / "sd2.safetensors", original_shapes("SD 2.x"))
    assert "prediction type: not stored" in inspect(path).lines()
    write_header(path, original_shapes("SD 2.x"), {"modelspec.prediction_type": "v"})
    assert inspect(path).prediction_type == "v_prediction"
