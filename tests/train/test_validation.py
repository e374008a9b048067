"""Validation: it does not change the training, and agrees with the trained model."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageColor

from latentgen.errors import ConfigError, DatasetError, ResumeError
from latentgen.generation_parameters import GenerationParameters
from latentgen.pipelines.inpaint import InpaintPipeline
from latentgen.pipelines.instruct_pix2pix import InstructPix2PixPipeline
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.train.checkpoint import load_latest
from latentgen.train.config import FolderData, TrainConfig
from latentgen.train.data import BatchIndices, open_data, open_splits, sample_rng, split, to_tensor
from latentgen.train.objectives.degradation import random_mask
from latentgen.train.objectives.latent_diffusion import middles
from latentgen.train.trainer import Trainer, train
from tests.train.finetuning import finetune_recipe, folder_of
from tests.train.recipes import COLOURS, MakeRecipe, without_validation
from tests.train.runs import assert_same_checkpoint, on_step, rows_of, scalars_of

PROMPTS = "validation.prompts=[red disc, a house]"
IMAGES = (PROMPTS, "validation.num_inference_steps=2", "validation.every=2", "validation.guidance_scale=3")
LOSS = ("validation_fraction=0.34", "validation.loss_every=2", "validation.timesteps=3", "validation.seed=9")
RECIPES = ("autoencoder_recipe", "text_to_image_recipe", "upscale_recipe", "paired_recipe")


def validation_losses(config: TrainConfig) -> dict[int, float]:
    return {row["step"]: row["validation_loss"] for row in rows_of(config) if "validation_loss" in row}


def assert_same_training(ours: TrainConfig, theirs: TrainConfig) -> None:
    last = f"checkpoint-{ours.max_steps:08d}"
    assert_same_checkpoint(ours.output_dir / last, theirs.output_dir / last)
    training = [[row for row in rows_of(run) if "loss" in row] for run in (ours, theirs)]
    assert training[0] == training[1]
    for file in (theirs.output_dir / "model").rglob("*.safetensors"):
        assert file.read_bytes() == (ours.output_dir / file.relative_to(theirs.output_dir)).read_bytes()


@pytest.mark.parametrize(
    "overrides",
    [(), ("ema_decay=0", "optimizer.name=adamw"), ("mixed_precision=bf16",)],
    ids=["muon", "adamw", "bf16"],
)
def test_validation_does_not_change_the_training(
    overrides: tuple[str, ...], text_to_image_recipe: MakeRecipe, tmp_path: Path
):
    # Dropout uses torch's generator in every step, and must be off while images are generated.
    common = (*overrides, "task.text_encoder.attention_dropout=0.3", "validation_fraction=0.34")
    plain = without_validation(text_to_image_recipe(*common, *LOSS))
    validated = text_to_image_recipe(
        *common, *IMAGES, *LOSS, "validation.at_start=true", f"output_dir={tmp_path / 'validated'}"
    )
    train(plain)
    train(validated)
    assert_same_training(validated, plain)
    samples = sorted(folder.name for folder in (validated.output_dir / "samples").iterdir())
    assert samples == ["step-00000000", "step-00000002", "step-00000004"]
    assert sorted(validation_losses(validated)) == [0, 2, 4]


@pytest.mark.parametrize("name", RECIPES)
def test_every_task_has_a_validation_loss(name: str, request: pytest.FixtureRequest, tmp_path: Path):
    recipe: MakeRecipe = request.getfixturevalue(name)
    plain = without_validation(recipe(*LOSS))
    validated = recipe(*LOSS, f"output_dir={tmp_path / 'validated'}")
    train(plain)
    train(validated)
    assert_same_training(validated, plain)
    losses = validation_losses(validated)
    assert sorted(losses) == [2, 4]
    assert losses[2] != losses[4]


def test_the_images_equal_those_of_the_trained_model(text_to_image_recipe: MakeRecipe):
    config = text_to_image_recipe(*IMAGES, "validation.images_per_prompt=2", "validation.seed=7")
    model = train(config)
    folder = config.output_dir / "samples" / "step-00000004"
    pipeline = TextToImagePipeline.from_pretrained(model, dtype="float32", device="cpu")
    for number, prompt in enumerate(("red disc", "a house")):
        result = pipeline(
            prompt, num_inference_steps=2, guidance_scale=3, num_images_per_prompt=2, seed=7, progress=False
        )
        for seed, expected in zip((7, 8), result.images, strict=True):
            with Image.open(folder / f"prompt-{number:02d}-seed-{seed}.png") as image:
                difference = np.asarray(image, np.int16) - np.asarray(expected, np.int16)
                written = GenerationParameters.from_text(image.info["parameters"])
            assert np.abs(difference).max() <= 1
            assert (written.prompt, written.seed, written.steps) == (prompt, seed, 2)
            assert written.other == (("Training step", "4"),)
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.size == (2 * 16 + 4, 2 * 16 + 4)
    earlier = config.output_dir / "samples" / "step-00000002" / "sheet.png"
    assert earlier.read_bytes() != (folder / "sheet.png").read_bytes()


@pytest.mark.parametrize("name", ["upscale_recipe", "paired_recipe"])
def test_image_conditioned_models_transform_validation_images(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
):
    from latentgen.pipelines.concat import ConcatImagePipeline
    from latentgen.pipelines.upscale import UpscalePipeline

    recipe: MakeRecipe = request.getfixturevalue(name)
    plain = without_validation(recipe(*LOSS, "max_steps=2"))
    train(plain)
    validated = recipe(
        *(
            "validation_fraction=0.34",
            "max_steps=2",
            "validation.images=2",
            "validation.num_inference_steps=2",
        ),
        *("validation.seed=4", f"output_dir={tmp_path / 'validated'}"),
    )
    model = train(validated)
    assert_same_training(validated, plain)
    folder = validated.output_dir / "samples" / "step-00000002"
    assert len(list(folder.iterdir())) == 2 * 3 + 1
    assert not (model / "sheet.png").exists()
    with Image.open(folder / "image-01-made.png") as image:
        made, caption = (
            np.asarray(image, np.int16),
            GenerationParameters.from_text(image.info["parameters"]).prompt,
        )
    with Image.open(folder / "image-01-true.png") as image:
        assert caption.split()[0] in COLOURS
        colour = ImageColor.getrgb(caption.split()[0])
        assert image.getpixel((8, 8)) == colour
    with Image.open(folder / "image-01-shown.png") as image:
        shown = image.convert("RGB")
    options = {"num_inference_steps": 2, "seed": 4, "progress": False}
    if name == "upscale_recipe":
        small = shown.resize((8, 8), Image.Resampling.NEAREST)
        upscale = UpscalePipeline.from_pretrained(model, dtype="float32", device="cpu")
        expected = upscale(caption, image=small, noise_level=0, **options).images[0]
    else:
        assert len({*np.asarray(shown)[8, 8].tolist()}) == 1, "gray"
        paired = ConcatImagePipeline.from_pretrained(model, dtype="float32", device="cpu")
        expected = paired(caption, image=shown, **options).images[0]
    assert np.abs(np.asarray(expected, np.int16) - made).max() <= 1


@pytest.mark.parametrize("family", ["inpainting", "instruct"])
def test_finetuned_models_transform_validation_images(family: str, tmp_path: Path, image_folder: Path):
    rows = []
    for colour in COLOURS:
        Image.new("RGB", (16, 16), colour).save(image_folder / f"before-{colour}.png")
        names = {"file_name": f"{colour}.png", "before_file_name": f"before-{colour}.png"}
        rows.append({**names, "text": f"{colour} disc"})
        (image_folder / f"{colour}.txt").unlink()
    (image_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    validation = {"images": 2, "num_inference_steps": 2, "seed": 4}
    task = {"kind": "finetune", "method": {"kind": "full"}, "views_per_image": 2}
    common: dict[str, Any] = {
        "task": task,
        "init_from": str(folder_of(family)),
        "validation_fraction": 0.34,
        "max_steps": 1,
    }
    config = finetune_recipe(tmp_path, image_folder, "full", validation=validation, **common)
    plain = without_validation(config.model_copy(update={"output_dir": tmp_path / "plain"}))
    train(plain)
    model = train(config)
    assert_same_training(config, plain)
    held_out = open_splits(config).validation
    assert held_out is not None
    rng = sample_rng(4, "example", 1)
    view = held_out.sample(1, rng)
    caption = view.captions.draw(rng)
    images = {}
    for kind in ("shown", "made", "true"):
        with Image.open(config.output_dir / "samples" / "step-00000001" / f"image-01-{kind}.png") as image:
            images[kind] = image.convert("RGB")
    assert images["true"] == view.image
    options: dict[str, Any] = {"num_inference_steps": 2, "seed": 4, "progress": False}
    if family == "inpainting":
        mask = random_mask((16, 16), rng)
        inpaint = InpaintPipeline.from_pretrained(model, dtype="float32", device="cpu")
        expected = inpaint(caption, image=view.image, mask_image=mask, **options).images[0]
        kept = np.asarray(mask) == 0
        assert (np.asarray(images["made"])[kept] == np.asarray(view.image)[kept]).all()
        assert (np.asarray(images["shown"])[~kept] == 127).all()
    else:
        assert images["shown"] == view.before
        edit = InstructPix2PixPipeline.from_pretrained(model, dtype="float32", device="cpu")
        expected = edit(caption, image=images["shown"], **options).images[0]
    assert np.abs(np.asarray(expected, np.int16) - np.asarray(images["made"], np.int16)).max() <= 1


def test_validation_images_need_an_image_before_the_edit(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    edits = tmp_path / "edits"
    edits.mkdir()
    for name in ("a.png", "before.png"):
        Image.new("RGB", (16, 16), "red").save(edits / name)
    row = {"file_name": "a.png", "before_file_name": "before.png", "text": "red disc"}
    (edits / "metadata.jsonl").write_text(json.dumps(row), "utf-8")
    monkeypatch.setattr("latentgen.train.objectives.latent_diffusion.encode_views", None)
    config = finetune_recipe(
        tmp_path,
        edits,
        "full",
        task={"kind": "finetune", "method": {"kind": "full"}},
        init_from=str(folder_of("instruct")),
        validation={
            "images": 1,
            "data": {"kind": "imagefolder", "path": str(image_folder), "image_size": 16},
        },
    )
    with pytest.raises(DatasetError, match="`before`"):
        train(config)


@pytest.mark.parametrize(
    ("family", "validation", "message"),
    [
        (
            "inpainting",
            {"prompts": ["x"]},
            r"validation\.prompts: .* validation_fraction or validation\.data",
        ),
        ("sd", {"images": 1}, r"validation\.images: .* validation\.prompts"),
    ],
)
def test_validation_that_the_model_cannot_do_is_refused_early(
    family: str, validation: dict[str, Any], message: str, tmp_path: Path, image_folder: Path
):
    config = finetune_recipe(
        tmp_path,
        image_folder,
        "lora",
        init_from=str(folder_of(family)),
        validation_fraction=0.34,
        validation=validation,
    )
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not (config.output_dir / "class_images").exists()


def diffusers_loss(config: TrainConfig, image: Image.Image, caption: str, sample: int) -> list[float]:
    """The squared error of one image at the timesteps 166, 500 and 833, with the trained model in diffusers."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    assert config.validation is not None
    pipe = StableDiffusionPipeline.from_pretrained(config.output_dir / "model", safety_checker=None)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    plan = BatchIndices(config.validation.seed, 0, 2, (sample,), (sample,))
    tokens = pipe.tokenizer(caption, padding="max_length", return_tensors="pt").input_ids
    losses = []
    with torch.no_grad():
        posterior = pipe.vae.encode(to_tensor([image])).latent_dist
        factor = pipe.vae.config.scaling_factor
        mean, std = ((tensor * factor).half().float() for tensor in (posterior.mean, posterior.std))
        latents = mean + std * plan.noise(mean.shape[1:], "posterior")
        noise = plan.noise(mean.shape[1:], "noise")
        context = pipe.text_encoder(tokens).last_hidden_state
        for timestep in (166, 500, 833):
            at = torch.tensor([timestep])
            output = pipe.unet(scheduler.add_noise(latents, noise, at), at, context).sample
            target = scheduler.get_velocity(latents, noise, at)
            losses.append(float((output - target).square().mean()))
    return losses


