"""The objective of fine-tuning: what a batch holds, the class images of prior preservation, and what is refused."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from latentgen.checkpoints.single_file import SingleFile
from latentgen.errors import ConfigError, DatasetError
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.train.config import FinetuneTask, Prior
from latentgen.train.data import BatchIndices, sample_rng, to_tensor
from latentgen.train.objectives.class_images import ClassImages
from latentgen.train.objectives.degradation import random_mask
from latentgen.train.objectives.finetune import FinetuneObjective
from tests.checkpoints.single_files import to_original_file
from tests.pipelines.families import as_in_files
from tests.train.finetuning import SIZE, Pictures, build, folder_of, objective_of
from tests.train.recipes import plan_for

FULL = {"kind": "full"}
PRIOR = {"prompt": "dog", "images": 6, "weight": 1.0}


def encode(family: str, images: list[Image.Image]) -> Any:
    with torch.no_grad():
        return build(family).vae.encode(to_tensor(images)).latent_dist


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def views_of(items: tuple[int, ...]) -> list[Any]:
    data = Pictures()
    return [data.sample(i // 2, sample_rng(3, "cached view", i // 2, i % 2)) for i in items]


def test_an_inpainting_model_receives_a_mask_and_the_masked_image(tmp_path: Path):
    objective = objective_of(FULL, folder_of("inpainting"), tmp_path)
    assert objective.inpaints
    plan = plan_for(objective)
    cond = objective.batch(plan)[4]
    assert cond.shape == (8, 5, 8, 8)
    masked, corners = [], []
    for item, view in zip(plan.items, views_of(plan.items), strict=True):
        mask = np.asarray(random_mask((SIZE, SIZE), sample_rng(3, "degradation", item)))
        kept = torch.from_numpy(mask < 128).float()
        masked.append(to_tensor([view.image]) * kept + (127 / 127.5 - 1) * (1 - kept))  # 8 bits have no 127.5
        corners.append(torch.from_numpy(mask[::2, ::2] > 127).float())
    assert torch.equal(cond[:, 0], torch.stack(corners))
    with torch.no_grad():
        posterior = build("inpainting").vae.encode(torch.cat(masked)).latent_dist
    noise = plan.noise(posterior.mean.shape[1:], "shown posterior")
    assert relative_error(cond[:, 1:], (posterior.mean + posterior.std * noise) * 0.18215) < 1e-3


def test_an_edit_model_receives_the_mode_without_the_scaling_factor(tmp_path: Path):
    objective = objective_of(FULL, folder_of("instruct"), tmp_path, conditioning_dropout=0.0)
    assert objective.edits
    plan = plan_for(objective)
    cond = objective.batch(plan)[4]
    expected = encode("instruct", [view.before for view in views_of(plan.items)]).mode()
    assert relative_error(cond, expected) < 1e-3


@pytest.mark.parametrize("side", [16, 64])
def test_masks_mark_something_and_differ(side: int):
    masks = [np.asarray(random_mask((side, 2 * side), random.Random(seed))) for seed in range(200)]
    shares = np.array([(mask > 0).mean() for mask in masks])
    assert all(mask.shape == (2 * side, side) for mask in masks)
    assert all(set(np.unique(mask)) <= {0, 255} for mask in masks)
    assert shares.min() > 0
    assert 0.15 < (shares == 1).mean() < 0.35
    assert len({mask.tobytes() for mask in masks}) > 130


def test_every_batch_is_a_function_of_the_plan(tmp_path: Path):
    for family in ("sd", "sdxl", "inpainting", "instruct"):
        prior = {} if family == "instruct" else {"prior": PRIOR}
        objective = objective_of(FULL, folder_of(family), tmp_path / family, **prior)
        again = objective_of(FULL, folder_of(family), tmp_path / family, **prior)
        torch.manual_seed(77)
        for first, second in zip(
            objective.batch(plan_for(objective)), again.batch(plan_for(again)), strict=True
        ):
            assert torch.equal(first, second)
        assert not torch.equal(
            objective.batch(plan_for(objective, 1))[1], objective.batch(plan_for(objective))[1]
        )


def all_of(objective: FinetuneObjective) -> BatchIndices:
    """A plan that shows every item once."""
    items = tuple(range(len(objective.order)))
    return BatchIndices(0, 0, len(items), items, items)


def class_latents(objective: FinetuneObjective) -> torch.Tensor:
    """The means of the latents of all class images."""
    (classes,) = objective._class_objective
    return torch.stack([view.posterior[0] for view in classes._latents.batch(all_of(classes)).views]).float()


def test_class_images_are_those_of_the_starting_model_and_share_no_noise(tmp_path: Path):
    objective = objective_of(FULL, folder_of("sd"), tmp_path, prior=PRIOR)
    plan = plan_for(objective)
    batch = objective.batch(plan)
    for mine, theirs in zip(batch[:3], batch[4:7], strict=True):
        assert not torch.equal(mine, theirs)
    files = sorted((tmp_path / "class_images").iterdir())
    assert len(files) == 6
    pipeline = TextToImagePipeline.from_pretrained(folder_of("sd"), dtype="float32", device="cpu")
    seeds = [sample_rng(3, "class image", number).getrandbits(63) for number in range(6)]
    drawn = pipeline(["dog"] * 6, height=SIZE, width=SIZE, seed=seeds, progress=False).images
    for file, image in zip(files, drawn, strict=True):
        with Image.open(file) as saved:
            assert np.abs(np.asarray(saved).astype(int) - np.asarray(image)).max() <= 1
    posterior = encode("sd", [Image.open(file) for file in files])
    assert relative_error(class_latents(objective), posterior.mean * 0.18215) < 1e-3


def test_missing_class_images_are_generated_again(tmp_path: Path):
    first = objective_of(FULL, folder_of("sd"), tmp_path, prior=PRIOR)
    files = sorted((tmp_path / "class_images").iterdir())
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    files[5].unlink()
    again = objective_of(FULL, folder_of("sd"), tmp_path, prior=PRIOR)
    assert {file: file.read_bytes() for file in files} == {file: data for file, (data, _) in before.items()}
    redrawn = [file for file in files if file.stat().st_mtime_ns != before[file][1]]
    assert redrawn == files[4:]  # those that were drawn together
    assert torch.equal(class_latents(first), class_latents(again))
    objective_of(FULL, folder_of("sd"), tmp_path, prior=PRIOR | {"prompt": "tiger"})
    assert len(list((tmp_path / "class_images").iterdir())) == 12  # another recipe has others


def test_prompts_of_class_images_take_turns(tmp_path: Path):
    objective = objective_of(FULL, folder_of("sd"), tmp_path, prior=PRIOR | {"prompt": ["dog", "tiger"]})
    (classes,) = objective._class_objective
    captions = [view.info.captions.texts[0] for view in classes._latents.batch(all_of(classes)).views]
    assert captions == ["dog", "tiger"] * 3
    batch = objective.batch(plan_for(objective))
    contexts = objective._text.encode(["dog", "tiger"]).context
    nearest = (batch[7][:, None] - contexts).abs().amax(dim=(2, 3)).min(dim=1)
    assert nearest.values.max() < 1e-5
    assert set(nearest.indices.tolist()) == {0, 1}


@pytest.fixture
def dogs(tmp_path: Path) -> Path:
    """Three images of other sizes than the training set's, one in a sub-folder, one with a caption of its own."""
    folder = tmp_path / "dogs"
    (folder / "1_dog").mkdir(parents=True)
    for number, (name, size) in enumerate(
        {"a.png": (24, 16), "b.png": (16, 40), "1_dog/c.png": (32, 32)}.items()
    ):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR).save(folder / name)
    (folder / "b.txt").write_text("red dog", "utf-8")
    return folder


