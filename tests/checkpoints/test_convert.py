"""Conversions: pickles by way of the child process, and one precision to another."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentgen.checkpoints import io, unpickle
from latentgen.checkpoints.convert import (
    Conversion,
    DTypeName,
    Writing,
    convert,
    pickle_target,
    write_folder,
    write_single_file,
)
from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.checkpoints.inspection import inspect
from latentgen.checkpoints.single_file import SingleFile
from latentgen.checkpoints.weights import save_weights
from latentgen.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointValueError,
    ConfigError,
    InputError,
    OutputError,
    UnsafeCheckpointError,
)
from latentgen.files import read_json
from tests.checkpoints.pickles import archive, call, legacy, mapping, name, number, tensor, text
from tests.pipelines.sdxl import build_base, build_refiner

DTYPES: dict[DTypeName, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
STATE = {
    "weight": torch.randn(40, 30, generator=torch.Generator().manual_seed(0)),
    "turned": torch.arange(12.0).view(3, 4).T,
    "ids": torch.arange(5),
    "flags": torch.tensor([True, False]),
    "scalar": torch.tensor(0.1, dtype=torch.float64),
}


def cast(state: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {
        key: value.to(dtype) if dtype and value.is_floating_point() else value for key, value in state.items()
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


# The child process


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_to_safetensors(tmp_path: Path, zipped: bool) -> None:
    source = tmp_path / "a folder" / "model.ckpt"
    source.parent.mkdir()
    torch.save({"state_dict": STATE, "epoch": 3}, source, _use_new_zipfile_serialization=zipped)
    dtype: DTypeName | None = "float16" if zipped else None
    result = convert(source, dtype=dtype)
    assert result == Conversion(source.with_suffix(".safetensors"), 5, ("'epoch'",))
    assert_same(load_file(result.path), cast(STATE, torch.float16 if zipped else None))
    assert sorted(os.listdir(source.parent)) == ["model.ckpt", "model.safetensors"]


def test_code_in_a_pickle_is_named_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    attack = mapping({"w": call(name("posix", "system"), text("touch HERE"))})
    Path("model.safetensors").write_bytes(archive(attack))  # identified by its content
    with pytest.raises(UnsafeCheckpointError, match=r"model\.safetensors'.*'posix\.system'"):
        convert("model.safetensors")
    assert os.listdir() == ["model.safetensors"]


MEMORY_BOMBS = {
    "a storage of 10 GB": legacy(mapping({"w": tensor(2_500_000_000, (2_500_000_000,), (1,), legacy=True)})),
    "zeros": archive(b"](" + call(name("builtins", "bytearray"), number(400_000_000)) * 8 + b"e"),
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="address space is limited on Linux alone")
@pytest.mark.parametrize("bomb", MEMORY_BOMBS)
def test_memory_is_bounded(tmp_path: Path, bomb: str) -> None:
    source = tmp_path / "model.pt"
    source.write_bytes(MEMORY_BOMBS[bomb])
    with pytest.raises(CheckpointCorruptError, match=r"memory|MemoryError"):
        convert(source)
    assert os.listdir(tmp_path) == ["model.pt"]


def test_time_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(STATE, tmp_path / "model.pt")
    (tmp_path / "out.safetensors").write_bytes(b"old")
    monkeypatch.setattr(unpickle, "WALL_CLOCK", 1e-3)
    with pytest.raises(CheckpointCorruptError, match=r"took longer than 0\.12 s"):
        convert(tmp_path / "model.pt", tmp_path / "out.safetensors", overwrite=True)
    assert (tmp_path / "out.safetensors").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "out.safetensors"]


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("raise KeyError('inside')", CheckpointCorruptError, "code 1 .*'inside'"),
        ("import os; os.kill(os.getpid(), 9)", CheckpointCorruptError, "code -9"),
        ("sys.stderr.write('[' * 10**6)", CheckpointCorruptError, r"model\.pt"),
        (
            'sys.stderr.write(\'{"error": "Exception", "message": "x"}\')',
            CheckpointCorruptError,
            r"model\.pt",
        ),
        ('sys.stderr.write(\'{"error": "OutputError", "message": "full"}\')', OutputError, "full"),
        ("sys.stderr.write('{\"dropped\": []}')", CheckpointCorruptError, r"model\.pt"),
    ],
)
def test_reports_of_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, error: type[Exception], message: str
) -> None:
    torch.save(STATE, tmp_path / "model.pt")
    monkeypatch.setattr(unpickle, "_START", f"import sys; {script}")
    with pytest.raises(error, match=message):
        convert(tmp_path / "model.pt")
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", CheckpointCorruptError, "empty"),
        (b"<!DOCTYPE html>", CheckpointCorruptError, "HTML"),
        ((40).to_bytes(8, "little") + b'{"w":', InputError, r"rename it to 'model\.safetensors'"),
    ],
)
def test_files_that_are_not_pickles(
    tmp_path: Path, data: bytes, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpickle, "_run_child", None)  # no process is started
    (tmp_path / "model.ckpt").write_bytes(data)
    with pytest.raises(error, match=message):
        convert(tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("v1-5.ckpt", "v1-5.safetensors"),
        ("pytorch_model.bin", "model.safetensors"),
        ("diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model.fp16.safetensors"),
        ("model.safetensors", "model-converted.safetensors"),
    ],
)
def test_default_target(source: str, target: str) -> None:
    assert pickle_target(Path("folder") / source) == Path("folder") / target


# Precision


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES)),
    stored=st.sampled_from(
        [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
    ),
    shapes=st.lists(st.lists(st.integers(1, 7), max_size=3), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    piece=st.sampled_from([8, 64, 2**20]),
)
def test_any_file_has_the_bits_that_torch_casts(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: DTypeName,
    stored: torch.dtype,
    shapes: list[list[int]],
    seed: int,
    piece: int,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"layer.{i}.wéight": torch.randn(shape, generator=generator).to(stored)
        for i, shape in enumerate(shapes)
    }
    state |= {"ids": torch.arange(len(shapes)), "flag": torch.tensor([True])}
    metadata = {"format": "pt", "note": "ünï 🐈"}
    save_file(state, folder / "a.safetensors", metadata)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "PIECE_BYTES", piece)
        result = convert(folder / "a.safetensors", folder / "b.safetensors", dtype=dtype)
    assert result.tensors == len(state)
    assert_same(load_file(result.path), cast(state, DTYPES[dtype]))
    with safe_open(result.path, "pt") as reader:
        assert reader.metadata() == metadata


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70_000.0])
def test_values_that_do_not_fit_are_named_and_nothing_is_written(tmp_path: Path, value: float) -> None:
    state = {"fine": torch.ones(3), "layer.bias": torch.tensor([1.0, value])}
    save_file(state, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"old")
    with pytest.raises(CheckpointValueError, match=r"a\.safetensors': tensor 'layer\.bias'"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype="float16", overwrite=True)
    assert (tmp_path / "b.safetensors").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, with a few files that no pipeline needs."""
    copy = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, copy)
    (copy / "README.md").write_text("words")
    (copy / "unet" / "notes.txt").write_text("words")
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    return copy


