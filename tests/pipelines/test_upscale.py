"""Upscaling with latents smaller than the input, against a loop over the stages of diffusers, and its arguments."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.large_upscale import border_jumps
from latentgen import UpscalePipeline, from_diffusers, to_diffusers
from latentgen.errors import ConfigError, InputError
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.pipelines.upscale import back_projected, low_res_ratio
from tests.pipelines import drawing
from tests.pipelines.drawing import picture
from tests.pipelines.families import build

STEPS, LEVEL, SCALE = 3, 40, 3.0


@cache
def tiny() -> UpscalePipeline:
    """The tiny x4 upscaler, whose latents have a quarter of its images' side."""
    return from_diffusers(build("SD x4 upscaler"))


def with_unet(**fields: Any) -> UpscalePipeline:
    """The tiny upscaler with another UNet, of random weights."""
    config = UNetConfig.from_json(tiny().unet.config.to_json() | fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        unet = UNet(config).eval().requires_grad_(False)
    stages = tiny()
    return UpscalePipeline(
        unet,
        stages.decoder,
        stages.text_encoder,
        stages.scheduler,
        load_encoder=stages.load_encoder,
        low_res_scheduler=stages.low_res_scheduler,
    )


@pytest.fixture(scope="module")
def x2() -> UpscalePipeline:
    return with_unet(in_channels=16, num_class_embeds=None, class_embed_type="timestep")


def draw(pipeline: UpscalePipeline, **kwargs: Any) -> np.ndarray:
    options = {"num_inference_steps": STEPS, "noise_level": LEVEL, "guidance_scale": SCALE}
    return drawing.draw(pipeline, "a red cat", **options | kwargs)


def space_to_depth(image: torch.Tensor) -> torch.Tensor:
    """Squares of 2x2 pixels of [B, C, 2h, 2w] as channels [B, 4C, h, w], those of one colour together."""
    return torch.stack([image[:, :, y::2, x::2] for y in (0, 1) for x in (0, 1)], dim=2).flatten(1, 2)


@torch.no_grad()
def draw_by_hand(pipeline: UpscalePipeline, image: torch.Tensor) -> np.ndarray:
    """Upscale [1, 3, 2h, 2w] in -1..1 with the modules and schedulers of diffusers."""
    import diffusers

    unet: Any = diffusers.UNet2DConditionModel.from_config(pipeline.unet.config.to_json())
    unet.load_state_dict(pipeline.unet.state_dict())
    theirs = to_diffusers(tiny())
    generator = torch.Generator().manual_seed(7)
    level = torch.tensor([LEVEL])
    noise = torch.randn(image.shape, generator=generator)
    low_res = space_to_depth(theirs.low_res_scheduler.add_noise(image, noise, level))
    scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    scheduler.set_timesteps(STEPS)
    latents = torch.randn((1, 4, image.shape[2] // 2, image.shape[3] // 2), generator=generator)
    embeds = theirs.encode_prompt("a red cat", torch.device("cpu"), 1, True)
    for timestep in scheduler.timesteps:
        sample = torch.cat([latents, low_res], dim=1)
        positive, negative = (
            unet(sample, timestep, context, class_labels=level).sample for context in embeds
        )
        latents = scheduler.step(negative + SCALE * (positive - negative), timestep, latents).prev_sample
    decoded = theirs.vae.decode(latents / theirs.vae.config.scaling_factor).sample
    return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def test_an_image_of_twice_the_latents_side_is_shown_by_space_to_depth(x2: UpscalePipeline) -> None:
    assert (tiny().scale, x2.scale) == (4, 2)
    image = picture(0, 20, 12)
    ours, theirs = draw(x2, image=image), draw_by_hand(x2, as_tensor(image))
    assert ours.shape == (1, 24, 40, 3)
    assert np.abs(ours - theirs).max() <= 1e-4
    assert np.abs(ours - draw(x2, image=picture(1, 20, 12))).max() > 1e-2


def test_sides_that_are_no_multiple_are_padded_and_cropped(x2: UpscalePipeline) -> None:
    image = picture(0, 13, 11)
    padded = F.pad(as_tensor(image), (0, 1, 0, 1), mode="replicate")
    ours = draw(x2, image=image)
    assert ours.shape == (1, 22, 26, 3)
    assert np.abs(ours - draw_by_hand(x2, padded)[:, :22, :26]).max() <= 1e-4
    assert draw(x2, image=picture(0, 1, 1)).shape == (1, 2, 2, 3)


def test_a_level_that_is_no_class_is_bounded_by_the_schedule(x2: UpscalePipeline) -> None:
    assert np.abs(draw(x2, image=picture(0), noise_level=300) - draw(x2, image=picture(0))).max() > 1e-2
    for level in (-1, 351, 20.0):
        with pytest.raises(InputError, match="noise_level"):
            draw(x2, image=picture(0), noise_level=level)
    # diffusers passes over a table beside the other kind of embedding.
    assert with_unet(num_class_embeds=10, class_embed_type="timestep").max_noise_level == 350
    with pytest.raises(ConfigError, match=r"max_noise_level is 350;.* 9,"):
        with_unet(num_class_embeds=10)


def test_saving_and_loading(x2: UpscalePipeline, tmp_path: Any) -> None:
    x2.save_pretrained(tmp_path)
    again = UpscalePipeline.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert again.scale == 2
    # Kernels packed at loading round differently.
    assert np.abs(draw(again, image=picture(0)) - draw(x2, image=picture(0))).max() <= 1e-5


def test_diffusers_is_not_handed_what_it_has_no_pipeline_for(x2: UpscalePipeline) -> None:
    with pytest.raises(InputError, match=r"16 channels \(space-to-depth\)"):
        to_diffusers(x2)


def test_diffusers_decodes_with_the_scaling_factor_of_the_model() -> None:
    stages = tiny()
    factor = stages.decoder.config.scaling_factor
    stages.decoder.config = stages.decoder.config.model_copy(update={"scaling_factor": 0.5})
    try:
        theirs = to_diffusers(stages)
    finally:
        stages.decoder.config = stages.decoder.config.model_copy(update={"scaling_factor": factor})
    assert theirs.vae.config.scaling_factor == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"in_channels": 4}, "in_channels 7 .* 4 and 4"),
        ({"in_channels": 17}, "in_channels 16 .* 17 and 4"),
        ({"in_channels": 31}, "in_channels 31 .* 3 times"),
        ({"class_embed_type": "identity"}, "class_embed_type is 'identity'"),
        ({"num_class_embeds": None}, "class_labels"),
    ],
)
def test_a_unet_that_is_no_upscaler_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_unet(**fields)


