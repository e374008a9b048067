"""What is sent away comes back as it was, and what cannot be kept is told."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from latentgen.errors import OutputError
from latentgen.train.offload import FileStore, GradientStore, HostStore

SHAPES = [(7,), (4, 3, 3, 3), (), (5, 6), (0, 2)]


def parameters(dtype: torch.dtype, memory_format: torch.memory_format) -> list[torch.Tensor]:
    tensors = [torch.randn(shape).to(dtype) for shape in SHAPES]
    return [t.to(memory_format=memory_format) if t.ndim == 4 else t for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["file", "host"])
def test_gradients_come_back_as_they_were(
    dtype: torch.dtype, memory_format: torch.memory_format, kind: str, tmp_path: Path
):
    owners = parameters(dtype, memory_format)
    store: GradientStore = FileStore(owners, tmp_path) if kind == "file" else HostStore(owners)
    for _ in range(2):
        gradients = [torch.randn_like(owner) for owner in owners]
        for place in (3, 0, 4, 2, 1):
            store.send(place, gradients[place])
        for place, (owner, gradient) in enumerate(zip(owners, gradients, strict=True)):
            for _ in range(2):
                back = store.fetch(place)
                assert torch.equal(back, gradient)
                assert back.stride() == owner.stride()
                assert back.dtype == dtype
                back.zero_()  # what is kept stays


def test_a_gradient_of_another_layout_comes_back_in_that_of_its_parameter(tmp_path: Path):
    owner = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    gradient = torch.randn(4, 3, 3, 3)
    for store in (FileStore([owner], tmp_path), HostStore([owner])):
        store.send(0, gradient)
        assert torch.equal(store.fetch(0), gradient)
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
    with pytest.raises(OutputError, match=r"\(4e-05 GB\).*No space left.*memory\.offload_gradients to false"):
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
