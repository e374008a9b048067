"""Inside the scope a model has the averaged weights; afterwards everything is restored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from latentgen.train.validation import ema_scope


def make_model() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
    model[2].eval()
    return model.to(memory_format=torch.channels_last)


def test_inside_it_is_the_finished_one():
    model = make_model()
    weights = {"0.bias": torch.arange(4.0, dtype=torch.float64)}
    kernel = model[0].get_parameter("weight").clone()
    with ema_scope(model, weights):
        assert not any(part.training for part in model.modules())
        bias = model[0].get_parameter("bias")
        assert torch.equal(bias, torch.arange(4.0))
        assert bias.dtype == torch.float32
        assert torch.equal(model[0].get_parameter("weight"), kernel)
        image = torch.randn(1, 3, 5, 5)
        assert torch.equal(model(image), model(image))


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_it_is_what_it_was_even_after_an_error(fails: bool):
    model = make_model()
    parameters = dict(model.named_parameters())
    before = {name: (p.data_ptr(), p.stride(), p.detach().clone()) for name, p in parameters.items()}
    modes = [part.training for part in model.modules()]
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    try:
        with ema_scope(model, {name: torch.ones_like(p) for name, p in parameters.items()}):
            torch.randn(100)
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    assert torch.equal(torch.randn(4), expected)
    assert [part.training for part in model.modules()] == modes == [True, True, True, False, False]
    for name, p in model.named_parameters():
        pointer, stride, value = before[name]
        assert p is parameters[name]
        assert (p.data_ptr(), p.stride()) == (pointer, stride)
        assert torch.equal(p, value)
