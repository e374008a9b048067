"""CLIPText against transformers and diffusers, its chunks, and its folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from latentgen.checkpoints.weights import Weights
from latentgen.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    InputError,
)
from latentgen.models.config import CLIPTextConfig
from latentgen.models.text import CLIPText
from latentgen.models.text_loading import load_tokenizer
from tests.models.conftest import relative_error

PROMPTS = ["a cat and a red dog", "", "TIGER  tiger\n🐯 日本"]


def load(folder: Path, dtype: torch.dtype | None = None) -> CLIPText:
    config = CLIPTextConfig.from_json(json.loads((folder / "text_encoder/config.json").read_text()))
    weights = Weights((folder / "text_encoder/model.safetensors",))
    return CLIPText.from_weights(config, load_tokenizer(folder / "tokenizer"), weights, dtype=dtype)


@pytest.fixture(scope="module")
def text(tiny_checkpoint) -> CLIPText:
    return load(tiny_checkpoint)


@pytest.fixture(scope="module")
def oracle(tiny_checkpoint) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_checkpoint, safety_checker=None)


@torch.no_grad()
def test_agrees_with_diffusers(text, oracle):
    expected, _ = oracle.encode_prompt(PROMPTS, "cpu", 1, False)
    conditioning = text.encode(PROMPTS)
    assert conditioning.context.shape == (3, 77, 32)
    assert relative_error(conditioning.context, expected) < 1e-5


@torch.no_grad()
def test_pooled_agrees_with_transformers(text, oracle):
    ids = oracle.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert relative_error(text.encode(PROMPTS).pooled, oracle.text_encoder(ids).pooler_output) < 1e-5


@torch.no_grad()
def test_a_prompt_that_just_fits_takes_one_window(text, oracle):
    prompt = "cat " * 75
    expected, _ = oracle.encode_prompt(prompt, "cpu", 1, False)
    assert relative_error(text.encode([prompt]).context, expected) < 1e-5


@torch.no_grad()
def test_long_prompts_are_encoded_window_by_window(text):
    context = text.encode(["cat " * 75 + "red dog", "tiger"]).context
    assert context.shape == (2, 2 * 77, 32)
    parts = text.encode(["cat " * 75, "red dog", "tiger", ""]).context
    assert relative_error(context[0], parts[:2].flatten(0, 1)) < 1e-5
    assert relative_error(context[1], parts[2:].flatten(0, 1)) < 1e-5


@pytest.mark.parametrize("prompts", [["tiger \ud83d"], ["ti\0ger"], [], [7], "tiger"])
def test_what_is_not_a_prompt_is_refused(text, prompts):
    with pytest.raises(InputError, match="prompt"):
        text.encode(prompts)


def test_gradients_reach_the_weights(text):
    model = CLIPText.from_config(text.config, text.tokenizer)
    model.encode(["tiger"]).context.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.parameters())


def test_half_precision(tiny_checkpoint, text):
    half = load(tiny_checkpoint, torch.bfloat16).encode(PROMPTS).context
    assert half.dtype == torch.bfloat16
    assert relative_error(half.float(), text.encode(PROMPTS).context) < 0.02


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_both_namings_of_the_file_load(tmp_path, text, tiny_checkpoint, prefix):
    state = load_file(tiny_checkpoint / "text_encoder/model.safetensors")
    state = {prefix + key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    state[prefix + "embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, tmp_path / "model.safetensors")
    other = CLIPText.from_weights(text.config, text.tokenizer, Weights((tmp_path / "model.safetensors",)))
    assert torch.equal(other.encode(PROMPTS).context, text.encode(PROMPTS).context)


def test_saved_folders_load_here_and_in_transformers(tmp_path, text):
    from transformers import CLIPTextModel, CLIPTokenizer

    text.save(tmp_path / "text_encoder", tmp_path / "tokenizer")
    expected = text.encode(PROMPTS)
    assert torch.equal(load(tmp_path).encode(PROMPTS).context, expected.context)
    model, info = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    ids = tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert relative_error(model.eval()(ids).last_hidden_state, expected.context) < 1e-5


def test_missing_or_broken_tokenizers_are_named(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointCorruptError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(text):
    small = CLIPTextConfig.from_json(text.config.to_json() | {"vocab_size": 100})
    with pytest.raises(CheckpointMismatchError, match=r"524 tokens.* embeds 100"):
        CLIPText.from_config(small, text.tokenizer)
