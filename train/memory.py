"""The memory that a training step needs on its device, estimated before the first step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentgen.errors import ConfigError, MemoryBudgetError
from latentgen.models.activation_checkpointing import Checkpointing, keeps
from latentgen.models.quantized_weights import quantize_frozen
from latentgen.train.config import FinetuneTask, TrainConfig
from latentgen.train.data import plan_step
from latentgen.train.host_memory import available_bytes
from latentgen.train.networks import checkpoint_gradients, checkpointed_layers
from latentgen.train.objectives.base import Objective
from latentgen.train.optimizer import state_bytes

# Suggestions that save a smaller fraction of the total are left out.
_MIN_SAVING = 0.02
# The batch's shapes are estimated from this many samples, as captions may need different numbers of windows.
_MAX_SAMPLES = 8


Activations = Mapping[Checkpointing, int]
"""Bytes that the forward pass saves for the backward pass, by the kind of gradient checkpointing: with checkpointing,
what is saved between the layers plus what the largest recomputed layer saves."""


class MemoryPlan(NamedTuple):
    """Bytes of tensors that one process holds on its device at the peak of a step.

    They do not include scratch memory of kernels and fragmentation of the allocator.

    Attributes:
        frozen: weights that are not trained.
        trained: trained weights.
        gradients: all of them; with step_in_backward the largest; with offloading twice that, as one is loaded back.
        optimizer: the optimizer's state.
        average: the moving average, if it is on the device.
        activations: for the backward pass; None if they cannot be estimated.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    average: int
    activations: int | None

    @property
    def total(self) -> int:
        """The sum of all known parts."""
        return sum(part for part in self if part is not None)


def check_memory(config: TrainConfig, accelerator: Accelerator, objective: Objective) -> None:
    """Check the recipe's `memory` section against an objective on the CPU, before any image is encoded.

    Whether a step fits is checked here, or by `apply_memory_options` if the base is stored in fewer bits.

    Raises:
        ConfigError: the objective does not support an option.
        MemoryBudgetError: a step does not fit on the device, with the numbers and possible savings; or what is
            offloaded does not fit into the host's memory.
    """
    if config.memory.base_dtype != "fp32":
        if not _trains_adapter(config):
            raise ConfigError(f"memory.base_dtype {config.memory.base_dtype} is for adapters only; remove it")
    elif config.memory.planner:
        _check_step_fits(config, accelerator, objective)
    if config.memory.offload_optimizer:
        copies = (2 if config.optimizer.name == "adamw" else 0) + (not config.optimizer.step_in_backward)
        size = copies * sum(p.nbytes for p in objective.parameters() if p.requires_grad)
        if (free := available_bytes(torch.device("cpu"))) < size:
            raise MemoryBudgetError(
                f"memory.offload_optimizer needs {size / 1e9:.3g} of {free / 1e9:.3g} GB free on the host; remove it"
            )


def apply_memory_options(config: TrainConfig, accelerator: Accelerator, objective: Objective) -> None:
    """Apply the recipe's `memory` section to an objective on the CPU that has passed `check_memory`.

    Raises:
        ConfigError: the objective does not support an option.
        MemoryBudgetError: a step does not fit on the device, with the numbers and possible savings.
    """
    if config.memory.base_dtype != "fp32":
        for network in objective.children():
            quantize_frozen(network, config.memory.base_dtype)
        if config.memory.planner:
            _check_step_fits(config, accelerator, objective)
    if config.memory.gradient_checkpointing:
        checkpoint_gradients(objective, config.memory.gradient_checkpointing)


