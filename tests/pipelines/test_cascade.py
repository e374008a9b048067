"""Cascades: the stages one after the other are what one would do by hand, and only one of them is in memory."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentgen import (
    CascadePipeline,
    ImageToImagePipeline,
    StageSettings,
    TextToImagePipeline,
    UpscalePipeline,
)
from latentgen.errors import CheckpointNotFoundError, ConfigError, InputError, UnsafePathError
from latentgen.pipelines import cascade as module
from tests.conftest import build_pipeline
from tests.pipelines.families import build, save

SETTINGS = [StageSettings(3, guidance_scale=3.0), StageSettings(2, noise_level=30, scheduler="euler")]
OPTIONS: dict[str, Any] = {"progress": False, "output_type": "np"}


@pytest.fixture(scope="module")
def stage_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two whole checkpoints: base/ draws 16x16 pixels, upscale/ four times as many."""
    folder = tmp_path_factory.mktemp("stages")
    build_pipeline().save_pretrained(folder / "base", safe_serialization=True)
    made, _ = save(build("SD x4 upscaler"), folder / "made")
    shutil.move(made, folder / "upscale")
    return folder


@pytest.fixture
def folder(stage_folders: Path, tmp_path: Path) -> Path:
    """A cascade of them: the parts of the upscaler that could be shared are in the cascade's folder."""
    target = tmp_path / "cascade"
    shutil.copytree(stage_folders / "base", target / "stages" / "base")
    shutil.copytree(stage_folders / "upscale", target / "stages" / "upscale")
    for shared in ("vae", "text_encoder", "tokenizer"):
        shutil.move(target / "stages" / "upscale" / shared, target / shared)
    write_index(target, [{"folder": "stages/base", "num_inference_steps": 3, "guidance_scale": 3.0}])
    return target


def write_index(target: Path, first: list[dict[str, Any]], **second: Any) -> None:
    upscale = {"folder": "stages/upscale", "num_inference_steps": 2, "noise_level": 30, "scheduler": "euler"}
    (target / "cascade.json").write_text(json.dumps({"stages": [*first, upscale | second]}))


def by_hand(folder: Path, prompt: str, seed: int) -> list[np.ndarray]:
    """What the stages draw, each called alone."""
    base = TextToImagePipeline.from_pretrained(folder / "base")
    upscale = UpscalePipeline.from_pretrained(folder / "upscale")
    first = base(prompt, num_inference_steps=3, guidance_scale=3.0, seed=seed, **OPTIONS).images
    second = upscale(
        prompt,
        image=first,
        noise_level=30,
        scheduler="euler",
        num_inference_steps=2,
        seed=seed + module._SEED_STRIDE,
        **OPTIONS,
    ).images
    return [np.asarray(first), np.asarray(second)]


def test_the_stages_equal_single_calls(stage_folders: Path, folder: Path) -> None:
    expected = by_hand(stage_folders, "a red cat", 7)
    results = list(CascadePipeline.from_pretrained(folder).stream("a red cat", seed=7, **OPTIONS))
    assert [(result.index, result.total, result.name) for result in results] == [
        (0, 2, "base"),
        (1, 2, "upscale"),
    ]
    assert [np.asarray(result.images).shape for result in results] == [(1, 16, 16, 3), (1, 64, 64, 3)]
    for result, images in zip(results, expected, strict=True):
        np.testing.assert_allclose(np.asarray(result.images), images, atol=1e-5)


def test_every_image_has_its_own_prompt_and_noise(folder: Path) -> None:
    cascade = CascadePipeline.from_pretrained(folder).loaded()
    together = cascade(["a cat", "a red dog"], num_images_per_prompt=2, seed=[1, 2, 3, 4], **OPTIONS)
    for index, (prompt, seed) in enumerate([("a cat", 1), ("a cat", 2), ("a red dog", 3), ("a red dog", 4)]):
        alone = cascade(prompt, seed=seed, **OPTIONS)
        np.testing.assert_allclose(np.asarray(together.images)[index], np.asarray(alone.images)[0], atol=1e-4)
    assert together.seeds == (1, 2, 3, 4)


def test_pipelines_in_memory_make_the_same_cascade(stage_folders: Path, folder: Path) -> None:
    cascade = CascadePipeline.from_pipelines(
        TextToImagePipeline.from_pretrained(stage_folders / "base"),
        UpscalePipeline.from_pretrained(stage_folders / "upscale"),
    )
    result = cascade("a cat", seed=7, settings=SETTINGS)
    expected = CascadePipeline.from_pretrained(folder)("a cat", seed=7)
    assert isinstance(result.images, list)
    assert isinstance(result.images[0], Image.Image)
    np.testing.assert_array_equal(np.asarray(result.images), np.asarray(expected.images))


