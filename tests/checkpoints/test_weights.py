"""Weights into modules and back: strict, mapped, all or nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentgen.checkpoints import weights
from latentgen.checkpoints.io import MappedFile
from latentgen.checkpoints.weights import Weights, save_weights
from latentgen.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointValueError,
    InputError,
    OutputError,
)


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5))


def build_on_meta() -> nn.Module:
    with torch.device("meta"):
        return build()


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return build().state_dict()


def load_weights(module: nn.Module, files: Sequence[Path], **options: Any) -> None:
    Weights(tuple(files)).load_into(module, **options)


def is_untouched(module: nn.Module) -> bool:
    return all(tensor.is_meta for tensor in module.state_dict().values())


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_round_trip_through_the_meta_device(tmp_path: Path, state: dict[str, Tensor]) -> None:
    (file,) = save_weights(state, tmp_path, "model")
    assert file == tmp_path / "model.safetensors"
    assert_equal(load_file(file), state)
    module = build_on_meta()
    load_weights(module, [file])
    assert_equal(module.state_dict(), state)
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_that_of_the_call_for_floating_point_alone(
    tmp_path: Path, state: dict[str, Tensor], dtype: torch.dtype
) -> None:
    module = build_on_meta()
    load_weights(module, save_weights(state, tmp_path, "model"), dtype=dtype)
    expected = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    assert_equal(module.state_dict(), expected)


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys whose pages are given back."""
    keys: list[str] = []
    release = MappedFile.release

    def record(file: MappedFile, key: str) -> None:
        keys.append(key)
        release(file, key)

    monkeypatch.setattr(MappedFile, "release", record)
    return keys


def test_nothing_is_copied_that_need_not_be(
    tmp_path: Path, state: dict[str, Tensor], released: list[str]
) -> None:
    files = save_weights(state, tmp_path, "model")
    for dtype in (None, torch.float32):
        load_weights(build_on_meta(), files, dtype=dtype)
    assert released == []
    load_weights(build_on_meta(), files, dtype=torch.bfloat16)
    assert sorted(released) == sorted(name for name, tensor in state.items() if tensor.is_floating_point())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_memory_format_is_that_of_the_call_for_kernels_alone(
    tmp_path: Path, state: dict[str, Tensor], released: list[str], dtype: torch.dtype | None
) -> None:
    module, expected = build_on_meta(), build()
    expected.load_state_dict(state)
    expected.to(dtype=dtype, memory_format=torch.channels_last)
    files = save_weights(state, tmp_path, "model")
    load_weights(module, files, dtype=dtype, memory_format=torch.channels_last)
    assert_equal(module.state_dict(), expected.state_dict())
    assert all(
        tensor.stride() == module.state_dict()[name].stride()
        for name, tensor in expected.state_dict().items()
    )
    assert module.state_dict()["0.weight"].is_contiguous(memory_format=torch.channels_last)
    assert dtype is not None or released == ["0.weight"]


def test_channels_last_and_strided_tensors_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.randn(6, 4, 3, 3)
    state = {
        "channels_last": base.to(memory_format=torch.channels_last),
        "strided": base[::2],
        "transposed": base[0, :, :, 0].T,
        "scalar": torch.tensor(2.5),
        "flags": torch.tensor([True, False]),
        "shared": base,
    }
    (file,) = save_weights(state, tmp_path, "model")
    assert_equal(load_file(file), state)


def test_a_loaded_module_survives_saving_over_its_own_files(tmp_path: Path, state: dict[str, Tensor]) -> None:
    files = save_weights(state, tmp_path, "model")
    module = build_on_meta()
    load_weights(module, files)
    mapped = module.state_dict()
    save_weights({name: tensor * 2 for name, tensor in mapped.items()}, tmp_path, "model")
    assert_equal(mapped, state)
    assert_equal(load_file(files[0]), {name: tensor * 2 for name, tensor in state.items()})


