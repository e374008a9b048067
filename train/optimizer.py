"""The optimisers: AdamW, also with a state of eight bits, Adafactor, and Muon with AdamW for what is no matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentgen.errors import ConfigError
from latentgen.train.config import Optimizer
from latentgen.train.joined_optimizer import Group, JoinedOptimizer, as_torch_has_them
from latentgen.train.offload import store_for
from latentgen.train.one_by_one import OffloadedAdamW, OffloadedGradients, StepInBackward

# Embedding tables are looked up, not multiplied: orthogonal updates mean nothing to them.
_TABLE_MODULES = (nn.Embedding,)
# Matrices of fewer rows or columns (RGB in, latents out) are left to AdamW.
_SMALLEST_SIDE = 9
# How bitsandbytes does it: blocks share a scale, and small parameters are kept in float32.
_BLOCK_8BIT = 256
_SMALLEST_8BIT = 4096
# A count of steps is one float32.
_STEP_BYTES = 4


def build_optimizer(
    module: nn.Module,
    config: Optimizer,
    text_parameters: Iterable[nn.Parameter] = (),
    *,
    offload: Path | None = None,
) -> torch.optim.Optimizer:
    """The optimiser of a recipe over the parameters of `module` that require gradients.

    They must have their final device and memory format. Their order does not depend on the learning rates, so that
    a state fits whatever these are; each group of `param_groups` has its own.

    Args:
        module: what learns.
        config: the section of the recipe.
        text_parameters: those that `text_encoder_learning_rate` is for.
        offload: the folder of a run whose gradients and moments wait off their device, with adamw and adafactor; None
            if they stay there.

    Raises:
        ConfigError: it needs a package that is not there.
        OutputError: they cannot be kept in that folder.
    """
    text_rate = config.text_encoder_learning_rate
    own_rates = {} if text_rate is None else {id(p): text_rate for p in text_parameters}

    def rate_of(parameter: nn.Parameter) -> float:
        return own_rates.get(id(parameter), config.learning_rate)

    def grouped(parameters: Iterable[nn.Parameter]) -> list[Group]:
        """Neighbours of one rate together."""
        return [Group(list(group), rate) for rate, group in groupby(parameters, key=rate_of)]

    if config.name == "muon":
        matrices, rest = _split_matrices(module)
        return MuonAdamW(
            grouped(matrices), grouped(rest), betas=config.betas, weight_decay=config.weight_decay
        )
    parameters = [p for p in module.parameters() if p.requires_grad]
    alone = [Group([p], rate_of(p)) for p in parameters]
    if config.step_in_backward:
        return StepInBackward(alone, _build_one_by_one(alone, config, offload))
    if offload is not None:
        parts = _build_one_by_one(alone, config, offload)
        return OffloadedGradients(alone, parts, store_for(parameters, offload))
    return _build(grouped(parameters), config)


def check_optimizer(config: Optimizer) -> None:
    """Refuse an optimiser that cannot be built here.

    Raises:
        ConfigError: it needs a package that is not there.
    """
    if config.name == "adamw8bit":
        _bitsandbytes()


def _bitsandbytes() -> Any:
    """The AdamW of bitsandbytes with a state of eight bits."""
    try:
        from bitsandbytes.optim import AdamW8bit as Inner  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"optimizer.name adamw8bit needs bitsandbytes, which cannot be imported ({error}): pip install "
            "bitsandbytes, or use adafactor"
        ) from None
    return Inner


def _build(groups: Sequence[Group], config: Optimizer) -> torch.optim.Optimizer:
    if config.name == "adafactor":
        return MatrixAdafactor(groups, weight_decay=config.weight_decay)
    if config.name == "adamw8bit":
        return AdamW8bit(groups, betas=config.betas, weight_decay=config.weight_decay)
    return torch.optim.AdamW(
        as_torch_has_them(groups), betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


def _build_one_by_one(
    groups: Sequence[Group], config: Optimizer, offload: Path | None
) -> list[torch.optim.Optimizer]:
    """An optimiser for each of some groups of one parameter; Adafactor's state is too small to be moved."""
    if offload is None or config.name != "adamw":
        return [_build([group], config) for group in groups]
    parameters = [p for group in groups for p in group.parameters]
    moments = {name: store_for(parameters, offload) for name in ("exp_avg", "exp_avg_sq")}
    return [
        OffloadedAdamW(group, place, moments, betas=config.betas, weight_decay=config.weight_decay)
        for place, group in enumerate(groups)
    ]


