"""Tiny models of every family to fine-tune, and a few pictures to do it with."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from latentgen.train.config import FinetuneTask, TrainConfig, load_config
from latentgen.train.data import Captions, Sample
from latentgen.train.objectives.base import Preflight
from latentgen.train.objectives.finetune import FinetuneObjective
from tests.conftest import build_pipeline
from tests.pipelines.sdxl import build_base

SIZE = 16
CAPTIONS = ("red cat", "a tiger", "cat on a dog", "red red dog", "tiger cat", "zebra")
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full", "train_text_encoder": True},
    "lora": {"kind": "lora", "rank": 2, "dropout": 0.3, "train_text_encoder": True},
    "textual_inversion": {
        "kind": "textual_inversion",
        "token": "disc",
        "initializer": "cat",
        "num_vectors": 2,
    },
}
PRIOR = {"prompt": "dog", "images": 4}


class Pictures:
    """Six pictures of noise, cropped from larger ones, each with what it looked like before an edit."""

    image_size = SIZE
    is_random = True

    def __init__(self, captions: tuple[str, ...] = CAPTIONS, *, edited: bool = True) -> None:
        self._captions, self.edited = captions, edited

    def __len__(self) -> int:
        return len(self._captions)

    def sample(self, index: int, rng: random.Random) -> Sample:
        corner = (rng.randint(0, 8), index)
        return Sample(
            _noise(index),
            Captions((self._captions[index],), (1.0,)),
            original_size=(40 + index, 30),
            crop_corner=corner,
            before=_noise(100 + index) if self.edited else None,
        )

    def bucket(self, index: int) -> tuple[int, int]:
        return self.image_size, self.image_size

    def captions(self) -> list[str]:
        return list(self._captions)


def _noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def build(family: str, prediction_type: str = "epsilon") -> Any:
    """A pipeline of diffusers with tiny random weights: "sd", "inpainting", "instruct" or "sdxl"."""
    import diffusers

    if family == "sdxl":
        pipe: Any = build_base()
    else:
        plain = build_pipeline(in_channels={"sd": 4, "instruct": 8, "inpainting": 9}[family])
        kinds = {
            "sd": diffusers.StableDiffusionPipeline,
            "instruct": diffusers.StableDiffusionInstructPix2PixPipeline,
            "inpainting": diffusers.StableDiffusionInpaintPipeline,
        }
        pipe = kinds[family](**plain.components, requires_safety_checker=False)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction_type)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def folder_of(family: str, prediction_type: str = "epsilon") -> Path:
    """The folder that diffusers writes of such a pipeline, made once; nothing may change it."""
    folder = Path(mkdtemp(prefix="finetuning-"))
    build(family, prediction_type).save_pretrained(folder)
    return folder


def objective_of(
    method: dict[str, Any],
    folder: Path | None,
    scratch: Path,
    data: Pictures | None = None,
    *,
    preflight: Preflight | None = None,
    **fields: Any,
) -> FinetuneObjective:
    """An objective over the model of a folder, or the embedded one; `fields` are the task's besides the method."""
    task = FinetuneTask.model_validate({"kind": "finetune", "method": method, "views_per_image": 2} | fields)
    torch.manual_seed(0)
    return FinetuneObjective(
        task,
        Pictures() if data is None else data,
        seed=3,
        device=torch.device("cpu"),
        init_from=folder,
        class_images=scratch / "class_images",
        preflight=preflight,
    )


def randomize(objective: FinetuneObjective) -> None:
    """Give what learns values at which no gradient vanishes: a LoRA begins with factors of zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def finetune_recipe(tmp_path: Path, image_folder: Path, method: str, **fields: Any) -> TrainConfig:
    """A tiny recipe that fine-tunes the "sd" model with a method, with these fields replaced."""
    task = {"kind": "finetune", "method": METHODS[method], "views_per_image": 2}
    content = {
        "output_dir": str(tmp_path / "run"),
        "init_from": str(folder_of("sd")),
        "task": task if method == "textual_inversion" else task | {"prior": PRIOR},
        "data": {"kind": "imagefolder", "path": str(image_folder), "image_size": 16},
        "seed": 5,
        "batch_size": 4,
        "max_steps": 4,
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2, "decay_fraction": 0.5},
        "ema_decay": 0.9,
        "checkpoint_every": 1,
        "keep_checkpoints": 100,
        "log_every": 1,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content | fields), "utf-8")
    return load_config(path)
