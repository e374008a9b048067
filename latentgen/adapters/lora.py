"""LoRA adapters on the modules of a pipeline: attach several, change their weights, detach them, or merge one.

A component is a module under the name that the diffusers layout gives it: "unet", "text_encoder" (of a
:class:`latentgen.models.text.CLIPText`, its `model`), "text_encoder_2".

These functions change the modules that they are given, and so every pipeline that holds them. Give them
:func:`shared_copy` of a module, which copies no weight, to leave the original as it is. Weights are replaced by
:func:`merge` alone, and never written in place. While a module works in another thread, none of this is safe.
What is attached is not in a state_dict: save the original weights, or merge first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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


class _Place(NamedTuple):
    """A layer of a model, and the adapter that belongs to it, with factors in the shape that the layer needs."""

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
    """Let a LoRA take part in what modules compute, in the dtype and on the device of each layer.

    Args:
        components: modules by the name of their component; every part of the LoRA needs one.
        lora: from :func:`read_lora`.
        weight: what the adapter is multiplied by, besides its own alpha / rank. May be negative; 0 is off.
        name: what the adapter is called from now on; the LoRA's own name if None.

    Raises:
        AdapterError: a layer of the LoRA has no place or does not fit there, the name is taken, or a value is too
            large for the layer's dtype. Nothing has changed then.
        InputError: `weight` is not a number of at most 1000.
    """
    weight, name = _check_weight(weight), lora.name if name is None else name
    if name in attached(components):
        raise AdapterError(
            f"an adapter named {quote(name)} is attached already; give another name, or detach it"
        )
    branches_of = [(place, _branch(place, name, weight)) for place in _places(components, lora)]
    for place, branch in branches_of:
        module = place.module
        if not isinstance(module, AdaptedLayer):
            module = AdaptedLayer(module)
            setattr(place.parent, place.child, module)
        module.branches.append(branch)


def attached(components: Components) -> dict[str, float]:
    """The weight of each adapter that is attached, by name, in the order of attachment."""
    return {branch.name: branch.weight for module in components.values() for branch in branches(module)}


def set_weight(components: Components, name: str, weight: float) -> None:
    """Change the weight of an attached adapter.

    Raises:
        AdapterError: no adapter of that name is attached.
        InputError: as :func:`attach`.
    """
    weight = _check_weight(weight)
    _check_attached(components, name)
    for module in components.values():
        for branch in branches(module):
            if branch.name == name:
                branch.weight = weight


def detach(components: Components, name: str) -> None:
    """Take an adapter off again; without adapters, modules are exactly what they were.

    Raises:
        AdapterError: no adapter of that name is attached.
    """
    _check_attached(components, name)
    for module in components.values():
        for parent in list(module.modules()):
            for child, adapted in list(parent.named_children()):
                if not isinstance(adapted, AdaptedLayer):
                    continue
                kept = [branch for branch in branches(adapted) if branch.name != name]
                adapted.branches = nn.ModuleList(kept)
                if not kept:
                    setattr(parent, child, adapted.layer)


@contextmanager
def applied(
    components: Components, lora: LoRA, weight: float = 1.0, *, name: str | None = None
) -> Iterator[None]:
    """Attach a LoRA for the ``with`` block alone.

    Raises:
        AdapterError, InputError: as :func:`attach`.
    """
    attach(components, lora, weight, name=name)
    try:
        yield
    finally:
        detach(components, lora.name if name is None else name)


@torch.no_grad()
def merge(components: Components, lora: LoRA, weight: float = 1.0) -> None:
    """Add a LoRA to the weights of modules, for good; computed in float32 and rounded to the weights' dtype.

    The weights become new tensors: others who hold the old ones, and files that they are mapped from, see nothing.

    Raises:
        AdapterError, InputError: as :func:`attach`; nothing has changed then.
    """
    weight = _check_weight(weight)
    places = _places(components, lora)
    # Every sum is made twice: once to know that all are finite, so that there is one of them at a time.
    if overflown := [place.path for place in places if not torch.isfinite(_merged(place, weight)).all()]:
        raise AdapterError(
            f"{len(overflown)} of {len(places)} weights would not be finite with {quote(lora.name)} "
            f"({first_five(overflown)}); use a smaller weight, or load the model in float32"
        )
    for place in places:
        old = place.layer.weight
        place.layer.weight = nn.Parameter(_merged(place, weight), requires_grad=old.requires_grad)


def _merged(place: _Place, weight: float) -> Tensor:
    base = place.layer.weight
    dtype = torch.promote_types(base.dtype, torch.float32)
    up, down = (factor.to(base.device, dtype).flatten(1) for factor in (place.up, place.down))
    merged = torch.empty_like(base, requires_grad=False)  # in the memory layout of the old one
    return merged.copy_(
        torch.addmm(base.to(dtype).flatten(1), up, down, alpha=weight * place.scale).view(base.shape)
    )


def _branch(place: _Place, name: str, weight: float) -> LowRankBranch:
    base = place.layer.weight
    # Copies: in a file, tensors begin at any byte, and kernels round otherwise for some of these addresses.
    down, up = (factor.to(base.device, base.dtype, copy=True) for factor in (place.down, place.up))
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise AdapterError(
            f"adapter {quote(name)} has values at {quote(place.path)} that are too large for {base.dtype}; load "
            "the model in float32"
        )
    if down.ndim == 4:
        down = down.contiguous(memory_format=torch.channels_last)
    return LowRankBranch(name, down, up, scale=place.scale, weight=weight)


def _places(components: Components, lora: LoRA) -> list[_Place]:
    """The place of every layer of a LoRA; AdapterError if one has none or does not fit."""
    places: dict[tuple[str, str], _Place] = {}
    unmatched: list[str] = []
    mismatched: list[str] = []
    for component, layers in lora.components.items():
        module = components.get(component)
        names = {} if module is None else layer_names(module)
        for name, adapter in layers.items():
            path = names.get(flat(name))
            if module is None or path is None or (component, path) in places:
                unmatched.append(f"{component}: {name}")
                continue
            place = _fitted(module, path, adapter)
            if isinstance(place, str):
                mismatched.append(f"{component}: {path} {place}")
            else:
                places[component, path] = place
    if unmatched or mismatched:
        raise AdapterError(_mismatch_message(lora, components, unmatched, mismatched))
    return list(places.values())


def _fitted(module: nn.Module, path: str, adapter: LoRALayer) -> _Place | str:
    """The place at `path`, or what about the adapter does not fit there."""
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
    found = [up.shape[0], down.shape[1], *(size for size in down.shape[2:] if list(down.shape[2:]) != [1, 1])]
    due = [outputs, inputs, *(size for size in kernel if kernel != [1, 1])]
    if found != due:
        return f"is {list(base.shape)}, the LoRA's product {found}"
    ones = [1] * len(kernel)
    down, up = down.reshape(adapter.rank, inputs, *kernel), up.reshape(outputs, adapter.rank, *ones)
    return _Place(parent, child, layer, down, up, adapter.scale, path)


def _mismatch_message(
    lora: LoRA, components: Components, unmatched: Sequence[str], mismatched: Sequence[str]
) -> str:
    total = sum(map(len, lora.components.values()))
    problems = []
    if unmatched:
        problems.append(f"{len(unmatched)} have no place of their own ({first_five(unmatched)})")
    if mismatched:
        problems.append(f"{len(mismatched)} have another shape ({first_five(mismatched)})")
    absent = [name for name in lora.components if name not in components]
    hint = f"; this model has no {', '.join(absent)}" if absent else ""
    return (
        f"LoRA {quote(lora.name)}: of its {total} layers, {', '.join(problems)}{hint}. It was probably made for "
        "another family of models; nothing was changed"
    )


def _check_weight(weight: float) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= _MAX_WEIGHT:
        raise InputError(f"weight={quote(weight)} has to be a number of at most {_MAX_WEIGHT:g}")
    return float(weight)


def _check_attached(components: Components, name: str) -> None:
    if name not in (there := attached(components)):
        names = ", ".join(map(quote, there)) or "none"
        raise AdapterError(f"no adapter named {quote(name)} is attached; there is: {names}")
