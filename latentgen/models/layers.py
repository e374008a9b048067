"""The convolutional layers that the UNet and the VAE share.

Parameter names are those of the diffusers layout, so that its checkpoints load with no key map. Feature maps are
[B, C, H, W] and stay channels_last if the input is.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResnetBlock2D(nn.Module):
    """Two normalized 3x3 convolutions with a skip connection, optionally conditioned on the timestep.

    Args:
        temb_channels: width of the time embedding, or None for a block without time conditioning.
        scale_shift: modulate the second normalization (FiLM, arXiv:2105.05233 eq. 13) instead of adding to the
            features (arXiv:2006.11239, appendix B).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int | None = None,
        groups: int = 32,
        eps: float = 1e-6,
        scale_shift: bool = False,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels is not None:
            self.time_emb_proj = nn.Linear(temb_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden: Tensor, temb: Tensor | None = None) -> Tensor:
        """Map features [B, in, H, W] to [B, out, H, W].

        `temb` is the activated time embedding after `time_emb_proj`: [B or 1, out], or with `scale_shift`
        [B or 1, 2 * out] (scale, then shift).
        """
        residual = hidden if self.conv_shortcut is None else self.conv_shortcut(hidden)
        hidden = self.conv1(F.silu(self.norm1(hidden)))
        if temb is not None:
            temb = temb[:, :, None, None]
        if temb is not None and not self.scale_shift:
            hidden = hidden + temb
        hidden = self.norm2(hidden)
        if temb is not None and self.scale_shift:
            scale, shift = temb.chunk(2, dim=1)
            hidden = hidden * (1 + scale) + shift
        return residual + self.conv2(F.silu(hidden))


class Upsample2D(nn.Module):
    """Doubles the resolution (nearest neighbor), then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Map [B, C, H, W] to [B, C, 2H, 2W], or to `size`, that of a skip connection whose side may be odd."""
        if size is None:
            size = (2 * hidden.shape[2], 2 * hidden.shape[3])
        return self.conv(F.interpolate(hidden, size=size, mode="nearest"))


class Downsample2D(nn.Module):
    """Halves the resolution with a strided 3x3 convolution; `padding` 0 pads only the bottom and right (VAE)."""

    def __init__(self, channels: int, *, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, H/2, W/2], rounded up for the UNet and down for the VAE."""
        if self.padding == 0:
            hidden = F.pad(hidden, (0, 1, 0, 1))
        return self.conv(hidden)


class TimestepEmbedding(nn.Module):
    """The two-layer perceptron over a sinusoidal or additive embedding: [..., in] to [..., out].

    A condition of `cond_channels` channels is projected and added to the input.
    """

    def __init__(self, in_channels: int, out_channels: int, *, cond_channels: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)
        self.cond_proj = nn.Linear(cond_channels, in_channels, bias=False) if cond_channels else None

    def forward(self, embedding: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map [..., in_channels], and the condition [..., cond_channels] if there is one, to [..., out_channels]."""
        if self.cond_proj is not None:
            embedding = embedding + self.cond_proj(condition)
        return self.linear_2(F.silu(self.linear_1(embedding)))


def timestep_embedding(
    timesteps: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0
) -> Tensor:
    """Sinusoidal embedding of (possibly fractional) timesteps, arXiv:1706.03762 section 3.5.

    Args:
        timesteps: any shape [...], any dtype.
        dim: channels of the embedding.
        flip_sin_to_cos: cosines first, as in Stable Diffusion.
        freq_shift: 0 ends the frequencies just above 1/10000, 1 exactly there.

    Returns:
        float32 [..., dim] in -1..1.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) * (
        -math.log(10000) / (half - freq_shift)
    )
    angles = timesteps[..., None].float() * exponent.exp()
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(waves, dim=-1), (0, dim - 2 * half))


class _Packed(NamedTuple):
    """A packed weight, and the weight that it was made from, which is held so that its address is not reused."""

    weight: Tensor
    version: int
    packed: Tensor


class PackedConv2d(nn.Conv2d):
    """A convolution for inference on the CPU that caches its weight in the layout of the kernel.

    torch's oneDNN kernels work on blocked weights and convert plain ones at every call. Over small feature maps, that
    takes longer than the convolution. `torch.compile` packs weights with the same operators when it freezes a model.

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
