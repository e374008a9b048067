"""DeepSpeed's ZeRO (arXiv:1910.02054), stages 1 and 2: AdamW's state, and the gradients, are spread over the processes.

The weights stay whole in all of them. DeepSpeed copies them into one flat tensor, whose parts the processes update, one
each; it takes the step within the backward pass, after it has clipped. Accelerate's configuration asks for it, and what
that says beside the recipe is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, is_deepspeed_available
from torch import Tensor, distributed, nn

from latentgen.errors import ConfigError, NumericalError
from latentgen.train.config import TrainConfig
from latentgen.train.run_log import AFTER_NAN

# In numbers: 200 MB, twice that with overlap_comm. DeepSpeed's own default is ten times as much.
_BUCKET = 50_000_000
_OFFLOADS = ("offload_optimizer", "offload_param")
_MOMENTS = ("exp_avg", "exp_avg_sq")
# What a DeepSpeed configuration may say beside what the recipe decides.
_SECTIONS = {
    "zero_optimization",
    "bf16",
    "fp16",
    "communication_data_type",
    "steps_per_print",
    "wall_clock_breakdown",
}
_ZERO = {
    "stage",
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "offload_optimizer",
    "offload_param",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "stage3_gather_16bit_weights_on_model_save",  # Accelerate's, in all stages
}


def check_installed() -> None:
    """Refuse a run for which Accelerate is to use DeepSpeed where it is not installed.

    Raises:
        ConfigError: it is not.
    """
    asked = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if asked and not is_deepspeed_available():
        raise ConfigError(
            "Accelerate's configuration asks for DeepSpeed, which is not installed: run `DS_BUILD_OPS=0 pip install "
            "--no-build-isolation deepspeed`, or let `accelerate config` choose FSDP with fsdp_version 2"
        )


def check_zero(accelerator: Accelerator, config: TrainConfig) -> None:
    """Refuse what cannot be trained with DeepSpeed.

    Raises:
        ConfigError: the recipe does not go with it, or the DeepSpeed configuration with the recipe.
    """
    if distributed.is_initialized() and distributed.get_world_size() != accelerator.num_processes:
        raise ConfigError(
            "Accelerate uses DeepSpeed on accelerators alone, and there is none here; launch with --cpu"
        )
    plugin = _plugin(accelerator)
    stage = plugin.get_value("zero_optimization.stage")
    if stage not in (1, 2):
        raise ConfigError(
            f"DeepSpeed's zero_stage is {stage}, and 1 and 2 are supported; to spread the weights as well, let "
            "`accelerate config` choose FSDP with fsdp_version 2"
        )
    offloads = {name: plugin.get_value(f"zero_optimization.{name}.device", "none") for name in _OFFLOADS}
    refused = {
        f"optimizer.name {config.optimizer.name} (adamw does)": config.optimizer.name != "adamw",
        "optimizer.step_in_backward": config.optimizer.step_in_backward,
        "memory.offload_optimizer": config.memory.offload_optimizer,
        "optimizer.text_encoder_learning_rate": config.optimizer.text_encoder_learning_rate is not None,
        "compile": config.compile,
        "mixed_precision fp16 (bf16 does)": config.mixed_precision == "fp16",
        **{f"{name}_device {device}": device not in (None, "none") for name, device in offloads.items()},
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise ConfigError(f"{what} does not go with DeepSpeed; change it or train without DeepSpeed")
    _check_configuration(plugin, accelerator, config)


def _check_configuration(plugin: DeepSpeedPlugin, accelerator: Accelerator, config: TrainConfig) -> None:
    decided = _decided(config, accelerator.num_processes)
    found: dict[str, Any] = plugin.deepspeed_config
    zero = {f"zero_optimization.{name}" for name in found["zero_optimization"].keys() - _ZERO}
    for name in sorted((found.keys() - _SECTIONS - decided.keys()) | zero):
        raise ConfigError(
            f"the DeepSpeed configuration has {name}, which is the recipe's or not supported; remove it"
        )
    for name, value in decided.items():
        # Accelerate says one accumulated part where nothing is said.
        unsaid = (None, "auto", 1) if name == "gradient_accumulation_steps" else (None, "auto")
        if found.get(name) not in (*unsaid, value):
            raise ConfigError(
                f"the DeepSpeed configuration says {name} {found[name]}, and the recipe {value}; write auto there"
            )
    if accelerator.mixed_precision not in ("no", config.mixed_precision):
        raise ConfigError(
            f"the DeepSpeed configuration enables {accelerator.mixed_precision}, and the recipe says mixed_precision "
            f"{config.mixed_precision}; remove it there"
        )


def _decided(config: TrainConfig, processes: int) -> dict[str, int | float]:
    """What the recipe says of what a DeepSpeed configuration may say, too."""
    parts = config.gradient_accumulation_steps
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // (parts * processes),
        "gradient_accumulation_steps": parts,
        "gradient_clipping": config.optimizer.max_grad_norm or 0.0,
    }


def _plugin(accelerator: Accelerator) -> DeepSpeedPlugin:
    plugin = accelerator.deepspeed_plugin
    assert plugin is not None, "the run does not use DeepSpeed"
    return plugin


def prepared_for_zero(
    accelerator: Accelerator,
    config: TrainConfig,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Callable[[], AbstractContextManager[Any]],
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """What to call in the place of a module that is trained, and of its AdamW.

    Args:
        accelerator: of this process.
        config: a recipe that `check_zero` let pass.
        module: its trained parameters come to lie in a flat tensor of DeepSpeed's, in the contiguous format.
        optimizer: over these parameters; it belongs to DeepSpeed from now on.
        precision: that of the networks.
    """
    parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        # DeepSpeed sends them as bytes first, which are not defined for channels_last.
        p.data = p.data.clone(memory_format=torch.contiguous_format)
    settings = _plugin(accelerator).deepspeed_config
    settings.update(_decided(config, accelerator.num_processes))
    # It would cast the weights themselves; they stay float32, and the networks are computed in `precision`.
    settings.update(bf16={"enabled": False}, fp16={"enabled": False})
    if settings["zero_optimization"].get("reduce_bucket_size", "auto") == "auto":
        settings["zero_optimization"]["reduce_bucket_size"] = _BUCKET
    engine, outer = accelerator.prepare(_Learner(module, parameters, precision), optimizer)
    return engine, PartitionedAdamW(parameters, optimizer, outer, keep=accelerator.is_main_process)


class _Learner(nn.Module):
    """A module of which DeepSpeed sees the trained parameters alone: it would send the frozen ones around as well,
    which all processes have, and have stored in any dtype and memory format."""

    def __init__(
        self,
        inner: nn.Module,
        parameters: list[nn.Parameter],
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters)
        self._hidden = [inner]
        self._precision = precision

    def forward(self, *inputs: Tensor) -> object:
        """As the inner module's."""
        with self._precision():
            return self._hidden[0](*inputs)

    def train(self, mode: bool = True) -> _Learner:
        """Set the mode of the inner module."""
        self._hidden[0].train(mode)
        return super().train(mode)