def test_own_class_images_are_used_and_missing_ones_generated(dogs: Path, tmp_path: Path):
    before = {file: file.read_bytes() for file in dogs.rglob("*.*")}
    objective = objective_of(FULL, folder_of("sd"), tmp_path, prior=PRIOR | {"path": str(dogs)})
    assert {file: file.read_bytes() for file in dogs.rglob("*.*")} == before
    drawn = sorted((tmp_path / "class_images").iterdir())
    assert [file.name.rpartition("-")[2] for file in drawn] == ["00003.png", "00004.png", "00005.png"]
    (classes,) = objective._class_objective
    captions = [view.info.captions.texts[0] for view in classes._latents.batch(all_of(classes)).views]
    assert captions == ["dog", "dog", "red dog", "dog", "dog", "dog"]
    # Scaled to cover a square, and its middle: in the order of their names.
    own = []
    for name, size in (("1_dog/c.png", (16, 16)), ("a.png", (24, 16)), ("b.png", (16, 40))):
        image = Image.open(dogs / name).resize(size, Image.Resampling.LANCZOS)
        left, top = (size[0] - SIZE) // 2, (size[1] - SIZE) // 2
        own.append(image.crop((left, top, left + SIZE, top + SIZE)))
    posterior = encode("sd", [*own, *(Image.open(file) for file in drawn)])
    assert relative_error(class_latents(objective), posterior.mean * 0.18215) < 1e-3
    # The drawn ones are those of a run that draws all, up to the rounding beside others.
    everything = objective_of(FULL, folder_of("sd"), tmp_path / "all", prior=PRIOR)
    assert relative_error(class_latents(objective)[3:], class_latents(everything)[3:]) < 1e-3