def test_only_the_stage_that_runs_is_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref] = []
    most = 0

    def noted(load: Any) -> Any:
        def from_checkpoint(*kwargs: Any, **options: Any) -> Any:
            nonlocal most
            pipeline = load(*kwargs, **options)
            alive.append(weakref.ref(pipeline))
            gc.collect()
            most = max(most, sum(reference() is not None for reference in alive))
            return pipeline

        return from_checkpoint

    for kind in (TextToImagePipeline, UpscalePipeline):
        monkeypatch.setattr(kind, "from_checkpoint", noted(kind.from_checkpoint))
    CascadePipeline.from_pretrained(folder)("a cat", seed=7, progress=False)
    assert len(alive) == 2
    assert most == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"folder": "../elsewhere"}, UnsafePathError, "elsewhere"),
        ({"folder": "stages/none"}, CheckpointNotFoundError, "none"),
        ({"folder": "stages/base"}, ConfigError, "TextToImagePipeline"),
        ({"steps": 3}, ConfigError, "steps"),
        ({"noise_level": -1}, ConfigError, "noise_level"),
        ({"guidance_scale": "high"}, ConfigError, "guidance_scale"),
        ({"scheduler": "fastest"}, ConfigError, "latentgen schedulers"),
        ({"strength": 0.5}, ConfigError, "UpscalePipeline"),
        ({"strength": 0}, ConfigError, "strength"),
    ],
)
def test_mistakes_of_the_index_are_found_before_any_weight_is_read(
    change: dict[str, Any], error: type[Exception], message: str, folder: Path
) -> None:
    write_index(folder, [{"folder": "stages/base"}], **change)
    with pytest.raises(error, match=message):
        CascadePipeline.from_pretrained(folder)


def test_a_folder_without_an_index_is_refused(stage_folders: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"cascade\.json"):
        CascadePipeline.from_pretrained(stage_folders / "base")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"negative_prompt": ["a", "b"]}, "negative_prompt"),
        ({"output_type": "latent"}, "latent"),
        ({"settings": SETTINGS[:1]}, "2 StageSettings"),
        ({"seed": -1}, "seed"),
    ],
)
def test_mistakes_of_a_call_are_found_before_any_weight_is_read(
    kwargs: dict[str, Any], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cascade = CascadePipeline.from_pretrained(folder)
    monkeypatch.setattr(
        module.CascadeStage, "load", property(lambda stage: pytest.fail("read")), raising=False
    )
    with pytest.raises(InputError, match=message):
        cascade.stream(**{"prompt": "a cat"} | kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"scheduler": "fastest"}, "latentgen schedulers"),
        ({"noise_level": -1}, "noise_level"),
        ({"strength": 0}, "strength"),
    ],
)
def test_settings_are_checked_where_they_are_made(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StageSettings(**kwargs)


def test_a_stage_can_refine_at_the_same_size(stage_folders: Path, folder: Path) -> None:
    redrawing = {"folder": "stages/base", "num_inference_steps": 4, "strength": 0.5}
    write_index(folder, [{"folder": "stages/base", "num_inference_steps": 3}, redrawing])
    results = list(CascadePipeline.from_pretrained(folder).stream("a cat", seed=7, **OPTIONS))
    assert [result.kind for result in results] == ["draw", "redraw", "upscale"]
    redraw = ImageToImagePipeline.from_pretrained(stage_folders / "base")
    expected = redraw(
        "a cat",
        image=results[0].images,
        strength=0.5,
        num_inference_steps=4,
        seed=7 + module._SEED_STRIDE,
        **OPTIONS,
    ).images
    np.testing.assert_allclose(np.asarray(results[1].images), np.asarray(expected), atol=1e-5)
    text_to_image = TextToImagePipeline.from_pretrained(stage_folders / "base")
    in_memory = CascadePipeline.from_pipelines(text_to_image, redraw)
    assert in_memory("a cat", seed=7, progress=False).kind == "redraw"


def test_a_cascade_begins_with_text_and_only_begins_so(stage_folders: Path) -> None:
    upscale = UpscalePipeline.from_pretrained(stage_folders / "upscale")
    base = TextToImagePipeline.from_pretrained(stage_folders / "base")
    with pytest.raises(InputError, match=r"stage 1 .*TextToImagePipeline"):
        CascadePipeline.from_pipelines(base, base)
    with pytest.raises(InputError, match=r"stage 0 .*UpscalePipeline"):
        CascadePipeline.from_pipelines(upscale)
    with pytest.raises(InputError, match="at least one stage"):
        CascadePipeline.from_pipelines()
