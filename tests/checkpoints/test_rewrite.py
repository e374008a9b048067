"""Folders as single files and back: nothing is lost, and diffusers reads both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from latentgen.checkpoints.convert import convert
from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.checkpoints.rewrite import write_folder, write_single_file
from latentgen.checkpoints.single_file import SingleFile
from latentgen.errors import CheckpointMismatchError, ConfigError, InputError
from tests.pipelines.sdxl import build_base, build_refiner


@pytest.fixture(scope="module", params=["sd1", "sdxl", "refiner"])
def folder(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param == "sd1":
        return tiny_checkpoint
    path = tmp_path_factory.mktemp(request.param)
    (build_base if request.param == "sdxl" else build_refiner)().save_pretrained(path)
    return path


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, by file and by the name that files of any version of transformers give them."""
    return {
        f"{path.parent.name}/{key.removeprefix('text_model.')}": tensor
        for path in folder.rglob("*.safetensors")
        for key, tensor in load_file(path).items()
    }


def test_there_and_back_is_the_same(folder: Path, tmp_path: Path) -> None:
    seen = 0

    def advance(count: int) -> None:
        nonlocal seen
        seen += count

    single = tmp_path / "single.safetensors"
    written = write_single_file(CheckpointFolder.open(folder), single, None, advance)
    assert written.left_out == ()
    assert seen == sum(tensor.nbytes for tensor in weights_of(folder).values())
    back = tmp_path / "back"
    write_folder(SingleFile.open(single, config=folder), back, None, None, advance)
    before, after = weights_of(folder), weights_of(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert CheckpointFolder.open(back).components == CheckpointFolder.open(folder).components


def test_a_folder_in_half_precision_loads_in_diffusers(folder: Path, tmp_path: Path) -> None:
    import diffusers

    single = tmp_path / "single.safetensors"
    convert(folder, single, dtype="float16")
    assert {tensor.dtype for tensor in load_file(single).values()} == {torch.float16}
    file = SingleFile.open(single, config=folder)
    write_folder(file, tmp_path / "half", torch.bfloat16, "bf16", lambda _: None)
    assert (tmp_path / "half" / "unet" / "diffusion_pytorch_model.bf16.safetensors").is_file()
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "half", variant="bf16", torch_dtype=torch.bfloat16
    )
    before = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(tensor, before[name].half().bfloat16())


def test_the_prediction_type_stays_with_the_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "single.safetensors")
    with safe_open(tmp_path / "single.safetensors", framework="pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "epsilon"


class Changed(CheckpointFolder):
    """A folder whose scheduler predicts x0."""

    def config(self, component: str) -> dict[str, object]:
        return {
            **super().config(component),
            **({"prediction_type": "sample"} if component == "scheduler" else {}),
        }


def test_what_single_files_cannot_say_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    opened = CheckpointFolder.open(tiny_checkpoint)
    with pytest.raises(ConfigError, match="prediction_type 'sample'"):
        write_single_file(
            Changed(opened.path, opened.model_index), tmp_path / "a.safetensors", None, lambda _: None
        )
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_shape_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    class Wider(CheckpointFolder):
        def config(self, component: str) -> dict[str, object]:
            wider = {"cross_attention_dim": 48} if component == "unet" else {}
            return {**super().config(component), **wider}

    opened = CheckpointFolder.open(tiny_checkpoint)
    with pytest.raises(CheckpointMismatchError, match="misshapen"):
        write_single_file(
            Wider(opened.path, opened.model_index), tmp_path / "a.safetensors", None, lambda _: None
        )
    assert list(tmp_path.iterdir()) == []


def test_a_tiny_model_is_of_no_published_family(tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "single.safetensors")
    with pytest.raises(InputError, match=r"not one of SD 1\.x"):
        convert(tmp_path / "single.safetensors", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
