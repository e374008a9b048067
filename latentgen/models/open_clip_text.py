"""OpenCLIP's text encoders, from a model of the open_clip library or from a file of its weights.

They become a :class:`CLIPText`: open_clip and transformers compute the same function, so LoRAs, embeddings and saving
work as for any other text encoder. open_clip itself is not imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn

from latentgen.checkpoints.families import CLIP_PAD, OPENCLIP_PAD, clip_tokenizer
from latentgen.checkpoints.folder import as_path
from latentgen.checkpoints.identify import identify
from latentgen.checkpoints.io import read_header, refuse_pickles
from latentgen.checkpoints.key_map import openclip_key_map, to_diffusers_names, with_prefix
from latentgen.checkpoints.weights import Weights, first_five
from latentgen.errors import CheckpointMismatchError, CheckpointNotFoundError, ConfigError, InputError
from latentgen.files import quote, read_json
from latentgen.models.config import CLIPTextConfig, Count, StageConfig, Width
from latentgen.models.text import CLIPText, ContextLayer
from latentgen.models.text_loading import empty_model, name_with_prefix

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

OpenCLIPFamily = Literal["SD 1.x", "SD 2.x", "SDXL"]

CONFIG_FILE = "open_clip_config.json"
# The names of open_clip's weights on the Hub.
_WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_IMAGE_TOWER = "visual."
# Parameters of the contrastive objective (arXiv:2103.00020, section 2.3), and the causal mask of older releases.
_IGNORED_KEYS = ("logit_scale", "logit_bias", "attn_mask", "text.attn_mask")
_ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu"}


class _Usage(NamedTuple):
    """How a family uses its text encoder: output layer, dropped last blocks, projection, padding token."""

    layer: ContextLayer
    dropped: int
    projects: bool
    pad_token: str

    def config(self, whole: CLIPTextConfig) -> CLIPTextConfig:
        """The configuration of the used part of a tower; ConfigError if the tower lacks it."""
        if self.projects and not whole.projects:
            raise ConfigError("proj_type none: SDXL needs the projection of the end token")
        layers = whole.num_hidden_layers - self.dropped
        if layers < 1:
            raise ConfigError(
                f"layers {whole.num_hidden_layers}: SD 2.x drops the last block, so give at least 2"
            )
        fields = whole.model_dump(exclude={"architectures"}) | {"num_hidden_layers": layers}
        return _clip_config(projects=self.projects, **fields)


# As in the configurations of the published folders. The context of SD 2.x is the penultimate layer, normalized; that of
# SDXL is the same without the norm (arXiv:2307.01952, section 2).
_USAGES: Mapping[str, _Usage] = {
    "SD 1.x": _Usage("last", 0, False, CLIP_PAD),
    "SD 2.x": _Usage("last", 1, False, OPENCLIP_PAD),
    "SDXL": _Usage("penultimate", 0, True, OPENCLIP_PAD),
}


class OpenCLIPTextConfig(StageConfig):
    """open_clip's `text_cfg`, plus `embed_dim` and `quick_gelu` from the level above; other fields differ from CLIP."""

    diffusers_class: ClassVar[str] = "open_clip's text tower"

    embed_dim: Width
    quick_gelu: bool = False
    context_length: Annotated[int, Field(ge=3, le=65536)] = 77
    vocab_size: Annotated[int, Field(ge=1, le=10**7)] = 49408
    width: Width = 512
    heads: Count = 8
    layers: Count = 12
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    proj_type: Literal["linear", "none"] = "linear"
    pool_type: Literal["argmax"] = "argmax"
    no_causal_mask: Literal[False] = False
    proj_bias: Literal[False] = False

    def to_clip(self) -> CLIPTextConfig:
        """The configuration of transformers for the whole tower; ConfigError if it is out of the bounds of CLIP."""
        return _clip_config(
            projects=self.proj_type == "linear",
            vocab_size=self.vocab_size,
            hidden_size=self.width,
            # Rounded down as in open_clip; the term corrects the rounding error of a ratio computed by division.
            intermediate_size=int(self.width * self.mlp_ratio + 1e-6),
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.context_length,
            projection_dim=self.embed_dim,
            hidden_act="quick_gelu" if self.quick_gelu else "gelu",
        )


def _clip_config(*, projects: bool, **fields: object) -> CLIPTextConfig:
    name = "CLIPTextModelWithProjection" if projects else "CLIPTextModel"
    return CLIPTextConfig.from_json({"architectures": [name], **fields})


