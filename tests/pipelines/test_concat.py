"""Image concatenation: InstructPix2Pix with an image_guidance_scale of 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from latentgen import ConcatImagePipeline, TextToImagePipeline, from_diffusers, to_diffusers
from latentgen.errors import ConfigError, InputError
from tests.conftest import build_pipeline
from tests.pipelines.drawing import PICTURES, PROMPTS, SEEDS, difference, draw, draw_theirs, picture


@pytest.fixture(scope="module")
def theirs() -> Any:
    parts = build_pipeline(in_channels=8).components
    return diffusers.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)


@pytest.fixture(scope="module")
def ours(theirs: Any) -> ConcatImagePipeline:
    return ConcatImagePipeline.from_pipeline(from_diffusers(theirs))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_image_is_that_of_diffusers(
    theirs: Any, ours: ConcatImagePipeline, guidance_scale: float
) -> None:
    kwargs = {"guidance_scale": guidance_scale, "num_inference_steps": 10}
    expected = [
        draw_theirs(theirs, prompt, (seed,), image=image, image_guidance_scale=1.0, **kwargs)[0]
        for prompt, image, seed in zip(PROMPTS, PICTURES, SEEDS, strict=True)
    ]
    assert difference(draw(ours, PROMPTS, image=PICTURES, seed=SEEDS, **kwargs), np.stack(expected)) <= 1e-4


def test_guidance_takes_two_rows_and_none_one(ours: ConcatImagePipeline) -> None:
    rows: list[int] = []
    hook = ours.unet.conv_out.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        draw(ours, "a cat", image=PICTURES[0], num_inference_steps=1)
        draw(ours, "a cat", image=PICTURES[0], num_inference_steps=1, guidance_scale=1)
    finally:
        hook.remove()
    assert rows == [2, 1]


def test_without_a_prompt_the_picture_alone_counts(ours: ConcatImagePipeline) -> None:
    first, second = draw(ours, "", image=PICTURES, seed=[1, 1])
    assert np.abs(first - second).max() > 1e-3
    assert np.abs(draw(ours, "", image=PICTURES[0], seed=1, guidance_scale=1)[0] - first).max() <= 1e-4


def test_any_size_comes_back_with_previews(ours: ConcatImagePipeline) -> None:
    steps = list(ours.stream(image=picture(0, 21, 13), num_inference_steps=2, progress=False))
    assert [step.images()[0].size for step in steps] == [(21, 13), (21, 13)]  # type: ignore[union-attr]


def test_folders_and_live_pipelines_go_to_diffusers(ours: ConcatImagePipeline, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path)
    again = ConcatImagePipeline.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert np.array_equal(draw(again, image=PICTURES[0]), draw(ours, image=PICTURES[0]))
    assert type(to_diffusers(ours)) is diffusers.StableDiffusionInstructPix2PixPipeline
    diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path, safety_checker=None)


def test_what_does_not_fit_is_refused(ours: ConcatImagePipeline, pipeline: TextToImagePipeline) -> None:
    with pytest.raises(ConfigError, match=r"ConcatImagePipeline .*in_channels 8"):
        ConcatImagePipeline.from_pipeline(pipeline)
    with pytest.raises(InputError, match="image "):
        ours.stream(image=3)  # type: ignore[arg-type]


def test_the_old_name_still_works() -> None:
    with pytest.warns(FutureWarning, match="ConcatImagePipeline"):
        from latentgen import PairedImagePipeline
    assert PairedImagePipeline is ConcatImagePipeline
