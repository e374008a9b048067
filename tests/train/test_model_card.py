"""The card of a finished model: its code runs, and it tells nothing that it should not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from latentgen.train.config import TrainConfig
from latentgen.train.model_card import write_card
from latentgen.train.trainer import train
from tests.train.recipes import COLOURS, MakeRecipe

ROOT = Path(__file__).parents[2]


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The header and the text."""
    _, header, text = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(header), text


def run_code(code: str, folder: Path) -> None:
    environment = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_code_of_a_text_to_image_model_runs_and_both_libraries_agree(text_to_image_recipe: MakeRecipe):
    config = text_to_image_recipe(
        *(
            "validation.prompts=['red \"disc\"']",
            "validation.num_inference_steps=1",
            "task.guidance_scale=2.5",
        ),
        *("validation.every=2", "task.scheduler.prediction_type=epsilon"),
    )
    model = train(config)
    header, text = card_of(model)
    assert header == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "latentgen"],
    }
    ours, theirs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert 'red "disc"' in ours
    # As many steps for both; their defaults differ.
    run_code(ours.replace("seed=0", "seed=0, num_inference_steps=3"), model)
    with Image.open(model / "result.png") as image:
        drawn = np.asarray(image, np.int16)
    (model / "result.png").unlink()
    run_code(theirs.replace("generator=", "num_inference_steps=3, generator="), model)
    with Image.open(model / "result.png") as image:
        assert np.abs(np.asarray(image, np.int16) - drawn).max() <= 1
    sheet = config.output_dir / "samples" / "step-00000004" / "sheet.png"
    assert (model / "sheet.png").read_bytes() == sheet.read_bytes()
    assert "(sheet.png)" in text


def test_the_code_of_an_autoencoder_runs(autoencoder_recipe: MakeRecipe):
    model = train(autoencoder_recipe("max_steps=1"))
    header, text = card_of(model)
    assert "pipeline_tag" not in header
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        run_code(code, model)


@pytest.mark.parametrize("name", ["upscale_recipe", "paired_recipe"])
def test_the_code_of_image_to_image_models_runs(name: str, request: pytest.FixtureRequest):
    model = train(request.getfixturevalue(name)("max_steps=1"))
    header, text = card_of(model)
    assert header["pipeline_tag"] == "image-to-image"
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for file in ("small.png", "image.png"):
        Image.new("RGB", (16, 16), "red").save(model / file)
    run_code(code.replace("seed=0", "seed=0, num_inference_steps=2"), model)
    assert (model / "result.png").is_file()


def test_it_tells_the_facts_and_neither_captions_nor_folders(
    text_to_image_recipe: MakeRecipe, tmp_path: Path
):
    config = text_to_image_recipe("held_out=0.34", "validation.loss_every=9", "max_steps=2")
    model = train(config)
    _, text = card_of(model)
    assert "| Images | 4 |" in text
    assert "| Steps | 2, 4 images in each |" in text
    assert "| Trained from | random weights |" in text
    assert "| Seed | 5 |" in text
    assert str(tmp_path) not in text
    assert not [colour for colour in COLOURS if f"{colour} disc" in text]
    recipe = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    assert recipe["data"] == {
        "kind": "imagefolder",
        "path": "images",
        "image_size": 16,
        "on_bad_image": "error",
    } | {
        key: recipe["data"][key]
        for key in recipe["data"].keys() - {"kind", "path", "image_size", "on_bad_image"}
    }
    parameters = sum(
        int(np.prod(shape))
        for part in ("unet", "text_encoder")
        for file in (model / part).glob("*.safetensors")
        for shape in _shapes(file)
    )
    assert f"| Learnt | {parameters:,} parameters, averaged over the steps |" in text


def _shapes(file: Path) -> list[tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(file, "np") as tensors:
        return [tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()]  # noqa: SIM118


def adapted(
    tmp_path: Path, recipe: TrainConfig, file: str, init_from: Path | None
) -> tuple[dict[str, Any], str]:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / file).write_bytes(b"")
    write_card(folder, recipe.model_copy(update={"init_from": init_from}), images=20, parameters=8, steps=3)
    return card_of(folder)


@pytest.mark.parametrize(
    ("origin", "base_model", "source"),
    [
        (Path("someone/a-model"), "someone/a-model", '"someone/a-model"'),
        (
            Path("/home/me/.cache/hub/models--someone--a-model/snapshots/abc"),
            "someone/a-model",
            '"someone/a-model"',
        ),
        (Path("/home/me/models/mine"), None, '"path/to/mine"'),
        (None, None, ""),
    ],
)
def test_the_base_of_a_lora_is_named_if_it_is_known(
    origin: Path | None, base_model: str | None, source: str, autoencoder_recipe: MakeRecipe, tmp_path: Path
):
    file = "pytorch_lora_weights.safetensors"
    header, text = adapted(tmp_path, autoencoder_recipe(), file, origin)
    assert header.get("base_model") == base_model
    assert header["tags"] == ["text-to-image", "lora", "latentgen"]
    assert f'TextToImagePipeline.from_pretrained({source}).with_lora("{file}")' in text
    assert f'pipe.load_lora_weights(".", weight_name="{file}")' in text
    assert "/home/me" not in text