def test_shards(tmp_path: Path, state: dict[str, Tensor]) -> None:
    files = save_weights(state, tmp_path, "model", max_shard_bytes=100)
    assert [file.name for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    module = build_on_meta()
    load_weights(module, files)
    assert_equal(module.state_dict(), state)
    with pytest.raises(CheckpointMismatchError, match=r"missing \(2\.weight"):
        load_weights(build_on_meta(), files[:-1])
    with pytest.raises(CheckpointCorruptError, match="repeats"):
        load_weights(build_on_meta(), [*files, tmp_path / "model-00001-of-00003.safetensors"])


def test_saving_replaces_its_own_stem_and_variant_alone(tmp_path: Path, state: dict[str, Tensor]) -> None:
    def names() -> set[str]:
        return set(os.listdir(tmp_path))

    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)} | {"model.safetensors.index.json"}
    half = {f"model.fp16-0000{i}-of-00003.safetensors" for i in (1, 2, 3)} | {
        "model.safetensors.index.fp16.json"
    }
    save_weights(state, tmp_path, "other")
    save_weights(state, tmp_path, "model", max_shard_bytes=100)
    save_weights(state, tmp_path, "model", max_shard_bytes=100, variant="fp16")
    assert names() == {"other.safetensors"} | shards | half
    save_weights(state, tmp_path, "model")
    assert names() == {"other.safetensors", "model.safetensors"} | half
    save_weights(state, tmp_path, "model", variant="fp16")
    assert names() == {"other.safetensors", "model.safetensors", "model.fp16.safetensors"}
    save_weights(state, tmp_path, "model", max_shard_bytes=100)
    assert names() == {"other.safetensors", "model.fp16.safetensors"} | shards


def test_disk_full_keeps_all_old_shards(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = save_weights(state, tmp_path, "model", max_shard_bytes=100)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    calls = []

    def full_at_the_last(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == len(files):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights.os, "fsync", full_at_the_last)
    doubled = {name: tensor * 2 for name, tensor in state.items()}
    with pytest.raises(OutputError, match="No space left"):
        save_weights(doubled, tmp_path, "model", max_shard_bytes=100)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"w": torch.zeros(0)},
        {"w": torch.zeros(2, device="meta")},
        {"w": torch.zeros(2, dtype=torch.complex64)},
    ],
)
def test_what_cannot_be_saved(tmp_path: Path, state: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match="cannot be saved"):
        save_weights(state, tmp_path, "model")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("variant", ["", "../x", "fp16.json", "a b"])
def test_bad_variants(tmp_path: Path, state: dict[str, Tensor], variant: str) -> None:
    with pytest.raises(InputError, match="variant"):
        save_weights(state, tmp_path, "model", variant=variant)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("0.bias", None, r"1 missing \(0\.bias\)"),
        ("more", torch.ones(1), r"1 extra \(more\)"),
        ("2.weight", torch.ones(4, 5), r"1 misshapen \(2\.weight .*\[4, 5\].*\[5, 4\]"),
        ("0.bias", torch.ones(4, dtype=torch.int32), r"1 misshapen \(0\.bias is I32"),
    ],
)
def test_mismatch_leaves_the_module_untouched(
    tmp_path: Path, state: dict[str, Tensor], name: str, value: Tensor | None, reason: str
) -> None:
    damaged = {key: tensor for key, tensor in {**state, name: value}.items() if tensor is not None}
    module = build_on_meta()
    files = save_weights(damaged, tmp_path, "model")
    with pytest.raises(CheckpointMismatchError, match=reason):
        load_weights(module, files)
    assert is_untouched(module)


def test_mismatch_names_five_and_the_likely_architecture(tmp_path: Path) -> None:
    keys = ["conv_in.weight", *(f"down_blocks.{i}.attn2.to_k.weight" for i in range(9))]
    state = {key: torch.ones(2, 768) for key in keys} | {"conv_in.weight": torch.ones(2, 9, 1, 1)}
    files = save_weights(state, tmp_path, "model")
    with pytest.raises(CheckpointMismatchError, match=r"10 extra \(([^;]+; ){5}\.\.\.\)") as caught:
        load_weights(build_on_meta(), files)
    assert "SD 1.x inpainting (9 input channels, context 768)" in str(caught.value)


