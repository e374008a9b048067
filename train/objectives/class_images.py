"""The images of prior preservation (arXiv:2208.12242, section 3.2): drawn by the model that training starts from."""

from __future__ import annotations

import hashlib
import random
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
from latentgen.train.data import Captions, View, sample_rng
from latentgen.train.objectives.lent import lent

# Images that are drawn together, always the same ones: what lies beside an image may change its last bits.
_GROUP = 4


class ClassImages:
    """A training set of what a model draws of a class; `draw` makes it, and nothing can be seen before.

    Args:
        prior: what to draw, and how many of it.
        folder: where the images are kept.
        model: names what draws them.
        seed: the run's seed.
    """

    image_size: int
    views_vary = False

    def __init__(self, prior: Prior, folder: Path, *, model: str, seed: int) -> None:
        self._prior = prior
        self._folder = folder
        self._stated = (model, str(seed))
        self._seeds = [sample_rng(seed, "class image", number).getrandbits(63) for number in range(len(self))]
        self._files: list[Path] = []

    def __len__(self) -> int:
        return self._prior.images

    def view(self, index: int, rng: random.Random) -> View:
        """Image `index`; nothing is random, and where the loss counts within masks, it counts everywhere here."""
        image = read_image(self._files[index])
        everywhere = Image.new("L", image.size, 255)
        return View(image, Captions((self._prior.prompt_of(index),), (1.0,)), mask=everywhere)

    def bucket(self, index: int) -> tuple[int, int]:
        """All are squares."""
        return self.image_size, self.image_size

    def corpus(self) -> list[str]:
        """The caption of each image."""
        return [self._prior.prompt_of(number) for number in range(len(self))]

    def draw(self, pipeline: Pipeline, device: torch.device, *, size: int) -> None:
        """Draw the images that are not there yet.

        Each has its own seed and is written whole or not at all, so that a run that was stopped meanwhile goes on. The
        names say what they were drawn from: those of another recipe are left where they are. Several processes share
        the work.

        Args:
            pipeline: the model that training starts from, on the CPU.
            device: where to draw.
            size: the side of the images.

        Raises:
            ConfigError: the model cannot draw from a prompt alone.
            OutputError: an image could not be written.
        """
        if isinstance(pipeline, InstructPix2PixPipeline):
            raise ConfigError(
                "prior: a model that edits images draws none from a prompt alone; leave prior out for this model"
            )
        self.image_size = size
        prompts, seeds, count = self.corpus(), self._seeds, len(self)
        stated = "\0".join((*prompts, *self._stated, str(size)))
        stem = hashlib.sha256(stated.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        self._files = [self._folder / f"{stem}-{number:05d}.png" for number in range(count)]
        groups = [range(first, min(first + _GROUP, count)) for first in range(0, count, _GROUP)]
        state = PartialState()
        # Shared out before looking what is missing, which changes while others draw.
        own = groups[state.process_index :: state.num_processes]
        missing = [group for group in own if not all(self._files[number].is_file() for number in group)]
        if missing:
            stages = nn.ModuleList([pipeline.unet, pipeline.text_encoder.module, pipeline.decoder])
            placed = replace(pipeline, device=device)
            bar = tqdm(missing, desc="drawing the class images", disable=not state.is_main_process)
            with lent(stages, device), bar:
                for group in bar:
                    part = slice(group.start, group.stop)
                    drawn = _draw(placed, prompts[part], seeds[part], self.image_size)
                    for number, image in zip(group, drawn, strict=True):
                        save_image(image, self._files[number])
        state.wait_for_everyone()


def _draw(pipeline: Pipeline, prompts: Sequence[str], seeds: Sequence[int], size: int) -> list[Image.Image]:
    """One image for each prompt; a model of inpainting paints the whole of an empty image."""
    if pipeline.unet.config.in_channels == pipeline.decoder.config.latent_channels:
        draw = TextToImagePipeline.from_pipeline(pipeline)
        drawn = draw(
            prompts, prompt_syntax="plain", height=size, width=size, seed=seeds, progress=False
        ).images
    else:
        empty, whole = Image.new("RGB", (size, size), "grey"), Image.new("L", (size, size), 255)
        paint = InpaintPipeline.from_pipeline(pipeline)
        drawn = paint(
            prompts, image=empty, mask_image=whole, prompt_syntax="plain", seed=seeds, progress=False
        ).images
    assert isinstance(drawn, list)
    return drawn
