"""Convolutions whose weights are converted to the layout of the CPU's kernels once, instead of at every call.

torch's oneDNN kernels work on blocked weights and convert plain ones at every call. Over small feature maps, that
takes longer than the convolution. `torch.compile` packs weights with the same operators when it freezes a model.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Packed(NamedTuple):
    """A packed weight, and the weight that it was made from, whose address stays in use as long as this does."""

    weight: Tensor
    version: int
    packed: Tensor


class PackedConv2d(nn.Conv2d):
    """A convolution for inference on the CPU that caches its weight in the layout of the kernel.

    The weight itself is what is saved and loaded; when it changes, it is packed again. The output is channels_last.
    """

    _cache: _Packed | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Convolve [B, in, H, W] to [B, out, H', W']."""
        weight, cache = self.weight.detach(), self._cache
        version = 0 if weight.is_inference() else weight._version
        if cache is None or cache.weight.data_ptr() != weight.data_ptr() or cache.version != version:
            packed = _pack(weight, self.padding, self.stride, input.shape)
            cache = self._cache = _Packed(weight, version, packed)
        return _convolve(input, cache.packed, self.bias, self.padding, self.stride)

    def __getstate__(self) -> dict[str, object]:
        """All but the packed weight, whose layout torch can neither copy nor pickle."""
        return {**self.__dict__, "_cache": None}


def pack_convolutions(module: nn.Module) -> None:
    """Make the convolutions inside `module` PackedConv2d, where this CPU has kernels for their dtype.

    1x1 convolutions stay: they are matrix products, for which packing gains nothing.
    """
    for layer in module.modules():
        is_plain = type(layer) is nn.Conv2d and layer.groups == 1 and layer.dilation == (1, 1)
        if is_plain and layer.kernel_size != (1, 1) and can_pack(layer.weight.dtype):
            layer.__class__ = PackedConv2d  # the same layer, with another forward


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether packed convolutions in `dtype` run on this machine; runs one to find out."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    image = torch.linspace(-1, 1, 2 * 8 * 36).reshape(2, 8, 6, 6).to(dtype)
    weight = torch.linspace(-1, 1, 8 * 8 * 9).reshape(8, 8, 3, 3).to(dtype)
    try:
        packed = _convolve(image, _pack(weight, (1, 1), (1, 1), image.shape), None, (1, 1), (1, 1))
    # The operators are internal to torch: other versions may not have them, or with other arguments.
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return torch.allclose(packed, F.conv2d(image, weight, padding=1), rtol=2e-2, atol=1e-2)


def _pack(weight: Tensor, padding: Any, stride: tuple[int, ...], shape: torch.Size) -> Tensor:
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, (1, 1), 1, shape)


def _convolve(
    image: Tensor, packed: Tensor, bias: Tensor | None, padding: Any, stride: tuple[int, ...]
) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(
        image, packed, bias, padding, stride, (1, 1), 1, "none", [], ""
    )
