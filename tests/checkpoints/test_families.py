"""The bundled configurations: what they build, counted and named by diffusers and transformers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from latentgen.checkpoints.families import COMPONENT_CLASSES, FAMILIES, MERGES
from latentgen.checkpoints.folder import SCHEDULERS
from latentgen.checkpoints.key_map import ema_key_map, original_key_maps
from latentgen.diffusion.scheduler import Scheduler
from latentgen.models.config import VAEConfig
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import VAEDecoder, VAEEncoder

CONFIGS = Path(__file__).parents[2] / "configs"


def configs_of(family: str) -> dict[str, dict[str, Any]]:
    return FAMILIES[family].component_configs(FAMILIES[family].prediction_type or "v_prediction")


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_unet_is_that_of_diffusers(family: str) -> None:
    from diffusers import UNet2DConditionModel

    config = configs_of(family)["unet"]
    with torch.device("meta"):
        expected = shapes(UNet2DConditionModel.from_config(config))
        found = shapes(UNet(UNetConfig.from_json(config)))
    assert found == expected
    key_map = original_key_maps({"unet": config})["unet"]
    assert key_map.keys() == expected.keys()
    for keys in (key_map, ema_key_map(key_map)):
        assert len({source.key for source in keys.values()}) == len(expected)


@pytest.mark.parametrize("family", ["SD 1.x", "SD 2.x", "SDXL base", "SD x4 upscaler"])
def test_vae_is_that_of_diffusers(family: str) -> None:
    from diffusers import AutoencoderKL

    config = configs_of(family)["vae"]
    with torch.device("meta"):
        expected = shapes(AutoencoderKL.from_config(config))
        fields = VAEConfig.from_json(config)
        found = shapes(VAEEncoder(fields)) | shapes(VAEDecoder(fields))
    assert found == expected
    assert original_key_maps({"vae": config})["vae"].keys() == expected.keys()


@pytest.mark.parametrize("family", ["SD 1.x", "SD 2.x", "SDXL base", "SDXL refiner"])
def test_towers_are_those_of_transformers(family: str) -> None:
    import transformers

    configs = configs_of(family)
    maps = original_key_maps(configs)
    classes = {
        "CLIPTextModel": transformers.CLIPTextModel,
        "CLIPTextModelWithProjection": transformers.CLIPTextModelWithProjection,
    }
    for component in configs.keys() & {"text_encoder", "text_encoder_2"}:
        with torch.device("meta"):
            model = classes[COMPONENT_CLASSES[component][1]](
                transformers.CLIPTextConfig(**configs[component])
            )
        expected = {
            name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": shape
            for name, shape in shapes(model).items()
        }
        assert maps[component].keys() == expected.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_schedulers(family: str) -> None:
    configs = configs_of(family)
    for component in SCHEDULERS:
        if component in configs:
            Scheduler.from_config(configs[component])
    assert ("low_res_scheduler" in configs) == (family == "SD x4 upscaler")
    expected = "v_prediction" if family in ("SD 2.x", "SD x4 upscaler") else "epsilon"
    assert configs["scheduler"]["prediction_type"] == expected


def test_sd2_of_either_prediction_type() -> None:
    family = FAMILIES["SD 2.x"]
    base, v = family.component_configs("epsilon"), family.component_configs("v_prediction")
    assert (base["unet"].pop("sample_size"), v["unet"].pop("sample_size")) == (64, 96)
    assert base["scheduler"].pop("prediction_type") == "epsilon"
    assert v["scheduler"].pop("prediction_type") == "v_prediction"
    assert base == v


def test_zero_terminal_snr() -> None:
    configs = FAMILIES["SDXL base"].component_configs("v_prediction", zero_terminal_snr=True)
    scheduler = Scheduler.from_config(configs["scheduler"])
    assert scheduler.schedule.alphas_cumprod[-1] < 1e-6
    assert configs["scheduler"]["prediction_type"] == "v_prediction"


def test_configurations_are_copies() -> None:
    configs_of("SD 1.x")["unet"]["in_channels"] = 5
    assert configs_of("SD 1.x")["unet"]["in_channels"] == 4


@pytest.mark.slow
def test_a_wheel_holds_the_configurations_and_the_merges(tmp_path: Path) -> None:
    source, root = tmp_path / "source", CONFIGS.parent
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    for name in ("latentgen", "pipelines", "train", "configs"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([sys.executable, *command, str(source)], check=True)
    (wheel,) = tmp_path.glob("latentgen-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"latentgen/configs/{path.relative_to(CONFIGS)}" for path in CONFIGS.rglob("*.json")}
    expected |= {f"latentgen/checkpoints/clip_merges/{name}" for name in (MERGES.name, "NOTICE")}
    assert expected <= names
