"""Damaged LoRA and embedding files: both readers refuse them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentgen.adapters.lora_files import read_lora
from latentgen.adapters.textual_inversion import read_embedding
from latentgen.checkpoints.inspection import inspect
from latentgen.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    UnsafeCheckpointError,
    UnsafePathError,
)

Reader = Callable[[Path], object]
LORA = {
    "lora_unet_conv_in.lora_down.weight": torch.ones(2, 4),
    "lora_unet_conv_in.lora_up.weight": torch.ones(8, 2),
    "lora_unet_conv_in.alpha": torch.tensor(1.0),
}
EMBEDDING = {"<cat>": torch.ones(2, 768)}
READERS = [(read_lora, LORA), (read_embedding, EMBEDDING)]
IDS = ["lora", "embedding"]


@pytest.mark.parametrize(("read", "tensors"), READERS, ids=IDS)
def test_every_truncation_is_refused(tmp_path: Path, read: Reader, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "style.safetensors"
    save_file(tensors, path)
    whole = path.read_bytes()
    read(path)
    for size in (*range(64), len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        for reader in (read, inspect):
            with pytest.raises(CheckpointCorruptError, match=r"style\.safetensors"):
                reader(path)


@pytest.mark.parametrize(("read", "tensors"), READERS, ids=IDS)
@pytest.mark.parametrize("name", ["style.pt", "style.safetensors"])
def test_pickles_are_refused_by_name_and_by_content(
    tmp_path: Path, read: Reader, tensors: dict[str, torch.Tensor], name: str
) -> None:
    torch.save(tensors, tmp_path / name)
    for reader in (read, inspect):
        with pytest.raises(UnsafeCheckpointError, match="latentgen convert"):
            reader(tmp_path / name)


@pytest.mark.parametrize(("read", "_tensors"), READERS, ids=IDS)
def test_missing_files(tmp_path: Path, read: Reader, _tensors: object) -> None:
    for path in (tmp_path / "style.safetensors", tmp_path / ("x" * 5000), tmp_path / "nul\0"):
        with pytest.raises(CheckpointNotFoundError):
            read(path)


@pytest.mark.parametrize("what", ["unet", "unet/adapter_config.json", "unet/adapter_model.safetensors"])
def test_links_out_of_a_lora_folder(tmp_path: Path, what: str) -> None:
    folder, outside = tmp_path / "style", tmp_path / "outside"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    name = "base_model.model.conv_in"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(8, 2)}
    save_file(factors, folder / "unet" / "adapter_model.safetensors")
    assert {layer.rank for layer in read_lora(folder).layers} == {2}
    (folder / what).rename(outside)
    (folder / what).symlink_to(outside)
    for reader in (read_lora, inspect):
        with pytest.raises(UnsafePathError, match="symlink"):
            reader(folder)
