"""The commands that begin with an image, and cascades: they draw what the pipelines draw, and record how."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentgen import ImageToImagePipeline, InpaintPipeline, InstructPix2PixPipeline, UpscalePipeline, cli
from latentgen.generation_parameters import GenerationParameters
from tests.conftest import build_pipeline
from tests.pipelines.families import build, save


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model for each command."""
    folder = tmp_path_factory.mktemp("models")
    build_pipeline().save_pretrained(folder / "text2img", safe_serialization=True)
    for name, kind in (("edit", "SD 1.x instruct-pix2pix"), ("upscale", "SD x4 upscaler")):
        made, _ = save(build(kind), folder / f"made {name}")
        shutil.move(made, folder / name)
    (folder / "cascade.json").write_text(
        '{"stages": [{"folder": "text2img", "num_inference_steps": 3},'
        ' {"folder": "upscale", "num_inference_steps": 2, "noise_level": 30, "guidance_scale": 1.0}]}'
    )
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    levels = np.random.default_rng(0).integers(0, 256, (19, 26, 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)
    return path


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    path = tmp_path / "mask.png"
    marked = Image.new("L", (26, 19))
    marked.paste(255, (4, 4, 20, 14))
    marked.save(path)
    return path


def options(model: Path, output: Path) -> list[str]:
    return ["--model", str(model), "--device", "cpu", "--steps", "3", "--seed", "7", "-o", str(output)]


def read(path: Path) -> tuple[GenerationParameters, np.ndarray]:
    with Image.open(path) as image:
        return GenerationParameters.from_text(image.info["parameters"]), np.asarray(image)


@pytest.mark.parametrize(
    ("command", "model", "kind", "given", "arguments", "other"),
    [
        ("img2img", "text2img", ImageToImagePipeline, ["--strength", "0.7"], {"strength": 0.7}, ()),
        (
            "inpaint",
            "text2img",
            InpaintPipeline,
            ["--mask-blur", "1", "--padding-mask-crop", "4"],
            {"mask_blur": 1.0, "padding_mask_crop": 4},
            (("Mask blur", "1"), ("Inpaint area", "Only masked"), ("Masked area padding", "4")),
        ),
        (
            "edit",
            "edit",
            InstructPix2PixPipeline,
            ["--image-guidance", "1.2"],
            {"image_guidance_scale": 1.2},
            (("Image CFG scale", "1.2"),),
        ),
        (
            "upscale",
            "upscale",
            UpscalePipeline,
            ["--noise-level", "30", "--match-input"],
            {"noise_level": 30, "match_input": True},
            (("Noise level", "30"), ("Match input", "True")),
        ),
    ],
)
def test_images_and_parameters_are_those_of_the_pipeline(
    models: Path,
    picture: Path,
    mask: Path,
    tmp_path: Path,
    command: str,
    model: str,
    kind: Any,
    given: list[str],
    arguments: dict[str, Any],
    other: tuple[tuple[str, str], ...],
) -> None:
    out = tmp_path / "out.png"
    inputs = [str(picture), *([str(mask)] if command == "inpaint" else [])]
    prompt = ["--prompt", "a cat"] if command == "upscale" else ["a cat"]
    assert cli.main([command, *inputs, *prompt, *options(models / model, out), *given]) == 0
    parameters, image = read(out)
    assert parameters.other == other
    assert parameters.denoising_strength == {"img2img": 0.7, "inpaint": 1.0}.get(command)
    assert (parameters.height, parameters.width) == image.shape[:2]
    if command == "inpaint":
        arguments = {"mask_image": mask, **arguments}
    pipeline = kind.from_pretrained(models / model, device="cpu")
    expected = pipeline(
        "a cat", image=picture, num_inference_steps=3, seed=7, progress=False, **arguments
    ).images[0]
    np.testing.assert_array_equal(image, np.asarray(expected))


def test_cascade(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    out = tmp_path / "out.png"
    arguments = ["a cat", "--model", ".", "--device", "cpu", "--seed", "7", "-o", str(out)]
    assert cli.main(["cascade", *arguments, "--all-stages", "--steps", "-,3", "--scheduler", "Euler"]) == 0
    first = tmp_path / "out-1-text2img.png"
    assert capsys.readouterr().out.splitlines() == [str(first), str(out)]
    assert read(first)[1].shape == (16, 16, 3)
    parameters, image = read(out)
    assert image.shape == (64, 64, 3)
    assert (parameters.steps, parameters.sampler, parameters.guidance_scale) == (3, "Euler", 1.0)
    assert parameters.model == models.name
    summary = "text2img: 3 steps, Euler, CFG scale 7.5; upscale: 3 steps, Euler, CFG scale 1, noise level 30"
    assert parameters.other == (("Cascade", summary),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["img2img", "nowhere.png", "a cat", "--model", "text2img"], "nowhere.png"),
        (["img2img", "picture.png", "a cat", "--model", "text2img", "--strength", "2"], "strength"),
        (["img2img", "picture.png", "a cat", "--model", "text2img", "--strength", "nan"], "strength"),
        (["inpaint", "picture.png", "nowhere.png", "a cat", "--model", "text2img"], "nowhere.png"),
        (["inpaint", "picture.png", "other.png", "a cat", "--model", "text2img"], "mask_image"),
        (["edit", "picture.png", "make it red"], "InstructPix2PixPipeline"),
        (["edit", "picture.png", "make it red", "--model", "text2img"], "TextToImagePipeline"),
        (["upscale", "picture.png", "--model", "upscale", "--noise-level", "5000"], "noise_level"),
        (["upscale", "picture.png", "--model", "upscale", "--tile", "3"], "tile"),
        (["cascade", "a cat", "--model", "text2img"], "cascade.json"),
        (["cascade", "a cat", "--model", ".", "--steps", "3,4,5"], "--steps"),
        (["cascade", "a cat", "--model", ".", "--steps", "many"], "--steps=many"),
        (["cascade", "a cat", "--model", ".", "--noise-level", "0,x"], "--noise-level=0,x"),
        (["cascade", "a cat", "--model", ".", "--scheduler", "fastest"], "latentgen schedulers"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    models: Path,
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(models)
    shutil.copy(picture, models / "picture.png")
    Image.new("L", (9, 9), 255).save(models / "other.png")
    out = tmp_path / "out.png"
    out.write_bytes(b"old")
    assert cli.main([*arguments, "--device", "cpu", "-o", str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"latentgen: error: [^\n]+\n", printed.err)
    assert message in printed.err
    assert out.read_bytes() == b"old"
