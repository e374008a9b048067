"""The card of a trained model: its code runs, and it contains nothing private."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.train.config import TrainConfig
from latentgen.train.model_card import write_card
from latentgen.train.trainer import train
from tests.train.finetuning import SIZE, Pictures, folder_of, objective_of, randomize
from tests.train.recipes import COLOURS, MakeRecipe


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The header and the text."""
    _, header, text = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(header), text


def run_code(code: str, folder: Path) -> None:
    """In this process: imports would take most of the time."""
    with contextlib.chdir(folder):
        exec(code, {})


def test_the_code_of_a_text_to_image_model_runs_and_both_libraries_agree(text_to_image_recipe: MakeRecipe):
    config = text_to_image_recipe(
        *("validation.prompts=['red \"disc\"']", "validation.num_inference_steps=1", "validation.every=2"),
        *("task.guidance_scale=2.5", "task.scheduler.prediction_type=epsilon"),
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
    # Both with the same number of steps; their defaults differ.
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


def test_the_card_has_the_facts_but_no_captions_and_no_folders(
    text_to_image_recipe: MakeRecipe, tmp_path: Path
):
    config = text_to_image_recipe("validation_fraction=0.34", "validation.loss_every=9", "max_steps=2")
    model = train(config)
    _, text = card_of(model)
    for fact in ("Images | 4", "Steps | 2, 4 images in each", "Trained from | random weights", "Seed | 5"):
        assert f"| {fact} |" in text
    assert str(tmp_path) not in text
    assert not [colour for colour in COLOURS if f"{colour} disc" in text]
    recipe = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    assert (recipe["data"]["path"], recipe["data"]["image_size"]) == ("images", 16)
    weights = [
        load_file(file) for part in ("unet", "text_encoder") for file in (model / part).glob("*.safetensors")
    ]
    parameters = sum(tensor.numel() for tensors in weights for tensor in tensors.values())
    assert f"| Trained | {parameters:,} parameters, averaged over the steps |" in text


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 2, "train_text_encoder": True},
    "textual_inversion": {"kind": "textual_inversion", "token": "<disc>", "initializer": "cat"},
    "full": {"kind": "full"},
}
TASKS = {
    "sd": ("TextToImagePipeline", "text-to-image"),
    "sdxl": ("TextToImagePipeline", "text-to-image"),
    "inpainting": ("InpaintPipeline", "image-to-image"),
    "instruct": ("InstructPix2PixPipeline", "image-to-image"),
}


def finetuned(tmp_path: Path, base: Path, method: str, **loss: Any) -> Path:
    """A randomly trained model with its card."""
    task = {"kind": "finetune", "method": METHODS[method], "loss": loss}
    captions = ("red <disc>", "a <disc>")
    objective = objective_of(METHODS[method], base, tmp_path, Pictures(captions), loss=loss)
    randomize(objective)
    fields = {
        "output_dir": str(tmp_path),
        "init_from": str(base),
        "task": task,
        "data": {"kind": "imagefolder", "path": str(tmp_path), "image_size": SIZE},
        "batch_size": 2,
        "max_steps": 1,
    }
    folder = tmp_path / "model"
    folder.mkdir()
    objective.save(folder, objective.state_dict())
    config = TrainConfig.model_validate(fields)
    write_card(folder, config, pipeline=objective.pipeline(), images=2, parameters=8, steps=1)
    return folder


def drawn_by(code: str, folder: Path, base: Path) -> np.ndarray:
    """The image of the code of a card."""
    code = code.replace("path/to/", f"{base.parent}/")
    for file in ("image.png", "mask.png"):
        pixels = np.random.default_rng(len(file)).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert("RGB" if file == "image.png" else "1").save(folder / file)
    # Both with the same number of steps; their defaults differ.
    ours = code.replace("seed=0", "seed=0, num_inference_steps=2")
    run_code(ours.replace("generator=generator", "num_inference_steps=2, generator=generator"), folder)
    with Image.open(folder / "result.png") as image:
        drawn = np.asarray(image.convert("RGB"), np.int16)
    (folder / "result.png").unlink()
    return drawn


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", TASKS)
def test_the_code_of_every_finetuned_model_runs_and_both_libraries_agree(
    family: str, method: str, tmp_path: Path
):
    base = folder_of(family)
    folder = finetuned(tmp_path, base, method)
    header, text = card_of(folder)
    pipeline, task = TASKS[family]
    tags = [] if method == "full" else [method]
    assert header["pipeline_tag"] == task
    assert header["tags"] == [task, *tags, "latentgen"]
    ours, theirs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert f"import {pipeline}\n" in ours
    assert ("<disc>" in ours) == ("<disc>" in theirs) == (method == "textual_inversion")
    first, second = (drawn_by(code, folder, base) for code in (ours, theirs))
    # Diffusers does not restore the pixels outside the mask by default.
    if family == "inpainting":
        painted = np.asarray(Image.open(folder / "mask.png"))
        first, second = first[painted], second[painted]
    assert np.abs(first - second).max() <= 1


@pytest.mark.parametrize("method", ["lora", "textual_inversion"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_an_adapter_trained_on_a_rescaled_schedule_is_sampled_with_it(
    family: str, method: str, tmp_path: Path
):
    base = folder_of(family, "v_prediction")
    folder = finetuned(tmp_path, base, method, zero_terminal_snr=True)
    saved = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    assert saved["rescale_betas_zero_snr"] is True
    assert (saved["timestep_spacing"], saved["prediction_type"]) == ("trailing", "v_prediction")
    ours, theirs = re.findall(r"```python\n(.*?)```", card_of(folder)[1], re.DOTALL)
    first, second = (drawn_by(code, folder, base) for code in (ours, theirs))
    assert np.abs(first - second).max() <= 1
    otherwise = drawn_by(ours.replace("scheduler=scheduler, ", ""), folder, base)
    assert np.abs(first - otherwise).max() > 1


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
def test_the_base_of_a_lora_is_named(
    origin: Path | None, base_model: str | None, source: str, lora_recipe: MakeRecipe, tmp_path: Path
):
    file = "pytorch_lora_weights.safetensors"
    recipe = lora_recipe().model_copy(update={"init_from": origin})
    pipeline = TextToImagePipeline.from_pretrained()
    write_card(tmp_path, recipe, pipeline=pipeline, images=20, parameters=8, steps=3)
    header, text = card_of(tmp_path)
    assert header.get("base_model") == base_model
    assert header["tags"] == ["text-to-image", "lora", "latentgen"]
    assert f'TextToImagePipeline.from_pretrained({source}).with_lora("{file}")' in text
    assert f'pipe.load_lora_weights(".", weight_name="{file}")' in text
    assert "/home/me" not in text
