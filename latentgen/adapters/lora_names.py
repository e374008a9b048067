"""The names that LoRA files give to the layers of a model, derived from the model itself.

kohya writes a layer's path with underscores for dots, which cannot be undone by looking at the name alone. So the
table goes the other way: from the paths that the model has to every name that a file may use for them.
"""

from __future__ import annotations

from torch import nn

from latentgen.checkpoints.key_map import unet_key_map
from latentgen.errors import ConfigError
from latentgen.models.lora import AdaptedLayer
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig

# Files name the layers of CLIP with this prefix; whether the model has it depends on the version of transformers.
_TEXT_PREFIX = "text_model."


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
        originals = original_paths(module.config)
        claims += [(flat(originals[path]), path) for path in paths if path in originals]
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


def original_paths(config: UNetConfig) -> dict[str, str]:
    """Path here -> path in the original layout, of all layers of a UNet; none where that layout has no such UNet."""
    try:
        key_map = unet_key_map(config)
    except ConfigError:
        return {}
    pairs = (
        (name.removesuffix(".weight"), source.key.removesuffix(".weight")) for name, source in key_map.items()
    )
    return {path: original for path, original in pairs if not path.endswith(".bias")}
