"""The text-to-image objective, and what it saves, against diffusers and transformers."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentgen.errors import CheckpointMismatchError, ConfigError, ResumeError
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.train.checkpoint import load_latest
from latentgen.train.config import TextToImageTask, TrainConfig
from latentgen.train.data import open_data
from latentgen.train.objectives import build_objective
from latentgen.train.objectives.text_to_image import TextToImageObjective
from latentgen.train.trainer import train
from tests.train.oracles import assert_the_loss_is_that_of_diffusers, images_of
from tests.train.recipes import COLOURS, MakeRecipe, plan_for

PIXELS = ("task.vae=null", "task.unet.in_channels=3", "task.unet.out_channels=3", "task.unet.sample_size=16")
FRESH = "task.reinit_layers=[conv_in, conv_out]"


def build(config: TrainConfig, assets: Path | None = None) -> TextToImageObjective:
    assert isinstance(config.task, TextToImageTask)
    torch.manual_seed(1)
    return TextToImageObjective(
        config.task,
        open_data(config.data),
        seed=config.seed,
        device=torch.device("cpu"),
        init_from=config.init_from,
        assets=assets,
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_that_of_diffusers(
    prediction_type: str, text_to_image_recipe: MakeRecipe, tmp_path: Path
):
    objective = build(text_to_image_recipe(f"task.scheduler.prediction_type={prediction_type}"))
    assert_the_loss_is_that_of_diffusers(objective, tmp_path, prediction_type)


def test_gradients_reach_the_unet_and_the_text_encoder_alone(text_to_image_recipe: MakeRecipe):
    objective = build(text_to_image_recipe())
    objective(*objective.batch(plan_for(objective))).total.backward()
    names = {name.split(".")[0] for name, _ in objective.named_parameters()}
    assert names == {"unet", "text_encoder"}
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_timesteps_cover_the_schedule_evenly(text_to_image_recipe: MakeRecipe):
    objective = build(text_to_image_recipe())
    seen: list[int] = []
    for step in range(50):
        timesteps = objective.batch(plan_for(objective, step))[2]
        assert sorted(timestep * 8 // 1000 for timestep in timesteps.tolist()) == list(range(8))
        seen += timesteps.tolist()
    assert min(seen) < 20
    assert max(seen) > 980
    assert len(set(seen)) > 250


def test_timestep_shift_moves_samples_towards_noise(text_to_image_recipe: MakeRecipe):
    plain, shifted = (build(text_to_image_recipe(f"task.timestep_shift={shift}")) for shift in (1, 3))
    before, after = (objective.batch(plan_for(objective))[2] / 1000 for objective in (plain, shifted))
    torch.testing.assert_close(after, 3 * before / (1 + 2 * before), atol=4e-3, rtol=0)


def test_captions_are_dropped_at_their_rate(text_to_image_recipe: MakeRecipe):
    for rate in (0.0, 0.25, 1.0):
        objective = build(text_to_image_recipe(f"task.caption_dropout={rate}"))
        empty = objective._text.tokenize([""])[0]
        rows = [row for step in range(50) for row in objective.batch(plan_for(objective, step))[3]]
        dropped = sum(torch.equal(row, empty) for row in rows) / len(rows)
        assert dropped == pytest.approx(rate, abs=0.0 if rate in (0, 1) else 0.08)


def test_captions_belong_to_their_images(text_to_image_recipe: MakeRecipe):
    objective = build(text_to_image_recipe("task.caption_dropout=0"))
    plan = plan_for(objective, size=12)
    tokens = objective.batch(plan)[3]
    texts = [f"{colour} disc" for colour in sorted(COLOURS)]
    expected = objective._text.tokenize([texts[item // 2] for item in plan.items])
    assert torch.equal(tokens, expected)
    assert set(Counter(plan.items).values()) == {1}


def test_nothing_of_a_long_caption_is_dropped(text_to_image_recipe: MakeRecipe, image_folder: Path):
    words = " ".join(COLOURS * 3)
    for colour in COLOURS:
        (image_folder / f"{colour}.txt").write_text(words, "utf-8")
    objective = build(text_to_image_recipe("task.caption_dropout=0"))
    *_, tokens = batch = objective.batch(plan_for(objective, size=2))
    assert tokens.shape[2] == 8
    assert tokens.shape[1] > 1
    assert (
        objective._text.tokenizer.decode(tokens[0].flatten(), skip_special_tokens=True).split()
        == words.split()
    )
    assert objective(*batch).total.isfinite()


def test_the_saved_folder_draws_the_same_in_diffusers(text_to_image_recipe: MakeRecipe, tmp_path: Path):
    from diffusers import StableDiffusionPipeline

    objective = build(text_to_image_recipe())
    objective.save(tmp_path, objective.state_dict())
    oracle = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    theirs = images_of(oracle, "red disc", height=16, width=16)
    pipeline = TextToImagePipeline.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert np.abs(images_of(pipeline, "red disc", height=16, width=16) - theirs).max() < 1e-4


def test_half_precision_halves_the_file(text_to_image_recipe: MakeRecipe, tmp_path: Path):
    objective = build(text_to_image_recipe("task.save_half=true"))
    objective.save(tmp_path, objective.state_dict())
    for file in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        tensors = load_file(tmp_path / f"{file}.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_resuming_keeps_the_tokenizer(text_to_image_recipe: MakeRecipe, image_folder: Path, tmp_path: Path):
    first = build(text_to_image_recipe())
    first.save_tokenizer(tmp_path / "run")
    for colour in COLOURS:  # a tokenizer generated again would differ
        (image_folder / f"{colour}.txt").write_text(f"circular {colour}", "utf-8")
    resumed = build(text_to_image_recipe(), assets=tmp_path / "run")
    assert resumed._text.tokenizer.get_vocab() == first._text.tokenizer.get_vocab()
    assert build(text_to_image_recipe())._text.tokenizer.get_vocab() != first._text.tokenizer.get_vocab()
    with pytest.raises(ResumeError, match="tokenizer"):
        build(text_to_image_recipe(), assets=tmp_path / "other")


def test_starting_from_a_trained_model(text_to_image_recipe: MakeRecipe, image_folder: Path, tmp_path: Path):
    first = build(text_to_image_recipe())
    first.save(tmp_path / "model", first.state_dict())
    (image_folder / "red.txt").write_text("something else", "utf-8")
    tuned = build(text_to_image_recipe(f"init_from={tmp_path / 'model'}"))
    state = tuned.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in first.state_dict().items())
    assert all(tensor.dtype == torch.float32 for tensor in tuned.parameters())
    assert all(parameter.requires_grad for parameter in tuned.parameters())
    assert tuned._text.tokenizer.get_vocab() == first._text.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.unet.in_channels=3", "in_channels is 3"),
        ("task.unet.out_channels=8", "out_channels is 8"),
        ("task.unet.cross_attention_dim=32", "cross_attention_dim is 32"),
        ("data.image_size=17", "17"),
        ("task.text_encoder.pad_token_id=0", "pad_token_id is 0 and must be 1"),
        ("task.text_encoder.vocab_size=100", "vocab_size is 100"),
        ("task.scheduler.beta_start=-1", "beta_start"),
    ],
)
def test_configurations_that_do_not_fit(override: str, message: str, text_to_image_recipe: MakeRecipe):
    with pytest.raises(ConfigError, match=message):
        build(text_to_image_recipe(override))


@pytest.fixture
def latent_model(text_to_image_recipe: MakeRecipe, tmp_path: Path) -> Path:
    """A folder with a model of four channels."""
    objective = build(text_to_image_recipe())
    objective.save(tmp_path / "latent", objective.state_dict())
    return tmp_path / "latent"


@pytest.fixture
def outline(text_to_image_recipe: MakeRecipe, latent_model: Path) -> TrainConfig:
    """Pixels, on the layers and the frozen text encoder of that model."""
    options = (f"init_from={latent_model}", FRESH, "task.train_text_encoder=false")
    return text_to_image_recipe(*PIXELS, *options)


def test_the_latents_are_the_pixels(text_to_image_recipe: MakeRecipe):
    config = text_to_image_recipe(*PIXELS)
    objective = build(config)
    data, plan = open_data(config.data), plan_for(objective, size=12)
    latents = objective.batch(plan)[0]
    assert latents.shape == (12, 3, 16, 16)
    for image, place in zip(latents, plan.items, strict=True):
        pixels = data.sample(place // 2, random.Random(0)).image  # all views are equal: the images are square
        levels = ((image + 1) * 127.5).round().to(torch.uint8)
        assert np.array_equal(levels.permute(1, 2, 0).numpy(), np.asarray(pixels))


def test_the_model_draws(text_to_image_recipe: MakeRecipe, tmp_path: Path):
    objective = build(text_to_image_recipe(*PIXELS, "task.guidance_scale=2"))
    objective.save(tmp_path / "model", objective.state_dict())
    pipeline = TextToImagePipeline.from_pretrained(tmp_path / "model", dtype="float32", device="cpu")
    assert pipeline.default_guidance_scale == 2.0
    images = pipeline("red disc", num_inference_steps=2, seed=1, output_type="pt", progress=False).images
    assert isinstance(images, torch.Tensor)
    assert images.shape == (1, 3, 16, 16)


def test_reinit_layers_begin_at_random_and_all_others_as_they_were(outline: TrainConfig, latent_model: Path):
    old = load_file(latent_model / "unet" / "diffusion_pytorch_model.safetensors")
    new = build(outline).unet.state_dict()
    assert new.keys() == old.keys()
    assert new["conv_in.weight"].shape[1] == new["conv_out.weight"].shape[0] == 3
    for name, tensor in new.items():
        if not name.startswith(("conv_in.", "conv_out.")):
            assert torch.equal(tensor, old[name]), name
    assert new["conv_in.weight"].unique().numel() > 400


def test_what_is_not_fresh_must_fit(text_to_image_recipe: MakeRecipe, latent_model: Path):
    with pytest.raises(CheckpointMismatchError, match=r"2 misshapen \(conv_out"):
        build(text_to_image_recipe(*PIXELS, f"init_from={latent_model}", "task.reinit_layers=[conv_in]"))
    with pytest.raises(CheckpointMismatchError, match="misshapen"):
        build(text_to_image_recipe(*PIXELS, f"init_from={latent_model}"))
    with pytest.raises(ConfigError, match=r"'conv_inn' is not a layer .*conv_in,"):
        build(text_to_image_recipe(*PIXELS, f"init_from={latent_model}", "task.reinit_layers=[conv_inn]"))


def test_a_frozen_text_encoder_is_in_the_model_and_in_no_checkpoint(outline: TrainConfig, latent_model: Path):
    model = train(outline)
    state = load_latest(outline.output_dir)
    for weights in (state.weights, state.ema):
        assert {name.split(".")[0] for name in weights} == {"unet"}
    file = Path("text_encoder", "model.safetensors")
    ours, theirs = load_file(model / file), load_file(latent_model / file)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_latents_of_four_channels_do_not_fit(text_to_image_recipe: MakeRecipe):
    with pytest.raises(ConfigError, match=r"in_channels is 4; with task\.vae it can be 3 for"):
        build_objective(text_to_image_recipe("task.vae=null"), device=torch.device("cpu"))
