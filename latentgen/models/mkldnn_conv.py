"""Convolutions with their weights laid out for the CPU once, instead of at every call.

torch's oneDNN kernels work on blocked weights and rearrange plain ones at every call. Over small feature maps, that
takes longer than the convolution. `torch.compile` packs weights with the same operators when it freezes a model.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Copy(NamedTuple):
    """A packed copy, and the weight that it was made from, kept so that its address is not given to another."""

    weight: Tensor
    version: int
    packed: Tensor


class PackedConv2d(nn.Conv2d):
    """A convolution for inference on the CPU that keeps a packed copy beside its weight.

    The weight stays what is saved and loaded; the copy is renewed when it changes. Takes and gives [B, C, H, W],
    the output channels_last in memory.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            (conv.kernel_size[0], conv.kernel_size[1]),
            stride=(conv.stride[0], conv.stride[1]),
            padding=_padding(conv),
            bias=conv.bias is not None,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self._geometry = (_padding(conv), conv.stride)
        self._copy: _Copy | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Convolve [B, in, H, W] to [B, out, H', W']."""
        weight = self.weight.detach()
        version = 0 if weight.is_inference() else weight._version
        copy = self._copy
        if copy is None or copy.weight.data_ptr() != weight.data_ptr() or copy.version != version:
            copy = _Copy(weight, version, _pack(weight, *self._geometry, input.shape))
            self._copy = copy
        return _convolve(input, copy.packed, self.bias, *self._geometry)

    def __getstate__(self) -> dict[str, object]:
        """What is copied and pickled: all but the packed copy, whose layout torch cannot store."""
        return {**self.__dict__, "_copy": None}


def pack_convolutions(module: nn.Module) -> None:
    """Let the convolutions inside `module` keep packed copies, where this CPU has kernels for their dtype.

    1x1 convolutions stay as they are: they are matrix products, for which plain weights do.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and _is_packable(child):
                setattr(parent, name, PackedConv2d(child))


def _is_packable(conv: nn.Conv2d) -> bool:
    plain = type(conv) is nn.Conv2d and conv.groups == 1 and conv.dilation == (1, 1)
    return plain and conv.kernel_size != (1, 1) and can_pack(conv.weight.dtype)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether packed convolutions in `dtype` run on this machine, found out by running one."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    image = torch.linspace(-1, 1, 2 * 8 * 36).reshape(2, 8, 6, 6).to(dtype)
    weight = torch.linspace(-1, 1, 8 * 8 * 9).reshape(8, 8, 3, 3).to(dtype)
    try:
        packed = _convolve(image, _pack(weight, (1, 1), (1, 1), image.shape), None, (1, 1), (1, 1))
    # The operators are internal to torch: a version without them, or with other arguments, is told by failing.
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return torch.allclose(packed, F.conv2d(image, weight, padding=1), rtol=2e-2, atol=1e-2)


def _pack(weight: Tensor, padding: tuple[int, ...], stride: tuple[int, ...], shape: torch.Size) -> Tensor:
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, (1, 1), 1, shape)


def _convolve(
    image: Tensor, packed: Tensor, bias: Tensor | None, padding: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(
        image, packed, bias, padding, stride, (1, 1), 1, "none", [], ""
    )


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    assert not isinstance(conv.padding, str)
    return conv.padding[0], conv.padding[1]
