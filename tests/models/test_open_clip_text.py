"""OpenCLIP's text towers as text encoders, against open_clip itself. CI installs the extra `openclip` for these."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from latentgen.errors import (
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigError,
    InputError,
    UnsafeCheckpointError,
)
from latentgen.models.config import CLIPTextConfig
from latentgen.models.open_clip_text import from_open_clip, load_open_clip
from latentgen.models.text import CLIPText
from latentgen.models.text_loading import load_tokenizer

open_clip = pytest.importorskip("open_clip", reason='not installed: pip install -e ".[dev,openclip]"')

PROMPTS = [
    "a photo of a cat",
    "",
    "A PHOTO, of 2 cats & a dog's-house (masterpiece:1.2)",
    "naïve café — 日本語 🐯\n\ttabs   and spaces",
    "supercalifragilisticexpialidocious 0123456789",
]
FAMILIES = ["SD 1.x", "SD 2.x", "SDXL"]
VISION = {"layers": 1, "width": 16, "head_width": 8, "image_size": 16, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3}


def model_config(*, quick_gelu: bool = False, custom: bool = False, **text: Any) -> dict[str, Any]:
    """A tiny configuration as `open_clip.get_model_config` gives it."""
    kind = {"custom_text": True} if custom else {}
    return {
        "embed_dim": 24,
        "quick_gelu": quick_gelu,
        "vision_cfg": VISION,
        "text_cfg": {**TEXT, **text},
        **kind,
    }


def build(config: dict[str, Any]) -> Any:
    """A model of open_clip with random weights, its norms and biases too."""
    fields = dict(config)
    make = open_clip.CustomTextCLIP if fields.pop("custom_text", False) else open_clip.CLIP
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(**fields).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
            elif "embedding" in name:
                parameter.data *= 20  # or else all tokens look alike
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return build(model_config())


@torch.no_grad()
def expected(model: Any, family: str, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Context and pooled state as open_clip computes them."""
    tower = getattr(model, "text", model)
    layers = model.forward_intermediates(text=tokens)["text_intermediates"]
    layers = [layer.float() for layer in layers]
    end = (torch.arange(len(tokens)), tokens.argmax(-1))
    match family:
        case "SD 1.x":
            context = tower.ln_final(layers[-1])
            return context, context[end]
        case "SD 2.x":
            context = tower.ln_final(layers[-2])
            return context, context[end]
        case _:
            return layers[-2], model.encode_text(tokens)


@torch.no_grad()
def check(text: CLIPText, model: Any, family: str) -> None:
    tokens = text.tokenize(PROMPTS)
    found = text.encode(PROMPTS)
    context, pooled = expected(model, family, tokens[:, 0])
    assert context.std() > 0.1
    assert (context[0] - context[1]).abs().max() > 0.1
    assert found.context.shape == context.shape
    assert (found.context - context).abs().max() < 1e-5
    assert (found.pooled - pooled).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("custom", [False, True])
def test_agrees_with_open_clip(family: Any, quick_gelu: bool, custom: bool) -> None:
    model = build(model_config(quick_gelu=quick_gelu, custom=custom))
    text = from_open_clip(model, family=family)
    check(text, model, family)
    assert text.context_width == 32
    assert text.pooled_width == (24 if family == "SDXL" else 32)
    assert not text.model.training
    assert not any(parameter.requires_grad for parameter in text.model.parameters())


@pytest.mark.parametrize(
    "text_cfg",
    [{"mlp_ratio": 3.7362, "width": 40, "heads": 5}, {"context_length": 40}, {"block_type": "custom"}],
    ids=str,
)
def test_towers_of_other_proportions(text_cfg: dict[str, Any]) -> None:
    model = build(model_config(**text_cfg))
    check(from_open_clip(model, family="SDXL"), model, "SDXL")


def test_a_text_transformer_by_itself() -> None:
    model = build(model_config(custom=True))
    check(from_open_clip(model.text, family="SDXL"), model, "SDXL")


def test_tokens_are_those_of_open_clip_but_for_padding(model: Any) -> None:
    """An exclamation mark is padding, as in every folder of SD 2.x and SDXL; SD 1.x pads with the end token."""
    for family in ("SD 2.x", "SDXL"):
        tokens = from_open_clip(model, family=family).tokenize([*PROMPTS, "a cat!"])
        assert torch.equal(tokens[:-1, 0], open_clip.tokenize(PROMPTS))
        assert tokens[-1, 0, :5].tolist() == [49406, 320, 2368, 0, 49407]
    assert from_open_clip(model, family="SD 1.x").tokenize(["a cat"])[0, 0, -1] == 49407


