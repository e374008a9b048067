"""Several optimizers of torch as one, and bitsandbytes' AdamW with eight-bit moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from latentgen.errors import ConfigError

# "params": a list of parameters, "lr": their learning rate at the top of the schedule.
ParameterGroup = dict[str, Any]


class ChainedOptimizer(torch.optim.Optimizer):
    """Several optimizers as one, with the groups of all of them in order; each steps at the rates of its groups.

    An optimizer may hold views in place of the parameters, one for each, in the same order.
    """

    def __init__(self, groups: Sequence[ParameterGroup], parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([{"params": group["params"], "lr": group["lr"]} for group in groups], {})
        self._parts = parts

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply the gradients at the learning rate of each group."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._apply_gradients()
        return loss

    def _apply_gradients(self) -> None:
        for part, groups, _ in self._with_groups():
            step_at_rates(part, groups)

    def state_dict(self) -> dict[str, Any]:
        """The states of all, parameters numbered in the order of the groups."""
        state: dict[int, Any] = {}
        for part, _, offset in self._with_groups():
            state |= {index + offset: values for index, values in part.state_dict()["state"].items()}
        return {"state": state, "param_groups": super().state_dict()["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of `state_dict`; hyperparameters stay as they are."""
        state: Mapping[int, Any] = state_dict["state"]
        for part, groups, offset in self._with_groups():
            count = sum(len(group["params"]) for group in groups)
            own = {index: state[index + offset] for index in range(count) if index + offset in state}
            part.load_state_dict({"state": own, "param_groups": part.state_dict()["param_groups"]})

    def _with_groups(self) -> Iterator[tuple[torch.optim.Optimizer, list[ParameterGroup], int]]:
        """Each optimizer, its groups in this one, and the number of its first parameter."""
        rest, offset = iter(self.param_groups), 0
        for part in self._parts:
            groups = list(islice(rest, len(part.param_groups)))
            yield part, groups, offset
            offset += sum(len(group["params"]) for group in groups)


def step_at_rates(part: torch.optim.Optimizer, groups: Sequence[ParameterGroup]) -> None:
    """Let an optimizer step at the learning rates of `groups`."""
    for own, group in zip(part.param_groups, groups, strict=True):
        own["lr"] = group["lr"]
    part.step()


class AdamW8bit(ChainedOptimizer):
    """AdamW whose moments take eight bits an element (arXiv:2110.02861), by bitsandbytes.

    Its state is that of bitsandbytes without the quantization maps, which are the same for all parameters.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """

    def __init__(
        self, groups: Sequence[ParameterGroup], *, betas: tuple[float, float], weight_decay: float
    ) -> None:
        self._inner: Any = import_bitsandbytes_adamw()(groups, betas=betas, weight_decay=weight_decay)
        super().__init__(groups, [self._inner])

    def state_dict(self) -> dict[str, Any]:
        """The moments, their scales and the steps done."""
        # Not bitsandbytes' own method, which hides the quantized moments.
        state_dict = torch.optim.Optimizer.state_dict(self._inner)
        state = {
            index: {name: value for name, value in values.items() if name not in ("qmap1", "qmap2")}
            for index, values in state_dict["state"].items()
        }
        return {"state": state, "param_groups": torch.optim.Optimizer.state_dict(self)["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of `state_dict`; hyperparameters stay as they are."""
        maps = {"qmap1": self._inner.name2qmap["dynamic"], "qmap2": self._inner.name2qmap["udynamic"]}
        state = {
            index: {**values, "step": int(values["step"]), **(maps if "absmax1" in values else {})}
            for index, values in state_dict["state"].items()
        }
        groups = torch.optim.Optimizer.state_dict(self._inner)["param_groups"]
        self._inner.load_state_dict({"state": state, "param_groups": groups})


def import_bitsandbytes_adamw() -> Any:
    """bitsandbytes' AdamW with eight-bit moments; ConfigError if it cannot be imported."""
    try:
        from bitsandbytes.optim import AdamW8bit as Inner  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f"optimizer.name adamw8bit needs bitsandbytes: {error}") from None
    return Inner