def test_the_validation_loss_equals_that_of_diffusers(text_to_image_recipe: MakeRecipe):
    config = text_to_image_recipe(*LOSS, "trackers=[tensorboard]")
    train(config)
    held_out = open_splits(config).validation
    assert held_out is not None
    assert len(held_out) == 2
    views = [held_out.sample(item, sample_rng(9, "cached view", item, 0)) for item in range(2)]
    losses = [
        diffusers_loss(config, view.image, view.captions.texts[0], sample)
        for sample, view in enumerate(views)
    ]
    each = np.mean(losses, axis=0)
    assert validation_losses(config)[4] == pytest.approx(each.mean(), rel=2e-4)
    scalars = scalars_of(config)
    for timestep, expected in zip((166, 500, 833), each, strict=True):
        assert dict(scalars[f"validation/timestep {timestep}"])[4] == pytest.approx(expected, rel=2e-4)


def test_the_validation_loss_does_not_depend_on_the_batch(text_to_image_recipe: MakeRecipe, tmp_path: Path):
    losses = []
    for size in (4, 1):
        config = text_to_image_recipe(
            *("validation_fraction=0.5", "validation.seed=3", "validation.at_start=true", "max_steps=1"),
            *(f"batch_size={size}", f"output_dir={tmp_path / str(size)}"),
        )
        train(config)
        losses.append(validation_losses(config)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_separate_validation_data(text_to_image_recipe: MakeRecipe, image_folder: Path, tmp_path: Path):
    folder = tmp_path / "others"
    folder.mkdir()
    for name in ("red", "blue", "green"):
        for suffix in (".png", ".txt"):
            shutil.copy(image_folder / f"{name}{suffix}", folder)
    data = {"kind": "imagefolder", "path": str(folder), "image_size": 16}
    config = text_to_image_recipe(
        f"validation.data={yaml.safe_dump(data, default_flow_style=True).strip()}", "validation.loss_images=2"
    )
    parts = open_splits(config)
    assert len(parts.training) == 6
    assert parts.validation is not None
    assert len(parts.validation) == 2
    train(config)
    assert sorted(validation_losses(config)) == [4]


def test_validation_images_are_never_trained_on(
    autoencoder_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    from latentgen.train.data.folder import ImageFolder

    seen: list[int] = []
    original = ImageFolder.sample

    def sample(self: ImageFolder, index: int, rng: Any) -> Any:
        seen.append(index)
        return original(self, index, rng)

    monkeypatch.setattr(ImageFolder, "sample", sample)
    monkeypatch.setattr(Trainer, "save_model", lambda *_, **__: None)
    monkeypatch.setattr("latentgen.train.trainer.write_card", lambda *_, **__: None)
    train(without_validation(autoencoder_recipe(*LOSS, "max_steps=6")))
    trained = set(seen)
    assert len(trained) == 4
    seen.clear()
    held_out = open_splits(autoencoder_recipe(*LOSS)).validation
    assert held_out is not None
    for item in range(len(held_out)):
        held_out.sample(item, sample_rng(0))
    assert set(seen) | trained == set(range(6))
    assert not set(seen) & trained


def test_a_single_image_cannot_be_split(tmp_path: Path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a", "utf-8")
    data = open_data(FolderData(kind="imagefolder", path=tmp_path, image_size=16))
    with pytest.raises(DatasetError, match="validation_fraction"):
        split(data, 0.1)


def test_a_resumed_run_catches_up_on_validation(
    text_to_image_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    common = (*IMAGES, *LOSS, "checkpoint_every=100", "log_every=3", "trackers=[tensorboard]")
    whole = text_to_image_recipe(*common, f"output_dir={tmp_path / 'whole'}")
    train(whole)
    config = text_to_image_recipe(*common)
    on_step(monkeypatch, before=lambda _, step: signal.raise_signal(signal.SIGTERM) if step == 1 else None)
    with pytest.raises(SystemExit):
        train(config)
    assert load_latest(config.output_dir).step == 2
    assert not (config.output_dir / "samples").exists()
    resumed = text_to_image_recipe(*common, "resume=true")
    train(resumed)
    assert_same_training(resumed, whole)
    assert rows_of(resumed) == rows_of(whole)
    for file in sorted((whole.output_dir / "samples").rglob("*.png")):
        assert file.read_bytes() == (resumed.output_dir / file.relative_to(whole.output_dir)).read_bytes()
    # Everything but the speed.
    scalars = [
        {tag: values for tag, values in scalars_of(run).items() if "second" not in tag}
        for run in (resumed, whole)
    ]
    assert scalars[0] == scalars[1]


def test_a_resumed_run_may_change_its_validation_but_not_the_split(autoencoder_recipe: MakeRecipe):
    train(autoencoder_recipe("max_steps=1", "validation_fraction=0.34", "validation.every=7"))
    resumed = autoencoder_recipe("max_steps=2", "resume=true", *LOSS)
    train(resumed)
    assert sorted(validation_losses(resumed)) == [1, 2]
    with pytest.raises(ResumeError, match=r"validation_fraction was 0\.34, is 0\.2"):
        train(autoencoder_recipe("max_steps=3", "resume=true", *LOSS, "validation_fraction=0.2"))


def test_midpoints_of_the_schedule():
    assert middles(1000, 4) == [125, 375, 625, 875]
    assert middles(1000, 1) == [500]
    assert middles(4, 100) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("autoencoder_recipe", (PROMPTS,), "validation.prompts"),
        ("text_to_image_recipe", ("validation.images=2", "validation_fraction=0.2"), "validation.images"),
        ("paired_recipe", ("validation.images=2",), "validation.images"),
        ("text_to_image_recipe", ("validation={}",), "validation: "),
        ("text_to_image_recipe", ('validation.prompts=["a\\0b"]',), "NUL"),
        ("text_to_image_recipe", ("validation.data={kind: emoji, image_size: 64}",), "64.*image_size, 16"),
        (
            "text_to_image_recipe",
            ("validation_fraction=0.1", "validation.data={kind: emoji, image_size: 16}"),
            "validation.data",
        ),
        ("text_to_image_recipe", ("validation_fraction=0.6",), "validation_fraction"),
    ],
)
def test_invalid_recipes_name_the_field(
    recipe: str, overrides: tuple[str, ...], message: str, request: pytest.FixtureRequest
):
    with pytest.raises(ConfigError, match=message):
        request.getfixturevalue(recipe)(*overrides)
