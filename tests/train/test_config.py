"""Recipes: validated before anything is loaded or built."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers.optimization import get_scheduler

from latentgen.errors import ConfigError
from latentgen.train.config import FinetuneTask, Optimizer, TrainConfig, load_config
from latentgen.train.config.base import has_field
from tests.train.recipes import MakeRecipe

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "train").glob("*.yaml"))
assert RECIPES


@pytest.fixture
def fields() -> dict[str, Any]:
    return {
        "output_dir": "runs/x",
        "task": {"kind": "autoencoder", "vae": {"latent_channels": 4}},
        "data": {"kind": "emoji"},
        "batch_size": 8,
        "max_steps": 100,
    }


def load(fields: Any, folder: Path, *overrides: str) -> TrainConfig:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields), "utf-8")
    return load_config(path, overrides)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_builds_its_configurations(path: Path):
    from latentgen.diffusion.scheduler import Scheduler
    from latentgen.models.config import CLIPTextConfig, VAEConfig
    from latentgen.models.unet_config import UNetConfig
    from latentgen.train.config import AutoencoderTask, TextToImageTask, UpscaleTask

    task = load_config(path).task
    if isinstance(task, AutoencoderTask):
        VAEConfig.from_json(task.vae)
    elif not isinstance(task, FinetuneTask):  # whose configurations are the checkpoint's
        UNetConfig.from_json(task.unet)
        Scheduler.from_config(task.scheduler)
    if isinstance(task, TextToImageTask):
        CLIPTextConfig.from_json(task.text_encoder)
    if isinstance(task, UpscaleTask):
        Scheduler.from_config(task.low_res_scheduler)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"bach_size": 8}, "bach_size"),
        ({"data": {"kind": "emoji", "size": 64}}, "data.emoji.size"),
        ({"task": {"kind": "autoencoder", "vae": {}, "lr": 1}}, "task.autoencoder.lr"),
        ({"optimizer": {"momentum": 0.9}}, "optimizer.momentum"),
    ],
)
def test_unknown_keys_fail(overrides: dict[str, Any], field: str, fields: dict[str, Any], tmp_path: Path):
    with pytest.raises(ConfigError, match=f"{field}: Extra inputs"):
        load(fields | overrides, tmp_path)


@pytest.mark.parametrize(
    "override",
    [
        *("batch_size=0", "batch_size=2.5", "max_steps=-1", "ema_decay=1", "mixed_precision=fp8"),
        *("optimizer.learning_rate=0", "optimizer.learning_rate=.nan", "optimizer.learning_rate=.inf"),
        *("optimizer.betas=[0.9, 1.0]", "optimizer.betas=[0.9]", "data.image_size=4", "data.kind=folder"),
        *("task.kind=lora", "task.vae=null", "output_dir=null"),
    ],
)
def test_bounds(override: str, fields: dict[str, Any], tmp_path: Path):
    load(fields, tmp_path)
    with pytest.raises(ConfigError, match=override.partition("=")[0].split(".")[-1]):
        load(fields, tmp_path, override)


def test_all_problems_are_listed_at_once(fields: dict[str, Any], tmp_path: Path):
    with pytest.raises(ConfigError, match=r"seed.*batch_size.*max_steps") as caught:
        load(fields, tmp_path, "batch_size=0", "max_steps=0", "seed=x")
    assert "recipe.yaml" in str(caught.value)


TEXT_TO_IMAGE_TASK = "task={kind: text_to_image, vae: m, text_encoder: {}, unet: {}, scheduler: {}}"
UPSCALE_TASK = "task={kind: upscale, vae: m, text_encoder: m, unet: {}, scheduler: {}, low_res_scheduler: {}}"
PAIRED_TASK = "task={kind: paired, vae: m, text_encoder: m, unet: {}, scheduler: {}, degradation: %s}"
FULL_TASK = "task={kind: finetune, method: {kind: full}}"
LORA_TASK = "task={kind: finetune, method: {kind: lora}}"
TOKEN_TASK = "task={kind: finetune, method: {kind: textual_inversion, token: x, initializer: y}}"
TEXT_RATE = "optimizer.text_encoder_learning_rate=5.0e-6"
VALIDATION = "validation={loss_every: 9}"
BUCKETS = "data={kind: kohya, path: img, image_size: 64, bucket_step: 16, buckets: true}"
NO_BUCKETS = "data={kind: imagefolder, path: img, image_size: 64}"
UNCHECKED = "data={kind: webdataset, shards: a.tar, image_size: 64, check_images: false}"
IN_BACKWARD = ("optimizer.name=adafactor", "optimizer.step_in_backward=true", "optimizer.max_grad_norm=null")
OFFLOADED = "memory.offload_optimizer=true"


@pytest.mark.parametrize(
    ("overrides", "field", "fix"),
    [
        (("gradient_accumulation_steps=3",), "batch_size", "batch_size=9"),
        (("task.train_encoder=false",), "task.train_encoder", "init_from=m"),
        ((TEXT_TO_IMAGE_TASK, "task.train_text_encoder=false"), "task.train_text_encoder", "init_from=m"),
        ((TEXT_TO_IMAGE_TASK, "task.reinit_layers=[conv_in]"), "task.reinit_layers", "init_from=m"),
        ((UPSCALE_TASK, BUCKETS), "data.buckets", "data.buckets=false"),
        ((PAIRED_TASK % "haze",), "task.paired.degradation", "task.degradation=jpeg"),
        ((LORA_TASK, TEXT_RATE), TEXT_RATE.partition("=")[0], "task.method.train_text_encoder=true"),
        ((FULL_TASK, TEXT_RATE), TEXT_RATE.partition("=")[0], "task.method.train_text_encoder=true"),
        ((TOKEN_TASK, TEXT_RATE), TEXT_RATE.partition("=")[0], "optimizer.text_encoder_learning_rate=null"),
        (
            (LORA_TASK, "task.prior={prompt: [dog, cat], path: dogs}"),
            "task.finetune.prior",
            "task.prior.prompt=dog",
        ),
        (
            ("optimizer.decay_fraction=0.5", "optimizer.schedule=cosine"),
            "decay_fraction",
            "optimizer.schedule=warmup_stable_decay",
        ),
        ((NO_BUCKETS, "data.min_side=32"), "min_side", "data.buckets=true"),
        ((BUCKETS, "data.bucket_step=128"), "bucket_step 128", "data.bucket_step=64"),
        ((BUCKETS, "data.min_side=80"), "80 to 128", "data.min_side=64"),
        ((BUCKETS, "data.max_side=48"), "32 to 48", "data.max_side=64"),
        ((NO_BUCKETS, "data.keep_tokens=1"), "caption_shuffle", "data.caption_shuffle=true"),
        ((UNCHECKED, "data.on_bad_image=skip"), "check_images", "data.check_images=true"),
        ((UNCHECKED, "data.buckets=true"), "check_images", "data.check_images=true"),
        # Gradients that are used or moved one by one.
        (("optimizer.name=muon", OFFLOADED), OFFLOADED.partition("=")[0], "optimizer.name=adamw"),
        ((OFFLOADED, "mixed_precision=fp16"), OFFLOADED.partition("=")[0], "mixed_precision=bf16"),
        ((*IN_BACKWARD, OFFLOADED), OFFLOADED.partition("=")[0], "optimizer.name=adamw"),
        (
            (*IN_BACKWARD, "gradient_accumulation_steps=2"),
            "optimizer.step_in_backward",
            "gradient_accumulation_steps=1",
        ),
        ((*IN_BACKWARD, "mixed_precision=fp16"), "optimizer.step_in_backward", "mixed_precision=no"),
        (IN_BACKWARD[:2], "max_grad_norm", "optimizer.max_grad_norm=null"),
        (("optimizer.name=muon", *IN_BACKWARD[1:]), "step_in_backward", "optimizer.name=adamw"),
        # What would do nothing.
        (("validation_fraction=0.1",), "validation_fraction", VALIDATION),
        ((TEXT_TO_IMAGE_TASK, "task.loss.huber_c=0.2"), "huber_c", "task.loss.kind=huber"),
        (("memory.ema_device=cpu", "ema_decay=0"), "memory.ema_device", "ema_decay=0.9"),
        (
            (TEXT_TO_IMAGE_TASK, "compile=true", "memory.gradient_checkpointing=selective"),
            "memory.gradient_checkpointing",
            "memory.gradient_checkpointing=true",
        ),
        (("allow_changes=[seed, sede]",), "'sede'", "allow_changes=[seed]"),
        (("allow_changes=[task.unet.a, data.sed]",), "'data.sed'", "allow_changes=[data]"),
    ],
)
def test_fields_must_agree(
    overrides: tuple[str, ...], field: str, fix: str, fields: dict[str, Any], tmp_path: Path
):
    with pytest.raises(ConfigError, match=re.escape(field)):
        load(fields, tmp_path, *overrides)
    config = load(fields, tmp_path, *overrides, fix)
    # Checkpoints hold every field, also those that were not set.
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("context", "old", "new"),
    [
        ((VALIDATION,), "held_out=0.1", "validation_fraction=0.1"),
        ((FULL_TASK,), "task.cached_views=3", "task.views_per_image=3"),
        ((FULL_TASK,), "task.turn_into=instruct", "task.convert_to=instruct"),
        ((FULL_TASK,), "allow_changes=[task.cached_views]", "allow_changes=[task.views_per_image]"),
        ((), PAIRED_TASK % "colourisation", PAIRED_TASK % "colorization"),
        (
            ("task={kind: text_to_image, vae: m, text_encoder: {}, unet: {}, scheduler: {}}", "init_from=m"),
            "task.fresh_layers=[conv_in]",
            "task.reinit_layers=[conv_in]",
        ),
    ],
)
def test_old_names_of_fields_work_and_warn(
    context: tuple[str, ...], old: str, new: str, fields: dict[str, Any], tmp_path: Path
):
    expected = load(fields, tmp_path, *context, new)
    with pytest.warns(FutureWarning, match="is now called"):
        assert load(fields, tmp_path, *context, old) == expected


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_overrides_replace_fields_of_either_name(fields: dict[str, Any], tmp_path: Path):
    names = ("cached_views", "views_per_image")
    for name, override in itertools.product(names, names):
        fields["task"] = {"kind": "finetune", "method": {"kind": "full"}, name: 3}
        task = load(fields, tmp_path, f"task.{override}=5").task
        assert isinstance(task, FinetuneTask)
        assert task.views_per_image == 5


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_field_under_both_names_is_refused(fields: dict[str, Any], tmp_path: Path):
    both = {"held_out": 0.1, "validation_fraction": 0.1}
    with pytest.raises(ConfigError, match=r"recipe\.yaml.*held_out.*validation_fraction"):
        load(fields | both, tmp_path)


def test_overrides_replace_nested_fields_and_are_read_as_yaml(fields: dict[str, Any], tmp_path: Path):
    overrides = (
        "optimizer.betas=[0.8, 0.95]",
        "task.vae.block_out_channels=[8, 16]",
        "mixed_precision=no",
        "seed=7",
    )
    config = load(fields, tmp_path, *overrides, "optimizer.learning_rate=1e-3")
    assert config.optimizer.betas == (0.8, 0.95)
    assert config.optimizer.learning_rate == 1e-3
    assert config.task.vae == {"latent_channels": 4, "block_out_channels": [8, 16]}
    assert config.mixed_precision == "no"
    assert config.seed == 7


@pytest.mark.parametrize("override", ["seed", "=3", "seed.x=1", "seed=[1"])
def test_malformed_overrides(override: str, fields: dict[str, Any], tmp_path: Path):
    with pytest.raises(ConfigError, match="--set"):
        load(fields | {"seed": 1}, tmp_path, override)


@pytest.mark.parametrize("content", [None, b"", b"- a list", b"a: [", b"\xff\xfe\x00", b"? [a]\n: 1"])
def test_files_that_are_no_recipe(content: bytes | None, tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        load_config(path)


def test_learning_rate_rises_stays_and_falls():
    optimizer = Optimizer(learning_rate=2.0, warmup_steps=4, decay_fraction=0.5)
    rates = [optimizer.rate_at(step, 20) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:11] == [2.0] * 7
    assert rates[11:] == pytest.approx([2.0 * left / 10 for left in range(9, 0, -1)])
    constant = Optimizer(learning_rate=0.5, warmup_steps=0)
    assert {constant.rate_at(step, 10) for step in range(10)} == {0.5}


@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 20, 30])
@pytest.mark.parametrize("schedule", ["constant_with_warmup", "linear", "cosine"])
def test_schedules_are_those_of_diffusers(schedule: str, warmup_steps: int):
    optimizer = Optimizer.model_validate(
        {"learning_rate": 0.3, "schedule": schedule, "warmup_steps": warmup_steps}
    )
    oracle = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = get_scheduler(schedule, oracle, num_warmup_steps=warmup_steps, num_training_steps=20)
    for step in range(20):
        assert abs(optimizer.rate_at(step, 20) - oracle.param_groups[0]["lr"]) <= 1e-12
        oracle.step()
        scheduler.step()


def test_the_sections_of_the_page_on_data_load(fields: dict[str, Any], tmp_path: Path):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    sections = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(sections) == 3
    for section in sections:
        load(fields | yaml.safe_load(section), tmp_path)


@pytest.mark.parametrize(
    ("value", "meaning"),
    [("true", "latest"), ("latest", "latest"), ("auto", "auto"), ("no", "no"), ("false", "no")],
)
def test_words_for_resuming(value: str, meaning: str, autoencoder_recipe: MakeRecipe):
    assert autoencoder_recipe(f"resume={value}").resume == meaning
    with pytest.raises(ConfigError, match="resume: "):
        autoencoder_recipe("resume=yes please")


def test_a_key_that_is_set_twice_is_refused(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 1\ntask:\n  kind: finetune\n  method: {kind: full}\n  kind: paired\n", "utf-8")
    with pytest.raises(ConfigError, match=r"recipe\.yaml .* line 5: kind .* line 3"):
        load_config(path)
    path.write_text("seed: 1\n", "utf-8")
    with pytest.raises(ConfigError, match=r"--set 'data=.* kind"):
        load_config(path, ["data={kind: emoji, kind: kohya}"])


def test_what_is_merged_may_be_replaced(fields: dict[str, Any], tmp_path: Path):
    text = yaml.safe_dump(fields | {"optimizer": {}})
    path = tmp_path / "recipe.yaml"
    path.write_text(
        text.replace("optimizer: {}", "optimizer: {<<: {learning_rate: 1, name: muon}, learning_rate: 2}")
    )
    config = load_config(path)
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("muon", 2.0)


def test_the_fields_that_changes_may_be_allowed_of():
    names = ("data", "data.shards", "task.method.rank", "task.unet.sample_size", "task.prior.weight")
    assert all(has_field(TrainConfig, name) for name in (*names, "validation.data"))
    wrong = ("", "data.", "seed.x", "task.method.unet.x", "Data")
    assert not any(has_field(TrainConfig, name) for name in wrong)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.loss.weighting=min_snr", "task.finetune.loss.weighting: .* {kind: min_snr}"),
        ("task.method.targets=to_q", r"task.finetune.method.lora.targets: .* \[to_q\]"),
        ("optimizer=adamw", "optimizer: .* section"),
        ("batch_size=3", "batch_size: 3 .* gradient_accumulation_steps 2"),
        ("task.guidance_scale=3", "task.finetune: guidance_scale"),
        ("task.method=3", "task.finetune.method: .* {kind: ...}"),
    ],
)
def test_messages_say_how_it_is_written(override: str, message: str, lora_recipe: MakeRecipe):
    with pytest.raises(ConfigError, match=message):
        lora_recipe("gradient_accumulation_steps=2", override)
