"""What a step of training needs to hold, estimated before the first, against what the device has."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
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

from latentgen.errors import MemoryBudgetError
from latentgen.models.activation_checkpointing import Checkpointing, keeps
from latentgen.train.config import TrainConfig
from latentgen.train.data import BatchIndices, plan_step
from latentgen.train.objectives.base import Objective
from latentgen.train.optimizer import state_bytes

_CGROUP = Path("/sys/fs/cgroup")
_LIBC: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
_MADV_PAGEOUT = 21  # from Linux' mman.h
# What a suggestion must save, as a share of the whole, to be worth a line.
_WORTH_IT = 0.02
# Samples whose shape stands for that of all: captions of one batch may need different numbers of windows.
_FEW = 8


class Activations(NamedTuple):
    """Bytes that the forward pass leaves for the backward pass: all of them, or with gradient checkpointing.

    Of the latter, both what lies between the layers and the most that one of them then computes once more.
    """

    kept: int
    selective: int
    checkpointed: int

    def left(self, how: Checkpointing) -> int:
        """What is left by that kind of checkpointing."""
        return self.selective if how == "selective" else self.checkpointed if how else self.kept


class MemoryPlan(NamedTuple):
    """Bytes of tensors that one process holds on its device when a step needs most.

    What kernels need as scratch, and what an allocator loses between tensors, come on top.

    Attributes:
        frozen: weights that are not trained.
        trained: those that are.
        gradients: all at once; where each is used up or sent away, the largest, and one more that comes back.
        optimizer: the optimiser's state.
        average: the moving average, if it lies there.
        activations: what the backward pass needs; None if it cannot be told.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    average: int
    activations: int | None

    @property
    def total(self) -> int:
        """All of it, as far as it is known."""
        return sum(part for part in self if part is not None)


def check_memory(config: TrainConfig, accelerator: Accelerator, objective: Objective) -> None:
    """Refuse what a recipe says about memory, as early as it can be told of an objective on the CPU.

    Whether a step fits is told now, or by `save_memory` of a base that is stored in fewer bits.

    Raises:
        ConfigError: the objective cannot do what the recipe says.
        MemoryBudgetError: a step does not fit, with the numbers and what would help.
    """
    if config.memory.base_dtype != "fp32":
        objective.check_base_storage(config.memory.base_dtype)
    elif config.memory.planner:
        _refuse_too_much(config, accelerator, objective)


def save_memory(config: TrainConfig, accelerator: Accelerator, objective: Objective) -> None:
    """Do what a recipe says about memory to an objective on the CPU, which `check_memory` has let through.

    Raises:
        ConfigError: the objective cannot do what the recipe says.
        MemoryBudgetError: a step does not fit, with the numbers and what would help.
    """
    if config.memory.base_dtype != "fp32":
        objective.store_base(config.memory.base_dtype)
        if config.memory.planner:
            _refuse_too_much(config, accelerator, objective)
    if config.memory.gradient_checkpointing:
        objective.checkpoint_gradients(config.memory.gradient_checkpointing)


def _refuse_too_much(config: TrainConfig, accelerator: Accelerator, objective: Objective) -> None:
    device = accelerator.device
    activations = estimate_activations(
        objective, batch_shapes(config, accelerator, objective), device, accelerator.autocast()
    )
    plan = plan_memory(config, objective, activations, device, accelerator.num_processes)
    room = available_bytes(device)
    # On the CPU the weights are there already.
    room += plan.frozen + plan.trained if device.type == "cpu" else 0
    if accelerator.is_main_process:
        print(_shown(plan, room, device), file=sys.stderr)
    if plan.total > room:
        raise MemoryBudgetError(_refusal(plan, room, config, objective, activations))


