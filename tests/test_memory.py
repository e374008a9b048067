from __future__ import annotations

import pytest
import torch
from torch import nn

from latentgen.errors import InputError
from latentgen.memory import MemoryPolicy, on_device


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"attention": "flash"}, "attention='flash'"),
        ({"vae_slicing": "yes"}, "vae_slicing='yes'"),
        ({"decode_tile": 4}, "decode_tile=4"),
        ({"decode_tile": True}, "decode_tile=True"),
    ],
)
def test_a_knob_out_of_bounds_is_refused_by_name(knobs: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        MemoryPolicy(**knobs)  # type: ignore[arg-type]


def test_offloading_borrows_the_device_and_gives_the_same_tensors_back() -> None:
    module = nn.BatchNorm2d(4)
    homes = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    with torch.inference_mode(), on_device(module, torch.device("meta"), offload=True):
        assert all(tensor.is_meta for tensor in module.state_dict().values())
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == homes
    assert module(torch.ones(2, 4, 3, 3)).sum().requires_grad


def test_offloading_gives_the_tensors_back_after_a_failure() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(KeyError), on_device(module, torch.device("meta"), offload=True):
        raise KeyError
    assert not module.weight.is_meta


def test_without_offloading_nothing_moves() -> None:
    module = nn.Linear(2, 2)
    with on_device(module, torch.device("meta"), offload=False):
        assert not module.weight.is_meta


@pytest.mark.parametrize(
    ("old", "new"), [("guide_one_by_one", "sequential_guidance"), ("decode_one_by_one", "vae_slicing")]
)
def test_old_names_of_the_policy_still_work(old: str, new: str) -> None:
    with pytest.warns(FutureWarning, match=new):
        policy = MemoryPolicy(**{old: True})
    assert getattr(policy, new)
    with pytest.warns(FutureWarning, match=new):
        assert getattr(policy, old)
