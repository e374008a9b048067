from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from latentgen.models import layers
from latentgen.models.layers import PackedConv2d, can_pack, pack_convolutions

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="this CPU has no packed convolutions")


def packed(conv: nn.Conv2d) -> PackedConv2d:
    pack_convolutions(conv)
    assert isinstance(conv, PackedConv2d)
    return conv


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Sequential(nn.Conv2d(16, 24, 3, stride=2, bias=False), nn.Conv2d(24, 8, 1)),
        nn.Conv2d(8, 8, 3, dilation=2),
        nn.Conv2d(8, 8, 3, groups=2),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_packed_convolutions_give_the_same_features(dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        pytest.skip(f"this CPU has no packed convolutions in {dtype}")
    plain = small_net().to(dtype)
    net = copy.deepcopy(plain)
    pack_convolutions(net)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    # The copy is packed for the first shape, and serves the others.
    for shape in ((2, 3, 24, 24), (1, 3, 40, 17), (5, 3, 24, 24)):
        for layout in (torch.contiguous_format, torch.channels_last):
            image = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)
            ours, expected = net(image).float(), plain(image).float()
            error = torch.linalg.vector_norm(ours - expected) / torch.linalg.vector_norm(expected)
            assert error < tolerance


def test_what_has_no_kernel_stays_and_the_state_is_unchanged() -> None:
    net = small_net()
    before = net.state_dict()
    pack_convolutions(net)
    kinds = {name: type(module) for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    assert kinds == {"0": PackedConv2d, "1.0": PackedConv2d, "1.1": nn.Conv2d, "2": nn.Conv2d, "3": nn.Conv2d}
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)


@pytest.mark.parametrize(
    "change",
    [
        lambda conv, weight: conv.weight.copy_(weight),
        lambda conv, weight: conv.load_state_dict({"weight": weight, "bias": conv.bias}, assign=True),
    ],
)
@torch.no_grad()
def test_a_changed_weight_is_packed_anew(change: Callable[[nn.Conv2d, torch.Tensor], object]) -> None:
    conv = packed(nn.Conv2d(8, 8, 3))
    image = torch.randn(1, 8, 6, 6)
    conv(image)
    weight = torch.randn(8, 8, 3, 3)
    change(conv, weight)
    torch.testing.assert_close(conv(image), nn.functional.conv2d(image, weight, conv.bias))


@torch.inference_mode()
def test_a_weight_of_another_dtype_is_packed_anew() -> None:
    if not can_pack(torch.bfloat16):
        pytest.skip("this CPU has no packed convolutions in bfloat16")
    conv = packed(nn.Conv2d(8, 8, 3))
    conv(torch.randn(1, 8, 6, 6))
    half = conv.to(torch.bfloat16)
    image = torch.randn(1, 8, 6, 6, dtype=torch.bfloat16)
    expected = nn.functional.conv2d(image, half.weight, half.bias)
    torch.testing.assert_close(half(image), expected, rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_a_module_that_has_worked_can_be_copied() -> None:
    net = nn.Sequential(packed(nn.Conv2d(3, 8, 3)))
    image = torch.randn(1, 3, 6, 6)
    torch.testing.assert_close(copy.deepcopy(net)(image), net(image))


def test_a_torch_without_the_kernels_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> torch.Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(layers, "_convolve", missing)
    assert not can_pack.__wrapped__(torch.float32)
    assert not can_pack(torch.float16)
