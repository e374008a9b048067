"""Linear layers and convolutions with low-rank adapters next to them (LoRA, arXiv:2106.09685, section 4.1).

Also the names that LoRA files use for these layers. kohya replaces the dots of a layer's path by underscores, which
cannot be reversed from the name alone; so the table maps every name that a file may use to the model's own path.
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
    """The adapter of one layer: projects the input down to `rank` channels, and up to the layer's output.

    The two factors are non-persistent buffers: they move with the layer and are not in its state_dict.

    Attributes:
        name: of the adapter.
        scale: alpha / rank, as in training.
        weight: the user's factor; 0 skips the branch.
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
        """`output`, which is layer(input), plus the branch's output for the same input."""
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

    It shares the layer's parameter dict: `weight` and `bias` have the same names in a state_dict, and replacing
    or moving them here does so in the layer.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self._parameters = layer._parameters
        # In a tuple, because a submodule would change the names of the layer's parameters.
        self._layer = (layer,)
        self.branches = nn.ModuleList()

    @property
    def layer(self) -> nn.Linear | nn.Conv2d:
        """The layer without its adapters."""
        return self._layer[0]

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out], or [B, in, H, W] to [B, out, H', W']."""
        output = self.layer(input)
        for branch in branches(self):
            output = branch.add_to(output, input, self.layer)
        return output


def branches(module: nn.Module) -> Iterator[LowRankBranch]:
    """The branches of all adapters inside `module`."""
    return (child for child in module.modules() if isinstance(child, LowRankBranch))


def shared_copy(module: M) -> M:
    """A copy of a module that shares the parameters and buffers of the original.

    Attaching adapters to the copy, or detaching them, does not change the original. Convolutions with packed weights
    (:mod:`latentgen.models.layers`) are packed again for the copy.
    """
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def flat(path: str) -> str:
    """A path, dotted or not, in kohya's form, without the prefix that only some models have."""
    return path.removeprefix(_TEXT_PREFIX).replace(".", "_").removeprefix(_TEXT_PREFIX.replace(".", "_"))


def layer_names(module: nn.Module) -> dict[str, str]:
    """Flat name -> path, for every linear layer and convolution that an adapter can be attached to.

    A UNet's layers also have their names in the original layout. A name that two layers share is left out.
    """
    paths = [path for path, layer in module.named_modules() if _is_adaptable(layer)]
    claims = [(flat(path), path) for path in paths]
    if isinstance(module, UNet):
        originals = original_paths(module.config)
        claims += [(flat(originals[path]), path) for path in paths if path in originals]
    names: dict[str, set[str]] = {}
    for name, path in claims:
        names.setdefault(name, set()).add(path)
    return {name: min(paths) for name, paths in names.items() if len(paths) == 1}


def _is_adaptable(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear | AdaptedLayer)


def original_paths(config: UNetConfig) -> dict[str, str]:
    """Path -> path in the original layout, of all layers of a UNet; empty if that layout cannot represent it."""
    try:
        key_map = unet_key_map(config)
    except ConfigError:
        return {}
    pairs = (
        (name.removesuffix(".weight"), source.key.removesuffix(".weight")) for name, source in key_map.items()
    )
    return {path: original for path, original in pairs if not path.endswith(".bias")}
