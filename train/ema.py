"""Using the averaged weights of a model that is being trained, without changing its training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from latentgen.pipelines.base import Pipeline
from latentgen.train.host_memory import temporarily_on
from latentgen.train.objectives.base import Objective


@contextmanager
def ema_scope(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block `module` is in evaluation mode, uncompiled, and has `weights` instead of its own.

    Afterwards everything is restored bit for bit: parameters have the same storage, of which an optimizer may hold
    views; every submodule has its mode; and torch's generators have their states.

    Args:
        module: the module being trained.
        weights: by parameter name, on any device; parameters that are not named keep their values.
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


@contextmanager
def preview(objective: Objective, pipeline: Pipeline, weights: Mapping[str, Tensor]) -> Iterator[Pipeline]:
    """The pipeline of an objective, drawing with `weights` on the device that is trained on; see `ema_scope`.

    The decoder and the text encoder are on that device inside the block only.
    """
    device, backend = next(objective.parameters()).device, pipeline.unet.attention_backend
    others = nn.ModuleList([pipeline.decoder, pipeline.text_encoder.module])
    with ema_scope(objective, weights), temporarily_on(others, device):
        try:
            yield replace(pipeline, device=device)
        finally:
            pipeline.unet.attention_backend = backend
