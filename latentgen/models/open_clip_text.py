"""OpenCLIP's text encoders, from a model of the open_clip library or from a file of its weights.

They become a :class:`CLIPText`: open_clip and transformers compute the same function, so LoRAs, embeddings and saving
work as for any other text encoder. open_clip itself is not imported here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, get_args

import torch
from pydantic import Field
from torch import nn

from latentgen.checkpoints.families import CLIP_PAD, OPENCLIP_PAD, clip_tokenizer
from latentgen.checkpoints.folder import as_path
from latentgen.checkpoints.identify import identify
from latentgen.checkpoints.io import read_header, refuse_pickle
from latentgen.checkpoints.key_map import KeyMap, openclip_key_map, to_diffusers_names, with_prefix
from latentgen.checkpoints.weights import Weights, first_five
from latentgen.errors import CheckpointMismatchError, CheckpointNotFoundError, ConfigError, InputError
from latentgen.files import quote, read_json
from latentgen.models.config import CLIPTextConfig, Count, StageConfig, Width
from latentgen.models.text import CLIPText, ContextLayer

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


class _FamilyTower(NamedTuple):
    """The text encoder of a family: output layer, dropped last blocks, projection, padding token."""

    layer: ContextLayer
    dropped: int
    projects: bool
    pad_token: str


# As in the configurations of the published folders. The context of SD 2.x is the penultimate layer, normalized; that of
# SDXL is the same without the norm (arXiv:2307.01952, section 2).
_FAMILY_TOWERS: Mapping[OpenCLIPFamily, _FamilyTower] = {
    "SD 1.x": _FamilyTower("last", 0, False, CLIP_PAD),
    "SD 2.x": _FamilyTower("last", 1, False, OPENCLIP_PAD),
    "SDXL": _FamilyTower("penultimate", 0, True, OPENCLIP_PAD),
}


class OpenCLIPTextConfig(StageConfig):
    """open_clip's `text_cfg`, with `embed_dim` and `quick_gelu` from next to it.

    Fields that transformers' CLIP does not support allow only their neutral value.
    """

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
    embed_cls: Literal[False] = False
    final_ln_after_pool: Literal[False] = False
    ls_init_value: None = None
    act_kwargs: None = None
    norm_kwargs: None = None
    block_type: Literal["default"] | None = None
    qk_norm: Literal[False] = False
    scaled_cosine_attn: Literal[False] = False
    scale_heads: Literal[False] = False
    scale_attn_inner: Literal[False] = False
    scale_attn: Literal[False] = False
    scale_fc: Literal[False] = False
    hf_model_name: None = None
    # Without effect on a text encoder that satisfies the fields above.
    hf_model_pretrained: bool = True
    hf_proj_type: str | None = None
    hf_pooler_type: str | None = None
    hf_tokenizer_name: str | None = None
    tokenizer_mode: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    pad_id: int = 0
    eos_id: int = 2
    output_tokens: bool = False

    def clip_config(self, *, layers: int, projects: bool, eps: float = 1e-5) -> CLIPTextConfig:
        """The configuration of transformers for the first `layers` blocks.

        Raises:
            ConfigError: a value is out of the bounds of CLIP.
        """
        name = "CLIPTextModelWithProjection" if projects else "CLIPTextModel"
        fields = {
            "architectures": [name],
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            # Rounded down as in open_clip; the term corrects the rounding error of a ratio computed by division.
            "intermediate_size": int(self.width * self.mlp_ratio + 1e-6),
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.context_length,
            "projection_dim": self.embed_dim,
            "hidden_act": "quick_gelu" if self.quick_gelu else "gelu",
            "layer_norm_eps": eps,
        }
        return CLIPTextConfig.from_json(fields)


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
    family_tower = _family_tower(family)
    tower = _text_tower(model)
    config, eps = _live_config(tower)
    tensors = {
        name: tensor
        for name, tensor in tower.state_dict().items()
        if not name.startswith(_IMAGE_TOWER) and name not in _IGNORED_KEYS
    }
    _refuse_extra(tensors, config, f"the {type(model).__name__}")
    clip_config = _clip_config(config, family_tower, eps)
    key_map = openclip_key_map(clip_config.to_json())
    used = {source.key: tensors[source.key] for source in key_map.values() if source.key in tensors}
    if any(tensor.is_meta or not tensor.is_floating_point() for tensor in used.values()):
        raise InputError("the model's weights have to be floating-point numbers, and not on the meta device")
    dtype = tower.transformer.resblocks[0].mlp.c_fc.weight.dtype if dtype is None else dtype
    state = to_diffusers_names({key: tensor.to(dtype) for key, tensor in used.items()}, key_map)
    text = CLIPText.from_tensors(
        clip_config, _tokenizer(config, family_tower, tokenizer), state, layer=family_tower.layer
    )
    text.model.requires_grad_(False)
    return text


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
        CheckpointError: what is wrong with the file, in a subclass.
        ConfigError: as in :func:`from_open_clip`.
    """
    family_tower = _family_tower(family)
    path = _weights_file(as_path(source))
    header = read_header(path)
    identity = identify(header)
    if identity.kind != "text encoder" or identity.layout != "original":
        raise InputError(
            f"{quote(path)} is {identity.name}; give a file saved by open_clip, which has keys like "
            "transformer.resblocks.0.attn.in_proj_weight"
        )
    text_config = _stored_config(path, config)
    prefix = identity.key_prefix + identity.component_prefix
    own = {key.removeprefix(identity.key_prefix) for key in header}
    own = {key for key in own if not key.startswith(_IMAGE_TOWER) and key not in _IGNORED_KEYS}
    _refuse_extra({key.removeprefix(identity.component_prefix) for key in own}, text_config, quote(path))
    clip_config = _clip_config(text_config, family_tower)
    key_map: KeyMap = with_prefix(openclip_key_map(clip_config.to_json()), prefix)
    text = CLIPText.from_weights(
        clip_config,
        _tokenizer(text_config, family_tower, tokenizer),
        Weights((path,), key_map),
        layer=family_tower.layer,
        dtype=dtype,
        device=device,
    )
    text.model.requires_grad_(False)
    return text


