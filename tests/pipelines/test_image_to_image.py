"""Image to image against diffusers, and what it promises besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latentgen import ImageToImagePipeline, TextToImagePipeline, UpscalePipeline, from_diffusers, to_diffusers
from latentgen.errors import ConfigError, InputError
from latentgen.pipelines.images import as_images, encode_images
from latentgen.pipelines.vae_ops import decode_images
from tests.pipelines.drawing import (
    PICTURES,
    PROMPTS,
    SCHEDULERS,
    SEEDS,
    difference,
    draw,
    draw_theirs,
    picture,
    with_solver,
)
from tests.pipelines.families import build, save
from tests.pipelines.sdxl import build_base, build_refiner

# PNDM begun midway is an intended departure.
SOLVERS = [name for name in SCHEDULERS if name not in ("pndm", "dpm2_karras", "dpm2_ancestral", "deis")]


@pytest.fixture(scope="module")
def ours(pipeline: TextToImagePipeline) -> ImageToImagePipeline:
    return ImageToImagePipeline.from_pipeline(pipeline)


@pytest.fixture(scope="module")
def theirs(oracle: Any) -> Any:
    return diffusers.StableDiffusionImg2ImgPipeline(**oracle.components, requires_safety_checker=False)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning:diffusers")
class TestAgainstDiffusers:
    @pytest.mark.parametrize(
        ("name", "strength"),
        [*((name, 0.7) for name in SOLVERS), ("ddim", 0.25), ("heun", 0.1), ("heun", 0.99)],
    )
    def test_every_solver_gives_the_same_image(
        self, ours: ImageToImagePipeline, theirs: Any, name: str, strength: float
    ) -> None:
        kwargs: dict[str, Any] = {"image": PICTURES, "strength": strength, "num_inference_steps": 10}
        expected = draw_theirs(with_solver(theirs, name), PROMPTS, SEEDS, **kwargs)
        assert difference(draw(ours, PROMPTS, scheduler=name, **kwargs), expected) <= 1e-4

    @pytest.mark.parametrize("timesteps", [None, [900, 500, 300, 100]])
    def test_without_guidance_and_with_timesteps(
        self, ours: ImageToImagePipeline, theirs: Any, timesteps: list[int] | None
    ) -> None:
        kwargs: dict[str, Any] = {
            "image": PICTURES,
            "timesteps": timesteps,
            "strength": 0.6,
            "guidance_scale": 1.0,
        }
        expected = draw_theirs(with_solver(theirs, "ddpm"), PROMPTS, SEEDS, **kwargs)
        assert difference(draw(ours, PROMPTS, scheduler="ddpm", **kwargs), expected) <= 1e-4

    @pytest.mark.parametrize("builder", [build_base, build_refiner])
    def test_sdxl_and_its_refiner(self, builder: Any) -> None:
        parts = builder()
        config: dict[str, Any] = {
            "requires_aesthetics_score": builder is build_refiner,
            "force_zeros_for_empty_prompt": bool(parts.config["force_zeros_for_empty_prompt"]),
        }
        absent = ("image_encoder", "feature_extractor")
        components = {key: part for key, part in parts.components.items() if key not in absent}
        pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**components, **config, add_watermarker=False)
        ours = from_diffusers(pipe)
        assert type(ours) is ImageToImagePipeline
        kwargs: dict[str, Any] = {"image": PICTURES, "strength": 0.5, "num_inference_steps": 10}
        assert difference(draw(ours, PROMPTS, **kwargs), draw_theirs(pipe, PROMPTS, SEEDS, **kwargs)) <= 1e-4
        again = to_diffusers(ours)
        assert type(again) is type(pipe)
        assert again.config["requires_aesthetics_score"] == config["requires_aesthetics_score"]

    def test_pipelines_and_folders_go_both_ways(
        self, theirs: Any, ours: ImageToImagePipeline, tmp_path: Path
    ) -> None:
        assert type(from_diffusers(theirs)) is ImageToImagePipeline
        assert type(to_diffusers(ours)) is diffusers.StableDiffusionImg2ImgPipeline
        theirs.save_pretrained(tmp_path / "theirs")
        taken = ImageToImagePipeline.from_pretrained(tmp_path / "theirs", dtype="float32", device="cpu")
        taken.save_pretrained(tmp_path / "ours")
        again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours", safety_checker=None)
        assert type(again) is diffusers.StableDiffusionImg2ImgPipeline
        expected = draw_theirs(again, PROMPTS, SEEDS, image=PICTURES)
        assert difference(draw(taken, PROMPTS, image=PICTURES), expected) <= 1e-4
        TextToImagePipeline.from_pretrained(tmp_path / "ours", device="cpu")


class TestStrength:
    @pytest.mark.parametrize("solver", ["ddim", "euler", "euler_ancestral", "dpmpp_2m_karras", "heun"])
    def test_1_is_text_to_image(
        self, ours: ImageToImagePipeline, pipeline: TextToImagePipeline, solver: str
    ) -> None:
        kwargs = {"scheduler": solver, "seed": [3, 5]}
        expected = draw(pipeline, PROMPTS, height=12, width=20, **kwargs)
        assert np.array_equal(draw(ours, PROMPTS, image=picture(0, 20, 12), strength=1.0, **kwargs), expected)

    def test_1_does_not_need_the_encoder(self, ours: ImageToImagePipeline) -> None:
        hook = ours.encoder().register_forward_pre_hook(lambda *_: pytest.fail("the encoder ran"))
        try:
            draw(ours, image=PICTURES[0], strength=1)
        finally:
            hook.remove()

    def test_0_is_the_image_through_the_autoencoder(self, ours: ImageToImagePipeline) -> None:
        hook = ours.unet.conv_in.register_forward_pre_hook(lambda *_: pytest.fail("the UNet ran"))
        try:
            (step,) = ours.stream("a cat", image=picture(0, 18, 14), strength=0, output_type="pt")
        finally:
            hook.remove()
        assert (step.index, step.total, step.is_last) == (-1, 0, True)
        mean = encode_images(ours.encoder(), as_images("image", picture(0, 18, 14)), ours.device, 1).mean
        assert torch.equal(step.latents, mean)
        expected = decode_images(ours.decoder, mean, ours.device, ours.memory) / 2 + 0.5
        assert torch.equal(torch.as_tensor(step.images()), expected.clamp(0, 1))
        output = ours(PROMPTS, image=PICTURES, strength=0.0, num_images_per_prompt=2, seed=1, progress=False)
        assert output.seeds == (1, 2, 3, 4)
        assert len(output.images) == 4

    @pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan"), "0.5", True, None])
    def test_other_values_are_refused(self, ours: ImageToImagePipeline, strength: Any) -> None:
        with pytest.raises(InputError, match="strength="):
            ours.stream("a cat", image=PICTURES[0], strength=strength)

    def test_too_little_for_a_step_says_what_is_enough(self, ours: ImageToImagePipeline) -> None:
        with pytest.raises(InputError, match=r"strength=0\.19 .*0\.2 "):
            ours.stream("a cat", image=PICTURES[0], strength=0.19, num_inference_steps=5)
        steps = list(ours.stream("a cat", image=PICTURES[0], strength=0.2, num_inference_steps=5))
        assert [(step.index, step.total) for step in steps] == [(0, 1)]


class TestBatches:
    def test_every_image_has_its_own_prompt_noise_and_picture(self, ours: ImageToImagePipeline) -> None:
        kwargs: dict[str, Any] = {"scheduler": "euler_ancestral"}
        seeds = [1, 2, 3, 4]
        together = draw(ours, PROMPTS, image=PICTURES, num_images_per_prompt=2, seed=seeds, **kwargs)
        for index, (image, seed) in enumerate(zip(together, seeds, strict=True)):
            alone = draw(ours, PROMPTS[index // 2], image=PICTURES[index // 2], seed=seed, **kwargs)
            assert np.abs(image - alone[0]).max() <= 1e-4
        assert min(np.abs(together[i] - together[j]).max() for i in range(4) for j in range(i)) > 1e-2

    def test_one_prompt_serves_several_images_and_one_image_several_prompts(
        self, ours: ImageToImagePipeline
    ) -> None:
        together = draw(ours, "a cat", image=PICTURES, seed=[1, 2])
        assert np.abs(together[1] - draw(ours, "a cat", image=PICTURES[1], seed=2)[0]).max() <= 1e-4
        together = draw(ours, PROMPTS, image=PICTURES[0], seed=[1, 2])
        assert np.abs(together[1] - draw(ours, PROMPTS[1], image=PICTURES[0], seed=2)[0]).max() <= 1e-4
        with pytest.raises(InputError, match=r"image .*3 .*2"):
            draw(ours, PROMPTS, image=[*PICTURES, PICTURES[0]])


class TestImages:
    @pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
    def test_any_size_comes_back(self, ours: ImageToImagePipeline, strength: float) -> None:
        assert draw(ours, image=picture(0, 21, 13), strength=strength).shape == (1, 13, 21, 3)

    def test_latents_and_previews_are_given(self, ours: ImageToImagePipeline) -> None:
        latents = ours(
            "a cat", image=PICTURES[0], output_type="latent", num_inference_steps=4, progress=False
        )
        assert isinstance(latents.images, torch.Tensor)
        assert latents.images.shape == (1, 4, 8, 8)
        steps = list(ours.stream("a cat", image=PICTURES[0], strength=0.5, num_inference_steps=4))
        assert [(step.index, step.total, step.is_last) for step in steps] == [(0, 2, False), (1, 2, True)]
        assert all(isinstance(step.images()[0], Image.Image) for step in steps)


class TestLoading:
    def test_a_pipeline_over_the_stages_of_another(self, pipeline: TextToImagePipeline) -> None:
        ours = ImageToImagePipeline.from_pipeline(pipeline)
        assert ours.unet is pipeline.unet
        assert ours.encoder() is pipeline.encoder()
        back = TextToImagePipeline.from_pipeline(ours)
        assert np.array_equal(draw(back), draw(pipeline))
        with pytest.raises(ConfigError, match=r"UpscalePipeline .*in_channels 7"):
            UpscalePipeline.from_pipeline(pipeline)

    def test_fields_of_its_own_are_kept(self) -> None:
        upscaler = from_diffusers(build("SD x4 upscaler"))
        assert UpscalePipeline.from_pipeline(upscaler).low_res_scheduler is upscaler.low_res_scheduler

    @pytest.mark.parametrize("kind", ["SD 1.x", "SDXL refiner"])
    def test_folders_and_single_files_of_text_to_image(self, kind: str, tmp_path: Path) -> None:
        from latentgen.checkpoints.single_file import SingleFile

        pipe = build(kind)
        folder, file = save(pipe, tmp_path)
        kwargs: dict[str, Any] = {"image": picture(0, 64, 64), "strength": 0.5, "num_inference_steps": 4}
        first = ImageToImagePipeline.from_pretrained(folder, dtype="float32", device="cpu")
        checkpoint = SingleFile.open(file, config=folder)
        second = ImageToImagePipeline.from_checkpoint(checkpoint, dtype="float32", device="cpu")
        assert difference(draw(first, **kwargs), draw(second, **kwargs)) <= 1e-5

    def test_the_embedded_model(self) -> None:
        ours = ImageToImagePipeline.from_pretrained(device="cpu", dtype="float32")
        image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
        through = draw(ours, "a cat", image=image, strength=0)
        assert np.abs(through[0] - np.asarray(image) / 255).mean() < 0.05
        assert draw(ours, "a cat", image=image, num_inference_steps=2).shape == (1, 64, 64, 3)
