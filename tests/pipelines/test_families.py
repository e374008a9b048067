"""Every family, from a folder, from a single file and from a live pipeline: the image of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from latentgen import from_diffusers, to_diffusers
from latentgen.checkpoints.families import FAMILIES
from latentgen.checkpoints.single_file import SingleFile
from latentgen.memory import MemoryPolicy
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.concat import ConcatImagePipeline
from latentgen.pipelines.image_to_image import ImageToImagePipeline
from latentgen.pipelines.inpaint import InpaintPipeline
from latentgen.pipelines.instruct_pix2pix import InstructPix2PixPipeline
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.pipelines.upscale import UpscalePipeline
from tests.pipelines import drawing
from tests.pipelines.drawing import difference
from tests.pipelines.families import KINDS, STEPS, arguments, build, composited, save

# The first one that reads a family draws its image here.
PIPELINES: tuple[Any, ...] = (
    TextToImagePipeline,
    ImageToImagePipeline,
    InpaintPipeline,
    InstructPix2PixPipeline,
    ConcatImagePipeline,
    UpscalePipeline,
)
STAGES = ("unet", "vae", "text_encoder", "text_encoder_2")


class Family(NamedTuple):
    """A pipeline of diffusers, its files, its image, and our class for it."""

    theirs: Any
    folder: Path
    file: Path
    image: np.ndarray
    pipeline: Any


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    pipe = build(request.param)
    folder, file = save(pipe, tmp_path_factory.mktemp("family"))
    ours = next(ours for ours in PIPELINES if type(pipe).__name__ in ours.supported_classes)
    return Family(pipe, folder, file, draw_theirs(pipe), ours)


def draw(pipeline: Any, theirs: Any) -> np.ndarray:
    return drawing.draw(pipeline, "a red cat", num_inference_steps=STEPS, **arguments(theirs)[0])


def draw_theirs(pipe: Any) -> np.ndarray:
    inputs = arguments(pipe)[1]
    images = drawing.draw_theirs(pipe, "a red cat", num_inference_steps=STEPS, **inputs)
    return composited(images, inputs)


def test_a_folder_gives_the_image_of_diffusers(family: Family) -> None:
    ours = family.pipeline.from_pretrained(family.folder, dtype="float32", device="cpu")
    assert difference(draw(ours, family.theirs), family.image) <= 1e-4


def test_a_single_file_gives_the_image_of_diffusers(family: Family) -> None:
    checkpoint = SingleFile.open(family.file, config=family.folder)
    ours = family.pipeline.from_checkpoint(checkpoint, dtype="float32", device="cpu")
    assert difference(draw(ours, family.theirs), family.image) <= 1e-4


def test_what_is_saved_is_what_diffusers_loads(family: Family, tmp_path: Path) -> None:
    ours = family.pipeline.from_pretrained(family.folder, dtype="float32", device="cpu")
    ours.save_pretrained(tmp_path)
    again = type(family.theirs).from_pretrained(tmp_path)
    # Private keys are of the file alone.
    mine, other = ({key for key in pipe.config if key[0] != "_"} for pipe in (again, family.theirs))
    assert mine == other
    for name in STAGES:
        if family.theirs.components.get(name) is not None:
            mine, other = again.components[name].state_dict(), family.theirs.components[name].state_dict()
            assert mine.keys() == other.keys()
            assert all(torch.equal(mine[key], other[key]) for key in mine)
    for name in ("scheduler", "low_res_scheduler"):
        if name in family.theirs.components:
            assert type(again.components[name]) is type(family.theirs.components[name])


def test_conversions_share_the_weights(family: Family) -> None:
    ours = from_diffusers(family.theirs, memory=MemoryPolicy(pack_weights=False))
    # To diffusers the refiner is an image-to-image pipeline.
    assert type(ours) is (
        ImageToImagePipeline if "Img2Img" in type(family.theirs).__name__ else family.pipeline
    )
    again = to_diffusers(ours)
    assert type(again) is type(family.theirs)
    stages = torch.nn.ModuleList([ours.unet, ours.decoder, ours.encoder(), ours.text_encoder.module])
    addresses = {tensor.data_ptr() for tensor in stages.parameters()}
    for name in STAGES:
        before, after = family.theirs.components.get(name), again.components.get(name)
        assert (before is None) == (after is None)
        if before is not None:
            pointers = {key: tensor.data_ptr() for key, tensor in before.named_parameters()}
            assert pointers == {key: tensor.data_ptr() for key, tensor in after.named_parameters()}
            assert set(pointers.values()) <= addresses
    assert difference(draw(family.pipeline.from_pipeline(ours), family.theirs), family.image) <= 1e-4
    assert difference(draw_theirs(again), family.image) <= 1e-4


def test_every_pipeline_is_covered() -> None:
    names = [FAMILIES[family].pipeline_class for family, _ in KINDS.values()]
    covered = {ours for name in names for ours in PIPELINES if name in ours.supported_classes}
    assert covered == set(PIPELINES) == set(Pipeline.__subclasses__())