def batch_shapes(config: TrainConfig, accelerator: Accelerator, objective: Objective) -> tuple[Tensor, ...]:
    """What this process computes at once in the first step of a run, without content: tensors on the meta device.

    The batch may be what does not fit, so that a few of its samples alone are made.
    """
    plans: list[BatchIndices] = plan_step(
        config.seed,
        0,
        batch_size=config.batch_size,
        order=objective.order,
        parts=config.gradient_accumulation_steps,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    plan = plans[0]
    few = replace(plan, samples=plan.samples[:_FEW], items=plan.items[:_FEW])
    batch, count = objective.batch(few), len(plan.samples)
    return tuple(torch.empty((count, *t.shape[1:]), dtype=t.dtype, device="meta") for t in batch)


def plan_memory(
    config: TrainConfig,
    objective: Objective,
    activations: Activations | None,
    device: torch.device,
    processes: int = 1,
) -> MemoryPlan:
    """Put together what a step of a recipe holds on a device.

    Args:
        config: the recipe.
        objective: as it will be trained; where it lies now does not matter.
        activations: from `estimate_activations`.
        device: that of the training.
        processes: in all; more than one keep a second copy of the gradients to exchange.
    """
    trained = [p.nbytes for p in objective.parameters() if p.requires_grad]
    frozen = [t.nbytes for t in (*objective.parameters(), *objective.buffers()) if not t.requires_grad]
    gradients = _gradient_bytes(config, trained)
    averages_here = config.ema_decay > 0 and config.memory.ema_device in ("same", device.type)
    return MemoryPlan(
        frozen=sum(frozen),
        trained=sum(trained),
        gradients=gradients * (2 if processes > 1 else 1),
        optimizer=state_bytes(objective, config.optimizer, offloaded=config.memory.offload_optimizer),
        average=sum(trained) if averages_here else 0,
        activations=None if activations is None else activations.left(config.memory.gradient_checkpointing),
    )


def _gradient_bytes(config: TrainConfig, trained: Sequence[int]) -> int:
    # A compiled network gives all of them at once.
    if config.takes_gradients is None or config.compile:
        return sum(trained)
    largest = max(trained, default=0)
    return largest if config.optimizer.step_in_backward else 2 * largest


def estimate_activations(
    objective: Objective,
    batch: Iterable[Tensor],
    device: torch.device,
    autocast: AbstractContextManager[None],
) -> Activations | None:
    """Run the forward pass on tensors without content, and add up what it keeps for the backward pass.

    Nothing is computed and nothing allocated. With gradient checkpointing the inputs of the layers are kept, and the
    largest layer is computed once more at a time. None if the pass asks for the content of a tensor.
    """
    kept = _KeptTensors()
    handles = [hook for layer in objective.checkpointed_layers() for hook in kept.watch(layer)]
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
            kept.leave_out(weights.values())
            with (
                autocast,
                torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor),
                _Operators(kept.computed),
            ):
                functional_call(objective, weights, inputs)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException):
        return None
    finally:
        for handle in handles:
            handle.remove()
    return kept.activations()


class _KeptTensors:
    """Collects the memory of the tensors that a forward pass keeps, each once, by the layer that keeps it."""

    def __init__(self) -> None:
        # By the address of their memory, which is not given away as long as the tensors are held.
        self._tensors: dict[int, Tensor] = {}
        self._left_out: dict[int, Tensor] = {}
        self._kept: set[int] = set()
        self._outside: set[int] = set()
        self._layers: list[set[int]] = []
        self._products: set[int] = set()
        self._within = False

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """These are counted elsewhere."""
        self._left_out |= {_address(tensor): tensor for tensor in tensors}

    def watch(self, layer: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Tell apart what is kept within a layer, which would be computed once more; its inputs are kept outside."""

        def enter(_: nn.Module, args: object, kwargs: object) -> None:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    self._note(tensor, self._outside)
            self._layers.append(set())
            self._within = True

        def leave(*_: object) -> None:
            self._within = False

        return [
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.register_forward_hook(leave),
        ]

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd keeps."""
        self._note(tensor, self._kept)
        self._note(tensor, self._layers[-1] if self._within else self._outside)
        return tensor

    def computed(self, operator: object, arguments: Sequence[Any], result: object) -> None:
        """Count what "selective" checkpointing keeps of a layer."""
        if self._within and keeps(operator, *arguments):
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._note(tensor, self._products)

    def activations(self) -> Activations:
        """What was kept, and what would be with gradient checkpointing."""
        return Activations(
            self._bytes(self._kept),
            selective=self._left(self._outside | self._products),
            checkpointed=self._left(self._outside),
        )

    def _left(self, kept: set[int]) -> int:
        return self._bytes(kept) + max((self._bytes(layer - kept) for layer in self._layers), default=0)

    def _note(self, tensor: Tensor, where: set[int]) -> None:
        address = _address(tensor)
        if address not in self._left_out:
            self._tensors.setdefault(address, tensor)
            where.add(address)

    def _bytes(self, addresses: Iterable[int]) -> int:
        return sum(self._tensors[address].untyped_storage().nbytes() for address in addresses)


class _Operators(TorchDispatchMode):
    """Tells of each operator, its arguments and its result."""

    def __init__(self, tell: Callable[[object, Sequence[Any], object], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        self._tell(func, args, result)
        return result


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def available_bytes(device: torch.device) -> int:
    """Memory of a device that this process may still take; its share of the host's if several run there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = min(psutil.virtual_memory().available, _free_in_container())
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_in_container() -> int:
    """What the container leaves of its memory; the cache of files that it may drop counts as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return sys.maxsize
    return sys.maxsize if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))


def release_freed_memory() -> None:
    """Let the C library return freed memory to the system, where it can.

    Loading frees weights in their first dtype and layout, between those that stay.
    """
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


def page_out(module: nn.Module) -> None:
    """Return the memory pages of an idle network on the CPU to the system, where it can; they come back on use.

    Pages that were mapped from a file are read from it again, others from the swap space; they stay if there is none.
    """
    if not hasattr(_LIBC, "madvise"):
        return
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            first = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            size = storage.data_ptr() + storage.nbytes() - first
            if size > 0:
                _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_PAGEOUT)