class MuonAdamW(JoinedOptimizer):
    """Muon for every weight matrix and convolution kernel inside the networks, AdamW for everything else.

    Muon (torch.optim.Muon) orthogonalises the momentum of each matrix; a convolution kernel takes part as a matrix.
    Updates are scaled to AdamW's root mean square (arXiv:2502.16982, section 2.2), so one learning rate serves both.
    """

    def __init__(
        self,
        matrices: Sequence[Group],
        rest: Sequence[Group],
        *,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        viewed, self._kernels = _with_matrices(matrices)
        parts: list[torch.optim.Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(
                as_torch_has_them(viewed), weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            parts.append(muon)
        if rest:
            adamw = torch.optim.AdamW(
                as_torch_has_them(rest), betas=betas, weight_decay=weight_decay, fused=True
            )
            parts.append(adamw)
        super().__init__([*matrices, *rest], parts)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply the gradients at the learning rate of each group."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        _hand_over_gradients(self._kernels)
        super().step()
        return loss


class MatrixAdafactor(JoinedOptimizer):
    """Adafactor (arXiv:1804.04235), to which a convolution kernel is a matrix.

    torch.optim.Adafactor keeps the sums over the last and the last but one dimension: of a kernel [O, I, 3, 3] that is
    two thirds as much as the kernel itself, of the matrix [O, 9 * I] almost nothing.
    """

    def __init__(self, groups: Sequence[Group], *, weight_decay: float) -> None:
        viewed, self._kernels = _with_matrices(groups)
        adafactor = torch.optim.Adafactor(as_torch_has_them(viewed), weight_decay=weight_decay)
        super().__init__(groups, [adafactor])

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply the gradients at the learning rate of each group."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        _hand_over_gradients(self._kernels)
        super().step()
        # The views of the gradients would keep them alive.
        for kernel, matrix in self._kernels:
            if matrix is not kernel:
                matrix.grad = None
        return loss


class AdamW8bit(JoinedOptimizer):
    """AdamW whose moments are eight bits an element (arXiv:2110.02861), by bitsandbytes.

    Its state is that of bitsandbytes without the code books, which are the same for all.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """

    def __init__(self, groups: Sequence[Group], *, betas: tuple[float, float], weight_decay: float) -> None:
        inner = _bitsandbytes()
        self._inner: Any = inner(as_torch_has_them(groups), betas=betas, weight_decay=weight_decay)
        super().__init__(groups, [self._inner])

    def state_dict(self) -> dict[str, Any]:
        """The moments, their scales and the steps done."""
        # Not the method of bitsandbytes, which hides what is quantised.
        state_dict = torch.optim.Optimizer.state_dict(self._inner)
        state = {
            index: {name: value for name, value in values.items() if name not in ("qmap1", "qmap2")}
            for index, values in state_dict["state"].items()
        }
        return {"state": state, "param_groups": torch.optim.Optimizer.state_dict(self)["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` gave; hyperparameters stay as they are."""
        books = {"qmap1": self._inner.name2qmap["dynamic"], "qmap2": self._inner.name2qmap["udynamic"]}
        state = {
            index: {**values, "step": int(values["step"]), **(books if "absmax1" in values else {})}
            for index, values in state_dict["state"].items()
        }
        groups = torch.optim.Optimizer.state_dict(self._inner)["param_groups"]
        self._inner.load_state_dict({"state": state, "param_groups": groups})


def state_bytes(module: nn.Module, config: Optimizer, *, offloaded: bool = False) -> int:
    """What the optimiser of a recipe holds on the device in a step, for the parameters that are trained.

    If it is offloaded, of AdamW's moments those of one parameter at a time.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if offloaded and config.name == "adamw":
        return _STEP_BYTES * len(parameters) + max((2 * p.nbytes for p in parameters), default=0)
    # Muon alone counts no steps.
    matrices = {id(p) for p in _split_matrices(module)[0]} if config.name == "muon" else set()
    return sum(_kept_bytes(p, config.name, id(p) in matrices) for p in parameters)


def _kept_bytes(p: nn.Parameter, name: str, is_matrix: bool) -> int:
    """What is kept for one parameter, the count of its steps included."""
    if is_matrix:
        return p.nbytes
    if name == "adafactor":
        # Of matrices and kernels, the sums over rows and columns.
        sums = p.numel() if p.ndim < 2 else len(p) + p.numel() // len(p)
        return sums * p.element_size() + _STEP_BYTES
    if name == "adamw8bit":
        if p.numel() < _SMALLEST_8BIT:
            return 8 * p.numel()
        return 2 * (p.numel() + 4 * math.ceil(p.numel() / _BLOCK_8BIT))
    return 2 * p.nbytes + _STEP_BYTES


def _split_matrices(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters that Muon takes, and the others."""
    tables = {id(p) for m in module.modules() if isinstance(m, _TABLE_MODULES) for p in m.parameters()}
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for p in module.parameters():
        if p.requires_grad:
            multiplied = p.ndim in (2, 4) and id(p) not in tables and min(p.shape[:2]) >= _SMALLEST_SIDE
            (matrices if multiplied else rest).append(p)
    return matrices, rest


def _as_matrix(kernel: nn.Parameter) -> nn.Parameter:
    """A kernel [O, I, k, k] as the matrix [O, I * k * k] over the same storage; a matrix as it is."""
    return nn.Parameter(_in_storage_order(kernel.detach(), kernel).view(len(kernel), -1))


def _with_matrices(
    groups: Sequence[Group],
) -> tuple[list[Group], list[tuple[nn.Parameter, nn.Parameter]]]:
    """The same groups with a matrix in the place of every kernel, and all parameters beside what stands for them."""
    viewed = [
        group._replace(parameters=[_as_matrix(p) if p.ndim == 4 else p for p in group.parameters])
        for group in groups
    ]
    pairs = [
        pair
        for group, own in zip(groups, viewed, strict=True)
        for pair in zip(group.parameters, own.parameters, strict=True)
    ]
    return viewed, pairs


def _hand_over_gradients(kernels: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Give the matrices of kernels the kernels' gradients."""
    for kernel, matrix in kernels:
        if matrix is not kernel:
            grad = kernel.grad
            matrix.grad = None if grad is None else _in_storage_order(grad, kernel).reshape(len(kernel), -1)


def _in_storage_order(tensor: Tensor, kernel: Tensor) -> Tensor:
    """A tensor shaped like `kernel`, its dimensions in the order in which the kernel's lie in memory.

    The kernel is [O, I], or [O, I, k, k] in the contiguous or the channels_last format.
    """
    channels_last = kernel.ndim == 4 and not kernel.is_contiguous()
    return tensor.permute(0, 2, 3, 1) if channels_last else tensor
