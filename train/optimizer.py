"""The optimisers: AdamW, and Muon for the weight matrices with AdamW for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Embedding tables are looked up, not multiplied: orthogonal updates mean nothing to them.
_TABLE_MODULES = (nn.Embedding,)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for every weight matrix and convolution kernel inside the networks, AdamW for everything else.

    Muon (torch.optim.Muon) orthogonalises the momentum of each matrix and takes two dimensions only; a convolution
    kernel [O, I, k, k] takes part as the matrix [O, I * k * k] over the same storage. Updates are scaled to AdamW's
    root mean square, so one learning rate serves both.
    """

    def __init__(
        self, module: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
    ):
        tables = {id(p) for m in module.modules() if isinstance(m, _TABLE_MODULES) for p in m.parameters()}
        trainable = [p for p in module.parameters() if p.requires_grad]
        matrices = [p for p in trainable if p.ndim in (2, 4) and id(p) not in tables and min(p.shape[:2]) > 8]
        chosen = {id(p) for p in matrices}
        rest = [p for p in trainable if id(p) not in chosen]
        super().__init__([{"params": matrices}, {"params": rest}], {"lr": learning_rate})
        self._kernels = [(p, nn.Parameter(_as_matrix(p.detach()))) for p in matrices]
        self._muon = torch.optim.Muon(
            [view for _, view in self._kernels],
            lr=learning_rate,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adamw = torch.optim.AdamW(
            rest, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
        )

    def step(self, closure: Any = None) -> None:
        """Apply the gradients; the learning rate is that of the first parameter group."""
        for optimizer in (self._muon, self._adamw):
            for group in optimizer.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
        for parameter, view in self._kernels:
            view.grad = None if parameter.grad is None else _as_matrix(parameter.grad)
        self._muon.step()
        self._adamw.step()

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


def _as_matrix(kernel: Tensor) -> Tensor:
    """View a weight [O, I] or [O, I, k, k] as [O, I * k * k] over the same storage, channels_last or not."""
    if kernel.ndim == 2:
        return kernel
    if kernel.is_contiguous():
        return kernel.flatten(1)
    return kernel.permute(0, 2, 3, 1).flatten(1)
