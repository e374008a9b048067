"""Safe paths, JSON objects and writes that are all or nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from latentgen import files
from latentgen.errors import CheckpointCorruptError, CheckpointNotFoundError, OutputError, UnsafePathError
from latentgen.files import (
    atomic_folder,
    atomic_write,
    delete_temporary,
    quote,
    read_json,
    remove_folder,
    safe_join,
    write_json,
)


def test_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "result.bin"
    for content in (b"first", b"second"):
        with atomic_write(target) as file:
            file.write(content)
        assert target.read_bytes() == content
    assert os.listdir(target.parent) == ["result.bin"]


def test_atomic_write_gives_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    with atomic_write(tmp_path / "atomic") as file:
        file.write(b"x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("failure", [RuntimeError("bug"), KeyboardInterrupt()])
def test_interrupted_write_keeps_the_old_file(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "result.bin"
    target.write_bytes(b"old")

    def write_half() -> None:
        with atomic_write(target) as file:
            file.write(b"half")
            raise failure

    with pytest.raises(type(failure)):
        write_half()
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["result.bin"]


def test_atomic_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    with atomic_folder(target) as folder:
        (folder / "file").write_bytes(b"x")
        assert not target.exists()
    assert os.listdir(target.parent) == ["folder"]
    assert os.listdir(target) == ["file"]
    with pytest.raises(OutputError, match="exists"), atomic_folder(target):
        pytest.fail("a folder with files is not replaced")
    (target / "file").unlink()
    with atomic_folder(target) as folder:  # an empty folder is
        (folder / "other").write_bytes(b"x")
    assert os.listdir(target) == ["other"]


@pytest.mark.parametrize("failure", [RuntimeError("bug"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("replace", [False, True])
def test_interrupted_folder_leaves_nothing(tmp_path: Path, failure: BaseException, replace: bool) -> None:
    def write_half() -> None:
        with atomic_folder(tmp_path / "folder", replace=replace) as folder:
            (folder / "file").write_bytes(b"half")
            raise failure

    if replace:
        (tmp_path / "folder" / "old").mkdir(parents=True)
    with pytest.raises(OutputError if isinstance(failure, OSError) else type(failure)):
        write_half()
    assert os.listdir(tmp_path) == ["folder"] * replace
    assert not replace or os.listdir(tmp_path / "folder") == ["old"]


def test_a_folder_replaces_another(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "model", replace=True) as folder:
            (folder / content).mkdir()
    assert os.listdir(tmp_path / "model") == ["new"]
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_that_cannot_be_deleted_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    (tmp_path / "folder" / "content").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", busy)
        with pytest.warns(UserWarning, match="Device or resource busy"):
            remove_folder(tmp_path / "folder")
    (left,) = os.listdir(tmp_path)
    assert left.endswith(".tmp")
    delete_temporary(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "result.bin"
    target.write_bytes(b"old")
    if step == "fsync":
        monkeypatch.setattr(files.os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"), atomic_write(target) as file:
        file.write(b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["result.bin"]


def test_unwritable_places_are_output_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for target in (tmp_path, tmp_path / "file" / "below", tmp_path / ("n" * 300)):
        with pytest.raises(OutputError, match="cannot write"), atomic_write(target) as file:
            file.write(b"x")
    assert os.listdir(tmp_path) == ["file"]


def test_json_round_trip(tmp_path: Path) -> None:
    data = {"name": "große Katze 🐯", "values": [1, 2.5, None, True]}
    write_json(tmp_path / "data.json", data)
    assert read_json(tmp_path / "data.json") == data


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "data.json", {"value": float("nan")})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\0" * 50, "zero bytes"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n",
            "git-LFS.*123,456 bytes",
        ),
        (b"\n<!DOCTYPE html><html></html>", "HTML"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": 1, "a": 2}', "repeats the key 'a'"),
        (b"[1, 2]", "JSON list"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_bad_json_is_corrupt(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=reason) as caught:
        read_json(path)
    assert "config.json" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_oversized_json_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(files.MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointCorruptError, match="limit for JSON"):
        read_json(path)


def test_missing_json_is_not_found(tmp_path: Path) -> None:
    for path in (tmp_path / "config.json", tmp_path):
        with pytest.raises(CheckpointNotFoundError):
            read_json(path)


@pytest.mark.parametrize(
    "relative",
    [
        "../secret",
        "unet/../../secret",
        "..",
        "/etc/passwd",
        "C:weights",
        "c:/weights",
        "\\\\server\\share",
        "unet\\weights",
        "nul\0byte",
        "half\ud800surrogate",
        "ü" * 128,
        "",
        7,
        None,
    ],
)
def test_unsafe_paths(tmp_path: Path, relative: object) -> None:
    with pytest.raises(UnsafePathError, match=r"index\.json: the path"):
        safe_join(tmp_path, relative, "index.json")


def test_safe_paths(tmp_path: Path) -> None:
    for relative in ("unet", "unet/model.safetensors", "a..b", "große Katze"):
        assert safe_join(tmp_path, relative, "index.json") == tmp_path / relative


def test_symlinks_may_not_leave_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"x")
    (folder / "inside").write_bytes(b"x")
    (folder / "good").symlink_to("inside")
    (folder / "evil").symlink_to("../secret")
    (folder / "loop").symlink_to("loop")
    assert safe_join(folder, "good", "index") == folder / "good"
    with pytest.raises(UnsafePathError, match="symlink"):
        safe_join(folder, "evil", "index")
    with pytest.raises(UnsafePathError):
        safe_join(folder, "loop", "index")


def test_snapshots_of_the_hub_cache_may_link_to_their_own_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abc"
    (snapshot / "unet").mkdir(parents=True)
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir()
    (blobs / "aa").write_bytes(b"x")
    (tmp_path / "secret").write_bytes(b"x")
    (snapshot / "unet" / "config.json").symlink_to("../../../blobs/aa")
    (snapshot / "unet" / "evil.json").symlink_to("../../../../secret")
    for root, prefix in ((snapshot, "unet/"), (snapshot / "unet", "")):
        assert safe_join(root, f"{prefix}config.json", "index").read_bytes() == b"x"
        with pytest.raises(UnsafePathError):
            safe_join(root, f"{prefix}evil.json", "index")


def test_quoted_values_are_short_and_printable() -> None:
    assert quote("a\x1b[31m\n\ud800") == r"'a\x1b[31m\n\ud800'"
    assert len(quote("x" * 10_000)) <= 202
    assert len(quote(list(range(10_000)))) < 200
