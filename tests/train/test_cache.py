"""The cache on disk: shared by processes, whole or not there, and never wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from latentgen.errors import OutputError
from latentgen.train import cache as cache_module
from latentgen.train.cache import TensorCache, content_key, weights_digest


def entry(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "small": torch.randint(0, 255, (3, 5), generator=generator, dtype=torch.uint8),
        "large": torch.randn(2, 4, 8, 8, generator=generator).half(),
    }


def filled(folder: Path, *seeds: int) -> TensorCache:
    cache = TensorCache(folder)
    for seed in seeds:
        cache.put(content_key(str(seed)), entry(seed))
    cache.flush()
    return cache


def assert_holds(cache: TensorCache, *seeds: int) -> None:
    for seed in seeds:
        found = cache.get(content_key(str(seed)))
        assert found is not None
        assert found.keys() == entry(seed).keys()
        for name, tensor in entry(seed).items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_entries_are_there_before_and_after_they_are_written(tmp_path: Path):
    cache = TensorCache(tmp_path / "cache")
    cache.put(content_key("1"), entry(1))
    assert_holds(cache, 1)
    assert not (tmp_path / "cache").exists()
    cache.flush()
    assert_holds(cache, 1)
    assert_holds(TensorCache(tmp_path / "cache"), 1)
    assert content_key("2") not in cache
    assert cache.get(content_key("2")) is None


def test_packs_are_safetensors_that_others_read(tmp_path: Path):
    filled(tmp_path, 1, 2)
    (file,) = tmp_path.iterdir()
    tensors = load_file(file)
    assert set(tensors) == {f"{content_key(str(seed))}/{name}" for seed in (1, 2) for name in entry(1)}
    assert torch.equal(tensors[f"{content_key('2')}/large"], entry(2)["large"])


def test_many_entries_make_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_module, "PACK_ENTRIES", 10)
    filled(tmp_path, *range(25))
    assert len(list(tmp_path.iterdir())) == 3
    assert_holds(TensorCache(tmp_path), *range(25))


def test_a_pack_is_written_when_it_is_large_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_module, "PACK_BYTES", 3000)
    cache = TensorCache(tmp_path)
    for seed in range(3):  # of 1039 bytes
        cache.put(content_key(str(seed)), entry(seed))
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(cache_module, "PACK_SECONDS", 0.0)
    cache.put(content_key("3"), entry(3))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "zeros", "html", "foreign"])
def test_damaged_packs_are_deleted_and_the_others_stay(tmp_path: Path, damage: str):
    filled(tmp_path, 1)
    (good,) = tmp_path.iterdir()
    filled(tmp_path, 2)
    (bad,) = set(tmp_path.iterdir()) - {good}
    data = bad.read_bytes()
    bad.write_bytes(
        {
            "truncated": data[: len(data) // 2],
            "empty": b"",
            "zeros": bytes(len(data)),
            "html": b"<html>",
            "foreign": data.replace(content_key("2").encode(), b"x" * 64),
        }[damage]
    )
    with pytest.warns(UserWarning, match="damaged"):
        cache = TensorCache(tmp_path)
    assert_holds(cache, 1)
    assert content_key("2") not in cache
    assert list(tmp_path.iterdir()) == [good]


def test_a_flipped_bit_is_noticed_when_it_is_read(tmp_path: Path):
    filled(tmp_path, 1, 2)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[-1] ^= 4
    file.write_bytes(data)
    cache = TensorCache(tmp_path)
    with pytest.warns(UserWarning, match="checksums"):
        assert all(cache.get(content_key(str(seed))) is None for seed in (2, 1))
    assert list(tmp_path.iterdir()) == []
    cache.put(content_key("1"), entry(1))
    cache.flush()
    assert_holds(TensorCache(tmp_path), 1)


def test_deleting_the_folder_leaves_what_was_opened(tmp_path: Path):
    cache = filled(tmp_path, 1)
    for file in tmp_path.iterdir():
        file.unlink()
    assert_holds(cache, 1)
    assert len(TensorCache(tmp_path)) == 0


def test_leavings_of_killed_processes_are_deleted_when_they_are_old(tmp_path: Path):
    old, young = tmp_path / ".0.tmp", tmp_path / ".1.tmp"
    for file in (old, young):
        file.write_bytes(b"half")
    yesterday = time.time() - 2 * 24 * 3600
    os.utime(old, (yesterday, yesterday))
    TensorCache(tmp_path)
    assert list(tmp_path.iterdir()) == [young]


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    cache = TensorCache(tmp_path / "file" / "cache")
    cache.put(content_key("1"), entry(1))
    with pytest.raises(OutputError, match="cannot write"):
        cache.flush()


_WRITER = """
import sys, torch
from pathlib import Path
from latentgen.train import cache as module
from tests.train.test_cache import entry
module.PACK_ENTRIES = 4
cache = module.TensorCache(Path(sys.argv[1]))
for seed in range(100):
    key = module.content_key(str(seed))
    if cache.get(key) is None:
        cache.put(key, entry(seed))
    cache.refresh()
cache.flush()
assert len(cache) == 100
"""


def test_processes_may_write_at_once(tmp_path: Path):
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)]) for _ in range(2)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    cache = TensorCache(tmp_path)
    assert len(cache) == 100
    assert_holds(cache, *range(100))


def test_reading_takes_no_memory_of_its_own(tmp_path: Path):
    cache = TensorCache(tmp_path)
    for seed in range(20):
        cache.put(content_key(str(seed)), {"large": torch.full((2**19,), float(seed))})
    cache.flush()
    del cache
    before = _anonymous_bytes()
    cache = TensorCache(tmp_path)
    rows = [cache.get(content_key(str(seed))) for seed in range(20)]
    assert [row["large"][-1].item() for row in rows if row] == list(range(20))
    assert _anonymous_bytes() - before < 4 * 2**20  # of 40 MiB


def _anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    pytest.skip("only Linux tells")


def test_keys_are_those_of_their_contents():
    assert content_key("ab", "c") != content_key("a", "bc") != content_key("abc")
    assert content_key("ab") == content_key(b"ab")


def test_digests_see_every_weight_and_nothing_else():
    first = nn.Conv2d(2, 3, 3)
    same = nn.Conv2d(2, 3, 3)
    same.load_state_dict(first.state_dict())
    same.to(memory_format=torch.channels_last)
    digest = weights_digest([first])
    assert weights_digest([same]) == digest
    assert weights_digest([same.half()]) != digest
    with torch.no_grad():
        first.bias[0].add_(1)
    assert weights_digest([first]) != digest
    assert weights_digest([first, first]) != weights_digest([first])
