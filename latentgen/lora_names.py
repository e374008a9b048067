"""The names that LoRA files give to the layers of a model, derived from the model itself.

kohya writes a layer's path with underscores for dots, which cannot be undone by looking at the name alone. So the
table goes the other way: from the paths that the model has to every name that a file may use for them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from latentgen.models.lora import AdaptedLayer
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig

# Files name the layers of CLIP with this prefix; whether the model has it depends on the version of transformers.
_TEXT_PREFIX = "text_model."
_RESNET_LAYERS = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def flat(path: str) -> str:
    """A path, dotted or not, as kohya writes it, without the prefix that only some models have."""
    return path.removeprefix(_TEXT_PREFIX).replace(".", "_").removeprefix(_TEXT_PREFIX.replace(".", "_"))


def layer_names(module: nn.Module) -> dict[str, str]:
    """Flat name -> path, for every linear layer and convolution that an adapter can be attached to.

    A UNet's layers are found under their names in the original layout, too. A name that two layers could claim is
    left out.
    """
    paths = [path for path, layer in module.named_modules() if _is_adaptable(layer)]
    claims = [(flat(path), path) for path in paths]
    if isinstance(module, UNet):
        blocks = dict(original_blocks(module.config))
        claims += [(flat(name), path) for path in paths if (name := original_path(path, blocks)) is not None]
    names: dict[str, str] = {}
    contested: set[str] = set()
    for name, path in claims:
        if names.setdefault(name, path) != path:
            contested.add(name)
    return {name: path for name, path in names.items() if name not in contested}


def _is_adaptable(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear | AdaptedLayer)


def original_blocks(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """(path here, path in the original layout) of each block and of each layer that stands alone.

    The original numbers its blocks through: `input_blocks.0` is `conv_in`, then come the resnet blocks of a level,
    each with its transformer, and the downsampler; `output_blocks` has the upsampler in the last block of a level.
    """
    yield "conv_in", "input_blocks.0.0"
    yield "conv_out", "out.2"
    for linear, index in (("linear_1", 0), ("linear_2", 2)):
        yield f"time_embedding.{linear}", f"time_embed.{index}"
        yield f"add_embedding.{linear}", f"label_emb.0.{index}"
    for path, original in (("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)):
        yield f"mid_block.{path}", f"middle_block.{original}"
    levels, index = config.levels, 1
    for number, level in enumerate(levels):
        for layer in range(len(level.down)):
            yield f"down_blocks.{number}.resnets.{layer}", f"input_blocks.{index}.0"
            yield f"down_blocks.{number}.attentions.{layer}", f"input_blocks.{index}.1"
            index += 1
        if level is not levels[-1]:
            yield f"down_blocks.{number}.downsamplers.0.conv", f"input_blocks.{index}.0.op"
            index += 1
    index = 0
    for number, level in enumerate(reversed(levels)):
        for layer in range(len(level.up)):
            yield f"up_blocks.{number}.resnets.{layer}", f"output_blocks.{index}.0"
            yield f"up_blocks.{number}.attentions.{layer}", f"output_blocks.{index}.1"
            index += 1
        position = 2 if level.up_attention else 1
        yield f"up_blocks.{number}.upsamplers.0.conv", f"output_blocks.{index - 1}.{position}.conv"


def original_path(path: str, blocks: dict[str, str]) -> str | None:
    """The path of a layer in the original layout; None if it has none."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        block, rest = blocks.get(".".join(parts[:length])), ".".join(parts[length:])
        if block is not None:
            in_resnet = parts[length - 2 : length - 1] == ["resnets"]
            inner = _RESNET_LAYERS.get(rest) if in_resnet else rest
            return f"{block}.{inner}".removesuffix(".") if inner is not None else None
    return None