def from_open_clip(
    model: nn.Module,
    *,
    family: OpenCLIPFamily,
    tokenizer: CLIPTokenizer | None = None,
    dtype: torch.dtype | None = None,
) -> CLIPText:
    """The text tower of an open_clip model as a text encoder, on the same device and with the same weights.

    Only the projection, which transformers stores transposed, and weights of another dtype are copied; the others are
    shared, so changing them in one model changes the other. ::

        model = open_clip.create_model("ViT-H-14", pretrained="laion2b_s32b_b79k")
        tower = from_open_clip(model, family="SD 2.x")

    Args:
        model: from `open_clip.create_model`; its image tower is ignored.
        family: how the tower is used: its last layer, normalized ("SD 1.x"); its penultimate layer, normalized, without
            the last block ("SD 2.x"); or its penultimate layer without the norm, with the projection of the end token
            as pooled state ("SDXL").
        tokenizer: the tokenizer of the training; None is CLIP's, which reads prompts as in diffusers: without
            open_clip's cleaning of the text (ftfy, HTML entities), and with the family's padding token.
        dtype: of the weights; None keeps that of the tower's matrices.

    Raises:
        InputError: `model` is not an open_clip model with such a tower, or `family` is unknown.
        ConfigError: the tower differs from CLIP; the message names the field.
        CheckpointMismatchError: its weights differ from those of CLIP, or its vocabulary from the tokenizer's.
    """
    usage = _usage(family)
    tower = _text_tower(model)
    whole, tensors = _live_config(tower), tower.state_dict()
    _refuse_extra(tensors, whole, f"the {type(model).__name__}")
    config = usage.config(whole)
    key_map = openclip_key_map(config)
    used = {source.key: tensors[source.key] for source in key_map.values() if source.key in tensors}
    if any(tensor.is_meta or not tensor.is_floating_point() for tensor in used.values()):
        raise InputError("the model's weights have to be floating-point numbers, and not on the meta device")
    dtype = tower.transformer.resblocks[0].mlp.c_fc.weight.dtype if dtype is None else dtype
    state = to_diffusers_names({key: tensor.to(dtype) for key, tensor in used.items()}, key_map)
    tokenizer = tokenizer or _tokenizer(config, usage)
    clip, prefix = empty_model(config, next(iter(state.values())).device)
    try:
        clip.load_state_dict(
            {name_with_prefix(name, prefix): tensor for name, tensor in state.items()}, assign=True
        )
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise CheckpointMismatchError(
            f"the {type(model).__name__}: not the weights of CLIP: {detail}"
        ) from None
    clip.eval().requires_grad_(False)
    return CLIPText(config, clip, tokenizer, layer=usage.layer)