def weights(path: Path) -> dict[str, dict[str, Tensor]]:
    return {str(file.relative_to(path)): load_file(file) for file in path.rglob("*.safetensors")}


def test_folder_in_another_precision(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "half"
    result = convert(folder, target, dtype="float16", variant="fp16")
    assert result.path == target
    assert set(result.left_out) == {"README.md", "unet/notes.txt", "unet/diffusion_pytorch_model.bin"}
    old, new = weights(folder), weights(target)
    assert set(new) == {name.replace(".safetensors", ".fp16.safetensors") for name in old}
    for file, state in old.items():
        assert_same(new[file.replace(".safetensors", ".fp16.safetensors")], cast(state, torch.float16))
    assert result.tensors == sum(map(len, new.values()))
    others = {file for file in folder.rglob("*") if file.suffix in (".json", ".txt")}
    copied = {file for file in target.rglob("*") if file.suffix in (".json", ".txt")}
    assert {file.relative_to(target) for file in copied} == {
        file.relative_to(folder) for file in others if file.name != "notes.txt"
    }
    assert all(file.read_bytes() == (folder / file.relative_to(target)).read_bytes() for file in copied)
    assert os.listdir(target.parent) == ["half"]
    assert inspect(target).dtypes == ("F16",)


def test_shards_stay_shards_and_diffusers_loads_them(folder: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="2MB")
    shards = len(list((folder / "unet").glob("*.safetensors")))
    assert shards > 1
    for variant in (None, "bf16"):
        target = tmp_path / f"to-{variant}"
        result = convert(folder, target, dtype="bfloat16", variant=variant)
        assert len(list((target / "unet").glob("*.safetensors"))) == shards
        (index,) = (target / "unet").glob("*.index*.json")
        assert read_json(index)["metadata"] == {
            "total_size": sum(t.numel() * 2 for t in unet.state_dict().values())
        }
        loaded = UNet2DConditionModel.from_pretrained(
            target / "unet", variant=variant, use_safetensors=True, torch_dtype=torch.bfloat16
        )
        assert_same(loaded.state_dict(), cast(unet.state_dict(), torch.bfloat16))
        assert not any(".safetensors" in name for name in result.left_out)


def test_the_only_variant_is_converted(folder: Path, tmp_path: Path) -> None:
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(whole)
    whole.rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    convert(folder, tmp_path / "full", dtype="float32")
    assert_same(load_file(tmp_path / "full" / "unet" / whole.name), cast(state, torch.float32))
    shutil.copy(whole.with_suffix(".fp16.safetensors"), whole.with_suffix(".ema.safetensors"))
    with pytest.raises(CheckpointNotFoundError, match="'ema', 'fp16'"):
        convert(folder, tmp_path / "other", dtype="float32")


def _overflow(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"decoder.conv_in.bias": torch.full((64,), 1e5)}, file)


