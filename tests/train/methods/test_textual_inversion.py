"""What textual inversion trains and saves, in diffusers and here, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentgen.errors import ConfigError, DatasetError
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.train.methods.textual_inversion import EMBEDDING_FILE, TrainableEmbedding
from latentgen.train.objectives.finetune import FinetuneObjective
from tests.train.finetuning import CAPTIONS, Pictures, build, folder_of, objective_of
from tests.train.oracles import images_of
from tests.train.recipes import plan_for

METHOD = {"kind": "textual_inversion", "token": "<new>", "initializer": "cat", "num_vectors": 2}
DATA = Pictures(tuple(f"{caption} <new>" for caption in CAPTIONS))
PROMPT = "a red <new>"


def train(family: str, tmp_path: Path, **changes: Any) -> FinetuneObjective:
    """Three steps of AdamW with weight decay, which reaches every parameter that it is given."""
    objective = objective_of(METHOD | changes, folder_of(family), tmp_path, DATA)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    for step in range(3):
        objective(*objective.batch(plan_for(objective, step))).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return objective


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_new_rows_alone_change(family: str, tmp_path: Path):
    objective = train(family, tmp_path)
    fresh = objective_of(METHOD, folder_of(family), tmp_path, DATA).state_dict()
    changed = {
        name for name, tensor in objective.state_dict().items() if not torch.equal(tensor, fresh[name])
    }
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert changed == trained
    assert len(trained) == (2 if family == "sdxl" else 1)
    pipe = build(family)
    for tower, name in zip(
        objective.pipeline().text_encoder.towers, ("text_encoder", "text_encoder_2"), strict=False
    ):
        rows = tower.model.get_input_embeddings()
        table = pipe.components[name].get_input_embeddings().weight
        assert isinstance(rows, TrainableEmbedding)
        old = torch.arange(len(table))
        assert torch.equal(rows(old), table)
        ids = torch.arange(len(table), len(table) + 2)
        assert torch.equal(rows(ids), rows.vectors)
        assert (rows.vectors[0] - rows.vectors[1]).abs().max() > 0.01


@pytest.mark.parametrize(("family", "keys"), [("sd", ["<new>"]), ("sdxl", ["clip_g", "clip_l"])])
def test_all_readers_draw_the_same(family: str, keys: list[str], tmp_path: Path):
    objective = train(family, tmp_path)
    objective.save(tmp_path / "model", objective.state_dict())
    file = tmp_path / "model" / EMBEDDING_FILE
    tensors = load_file(file)
    assert sorted(tensors) == keys
    expected = draw(objective.eval().pipeline())
    plain = TextToImagePipeline.from_pretrained(folder_of(family), dtype="float32", device="cpu")
    assert np.abs(draw(plain.with_embedding(file)) - expected).max() < 1e-5
    assert np.abs(draw(plain) - expected).max() > 1e-3
    pipe = build(family)
    if family == "sd":
        pipe.load_textual_inversion(tmp_path / "model", weight_name=EMBEDDING_FILE)
    else:
        for key, encoder, tokenizer in (
            ("clip_l", pipe.text_encoder, pipe.tokenizer),
            ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
        ):
            pipe.load_textual_inversion(
                tensors[key], token="<new>", text_encoder=encoder, tokenizer=tokenizer
            )
    assert np.abs(draw(pipe) - expected).max() < 1e-4


def draw(pipeline: Any) -> np.ndarray:
    return images_of(pipeline, PROMPT, guidance_scale=3.0)


def test_the_embedded_model_learns_a_token(tmp_path: Path):
    method = {"kind": "textual_inversion", "token": "zorblax", "initializer": "star"}
    objective = objective_of(method, None, tmp_path, Pictures(("zorblax",) * 6))
    loss = objective(*objective.batch(plan_for(objective, size=2))).total
    loss.backward()
    (vectors,) = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    assert vectors.grad is not None
    assert vectors.grad.norm() > 0
    objective.save(tmp_path / "model", objective.state_dict())
    assert load_file(tmp_path / "model" / EMBEDDING_FILE).keys() == {"zorblax"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": "cat</w>"}, r"task\.method\.token: .*'cat</w>'"),
        ({"initializer": "zebra"}, "initializer: 'zebra' is 5 tokens .* num_vectors=5"),
        ({"initializer": "<|endoftext|>"}, r"initializer: '<\|endoftext\|>'"),
        ({"initializer": "   "}, "initializer: '   '"),
    ],
)
def test_words_that_cannot_be_used(changes: dict[str, Any], message: str, tmp_path: Path):
    captions = tuple(f"{caption} {changes.get('token', '<new>')}" for caption in CAPTIONS)
    with pytest.raises(ConfigError, match=message):
        objective_of(METHOD | changes, folder_of("sd"), tmp_path, Pictures(captions))


def test_captions_without_the_token(tmp_path: Path):
    with pytest.raises(DatasetError, match="<new>"):
        objective_of(METHOD, folder_of("sd"), tmp_path)


def test_several_words_begin_several_vectors(tmp_path: Path):
    method = METHOD | {"initializer": "red cat", "num_vectors": 3}
    objective = objective_of(method, folder_of("sd"), tmp_path, DATA)
    (vectors,) = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    pipe = build("sd")
    red, cat = pipe.tokenizer.encode("red cat", add_special_tokens=False)
    table = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(vectors, table[[red, cat, red]])
