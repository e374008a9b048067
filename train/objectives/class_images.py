"""The images of prior preservation (arXiv:2208.12242, section 3.2): drawn by the model that training starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from torch import nn
from tqdm import tqdm

from latentgen.errors import ConfigError
from latentgen.image import save_image
from latentgen.image_file import read_image
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.inpaint import InpaintPipeline
from latentgen.pipelines.instruct_pix2pix import InstructPix2PixPipeline
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.train.config import Prior
from latentgen.train.data import sample_rng

# Images that are drawn together, always the same ones: what lies beside an image may change its last bits.
_GROUP = 4


def class_images(
    prior: Prior, pipeline: Pipeline, folder: Path, *, seed: int, size: int, origin: str, device: torch.device
) -> list[Image.Image]:
    """Draw the class images that are not in `folder` yet, and read them all.

    Each has its own seed and is written whole or not at all, so that a run that was stopped meanwhile goes on. The name
    says what they were drawn from: those of another recipe are left where they are. Several processes share the work.

    Args:
        prior: what to draw, and how many of it.
        pipeline: the model that training starts from, on the CPU.
        folder: where the images are kept.
        seed: the run's seed.
        size: the side of the images.
        origin: names the model.
        device: where to draw.

    Raises:
        ConfigError: the model cannot draw from a prompt alone.
        OutputError: an image could not be written.
    """
    if isinstance(pipeline, InstructPix2PixPipeline):
        raise ConfigError(
            "prior: a model that edits images draws none from a prompt alone; leave prior out for this model"
        )
    stated = f"{prior.prompt}\0{seed}\0{size}\0{origin}"
    stem = hashlib.sha256(stated.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    files = [folder / f"{stem}-{number:05d}.png" for number in range(prior.images)]
    seeds = [sample_rng(seed, "class image", number).getrandbits(63) for number in range(prior.images)]
    groups = [range(first, min(first + _GROUP, len(files))) for first in range(0, len(files), _GROUP)]
    missing = [group for group in groups if not all(files[number].is_file() for number in group)]
    state = PartialState()
    mine = missing[state.process_index :: state.num_processes]
    if mine:
        stages = nn.ModuleList([pipeline.unet, pipeline.text_encoder.module, pipeline.decoder])
        stages.to(device)
        for group in tqdm(mine, desc="drawing the class images", disable=not state.is_main_process):
            drawn = _draw(pipeline, prior.prompt, [seeds[number] for number in group], size, device)
            for number, image in zip(group, drawn, strict=True):
                save_image(image, files[number])
        stages.cpu()
    state.wait_for_everyone()
    return [read_image(file) for file in files]


def _draw(
    pipeline: Pipeline, prompt: str, seeds: Sequence[int], size: int, device: torch.device
) -> list[Image.Image]:
    """One image for each seed; a model of inpainting paints the whole of an empty image."""
    prompts = [prompt] * len(seeds)
    if pipeline.unet.config.in_channels == pipeline.decoder.config.latent_channels:
        drawing = replace(TextToImagePipeline.from_pipeline(pipeline), device=device)
        drawn = drawing(
            prompts, prompt_syntax="plain", height=size, width=size, seed=seeds, progress=False
        ).images
    else:
        empty, whole = Image.new("RGB", (size, size), "grey"), Image.new("L", (size, size), 255)
        painting = replace(InpaintPipeline.from_pipeline(pipeline), device=device)
        drawn = painting(
            prompts, image=empty, mask_image=whole, prompt_syntax="plain", seed=seeds, progress=False
        ).images
    assert isinstance(drawn, list)
    return drawn