class PartitionedAdamW(torch.optim.Optimizer):
    """An AdamW of which each process has the part that DeepSpeed gave it; its state goes in and out as whole tensors.

    DeepSpeed steps within the backward pass; `step` itself has nothing left to do.

    Args:
        parameters: whole, in the order in which the optimiser had them.
        inner: the optimiser that DeepSpeed has, over this process's part of them laid end to end.
        outer: what Accelerate has made of it.
        keep: whether `state_dict` is wanted in this process.
    """

    def __init__(
        self, parameters: list[nn.Parameter], inner: torch.optim.Optimizer, outer: Any, *, keep: bool
    ) -> None:
        super().__init__(parameters, {"lr": inner.param_groups[0]["lr"]})
        self._inner = inner
        self._outer = outer
        self._keep = keep
        inner.register_step_pre_hook(self._hand_over_rate)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Look whether DeepSpeed has taken the step.

        Raises:
            NumericalError: it has not, as the gradient is not finite.
        """
        if self._outer.step_was_skipped:
            raise NumericalError(f"the gradient is not finite; {AFTER_NAN}")
        return None if closure is None else torch.enable_grad()(closure)()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: DeepSpeed drops gradients when it has used them."""

    def state_dict(self) -> dict[str, Any]:
        """The moments, whole and on the CPU, and the steps done; all processes must call, of which some keep it."""
        state: dict[int, dict[str, Tensor]] = {}
        for name in _MOMENTS if self._state else ():
            with self._in_place_of_weights(self._state[name]):
                for index, p in enumerate(self._parameters):
                    whole = _gathered(p)
                    if self._keep:
                        state.setdefault(index, {"step": self._state["step"]})[name] = whole.cpu()
        return {"state": state, "param_groups": super().state_dict()["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` gave, the same in all processes; hyperparameters stay as they are.

        The weights are taken anew from the parameters, too.
        """
        state: dict[int, dict[str, Tensor]] = state_dict["state"]
        steps = [values["step"] for values in state.values()]
        if steps:
            moments = {name: torch.zeros_like(self._part) for name in _MOMENTS}
            for name, moment in moments.items():
                with self._in_place_of_weights(moment):
                    for index, values in state.items():
                        _spread(self._parameters[index], values[name])
            groups = self._inner.state_dict()["param_groups"]
            own = {0: {"step": max(steps), **moments}}
            self._inner.load_state_dict({"state": own, "param_groups": groups})
        for p in self._parameters:
            _spread(p, p.detach())

    def _hand_over_rate(self, inner: torch.optim.Optimizer, *_: object) -> None:
        for group in inner.param_groups:
            group["lr"] = self.param_groups[0]["lr"]

    @contextmanager
    def _in_place_of_weights(self, moment: Tensor) -> Iterator[None]:
        """Inside the block a moment, which has their layout, lies in the place of this process's part of the weights.

        DeepSpeed gathers and spreads moments themselves as well (`safe_get_full_optimizer_state`), but only after its
        first step; weights at any time.
        """
        weights = self._part.detach().clone()
        with torch.no_grad():
            self._part.copy_(moment)
            yield
            moment.copy_(self._part)
            self._part.copy_(weights)

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return self.param_groups[0]["params"]

    @property
    def _part(self) -> Tensor:
        """This process's part of the weights."""
        return self._inner.param_groups[0]["params"][0]

    @property
    def _state(self) -> dict[str, Tensor]:
        return self._inner.state.get(self._part, {})


def _gathered(parameter: nn.Parameter) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param  # pyright: ignore[reportMissingImports]

    whole: Any = safe_get_full_fp32_param(parameter)
    return whole


def _spread(parameter: nn.Parameter, whole: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param  # pyright: ignore[reportMissingImports]

    safe_set_full_fp32_param(parameter, whole)