def _shown(plan: MemoryPlan, room: int, device: torch.device) -> str:
    activations = "not estimated" if plan.activations is None else _size(plan.activations)
    return (
        f"memory on {device}, estimated: weights {_size(plan.trained)} trained and {_size(plan.frozen)} frozen, "
        f"gradients {_size(plan.gradients)}, optimizer {_size(plan.optimizer)}, average {_size(plan.average)}, "
        f"activations {activations}; {_size(plan.total)} in all of {_size(room)}"
    )


def _refusal(
    plan: MemoryPlan, room: int, config: TrainConfig, objective: Objective, activations: Activations | None
) -> str:
    savings = _savings(plan, config, objective, activations)
    helpful = sorted(savings.items(), key=lambda item: -item[1])
    advice = "; ".join(
        f"{flag} saves {_size(saved)}" for flag, saved in helpful if saved > _WORTH_IT * plan.total
    )
    parts = ", ".join(f"{name} {_size(size)}" for name, size in plan._asdict().items() if size)
    return (
        f"a step of this recipe needs about {_size(plan.total)} ({parts}), and there are {_size(room)}: "
        f"{advice or 'lower batch_size or data.image_size'}. memory.planner=false goes on all the same"
    )


def _savings(
    plan: MemoryPlan, config: TrainConfig, objective: Objective, activations: Activations | None
) -> dict[str, int]:
    """What each change of the recipe would save, by what has to be set."""
    savings: dict[str, int] = {}
    optimizer = config.optimizer
    for name in ("adafactor", "adamw8bit"):
        other = optimizer.model_copy(update={"name": name})
        savings[f"optimizer.name={name}"] = plan.optimizer - state_bytes(objective, other)
    if config.mixed_precision != "fp16":
        savings |= _savings_one_by_one(plan, config, objective)
    savings["memory.ema_device=cpu"] = plan.average
    if type(objective).store_base is not Objective.store_base and config.memory.base_dtype == "fp32":
        savings["memory.base_dtype=int8"] = plan.frozen * 3 // 4
    if activations is not None and plan.activations is not None:
        savings["memory.gradient_checkpointing=selective"] = plan.activations - activations.selective
        savings["memory.gradient_checkpointing=true"] = plan.activations - activations.checkpointed
        parts = 2 * config.gradient_accumulation_steps
        if config.batch_size % parts == 0 and not optimizer.step_in_backward:
            savings[f"gradient_accumulation_steps={parts}"] = plan.activations // 2
    return savings


def _savings_one_by_one(plan: MemoryPlan, config: TrainConfig, objective: Objective) -> dict[str, int]:
    """What would be saved if gradients, or gradients and moments, were on the device one at a time."""
    savings: dict[str, int] = {}
    if config.gradient_accumulation_steps == 1 and not config.optimizer.step_in_backward:
        field = "optimizer.step_in_backward"
        in_backward = config.optimizer.model_copy(update={"step_in_backward": True, "max_grad_norm": None})
        other = config.model_copy(update={"optimizer": in_backward})
        savings[f"{field}=true (adamw or adafactor, one process, max_grad_norm=null)"] = (
            plan.gradients - plan_memory(other, objective, None, torch.device("cpu")).gradients
        )
    if not config.memory.offload_optimizer:
        offloading = config.memory.model_copy(update={"offload_optimizer": True})
        other = plan_memory(
            config.model_copy(update={"memory": offloading}), objective, None, torch.device("cpu")
        )
        savings["memory.offload_optimizer=true (adamw or adafactor, one process)"] = (
            plan.gradients - other.gradients + plan.optimizer - other.optimizer
        )
    return savings


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
