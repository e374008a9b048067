"""Optimizers that handle one parameter at a time, so that gradients and moments need not be on the device together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from latentgen.train.optimizer.chained import ChainedOptimizer, ParameterGroup, step_at_rates


class HostTensor:
    """A buffer in host memory for a tensor of a parameter's shape, dtype and memory format.

    For a CUDA parameter it is pinned, and copies both ways are asynchronous, in the order of the current stream.
    """

    def __init__(self, parameter: Tensor) -> None:
        self._device = parameter.device
        self._buffer = torch.empty_like(
            parameter, device="cpu", requires_grad=False, pin_memory=parameter.is_cuda
        )

    def store(self, tensor: Tensor) -> Tensor:
        """Copy a tensor into the buffer, which is returned; synchronize before reading it on the host."""
        return self._buffer.copy_(tensor, non_blocking=tensor.is_cuda)

    def load(self) -> Tensor:
        """A copy of the buffer on the parameter's device."""
        return self._buffer.to(self._device, non_blocking=self._buffer.is_pinned(), copy=True)


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW of one parameter, whose moments are in host memory except during its own step."""

    def __init__(self, group: ParameterGroup, *, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__([group], betas=betas, weight_decay=weight_decay, fused=True)
        (self._parameter,) = group["params"]
        self._host = {name: HostTensor(self._parameter) for name in ("exp_avg", "exp_avg_sq")}

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply the gradient."""
        state = self.state[self._parameter]
        state.update({name: host.load() for name, host in self._host.items() if name in state})
        loss = super().step(closure)
        self._move_to_host()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, with the moments in host memory."""
        if self._parameter.is_cuda:
            torch.cuda.synchronize(self._parameter.device)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore AdamW's state; the moments move to host memory."""
        super().load_state_dict(state_dict)
        self._move_to_host()

    def _move_to_host(self) -> None:
        state = self.state[self._parameter]
        state.update({name: host.store(state[name]) for name, host in self._host.items() if name in state})


class StepInBackward(ChainedOptimizer):
    """Optimizers of one parameter each, which step within the backward pass and drop the gradient (arXiv:2306.09782).

    `step` itself has nothing left to do.
    """

    def __init__(self, groups: Sequence[ParameterGroup], parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__(groups, parts)
        for part, (group,), _ in self._with_groups():
            (parameter,) = group["params"]
            parameter.register_post_accumulate_grad_hook(partial(_step_and_drop, part, group))

    def _apply_gradients(self) -> None:
        pass


def _step_and_drop(part: torch.optim.Optimizer, group: ParameterGroup, parameter: Tensor) -> None:
    step_at_rates(part, [group])
    parameter.grad = None


class OffloadedGradients(ChainedOptimizer):
    """Optimizers of one parameter each, whose gradients move to host memory within the backward pass.

    `step` loads them one by one. They can be accumulated and clipped by their global norm, with results equal to the
    bit to those of gradients that stay on the device.
    """

    def __init__(self, groups: Sequence[ParameterGroup], parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__(groups, parts)
        self._parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self._host: dict[Tensor, HostTensor] = {p: HostTensor(p) for p in self._parameters}
        self._norms: dict[Tensor, Tensor] = {}  # of the gradients in host memory, by parameter
        self._clip: Callable[[Tensor], None] | None = None
        for p in self._parameters:
            p.register_post_accumulate_grad_hook(self._move_to_host)

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Let `step` scale the gradients down to `max_norm` if their global norm is higher.

        Returns:
            Their norm before clipping, a scalar on their device.
        """
        norms = [self._norms[p] for p in self._parameters if p in self._norms]
        norm = get_total_norm(norms) if norms else torch.zeros((), device=self._parameters[0].device)
        self._clip = partial(clip_grads_with_norm_, max_norm=max_norm, total_norm=norm)
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, in host memory and on the device."""
        super().zero_grad(set_to_none)
        self._norms.clear()
        self._clip = None

    def _apply_gradients(self) -> None:
        for part, (group,), _ in self._with_groups():
            (parameter,) = group["params"]
            if parameter in self._norms:
                parameter.grad = self._host[parameter].load()
                if self._clip is not None:
                    self._clip(parameter)
                step_at_rates(part, [group])
                parameter.grad = None
        self.zero_grad()

    def _move_to_host(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None  # this hook runs after it was accumulated
        if parameter in self._norms:
            gradient += self._host[parameter].load()
        self._norms[parameter] = get_total_norm([gradient])
        self._host[parameter].store(gradient)
        parameter.grad = None
