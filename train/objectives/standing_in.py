"""A model that is still being trained, used for a moment as if it were finished."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def standing_in(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block `module` is in evaluation mode, runs uncompiled, and has `weights` in the place of its own.

    Afterwards all is as it was, bit for bit: the parameters are the same storage, which an optimiser may hold views of;
    every part is in the mode that it was in; and torch's generators have drawn nothing.

    Args:
        module: what is trained.
        weights: by the names of its parameters, on any device; those that are not named stay.
    """
    parameters = dict(module.named_parameters())
    trained = {name: parameters[name].data for name in weights}
    modes = [(part, part.training) for part in module.modules()]
    cuda = sorted({p.device.index for p in parameters.values() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda), torch.compiler.set_stance("force_eager"):
        try:
            for name, weight in weights.items():
                parameters[name].data = weight.to(trained[name])
            module.eval()
            yield
        finally:
            for name, own in trained.items():
                parameters[name].data = own
            for part, mode in modes:
                part.training = mode
