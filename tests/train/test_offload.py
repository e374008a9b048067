"""What is sent away comes back as it was, and what cannot be kept is told."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from latentgen.errors import OutputError
from latentgen.train.offload import FileStore, HostStore, TensorStore

SHAPES = [(7,), (4, 3, 3, 3), (), (5, 6), (3000, 2)]


def parameters(dtype: torch.dtype, memory_format: torch.memory_format) -> list[torch.Tensor]:
    tensors = [torch.randn(shape).to(dtype) for shape in SHAPES]
    return [t.to(memory_format=memory_format) if t.ndim == 4 else t for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["file", "host"])
def test_tensors_come_back_as_they_were(
    dtype: torch.dtype, memory_format: torch.memory_format, kind: str, tmp_path: Path
):
    owners = parameters(dtype, memory_format)
    store: TensorStore = FileStore(owners, tmp_path) if kind == "file" else HostStore(owners)
    for _ in range(2):
        tensors = [torch.randn_like(owner) for owner in owners]
        for place in (3, 0, 4, 2, 1):
            store.send(place, tensors[place])
        for place, (owner, tensor) in enumerate(zip(owners, tensors, strict=True)):
            for _ in range(2):
                for back in (store.look(place), store.fetch(place)):
                    assert torch.equal(back, tensor)
                    assert back.stride() == owner.stride()
                    assert back.dtype == dtype
                back.zero_()  # what was fetched, not what is kept


def test_a_tensor_of_another_layout_comes_back_in_that_of_its_parameter(tmp_path: Path):
    owner = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    tensor = torch.randn(4, 3, 3, 3)
    for store in (FileStore([owner], tmp_path), HostStore([owner])):
        store.send(0, tensor)
        assert torch.equal(store.fetch(0), tensor)
        assert store.fetch(0).stride() == owner.stride()


def test_the_file_has_no_name_and_its_folder_need_not_exist(tmp_path: Path):
    store = FileStore([torch.zeros(10)], tmp_path / "runs" / "first")
    store.send(0, torch.ones(10))
    assert not list(tmp_path.iterdir())


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room is made sure of where the system can")
def test_a_full_disk_is_told_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(
        OutputError, match=r"of 4\.\de-05 GB .*No space left.*memory\.offload_optimizer to false"
    ):
        FileStore([torch.zeros(10_000)], tmp_path)


def test_a_disk_that_fails_later_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = FileStore([torch.zeros(10)], tmp_path)
    store._file.truncate(8)
    with pytest.raises(OutputError, match="it ends too soon"):
        store.fetch(0)
    monkeypatch.setattr(store, "_file", Failing())
    with pytest.raises(OutputError, match="No space left"):
        store.send(0, torch.zeros(10))


class Failing:
    """A file on a full disk."""

    def seek(self, _: int) -> None:
        pass

    def write(self, _: memoryview) -> None:
        no_room()