def load_open_clip(
    source: str | Path,
    *,
    family: OpenCLIPFamily,
    config: Mapping[str, Any] | None = None,
    tokenizer: CLIPTokenizer | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> CLIPText:
    """The text tower in a file of open_clip's weights; those of the image tower are ignored.

    Args:
        source: a `.safetensors` file, or a folder in open_clip's layout on the Hub (`open_clip_model.safetensors` and
            `open_clip_config.json`).
        family: as in :func:`from_open_clip`.
        config: from `open_clip.get_model_config(NAME)`; None reads `open_clip_config.json` next to the file.
        tokenizer: as in :func:`from_open_clip`.
        dtype: of the weights; None keeps that of the file.
        device: of the weights.

    Raises:
        InputError: the file is something else, the configuration is missing, or `family` is unknown.
        CheckpointError: the file is damaged or unsupported; the subclass says which.
        ConfigError: as in :func:`from_open_clip`.
    """
    usage = _usage(family)
    path = _weights_file(as_path(source))
    header = read_header(path)
    identity = identify(header)
    if identity.kind != "text encoder" or identity.layout != "original":
        raise InputError(
            f"{quote(path)} is {identity.name}; give a file saved by open_clip, which has keys like "
            "transformer.resblocks.0.attn.in_proj_weight"
        )
    whole = _stored_config(path, config).to_clip()
    keys = (key.removeprefix(identity.key_prefix).removeprefix(identity.component_prefix) for key in header)
    _refuse_extra(keys, whole, quote(path))
    clip_config = usage.config(whole)
    key_map = with_prefix(openclip_key_map(clip_config), identity.key_prefix + identity.component_prefix)
    text = CLIPText.from_weights(
        clip_config,
        tokenizer or _tokenizer(clip_config, usage),
        Weights((path,), key_map),
        layer=usage.layer,
        dtype=dtype,
        device=device,
    )
    text.model.requires_grad_(False)
    return text


def _usage(family: OpenCLIPFamily) -> _Usage:
    if family not in _USAGES:
        raise InputError(f"family={quote(family)} is unknown; choose from {', '.join(_USAGES)}")
    return _USAGES[family]


def _text_tower(model: Any) -> Any:
    """The module that contains the text tower: the model itself, or a part of it."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model must be an open_clip model, not {quote(model)}: create one with open_clip.create_model(NAME, "
            'pretrained=TAG); install open_clip with pip install "latentgen[openclip]"'
        )
    tower = model.get_submodule("text") if "text" in dict(model.named_children()) else model
    parts = {name for name, _ in tower.named_children()}
    if not {"transformer", "token_embedding", "ln_final"} <= parts or not hasattr(
        tower.transformer, "resblocks"
    ):
        raise InputError(
            f"the {type(model).__name__} has no text transformer of open_clip (transformer.resblocks, "
            "token_embedding, ln_final); its wrappers of other libraries' text encoders are not supported"
        )
    return tower


def _live_config(tower: Any) -> CLIPTextConfig:
    """The configuration of a whole tower, from its modules."""
    blocks = list(tower.transformer.resblocks)
    projection = tower.text_projection
    # open_clip's CLIP has the attributes of its TextTransformer, under another name.
    pool_type = tower.text_pool_type if hasattr(tower, "text_pool_type") else tower.pool_type
    for field, is_other in {
        "no_causal_mask": tower.attn_mask is None,
        "proj_bias": isinstance(projection, nn.Module),
        "pool_type": pool_type != "argmax",
    }.items():
        if is_other:
            raise ConfigError(f"{field}: the text tower differs from CLIP's; such towers are not supported")
    norms = {
        module.eps
        for part in (tower.transformer, tower.ln_final)
        for module in part.modules()
        if isinstance(module, nn.LayerNorm)
    }
    activations = {_activation(block.mlp.gelu) for block in blocks}
    heads = {block.attn.num_heads for block in blocks}
    if len(norms) != 1 or len(activations) != 1 or len(heads) != 1:
        raise ConfigError(
            "the blocks of the text tower differ in heads, activation or epsilon; CLIP's are equal"
        )
    vocabulary, width = tower.token_embedding.weight.shape
    return _clip_config(
        projects=projection is not None,
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=blocks[0].mlp.c_fc.weight.shape[0],
        num_hidden_layers=len(blocks),
        num_attention_heads=heads.pop(),
        max_position_embeddings=tower.positional_embedding.shape[0],
        projection_dim=width if projection is None else projection.shape[1],  # unused without a projection
        hidden_act=activations.pop(),
        layer_norm_eps=norms.pop(),
    )


def _activation(module: nn.Module) -> str:
    name = type(module).__name__
    if name not in _ACTIVATIONS or (isinstance(module, nn.GELU) and module.approximate != "none"):
        raise ConfigError(f"the text tower's activation is {module}; allowed are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _weights_file(path: Path) -> Path:
    """The file itself, or the weights in a folder."""
    if not path.is_dir():
        return path
    for name in _WEIGHTS_FILES:
        if (path / name).is_file():
            return path / name
    refuse_pickles(path)
    raise CheckpointNotFoundError(
        f"{quote(path)} has no weights of open_clip; expected {' or '.join(_WEIGHTS_FILES)}"
    )


def _stored_config(path: Path, config: Mapping[str, Any] | None) -> OpenCLIPTextConfig:
    """The validated configuration, or the one next to the weights."""
    where = "config"
    if config is None:
        file = path.with_name(CONFIG_FILE)
        if not file.is_file():
            raise InputError(
                f"{quote(path)} does not hold the number of heads and the activation of its text tower; give "
                f"config=open_clip.get_model_config(NAME), or put {CONFIG_FILE} next to the file"
            )
        config, where = read_json(file), quote(file)
    inner = config.get("model_cfg", config)
    text = inner.get("text_cfg") if isinstance(inner, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(text, Mapping):
        raise ConfigError(f"{where} has no text_cfg; give a configuration of open_clip")
    outer = {name: inner[name] for name in ("embed_dim", "quick_gelu") if name in inner}
    return OpenCLIPTextConfig.from_json({**text, **outer})


def _refuse_extra(keys: Iterable[str], whole: CLIPTextConfig, what: str) -> None:
    """Refuse weights that a complete tower of this configuration does not have."""
    expected = {source.key for source in openclip_key_map(whole).values()}
    others = (key for key in keys if not key.startswith(_IMAGE_TOWER) and key not in _IGNORED_KEYS)
    if extra := sorted(set(others) - expected):
        raise CheckpointMismatchError(
            f"{what}: {len(extra)} weights are not those of a CLIP text encoder ({first_five(extra)}); such towers are "
            "not supported"
        )


def _tokenizer(config: CLIPTextConfig, usage: _Usage) -> CLIPTokenizer:
    tokenizer = clip_tokenizer(pad_token=usage.pad_token)
    if config.vocab_size != len(tokenizer):
        raise CheckpointMismatchError(
            f"the tower embeds {config.vocab_size:,} tokens, CLIP's tokenizer has {len(tokenizer):,}; give "
            "tokenizer=, the one of its training"
        )
    tokenizer.model_max_length = config.max_position_embeddings
    return tokenizer
