"""The options of guidance in a whole pipeline, against diffusers where it has them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback

from latentgen import GuidanceOptions, MemoryPolicy, TextToImagePipeline, from_diffusers
from latentgen.errors import InputError
from tests.pipelines import drawing
from tests.pipelines.families import arguments, build


def draw(pipeline: Any, prompt: str | list[str] = "a red cat", **options: Any) -> np.ndarray:
    return drawing.draw(pipeline, prompt, **{"num_inference_steps": 10} | options)


def draw_theirs(oracle: StableDiffusionPipeline, **options: Any) -> np.ndarray:
    return drawing.draw_theirs(oracle, "a red cat", num_inference_steps=10, **options)


def test_rescaling_gives_the_image_of_diffusers(
    pipeline: TextToImagePipeline, oracle: StableDiffusionPipeline
) -> None:
    ours = draw(pipeline, guidance=GuidanceOptions(rescale=0.7))
    assert np.abs(ours - draw_theirs(oracle, guidance_rescale=0.7)).max() <= 1e-4
    assert np.abs(ours - draw(pipeline)).max() > 1e-3


def test_guidance_that_ends_early_gives_the_image_of_diffusers(
    pipeline: TextToImagePipeline, oracle: StableDiffusionPipeline
) -> None:
    ours = draw(pipeline, guidance=GuidanceOptions(interval=(0.0, 0.5)))
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.4)  # after the step of that share
    assert np.abs(ours - draw_theirs(oracle, callback_on_step_end=cutoff)).max() <= 1e-4
    assert np.abs(ours - draw(pipeline)).max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        GuidanceOptions(),
        GuidanceOptions(rescale=0.7, interval=(0.2, 0.8)),
        GuidanceOptions(perpendicular=1.0),
    ],
    ids=["plain", "interval", "perpendicular"],
)
def test_sequential_guidance_gives_the_same_image(
    pipeline: TextToImagePipeline, options: GuidanceOptions
) -> None:
    sparing = replace(pipeline, memory=MemoryPolicy(sequential_guidance=True))
    inputs: dict[str, Any] = {"negative_prompt": ["dog", "tiger"], "guidance": options}
    together = draw(pipeline, ["a cat", "a red dog"], **inputs)
    assert np.abs(draw(sparing, ["a cat", "a red dog"], **inputs) - together).max() <= 1e-4


def test_sequential_guidance_takes_the_image_of_each_branch() -> None:
    theirs = build("SD 1.x instruct-pix2pix")
    inputs = arguments(theirs)[0]
    together = draw(from_diffusers(theirs), **inputs)
    sparing = from_diffusers(theirs, memory=MemoryPolicy(sequential_guidance=True))
    assert np.abs(draw(sparing, **inputs) - together).max() <= 1e-4


def test_fewer_rows_are_computed_outside_of_the_interval(pipeline: TextToImagePipeline) -> None:
    rows: list[int] = []
    hook = pipeline.unet.conv_out.register_forward_hook(
        lambda module, inputs, output: rows.append(len(output))
    )
    try:
        draw(pipeline, guidance=GuidanceOptions(interval=(0.2, 0.5)))
        draw(pipeline, num_inference_steps=1, guidance=GuidanceOptions(perpendicular=1.0))
        draw(pipeline, num_inference_steps=1, guidance_scale=1.0, guidance=GuidanceOptions(perpendicular=1.0))
    finally:
        hook.remove()
    assert rows == [1] * 2 + [2] * 3 + [1] * 5 + [3] + [1]


def test_a_perpendicular_negative_prompt(pipeline: TextToImagePipeline) -> None:
    options = GuidanceOptions(perpendicular=1.0)
    plain = draw(pipeline)
    for same in ("a red cat", ""):
        assert np.abs(draw(pipeline, negative_prompt=same, guidance=options) - plain).max() <= 1e-3
    assert np.abs(draw(pipeline, negative_prompt="tiger", guidance=options) - plain).max() > 1e-3


@pytest.mark.parametrize(
    "fields",
    [
        {"rescale": 1.5},
        {"rescale": True},
        {"rescale": float("nan")},
        {"interval": (0.5, 0.5)},
        {"interval": 0.5},
        {"interval": (0.1, 1.2)},
        {"interval": (0.1, None)},
        {"perpendicular": -1.0},
        {"perpendicular": "1"},
        {"plus_plus": 1},
        {"plus_plus": True, "rescale": 0.5},
    ],
    ids=str,
)
def test_options_out_of_bounds_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(fields))):
        GuidanceOptions(**fields)


def test_what_are_no_options_is_refused(pipeline: TextToImagePipeline) -> None:
    with pytest.raises(InputError, match=r"guidance=7\.5"):
        draw(pipeline, guidance=7.5)


def test_cfg_plus_plus(pipeline: TextToImagePipeline) -> None:
    options = GuidanceOptions(plus_plus=True)
    images = [draw(pipeline, guidance=options, guidance_scale=scale) for scale in (0.0, 0.6, 1.0)]
    assert all(np.isfinite(image).all() for image in images)
    assert min(np.abs(images[1] - images[i]).max() for i in (0, 2)) > 1e-3
    with pytest.raises(InputError, match=r"guidance_scale=7\.5"):
        draw(pipeline, guidance=options)
    with pytest.raises(InputError, match="dpmpp_2m"):
        draw(pipeline, guidance=options, guidance_scale=0.6, scheduler="dpmpp_2m")
