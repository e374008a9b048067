"""Inpainting with UNets of four and of nine channels: against diffusers, and to the byte outside of the mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latentgen import InpaintPipeline, TextToImagePipeline, from_diffusers, to_diffusers
from latentgen.errors import ConfigError, InputError
from latentgen.pipelines.images import as_images, encode_images
from latentgen.pipelines.vae_ops import decode_images, to_unit
from tests.conftest import build_pipeline
from tests.pipelines.families import build
from tests.pipelines.sdxl import build_base

PROMPTS = ["a cat", "tiger, red dog"]
SEEDS = (7, 8)
SIDE = 16
SCHEDULERS: dict[str, tuple[type, dict[str, object]]] = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "ddpm": (diffusers.DDPMScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2s": (diffusers.DPMSolverSinglestepScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
}


def picture(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def marking(box: tuple[int, int, int, int], width: int = SIDE, height: int = SIDE) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


PICTURES = [picture(0), picture(1)]
MASKS = [marking((3, 2, 9, 13)), marking((6, 5, 16, 10))]
SHOWN: dict[str, Any] = {"image": PICTURES, "mask_image": MASKS}


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipeline: Any, prompt: str | list[str] = "a cat", **given: Any) -> np.ndarray:
    options: dict[str, Any] = {"num_inference_steps": 4, "seed": 7, "output_type": "np", "progress": False}
    return np.asarray(pipeline(prompt, **options | given).images)


def draw_theirs(pipe: Any, **given: Any) -> np.ndarray:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    options: dict[str, Any] = {"num_inference_steps": 10, "output_type": "latent"}
    return np.asarray(pipe(PROMPTS, generator=generators, **options | SHOWN | given).images)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.01
    return float(np.abs(ours - theirs).max())


def unmasked(mask: Image.Image) -> np.ndarray:
    return np.asarray(mask) < 128


@pytest.fixture(scope="module")
def ours(pipeline: TextToImagePipeline) -> InpaintPipeline:
    """Of four channels."""
    return InpaintPipeline.from_pipeline(pipeline)


@pytest.fixture(scope="module")
def nine() -> InpaintPipeline:
    """Of nine channels, over the same VAE."""
    parts = build_pipeline(in_channels=9).components
    return from_diffusers(diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False))


@pytest.fixture(scope="module", params=["four", "nine"])
def either(request: pytest.FixtureRequest, ours: InpaintPipeline, nine: InpaintPipeline) -> InpaintPipeline:
    return ours if request.param == "four" else nine


@pytest.fixture(scope="module")
def theirs(oracle: Any) -> Any:
    return quiet(diffusers.StableDiffusionInpaintPipeline(**oracle.components, requires_safety_checker=False))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning:diffusers")
class TestAgainstDiffusers:
    # PNDM begun midway is an intended departure.
    @pytest.mark.parametrize(
        ("name", "strength"),
        [
            (name, strength)
            for name in SCHEDULERS
            for strength in (1.0, 0.7)
            if (name, strength) != ("pndm", 0.7)
        ],
    )
    def test_four_channels_give_the_same_latents(
        self, ours: InpaintPipeline, theirs: Any, name: str, strength: float
    ) -> None:
        kind, options = SCHEDULERS[name]
        parts = theirs.components | {"scheduler": kind.from_config(theirs.scheduler.config, **options)}  # type: ignore[attr-defined]
        pipe = quiet(type(theirs)(**parts, requires_safety_checker=False))
        given: dict[str, Any] = {"strength": strength, "num_inference_steps": 10, "output_type": "latent"}
        latents = draw(ours, PROMPTS, **SHOWN, **given, scheduler=name)
        expected = draw_theirs(pipe, strength=strength)
        # The random UNet leads far beyond the latents of images: 1e-5 of what it gives is rounding.
        assert difference(latents, expected) <= 1e-5 * max(10.0, np.abs(expected).max())

    @pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
    @pytest.mark.parametrize("strength", [1.0, 0.5])
    def test_what_is_painted_is_the_same(
        self, either: InpaintPipeline, guidance_scale: float, strength: float
    ) -> None:
        given = {"strength": strength, "guidance_scale": guidance_scale, "output_type": "np"}
        expected = draw_theirs(quiet(to_diffusers(either)), **given)
        images = draw(either, PROMPTS, **SHOWN, **given, num_inference_steps=10)
        for index, mask in enumerate(MASKS):
            painted = ~unmasked(mask)
            assert difference(images[index][painted], expected[index][painted]) <= 1e-4

    def test_sdxl(self) -> None:
        base = build_base()
        parts = {key: part for key, part in base.components.items() if part is not None}
        pipe = quiet(diffusers.StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False))
        taken = from_diffusers(pipe)
        assert type(taken) is InpaintPipeline
        latents = draw(taken, PROMPTS, **SHOWN, strength=0.6, num_inference_steps=10, output_type="latent")
        assert difference(latents, draw_theirs(pipe, strength=0.6, height=SIDE, width=SIDE)) <= 1e-4
        assert type(to_diffusers(taken)) is type(pipe)

    def test_folders_go_both_ways(self, ours: InpaintPipeline, tmp_path: Path) -> None:
        ours.save_pretrained(tmp_path)
        again = diffusers.StableDiffusionInpaintPipeline.from_pretrained(tmp_path, safety_checker=None)
        reloaded = InpaintPipeline.from_pretrained(tmp_path, dtype="float32", device="cpu")
        latents = draw(reloaded, PROMPTS, **SHOWN, num_inference_steps=10, output_type="latent")
        assert difference(latents, draw_theirs(quiet(again))) <= 1e-4


class TestUnmaskedPixels:
    @pytest.mark.parametrize("size", [(16, 16), (21, 13), (17, 32)])
    @pytest.mark.parametrize("options", [{}, {"padding_mask_crop": 2}, {"height": 24, "width": 16}])
    def test_are_equal_to_the_byte(
        self, either: InpaintPipeline, size: tuple[int, int], options: dict[str, Any]
    ) -> None:
        image, mask = picture(0, *size), marking((3, 2, 11, 12), *size)
        (result,) = either(
            "a cat", image=image, mask_image=mask, seed=1, num_inference_steps=2, **options
        ).images
        assert isinstance(result, Image.Image)
        assert (result.mode, result.size) == ("RGB", size)
        same = (np.asarray(result) == np.asarray(image)).all(axis=-1)
        assert same[unmasked(mask)].all()
        assert not same[~unmasked(mask)].any()

    @pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA"])
    def test_of_pictures_in_other_modes_are_those_of_their_rgb(
        self, ours: InpaintPipeline, mode: str
    ) -> None:
        image = picture(0).convert(mode)
        (result,) = ours("a cat", image=image, mask_image=MASKS[0], num_inference_steps=2).images
        assert isinstance(result, Image.Image)
        expected = np.asarray(image.convert("RGB"))
        assert np.array_equal(np.asarray(result)[unmasked(MASKS[0])], expected[unmasked(MASKS[0])])

    def test_keep_their_value_in_arrays_and_tensors(self, ours: InpaintPipeline) -> None:
        unit = np.random.default_rng(3).random((SIDE, SIDE, 3), dtype=np.float32)
        outside = unmasked(MASKS[0])
        for image, expected in ((PICTURES[0], np.asarray(PICTURES[0], dtype=np.float32) / 255), (unit, unit)):
            given: dict[str, Any] = {"image": image, "mask_image": MASKS[0]}
            assert np.array_equal(draw(ours, **given)[0][outside], expected[outside])
            tensor = draw(ours, **given, output_type="pt")[0].transpose(1, 2, 0)
            assert np.array_equal(tensor[outside], expected[outside])

    def test_stay_in_previews(self, ours: InpaintPipeline) -> None:
        for step in ours.stream("a cat", image=PICTURES[0], mask_image=MASKS[0], num_inference_steps=3):
            (preview,) = step.images()
            outside = unmasked(MASKS[0])
            assert np.array_equal(np.asarray(preview)[outside], np.asarray(PICTURES[0])[outside])

    def test_a_blur_fades_out_beyond_the_mask(self, ours: InpaintPipeline) -> None:
        image, mask = picture(0, 64, 32), marking((20, 0, 40, 32), 64, 32)
        hard, soft = (draw(ours, image=image, mask_image=mask, mask_blur=blur)[0] for blur in (0, 2.0))
        original = np.asarray(image, dtype=np.float32) / 255
        assert np.array_equal(soft[:, :14], original[:, :14])
        assert np.array_equal(soft[:, 46:], original[:, 46:])
        np.testing.assert_allclose(soft[:, 27:33], hard[:, 27:33], atol=1e-3)
        # Beside the border it is half of each, as the decoder has them.
        assert np.abs(soft[:, 17:20] - original[:, 17:20]).mean() > 0
        assert (
            np.abs(soft[:, 20:23] - original[:, 20:23]).mean()
            < np.abs(hard[:, 20:23] - original[:, 20:23]).mean()
        )


class TestCalls:
    def test_what_is_marked_depends_on_the_rest(self, either: InpaintPipeline) -> None:
        changed = np.array(PICTURES[0])
        changed[unmasked(MASKS[0])] = 255 - changed[unmasked(MASKS[0])]
        first = draw(either, image=PICTURES[0], mask_image=MASKS[0])[0]
        second = draw(either, image=changed, mask_image=MASKS[0])[0]
        painted = ~unmasked(MASKS[0])
        assert np.abs(first[painted] - second[painted]).max() > 1e-3

    def test_every_image_has_its_own_prompt_noise_picture_and_mask(self, either: InpaintPipeline) -> None:
        seeds = [1, 2, 3, 4]
        given: dict[str, Any] = {"scheduler": "euler_ancestral", "padding_mask_crop": 1, "strength": 0.8}
        together = draw(either, PROMPTS, **SHOWN, num_images_per_prompt=2, seed=seeds, **given)
        for index, (image, seed) in enumerate(zip(together, seeds, strict=True)):
            shown = {"image": PICTURES[index // 2], "mask_image": MASKS[index // 2]}
            alone = draw(either, PROMPTS[index // 2], seed=seed, **shown, **given)
            assert np.abs(image - alone[0]).max() <= 1e-4
        assert min(np.abs(together[i] - together[j]).max() for i in range(4) for j in range(i)) > 1e-2

    def test_one_picture_with_several_prompts(self, either: InpaintPipeline) -> None:
        shown: dict[str, Any] = {"image": PICTURES[0], "mask_image": MASKS[0]}
        together = draw(either, PROMPTS, **shown, seed=[1, 2])
        assert np.abs(together[1] - draw(either, PROMPTS[1], **shown, seed=2)[0]).max() <= 1e-4

    def test_little_strength_keeps_what_the_mask_covers(self, either: InpaintPipeline) -> None:
        image = Image.new("RGB", (SIDE, SIDE), (200, 30, 90))
        mean = encode_images(either.encoder(), as_images("image", image), either.device, 1).mean
        through = to_unit(decode_images(either.decoder, mean, either.device, either.memory))
        painted = ~unmasked(MASKS[0])
        changes = [
            np.abs(images[0].transpose(1, 2, 0) - through[0].permute(1, 2, 0).numpy())[painted].mean()
            for images in (
                draw(
                    either,
                    image=image,
                    mask_image=MASKS[0],
                    strength=strength,
                    num_inference_steps=20,
                    output_type="pt",
                )
                for strength in (0.05, 1.0)
            )
        ]
        assert changes == sorted(changes)

    def test_the_crop_is_what_the_model_sees(self, ours: InpaintPipeline) -> None:
        image, mask = picture(0, 48, 40), marking((20, 8, 24, 12), 48, 40)
        given: dict[str, Any] = {"mask_image": mask, "padding_mask_crop": 2, "height": 16, "width": 16}
        latents = draw(ours, image=image, output_type="latent", **given)
        assert latents.shape == (1, 4, 8, 8)
        far = np.array(image)
        far[:, 30:] = 0
        assert np.array_equal(draw(ours, image=far, output_type="latent", **given), latents)
        near = np.array(image)
        near[6:8] = 0
        assert not np.array_equal(draw(ours, image=near, output_type="latent", **given), latents)
        # The checkpoint's own size by default.
        assert draw(ours, image=image, mask_image=mask, padding_mask_crop=2, output_type="latent").shape == (
            1,
            4,
            8,
            8,
        )

    def test_a_mask_smaller_than_a_latent_is_painted(self, either: InpaintPipeline) -> None:
        shown: dict[str, Any] = {"image": PICTURES[0], "mask_image": marking((3, 3, 4, 4))}
        first, second = (draw(either, **shown, seed=seed)[0] for seed in (1, 2))
        assert np.abs(first - second)[3, 3].max() > 1e-3

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"mask_image": Image.new("L", (SIDE, SIDE))}, "mask_image 0"),
            ({"strength": 0}, "strength=0"),
            ({"strength": 0.1}, r"strength=0\.1 .*0\.25 "),
            ({"strength": float("nan")}, "strength=nan"),
            ({"mask_blur": -1}, "mask_blur=-1"),
            ({"mask_blur": float("nan")}, "mask_blur=nan"),
            ({"padding_mask_crop": -1}, "padding_mask_crop=-1"),
            ({"padding_mask_crop": 2.5}, "padding_mask_crop=2.5"),
            ({"height": 15}, "height=15 .* 14 or 16"),
        ],
    )
    def test_bad_arguments_are_refused(
        self, ours: InpaintPipeline, given: dict[str, Any], message: str
    ) -> None:
        shown: dict[str, Any] = {"image": PICTURES[0], "mask_image": MASKS[0], "num_inference_steps": 4}
        with pytest.raises(InputError, match=message):
            ours.stream("a cat", **shown | given)

    def test_other_channels_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"InpaintPipeline .*in_channels 9"):
            InpaintPipeline.from_pipeline(from_diffusers(build("SD 1.x instruct-pix2pix")))

    def test_the_embedded_model_paints(self) -> None:
        ours = InpaintPipeline.from_pretrained(device="cpu", dtype="float32")
        image, mask = Image.new("RGB", (64, 64), "white"), marking((16, 16, 48, 48), 64, 64)
        (result,) = ours("tiger face", image=image, mask_image=mask, num_inference_steps=8, seed=1).images
        assert isinstance(result, Image.Image)
        levels = np.asarray(result)
        assert (levels[unmasked(mask)] == 255).all()
        assert levels[~unmasked(mask)].std() > 10
