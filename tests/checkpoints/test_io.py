"""Headers and tensors of safetensors files, with the library itself as the oracle."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentgen.checkpoints import io
from latentgen.checkpoints.io import TORCH_DTYPES, Header, MappedFile, TensorInfo, encode_header, read_header
from latentgen.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    UnsafeCheckpointError,
)

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw_file(path: Path, header: object, data: bytes = b"\0" * 8) -> Path:
    """A file with any header, valid or not: bytes as they are, everything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_header_of_a_valid_file(tmp_path: Path) -> None:
    tensors = {
        "weight": torch.zeros(3, 4, dtype=torch.float16),
        "bias": torch.zeros(5, dtype=torch.bfloat16),
        "count": torch.tensor(7),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"modelspec.prediction_type": "v"})
    header = read_header(tmp_path / "a.safetensors")
    assert dict(header) == {
        "weight": TensorInfo("F16", (3, 4), 24),
        "bias": TensorInfo("BF16", (5,), 10),
        "count": TensorInfo("I64", (), 8),
    }
    assert header.metadata == {"modelspec.prediction_type": "v"}


def test_encoded_header_is_read_by_the_library(tmp_path: Path) -> None:
    infos = {"größe": TensorInfo("F32", (2, 3), 24), "scalar": TensorInfo("U8", (), 1)}
    path = tmp_path / "a.safetensors"
    path.write_bytes(encode_header(infos, {"format": "pt"}) + bytes(25))
    assert dict(read_header(path)) == infos
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("größe").shape == (2, 3)
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("length", [60, 0x0A3C, 640, 0x4B50])
def test_a_length_that_looks_like_another_format_is_no_obstacle(tmp_path: Path, length: int) -> None:
    # Lengths whose first bytes are "<", "\n", the start of a pickle, or "PK".
    text = json.dumps({"w": ENTRY}).encode()
    assert dict(read_header(raw_file(tmp_path / "a.safetensors", text.ljust(length)))) == {
        "w": TensorInfo("F32", (2,), 8)
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"\0" * 4096, "zero bytes"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3438167534\n",
            "LFS.*3,438,167,534 b.*has 73 bytes",
        ),
        (b"<!DOCTYPE html>\n<html><head>", "HTML"),
        (b"\n <html lang=en>", "HTML"),
        (b'<?xml version="1.0"?>', "HTML or XML"),
        (b"\x01\0\0", ""),
        (b"\x89PNG\r\n\x1a\n" + bytes(500), "header of"),
    ],
)
def test_other_content_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=rf"model\.safetensors.*{reason}"):
        read_header(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(3)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointCorruptError, match=rf"model\.safetensors.*\b{size}\b"):
            read_header(path)
    with pytest.raises(CheckpointCorruptError, match=f"{len(whole)}"):
        read_header(path)
    path.write_bytes(whole[:20])
    with pytest.raises(
        CheckpointCorruptError, match=f"20 of at least {8 + int.from_bytes(whole[:8], 'little')}"
    ):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}' * 2, "JSON"),
        (b'{"w":' * 50_000 + b"1" + b"}" * 50_000, "recursion"),
        (b'{"w": %b, "w": %b}' % ((json.dumps(ENTRY).encode(),) * 2), "'w'"),
        ({"w": {**ENTRY, "dtype": "F31"}}, "F31"),
        ({"w": {**ENTRY, "dtype": "F8_E8M0", "shape": [8]}}, "'w'.*F8_E8M0"),
        ({"w": ENTRY, "v": {**ENTRY, "shape": [2, 0, 3], "data_offsets": [0, 0]}}, r"'v'.*\[2, 0, 3\]"),
        ({"w": {**ENTRY, "shape": [2, *[1] * 8]}}, "'w'"),
        ({"w": {**ENTRY, "shape": [2**62, 2**62]}}, "overflow"),
        ({"w": {**ENTRY, "data_offsets": [4, 12]}}, "`w`"),
        ({"w": ENTRY, "v": ENTRY}, "`[vw]`"),
        ({"w": {**ENTRY, "shape": [1], "data_offsets": [0, 4]}}, "not fully covered"),
        ({"__metadata__": {"a": 1}, "w": ENTRY}, "expected a string"),
        ({"w" * 10_000: {**ENTRY, "data_offsets": [4, 12]}}, "w{50}"),
    ],
)
def test_impossible_headers(tmp_path: Path, header: object, named: str) -> None:
    with pytest.raises(CheckpointCorruptError, match=rf"model\.safetensors.*{named}") as caught:
        read_header(raw_file(tmp_path / "model.safetensors", header))
    assert len(str(caught.value)) < 600


def test_too_many_tensors(tmp_path: Path) -> None:
    def many(count: int) -> Path:
        entries = {f"w{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(count)}
        return raw_file(tmp_path / "model.safetensors", entries, bytes(count))

    assert len(read_header(many(io.MAX_TENSORS))) == io.MAX_TENSORS
    with pytest.raises(CheckpointCorruptError, match="20,001"):
        read_header(many(io.MAX_TENSORS + 1))


def test_declared_header_is_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write((2**40).to_bytes(8, "little") + b"{")
        file.truncate(2**41)  # sparse: the file is as long as it says
    with pytest.raises(CheckpointCorruptError, match="1,099,511,627,776"):
        read_header(path)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.pth", "pytorch_model.BIN", "a.pkl"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(UnsafeCheckpointError, match=f"latentgen convert .*{name}"):
        read_header(tmp_path / name)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_refused_by_content(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeCheckpointError, match="latentgen convert"):
        read_header(path)


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "model.safetensors", tmp_path):
        with pytest.raises(CheckpointNotFoundError, match="not a file"):
            read_header(path)


def agrees_with_the_library(path: Path) -> None:
    """The header is refused with a typed error, or is what the library reads."""
    try:
        header = read_header(path)
    except CheckpointError:
        return
    with safe_open(path, framework="np") as file:
        assert set(file.keys()) == set(header)
        for name, info in header.items():
            assert tuple(file.get_slice(name).get_shape()) == info.shape


@settings(
    max_examples=100,
    deadline=2000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(position=st.integers(0, 200), replacement=st.binary(max_size=12), removed=st.integers(0, 12))
def test_fuzzed_bytes_of_a_valid_file(
    tmp_path: Path, position: int, replacement: bytes, removed: int
) -> None:
    valid = raw_file(
        tmp_path / "model.safetensors", {"w": ENTRY, "__metadata__": {"format": "pt"}}
    ).read_bytes()
    mutated = valid[:position] + replacement + valid[position + removed :]
    (tmp_path / "model.safetensors").write_bytes(mutated)
    agrees_with_the_library(tmp_path / "model.safetensors")


# The memory-mapped reader


def test_tensors_are_those_that_the_library_reads(tmp_path: Path) -> None:
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


def test_writing_changes_only_this_process_until_the_pages_are_released(tmp_path: Path) -> None:
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


def test_a_file_that_changes_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.randn(100)}, path)
    sizes = {300: CheckpointCorruptError, 0: CheckpointNotFoundError}
    for size, error in sizes.items():

        def shrink(path: Path, size: int = size) -> Header:
            header = read_header(path)
            os.truncate(path, size)
            return header

        save_file({"w": torch.randn(100)}, path)
        monkeypatch.setattr(io, "read_header", shrink)
        with pytest.raises(error, match=r"a\.safetensors"):
            MappedFile(path)