def _family_tower(family: OpenCLIPFamily) -> _FamilyTower:
    if family not in _FAMILY_TOWERS:
        raise InputError(
            f"family={quote(family)} is unknown; choose from {', '.join(get_args(OpenCLIPFamily))}"
        )
    return _FAMILY_TOWERS[family]


def _text_tower(model: Any) -> Any:
    """The module that contains the text tower: the model itself, or a part of it."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model has to be an open_clip model, not {quote(model)}: create one with open_clip.create_model(NAME, "
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


def _live_config(tower: Any) -> tuple[OpenCLIPTextConfig, float]:
    """The configuration of a tower, from its modules, and the epsilon of its norms."""
    blocks = list(tower.transformer.resblocks)
    vocabulary, width = tower.token_embedding.weight.shape
    projection = tower.text_projection
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
    config = OpenCLIPTextConfig.from_json(
        {
            # Unused without a projection.
            "embed_dim": width if projection is None else _columns(projection),
            "quick_gelu": activations == {"quick_gelu"},
            "context_length": tower.positional_embedding.shape[0],
            "vocab_size": vocabulary,
            "width": width,
            "heads": heads.pop(),
            "layers": len(blocks),
            "mlp_ratio": blocks[0].mlp.c_fc.weight.shape[0] / width,
            "proj_type": "none" if projection is None else "linear",
            "proj_bias": isinstance(projection, nn.Module),
            "no_causal_mask": tower.attn_mask is None,
            # open_clip's CLIP has the attributes of its TextTransformer, under another name.
            "pool_type": tower.text_pool_type if hasattr(tower, "text_pool_type") else tower.pool_type,
        }
    )
    return config, norms.pop()


def _columns(projection: Any) -> int:
    return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]


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
    for file in sorted(path.iterdir()):
        refuse_pickle(file)
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


def _clip_config(config: OpenCLIPTextConfig, family_tower: _FamilyTower, eps: float = 1e-5) -> CLIPTextConfig:
    if family_tower.projects and config.proj_type == "none":
        raise ConfigError("proj_type none: SDXL needs the projection of the end token")
    layers = config.layers - family_tower.dropped
    if layers < 1:
        raise ConfigError(f"layers {config.layers}: SD 2.x drops the last block, so at least 2 are needed")
    return config.clip_config(layers=layers, projects=family_tower.projects, eps=eps)


def _refuse_extra(keys: Collection[str], config: OpenCLIPTextConfig, what: str) -> None:
    """Refuse weights that a complete tower of this configuration does not have."""
    whole = config.clip_config(layers=config.layers, projects=config.proj_type == "linear")
    expected = {source.key for source in openclip_key_map(whole.to_json()).values()}
    if extra := sorted(set(keys) - expected):
        raise CheckpointMismatchError(
            f"{what}: {len(extra)} weights are not those of a CLIP text encoder ({first_five(extra)}); such towers are "
            "not supported"
        )


def _tokenizer(
    config: OpenCLIPTextConfig, family_tower: _FamilyTower, tokenizer: CLIPTokenizer | None
) -> CLIPTokenizer:
    if tokenizer is not None:
        return tokenizer
    tokenizer = clip_tokenizer(pad_token=family_tower.pad_token)
    if config.vocab_size != len(tokenizer):
        raise CheckpointMismatchError(
            f"the tower embeds {config.vocab_size:,} tokens, CLIP's tokenizer has {len(tokenizer):,}; give "
            "tokenizer=, the one of its training"
        )
    tokenizer.model_max_length = config.context_length
    return tokenizer
