"""Single files: every family opens and loads with no network; what is missing, extra or ambiguous is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentgen.checkpoints.families import FAMILIES
from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.checkpoints.key_map import ema_key_map, original_key_maps
from latentgen.checkpoints.single_file import SingleFile, vae_weights, with_vae
from latentgen.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    InputError,
    UnsafeCheckpointError,
)
from latentgen.models.config import CLIPTextConfig, VAEConfig
from latentgen.models.text import CLIPText
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import VAEDecoder, VAEEncoder
from tests.checkpoints.single_files import (
    BUFFERS,
    diffusers_shapes,
    leftovers,
    original_shapes,
    to_original_file,
    write_header,
)

COMPONENTS = ("unet", "vae", "text_encoder")
STATED = {"modelspec.prediction_type": "v"}


@pytest.fixture(scope="module")
def states(tiny_checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    folder = CheckpointFolder.open(tiny_checkpoint)
    result = {component: load_file(folder.weight_files(component)[0]) for component in COMPONENTS}
    tower = result["text_encoder"].items()  # whose prefix transformers 5.6 and later leave out
    return result | {
        "text_encoder": {f"text_model.{name.removeprefix('text_model.')}": t for name, t in tower}
    }


@pytest.fixture(scope="module")
def tensors(tiny_checkpoint: Path, states: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The content of the tiny checkpoint's single file."""
    folder = CheckpointFolder.open(tiny_checkpoint)
    return to_original_file(states, {component: folder.config(component) for component in COMPONENTS})


