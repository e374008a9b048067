"""Linear layers and convolutions with low-rank adapters next to them (LoRA, arXiv:2106.09685, section 4.1).

Also the names that LoRA files use for these layers. kohya writes a layer's path with underscores for dots, which
cannot be undone from the name alone; so the table goes from the model's own paths to every name a file may use.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentgen.checkpoints.key_map import unet_key_map
from latentgen.errors import ConfigError
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig

M = TypeVar("M", bound=nn.Module)

# Files name the layers of CLIP with this prefix; whether the model has it depends on the version of transformers.
_TEXT_PREFIX = "text_model."


class LowRankBranch(nn.Module):
    """The adapter of one layer: an input is projected down to `rank` channels, and up to the layer's output.

    The two factors are buffers that no state_dict holds, so that they move with the layer and are never saved as
    a part of it.

    Attributes:
        name: of the adapter that the branch belongs to.
        scale: alpha / rank, as the adapter was trained.
        weight: what the user multiplies it by; 0 leaves the branch out.
    """

    down: Tensor
    up: Tensor

    def __init__(self, name: str, down: Tensor, up: Tensor, *, scale: float, weight: float) -> None:
        super().__init__()
        self.name = name
        self.scale = scale
        self.weight = weight
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)

    def add_to(self, output: Tensor, input: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
        """Return `output`, which `layer` made of `input`, plus what the branch makes of it."""
        if self.weight == 0:
            return output
        if isinstance(layer, nn.Conv2d):
            hidden = F.conv2d(input, self.down, None, layer.stride, layer.padding)
            hidden = F.conv2d(hidden, self.up)
        else:
            hidden = F.linear(F.linear(input, self.down), self.up)
        return torch.add(output, hidden, alpha=self.weight * self.scale)


class AdaptedLayer(nn.Module):
    """A layer with its adapters; the layer itself is unchanged, and replaces this one when they are detached.

    Shares the layer's table of parameters: `weight` and `bias` have the same names in a state_dict, and whatever
    replaces or moves them here does so for the layer.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self._parameters = layer._parameters
        # In a tuple the layer is no submodule, which would change the names of its parameters.
        self._layer = (layer,)
        self.branches = nn.ModuleList()

    @property
    def layer(self) -> nn.Linear | nn.Conv2d:
        """The layer without its adapters."""
        return self._layer[0]

    def forward(self, input: Tensor) -> Tensor:
        """Map what the layer maps: [..., in] to [..., out], or [B, in, H, W] to [B, out, H', W']."""
        output = self.layer(input)
        for branch in branches(self):
            output = branch.add_to(output, input, self.layer)
        return output


def branches(module: nn.Module) -> Iterator[LowRankBranch]:
    """The branches of all adapters inside `module`."""
    return (child for child in module.modules() if isinstance(child, LowRankBranch))


def shared_copy(module: M) -> M:
    """A copy of a module whose parameters and buffers are those of the original: no weight is copied.

    Adapters that are attached to the copy, or detached from it, leave the original as it is. Convolutions with
    packed weights (:mod:`latentgen.models.mkldnn_conv`) pack them once more for the copy.
    """
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


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