def _check_step_fits(config: TrainConfig, accelerator: Accelerator, objective: Objective) -> None:
    device = accelerator.device
    batch = batch_shapes(config, accelerator, objective)
    activations = estimate_activations(objective, batch, device, accelerator.autocast())

    def plan_of(recipe: TrainConfig) -> MemoryPlan:
        return plan_memory(recipe, objective, activations, device, accelerator.num_processes)

    plan, free = plan_of(config), available_bytes(device)
    if device.type == "cpu":
        free += plan.frozen + plan.trained  # the weights are already there
    parts = ", ".join(
        f"{name} {'not estimated' if size is None else _size(size)}" for name, size in plan._asdict().items()
    )
    if accelerator.is_main_process:
        print(
            f"memory on {device}, estimated: {_size(plan.total)} of {_size(free)} ({parts})", file=sys.stderr
        )
    if plan.total > free:
        savings = sorted(_savings(config, objective, plan_of, device).items(), key=lambda item: -item[1])
        advice = "; ".join(
            f"{change} saves {_size(saved)}" for change, saved in savings if saved > _MIN_SAVING * plan.total
        )
        raise MemoryBudgetError(
            f"a step of this recipe needs about {_size(plan.total)} ({parts}), and {_size(free)} are free: "
            f"{advice or 'lower batch_size or data.image_size'}. memory.planner=false skips this check"
        )


def batch_shapes(config: TrainConfig, accelerator: Accelerator, objective: Objective) -> tuple[Tensor, ...]:
    """The batch of the first forward pass of this process as tensors on the meta device.

    Only a few of its samples are made, because the whole batch may not fit.
    """
    plan = plan_step(
        config.seed,
        0,
        batch_size=config.batch_size,
        order=objective.order,
        parts=config.gradient_accumulation_steps,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )[0]
    few = replace(plan, samples=plan.samples[:_MAX_SAMPLES], items=plan.items[:_MAX_SAMPLES])
    batch, count = objective.batch(few), len(plan.samples)
    return tuple(torch.empty((count, *t.shape[1:]), dtype=t.dtype, device="meta") for t in batch)


def plan_memory(
    config: TrainConfig,
    objective: Objective,
    activations: Activations | None,
    device: torch.device,
    processes: int = 1,
) -> MemoryPlan:
    """The memory of a step of a recipe on a device; the objective may be on another one.

    With several `processes`, each has a second copy of the gradients to exchange.
    """
    trained = [p.nbytes for p in objective.parameters() if p.requires_grad]
    frozen = [t.nbytes for t in (*objective.parameters(), *objective.buffers()) if not t.requires_grad]
    gradients = sum(trained)
    if config.takes_gradients is not None and not config.compile:  # a compiled network returns all at once
        gradients = max(trained, default=0) * (1 if config.optimizer.step_in_backward else 2)
    average_on_device = config.ema_decay > 0 and config.memory.ema_device in ("same", device.type)
    return MemoryPlan(
        frozen=sum(frozen),
        trained=sum(trained),
        gradients=gradients * (2 if processes > 1 else 1),
        optimizer=state_bytes(objective, config.optimizer, offloaded=config.memory.offload_optimizer),
        average=sum(trained) if average_on_device else 0,
        activations=None if activations is None else activations[config.memory.gradient_checkpointing],
    )


def estimate_activations(
    objective: Objective,
    batch: Iterable[Tensor],
    device: torch.device,
    autocast: AbstractContextManager[None],
) -> Activations | None:
    """Run the forward pass on fake tensors, and count what it saves for the backward pass.

    Nothing is computed or allocated. None if the pass depends on the values of a tensor.
    """
    saved = _SavedTensors()
    hooks = [hook for layer in checkpointed_layers(objective) for hook in saved.watch(layer)]
    objective.train()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            weights = {
                name: torch.empty_strided(
                    t.size(), t.stride(), dtype=t.dtype, device=device, requires_grad=t.requires_grad
                )
                for name, t in (*objective.named_parameters(), *objective.named_buffers())
            }
            inputs = tuple(torch.empty(t.shape, dtype=t.dtype, device=device) for t in batch)
            saved.ignored = set(map(_storage, weights.values()))
            hooked = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor)
            with autocast, hooked, saved:
                functional_call(objective, weights, inputs)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException):
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return saved.activations()


