"""Muon and Adafactor, which work on matrices: a convolution kernel [O, I, k, k] is treated as [O, I * k * k]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from latentgen.train.optimizer.chained import ChainedOptimizer, ParameterGroup

# Matrices of fewer rows or columns (RGB in, latents out) are left to AdamW.
_SMALLEST_SIDE = 9


class MatrixOptimizer(ChainedOptimizer):
    """Optimizers (`parts`) that update matrices in place of some kernels; `views` pairs each kernel with its matrix."""

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        parts: Sequence[torch.optim.Optimizer],
        views: Sequence[tuple[nn.Parameter, nn.Parameter]],
    ) -> None:
        super().__init__(groups, parts)
        self._views = views

    def _apply_gradients(self) -> None:
        for kernel, matrix in self._views:
            if kernel.grad is not None:
                matrix.grad = _in_storage_order(kernel.grad, kernel).reshape(len(kernel), -1)
        super()._apply_gradients()
        for _, matrix in self._views:
            matrix.grad = None  # a view would keep the kernel's gradient alive


def muon_adamw(
    matrices: Sequence[ParameterGroup],
    rest: Sequence[ParameterGroup],
    *,
    betas: tuple[float, float],
    weight_decay: float,
) -> MatrixOptimizer:
    """Muon for every weight matrix and convolution kernel inside the networks, AdamW for everything else.

    Muon (torch.optim.Muon) orthogonalizes the momentum of each matrix. Updates are scaled to AdamW's root mean square
    (arXiv:2502.16982, section 2.2), so one learning rate serves both.
    """
    parts: list[torch.optim.Optimizer] = []
    viewed, views = _with_matrices(matrices)
    if matrices:
        parts.append(torch.optim.Muon(viewed, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    if rest:
        parts.append(torch.optim.AdamW(rest, betas=betas, weight_decay=weight_decay, fused=True))
    return MatrixOptimizer([*matrices, *rest], parts, views)


def matrix_adafactor(groups: Sequence[ParameterGroup], *, weight_decay: float) -> MatrixOptimizer:
    """Adafactor (arXiv:1804.04235) that factors the second moment of a kernel as that of a matrix.

    torch.optim.Adafactor keeps sums over the last dimension and over the last but one: for a kernel [O, I, 3, 3] that
    is two thirds of the kernel's size, for the matrix [O, 9 * I] almost nothing.
    """
    viewed, views = _with_matrices(groups)
    return MatrixOptimizer(groups, [torch.optim.Adafactor(viewed, weight_decay=weight_decay)], views)


def split_matrices(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters that Muon updates, and the others."""
    # Embedding tables are looked up, not multiplied: orthogonal updates are meaningless for them.
    tables = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for p in module.parameters():
        if p.requires_grad:
            multiplied = p.ndim in (2, 4) and id(p) not in tables and min(p.shape[:2]) >= _SMALLEST_SIDE
            (matrices if multiplied else rest).append(p)
    return matrices, rest


def _with_matrices(
    groups: Sequence[ParameterGroup],
) -> tuple[list[ParameterGroup], list[tuple[nn.Parameter, nn.Parameter]]]:
    """The same groups with a matrix in place of every kernel, and each kernel with its matrix."""
    kernels: list[nn.Parameter] = [p for group in groups for p in group["params"] if p.ndim == 4]
    matrices = {id(kernel): _as_matrix(kernel) for kernel in kernels}
    viewed = [{**group, "params": [matrices.get(id(p), p) for p in group["params"]]} for group in groups]
    return viewed, [(kernel, matrices[id(kernel)]) for kernel in kernels]


def _as_matrix(kernel: nn.Parameter) -> nn.Parameter:
    """A kernel [O, I, k, k] as the matrix [O, I * k * k] over the same storage."""
    return nn.Parameter(_in_storage_order(kernel.detach(), kernel).view(len(kernel), -1))


def _in_storage_order(tensor: Tensor, kernel: Tensor) -> Tensor:
    """A tensor shaped like `kernel` [O, I, k, k], dimensions in the kernel's memory order."""
    return tensor if kernel.is_contiguous() else tensor.permute(0, 2, 3, 1)
