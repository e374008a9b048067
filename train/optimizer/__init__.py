"""The optimizers of a recipe: AdamW, in full or eight-bit precision, Adafactor, and Muon with AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import nn

from latentgen.train.config import Optimizer
from latentgen.train.optimizer.chained import AdamW8bit, ParameterGroup
from latentgen.train.optimizer.matrix import matrix_adafactor, muon_adamw, split_matrices
from latentgen.train.optimizer.offloaded import OffloadedAdamW, OffloadedGradients, StepInBackward

# bitsandbytes' blocks share a scale, and parameters below this size stay in float32.
_BLOCK_8BIT = 256
_SMALLEST_8BIT = 4096
# A step counter is one float32.
_STEP_BYTES = 4


def build_optimizer(
    module: nn.Module,
    config: Optimizer,
    text_parameters: Iterable[nn.Parameter] = (),
    *,
    offload: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of a recipe over the parameters of `module` that require gradients.

    They must have their final device and memory format. Their order does not depend on the learning rates, so a saved
    state fits whatever these are; each group of `param_groups` has its own. `text_parameters` have
    `text_encoder_learning_rate`. With `offload`, of adamw and adafactor, gradients and moments are in host memory.

    Raises:
        ConfigError: a package is missing.
    """
    text_rate = config.text_encoder_learning_rate
    own_rates = {} if text_rate is None else {id(p): text_rate for p in text_parameters}

    def rate_of(parameter: nn.Parameter) -> float:
        return own_rates.get(id(parameter), config.learning_rate)

    def grouped(parameters: Iterable[nn.Parameter]) -> list[ParameterGroup]:
        """Neighbors with the same rate share a group."""
        return [{"params": list(group), "lr": rate} for rate, group in groupby(parameters, key=rate_of)]

    if config.name == "muon":
        matrices, rest = (grouped(parameters) for parameters in split_matrices(module))
        return muon_adamw(matrices, rest, betas=config.betas, weight_decay=config.weight_decay)
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not config.step_in_backward and not offload:
        return _build(grouped(parameters), config)
    groups = [{"params": [p], "lr": rate_of(p)} for p in parameters]
    parts = [_build([group], config, offload=offload) for group in groups]
    return StepInBackward(groups, parts) if config.step_in_backward else OffloadedGradients(groups, parts)


def _build(
    groups: Sequence[ParameterGroup], config: Optimizer, *, offload: bool = False
) -> torch.optim.Optimizer:
    betas, weight_decay = config.betas, config.weight_decay
    if config.name == "adafactor":  # its state is too small to offload
        return matrix_adafactor(groups, weight_decay=weight_decay)
    if config.name == "adamw8bit":
        return AdamW8bit(groups, betas=betas, weight_decay=weight_decay)
    if offload:
        (group,) = groups
        return OffloadedAdamW(group, betas=betas, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay, fused=True)


def state_bytes(module: nn.Module, config: Optimizer, *, offloaded: bool = False) -> int:
    """Bytes of optimizer state on the device during a step; with offloading, AdamW's moments of one parameter."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if offloaded and config.name == "adamw":
        return _STEP_BYTES * len(parameters) + max((2 * p.nbytes for p in parameters), default=0)
    matrices = {id(p) for p in split_matrices(module)[0]} if config.name == "muon" else set()
    return sum(_state_bytes(p, config.name, id(p) in matrices) for p in parameters)


def _state_bytes(p: nn.Parameter, name: str, in_muon: bool) -> int:
    if in_muon:
        return p.nbytes  # a momentum, and no step counter
    if name == "adafactor":
        # Sums over rows and columns, of kernels and matrices.
        sums = p.numel() if p.ndim < 2 else len(p) + p.numel() // len(p)
        return sums * p.element_size() + _STEP_BYTES
    if name == "adamw8bit":
        if p.numel() < _SMALLEST_8BIT:
            return 8 * p.numel()
        return 2 * (p.numel() + 4 * math.ceil(p.numel() / _BLOCK_8BIT))
    return 2 * p.nbytes + _STEP_BYTES
