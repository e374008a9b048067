"""What is sent away comes back as it was, and what cannot be kept is told."""

from __future__ import annotations

import errno
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from latentgen.errors import OutputError
from latentgen.train.offload import FileStore, HostStore, TensorStore
from tests.train.test_resident import resident

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


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_many_tensors_need_few_open_files(tmp_path: Path):
    import resource

    store = FileStore([torch.zeros(3) for _ in range(200)], tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, hard))
    try:
        for place in range(200):
            store.send(place, torch.full((3,), float(place)))
        looked = [store.look(place) for place in range(200)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [int(tensor[0]) for tensor in looked] == list(range(200))


@pytest.mark.skipif(sys.platform != "linux", reason="how memory is counted is Linux' own")
def test_what_was_looked_at_takes_no_memory_later(tmp_path: Path):
    store = FileStore([torch.zeros(2**24)], tmp_path)
    store.send(0, torch.ones(2**24))
    before = resident("RssShmem") + resident("RssFile")
    store.look(0).sum()
    assert resident("RssShmem") + resident("RssFile") > before + 60  # of 64 MiB
    store.fetch(0)
    assert resident("RssShmem") + resident("RssFile") < before + 4


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room is made sure of where the system can")
def test_a_file_system_that_cannot_make_sure_of_room_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "posix_fallocate", partial(failing, errno.EOPNOTSUPP))
    store = FileStore([torch.zeros(10)], tmp_path)
    store.send(0, torch.ones(10))
    assert store.fetch(0).sum() == 10


def failing(number: int, *_: object) -> None:
    raise OSError(number, os.strerror(number))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room is made sure of where the system can")
def test_a_full_disk_is_told_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "posix_fallocate", partial(failing, errno.ENOSPC))
    with pytest.raises(OutputError, match=r"4e-05 GB.: No space left.*memory\.offload_optimizer to false"):
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
        failing(errno.ENOSPC)
