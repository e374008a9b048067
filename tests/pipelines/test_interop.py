"""Pipelines from diffusers and back; test_families.py holds the images and the storage of every family."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from diffusers import DDPMPipeline, EDMEulerScheduler
from peft import LoraConfig
from torch import nn

from latentgen import from_diffusers, to_diffusers
from latentgen.errors import CheckpointMismatchError, ConfigError, InputError
from latentgen.memory import MemoryPolicy
from latentgen.pipelines.text_to_image import TextToImagePipeline
from tests.conftest import build_pipeline
from tests.pipelines.drawing import difference, draw, draw_theirs, with_solver


def addresses(*modules: nn.Module | None) -> set[int]:
    return {tensor.data_ptr() for module in modules if module for tensor in module.state_dict().values()}


def test_gradients_are_left_to_diffusers() -> None:
    theirs = build_pipeline()
    ours = from_diffusers(theirs)
    assert all(parameter.requires_grad for parameter in theirs.unet.parameters())
    assert not any(parameter.requires_grad for parameter in ours.unet.parameters())


def test_a_loaded_folder_is_converted(tiny_checkpoint: Path) -> None:
    ours = TextToImagePipeline.from_pretrained(tiny_checkpoint, dtype="float32", device="cpu")
    again = to_diffusers(ours)
    assert addresses(again.unet) == addresses(ours.unet)
    assert addresses(ours.decoder) <= addresses(again.vae)
    assert difference(draw_theirs(again), draw(ours)) <= 1e-4


def test_without_packing_no_copy_is_made() -> None:
    from latentgen.models.layers import PackedConv2d

    plain = from_diffusers(build_pipeline(), memory=MemoryPolicy(pack_weights=False))
    assert not any(isinstance(module, PackedConv2d) for module in plain.unet.modules())


def test_what_cannot_be_converted_is_named() -> None:
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


def test_a_scheduler_of_diffusers_is_used(tiny_checkpoint: Path) -> None:
    theirs = with_solver(build_pipeline(), "dpmpp_2m_karras")
    ours = TextToImagePipeline.from_pretrained(tiny_checkpoint, dtype="float32", device="cpu")
    assert difference(draw(ours, scheduler=theirs.scheduler), draw_theirs(theirs)) <= 1e-4
    with pytest.raises(ConfigError, match="EDMEulerScheduler"):
        ours("a cat", scheduler=EDMEulerScheduler())


def test_without_diffusers_the_error_says_what_to_install(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = TextToImagePipeline.from_pretrained(tiny_checkpoint, dtype="float32", device="cpu")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match="pip install"):
        to_diffusers(ours)
