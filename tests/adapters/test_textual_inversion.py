"""Textual inversion: files of both formats, against what diffusers makes of the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from latentgen.adapters.lora import attach
from latentgen.adapters.lora_files import read_lora
from latentgen.adapters.textual_inversion import TextualInversion, read_embedding, with_embedding
from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.checkpoints.weights import Weights
from latentgen.errors import AdapterError, CheckpointValueError
from latentgen.models.config import CLIPTextConfig
from latentgen.models.text import CLIPText
from latentgen.models.text_loading import load_tokenizer
from tests.conftest import build_pipeline, build_tokenizer

PROMPTS = ["a <toy> cat", "dog", "<toy>, red <toy> tiger"]


def _vectors(count: int, width: int = 32) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def _encoder(width: int = 32) -> CLIPText:
    config = CLIPTextConfig(
        vocab_size=524,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=522,
        eos_token_id=523,
    )
    torch.manual_seed(width)
    encoder = CLIPText.from_config(config, build_tokenizer())
    encoder.model.eval().requires_grad_(False)
    return encoder


@pytest.fixture
def load(tiny_checkpoint: Path) -> Callable[[], CLIPText]:
    folder = CheckpointFolder.open(tiny_checkpoint)

    def load() -> CLIPText:
        encoder = CLIPText.from_weights(
            CLIPTextConfig.from_json(folder.config("text_encoder")),
            folder.tokenizer("tokenizer"),
            folder.weights("text_encoder"),
        )
        encoder.model.requires_grad_(False)
        return encoder

    return load


@pytest.mark.parametrize("count", [1, 3])
def test_context_is_that_of_diffusers(tmp_path: Path, load: Callable[[], CLIPText], count: int):
    file = tmp_path / "learned_embeds.safetensors"
    save_file({"<toy>": _vectors(count)}, file)
    pipe = build_pipeline()
    pipe.load_textual_inversion(file)
    with torch.no_grad():
        theirs, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)

    encoder = load()
    before = encoder.encode(PROMPTS).context
    extended = with_embedding({"text_encoder": encoder}, read_embedding(file))["text_encoder"]
    ours = extended.encode(PROMPTS).context
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert torch.equal(extended.encode(["dog"]).context, before[1:2])
    assert not torch.allclose(ours[0], before[0], atol=1e-2)

    # The original is as it was, and the copy shares all weights but one.
    assert torch.equal(encoder.encode(PROMPTS).context, before)
    assert len(encoder.tokenizer) + count == len(extended.tokenizer)
    old, new = encoder.model.state_dict(), extended.model.state_dict()
    copied = [name for name in old if old[name].data_ptr() != new[name].data_ptr()]
    assert [name.removeprefix("text_model.") for name in copied] == ["embeddings.token_embedding.weight"]
    assert extended.config.vocab_size == encoder.config.vocab_size + count == extended.model.config.vocab_size
    assert encoder.model.config.vocab_size == encoder.config.vocab_size


def test_a_saved_encoder_knows_its_tokens(tmp_path: Path):
    encoder = _encoder()
    extended = with_embedding(
        {"text_encoder": encoder}, TextualInversion("<toy>", {"text_encoder": _vectors(3)})
    )["text_encoder"]
    extended.save(tmp_path / "text_encoder", tmp_path / "tokenizer")
    loaded = CLIPText.from_weights(
        CLIPTextConfig(**extended.config.model_dump()),
        load_tokenizer(tmp_path / "tokenizer"),
        Weights((tmp_path / "text_encoder" / "model.safetensors",)),
    )
    assert torch.equal(loaded.tokenize(PROMPTS), extended.tokenize(PROMPTS))
    assert torch.equal(loaded.encode(PROMPTS).context, extended.encode(PROMPTS).context)


def _tokens(encoder: CLIPText, prompt: str) -> list[int]:
    return [token for token in encoder.tokenize([prompt]).flatten().tolist() if token not in (522, 523)]


@pytest.mark.parametrize(
    ("tensors", "metadata", "stem", "token"),
    [
        ({"<toy>": _vectors(2)}, None, "learned_embeds", "<toy>"),
        ({"<toy>": _vectors(1)[0]}, None, "learned_embeds", "<toy>"),
        ({"emb_params": _vectors(2)}, None, "Bad Hands-5", "Bad Hands-5"),
        ({"string_to_param.*": _vectors(2)}, {"name": "toy-art"}, "x", "toy-art"),
        ({"string_to_param.*": _vectors(1)[0]}, None, "toy-art", "toy-art"),
    ],
)
def test_formats_of_a_single_encoder(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None, stem: str, token: str
):
    path = tmp_path / f"{stem}.safetensors"
    save_file(tensors, path, metadata)
    embedding = read_embedding(path)
    assert embedding.token == token
    (tensor,) = tensors.values()
    assert torch.equal(embedding.vectors["text_encoder"], tensor.reshape(-1, 32))
    assert read_embedding(path, token="<own>").token == "<own>"
    # One set of vectors serves the one encoder that there is, whatever it is called.
    extended = with_embedding({"text_encoder_2": _encoder()}, embedding)["text_encoder_2"]
    assert _tokens(extended, f"cat {token.upper()} dog")[1:-1] == list(range(524, 524 + tensor.numel() // 32))


def test_sdxl_has_vectors_for_each_encoder(tmp_path: Path):
    pair = {"clip_g": _vectors(2, 48), "clip_l": _vectors(2, 32)}
    save_file(pair, tmp_path / "toy-art.safetensors")
    encoders = {"text_encoder": _encoder(32), "text_encoder_2": _encoder(48)}
    extended = with_embedding(encoders, read_embedding(tmp_path / "toy-art.safetensors"))
    for name, key in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        table = extended[name].model.get_input_embeddings()
        assert torch.equal(table.weight[524:], pair[key])
        assert _tokens(extended[name], "toy-art") == [524, 525]


def test_rows_beyond_the_tokenizer_are_used():
    config = CLIPTextConfig(**_encoder().config.model_dump() | {"vocab_size": 530})
    encoder = CLIPText.from_config(config, build_tokenizer())
    vectors = _vectors(2)
    extended = with_embedding({"text_encoder": encoder}, TextualInversion("<toy>", {"text_encoder": vectors}))
    table = extended["text_encoder"].model.get_input_embeddings()
    assert table.weight.shape == (530, 32)
    assert torch.equal(table.weight[524:526], vectors)
    assert table.weight.requires_grad


def test_embeddings_add_up_and_keep_adapters(tmp_path: Path):
    lora = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.randn(2, 32),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.randn(64, 2),
    }
    save_file(lora, tmp_path / "style.safetensors")
    encoder, plain = _encoder(), _encoder()
    attach({"text_encoder": encoder.model}, read_lora(tmp_path / "style.safetensors"))
    encoders = {"text_encoder": encoder}
    for count, token in enumerate(("<one>", "<two>", "<three>"), start=1):
        encoders = with_embedding(encoders, TextualInversion(token, {"text_encoder": _vectors(count)}))
    assert _tokens(encoders["text_encoder"], "<three><one> <two>") == [527, 528, 529, 524, 525, 526]
    assert torch.equal(encoders["text_encoder"].encode(["cat"]).context, encoder.encode(["cat"]).context)
    assert not torch.allclose(encoder.encode(["cat"]).context, plain.encode(["cat"]).context, atol=1e-2)


@pytest.mark.parametrize("token", ["cat</w>", "<one>", "<ONE>", "<two>_3", "<two>_1"])
def test_a_token_that_clashes_is_refused(token: str):
    encoders = {"text_encoder": _encoder()}
    for count, name in ((1, "<one>"), (3, "<two>")):
        encoders = with_embedding(encoders, TextualInversion(name, {"text_encoder": _vectors(count)}))
    with pytest.raises(AdapterError, match=f"'{token}'"):
        with_embedding(encoders, TextualInversion(token, {"text_encoder": _vectors(1)}))


def test_a_model_of_another_family_is_refused():
    one = TextualInversion("<toy>", {"text_encoder": _vectors(1)})
    pair = TextualInversion("<toy>", {"text_encoder": _vectors(1), "text_encoder_2": _vectors(1, 48)})
    both = {"text_encoder": _encoder(32), "text_encoder_2": _encoder(48)}
    with pytest.raises(AdapterError, match=r"32.*48"):
        with_embedding({"text_encoder": _encoder(48)}, one)
    with pytest.raises(AdapterError, match="text_encoder_2"):
        with_embedding(both, one)
    with pytest.raises(AdapterError, match="text_encoder_2"):
        with_embedding({"text_encoder": both["text_encoder"]}, pair)
    half = _encoder()
    half.model.half()
    with pytest.raises(AdapterError, match=r"torch\.float16"):
        with_embedding({"text_encoder": half}, TextualInversion("<toy>", {"text_encoder": _vectors(1) * 1e6}))


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"a": _vectors(1), "b": _vectors(1)}, "a; b"),
        ({}, "toy"),
        ({f"x.lora_{part}.weight": _vectors(1) for part in ("down", "up")}, "LoRA"),
        ({"<toy>": torch.ones(2, 3, 4)}, r"<toy>.*\[2, 3, 4\]"),
        ({"<toy>": torch.ones(1025, 4)}, "1025"),
        ({"<toy>": torch.ones(2, 4, dtype=torch.int32)}, "I32"),
        ({"<toy>": torch.full((2, 4), torch.nan)}, "NaN"),
        ({" toy": torch.ones(2, 4)}, "' toy'"),
        ({"t" * 201: torch.ones(2, 4)}, "'ttt"),
        ({"clip_l": _vectors(1), "clip_g": _vectors(2)}, "1 for text_encoder"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, tensors: dict[str, Tensor], named: str):
    save_file(tensors, tmp_path / "toy.safetensors")
    with pytest.raises((AdapterError, CheckpointValueError), match=named):
        read_embedding(tmp_path / "toy.safetensors")
