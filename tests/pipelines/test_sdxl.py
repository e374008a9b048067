"""SDXL's base model and its refiner against diffusers, alone and one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers import AysSchedules

from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.errors import ConfigError, InputError
from latentgen.pipelines.size_conditioning import SizeConditioning
from latentgen.pipelines.text_to_image import TextToImagePipeline
from tests.pipelines import drawing
from tests.pipelines.drawing import PROMPTS, SEEDS, with_solver
from tests.pipelines.sdxl import build_base, build_refiner

SOLVERS = ("ddim", "euler", "euler_ancestral", "dpmpp_2m")
OPTIONS: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def base_oracle() -> Any:
    return build_base()


@pytest.fixture(scope="module")
def refiner_oracle() -> Any:
    return build_refiner()


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory, base_oracle: Any) -> Path:
    return saved(base_oracle, tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def base(base_folder: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(base_folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory, refiner_oracle: Any) -> TextToImagePipeline:
    folder = saved(refiner_oracle, tmp_path_factory.mktemp("refiner"))
    return TextToImagePipeline.from_pretrained(folder, dtype="float32", device="cpu")


def saved(oracle: Any, folder: Path) -> Path:
    oracle.save_pretrained(folder, safe_serialization=True)
    return folder


def draw(pipeline: TextToImagePipeline, **arguments: Any) -> Any:
    return drawing.draw(pipeline, PROMPTS, **OPTIONS | arguments)


def draw_oracle(oracle: Any, **arguments: Any) -> Any:
    return drawing.draw_theirs(oracle, PROMPTS, SEEDS, **OPTIONS | arguments)


def assert_same(ours: Any, theirs: Any) -> None:
    assert drawing.difference(ours, theirs) <= 1e-4


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_gives_the_image_of_diffusers(
    base: TextToImagePipeline, base_oracle: Any, name: str
) -> None:
    assert_same(draw(base, scheduler=name), draw_oracle(with_solver(base_oracle, name)))


@pytest.mark.parametrize("by_hand", [{"timesteps": [999, 700, 250, 10]}, {"sigmas": [14.0, 3.0, 0.5, 0.0]}])
def test_runs_by_hand_give_the_image_of_diffusers(
    base: TextToImagePipeline, base_oracle: Any, by_hand: dict[str, list[float]]
) -> None:
    theirs = draw_oracle(with_solver(base_oracle, "euler"), **by_hand)
    assert_same(draw(base, scheduler="Euler", **by_hand), theirs)


def test_align_your_steps_are_those_of_sdxl(base: TextToImagePipeline, base_oracle: Any) -> None:
    theirs = draw_oracle(with_solver(base_oracle, "euler"), sigmas=AysSchedules["StableDiffusionXLSigmas"])
    assert_same(draw(base, scheduler="Euler Align Your Steps", num_inference_steps=10), theirs)


@pytest.mark.parametrize(
    "arguments",
    [
        {"negative_prompt": ["red", ""]},
        {"guidance_scale": 1.0},
        {"height": 24, "width": 40},
        {"clip_skip": 1},
    ],
)
def test_the_arguments_mean_the_same(
    base: TextToImagePipeline, base_oracle: Any, arguments: dict[str, Any]
) -> None:
    assert_same(draw(base, **arguments), draw_oracle(base_oracle, **arguments))


def test_sizes_mean_the_same(base: TextToImagePipeline, base_oracle: Any) -> None:
    sizes: dict[str, Any] = {
        "original_size": (512, 768),
        "crops_coords_top_left": (5, 6),
        "target_size": (100, 200),
    }
    ours = draw(base, size_conditioning=SizeConditioning(**sizes))
    assert_same(ours, draw_oracle(base_oracle, **sizes))
    assert np.abs(ours - draw(base)).max() > 1e-3


def test_no_negative_prompt_is_not_the_empty_one(base: TextToImagePipeline) -> None:
    assert base.force_zeros_for_empty_prompt
    assert np.abs(draw(base) - draw(base, negative_prompt="")).max() > 1e-3


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_the_refiner_continues_where_the_base_stops(
    base: TextToImagePipeline, base_oracle: Any, refiner: TextToImagePipeline, refiner_oracle: Any, name: str
) -> None:
    latents = draw_oracle(with_solver(base_oracle, name), denoising_end=0.7, output_type="latent")
    theirs = draw_oracle(
        with_solver(refiner_oracle, name), denoising_start=0.7, image=torch.from_numpy(latents)
    )
    ours = draw(base, scheduler=name, denoising_end=0.7, output_type="latent")
    assert_same(draw(refiner, scheduler=name, denoising_start=0.7, latents=torch.from_numpy(ours)), theirs)


def test_aesthetic_scores_mean_the_same(refiner: TextToImagePipeline, refiner_oracle: Any) -> None:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    scores = {"aesthetic_score": 7.0, "negative_aesthetic_score": 1.0}
    theirs = draw_oracle(with_solver(refiner_oracle, "ddim"), denoising_start=0.5, image=noise, **scores)
    ours = draw(
        refiner,
        scheduler="ddim",
        denoising_start=0.5,
        latents=noise,
        size_conditioning=SizeConditioning(**scores),
    )
    assert_same(ours, theirs)


def test_two_parts_of_one_model_are_the_whole(base: TextToImagePipeline) -> None:
    first = draw(base, denoising_end=0.6, output_type="latent")
    assert_same(draw(base, denoising_start=0.6, latents=torch.from_numpy(first)), draw(base))


def test_a_part_of_a_stream_counts_its_own_steps(base: TextToImagePipeline) -> None:
    steps = list(base.stream("cat", num_inference_steps=10, denoising_end=0.5, seed=1, progress=False))
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert {step.total for step in steps} == {5}
    assert steps[-1].is_last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"denoising_start": 0.5}, "denoising_start=0.5 .*latents"),
        ({"denoising_end": 0.0}, "denoising_end=0.0"),
        ({"denoising_start": 0.6, "denoising_end": 0.5}, "denoising_start=0.6"),
        ({"denoising_end": 1.5}, "denoising_end=1.5"),
        ({"denoising_start": float("nan")}, "denoising_start=nan"),
        ({"clip_skip": 2}, "at most 1"),
        ({"clip_skip": -1}, "clip_skip"),
        ({"size_conditioning": (1, 2)}, "size_conditioning="),
    ],
)
def test_wrong_arguments_are_named(
    base: TextToImagePipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        draw(base, **arguments)


@pytest.mark.parametrize(
    "fields",
    [
        {"original_size": (0, 5)},
        {"target_size": [5, 5]},
        {"crops_coords_top_left": (1.5, 2)},
        {"aesthetic_score": float("nan")},
        {"negative_aesthetic_score": "6"},
    ],
)
def test_wrong_sizes_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(fields))):
        SizeConditioning(**fields)


def test_stages_of_different_families_are_refused(base: TextToImagePipeline, tiny_checkpoint: Path) -> None:
    other = TextToImagePipeline.from_pretrained(tiny_checkpoint, dtype="float32", device="cpu")
    with pytest.raises(ConfigError, match="context"):
        TextToImagePipeline(base.unet, base.decoder, other.text_encoder, base.scheduler)


def test_a_flag_that_is_none_is_refused(base_folder: Path) -> None:
    from latentgen.pipelines.load_save import forces_zeros

    folder = CheckpointFolder.open(base_folder)
    wrong = CheckpointFolder(folder.path, {**folder.model_index, "force_zeros_for_empty_prompt": "yes"})
    with pytest.raises(ConfigError, match="force_zeros_for_empty_prompt"):
        forces_zeros(wrong)
