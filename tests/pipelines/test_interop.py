"""Pipelines from diffusers and back: the same image from the same storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from peft import LoraConfig
from torch import nn

from latentgen import from_diffusers, to_diffusers
from latentgen.errors import CheckpointMismatchError, InputError
from latentgen.memory import MemoryPolicy
from latentgen.pipelines.text_to_image import TextToImagePipeline
from tests.conftest import build_pipeline
from tests.pipelines.sdxl import build_base, build_refiner

STAGES = ("unet", "vae", "text_encoder", "text_encoder_2")


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=["sd1", "sdxl", "refiner"])
def theirs(request: pytest.FixtureRequest) -> Any:
    return quiet({"sd1": build_pipeline, "sdxl": build_base, "refiner": build_refiner}[request.param]())


def addresses(*modules: nn.Module | None) -> set[int]:
    return {tensor.data_ptr() for module in modules if module for tensor in module.state_dict().values()}


def draw(pipeline: TextToImagePipeline, latents: torch.Tensor) -> np.ndarray:
    refines = pipeline.unet.config.addition_embed_type and len(pipeline.text_encoder.towers) == 1
    images = pipeline(
        "a cat",
        num_inference_steps=4,
        latents=latents,
        denoising_start=0.5 if refines else 0.0,
        seed=7,
        output_type="np",
        progress=False,
    ).images
    assert isinstance(images, np.ndarray)
    return images


def draw_theirs(pipe: Any, latents: torch.Tensor) -> np.ndarray:
    start = (
        {"image": latents, "denoising_start": 0.5}
        if "Img2Img" in type(pipe).__name__
        else {"latents": latents}
    )
    options = {"num_inference_steps": 4, "output_type": "np"}
    return pipe("a cat", generator=[torch.Generator().manual_seed(7)], **options, **start).images


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def test_taken_over_it_gives_the_same_image(theirs: Any, latents: torch.Tensor) -> None:
    theirs.scheduler = ddim(theirs.scheduler)
    assert np.abs(draw(from_diffusers(theirs), latents) - draw_theirs(theirs, latents)).max() <= 1e-4


def ddim(scheduler: Any) -> Any:
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False)


def test_taken_over_it_shares_the_weights(theirs: Any) -> None:
    ours = from_diffusers(theirs)
    modules = [theirs.components.get(name) for name in STAGES]
    wanted = {p.data_ptr() for module in modules if module for p in module.parameters()}
    assert addresses(ours.unet, ours.decoder, ours.encoder(), ours.text_encoder.module) >= wanted
    assert all(p.requires_grad for p in theirs.unet.parameters())


def test_handed_on_it_gives_the_same_image_from_the_same_weights(theirs: Any, latents: torch.Tensor) -> None:
    theirs.scheduler = ddim(theirs.scheduler)
    ours = from_diffusers(theirs)
    again = quiet(to_diffusers(ours))
    assert type(again) is type(theirs)
    for name in STAGES:
        before, after = theirs.components.get(name), again.components.get(name)
        assert (before is None) == (after is None)
        if before is not None:
            pointers = {key: tensor.data_ptr() for key, tensor in before.state_dict().items()}
            assert pointers == {key: tensor.data_ptr() for key, tensor in after.state_dict().items()}
    assert np.abs(draw_theirs(again, latents) - draw(ours, latents)).max() <= 1e-4


def test_a_loaded_folder_is_handed_on(tiny_checkpoint: Path, latents: torch.Tensor) -> None:
    ours = TextToImagePipeline.from_pretrained(tiny_checkpoint, dtype="float32", device="cpu")
    again = quiet(to_diffusers(ours))
    assert addresses(again.unet) == addresses(ours.unet)
    assert addresses(ours.decoder) <= addresses(again.vae)
    assert np.abs(draw_theirs(again, latents) - draw(ours, latents)).max() <= 1e-4


def test_without_packing_no_copy_is_made(theirs: Any) -> None:
    from latentgen.models.packing import PackedConv2d

    plain = from_diffusers(theirs, memory=MemoryPolicy(pack_weights=False))
    assert not any(isinstance(module, PackedConv2d) for module in plain.unet.modules())


def test_what_cannot_be_taken_over_is_named() -> None:
    pipe = build_pipeline()
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(InputError, match="Img2Img"):
        from_diffusers(other)
    pipe.unet.to("meta")
    with pytest.raises(InputError, match="one device"):
        from_diffusers(pipe)


def test_adapters_are_named() -> None:
    pipe = build_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(CheckpointMismatchError, match="adapters"):
        from_diffusers(pipe)
