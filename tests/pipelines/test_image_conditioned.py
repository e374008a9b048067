"""Inpainting, InstructPix2Pix and upscaling beyond the one image that test_families.py compares with diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentgen import (
    GuidanceOptions,
    InpaintPipeline,
    InstructPix2PixPipeline,
    TextToImagePipeline,
    UpscalePipeline,
    from_diffusers,
)
from latentgen.errors import ConfigError, InputError
from latentgen.prompts import read_weights
from tests.pipelines import drawing
from tests.pipelines.families import arguments, build, composited, save

NAMES = {
    InpaintPipeline: "SD 2.x inpainting",
    InstructPix2PixPipeline: "SD 1.x instruct-pix2pix",
    UpscalePipeline: "SD x4 upscaler",
}


@pytest.fixture(scope="module", params=NAMES)
def theirs(request: pytest.FixtureRequest) -> Any:
    return build(NAMES[request.param])


@pytest.fixture(scope="module")
def ours(theirs: Any) -> Any:
    return from_diffusers(theirs)


def pictures(theirs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of two calls with different images."""
    call = arguments(theirs)[0]
    turned = {key: value.rotate(180) if key == "image" else value for key, value in call.items()}
    return call, turned


def draw(pipeline: Any, prompt: Any = "a red cat", **options: Any) -> np.ndarray:
    return drawing.draw(pipeline, prompt, **options)


def test_every_image_has_its_own_prompt_noise_and_picture(theirs: Any, ours: Any) -> None:
    first, second = pictures(theirs)
    both = {**first, "image": [first["image"], second["image"]]}
    together = draw(ours, ["a cat", "a red dog"], num_images_per_prompt=2, seed=[1, 2, 3, 4], **both)
    alone = [
        draw(ours, "a cat", seed=1, **first),
        draw(ours, "a cat", seed=2, **first),
        draw(ours, "a red dog", seed=3, **second),
        draw(ours, "a red dog", seed=4, **second),
    ]
    for row, image in zip(together, alone, strict=True):
        assert np.abs(row - image[0]).max() <= 1e-3
    assert min(np.abs(together[i] - together[j]).max() for i in range(4) for j in range(i)) > 1e-2


def test_prompts_are_read_and_may_be_given_as_conditioning(theirs: Any, ours: Any) -> None:
    call, _ = pictures(theirs)
    plain = draw(ours, "a (red:1.5) cat", prompt_syntax="plain", **call)
    weighted = draw(ours, "a (red:1.5) cat", **call)
    assert np.abs(weighted - plain).max() > 1e-4
    switched = draw(ours, "a [(red:1.5) cat:dog:9]", prompt_syntax="a1111", **call)
    assert np.abs(switched - weighted).max() <= 1e-6
    conditioning = ours.text_encoder.encode([read_weights("a (red:1.5) cat")])
    assert np.abs(draw(ours, conditioning, **call) - weighted).max() <= 1e-4


def test_without_guidance_there_is_one_row(theirs: Any, ours: Any) -> None:
    call, _ = pictures(theirs)
    inputs = arguments(theirs)[1]
    images = drawing.draw_theirs(theirs, "a red cat", guidance_scale=1.0, **inputs)
    expected = composited(images, inputs)
    assert np.abs(draw(ours, guidance_scale=1.0, **call) - expected).max() <= 1e-4


def test_images_of_any_size_come_back_in_it(theirs: Any, ours: Any) -> None:
    call, _ = pictures(theirs)
    odd = {
        key: value.resize((21, 13)) if isinstance(value, Image.Image) else value
        for key, value in call.items()
    }
    factor = 4 if isinstance(ours, UpscalePipeline) else 1
    assert draw(ours, **odd).shape == (1, 13 * factor, 21 * factor, 3)


def test_instruct_pix2pix_needs_both_scales_for_guidance() -> None:
    theirs = build(NAMES[InstructPix2PixPipeline])
    call, pipeline = arguments(theirs)[0], from_diffusers(theirs)
    plain = draw(pipeline, guidance_scale=1.0, **call)
    assert np.array_equal(draw(pipeline, image_guidance_scale=0.5, **call), plain)
    assert np.abs(draw(pipeline, image_guidance_scale=1.0, **call) - plain).max() > 1e-3
    with pytest.raises(InputError, match="image_guidance_scale=-1"):
        draw(pipeline, image_guidance_scale=-1, **call)
    with pytest.raises(TypeError, match="guidance"):
        draw(pipeline, guidance=GuidanceOptions(rescale=0.7), **call)


@pytest.mark.parametrize("most", ["20", 1000])
def test_a_highest_noise_level_that_is_no_timestep_is_refused(tmp_path: Any, most: object) -> None:
    from latentgen.checkpoints.folder import CheckpointFolder

    folder, _ = save(build(NAMES[UpscalePipeline]), tmp_path)
    opened = CheckpointFolder.open(folder)
    wrong = CheckpointFolder(folder, {**opened.model_index, "max_noise_level": most})
    with pytest.raises(ConfigError, match="max_noise_level"):
        UpscalePipeline.from_checkpoint(wrong, device="cpu")


def test_a_checkpoint_of_another_kind_names_its_pipeline(theirs: Any, tmp_path: Any) -> None:
    folder, _ = save(theirs, tmp_path)
    with pytest.raises(ConfigError, match=f"load it with {type(from_diffusers(theirs)).__name__}"):
        TextToImagePipeline.from_pretrained(folder, device="cpu")


def test_stages_of_another_kind_are_refused(ours: Any) -> None:
    with pytest.raises(ConfigError, match=r"TextToImagePipeline .*in_channels 4"):
        TextToImagePipeline(ours.unet, ours.decoder, ours.text_encoder, ours.scheduler)
