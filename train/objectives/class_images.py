"""The class images of prior preservation (arXiv:2208.12242, section 3.2): drawn by the model that training starts from,
or the user's own."""

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

from latentgen.errors import ConfigError, DatasetError
from latentgen.files import quote
from latentgen.image_file import read_image, save_image
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.inpaint import InpaintPipeline
from latentgen.pipelines.instruct_pix2pix import InstructPix2PixPipeline
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.train.config import FolderData, Prior
from latentgen.train.data import CaptionedDataset, Captions, Sample, open_data, sample_rng
from latentgen.train.host_memory import temporarily_on

# Images that are drawn together, always the same ones: the other images of a batch can change the last bits of one.
_GROUP = 4


class ClassImages:
    """A training set of a class: the user's own images, if there are any, then images that a model draws.

    Call `draw` before viewing the latter.

    Args:
        prior: what to draw, and the least number of images; there are more if there are more of the user's own.
        folder: where drawn images are stored.
        model: names the model that draws them.
        seed: the run's seed.
        image_size: the side of the images, which are squares.

    Raises:
        ConfigError: drawn images would be stored among the user's own.
        DatasetError: the user's images cannot be used as a training set.
    """

    is_random = False

    def __init__(self, prior: Prior, folder: Path, *, model: str, seed: int, image_size: int) -> None:
        self.image_size = image_size
        self._prior = prior
        self._folder = folder
        self._own = None if prior.path is None else _own_images(prior.path, prior, folder, image_size)
        self._own_count = 0 if self._own is None else len(self._own)
        self._drawn_from = (model, str(seed))
        self._seeds = [
            sample_rng(seed, "class image", number).getrandbits(63) for number in range(prior.images)
        ]
        self._files: list[Path] = []

    def __len__(self) -> int:
        return max(self._own_count, self._prior.images)

    def sample(self, index: int, rng: random.Random) -> Sample:
        """Image `index`, not random. Without a mask of its own its mask is full: a masked loss counts everywhere."""
        if self._own is not None and index < self._own_count:
            view = self._own.sample(index, rng)
        else:
            prompt = self._prior.prompt_of(index)
            view = Sample(read_image(self._files[index]), Captions((prompt,), (1.0,)))
        mask = Image.new("L", view.image.size, 255) if view.mask is None else view.mask
        return view._replace(mask=mask)

    def bucket(self, index: int) -> tuple[int, int]:
        """A square, for every image."""
        return self.image_size, self.image_size

    def captions(self) -> list[str]:
        """All captions of each image."""
        own = [] if self._own is None else self._own.captions()
        return own + [self._prior.prompt_of(number) for number in range(self._own_count, len(self))]

    def draw(self, pipeline: Pipeline, device: torch.device) -> None:
        """Draw the images that are missing.

        Each has its own seed and is written atomically, so that an interrupted run continues. A hash of what they are
        drawn from is in their names: images of another recipe are not touched. Several processes share the work.

        Args:
            pipeline: the model that training starts from, on the CPU.
            device: where to draw.

        Raises:
            ConfigError: the model requires an image.
            OutputError: an image could not be written.
        """
        if isinstance(pipeline, InstructPix2PixPipeline):
            raise ConfigError(
                "task.prior: a model that edits images cannot draw from a prompt alone; leave prior out for this model"
            )
        seeds, count = self._seeds, self._prior.images
        prompts = [self._prior.prompt_of(number) for number in range(count)]
        origin = "\0".join((*prompts, *self._drawn_from, str(self.image_size)))
        stem = hashlib.sha256(origin.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        self._files = [self._folder / f"{stem}-{number:05d}.png" for number in range(count)]
        starts = range(self._own_count, count, _GROUP)
        groups = [range(first, min(first + _GROUP, count)) for first in starts]
        state = PartialState()
        # Split before looking for missing images, which change while other processes draw.
        own = groups[state.process_index :: state.num_processes]
        missing = [group for group in own if not all(self._files[number].is_file() for number in group)]
        if missing:
            stages = nn.ModuleList([pipeline.unet, pipeline.text_encoder.module, pipeline.decoder])
            placed = replace(pipeline, device=device)
            bar = tqdm(missing, desc="drawing the class images", disable=not state.is_main_process)
            with temporarily_on(stages, device), bar:
                for group in bar:
                    part = slice(group.start, group.stop)
                    drawn = _draw(placed, prompts[part], seeds[part], self.image_size)
                    for number, image in zip(group, drawn, strict=True):
                        save_image(image, self._files[number])
        state.wait_for_everyone()


def _own_images(path: Path, prior: Prior, folder: Path, image_size: int) -> CaptionedDataset:
    """The user's own images: the center of each, as large as drawn images."""
    if folder.resolve().is_relative_to(path.resolve()):
        raise ConfigError(
            f"task.prior.path {quote(path)} contains the folder for the class images that this run draws; put your own "
            "into another folder, or choose another output_dir"
        )
    if not path.is_dir():
        raise DatasetError(
            f"task.prior.path {quote(path)} is not a folder of images; name one, or leave it out"
        )
    data = FolderData(kind="imagefolder", path=path, image_size=image_size, caption=prior.prompt_of(0))
    try:
        return open_data(data)
    except DatasetError as error:
        raise DatasetError(f"task.prior.path: {error}") from None


def _draw(pipeline: Pipeline, prompts: Sequence[str], seeds: Sequence[int], size: int) -> list[Image.Image]:
    """One image for each prompt; an inpainting model paints the whole of an empty image."""
    if pipeline.unet.config.in_channels == pipeline.decoder.config.latent_channels:
        draw = TextToImagePipeline.from_pipeline(pipeline)
        drawn = draw(
            prompts, prompt_syntax="plain", height=size, width=size, seed=seeds, progress=False
        ).images
    else:
        empty, whole = Image.new("RGB", (size, size), "gray"), Image.new("L", (size, size), 255)
        paint = InpaintPipeline.from_pipeline(pipeline)
        drawn = paint(
            prompts, image=empty, mask_image=whole, prompt_syntax="plain", seed=seeds, progress=False
        ).images
    assert isinstance(drawn, list)
    return drawn
