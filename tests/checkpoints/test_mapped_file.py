"""Mapped files: tensors as safetensors reads them, private to the process, and pages that can be given back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentgen.checkpoints import mapped_file
from latentgen.checkpoints.headers import ITEM_BYTES, Header, TensorInfo, encode_header, read_header
from latentgen.checkpoints.mapped_file import TORCH_DTYPES, MappedFile
from latentgen.errors import CheckpointCorruptError, CheckpointNotFoundError


def test_tensors_are_those_that_the_library_reads(tmp_path: Path) -> None:
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == ITEM_BYTES
    state = {name: torch.randint(0, 2, (3, 5)).to(dtype) for name, dtype in TORCH_DTYPES.items()} | {
        "scalar": torch.tensor(2.5)
    }
    save_file(state, tmp_path / "a.safetensors")
    file, expected = MappedFile(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")
    assert set(file.header) == set(expected)
    for key, tensor in expected.items():
        found = file.tensor(key)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.contiguous().view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_tensors_need_no_alignment(tmp_path: Path) -> None:
    head = encode_header({"a": TensorInfo("U8", (1,), 1), "b": TensorInfo("F32", (300,), 1200)}, {})
    path, values = tmp_path / "a.safetensors", torch.randn(300)
    path.write_bytes(head + b"\1" + values.numpy().tobytes())
    with safe_open(path, framework="pt") as reader:
        assert torch.equal(reader.get_tensor("b"), values)
    assert torch.equal(MappedFile(path).tensor("b"), values)


def test_writing_stays_in_the_process_until_the_pages_are_given_back(tmp_path: Path) -> None:
    state = {name: torch.randn(10_000) for name in "abc"}
    save_file(state, tmp_path / "a.safetensors")
    file = MappedFile(tmp_path / "a.safetensors")
    tensors = {name: file.tensor(name) for name in "abc"}
    for tensor in tensors.values():
        tensor.zero_()
    assert torch.equal(load_file(tmp_path / "a.safetensors")["b"], state["b"])
    file.release("b")
    # The pages came from the file again, but for those that the neighbours have a part of.
    assert tensors["a"].count_nonzero() == tensors["c"].count_nonzero() == 0
    assert torch.equal(tensors["b"][1024:-1024], state["b"][1024:-1024])


def test_a_file_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.randn(100)}, path)
    sizes = {300: CheckpointCorruptError, 0: CheckpointNotFoundError}
    for size, error in sizes.items():

        def shrink(path: Path, size: int = size) -> Header:
            header = read_header(path)
            os.truncate(path, size)
            return header

        save_file({"w": torch.randn(100)}, path)
        monkeypatch.setattr(mapped_file, "read_header", shrink)
        with pytest.raises(error, match=r"a\.safetensors"):
            MappedFile(path)
