"""LoRA adapters on the modules of a pipeline: attach several, change their weights, detach them, or merge one.

A component is a module under its name in the diffusers layout: "unet", "text_encoder" (the
`model` of a :class:`latentgen.models.text.CLIPText`), "text_encoder_2".

These functions change the modules in place, and so every pipeline that uses them. To leave the original unchanged, pass
a :func:`shared_copy`, which copies no weight. They are not thread-safe. Only :func:`merge` replaces weights;
attached adapters are not in a state_dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from latentgen.adapters.lora_files import LoRA, LoRALayer
from latentgen.adapters.lora_files import read_lora as read_lora
from latentgen.adapters.lora_layers import AdaptedLayer, LowRankBranch, branches, flat, layer_names
from latentgen.adapters.lora_layers import shared_copy as shared_copy
from latentgen.checkpoints.weights import first_five
from latentgen.errors import AdapterError, InputError
from latentgen.files import quote

Components = Mapping[str, nn.Module]
_MAX_WEIGHT = 1000.0


class _Target(NamedTuple):
    """A layer of a model and its adapter, with factors in the shape that the layer needs."""

    parent: nn.Module
    child: str
    module: AdaptedLayer | nn.Linear | nn.Conv2d
    down: Tensor
    up: Tensor
    scale: float
    path: str

    @property
    def layer(self) -> nn.Linear | nn.Conv2d:
        return self.module.layer if isinstance(self.module, AdaptedLayer) else self.module


def attach(components: Components, lora: LoRA, weight: float = 1.0, *, name: str | None = None) -> None:
    """Add a LoRA to the outputs of modules, in the dtype and on the device of each layer.

    Args:
        components: modules by the name of their component; every part of the LoRA needs one.
        lora: from :func:`read_lora`.
        weight: multiplies the LoRA, in addition to its alpha / rank. May be negative; 0 is off.
        name: the name of the adapter; the LoRA's own if None.

    Raises:
        AdapterError: a layer of the LoRA is not in the model or has another shape, the name is taken, or a value is
            too large for the layer's dtype; nothing is changed.
        InputError: `weight` is not a number of at most 1000.
    """
    weight, name = _check_weight(weight), lora.name if name is None else name
    if name in attached(components):
        raise AdapterError(
            f"an adapter named {quote(name)} is attached already; give another name, or detach it"
        )
    new = [(target, _branch(target, name, weight)) for target in _targets(components, lora)]
    for target, branch in new:
        module = target.module
        if not isinstance(module, AdaptedLayer):
            module = AdaptedLayer(module)
            setattr(target.parent, target.child, module)
        module.branches.append(branch)


def attached(components: Components) -> dict[str, float]:
    """The weight of each attached adapter, by name, in the order of attachment."""
    return {branch.name: branch.weight for module in components.values() for branch in branches(module)}


def set_weight(components: Components, name: str, weight: float) -> None:
    """Change the weight of an attached adapter; AdapterError if there is none of that name, InputError as `attach`."""
    weight = _check_weight(weight)
    _check_attached(components, name)
    for module in components.values():
        for branch in branches(module):
            if branch.name == name:
                branch.weight = weight


def detach(components: Components, name: str) -> None:
    """Remove an adapter: the modules are as before; AdapterError if there is none of that name."""
    _check_attached(components, name)
    for module in components.values():
        for parent in list(module.modules()):
            for child, adapted in list(parent.named_children()):
                if not isinstance(adapted, AdaptedLayer):
                    continue
                remaining = [branch for branch in branches(adapted) if branch.name != name]
                adapted.branches = nn.ModuleList(remaining)
                if not remaining:
                    setattr(parent, child, adapted.layer)


@torch.no_grad()
def merge(components: Components, lora: LoRA, weight: float = 1.0) -> None:
    """Add a LoRA to the weights of modules permanently; computed in float32 and rounded to the weights' dtype.

    The weights become new tensors; the old ones, and the files that they are mapped from, are unchanged.

    Raises:
        AdapterError, InputError: as :func:`attach`; nothing is changed.
    """
    weight = _check_weight(weight)
    targets = _targets(components, lora)
    # Every sum is computed twice, first to check it, so that memory holds one of them at a time.
    if overflown := [target.path for target in targets if not torch.isfinite(_merged(target, weight)).all()]:
        raise AdapterError(
            f"{len(overflown)} of {len(targets)} weights would not be finite with {quote(lora.name)} "
            f"({first_five(overflown)}); use a smaller weight, or load the model in float32"
        )
    for target in targets:
        old = target.layer.weight
        target.layer.weight = nn.Parameter(_merged(target, weight), requires_grad=old.requires_grad)


def _merged(target: _Target, weight: float) -> Tensor:
    base = target.layer.weight
    dtype = torch.promote_types(base.dtype, torch.float32)
    up, down = (factor.to(base.device, dtype).flatten(1) for factor in (target.up, target.down))
    merged = torch.empty_like(base, requires_grad=False)  # has the same memory layout
    return merged.copy_(
        torch.addmm(base.to(dtype).flatten(1), up, down, alpha=weight * target.scale).view(base.shape)
    )


def _branch(target: _Target, name: str, weight: float) -> LowRankBranch:
    base = target.layer.weight
    # Copies: in a file, tensors may start at any byte, and kernels round differently at some addresses.
    down, up = (factor.to(base.device, base.dtype, copy=True) for factor in (target.down, target.up))
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise AdapterError(
            f"adapter {quote(name)} has values at {quote(target.path)} that are too large for {base.dtype}; load "
            "the model in float32"
        )
    if down.ndim == 4:
        down = down.contiguous(memory_format=torch.channels_last)
    return LowRankBranch(name, down, up, scale=target.scale, weight=weight)


def _targets(components: Components, lora: LoRA) -> list[_Target]:
    """The target of every layer of a LoRA; AdapterError if one is missing or has another shape."""
    targets: dict[tuple[str, str], _Target] = {}
    unmatched: list[str] = []
    mismatched: list[str] = []
    for component, layers in lora.components.items():
        module = components.get(component)
        names = {} if module is None else layer_names(module)
        for name, adapter in layers.items():
            path = names.get(flat(name))
            if module is None or path is None or (component, path) in targets:
                unmatched.append(f"{component}: {name}")
                continue
            target = _fitted(module, path, adapter)
            if isinstance(target, str):
                mismatched.append(f"{component}: {path} {target}")
            else:
                targets[component, path] = target
    if unmatched or mismatched:
        total = sum(map(len, lora.components.values()))
        kinds = {"are not in this model or repeated": unmatched, "have another shape": mismatched}
        problems = (f"{len(names)} {what} ({first_five(names)})" for what, names in kinds.items() if names)
        absent = [name for name in lora.components if name not in components]
        hint = f"; this model has no {', '.join(absent)}" if absent else ""
        raise AdapterError(
            f"LoRA {quote(lora.name)}: of its {total} layers, {', '.join(problems)}{hint}. It was probably made for "
            "another family of models; nothing was changed"
        )
    return list(targets.values())


def _fitted(module: nn.Module, path: str, adapter: LoRALayer) -> _Target | str:
    """The layer at `path` with its adapter, or why the adapter does not match it."""
    parent_path, _, child = path.rpartition(".")
    parent = module.get_submodule(parent_path)
    layer = parent.get_submodule(child)
    assert isinstance(layer, AdaptedLayer | nn.Linear | nn.Conv2d)
    base = layer.weight
    if base.is_meta:
        return "has no weights yet"
    # A 1x1 convolution and a linear layer are the same map, and files hold either for the projections.
    outputs, inputs, *kernel = base.shape
    down, up = adapter.down, adapter.up
    actual = [
        up.shape[0],
        down.shape[1],
        *(size for size in down.shape[2:] if list(down.shape[2:]) != [1, 1]),
    ]
    expected = [outputs, inputs, *(size for size in kernel if kernel != [1, 1])]
    if actual != expected:
        return f"is {list(base.shape)}, the LoRA's product {actual}"
    ones = [1] * len(kernel)
    down, up = down.reshape(adapter.rank, inputs, *kernel), up.reshape(outputs, adapter.rank, *ones)
    return _Target(parent, child, layer, down, up, adapter.scale, path)


def _check_weight(weight: float) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= _MAX_WEIGHT:
        raise InputError(f"weight={quote(weight)} must be a number of at most {_MAX_WEIGHT:g}")
    return float(weight)


def _check_attached(components: Components, name: str) -> None:
    names = attached(components)
    if name not in names:
        raise AdapterError(
            f"no adapter named {quote(name)} is attached; there is: {', '.join(map(quote, names)) or 'none'}"
        )