def _repeat(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    file.unlink()
    files = save_weights(state, file.parent, "diffusion_pytorch_model", max_shard_bytes=2_000_000)
    shutil.copy(files[0], files[-1])


def _only_pickles(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def _escape(folder: Path) -> None:
    index = read_json(folder / "model_index.json") | {"../elsewhere": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))


def _truncate(folder: Path) -> None:
    os.truncate(folder / "text_encoder" / "model.safetensors", 3000)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_overflow, CheckpointValueError, r"decoder\.conv_in\.bias"),
        (_repeat, CheckpointCorruptError, "repeats"),
        (_only_pickles, UnsafeCheckpointError, "latentgen convert"),
        (_escape, CheckpointError, "elsewhere"),
        (_truncate, CheckpointCorruptError, r"model\.safetensors"),
    ],
)
def test_a_folder_is_written_whole_or_not_at_all(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], error: type[CheckpointError], message: str
) -> None:
    damage(folder)
    with pytest.raises(error, match=message):
        convert(folder, tmp_path / "target", dtype="float16")
    assert os.listdir(tmp_path) == ["source"]


# Folders as single files and back


@pytest.fixture(scope="module", params=["sd1", "sdxl", "refiner"])
def any_family(
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


def test_round_trip_is_the_identity(any_family: Path, tmp_path: Path) -> None:
    seen = 0

    def advance(count: int) -> None:
        nonlocal seen
        seen += count

    single = tmp_path / "single.safetensors"
    written = write_single_file(CheckpointFolder.open(any_family), single, Writing(advance=advance))
    assert written.left_out == ()
    with safe_open(single, framework="pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "epsilon"
    assert seen == sum(tensor.nbytes for tensor in weights_of(any_family).values())
    back = tmp_path / "back"
    write_folder(SingleFile.open(single, config=any_family), back, Writing())
    before, after = weights_of(any_family), weights_of(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert CheckpointFolder.open(back).components == CheckpointFolder.open(any_family).components


def test_a_folder_in_half_precision_loads_in_diffusers(any_family: Path, tmp_path: Path) -> None:
    import diffusers

    single = tmp_path / "single.safetensors"
    convert(any_family, single, dtype="float16")
    assert {tensor.dtype for tensor in load_file(single).values()} == {torch.float16}
    file = SingleFile.open(single, config=any_family)
    write_folder(file, tmp_path / "half", Writing(torch.bfloat16, "bf16"))
    assert (tmp_path / "half" / "unet" / "diffusion_pytorch_model.bf16.safetensors").is_file()
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "half", variant="bf16", torch_dtype=torch.bfloat16
    )
    before = load_file(any_family / "unet" / "diffusion_pytorch_model.safetensors")
    assert_same(pipe.unet.state_dict(), {key: value.half().bfloat16() for key, value in before.items()})


@pytest.mark.parametrize(
    ("component", "changes", "error", "named"),
    [
        ("scheduler", {"prediction_type": "sample"}, ConfigError, "'sample'"),
        ("unet", {"cross_attention_dim": 48}, CheckpointMismatchError, "attn2.to_k"),
    ],
)
def test_folders_that_no_single_file_can_hold(
    folder: Path, tmp_path: Path, component: str, changes: dict, error: type[Exception], named: str
) -> None:
    (file,) = (folder / component).glob("*config.json")
    file.write_text(json.dumps(read_json(file) | changes))
    with pytest.raises(error, match=named):
        convert(folder, tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == ["source"]


def test_a_tiny_model_is_of_no_published_family(tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "single.safetensors")
    with pytest.raises(InputError, match=r"not one of SD 1\.x"):
        convert(tmp_path / "single.safetensors", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# Arguments


def test_targets_that_are_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    os.symlink(tmp_path / "a.safetensors", tmp_path / "link.safetensors")
    os.symlink(tiny_checkpoint, tmp_path / "folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_bytes(b"")
    before = sorted(os.listdir(tmp_path))
    for source, target, error, message in (
        ("a.safetensors", "a.safetensors", InputError, "contains"),
        ("a.safetensors", "link.safetensors", InputError, "contains"),
        ("a.safetensors", "b.safetensors", OutputError, "exists.*--force"),
        ("a.safetensors", "new", InputError, "whole checkpoint"),
        ("folder", "b.safetensors", OutputError, "exists.*--force"),
        ("folder", "full", OutputError, "exists"),
        ("folder", "folder", InputError, "folder"),
        ("folder", "folder/inside", InputError, "folder/inside"),
        ("nowhere", "new.safetensors", CheckpointNotFoundError, "nowhere"),
    ):
        for overwrite in (False, True) if error is InputError else (False,):
            with pytest.raises(error, match=message):
                convert(tmp_path / source, tmp_path / target, dtype="float16", overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == before
    shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    convert(tmp_path / "copy", tmp_path / "copy" / "inside.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype="float16", overwrite=True)
    assert load_file(tmp_path / "b.safetensors")["w"].dtype == torch.float16


@pytest.mark.parametrize(
    ("source", "options", "named"),
    [
        *(
            ("a.safetensors", {"dtype": dtype}, "float32, float16, bfloat16")
            for dtype in ("int8", torch.float16, [])
        ),
        ("a.safetensors", {"dtype": "float16", "variant": "fp16"}, "variant"),
        ("a.pt", {"variant": "fp16"}, "variant"),
    ],
)
def test_options_that_are_refused(tmp_path: Path, source: str, options: dict[str, Any], named: str) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=named):
        convert(tmp_path / source, tmp_path / "b.safetensors", **options)