class _SavedTensors(TorchDispatchMode):
    """Counts the memory of the tensors that a forward pass saves, each once, by the layer that saves it.

    As a dispatch mode it sees the results of all operators, some of which "selective" checkpointing saves.

    Attributes:
        ignored: the storages that are counted elsewhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ignored: set[int] = set()
        # By storage, whose addresses are unique as long as the tensors are held.
        self._tensors: dict[int, Tensor] = {}
        self._saved: set[int] = set()
        self._between_layers: set[int] = set()
        self._layers: list[set[int]] = []
        self._kept_products: set[int] = set()
        self._in_layer = False

    def watch(self, layer: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Count what a layer saves separately: it would be recomputed, while the layer's inputs stay saved."""

        def enter(_: nn.Module, args: object, kwargs: object) -> None:
            self._add(tree_leaves((args, kwargs)), self._between_layers)
            self._layers.append(set())
            self._in_layer = True

        def leave(*_: object) -> None:
            self._in_layer = False

        return [layer.register_forward_pre_hook(enter, with_kwargs=True), layer.register_forward_hook(leave)]

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves."""
        self._add([tensor], self._saved)
        self._add([tensor], self._layers[-1] if self._in_layer else self._between_layers)
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if self._in_layer and keeps(func, *args):
            self._add(tree_leaves(result), self._kept_products)
        return result

    def activations(self) -> Activations:
        """The saved bytes, for each kind of gradient checkpointing."""
        return {
            False: self._bytes(self._saved),
            "selective": self._with_recomputed_layer(self._between_layers | self._kept_products),
            True: self._with_recomputed_layer(self._between_layers),
        }

    def _with_recomputed_layer(self, saved: set[int]) -> int:
        return self._bytes(saved) + max((self._bytes(layer - saved) for layer in self._layers), default=0)

    def _add(self, values: Iterable[object], to: set[int]) -> None:
        for tensor in values:
            if isinstance(tensor, Tensor) and (storage := _storage(tensor)) not in self.ignored:
                self._tensors.setdefault(storage, tensor)
                to.add(storage)

    def _bytes(self, storages: Iterable[int]) -> int:
        return sum(self._tensors[storage].untyped_storage().nbytes() for storage in storages)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _savings(
    config: TrainConfig,
    objective: Objective,
    plan_of: Callable[[TrainConfig], MemoryPlan],
    device: torch.device,
) -> dict[str, int]:
    """Bytes that each change of the recipe would save, by the field to set."""
    one_by_one = "adamw or adafactor, one process"
    changes: dict[str, tuple[str, dict[str, object]]] = {
        "optimizer.name=adafactor": ("optimizer", {"name": "adafactor"}),
        "optimizer.name=adamw8bit": ("optimizer", {"name": "adamw8bit"}),
        "memory.ema_device=cpu": ("memory", {"ema_device": "cpu"}),
        "memory.gradient_checkpointing=selective": ("memory", {"gradient_checkpointing": "selective"}),
        "memory.gradient_checkpointing=true": ("memory", {"gradient_checkpointing": True}),
    }
    if config.mixed_precision != "fp16" and config.gradient_accumulation_steps == 1:
        change = f"optimizer.step_in_backward=true ({one_by_one}, max_grad_norm=null)"
        changes[change] = ("optimizer", {"step_in_backward": True})
    if config.mixed_precision != "fp16" and device.type == "cuda":
        changes[f"memory.offload_optimizer=true ({one_by_one})"] = ("memory", {"offload_optimizer": True})
    plan, sections = plan_of(config), {"optimizer": config.optimizer, "memory": config.memory}
    savings = {}
    for change, (name, fields) in changes.items():
        changed = config.model_copy(update={name: sections[name].model_copy(update=fields)})
        savings[change] = plan.total - plan_of(changed).total
    if _trains_adapter(config) and config.memory.base_dtype == "fp32":
        savings["memory.base_dtype=int8"] = plan.frozen * 3 // 4
    parts = 2 * config.gradient_accumulation_steps
    if config.batch_size % parts == 0 and not config.optimizer.step_in_backward:
        savings[f"gradient_accumulation_steps={parts}"] = (plan.activations or 0) // 2
    return savings


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _trains_adapter(config: TrainConfig) -> bool:
    return isinstance(config.task, FinetuneTask) and config.task.method.kind != "full"
