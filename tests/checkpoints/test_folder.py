"""Folders in the diffusers layout, their shards and variants, and the Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from latentgen.checkpoints import folder as checkpoint
from latentgen.checkpoints.folder import CheckpointFolder, resolve
from latentgen.checkpoints.io import read_header
from latentgen.checkpoints.weights import save_weights
from latentgen.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    ConfigError,
    InputError,
    OfflineError,
    UnsafeCheckpointError,
    UnsafePathError,
)
from latentgen.files import write_json

UNET_FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the shape of a checkpoint: one UNet whose weights are a single small tensor."""
    path = tmp_path / "model"
    write_json(
        path / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.30.0",
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "unet": ["diffusers", "UNet2DConditionModel"],
        },
    )
    write_json(path / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", "sample_size": 8})
    write_json(path / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler"})
    save_weights({"w": torch.ones(3)}, path / "unet", "diffusion_pytorch_model")
    return path


def edit_index(folder: Path, **entries: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **entries}))


def test_folder_written_by_diffusers(tiny_checkpoint: Path) -> None:
    opened = CheckpointFolder.open(tiny_checkpoint)
    assert opened.components == {
        "scheduler": "DDIMScheduler",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
    }
    assert opened.config("unet")["cross_attention_dim"] == 32
    assert opened.config("scheduler")["_class_name"] == "DDIMScheduler"
    assert opened.weight_files("unet") == [tiny_checkpoint / "unet" / UNET_FILE]
    assert opened.weight_files("text_encoder") == [tiny_checkpoint / "text_encoder" / "model.safetensors"]
    assert opened.folder("tokenizer") == tiny_checkpoint / "tokenizer"


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_written_by_diffusers(tmp_path: Path, variant: str | None) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    vae.save_pretrained(tmp_path / "vae", max_shard_size="100KB", variant=variant)
    write_json(tmp_path / "model_index.json", {"vae": ["diffusers", "AutoencoderKL"]})
    files = CheckpointFolder.open(tmp_path).weight_files("vae", variant)
    assert len(files) > 1
    assert {key for file in files for key in read_header(file)} == vae.state_dict().keys()


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_own_shards_load_in_diffusers(tmp_path: Path, variant: str | None) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    vae.save_config(tmp_path)
    state = vae.state_dict()
    files = save_weights(state, tmp_path, "diffusion_pytorch_model", max_shard_bytes=100_000, variant=variant)
    assert len(files) > 1
    loaded = AutoencoderKL.from_pretrained(tmp_path, variant=variant).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_variants(folder: Path) -> None:
    opened = CheckpointFolder.open(folder)
    assert opened.variants("unet") == [None]
    with pytest.raises(CheckpointNotFoundError, match=r"'fp16'.*None"):
        opened.weight_files("unet", "fp16")
    save_weights({"w": torch.ones(3).half()}, folder / "unet", "diffusion_pytorch_model", variant="fp16")
    assert opened.variants("unet") == [None, "fp16"]
    assert opened.weight_files("unet", "fp16") == [folder / "unet/diffusion_pytorch_model.fp16.safetensors"]
    (folder / "unet" / UNET_FILE).unlink()
    with pytest.raises(CheckpointNotFoundError, match="variant='fp16'"):
        opened.weight_files("unet")


def test_pickles_alone_are_refused(folder: Path) -> None:
    (folder / "unet" / UNET_FILE).rename(folder / "unet" / "diffusion_pytorch_model.fp16.bin")
    with pytest.raises(UnsafeCheckpointError, match="latentgen convert"):
        CheckpointFolder.open(folder).weight_files("unet")


def test_missing_parts_are_not_found(folder: Path) -> None:
    opened = CheckpointFolder.open(folder)
    with pytest.raises(CheckpointNotFoundError, match=r"'vae'.*'scheduler', 'unet'"):
        opened.config("vae")
    (folder / "unet" / UNET_FILE).unlink()
    with pytest.raises(CheckpointNotFoundError, match="unet"):
        opened.weight_files("unet")
    shutil.rmtree(folder / "unet")
    with pytest.raises(CheckpointNotFoundError, match=r"config\.json"):
        opened.config("unet")
    with pytest.raises(CheckpointNotFoundError, match="unet"):
        opened.weight_files("unet")


def test_a_folder_without_an_index_is_not_found(folder: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="unet"):
        CheckpointFolder.open(folder / "unet")
    with pytest.raises(CheckpointNotFoundError, match="nothing"):
        CheckpointFolder.open(folder / "nothing")


@pytest.mark.parametrize(
    "entry", [["diffusers"], ["diffusers", 7], ["diffusers", "A", "B"], [None, "A"], [["diffusers", "A"]], []]
)
def test_malformed_components_are_corrupt(folder: Path, entry: object) -> None:
    edit_index(folder, unet=entry)
    with pytest.raises(CheckpointCorruptError, match=r"model_index\.json.*'unet'"):
        CheckpointFolder.open(folder)


@pytest.mark.parametrize("name", ["../unet", "/etc", "C:unet", "a\\b", "nul\0", "a/../../b"])
def test_unsafe_component_names(folder: Path, name: str) -> None:
    edit_index(folder, **{name: ["diffusers", "UNet2DConditionModel"]})
    with pytest.raises(UnsafePathError, match=r"model_index\.json"):
        CheckpointFolder.open(folder)


@pytest.mark.parametrize(
    ("linked", "read"),
    [
        ("unet", CheckpointFolder.open),
        ("unet/config.json", lambda folder: CheckpointFolder.open(folder).config("unet")),
        (f"unet/{UNET_FILE}", lambda folder: CheckpointFolder.open(folder).weight_files("unet")),
    ],
)
def test_links_out_of_the_folder(folder: Path, linked: str, read: Callable[[Path], object]) -> None:
    (folder / linked).rename(folder.parent / "elsewhere")
    (folder / linked).symlink_to(folder.parent / "elsewhere")
    with pytest.raises(UnsafePathError, match="symlink"):
        read(folder)


