"""k-diffusion's samplers without what they do not need: its package imports a dozen others, for training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.diffusion.references import integral_of_a_cubic


class KDiffusion(NamedTuple):
    """Its modules `sampling` and `external`."""

    sampling: Any
    external: Any


def k_diffusion_or_skip() -> KDiffusion:
    """Import k-diffusion; where it is not installed, skip the module of tests that asks.

    scipy, of which it wants one integral, and others, of which its samplers want nothing here, need not be there.
    """
    spec = find_spec("k_diffusion")
    if spec is None:
        pytest.skip("not installed: pip install --no-deps k-diffusion", allow_module_level=True)
    sys.modules.setdefault("k_diffusion", module_from_spec(spec))
    stand_ins = {name: module for name, module in _stand_ins().items() if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        return KDiffusion(import_module("k_diffusion.sampling"), import_module("k_diffusion.external"))
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _stand_ins() -> dict[str, ModuleType]:
    attributes: dict[str, dict[str, Any]] = {
        "scipy": {"integrate": SimpleNamespace(quad=integral_of_a_cubic)},
        "torchdiffeq": {"odeint": None},
        "torchsde": {},
        "torchvision": {},
        "torchvision.transforms": {"functional": None},
    }
    modules = {name: ModuleType(name) for name in attributes}
    for name, module in modules.items():
        vars(module).update(attributes[name])
    return modules


class BrownianNoise:
    """A noise sampler of k-diffusion, along one Brownian motion in sigma_ve.

    A stretch that begins where the last one did goes on from its end.
    """

    def __init__(self, noise: Callable[[], Tensor]) -> None:
        self._noise = noise
        self._start = self._end = float("nan")
        self._travelled: Tensor | float = 0.0

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        # Where it begins went through a logarithm and back.
        if not torch.isclose(sigma, torch.as_tensor(self._start, dtype=sigma.dtype)):
            self._start = self._end = float(sigma)
            self._travelled = 0.0
        self._travelled = self._travelled + (self._end - float(sigma_next)) ** 0.5 * self._noise()
        self._end = float(sigma_next)
        return self._travelled / (self._start - self._end) ** 0.5