def test_the_ratio_is_that_of_the_largest_image_that_the_channels_hold() -> None:
    unet, vae = tiny().unet.config, tiny().decoder.config
    counts = (1, 7, 15, 16, 31, 52)
    ratios = [low_res_ratio(unet.model_copy(update={"in_channels": count}), vae) for count in counts]
    assert ratios == [1, 1, 1, 2, 3, 4]


def smooth(side: int) -> Image.Image:
    """A picture without edges."""
    coarse = np.random.default_rng(1).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("pipeline", [tiny, None])
def test_no_border_of_a_tile_shows(pipeline: Any, x2: UpscalePipeline) -> None:
    upscale, side, tile = x2 if pipeline is None else pipeline(), 96, 32
    image = draw(upscale, image=smooth(side), tile=tile, num_inference_steps=4, guidance_scale=1.0)[0]
    assert image.shape == (side * upscale.scale, side * upscale.scale, 3)
    ratios = border_jumps(image, tile, upscale.scale)
    assert len(ratios) == 2 * 6
    assert max(ratios) <= 1.0


def test_tiles_are_never_larger_than_asked(x2: UpscalePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = []
    step = type(x2.unet).step

    def watched(unet: Any, sample: torch.Tensor, *kwargs: Any) -> torch.Tensor:
        sides.extend(sample.shape[2:])
        return step(unet, sample, *kwargs)

    monkeypatch.setattr(type(x2.unet), "step", watched)
    draw(x2, image=smooth(80), tile=32)
    assert set(sides) == {16}


@pytest.mark.parametrize("tile", [8, 0, 2.5, "large"])
def test_tiles_have_a_smallest_size(tile: Any, x2: UpscalePipeline) -> None:
    with pytest.raises(InputError, match="tile"):
        x2.stream(image=picture(0), tile=tile)


def test_the_result_can_be_made_to_match_the_input(x2: UpscalePipeline) -> None:
    image = smooth(16)
    small = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]

    def distance(result: np.ndarray) -> float:
        return float(np.abs(result[0].reshape(16, 2, 16, 2, 3).mean((1, 3)) - np.asarray(image) / 255).mean())

    plain, matched = draw(x2, image=image), draw(x2, image=image, match_input=True)
    assert distance(matched) < 0.25 * distance(plain)
    expected = back_projected(torch.from_numpy(plain).permute(0, 3, 1, 2), small)
    np.testing.assert_allclose(matched, expected.permute(0, 2, 3, 1).numpy(), atol=1e-6)


def test_what_matches_already_stays() -> None:
    large = torch.rand(4, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    small = F.interpolate(large[::2], (6, 4), mode="area")
    same = large.clone()
    same[1::2] = large[::2]
    torch.testing.assert_close(back_projected(same[::2], small), large[::2], atol=1e-6, rtol=0)
