"""Several optimisers of torch as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn


class Group(NamedTuple):
    """Parameters that share a learning rate: its highest, before the schedule."""

    parameters: list[nn.Parameter]
    learning_rate: float


def as_torch_has_them(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """Groups as an optimiser of torch takes them."""
    return [{"params": group.parameters, "lr": group.learning_rate} for group in groups]


class JoinedOptimizer(torch.optim.Optimizer):
    """Several optimisers as one: its groups are theirs, one after the other, with learning rates that they take over.

    A subclass may let an optimiser work on views of its parameters, one for one.
    """

    def __init__(self, groups: Sequence[Group], parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__(as_torch_has_them(groups), {})
        self._parts = parts

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply the gradients at the learning rate of each group."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part, groups, _ in self._places():
            step_with(part, groups)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of all, parameters numbered in the order of the groups."""
        state: dict[int, Any] = {}
        for part, _, offset in self._places():
            state |= {index + offset: values for index, values in part.state_dict()["state"].items()}
        return {"state": state, "param_groups": super().state_dict()["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` gave; hyperparameters stay as they are."""
        state: Mapping[int, Any] = state_dict["state"]
        for part, groups, offset in self._places():
            count = sum(len(group["params"]) for group in groups)
            own = {index: state[index + offset] for index in range(count) if index + offset in state}
            part.load_state_dict({"state": own, "param_groups": part.state_dict()["param_groups"]})

    def _places(self) -> Iterator[tuple[torch.optim.Optimizer, list[dict[str, Any]], int]]:
        """Each optimiser, its groups as they are here, and the number of its first parameter."""
        rest, offset = iter(self.param_groups), 0
        for part in self._parts:
            groups = list(islice(rest, len(part.param_groups)))
            yield part, groups, offset
            offset += sum(len(group["params"]) for group in groups)


def step_with(part: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Let an optimiser step at the learning rates of `groups`."""
    for own, group in zip(part.param_groups, groups, strict=True):
        own["lr"] = group["lr"]
    part.step()
