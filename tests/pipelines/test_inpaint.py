"""Inpainting with UNets of four and of nine channels: against diffusers, and to the byte outside of the mask."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image

from latentgen import InpaintPipeline, TextToImagePipeline, from_diffusers, to_diffusers
from latentgen.errors import ConfigError, InputError
from tests.conftest import build_pipeline
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
from tests.pipelines.families import build

SIDE = 16
# PNDM begun midway is an intended departure.
SOLVERS = [
    name for name in SCHEDULERS if name not in ("dpm2_karras", "dpm2_ancestral", "deis", "dpmpp_2m_karras")
]


def marking(box: tuple[int, int, int, int], width: int = SIDE, height: int = SIDE) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


MASKS = [marking((3, 2, 9, 13)), marking((6, 5, 16, 10))]
INPUTS: dict[str, Any] = {"image": PICTURES, "mask_image": MASKS}
INPUT: dict[str, Any] = {"image": PICTURES[0], "mask_image": MASKS[0]}


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
    return diffusers.StableDiffusionInpaintPipeline(**oracle.components, requires_safety_checker=False)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning:diffusers")
class TestAgainstDiffusers:
    @pytest.mark.parametrize(
        ("name", "strength"), [(n, s) for n in SOLVERS for s in (1.0, 0.7) if (n, s) != ("pndm", 0.7)]
    )
    def test_four_channels_give_the_same_latents(
        self, ours: InpaintPipeline, theirs: Any, name: str, strength: float
    ) -> None:
        kwargs: dict[str, Any] = {"strength": strength, "num_inference_steps": 10, "output_type": "latent"}
        expected = draw_theirs(with_solver(theirs, name), PROMPTS, SEEDS, **INPUTS, **kwargs)
        latents = draw(ours, PROMPTS, **INPUTS, **kwargs, scheduler=name)
        # The random UNet leads far beyond the latents of images: 1e-5 of the result is rounding.
        assert difference(latents, expected) <= 1e-5 * max(10.0, np.abs(expected).max())

    @pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
    @pytest.mark.parametrize("strength", [1.0, 0.5])
    def test_the_repainted_part_is_the_same(
        self, either: InpaintPipeline, guidance_scale: float, strength: float
    ) -> None:
        kwargs = {"strength": strength, "guidance_scale": guidance_scale, "num_inference_steps": 10}
        expected = draw_theirs(to_diffusers(either), PROMPTS, SEEDS, **INPUTS, **kwargs)
        images = draw(either, PROMPTS, **INPUTS, **kwargs)
        for index, mask in enumerate(MASKS):
            painted = ~unmasked(mask)
            assert difference(images[index][painted], expected[index][painted]) <= 1e-4


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

    def test_keep_their_value_in_arrays_and_tensors(self, ours: InpaintPipeline) -> None:
        unit = np.random.default_rng(3).random((SIDE, SIDE, 3), dtype=np.float32)
        outside = unmasked(MASKS[0])
        for image, expected in ((PICTURES[0], np.asarray(PICTURES[0], dtype=np.float32) / 255), (unit, unit)):
            kwargs: dict[str, Any] = {"image": image, "mask_image": MASKS[0]}
            assert np.array_equal(draw(ours, **kwargs)[0][outside], expected[outside])
            tensor = draw(ours, **kwargs, output_type="pt")[0].transpose(1, 2, 0)
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
    def test_every_image_has_its_own_prompt_noise_picture_and_mask(self, either: InpaintPipeline) -> None:
        seeds = [1, 2, 3, 4]
        kwargs: dict[str, Any] = {"scheduler": "euler_ancestral", "padding_mask_crop": 1, "strength": 0.8}
        together = draw(either, PROMPTS, **INPUTS, num_images_per_prompt=2, seed=seeds, **kwargs)
        for index, (image, seed) in enumerate(zip(together, seeds, strict=True)):
            inputs = {"image": PICTURES[index // 2], "mask_image": MASKS[index // 2]}
            alone = draw(either, PROMPTS[index // 2], seed=seed, **inputs, **kwargs)
            assert np.abs(image - alone[0]).max() <= 1e-4
        assert min(np.abs(together[i] - together[j]).max() for i in range(4) for j in range(i)) > 1e-2

    def test_the_crop_is_what_the_model_sees(self, ours: InpaintPipeline) -> None:
        image, mask = picture(0, 48, 40), marking((20, 8, 24, 12), 48, 40)
        kwargs: dict[str, Any] = {"mask_image": mask, "padding_mask_crop": 2, "height": 16, "width": 16}
        latents = draw(ours, image=image, output_type="latent", **kwargs)
        assert latents.shape == (1, 4, 8, 8)
        far = np.array(image)
        far[:, 30:] = 0
        assert np.array_equal(draw(ours, image=far, output_type="latent", **kwargs), latents)
        near = np.array(image)
        near[6:8] = 0
        assert not np.array_equal(draw(ours, image=near, output_type="latent", **kwargs), latents)
        # The checkpoint's own size by default.
        default = draw(ours, image=image, mask_image=mask, padding_mask_crop=2, output_type="latent")
        assert default.shape == (1, 4, 8, 8)

    def test_a_mask_smaller_than_a_latent_is_painted(self, either: InpaintPipeline) -> None:
        inputs: dict[str, Any] = {"image": PICTURES[0], "mask_image": marking((3, 3, 4, 4))}
        first, second = (draw(either, **inputs, seed=seed)[0] for seed in (1, 2))
        assert np.abs(first - second)[3, 3].max() > 1e-3

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"mask_image": Image.new("L", (SIDE, SIDE))}, "mask_image 0"),
            ({"strength": 0}, "strength=0"),
            ({"strength": 0.1}, r"strength=0\.1 .*0\.25 "),
            ({"mask_blur": -1}, "mask_blur=-1"),
            ({"padding_mask_crop": -1}, "padding_mask_crop=-1"),
            ({"height": 15}, "height=15 .* 14 or 16"),
        ],
    )
    def test_bad_arguments_are_refused(
        self, ours: InpaintPipeline, kwargs: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            ours.stream("a cat", **INPUT | {"num_inference_steps": 4} | kwargs)

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
