"""Layers that store frozen weights in fewer bits, and compute in the precision of the input.

While low-rank adapters are trained, the weights of the model are constant and need no memory in float32
(arXiv:2305.14314). Each layer dequantizes its weight when it computes, in the forward and again in the backward pass.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from latentgen.models.config import StorageDtype

_PLAIN: dict[StorageDtype, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FP8 = torch.float8_e4m3fn
_LARGEST: dict[StorageDtype, float] = {"fp8": torch.finfo(_FP8).max, "int8": 127.0}


class QuantizedWeight(nn.Module):
    """A weight [out, ...] in fewer bits.

    bf16 and fp16 are roundings. fp8 (e4m3) and int8 are scaled by the largest magnitude of each output channel m: the
    error is at most 2**-4 of the value, or 2**-18 m of small ones, with fp8, and m / 254 with int8.
    """

    scale: nn.Parameter | None

    def __init__(self, weight: Tensor, storage: StorageDtype) -> None:
        super().__init__()
        self.storage: StorageDtype = storage
        weight = weight.detach()
        if storage in _PLAIN:
            self.scale = None
            bits = weight.to(_PLAIN[storage])
        else:
            peaks = weight.float().abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
            scale = torch.where(peaks > 0, peaks, 1.0) / _LARGEST[storage]
            scaled = weight.float() / scale
            # As bytes, because not every operation on tensors supports fp8.
            bits = scaled.round().to(torch.int8) if storage == "int8" else scaled.to(_FP8).view(torch.uint8)
            self.scale = nn.Parameter(scale, requires_grad=False)
        # Parameters and not buffers, which distributed training broadcasts at every step.
        self.bits = nn.Parameter(bits, requires_grad=False)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, ...] in `dtype`, a new tensor."""
        bits = self.bits.detach()
        if self.scale is None:
            return bits.to(dtype)
        values = bits.view(_FP8) if self.storage == "fp8" else bits
        return (values.to(torch.float32) * self.scale).to(dtype)


def _weight(layer: FrozenLinear | FrozenConv2d) -> Tensor:
    """The weight in float32, a new tensor."""
    return layer.stored.dense(torch.float32)


def _forward(self: FrozenLinear | FrozenConv2d, input: Tensor) -> Tensor:
    """The forward of nn.Linear or nn.Conv2d, with gradients for the input but not for the weight."""
    return cast(Tensor, _FrozenProduct.apply(_in_compute_dtype(input), self))


class FrozenLinear(nn.Linear):
    """A linear layer with a quantized weight."""

    stored: QuantizedWeight
    weight = property(_weight)  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]
    forward = _forward


class FrozenConv2d(nn.Conv2d):
    """A convolution with a quantized weight."""

    stored: QuantizedWeight
    weight = property(_weight)  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]
    forward = _forward


def quantize_frozen(module: nn.Module, storage: StorageDtype) -> None:
    """Store the weights of the linear layers and convolutions inside `module` that are not trained in fewer bits.

    They stay nn.Linear and nn.Conv2d, whose `weight` can be read, but is not in the state_dict. Norms, embeddings,
    biases and everything trained stay as they are. Call it once the weights are final and adapters have been added:
    peft builds the adapter of a convolution with the class of the adapted layer.
    """
    if storage == "fp32":
        return
    frozen: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FrozenLinear, nn.Conv2d: FrozenConv2d}
    for layer in list(module.modules()):
        if any(p.requires_grad for p in layer.parameters(recurse=False)):
            continue
        if type(layer) in frozen and getattr(layer, "padding_mode", "zeros") == "zeros":
            weight = cast(Tensor, layer._parameters.pop("weight"))
            layer.__class__ = frozen[type(layer)]  # the same layer, with another weight and forward
            layer.stored = QuantizedWeight(weight, storage)


class _FrozenProduct(torch.autograd.Function):
    """Saves only the layer for the backward pass: autograd itself would save the dense weight."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: FrozenLinear | FrozenConv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, input.shape
        weight = layer.stored.dense(input.dtype)
        bias = None if layer.bias is None else layer.bias.to(input.dtype)
        if isinstance(layer, nn.Linear):
            return F.linear(input, weight, bias)
        return F.conv2d(input, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), layer = grads, ctx.layer
        weight = layer.stored.dense(grad.dtype)
        if isinstance(layer, nn.Linear):
            return grad @ weight, None
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return conv2d_input(ctx.shape, weight, grad, *geometry), None


def _in_compute_dtype(input: Tensor) -> Tensor:
    """The input in its own dtype, or in that of autocast."""
    device = input.device.type
    return input.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else input