def test_own_class_images_are_all_used(dogs: Path, tmp_path: Path):
    prior = PRIOR | {"path": str(dogs), "images": 2}
    objective = objective_of(FULL, folder_of("sd"), tmp_path, prior=prior)
    assert len(objective._class_objective[0].order) == 3
    assert not (tmp_path / "class_images").exists()
    assert len(objective.batch(plan_for(objective))) == 8


def test_class_images_count_everywhere_where_the_loss_is_masked(dogs: Path, tmp_path: Path):
    prior = Prior.model_validate(PRIOR | {"path": str(dogs)})
    classes = ClassImages(prior, tmp_path / "drawn", model="x", seed=0, image_size=SIZE)
    mask = classes.sample(0, random.Random(0)).mask
    assert mask is not None
    assert mask.size == (SIZE, SIZE)
    assert mask.getextrema() == (255, 255)


def test_class_images_that_cannot_be_used_are_reported_as_those_of_a_data_set(dogs: Path, tmp_path: Path):
    def build_with(path: Path, scratch: Path = tmp_path) -> None:
        objective_of(FULL, folder_of("sd"), scratch, prior=PRIOR | {"path": str(path)})

    (dogs / "broken.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"task\.prior\.path: .*dogs.* has 1 problems: .*broken\.png"):
        build_with(dogs)
    with pytest.raises(DatasetError, match=r"task\.prior\.path: .*nowhere"):
        build_with(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"task\.prior\.path: .*no image that can be used"):
        build_with(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"task\.prior\.path"):
        build_with(dogs, dogs / "run")
    assert not (tmp_path / "class_images").exists()


def test_an_inpainting_model_draws_class_images(tmp_path: Path):
    objective = objective_of(FULL, folder_of("inpainting"), tmp_path, prior=PRIOR)
    assert len(objective.batch(plan_for(objective))) == 10
    assert len(list((tmp_path / "class_images").iterdir())) == 6


def test_a_single_file_and_its_folder_begin_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = folder_of("sd")
    states = {
        name: as_in_files(name, part.state_dict())
        for name, part in build("sd").components.items()
        if hasattr(part, "state_dict")
    }
    configs = {name: json.loads((folder / name / "config.json").read_text("utf-8")) for name in states}
    save_file(to_original_file(states, configs), tmp_path / "model.safetensors")
    opened = SingleFile.open

    def open_with_config(path: Path, *, prediction_type: Any = None) -> SingleFile:
        return opened(path, config=folder, prediction_type=prediction_type)  # it has no published shape

    monkeypatch.setattr(SingleFile, "open", open_with_config)
    stated = objective_of(FULL, tmp_path / "model.safetensors", tmp_path, prediction_type="v_prediction")
    assert stated.scheduler.prediction_type == "v_prediction"
    objective, expected = (
        objective_of(FULL, tmp_path / "model.safetensors", tmp_path),
        objective_of(FULL, folder, tmp_path),
    )
    for name, tensor in expected.state_dict().items():
        assert torch.equal(objective.state_dict()[name], tensor), name


@pytest.mark.parametrize(("kind", "channels"), [("inpainting", 5), ("instruct", 4)])
def test_a_model_of_text_to_image_converts_to_another_kind(kind: str, channels: int, tmp_path: Path):
    import diffusers

    objective = objective_of(FULL, folder_of("sd"), tmp_path, convert_to=kind)
    batch = objective.batch(plan_for(objective))
    assert batch[4].shape == (8, channels, 8, 8)
    assert batch[4].abs().mean() > 0.01
    plain = objective_of(FULL, folder_of("sd"), tmp_path)
    loss = objective(*batch).total
    assert loss.item() == pytest.approx(
        plain(*batch[:4]).total.item(), rel=1e-6
    )  # the rest counts for nothing
    loss.backward()
    kernel = objective.unet.conv_in.weight
    assert kernel.grad is not None
    assert kernel.grad[:, 4:].abs().amax() > 0
    objective.save(tmp_path / "model", objective.state_dict())
    name = {
        "inpainting": "StableDiffusionInpaintPipeline",
        "instruct": "StableDiffusionInstructPix2PixPipeline",
    }[kind]
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert type(pipe).__name__ == name
    assert pipe.unet.config.in_channels == 4 + channels
    again = objective_of(FULL, tmp_path / "model", tmp_path)
    assert (again.inpaints, again.edits) == (kind == "inpainting", kind == "instruct")


def edited_index(tmp_path: Path, family: str, **changes: object) -> Path:
    folder = tmp_path / "edited"
    shutil.copytree(folder_of(family), folder)
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    (folder / "model_index.json").write_text(json.dumps(index | changes), "utf-8")
    return folder


@pytest.mark.parametrize("name", ["StableDiffusionUpscalePipeline", "LatentgenPixelPipeline", "FluxPipeline"])
def test_other_kinds_of_models_are_refused(name: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=f"init_from .*'{name}'"):
        objective_of(FULL, edited_index(tmp_path, "sd", _class_name=name), tmp_path)


def test_the_refiner_is_refused(tmp_path: Path):
    from tests.pipelines.sdxl import build_refiner

    build_refiner().save_pretrained(tmp_path / "refiner")
    with pytest.raises(ConfigError, match=r"init_from .*refiner"):
        objective_of(FULL, tmp_path / "refiner", tmp_path)


def test_a_model_for_edits_needs_images_before_the_edit(tmp_path: Path):
    with pytest.raises(DatasetError, match="before"):
        objective_of(FULL, folder_of("instruct"), tmp_path, Pictures(edited=False))


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("inpainting", {"convert_to": "instruct"}, r"task\.convert_to is instruct"),
        ("sdxl", {"convert_to": "instruct"}, r"task\.convert_to is instruct"),
        ("instruct", {"convert_to": "inpainting"}, r"task\.convert_to is inpainting"),
        ("instruct", {"prior": PRIOR}, r"task\.prior"),
        ("instruct", {"caption_dropout": 0.1}, r"task\.caption_dropout"),
        ("sd", {"conditioning_dropout": 0.1}, r"task\.conditioning_dropout"),
        ("sd", {"prediction_type": "v_prediction"}, r"task\.prediction_type"),
    ],
)
def test_fields_that_do_not_fit_the_model(family: str, fields: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        objective_of(FULL, folder_of(family), tmp_path, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"method": {"kind": "textual_inversion", "token": "<x>", "initializer": "cat"}, "prior": PRIOR},
            "prior",
        ),
        ({"method": {"kind": "lora"}, "guidance_scale": 3}, "guidance_scale"),
        ({"method": {"kind": "lora"}, "convert_to": "instruct"}, "convert_to"),
        ({"method": FULL, "prior": PRIOR | {"prompt": "a\0b"}}, "NUL"),
    ],
)
def test_recipes_that_do_not_fit_themselves(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        FinetuneTask.model_validate({"kind": "finetune"} | fields)