def test_weights_are_shared(model: Any) -> None:
    text = from_open_clip(model, family="SDXL")
    theirs = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    copied = [
        name
        for name, tensor in text.state_dict().items()
        if tensor.untyped_storage().data_ptr() not in theirs
    ]
    assert copied == ["text_projection.weight"]  # which is the transpose


def test_half_precision_of_open_clip(model: Any) -> None:
    """Its norms and embeddings stay in float32 there; here all weights have one dtype."""
    half = build(model_config())
    open_clip.convert_weights_to_lp(half, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.float32, torch.bfloat16}
    text = from_open_clip(half, family="SD 2.x")
    assert {p.dtype for p in text.model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        found = text.encode(PROMPTS).context.float()
    context = expected(model, "SD 2.x", text.tokenize(PROMPTS)[:, 0])[0]
    assert ((found - context).norm() / context.norm()) < 0.02
    again = from_open_clip(half, family="SD 2.x", dtype=torch.float32)
    assert {p.dtype for p in again.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_open_clip(tmp_path: Path, family: Any, custom: bool) -> None:
    config = model_config(custom=custom)
    model = build(config)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    text = load_open_clip(tmp_path / "open_clip_model.safetensors", family=family, config=config)
    check(text, model, family)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    for source in (tmp_path, tmp_path / "open_clip_model.safetensors"):
        same = load_open_clip(source, family=family)
        assert torch.equal(same.encode(PROMPTS).context, text.encode(PROMPTS).context)


def test_dtype_of_a_file(tmp_path: Path, model: Any) -> None:
    save_file(model.state_dict(), tmp_path / "some.safetensors")
    text = load_open_clip(
        tmp_path / "some.safetensors", family="SDXL", config=model_config(), dtype=torch.bfloat16
    )
    assert {p.dtype for p in text.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in text.model.parameters())


@pytest.mark.parametrize(
    ("name", "family", "published"),
    [
        ("ViT-H-14", "SD 2.x", "sd21/text_encoder"),
        ("ViT-bigG-14", "SDXL", "sdxl/text_encoder_2"),
        ("ViT-L-14-quickgelu", "SD 1.x", "sd15/text_encoder"),
    ],
)
def test_published_towers(tmp_path: Path, name: str, family: Any, published: str) -> None:
    """Full-size towers on the meta device have the configurations of the published folders."""
    from latentgen.checkpoints.families import read_config
    from latentgen.models import open_clip_text

    config = open_clip.get_model_config(name)
    fields = {**config["text_cfg"], "embed_dim": config["embed_dim"]}
    fields["quick_gelu"] = config.get("quick_gelu", False)
    stored = open_clip_text.OpenCLIPTextConfig.from_json(fields)
    with torch.device("meta"):
        tower = open_clip.model._build_text_tower(
            config["embed_dim"], config["text_cfg"], fields["quick_gelu"]
        )
    live = open_clip_text._live_config(tower)
    assert live == stored.to_clip()
    assert live.layer_norm_eps == 1e-5
    actual = open_clip_text._USAGES[family].config(live)
    expected = CLIPTextConfig.from_json(read_config(f"{published}/config.json"))
    unused = {"bos_token_id", "eos_token_id", "pad_token_id"}
    unused |= set() if actual.projects else {"projection_dim"}
    assert actual.model_dump(exclude=unused) == expected.model_dump(exclude=unused)


def test_saved_folders_load_in_transformers(tmp_path: Path, model: Any) -> None:
    from transformers import CLIPTextModelWithProjection

    text = from_open_clip(model, family="SDXL")
    text.save(tmp_path / "text_encoder_2", tmp_path / "tokenizer_2")
    tokens = load_tokenizer(tmp_path / "tokenizer_2")(PROMPTS, padding="max_length", return_tensors="pt")
    assert torch.equal(tokens.input_ids, open_clip.tokenize(PROMPTS))
    loaded = CLIPTextModelWithProjection.from_pretrained(tmp_path / "text_encoder_2").eval()
    with torch.no_grad():
        pooled = loaded(tokens.input_ids).text_embeds
        assert (pooled - model.encode_text(open_clip.tokenize(PROMPTS))).abs().max() < 1e-5


def test_draws_in_a_pipeline(tiny_checkpoint: Path, model: Any) -> None:
    import numpy as np

    import latentgen

    base = latentgen.TextToImagePipeline.from_pretrained(tiny_checkpoint, dtype=torch.float32, device="cpu")
    pipeline = replace(base, text_encoder=latentgen.from_open_clip(model, family="SD 2.x"))
    settings = {"num_inference_steps": 3, "guidance_scale": 5.0}
    found = pipeline("a cat", seed=3, output_type="np", **settings).images
    theirs = latentgen.to_diffusers(pipeline)
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    due = theirs("a cat", generator=generator, output_type="np", **settings).images
    assert np.abs(np.asarray(found) - due).max() < 1e-4
    assert np.abs(np.asarray(found) - base("a cat", seed=3, output_type="np", **settings).images).max() > 1e-3


@pytest.mark.parametrize(
    ("text_cfg", "message"),
    [
        ({"no_causal_mask": True}, "no_causal_mask"),
        ({"pool_type": "last"}, "pool_type"),
        ({"proj_bias": True}, "proj_bias"),
        ({"embed_cls": True}, "cls_emb|embed_cls"),
        ({"ls_init_value": 1e-4}, r"ls_1\.gamma|ls_init_value"),
        ({"qk_norm": True}, r"ln_q|qk_norm"),
        ({"act_kwargs": {"approximate": "tanh"}}, "activation|act_kwargs"),
        ({"proj_type": "none"}, "proj_type none"),
        ({"vocab_size": 1000}, "1,000 tokens"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stored", [False, True])
def test_other_towers_are_refused_by_name(
    tmp_path: Path, text_cfg: dict[str, Any], message: str, stored: bool
) -> None:
    config = model_config(custom=True, **text_cfg)
    model = build(config)
    if stored:
        save_file(model.state_dict(), tmp_path / "some.safetensors")
        with pytest.raises((ConfigError, CheckpointMismatchError), match=message):
            load_open_clip(tmp_path / "some.safetensors", family="SDXL", config=config)
    else:
        with pytest.raises((ConfigError, CheckpointMismatchError), match=message):
            from_open_clip(model, family="SDXL")


@pytest.mark.parametrize(
    ("build_model", "family", "error", "named"),
    [
        (lambda: "ViT-H-14", "SD 2.x", InputError, r"latentgen\[openclip\]"),
        (lambda: torch.nn.Linear(2, 2), "SD 2.x", InputError, "Linear"),
        (lambda: build(model_config()), "SD 3", InputError, r"'SD 3'.* SD 1\.x"),
        (lambda: build(model_config()).to("meta"), "SDXL", InputError, "meta"),
        (lambda: build(model_config(layers=1)), "SD 2.x", ConfigError, "layers 1"),
    ],
)
def test_what_is_no_model_of_open_clip_is_refused(
    build_model: Callable[[], Any], family: Any, error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        from_open_clip(build_model(), family=family)


def _broken(tmp_path: Path, model: Any, change: Callable[[dict[str, Any]], None]) -> Path:
    state = dict(model.state_dict())
    change(state)
    save_file(state, tmp_path / "some.safetensors")
    return tmp_path / "some.safetensors"


def test_files_that_do_not_fit_are_refused(tmp_path: Path, model: Any) -> None:
    def wider(state: dict[str, Any]) -> None:
        state["positional_embedding"] = torch.ones(80, 32)

    config = model_config()
    lacking = _broken(tmp_path, model, lambda state: state.pop("ln_final.bias"))
    with pytest.raises(CheckpointMismatchError, match=r"1 missing .*final_layer_norm\.bias"):
        load_open_clip(lacking, family="SDXL", config=config)
    with pytest.raises(CheckpointMismatchError, match=r"misshapen .*position_embedding"):
        load_open_clip(_broken(tmp_path, model, wider), family="SDXL", config=config)
    more = _broken(tmp_path, model, lambda state: state.update({"ln_other.bias": torch.ones(1)}))
    with pytest.raises(CheckpointMismatchError, match=r"ln_other\.bias"):
        load_open_clip(more, family="SDXL", config=config)
    whole = _broken(tmp_path, model, lambda state: None)
    with pytest.raises(CheckpointMismatchError, match=r"resblocks\.2\."):
        load_open_clip(whole, family="SDXL", config=model_config(layers=2))
    with pytest.raises(InputError, match=r"get_model_config.*open_clip_config\.json"):
        load_open_clip(whole, family="SDXL")
    with pytest.raises(ConfigError, match="text_cfg"):
        load_open_clip(whole, family="SDXL", config={"embed_dim": 24})
    with pytest.raises(ConfigError, match="embed_dim"):
        load_open_clip(whole, family="SDXL", config={"text_cfg": TEXT})
    save_file({"conv.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="unknown architecture"):
        load_open_clip(tmp_path / "other.safetensors", family="SDXL", config=config)


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"open_clip_model\.safetensors"):
        load_open_clip(tmp_path, family="SDXL")
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(UnsafeCheckpointError, match="latentgen convert"):
        load_open_clip(tmp_path, family="SDXL")
