"""Pipelines from diffusers and back; test_families.py holds the images and the storage of every family."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler, EDMEulerScheduler
from peft import LoraConfig
from torch import nn

from latentgen import from_diffusers, to_diffusers
from latentgen.errors import CheckpointMismatchError, ConfigError, InputError
from latentgen.memory import MemoryPolicy
from latentgen.pipelines.text_to_image import TextToImagePipeline
from tests.conftest import build_pipeline


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def addresses(*modules: nn.Module | None) -> set[int]:
    return {tensor.data_ptr() for module in modules if module for tensor in module.state_dict().values()}


def draw(pipeline: TextToImagePipeline, latents: torch.Tensor) -> np.ndarray:
    options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np", "progress": False}
    images = pipeline("a cat", latents=latents, seed=7, **options).images
    assert isinstance(images, np.ndarray)
    return images


def draw_theirs(pipe: Any, latents: torch.Tensor) -> np.ndarray:
    options = {"num_inference_steps": 4, "output_type": "np"}
    return pipe("a cat", latents=latents, **options).images


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def test_gradients_are_left_to_diffusers() -> None:
    theirs = build_pipeline()
    ours = from_diffusers(theirs)
    assert all(parameter.requires_grad for parameter in theirs.unet.parameters())
    assert not any(parameter.requires_grad for parameter in ours.unet.parameters())


def test_a_loaded_folder_is_handed_on(tiny_checkpoint: Path, latents: torch.Tensor) -> None:
    ours = TextToImagePipeline.from_pretrained(tiny_checkpoint, dtype="float32", device="cpu")
    again = quiet(to_diffusers(ours))
    assert addresses(again.unet) == addresses(ours.unet)
    assert addresses(ours.decoder) <= addresses(again.vae)
    assert np.abs(draw_theirs(again, latents) - draw(ours, latents)).max() <= 1e-4


def test_without_packing_no_copy_is_made() -> None:
    from latentgen.models.mkldnn_conv import PackedConv2d

    plain = from_diffusers(build_pipeline(), memory=MemoryPolicy(pack_weights=False))
    assert not any(isinstance(module, PackedConv2d) for module in plain.unet.modules())


def test_what_cannot_be_taken_over_is_named() -> None:
    pipe = build_pipeline()
    other = DDPMPipeline(unet=pipe.unet, scheduler=pipe.scheduler)
    with pytest.raises(InputError, match=r"DDPMPipeline .*StableDiffusionPipeline"):
        from_diffusers(other)  # type: ignore[call-overload]
    pipe.unet.to("meta")
    with pytest.raises(InputError, match="one device"):
        from_diffusers(pipe)


def test_adapters_are_named() -> None:
    pipe = build_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(CheckpointMismatchError, match="adapters"):
        from_diffusers(pipe)


def test_a_scheduler_of_diffusers_is_taken(tiny_checkpoint: Path, latents: torch.Tensor) -> None:
    theirs = quiet(build_pipeline())
    theirs.scheduler = DPMSolverMultistepScheduler.from_config(
        theirs.scheduler.config, use_karras_sigmas=True
    )
    ours = TextToImagePipeline.from_pretrained(tiny_checkpoint, dtype="float32", device="cpu")
    options: dict[str, Any] = {"num_inference_steps": 4, "seed": 7, "output_type": "np", "progress": False}
    images = ours("a cat", latents=latents, scheduler=theirs.scheduler, **options).images
    assert np.abs(images - draw_theirs(theirs, latents)).max() <= 1e-4
    with pytest.raises(InputError, match="scheduler "):
        ours("a cat", scheduler=3, **options)
    with pytest.raises(ConfigError, match="EDMEulerScheduler"):
        ours("a cat", scheduler=EDMEulerScheduler(), **options)


def test_without_diffusers_the_error_says_what_to_install(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = TextToImagePipeline.from_pretrained(tiny_checkpoint, dtype="float32", device="cpu")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r'pip install "latentgen\[train\]"'):
        to_diffusers(ours)
