"""Key maps: where in a file each tensor of the diffusers layout lies, and in which form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from latentgen.errors import CheckpointMismatchError
from latentgen.files import quote


class Origin(NamedTuple):
    """Where a tensor of the diffusers layout lies in a file.

    Attributes:
        key: in the file.
        third: 0, 1 or 2 for the rows of queries, keys or values in a fused projection; None for the whole.
        transposed: the file holds the transpose.
        convolution: the file holds a linear layer as a convolution, with a trailing [1, 1] in its shape.
    """

    key: str
    third: int | None = None
    transposed: bool = False
    convolution: bool = False

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor, given that of what the file stores."""
        if self.third is not None and stored and stored[0] % 3 == 0:
            return (stored[0] // 3, *stored[1:])
        if self.convolution and stored[2:] == (1, 1):
            return stored[:2]
        return stored[::-1] if self.transposed else stored

    def take(self, stored: Tensor) -> Tensor:
        """The tensor, as a view of what the file stores wherever that is possible."""
        shape = self.shape(tuple(stored.shape))
        if self.third is not None:
            return stored[self.third * shape[0] : (self.third + 1) * shape[0]]
        return stored.T.contiguous() if self.transposed else stored.view(shape)


# diffusers' name -> its origin, in the order of the pass.
KeyMap = Mapping[str, Origin]


def with_prefix(key_map: KeyMap, prefix: str) -> KeyMap:
    """The same map for a file whose keys all begin with ``prefix``."""
    return {name: origin._replace(key=prefix + origin.key) for name, origin in key_map.items()}


def to_diffusers_names(state: Mapping[str, Tensor], key_map: KeyMap) -> dict[str, Tensor]:
    """Tensors of the original layout under diffusers' names: views, but for those that are transposed.

    Raises:
        CheckpointMismatchError: a key of the map is missing, or ``state`` has another one.
    """
    _compare(state, {origin.key for origin in key_map.values()})
    return {name: origin.take(state[origin.key]) for name, origin in key_map.items()}


def to_original(state: Mapping[str, Tensor], key_map: KeyMap) -> dict[str, Tensor]:
    """Tensors under diffusers' names in the original layout; only fused and transposed ones are copied.

    Raises:
        CheckpointMismatchError: a name of the map is missing, or ``state`` has another one.
    """
    _compare(state, key_map.keys())
    names: dict[str, list[str]] = {}
    for name, origin in sorted(key_map.items(), key=lambda item: item[1].third or 0):
        names.setdefault(origin.key, []).append(name)
    result: dict[str, Tensor] = {}
    for origin in key_map.values():
        first = state[names[origin.key][0]]
        if origin.third is not None:
            first = torch.cat([state[name] for name in names[origin.key]])
        elif origin.transposed:
            first = first.T.contiguous()
        elif origin.convolution:
            first = first[:, :, None, None]
        result.setdefault(origin.key, first)
    return result


def _compare(found: Mapping[str, Tensor], due: Iterable[str]) -> None:
    missing = [name for name in due if name not in found]
    extra = sorted(found.keys() - set(due))
    problems = [
        f"{len(names)} {what}, such as {quote(names[0])}"
        for what, names in (("missing", missing), ("too many", extra))
        if names
    ]
    if problems:
        raise CheckpointMismatchError(
            f"the tensors are not those of the configuration: {' and '.join(problems)}; use the configuration "
            "made for them"
        )