@pytest.fixture
def single(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def on_meta(module: Any, config: Any) -> Any:
    with torch.device("meta"):
        return module(config)


def load_unet(file: SingleFile) -> UNet:
    unet = on_meta(UNet, UNetConfig.from_json(file.config("unet")))
    file.weights("unet").load_into(unet)
    return unet


def load_decoder(weights: Any, config: dict[str, object]) -> VAEDecoder:
    decoder = on_meta(VAEDecoder, VAEConfig.from_json(config))
    weights.load_into(decoder, ignored_prefixes=("encoder.", "quant_conv."))
    return decoder


def load_text(file: SingleFile) -> CLIPText:
    """As the pipelines do it: a tower of transformers, of whatever release."""
    config = CLIPTextConfig.from_json(file.config("text_encoder"))
    text = CLIPText.from_config(config, file.tokenizer("tokenizer"))
    flat = not any(name.startswith("text_model.") for name in text.model.state_dict())
    file.weights("text_encoder").load_into(
        text.model, rename=lambda name: name.removeprefix("text_model.") if flat else name
    )
    text.model.eval()
    return text


def assert_loaded(module: torch.nn.Module, state: dict[str, Tensor]) -> None:
    found = module.state_dict()
    for name, tensor in found.items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_published_families_open_by_their_headers(tmp_path: Path, family: str) -> None:
    shapes = {**original_shapes(family), **leftovers(family)}
    path = write_header(tmp_path / "model.safetensors", shapes, STATED if family == "SD 2.x" else None)
    file = SingleFile.open(path)
    assert file.family == family
    assert file.model_index["_class_name"] == FAMILIES[family].pipeline_class
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if component in FAMILIES[family].configs:
            found = {name: info.shape for name, info in file.weights(component).tensors().items()}
            assert found == diffusers_shapes(family, component)
        else:
            with pytest.raises(CheckpointNotFoundError, match=component):
                file.weights(component)
    assert set(file.components) == {*FAMILIES[family].configs, *FAMILIES[family].tokenizers}
    assert file.config("scheduler")["_class_name"] == file.components["scheduler"]


def test_weights_are_those_of_the_folder(
    tiny_checkpoint: Path, single: Path, states: dict[str, dict[str, Tensor]]
) -> None:
    file = SingleFile.open(single, config=tiny_checkpoint)
    assert_loaded(load_unet(file), states["unet"])
    assert_loaded(load_decoder(file.weights("vae"), file.config("vae")), states["vae"])
    encoder = on_meta(VAEEncoder, VAEConfig.from_json(file.config("vae")))
    file.weights("vae").load_into(encoder, ignored_prefixes=("decoder.", "post_quant_conv."))
    assert_loaded(encoder, states["vae"])
    assert file.family == "custom"
    assert file.components == CheckpointFolder.open(tiny_checkpoint).components


def test_loading_is_memory_mapped(tiny_checkpoint: Path, single: Path) -> None:
    """Weights share the pages of the file, so all tensors of a component lie in one address range."""
    file = SingleFile.open(single, config=tiny_checkpoint)
    pointers = [tensor.data_ptr() for tensor in load_unet(file).state_dict().values()]
    assert max(pointers) - min(pointers) < single.stat().st_size


@pytest.mark.parametrize("key_prefix", ["state_dict.", "state_dict.state_dict."])
def test_wrapped_keys(
    tmp_path: Path, tiny_checkpoint: Path, tensors: dict[str, Tensor], states: dict, key_prefix: str
) -> None:
    path = tmp_path / "wrapped.safetensors"
    save_file({"global_step": torch.ones(1)} | {key_prefix + key: t for key, t in tensors.items()}, path)
    file = SingleFile.open(path, config=tiny_checkpoint)
    assert_loaded(load_unet(file), states["unet"])
    assert_loaded(load_decoder(vae_weights(path, file.config("vae")), file.config("vae")), states["vae"])


def test_moving_averages(
    tmp_path: Path, tiny_checkpoint: Path, single: Path, tensors: dict[str, Tensor], states: dict
) -> None:
    config = CheckpointFolder.open(tiny_checkpoint).config("unet")
    averages = ema_key_map(original_key_maps({"unet": config})["unet"])
    doubled = {averages[name].key: 2 * tensor for name, tensor in states["unet"].items()}
    save_file({**tensors, **doubled, "model_ema.decay": torch.tensor(0.99)}, tmp_path / "ema.safetensors")
    plain = SingleFile.open(tmp_path / "ema.safetensors", config=tiny_checkpoint)
    assert_loaded(load_unet(plain), states["unet"])
    averaged = SingleFile.open(tmp_path / "ema.safetensors", config=tiny_checkpoint, ema=True)
    assert_loaded(load_unet(averaged), {name: 2 * tensor for name, tensor in states["unet"].items()})
    with pytest.raises(InputError, match="no moving averages"):
        SingleFile.open(single, config=tiny_checkpoint, ema=True)


def test_oldest_names_of_text_encoders(
    tmp_path: Path, tiny_checkpoint: Path, tensors: dict[str, Tensor]
) -> None:
    old = {key.replace("transformer.text_model.", "transformer."): tensor for key, tensor in tensors.items()}
    old["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(old, tmp_path / "old.safetensors")
    save_file(tensors, tmp_path / "new.safetensors")
    first, second = (
        load_text(SingleFile.open(tmp_path / name, config=tiny_checkpoint)).model.state_dict()
        for name in ("old.safetensors", "new.safetensors")
    )
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_missing_components_are_named(
    tmp_path: Path, tiny_checkpoint: Path, tensors: dict[str, Tensor], states: dict
) -> None:
    path, vae = tmp_path / "part.safetensors", tmp_path / "vae.safetensors"
    save_file({key: tensor for key, tensor in tensors.items() if key.startswith("model.")}, path)
    save_file(states["vae"], vae)
    with pytest.raises(CheckpointNotFoundError, match="no vae and no text_encoder"):
        SingleFile.open(path, config=tiny_checkpoint)
    with pytest.raises(CheckpointNotFoundError, match="no text_encoder"):
        SingleFile.open(path, config=tiny_checkpoint, vae=vae)
    save_file({key: tensor for key, tensor in tensors.items() if not key.startswith("first_")}, path)
    with pytest.raises(CheckpointNotFoundError, match=r"no vae.*vae=FILE"):
        SingleFile.open(path, config=tiny_checkpoint)
    file = SingleFile.open(path, config=tiny_checkpoint, vae=vae)
    assert file.weights("vae").files == (vae,)


@pytest.mark.parametrize("layout", ["original", "prefixed", "diffusers", "legacy", "checkpoint"])
def test_vae_files(
    tmp_path: Path, tiny_checkpoint: Path, tensors: dict[str, Tensor], states: dict, layout: str
) -> None:
    prefixed = {key: tensor for key, tensor in tensors.items() if key.startswith("first_stage_model.")}
    legacy = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def legacy_name(name: str) -> str:
        return next(
            (name.replace(f".{new}.", f".{old}.") for new, old in legacy.items() if f".{new}." in name), name
        )

    content = {
        "original": {key.removeprefix("first_stage_model."): tensor for key, tensor in prefixed.items()},
        "prefixed": prefixed,
        "diffusers": states["vae"],
        "legacy": {legacy_name(name): tensor for name, tensor in states["vae"].items()},
        "checkpoint": tensors,
    }[layout]
    if layout == "original":
        content = {**content, "loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    save_file(content, tmp_path / "vae.safetensors")
    checkpoint = with_vae(CheckpointFolder.open(tiny_checkpoint), tmp_path / "vae.safetensors")
    config = checkpoint.config("vae")
    assert_loaded(load_decoder(checkpoint.weights("vae"), config), states["vae"])
    assert checkpoint.weights("unet") == CheckpointFolder.open(tiny_checkpoint).weights("unet")


def test_other_files_are_no_vae(tmp_path: Path, tiny_checkpoint: Path, states: dict) -> None:
    folder = CheckpointFolder.open(tiny_checkpoint)
    save_file(states["unet"], tmp_path / "unet.safetensors")
    with pytest.raises(InputError, match=r"is a UNet, custom .* not a VAE"):
        with_vae(folder, tmp_path / "unet.safetensors")
    shapes = original_shapes("SD 1.x", "vae")
    shapes = {key.removeprefix("first_stage_model."): shape for key, shape in shapes.items()}
    other = write_header(tmp_path / "vae.safetensors", {**shapes, "decoder.more.weight": (3,)})
    with pytest.raises(CheckpointMismatchError, match=r"\(decoder"):
        with_vae(folder, other)


def test_extra_keys_are_listed(tmp_path: Path) -> None:
    shapes = {**original_shapes("SD 1.x"), **{f"stray.{i}": (1,) for i in range(7)}}
    with pytest.raises(CheckpointMismatchError, match=r"7 keys .*\(stray\.0;.*stray\.4; \.\.\."):
        SingleFile.open(write_header(tmp_path / "model.safetensors", shapes))


def test_missing_keys_leave_the_module_untouched(
    tmp_path: Path, tiny_checkpoint: Path, tensors: dict[str, Tensor]
) -> None:
    key = "model.diffusion_model.out.2.bias"
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, tmp_path / "cut.safetensors")
    file = SingleFile.open(tmp_path / "cut.safetensors", config=tiny_checkpoint)
    unet = on_meta(UNet, UNetConfig.from_json(file.config("unet")))
    with pytest.raises(CheckpointMismatchError, match=r"1 missing \(conv_out\.bias\)"):
        file.weights("unet").load_into(unet)
    assert all(tensor.is_meta for tensor in unet.state_dict().values())


@pytest.mark.parametrize(
    ("metadata", "argument", "expected"),
    [
        ({"modelspec.prediction_type": "v"}, None, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, None, "epsilon"),
        ({}, "epsilon", "epsilon"),
        ({}, "v_prediction", "v_prediction"),
        ({"modelspec.prediction_type": "v"}, "epsilon", "epsilon"),
    ],
)
def test_prediction_type_of_sd2(tmp_path: Path, metadata: dict, argument: Any, expected: str) -> None:
    path = write_header(tmp_path / "sd2.safetensors", original_shapes("SD 2.x"), metadata)
    file = SingleFile.open(path, prediction_type=argument)
    assert file.config("scheduler")["prediction_type"] == expected
    assert file.config("unet")["sample_size"] == (64 if expected == "epsilon" else 96)


def test_undeclared_prediction_type_of_sd2(tmp_path: Path) -> None:
    path = write_header(tmp_path / "sd2.safetensors", original_shapes("SD 2.x"))
    with pytest.raises(
        InputError, match=r'give prediction_type="v_prediction" .* or prediction_type="epsilon"'
    ):
        SingleFile.open(path)
    with pytest.raises(InputError, match="'velocity' is not one of epsilon, v_prediction"):
        SingleFile.open(path, prediction_type="velocity")  # pyright: ignore[reportArgumentType]


def test_sdxl_of_v_prediction(tmp_path: Path) -> None:
    shapes = {**original_shapes("SDXL base"), "v_pred": (1,), "ztsnr": (1,)}
    config = SingleFile.open(write_header(tmp_path / "xl.safetensors", shapes)).config("scheduler")
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", True)
    path = write_header(tmp_path / "xl.safetensors", original_shapes("SDXL base"))
    assert SingleFile.open(path).config("scheduler")["prediction_type"] == "epsilon"


def test_tokenizers(tmp_path: Path, tiny_checkpoint: Path, single: Path) -> None:
    file = SingleFile.open(write_header(tmp_path / "xl.safetensors", original_shapes("SDXL base")))
    assert file.tokenizer("tokenizer").pad_token_id == 49407
    assert file.tokenizer("tokenizer_2").pad_token_id == 0
    own = SingleFile.open(single, config=tiny_checkpoint).tokenizer("tokenizer")
    assert len(own) < 1000
    with pytest.raises(CheckpointNotFoundError, match="'tokenizer_3'"):
        file.tokenizer("tokenizer_3")
    with pytest.raises(InputError, match="variant 'fp16'"):
        file.weights("unet", "fp16")


def test_other_files_are_named(tmp_path: Path, single: Path, states: dict) -> None:
    save_file(states["unet"], tmp_path / "unet.safetensors")
    with pytest.raises(InputError, match=r"is a UNet, custom .*; give a whole checkpoint"):
        SingleFile.open(tmp_path / "unet.safetensors")
    with pytest.raises(InputError, match=r"unknown architecture"):
        SingleFile.open(write_header(tmp_path / "x.safetensors", {"a": (1,)}))
    with pytest.raises(InputError, match=r"custom, not one of SD 1\.x.*give config=FOLDER"):
        SingleFile.open(single)
    (tmp_path / "model.ckpt").write_bytes(b"PK")
    with pytest.raises(UnsafeCheckpointError, match="latentgen convert"):
        SingleFile.open(tmp_path / "model.ckpt")
    (tmp_path / "cut.safetensors").write_bytes(single.read_bytes()[:-9])
    with pytest.raises(CheckpointCorruptError, match=r"cut\.safetensors"):
        SingleFile.open(tmp_path / "cut.safetensors")


def test_configurations_are_copies(tmp_path: Path) -> None:
    file = SingleFile.open(
        write_header(tmp_path / "model.safetensors", {**original_shapes("SD 1.x"), **BUFFERS})
    )
    file.config("unet")["in_channels"] = 1
    assert file.config("unet")["in_channels"] == 4
    assert json.loads(json.dumps(file.model_index))["unet"] == ["diffusers", "UNet2DConditionModel"]
