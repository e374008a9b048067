"""Key maps of the original layout of single files (CompVis, Stability AI): diffusers' names and their sources.

For a configuration, a key map lists every tensor of the diffusers layout with the key that holds it in the
original layout. It is a bijection, so the same map reads and writes: `Weights.load_into` renames tensors as they load,
`to_original` before they are written. The layouts are those of the published files; the tests compare the maps with
diffusers' converters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from latentgen.errors import CheckpointMismatchError, ConfigError
from latentgen.files import quote
from latentgen.models.config import CLIPTextConfig, VAEConfig
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import VAEDecoder, VAEEncoder

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
OPENCLIP_PREFIX = "cond_stage_model.model."
EMA_PREFIX = "model_ema."

_WEIGHT = ("weight",)
_BOTH = ("weight", "bias")
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_TWO_LAYERS = {"linear_1": "label_emb.0.0", "linear_2": "label_emb.0.2"}
# Inside a transformer both layouts have the same names.
_BLOCK_BOTH = ("norm1", "attn1.to_out.0", "norm2", "attn2.to_out.0", "norm3", "ff.net.0.proj", "ff.net.2")
_BLOCK_WEIGHT = tuple(f"attn{i}.to_{part}" for i in (1, 2) for part in "qkv")
# Patterns in the autoencoder's names -> the original layout.
_VAE_RULES = (
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    ("down_blocks", "down"),
    ("resnets", "block"),
    (r"(down|up)samplers\.0", r"\1sample"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
    ("to_([qkv])", r"\1"),
)
_OPENCLIP_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "layer_norm2": "ln_2",
}

# Keys of single files that belong to no component and are ignored. Any other key outside the key maps is an error.
_UNUSED = re.compile(
    r"""
    model_ema\..*                                     # read only with ema=True
    | (first_stage_model\.)?loss\..*                  # the autoencoder's discriminator
    | (low_scale_model\.)?                            # buffers of the noise schedule
      ( betas | lvlb_weights | logvar | scale_factor
      | (sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)? | sqrt_recip(m1)?_alphas_cumprod
      | posterior_(variance|log_variance_clipped|mean_coef[12]) )
    | denoiser\.(sigmas|log_sigmas)
    | (model\.)?(v_pred|ztsnr) | global_step | epoch
    | (cond_stage_model|conditioner\.embedders\.\d)\.
      ( (model\.)?logit_scale | model\.attn_mask
      | transformer\.((text_model\.)?embeddings\.position_ids|text_projection(\.weight)?|logit_scale) )
    """,
    re.VERBOSE,
)

_Pairs = Iterator[tuple[str, str]]


class KeySource(NamedTuple):
    """The source of a tensor of the diffusers layout in a file.

    Attributes:
        key: its key in the file.
        qkv_index: 0, 1 or 2 for the rows of queries, keys or values in a fused projection; None for the whole tensor.
        transposed: the file holds the transpose.
        convolution: the file holds a linear layer as a convolution, with a trailing [1, 1] in its shape.
    """

    key: str
    qkv_index: int | None = None
    transposed: bool = False
    convolution: bool = False

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor, from the shape in the file."""
        if self.qkv_index is not None and stored and stored[0] % 3 == 0:
            return (stored[0] // 3, *stored[1:])
        if self.convolution and stored[2:] == (1, 1):
            return stored[:2]
        return stored[::-1] if self.transposed else stored

    def take(self, stored: Tensor) -> Tensor:
        """The tensor, as a view of the stored one unless it is transposed."""
        shape = self.shape(tuple(stored.shape))
        if self.qkv_index is not None:
            return stored[self.qkv_index * shape[0] : (self.qkv_index + 1) * shape[0]]
        return stored.T.contiguous() if self.transposed else stored.view(shape)


# diffusers' name -> its source, in the order of the forward pass.
KeyMap = Mapping[str, KeySource]


def with_prefix(key_map: KeyMap, prefix: str) -> KeyMap:
    """The same map for a file whose keys all begin with ``prefix``."""
    return {name: source._replace(key=prefix + source.key) for name, source in key_map.items()}


def to_diffusers_names(state: Mapping[str, Tensor], key_map: KeyMap) -> dict[str, Tensor]:
    """Tensors of the original layout under diffusers' names; only transposed ones are copied.

    CheckpointMismatchError if ``state`` lacks a key of the map, or has another one.
    """
    _compare(state, {source.key for source in key_map.values()})
    return {name: source.take(state[source.key]) for name, source in key_map.items()}


def to_original(state: Mapping[str, Tensor], key_map: KeyMap) -> dict[str, Tensor]:
    """The reverse of :func:`to_diffusers_names`, with the same errors; only fused and transposed tensors are copied."""
    _compare(state, key_map.keys())
    names: dict[str, list[str]] = {}
    for name, source in sorted(key_map.items(), key=lambda item: item[1].qkv_index or 0):
        names.setdefault(source.key, []).append(name)
    result: dict[str, Tensor] = {}
    for source in key_map.values():
        first = state[names[source.key][0]]
        if source.qkv_index is not None:
            first = torch.cat([state[name] for name in names[source.key]])
        elif source.transposed:
            first = first.T.contiguous()
        elif source.convolution:
            first = first[:, :, None, None]
        result.setdefault(source.key, first)
    return result


def original_key_maps(configs: Mapping[str, Mapping[str, object]]) -> dict[str, KeyMap]:
    """The key map of each component of a single file, with the prefixes of single files.

    Args:
        configs: component ("unet", "vae", "text_encoder", "text_encoder_2") -> its `config.json`. Other components
            have no tensors in a single file and are ignored.

    Raises:
        ConfigError: a configuration is not valid, or the original layout cannot represent it.
    """
    maps: dict[str, KeyMap] = {}
    if "unet" in configs:
        maps["unet"] = with_prefix(unet_key_map(UNetConfig.from_json(configs["unet"])), UNET_PREFIX)
    if "vae" in configs:
        maps["vae"] = with_prefix(vae_key_map(VAEConfig.from_json(configs["vae"])), VAE_PREFIX)
    is_pair = "text_encoder" in configs and "text_encoder_2" in configs
    if "text_encoder" in configs:
        config = CLIPTextConfig.from_json(configs["text_encoder"])
        if is_pair:
            maps["text_encoder"] = with_prefix(clip_key_map(config), "conditioner.embedders.0.transformer.")
        elif config.hidden_act == "quick_gelu":  # only OpenAI's text encoders have it
            maps["text_encoder"] = with_prefix(clip_key_map(config), "cond_stage_model.transformer.")
        else:
            maps["text_encoder"] = with_prefix(openclip_key_map(config), OPENCLIP_PREFIX)
    if "text_encoder_2" in configs:
        config = CLIPTextConfig.from_json(configs["text_encoder_2"])
        prefix = f"conditioner.embedders.{1 if is_pair else 0}.model."
        maps["text_encoder_2"] = with_prefix(openclip_key_map(config), prefix)
    return maps


def is_unused(key: str, configs: Mapping[str, Mapping[str, object]]) -> bool:
    """Whether a key of a single file belongs to no component and can be ignored.

    Args:
        key: the key in the file.
        configs: as for :func:`original_key_maps`. SD 2.x reads the penultimate block of its text encoder, so the last
            block and the projection are unused.
    """
    if _UNUSED.fullmatch(key):
        return True
    tower = configs.get("text_encoder", {})
    after = (
        f"{OPENCLIP_PREFIX}transformer.resblocks.{tower.get('num_hidden_layers')}.",
        f"{OPENCLIP_PREFIX}text_projection",
    )
    return key.startswith(after)


def ema_key_map(key_map: KeyMap) -> KeyMap:
    """The map of the UNet's moving averages, whose keys have no dots."""
    return {
        name: source._replace(key=EMA_PREFIX + source.key.removeprefix("model.").replace(".", ""))
        for name, source in key_map.items()
    }


def unet_key_map(config: UNetConfig) -> KeyMap:
    """The UNet, without the prefix of single files."""
    return {name: KeySource(key) for name, key in _unet_pairs(config)}


def vae_key_map(config: VAEConfig) -> KeyMap:
    """The autoencoder, without the prefix of single files."""
    with torch.device("meta"):
        names = [*VAEEncoder(config).state_dict(), *VAEDecoder(config).state_dict()]
    last = len(config.block_out_channels) - 1
    result = {}
    for name in names:
        # The decoder's blocks are stored from the highest resolution down.
        key = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", name)
        for old, new in _VAE_RULES:
            key = re.sub(old, new, key)
        result[name] = KeySource(key, convolution=re.fullmatch(r".*\.to_.*weight", name) is not None)
    return result


def clip_key_map(config: CLIPTextConfig) -> KeyMap:
    """OpenAI's text encoder, which has the names of transformers in single files."""
    return {name: KeySource(name) for name in openclip_key_map(config) if name.startswith("text_model.")}


def openclip_key_map(config: CLIPTextConfig) -> KeyMap:
    """An OpenCLIP text encoder with the configuration's number of blocks."""
    result = {
        "text_model.embeddings.token_embedding.weight": KeySource("token_embedding.weight"),
        "text_model.embeddings.position_embedding.weight": KeySource("positional_embedding"),
    }
    for layer in range(config.num_hidden_layers):
        block, original = f"text_model.encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for qkv_index, part in enumerate("qkv"):
            for kind in _BOTH:
                key = f"{original}attn.in_proj_{kind}"
                result[f"{block}self_attn.{part}_proj.{kind}"] = KeySource(key, qkv_index=qkv_index)
        result |= {name: KeySource(key) for name, key in _leaves(block, original, _OPENCLIP_LAYER)}
    result |= {f"text_model.final_layer_norm.{kind}": KeySource(f"ln_final.{kind}") for kind in _BOTH}
    if config.projects:
        result["text_projection.weight"] = KeySource("text_projection", transposed=True)
    return result


def _unet_pairs(config: UNetConfig) -> _Pairs:
    if config.mid_block_type is None:
        raise ConfigError(
            "mid_block_type null: the original layout cannot represent a UNet without a middle block; use a folder "
            "in the diffusers layout"
        )
    yield from _leaves("", "", _UNET_ENDS)
    yield from _conditioning_pairs(config)
    position, last = 1, len(config.stages) - 1
    for i, stage in enumerate(config.stages):
        for j, (inputs, outputs) in enumerate(stage.down):
            block, original = f"down_blocks.{i}.", f"input_blocks.{position}."
            yield from _unet_resnet(f"{block}resnets.{j}.", f"{original}0.", inputs != outputs)
            if stage.down_attention:
                yield from _transformer(f"{block}attentions.{j}.", f"{original}1.", stage.depth)
            position += 1
        if i < last:
            yield from _leaves(
                f"down_blocks.{i}.downsamplers.0.", f"input_blocks.{position}.0.", {"conv": "op"}
            )
            position += 1
    yield from _unet_resnet("mid_block.resnets.0.", "middle_block.0.", False)
    yield from _transformer("mid_block.attentions.0.", "middle_block.1.", config.stages[-1].depth)
    yield from _unet_resnet("mid_block.resnets.1.", "middle_block.2.", False)
    position = 0
    for i, stage in enumerate(reversed(config.stages)):
        for j, (inputs, outputs) in enumerate(stage.up):
            block, original = f"up_blocks.{i}.", f"output_blocks.{position}."
            yield from _unet_resnet(f"{block}resnets.{j}.", f"{original}0.", inputs != outputs)
            if stage.up_attention:
                yield from _transformer(f"{block}attentions.{j}.", f"{original}1.", stage.depth)
            position += 1
        if i < last:  # the upsampler is last in the stage's last block
            place = f"output_blocks.{position - 1}.{2 if stage.up_attention else 1}."
            yield from _leaves(f"up_blocks.{i}.upsamplers.0.", place, {"conv": "conv"})


def _conditioning_pairs(config: UNetConfig) -> _Pairs:
    """The embeddings added to that of the timestep, all of which are called label_emb."""
    if config.time_cond_proj_dim is not None:
        # The original code has none; this is the name in other converters.
        yield "time_embedding.cond_proj.weight", "time_embed.cond_proj.weight"
    by_class = config.class_embed_type in ("timestep", "projection")
    by_table = config.class_embed_type is None and config.num_class_embeds is not None
    if config.addition_embed_type is not None and (by_class or by_table):
        raise ConfigError(
            "addition_embed_type and a class embedding: the original layout has one label_emb and cannot hold "
            "both; use a folder in the diffusers layout"
        )
    if by_table:
        yield "class_embedding.weight", "label_emb.weight"
    elif by_class:
        yield from _leaves("class_embedding.", "", _TWO_LAYERS)
    elif config.addition_embed_type is not None:
        yield from _leaves("add_embedding.", "", _TWO_LAYERS)


def _unet_resnet(name: str, key: str, shortcut: bool) -> _Pairs:
    modules = {m: o for m, o in _UNET_RESNET.items() if shortcut or m != "conv_shortcut"}
    yield from _leaves(name, key, modules)


def _transformer(name: str, key: str, depth: int) -> _Pairs:
    yield from _leaves(name, key, _same(("norm", "proj_in", "proj_out")))
    for i in range(depth):
        block = f"transformer_blocks.{i}."
        yield from _leaves(name + block, key + block, _same(_BLOCK_WEIGHT), _WEIGHT)
        yield from _leaves(name + block, key + block, _same(_BLOCK_BOTH))


def _leaves(name: str, key: str, modules: Mapping[str, str], kinds: tuple[str, ...] = _BOTH) -> _Pairs:
    """The tensors of modules under ``name`` in the diffusers layout and under ``key`` in the original one."""
    for module, original in modules.items():
        for kind in kinds:
            yield f"{name}{module}.{kind}", f"{key}{original}.{kind}"


def _same(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


def _compare(actual: Mapping[str, Tensor], expected: Iterable[str]) -> None:
    if different := sorted(actual.keys() ^ set(expected)):
        raise CheckpointMismatchError(
            f"the tensors do not match the configuration: {len(different)} are missing or extra, such as "
            f"{quote(different[0])}; use the configuration of this model"
        )