def test_a_buffer_may_not_stay_on_meta(tmp_path: Path, state: dict[str, Tensor]) -> None:
    module = build_on_meta()
    module.register_buffer("positions", torch.zeros(3, device="meta"), persistent=False)
    files = save_weights(state, tmp_path, "model")
    with pytest.raises(CheckpointMismatchError, match="positions"):
        load_weights(module, files)
    assert is_untouched(module)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]
)
def test_nonfinite_weights_are_named(
    tmp_path: Path, state: dict[str, Tensor], dtype: torch.dtype, value: float
) -> None:
    weight = torch.zeros(5, 4)
    weight[3, 1] = value
    module = build_on_meta()
    files = save_weights({**state, "2.weight": weight.to(dtype)}, tmp_path, "model")
    with pytest.raises(CheckpointValueError, match=r"'2\.weight'"):
        load_weights(module, files)
    assert is_untouched(module)


def test_overflow_of_the_wanted_dtype_is_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    state["0.bias"][1] = -70_000
    files = save_weights(state, tmp_path, "model")
    with pytest.raises(CheckpointValueError, match=r"'0\.bias'.*70000.*torch\.float16"):
        load_weights(build_on_meta(), files, dtype=torch.float16)
    load_weights(build_on_meta(), files, dtype=torch.bfloat16)


def test_prefixes_select_one_part_of_a_file(tmp_path: Path) -> None:
    ours = {"decoder.weight": torch.ones(2, 2), "post.weight": torch.ones(1, 2)}
    files = save_weights({**ours, "encoder.weight": torch.ones(3)}, tmp_path, "model")

    def part() -> nn.Module:
        with torch.device("meta"):
            decoder, post = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
        return nn.ModuleDict({"decoder": decoder, "post": post})

    module = part()
    load_weights(module, files, ignored_prefixes=("encoder.",))
    assert_equal(module.state_dict(), ours)
    with pytest.raises(CheckpointMismatchError, match=r"1 extra \(encoder\.weight\)"):
        load_weights(part(), files)


def test_rename_maps_keys_of_the_file(tmp_path: Path, state: dict[str, Tensor]) -> None:
    files = save_weights({f"old.{name}": tensor for name, tensor in state.items()}, tmp_path, "model")
    module = build_on_meta()
    load_weights(module, files, rename=lambda key: key.removeprefix("old."))
    assert_equal(module.state_dict(), state)
    with pytest.raises(CheckpointCorruptError, match="repeats"):
        load_weights(build_on_meta(), files, rename=lambda key: "0.weight")


@pytest.mark.parametrize("convolutions", [True, False])
def test_legacy_names_of_vae_attention(tmp_path: Path, convolutions: bool) -> None:
    def attention() -> nn.Module:
        parts: dict[str, nn.Module] = {name: nn.Linear(4, 4) for name in ("to_q", "to_k", "to_v")}
        parts["to_out"] = nn.ModuleList([nn.Linear(4, 4)])
        block = nn.ModuleDict({"attentions": nn.ModuleList([nn.ModuleDict(parts)])})
        return nn.ModuleDict({"mid_block": block})

    expected = attention().state_dict()
    legacy = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in expected.items():
        for new_part, old_part in legacy.items():
            name = name.replace(f".{new_part}.", f".{old_part}.")
        old[name] = tensor[:, :, None, None] if convolutions and tensor.ndim == 2 else tensor
    save_file(old, tmp_path / "vae.safetensors")
    with torch.device("meta"):
        module = attention()
    load_weights(module, [tmp_path / "vae.safetensors"])
    assert_equal(module.state_dict(), expected)
