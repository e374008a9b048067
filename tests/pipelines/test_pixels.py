"""Text to image on pixels, against a loop by hand over the parts that diffusers and transformers read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from latentgen import cli
from latentgen.errors import CheckpointNotFoundError, ConfigError, InputError
from latentgen.models.pixels import PixelDecoder, PixelEncoder
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.pipelines.cascade import _SEED_STRIDE, CascadePipeline, CascadeStage, StageSettings
from latentgen.pipelines.concat import ConcatImagePipeline
from latentgen.pipelines.image_to_image import ImageToImagePipeline
from latentgen.pipelines.inpaint import InpaintPipeline
from latentgen.pipelines.instruct_pix2pix import InstructPix2PixPipeline
from latentgen.pipelines.interop import to_diffusers
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.pipelines.upscale import UpscalePipeline
from tests.pipelines import drawing

SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": True,
    "steps_offset": 1,
}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a UNet and a scheduler for 8x8 pixels; each part written by the library it is for."""
    folder = tmp_path_factory.mktemp("pixels") / "model"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("vae", "unet", "scheduler"))
    fields = json.loads((tiny_checkpoint / "unet" / "config.json").read_text("utf-8"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        UNet2DConditionModel.from_config({**fields, "in_channels": 3, "out_channels": 3}).save_pretrained(
            folder / "unet"
        )
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    kept = {name: index[name] for name in ("unet", "text_encoder", "tokenizer", "scheduler")}
    entries = {"_class_name": "LatentgenPixelPipeline", "_guidance_scale": 3.0, **kept}
    (folder / "model_index.json").write_text(json.dumps(entries), "utf-8")
    return folder


@pytest.fixture(scope="module")
def pixels(folder: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(folder, dtype="float32", device="cpu")


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy whose files a test may change."""
    return shutil.copytree(folder, tmp_path / "model")


def draw(pipeline: Any, **options: Any) -> np.ndarray:
    return drawing.draw(pipeline, "a cat", **{"num_inference_steps": 5} | options)


def edit(path: Path, **fields: object) -> None:
    entries = json.loads(path.read_text("utf-8")) | fields
    path.write_text(
        json.dumps({name: entry for name, entry in entries.items() if entry is not None}), "utf-8"
    )


@torch.no_grad()
def loop_by_hand(
    folder: Path, start: Tensor, scale: float, cond: Tensor | None = None, level: int | None = None
) -> np.ndarray:
    """Classifier-free guidance over the stages of diffusers and transformers, without any pipeline.

    An upscaler takes the enlarged image `cond` next to the noisy one, and its noise level.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokens = tokenizer(["", "a cat"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    context = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()(tokens).last_hidden_state
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(5)
    x = start * scheduler.init_noise_sigma
    labels = None if level is None else torch.tensor([level] * 2)
    for timestep in scheduler.timesteps:
        sample = x if cond is None else torch.cat([x, cond], dim=1)
        output = unet(torch.cat([sample, sample]), timestep, context, class_labels=labels).sample
        without, with_prompt = output.chunk(2)
        x = scheduler.step(without + scale * (with_prompt - without), timestep, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("size", [(8, 8), (16, 12), (9, 13)])
def test_the_image_is_that_of_a_loop_by_hand(
    folder: Path, pixels: TextToImagePipeline, size: tuple[int, int]
) -> None:
    start = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(7))
    theirs = loop_by_hand(folder, start, scale=3.0)  # the folder's own
    ours = draw(pixels, height=size[0], width=size[1])
    assert ours.shape == theirs.shape == (1, *size, 3)
    assert np.abs(ours - theirs).max() < 1e-4
    assert np.std(theirs) > 0.05


def test_x0_is_clipped_as_the_scheduler_says(broken: Path, pixels: TextToImagePipeline) -> None:
    edit(broken / "scheduler" / "scheduler_config.json", clip_sample=False)
    unclipped = TextToImagePipeline.from_pretrained(broken, dtype="float32", device="cpu")
    assert np.abs(draw(unclipped) - draw(pixels)).max() > 0.01
    *_, last = pixels.stream("a cat", num_inference_steps=5, seed=7, progress=False)
    assert last.x0.abs().max() == 1.0


def test_a_saved_folder_is_the_same_model(pixels: TextToImagePipeline, folder: Path, tmp_path: Path) -> None:
    pixels.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "vae").exists()
    again = TextToImagePipeline.from_pretrained(tmp_path / "again", dtype="float32", device="cpu")
    assert isinstance(again.decoder, PixelDecoder)
    assert isinstance(again.encoder(), PixelEncoder)
    assert again.default_guidance_scale == 3.0
    assert again.scheduler == pixels.scheduler
    assert np.array_equal(draw(again), draw(pixels))
    start = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    assert np.abs(loop_by_hand(tmp_path / "again", start, scale=3.0) - draw(pixels)).max() < 1e-4


def test_diffusers_refuses_the_folder_and_is_given_no_pipeline(
    folder: Path, pixels: TextToImagePipeline
) -> None:
    with pytest.raises(AttributeError, match="LatentgenPixelPipeline"):
        DiffusionPipeline.from_pretrained(folder)
    with pytest.raises(InputError, match="pixel space"):
        to_diffusers(pixels)


def test_other_pipelines_name_the_one_that_reads_it(folder: Path) -> None:
    with pytest.raises(ConfigError, match="LatentgenPixelPipeline'; load it with TextToImagePipeline"):
        UpscalePipeline.from_pretrained(folder)


@pytest.mark.parametrize("kind", [ImageToImagePipeline, InpaintPipeline])
def test_image_to_image_and_inpainting_in_pixels(
    kind: type[ImageToImagePipeline | InpaintPipeline], folder: Path
) -> None:
    image = np.random.default_rng(0).random((8, 8, 3)).astype(np.float32)
    mask = np.zeros((8, 8), np.float32)
    mask[:4] = 1
    extra: dict[str, Any] = {} if kind is ImageToImagePipeline else {"mask_image": mask}
    pipeline: Any = kind.from_pretrained(folder)
    (result,) = draw(pipeline, image=image, strength=0.7, **extra)
    assert result.shape == image.shape
    assert np.abs(result[:4] - image[:4]).mean() > 0.01
    if kind is InpaintPipeline:
        np.testing.assert_allclose(result[4:], image[4:], atol=1e-6)


def test_a_vae_that_is_named_must_be_there(broken: Path) -> None:
    edit(broken / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    with pytest.raises(ConfigError, match=r"LatentgenPixelPipeline .*vae"):
        TextToImagePipeline.from_pretrained(broken)
    edit(broken / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(CheckpointNotFoundError, match=r"config\.json"):
        TextToImagePipeline.from_pretrained(broken)


def test_a_latent_checkpoint_without_its_vae_is_no_pixel_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    latent = shutil.copytree(tiny_checkpoint, tmp_path / "latent")
    edit(latent / "model_index.json", vae=None)
    with pytest.raises(CheckpointNotFoundError, match="no component 'vae'"):
        TextToImagePipeline.from_pretrained(latent)
    edit(latent / "model_index.json", _class_name="LatentgenPixelPipeline")
    with pytest.raises(ConfigError, match=r"in_channels 3 .*4 and 4"):
        TextToImagePipeline.from_pretrained(latent)


def test_a_vae_cannot_be_added(folder: Path, tiny_checkpoint: Path) -> None:
    vae = tiny_checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(CheckpointNotFoundError, match="'vae'"):
        TextToImagePipeline.from_pretrained(folder, vae=vae)


def test_the_command_draws_and_inspects(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "cat.png"
    options = ["--model", str(folder), "-o", str(target), "--steps", "2", "--seed", "1"]
    assert cli.main(["text2img", "a cat", *options]) == 0
    assert Image.open(target).size == (8, 8)
    assert cli.main(["inspect", str(folder)]) == 0
    assert "3 input channels" in capsys.readouterr().out


def upscaler(pixels: TextToImagePipeline, **fields: Any) -> UpscalePipeline:
    """An upscaler of three times, which takes its input in three more channels, and its noise level."""
    config = UNetConfig.from_json(
        {**pixels.unet.config.to_json(), "in_channels": 6, "class_embed_type": "timestep"}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        unet = UNet(config).eval().requires_grad_(False)
    options: dict[str, Any] = {"load_encoder": PixelEncoder, "enlargement": 3, "max_noise_level": 99} | fields
    return UpscalePipeline(unet, PixelDecoder(), pixels.text_encoder, pixels.scheduler, **options)


def upscaled_by_hand(folder: Path, image: np.ndarray, level: int) -> np.ndarray:
    """Three times as large, guided by 3, over the stages of diffusers and transformers, without any pipeline."""
    noise = torch.Generator().manual_seed(7)
    cond = torch.from_numpy(image).permute(2, 0, 1)[None] * 2 - 1
    low_res = DDPMScheduler.from_pretrained(folder / "low_res_scheduler")
    cond = low_res.add_noise(cond, torch.randn(cond.shape, generator=noise), torch.tensor([level]))
    cond = torch.nn.functional.interpolate(cond, scale_factor=3, mode="bicubic")
    return loop_by_hand(folder, torch.randn(cond.shape, generator=noise), 3, cond, level)


@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_upscaling_in_pixels_is_that_of_a_loop_by_hand(
    pixels: TextToImagePipeline, tmp_path: Path, size: tuple[int, int]
) -> None:
    upscaler(pixels, default_guidance_scale=3.0).save_pretrained(tmp_path / "model")
    saved = UpscalePipeline.from_pretrained(tmp_path / "model", dtype="float32", device="cpu")
    assert (saved.scale, saved.max_noise_level, saved.default_guidance_scale) == (3, 99, 3.0)
    image = np.random.default_rng(1).random((*size, 3)).astype(np.float32)
    theirs = upscaled_by_hand(tmp_path / "model", image, level=40)
    ours = draw(saved, image=image, noise_level=40)
    assert ours.shape == theirs.shape == (1, 3 * size[0], 3 * size[1], 3)
    assert np.abs(ours - theirs).max() < 1e-4
    other = draw(saved, image=1 - image, noise_level=40)
    assert np.abs(ours - other).max() > 0.01
    with pytest.raises(AttributeError, match="LatentgenPixelUpscalePipeline"):
        DiffusionPipeline.from_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="pixel space"):
        to_diffusers(saved)
    with pytest.raises(ConfigError, match="load it with UpscalePipeline"):
        TextToImagePipeline.from_pretrained(tmp_path / "model")


def test_large_images_are_upscaled_in_tiles_of_the_input(pixels: TextToImagePipeline) -> None:
    image = np.random.default_rng(2).random((10, 14, 3)).astype(np.float32)
    whole, covered, tiled = (
        draw(upscaler(pixels), image=image, tile=tile, num_inference_steps=1) for tile in (None, 14, 8)
    )
    assert np.array_equal(whole, covered)
    assert tiled.shape == whole.shape == (1, 30, 42, 3)
    assert 0 < np.abs(tiled - whole).mean() < 0.2


def test_a_cascade_in_pixels(pixels: TextToImagePipeline, tmp_path: Path) -> None:
    pixels.save_pretrained(tmp_path / "draw")
    upscaler(pixels).save_pretrained(tmp_path / "upscale")
    settings = StageSettings(num_inference_steps=2)
    stages = (
        CascadeStage("draw", partial(TextToImagePipeline.from_pretrained, tmp_path / "draw"), settings),
        CascadeStage("upscale", partial(UpscalePipeline.from_pretrained, tmp_path / "upscale"), settings),
    )
    results = list(CascadePipeline(stages).stream("a cat", seed=7, output_type="np", progress=False))
    small, large = (result.images for result in results)
    assert (small.shape, large.shape) == ((1, 8, 8, 3), (1, 24, 24, 3))
    alone = draw(upscaler(pixels), image=small[0], seed=7 + _SEED_STRIDE, num_inference_steps=2)
    assert np.abs(large - alone).max() < 1e-5


@pytest.mark.parametrize("enlargement", [0, 17, 2.0])
def test_an_enlargement_out_of_bounds_is_refused(pixels: TextToImagePipeline, enlargement: object) -> None:
    with pytest.raises(ConfigError, match=r"enlargement .*1 to 16"):
        upscaler(pixels, enlargement=enlargement)


def test_with_a_vae_there_is_no_enlargement() -> None:
    latent = UpscalePipeline.from_pretrained(device="cpu")
    with pytest.raises(ConfigError, match=r"enlargement is 2;.*1 with a VAE"):
        replace(latent, enlargement=2)


def test_paired_images_in_pixels_are_saved(pixels: TextToImagePipeline, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = UNetConfig.from_json({**pixels.unet.config.to_json(), "in_channels": 6})
    stages = (UNet(config).eval(), PixelDecoder(), pixels.text_encoder, pixels.scheduler)
    paired = ConcatImagePipeline(*stages, load_encoder=PixelEncoder)
    paired.save_pretrained(tmp_path / "model")
    again = ConcatImagePipeline.from_pretrained(tmp_path / "model", dtype="float32", device="cpu")
    image = np.random.default_rng(3).random((9, 13, 3)).astype(np.float32)
    first, second = (draw(kind, image=image) for kind in (paired, again))
    assert np.abs(first - second).max() < 1e-5
    assert np.abs(first - draw(paired, image=1 - image)).max() > 0.01
    with pytest.raises(ConfigError, match="load it with ConcatImagePipeline"):
        InstructPix2PixPipeline.from_pretrained(tmp_path / "model")


def test_what_has_no_class_on_pixels_is_drawn_but_not_saved(
    pixels: TextToImagePipeline, tmp_path: Path
) -> None:
    config = UNetConfig.from_json({**pixels.unet.config.to_json(), "in_channels": 6})
    torch.manual_seed(0)
    paired = InstructPix2PixPipeline(
        unet=UNet(config).eval(),
        decoder=PixelDecoder(),
        text_encoder=pixels.text_encoder,
        scheduler=pixels.scheduler,
        load_encoder=PixelEncoder,
    )
    image = np.full((9, 13, 3), 200, dtype=np.uint8)
    (drawn,) = paired("a cat", image=image, num_inference_steps=2, progress=False).images
    assert isinstance(drawn, Image.Image)
    assert drawn.size == (13, 9)
    with pytest.raises(InputError, match="StableDiffusionInstructPix2PixPipeline"):
        paired.save_pretrained(tmp_path / "model")
    assert not list((tmp_path / "model").glob("*"))
