"""The optimisers: AdamW, and Muon for the weight matrices with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from latentgen.train.config import Optimizer

# Embedding tables are looked up, not multiplied: orthogonal updates mean nothing to them.
_TABLE_MODULES = (nn.Embedding,)
# Matrices of fewer rows or columns (RGB in, latents out) are left to AdamW.
_SMALLEST_SIDE = 9


def build_optimizer(module: nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """The optimiser of a recipe over the parameters of `module` that require gradients."""
    if config.name == "muon":
        return MuonAdamW(
            module, learning_rate=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


class MuonAdamW(torch.optim.Optimizer):
    """Muon for every weight matrix and convolution kernel inside the networks, AdamW for everything else.

    Muon (torch.optim.Muon) orthogonalises the momentum of each matrix and takes two dimensions only; a convolution
    kernel [O, I, k, k] takes part as the matrix [O, I * k * k] over the same storage. So the parameters must have their
    final device and memory format. Updates are scaled to AdamW's root mean square (arXiv:2502.16982, section 2.2),
    so one learning rate serves both.
    """

    def __init__(
        self, module: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        tables = {id(p) for m in module.modules() if isinstance(m, _TABLE_MODULES) for p in m.parameters()}
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for p in module.parameters():
            if p.requires_grad:
                multiplied = p.ndim in (2, 4) and id(p) not in tables and min(p.shape[:2]) >= _SMALLEST_SIDE
                (matrices if multiplied else rest).append(p)
        super().__init__([{"params": matrices}, {"params": rest}], {"lr": learning_rate})
        self._kernels = [
            (p, nn.Parameter(_in_storage_order(p.detach(), p).view(len(p), -1))) for p in matrices
        ]
        self._muon = torch.optim.Muon(
            [{"params": [matrix for _, matrix in self._kernels]}],
            lr=learning_rate,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adamw = torch.optim.AdamW(
            [{"params": rest}], lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
        )

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply the gradients; the learning rate is that of the first parameter group."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for optimizer in (self._muon, self._adamw):
            for group in optimizer.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
        for kernel, matrix in self._kernels:
            grad = kernel.grad
            matrix.grad = None if grad is None else _in_storage_order(grad, kernel).reshape(len(kernel), -1)
        self._muon.step()
        self._adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of both optimisers, parameters numbered matrices first."""
        offset = len(self._kernels)
        rest = {index + offset: values for index, values in self._adamw.state_dict()["state"].items()}
        return {
            "state": self._muon.state_dict()["state"] | rest,
            "param_groups": super().state_dict()["param_groups"],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` gave; hyperparameters stay as they are."""
        offset = len(self._kernels)
        state = state_dict["state"]
        muon = {index: values for index, values in state.items() if index < offset}
        adamw = {index - offset: values for index, values in state.items() if index >= offset}
        for optimizer, part in ((self._muon, muon), (self._adamw, adamw)):
            optimizer.load_state_dict({"state": part, "param_groups": optimizer.state_dict()["param_groups"]})


def _in_storage_order(tensor: Tensor, kernel: Tensor) -> Tensor:
    """A tensor shaped like `kernel`, its dimensions in the order in which the kernel's lie in memory.

    The kernel is [O, I], or [O, I, k, k] in the contiguous or the channels_last format.
    """
    channels_last = kernel.ndim == 4 and not kernel.is_contiguous()
    return tensor.permute(0, 2, 3, 1) if channels_last else tensor