@pytest.mark.parametrize("name", ["../w.safetensors", "/w.safetensors", "C:w", "a\\b", "nul\0", ""])
def test_unsafe_shard_names(folder: Path, name: str) -> None:
    (folder / "unet" / UNET_FILE).unlink()
    write_json(folder / "unet" / f"{UNET_FILE}.index.json", {"weight_map": {"w": name}})
    with pytest.raises(UnsafePathError, match="weight_map"):
        CheckpointFolder.open(folder).weight_files("unet")


@pytest.mark.parametrize("weight_map", [None, {}, [], {"w": 7}, {"w": ["a"]}])
def test_malformed_shard_indices_are_corrupt(folder: Path, weight_map: object) -> None:
    (folder / "unet" / UNET_FILE).unlink()
    write_json(folder / "unet" / f"{UNET_FILE}.index.json", {"weight_map": weight_map})
    with pytest.raises(CheckpointCorruptError, match="weight_map"):
        CheckpointFolder.open(folder).weight_files("unet")


def test_missing_shards_are_not_found(folder: Path) -> None:
    files = save_weights(
        {"w": torch.ones(3), "v": torch.ones(3)}, folder / "unet", "model", max_shard_bytes=1
    )
    (folder / "unet" / UNET_FILE).unlink()
    opened = CheckpointFolder.open(folder)
    assert opened.weight_files("unet") == files
    files[0].unlink()
    with pytest.raises(CheckpointNotFoundError, match="'model-00001"):
        opened.weight_files("unet")


@pytest.mark.parametrize("place", ["model_index.json", "config.json"])
def test_class_names_come_from_a_closed_list(folder: Path, place: str) -> None:
    if place == "config.json":
        write_json(folder / "unet" / "config.json", {"_class_name": "system"})
    else:
        edit_index(folder, unet=["os", "system"])
    with pytest.raises(ConfigError, match=rf"{place}.*'system'.*UNet2DConditionModel"):
        CheckpointFolder.open(folder).config("unet")


def test_nothing_given_is_the_embedded_default(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    assert checkpoint.EMBEDDED_DEFAULT.parent == Path(checkpoint.__file__).parents[1]
    monkeypatch.setattr(checkpoint, "EMBEDDED_DEFAULT", folder)
    assert resolve(None) == folder


def test_local_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(folder) == folder
    assert resolve(str(folder)) == folder
    monkeypatch.chdir(folder.parent.parent)
    assert resolve(f"{folder.parent.name}/model") == Path(folder.parent.name, "model")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve("~/model") == folder
    with pytest.raises(InputError, match="revision 'main'"):
        resolve(folder, revision="main")


@pytest.mark.parametrize(
    "source", ["nothing", "./a/b", "/a/b", "a/b/c", "../a", "a/..", "nul/\0", "x" * 5000, "~nobody/a"]
)
def test_neither_a_folder_nor_a_hub_id(source: str) -> None:
    with pytest.raises(CheckpointNotFoundError) as caught:
        resolve(source)
    assert len(str(caught.value)) < 600


def test_single_files(folder: Path) -> None:
    with pytest.raises(InputError, match="single file"):
        resolve(folder / "unet" / UNET_FILE)
    (folder / "v1-5.ckpt").write_bytes(b"x")
    with pytest.raises(UnsafeCheckpointError, match=r"latentgen convert .*v1-5\.ckpt"):
        resolve(folder / "v1-5.ckpt")
    with pytest.raises(InputError, match="Hub id"):
        resolve("")


def test_hub_download_asks_for_the_stages_and_the_variant_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def snapshot_download(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(hub_id=hub_id, revision=revision, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("owner/name", revision="v1.0", variant="fp16") == folder
    assert (asked["hub_id"], asked["revision"]) == ("owner/name", "v1.0")
    repository = {
        "model_index.json": True,
        "scheduler/scheduler_config.json": True,
        "tokenizer/vocab.json": True,
        "tokenizer/merges.txt": True,
        "unet/config.json": True,
        "unet/diffusion_pytorch_model.fp16.safetensors": True,
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors": True,
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json": True,
        "text_encoder/model.fp16.safetensors": True,
        "unet/diffusion_pytorch_model.safetensors": False,
        "unet/diffusion_pytorch_model.fp16.bin": False,
        "unet/diffusion_pytorch_model.non_ema.safetensors": False,
        "safety_checker/model.fp16.safetensors": False,
        "v1-5-pruned.safetensors": False,
        "README.md": False,
    }
    matched = set(huggingface_hub.utils.filter_repo_objects(repository, allow_patterns=asked["patterns"]))
    assert matched == {name for name, needed in repository.items() if needed}


def hub_error(kind: type[Exception]) -> Exception:
    """An error of the Hub without the response of its HTTP library, which changes from release to release."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "expected", "reason"),
    [
        (hub_error(RepositoryNotFoundError), CheckpointNotFoundError, "owner/name"),
        (hub_error(GatedRepoError), CheckpointNotFoundError, "license"),
        (LocalEntryNotFoundError("offline"), OfflineError, r"owner/name.*HF_HOME"),
        (ConnectionError("reset"), OfflineError, "ConnectionError"),
    ],
)
def test_hub_failures_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[Exception], reason: str
) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(expected, match=reason):
        resolve("owner/name")


def test_offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OfflineError, match=r"owner/name, revision 'v2'"):
        resolve("owner/name", revision="v2")
