"""OpenCLIP's text towers, from a model of the open_clip library or from a file of its weights.

They become a :class:`CLIPText`: open_clip and transformers compute the same function, so one implementation serves
both, and LoRAs, embeddings and saving work as for any other tower. open_clip itself is not imported here.
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
from latentgen.models.config import StageConfig
from latentgen.models.text import CLIPText, ContextLayer
from latentgen.models.text_config import CLIPTextConfig, Count, Width

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

OpenCLIPFamily = Literal["SD 1.x", "SD 2.x", "SDXL"]

CONFIG_FILE = "open_clip_config.json"
# What open_clip calls its weights on the Hub.
_WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_IMAGE_TOWER = "visual."
# Parameters of the contrastive objective (arXiv:2103.00020, section 2.3), and the causal mask of older releases.
_BESIDE_THE_TOWERS = ("logit_scale", "logit_bias", "attn_mask", "text.attn_mask")
_ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu"}


class _Reading(NamedTuple):
    """How a family reads its tower: which layer, how many blocks it drops, whether it projects, and the padding."""

    layer: ContextLayer
    dropped: int
    projects: bool
    pad_token: str


# As the configurations of the published folders have it. The second one's context is the last layer but one,
# normalised; the third one's is the same without the norm (arXiv:2307.01952, section 2).
_READINGS: Mapping[OpenCLIPFamily, _Reading] = {
    "SD 1.x": _Reading("last", 0, False, CLIP_PAD),
    "SD 2.x": _Reading("last", 1, False, OPENCLIP_PAD),
    "SDXL": _Reading("penultimate", 0, True, OPENCLIP_PAD),
}


class OpenCLIPTextConfig(StageConfig):
    """open_clip's `text_cfg`, with `embed_dim` and `quick_gelu`, which stand beside it.

    What transformers' CLIP does not do is refused by the name of its field.
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
    # Without effect on a tower of the kind that is left.
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
        """The same tower as transformers describes it, of the first `layers` blocks.

        Raises:
            ConfigError: a value is out of the bounds of CLIP.
        """
        name = "CLIPTextModelWithProjection" if projects else "CLIPTextModel"
        fields = {
            "architectures": [name],
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            # Rounded down as in open_clip, but for the error of a ratio that was itself divided out.
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
    """The text tower of a model of open_clip as a text encoder, on the model's device and with its weights.

    Nothing is copied but the projection, which transformers holds transposed, and what has another dtype: what later
    changes the weights of one changes the other. ::

        model = open_clip.create_model("ViT-H-14", pretrained="laion2b_s32b_b79k")
        tower = from_open_clip(model, family="SD 2.x")

    Args:
        model: as `open_clip.create_model` gives it; its image tower is not looked at.
        family: whose way of reading the tower is meant: the last layer, normalised ("SD 1.x"); the last but one,
            normalised, without the block behind it ("SD 2.x"); or the last but one as it is, with the projection of
            the end token as pooled state ("SDXL").
        tokenizer: what the tower was trained with, if not with CLIP's own. That one reads prompts as diffusers does:
            without open_clip's repair of the text (ftfy, HTML entities), and "!" as padding where that is its token.
        dtype: of the weights; that of the tower's matrices if None.

    Raises:
        InputError: `model` is no model of open_clip with such a tower, or `family` is none of these.
        ConfigError: the tower computes something that CLIP does not; the message names the field.
        CheckpointMismatchError: it has other weights than such a tower, or another vocabulary than the tokenizer.
    """
    reading = _reading(family)
    tower = _text_tower(model)
    config, eps = _live_config(tower)
    tensors = {
        name: tensor
        for name, tensor in tower.state_dict().items()
        if not name.startswith(_IMAGE_TOWER) and name not in _BESIDE_THE_TOWERS
    }
    _refuse_extra(tensors, config, f"the {type(model).__name__}")
    clip_config = _clip_config(config, reading, eps)
    key_map = openclip_key_map(clip_config.to_json())
    used = {origin.key: tensors[origin.key] for origin in key_map.values() if origin.key in tensors}
    if any(tensor.is_meta or not tensor.is_floating_point() for tensor in used.values()):
        raise InputError("the model's weights must be floating-point numbers, and not on the meta device")
    dtype = tower.transformer.resblocks[0].mlp.c_fc.weight.dtype if dtype is None else dtype
    state = to_diffusers_names({key: tensor.to(dtype) for key, tensor in used.items()}, key_map)
    text = CLIPText.from_tensors(
        clip_config, _tokenizer(config, reading, tokenizer), state, layer=reading.layer
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
    """The text tower out of a file of open_clip's weights; those of the image tower are passed over.

    Args:
        source: a `.safetensors` file, or a folder as open_clip has it on the Hub (`open_clip_model.safetensors` and
            `open_clip_config.json`).
        family: as in :func:`from_open_clip`.
        config: what `open_clip.get_model_config(NAME)` gives; None reads `open_clip_config.json` beside the file.
        tokenizer: as in :func:`from_open_clip`.
        dtype: of the weights; that of the file if None.
        device: where the weights go.

    Raises:
        InputError: the file is something else, there is no configuration, or `family` is unknown.
        CheckpointError: what is wrong with the file, in a subclass.
        ConfigError: as in :func:`from_open_clip`.
    """
    reading = _reading(family)
    path = _weights_file(as_path(source))
    header = read_header(path)
    identity = identify(header)
    if identity is None or identity.kind != "text encoder" or identity.layout != "original":
        what = identity.name if identity else "nothing that is known here"
        raise InputError(
            f"{quote(path)} is {what}; give a file that open_clip saved, which has keys like "
            "transformer.resblocks.0.attn.in_proj_weight"
        )
    text_config = _stored_config(path, config)
    prefix = identity.wrapper + identity.prefix
    own = {key.removeprefix(identity.wrapper) for key in header}
    own = {key for key in own if not key.startswith(_IMAGE_TOWER) and key not in _BESIDE_THE_TOWERS}
    _refuse_extra({key.removeprefix(identity.prefix) for key in own}, text_config, quote(path))
    clip_config = _clip_config(text_config, reading)
    key_map: KeyMap = with_prefix(openclip_key_map(clip_config.to_json()), prefix)
    text = CLIPText.from_weights(
        clip_config,
        _tokenizer(text_config, reading, tokenizer),
        Weights((path,), key_map),
        layer=reading.layer,
        dtype=dtype,
        device=device,
    )
    text.model.requires_grad_(False)
    return text


def _reading(family: OpenCLIPFamily) -> _Reading:
    if family not in _READINGS:
        raise InputError(
            f"family={quote(family)} is unknown; choose from {', '.join(get_args(OpenCLIPFamily))}"
        )
    return _READINGS[family]


def _text_tower(model: Any) -> Any:
    """The module that owns the text tower: the model itself, or a part of it."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"a model of open_clip is needed, not {quote(model)}: make one with open_clip.create_model(NAME, "
            'pretrained=TAG); open_clip comes with pip install "latentgen[openclip]"'
        )
    tower = model.get_submodule("text") if "text" in dict(model.named_children()) else model
    parts = {name for name, _ in tower.named_children()}
    if not {"transformer", "token_embedding", "ln_final"} <= parts or not hasattr(
        tower.transformer, "resblocks"
    ):
        raise InputError(
            f"the {type(model).__name__} has no text transformer of open_clip's own kind (transformer.resblocks, "
            "token_embedding, ln_final); towers of other libraries inside of open_clip are not read"
        )
    return tower


def _live_config(tower: Any) -> tuple[OpenCLIPTextConfig, float]:
    """What a tower computes, told by its modules; and the epsilon of its norms."""
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
            "the blocks of the text tower differ in heads, activation or epsilon; CLIP's are alike"
        )
    config = OpenCLIPTextConfig.from_json(
        {
            # A tower without projection has no such width.
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
            # open_clip's CLIP takes over the parts of its TextTransformer, under another name.
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
    """The file itself, or the one in a folder of the Hub."""
    if not path.is_dir():
        return path
    for name in _WEIGHTS_FILES:
        if (path / name).is_file():
            return path / name
    for file in sorted(path.iterdir()):
        refuse_pickle(file)
    raise CheckpointNotFoundError(
        f"{quote(path)} holds no weights of open_clip; looked for {_WEIGHTS_FILES[0]}"
    )


def _stored_config(path: Path, config: Mapping[str, Any] | None) -> OpenCLIPTextConfig:
    """The configuration of a model, or the one beside its file; judged by field."""
    where = "config"
    if config is None:
        beside = path.with_name(CONFIG_FILE)
        if not beside.is_file():
            raise InputError(
                f"{quote(path)} does not say how many heads its text tower has, nor its activation; give "
                f"config=open_clip.get_model_config(NAME), or put {CONFIG_FILE} beside the file"
            )
        config, where = read_json(beside), quote(beside)
    inner = config.get("model_cfg", config)
    text = inner.get("text_cfg") if isinstance(inner, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(text, Mapping):
        raise ConfigError(f"{where} has no text_cfg; a configuration of open_clip is needed")
    outer = {name: inner[name] for name in ("embed_dim", "quick_gelu") if name in inner}
    return OpenCLIPTextConfig.from_json({**text, **outer})


def _clip_config(config: OpenCLIPTextConfig, reading: _Reading, eps: float = 1e-5) -> CLIPTextConfig:
    if reading.projects and config.proj_type == "none":
        raise ConfigError(
            "proj_type none: SDXL needs the projection of the end token, which this tower lacks"
        )
    layers = config.layers - reading.dropped
    if layers < 1:
        raise ConfigError(
            f"layers {config.layers}: SD 2.x goes without the last block, and this tower has no other"
        )
    return config.clip_config(layers=layers, projects=reading.projects, eps=eps)


def _refuse_extra(keys: Collection[str], config: OpenCLIPTextConfig, what: str) -> None:
    """Refuse a tower with parts that a whole tower of this configuration does not have."""
    whole = config.clip_config(layers=config.layers, projects=config.proj_type == "linear")
    due = {origin.key for origin in openclip_key_map(whole.to_json()).values()}
    if extra := sorted(set(keys) - due):
        raise CheckpointMismatchError(
            f"{what}: {len(extra)} weights have no place in a text tower of CLIP ({first_five(extra)}); towers of "
            "this kind are not read"
        )


def _tokenizer(config: OpenCLIPTextConfig, reading: _Reading, given: CLIPTokenizer | None) -> CLIPTokenizer:
    if given is not None:
        return given
    tokenizer = clip_tokenizer(pad_token=reading.pad_token)
    if config.vocab_size != len(tokenizer):
        raise CheckpointMismatchError(
            f"the tower embeds {config.vocab_size:,} tokens, CLIP's tokenizer has {len(tokenizer):,}; give "
            "tokenizer=, the one that it was trained with"
        )
    tokenizer.model_max_length = config.context_length
    return tokenizer
