"""Layers that compute activations once more: the same gradients, and only what is meant is computed twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from latentgen.models import activation_checkpointing as checkpointing
from latentgen.models.activation_checkpointing import Checkpointing, run_checkpointed
from latentgen.models.attention import ContextKeyValue, Transformer2DModel
from latentgen.models.layers import ResnetBlock2D

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
# What a convolution's element is the sum of, here and in the products of the feed-forward's second layer.
WIDE = 100


class Operators(TorchDispatchMode):
    """Counts the operators that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[object] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        self.seen[func] += 1
        return func(*args, **(kwargs or {}))


def resnet() -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    layer = ResnetBlock2D(16, 32, temb_channels=8, groups=8)
    return layer, (torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(2, 32))


def transformer() -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    layer = Transformer2DModel(32, 4, 1, 24, 8, linear_projection=True, only_cross_attention=False)
    contexts = (ContextKeyValue(None, (torch.randn(2, 5, 32), torch.randn(2, 5, 32))),)
    return layer, (torch.randn(2, 32, 8, 8, requires_grad=True), contexts)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpointing, "_MANY", WIDE)


def run(
    layer: nn.Module, inputs: tuple[Any, ...], how: Checkpointing, forward: Any = None
) -> tuple[list[Tensor], Counter[object]]:
    """All gradients, and what the backward pass computed."""
    layer.zero_grad()
    inputs[0].grad = None
    with forward or nullcontext():
        loss = run_checkpointed(layer, *inputs, how=how).square().sum()
    with Operators() as operators:
        loss.backward()
    used = [tensor.grad for tensor in (inputs[0], *layer.parameters()) if tensor.grad is not None]
    return [gradient.clone() for gradient in used], operators.seen


@pytest.mark.parametrize("build", [resnet, transformer])
@pytest.mark.parametrize("how", ["selective", True])
@pytest.mark.parametrize("forward", ["plain", "math", "bf16"])
def test_the_gradients_are_the_same_to_the_bit(build: Any, how: Checkpointing, forward: str):
    contexts: Mapping[str, Any] = {
        "plain": nullcontext,
        "math": lambda: sdpa_kernel(SDPBackend.MATH),
        "bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    layer, inputs = build()
    expected, _ = run(layer, inputs, False, contexts[forward]())
    found, _ = run(layer, inputs, how, contexts[forward]())
    assert len(found) == len(expected) > 8
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_resnet_computes_its_norms_once_more_and_its_wide_convolutions_not():
    layer, inputs = resnet()
    _, plain = run(layer, inputs, False)
    _, selective = run(layer, inputs, "selective")
    _, full = run(layer, inputs, True)
    assert plain[aten.convolution.default] == 0
    assert selective[aten.convolution.default] == 1  # of the shortcut: 1x1, of 16 channels
    assert full[aten.convolution.default] == 2  # the last is needed by nothing
    assert selective[aten.native_group_norm.default] == full[aten.native_group_norm.default] == 2


def test_a_transformer_computes_narrow_products_and_attention_to_few_once_more():
    layer, inputs = transformer()
    _, selective = run(layer, inputs, "selective")
    _, full = run(layer, inputs, True)
    assert (selective[ATTENTION], full[ATTENTION]) == (1, 2)  # that to the context
    assert selective[aten.gelu.default] == full[aten.gelu.default] == 1
    # The second layer of the feed-forward sums 128 channels, all other products 32.
    assert selective[aten.addmm.default] == full[aten.addmm.default] - 1
    assert selective[aten.mm.default] == full[aten.mm.default]


def test_without_gradients_nothing_is_kept_in_mind():
    layer, inputs = resnet()
    with torch.no_grad():
        assert torch.equal(run_checkpointed(layer, *inputs, how="selective"), layer(*inputs))
