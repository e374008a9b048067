"""Optimisers of one parameter each, for which gradients and moments need not lie on the device together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from latentgen.train.joined_optimizer import Group, JoinedOptimizer, as_torch_has_them, step_with
from latentgen.train.offload import TensorStore


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW of one parameter, whose moments are on its device while it steps.

    Args:
        group: the parameter.
        place: its number in the stores.
        moments: where they are between the steps, by their names in AdamW's state.
        betas, weight_decay: AdamW's.
    """

    def __init__(
        self,
        group: Group,
        place: int,
        moments: Mapping[str, TensorStore],
        *,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        super().__init__(as_torch_has_them([group]), betas=betas, weight_decay=weight_decay, fused=True)
        (self._parameter,) = group.parameters
        self._place, self._moments = place, moments

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply the gradient."""
        state = self.state[self._parameter]
        if state:
            state.update({name: store.fetch(self._place) for name, store in self._moments.items()})
        loss = super().step(closure)
        self._send_away()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, with the moments where they are."""
        state_dict = super().state_dict()
        for index, state in state_dict["state"].items():
            if state:
                away = {name: store.look(self._place) for name, store in self._moments.items()}
                state_dict["state"][index] = {**state, **away}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """AdamW's; the moments are sent away."""
        super().load_state_dict(state_dict)
        self._send_away()

    def _send_away(self) -> None:
        state = self.state.get(self._parameter, {})
        for name, store in self._moments.items():
            if name in state:
                store.send(self._place, state.pop(name))


class StepInBackward(JoinedOptimizer):
    """Optimisers of one parameter each, which step within the backward pass and drop the gradient (arXiv:2306.09782).

    `step` itself has nothing left to do.
    """

    def __init__(self, groups: Sequence[Group], parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__(groups, parts)
        for part, own, _ in self._places():
            (parameter,) = own[0]["params"]
            parameter.register_post_accumulate_grad_hook(partial(_step_and_drop, part, own))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Do nothing but call `closure`, whose backward pass takes the step."""
        return None if closure is None else torch.enable_grad()(closure)()


def _step_and_drop(
    part: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]], parameter: Tensor
) -> None:
    step_with(part, groups)
    parameter.grad = None


class OffloadedGradients(JoinedOptimizer):
    """Optimisers of one parameter each, whose gradients leave the device within the backward pass.

    They come back one by one when `step` is called, so that they can be accumulated, and clipped by the norm of all,
    as gradients that stay: to the bit what these give.
    """

    def __init__(
        self, groups: Sequence[Group], parts: Sequence[torch.optim.Optimizer], store: TensorStore
    ) -> None:
        super().__init__(groups, parts)
        self._store = store
        self._device = groups[0].parameters[0].device
        # Of the gradients that are away, by the number of their parameter.
        self._norms: dict[int, Tensor] = {}
        self._clip: Callable[[Tensor], None] = _leave_as_it_is
        for place, (_, own, _) in enumerate(self._places()):
            (parameter,) = own[0]["params"]
            parameter.register_post_accumulate_grad_hook(partial(self._send_away, place))

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Let `step` scale the gradients, if their norm is higher than `max_norm`.

        Returns:
            [] their norm now, on their device.
        """
        norms = [self._norms[place] for place in sorted(self._norms)]
        norm = get_total_norm(norms) if norms else torch.zeros((), device=self._device)
        self._clip = partial(clip_grads_with_norm_, max_norm=max_norm, total_norm=norm)
        return norm

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply the gradients at the learning rate of each group; none are left."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for place, (part, own, _) in enumerate(self._places()):
            if place in self._norms:
                (parameter,) = own[0]["params"]
                parameter.grad = self._store.fetch(place)
                self._clip(parameter)
                step_with(part, own)
                parameter.grad = None
        self.zero_grad()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, those that are away and those that are not."""
        super().zero_grad(set_to_none)
        self._norms.clear()
        self._clip = _leave_as_it_is

    def _send_away(self, place: int, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None  # it is why this was called
        if place in self._norms:
            gradient += self._store.fetch(place)
        self._norms[place] = get_total_norm([gradient])
        self._store.send(place, gradient)
        parameter.grad = None


def _leave_as_it_is(parameter: Tensor) -> None:
    """What is done to a gradient where none are clipped."""
