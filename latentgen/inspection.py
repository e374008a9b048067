"""What a checkpoint is, read from headers and configurations alone: milliseconds at any size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from latentgen.checkpoint import CheckpointFolder, as_path
from latentgen.errors import CheckpointNotFoundError
from latentgen.files import quote
from latentgen.headers import TensorInfo, read_header
from latentgen.identify import likely_architecture, unet_kind


@dataclass(frozen=True)
class Part:
    """The weights of one component: counts, size in bytes, and the dtypes by the share that they take."""

    architecture: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]
    variants: tuple[str | None, ...] = (None,)


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is; ``scheduler`` and ``prediction_type`` are None where it does not say."""

    path: Path
    family: str
    parts: Mapping[str, Part]
    scheduler: str | None
    prediction_type: str | None

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts.values())

    @property
    def nbytes(self) -> int:
        """Size of the weights in bytes, of one variant each."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of all parts, in the order of the parts."""
        return tuple(dict.fromkeys(dtype for part in self.parts.values() for dtype in part.dtypes))

    def lines(self) -> list[str]:
        """The inspection as text, one fact a line."""
        lines = [
            f"path: {self.path}",
            f"family: {self.family}",
            f"parameters: {self.parameters:,}",
            f"dtype: {', '.join(self.dtypes) or 'no weights'}",
            f"size: {_readable(self.nbytes)}",
            f"scheduler: {self.scheduler or 'not stored'}",
            f"prediction type: {self.prediction_type or 'not stored'}",
        ]
        for name, part in self.parts.items():
            variants = ", ".join(variant or "default" for variant in part.variants)
            lines.append(
                f"{name}: {part.architecture}; {part.parameters:,} parameters in {part.tensors:,} tensors, "
                f"{', '.join(part.dtypes)}, {_readable(part.nbytes)}; variants: {variants}"
            )
        return lines


def inspect(path: str | Path) -> Inspection:
    """Say what a checkpoint folder, or one safetensors file, holds.

    Raises:
        CheckpointError: one of its subclasses, if the checkpoint is missing, damaged or unsafe.
        InputError: the path is empty, or no path at all.
    """
    path = as_path(path)
    if path.is_dir():
        return _inspect_folder(CheckpointFolder.open(path))
    header = read_header(path)
    part = _part([header])
    prediction_type = header.metadata.get("modelspec.prediction_type")
    return Inspection(path, part.architecture, {"weights": part}, None, prediction_type)


def _inspect_folder(folder: CheckpointFolder) -> Inspection:
    parts: dict[str, Part] = {}
    family = "unknown (no UNet)"
    for component in folder.components:
        variants = tuple(folder.variants(component))
        if not variants:
            continue
        headers = [read_header(file) for file in folder.weight_files(component, variants[0])]
        parts[component] = _part(headers, variants)
        if component == "unet" and (kind := unet_kind(_merged(headers))):
            family = kind.family
    if not parts:
        raise CheckpointNotFoundError(
            f"no component of {quote(folder.path)} has weights in .safetensors files"
        )
    config = folder.config("scheduler") if "scheduler" in folder.components else {}
    return Inspection(
        path=folder.path,
        family=family,
        parts=parts,
        scheduler=_text(config.get("_class_name")),
        prediction_type=_text(config.get("prediction_type")),
    )


def _part(headers: Iterable[Mapping[str, TensorInfo]], variants: tuple[str | None, ...] = (None,)) -> Part:
    tensors = _merged(headers)
    nbytes_of: dict[str, int] = {}
    for info in tensors.values():
        nbytes_of[info.dtype] = nbytes_of.get(info.dtype, 0) + info.nbytes
    return Part(
        architecture=likely_architecture(tensors) or "an architecture that is not known here",
        tensors=len(tensors),
        parameters=sum(math.prod(info.shape) for info in tensors.values()),
        nbytes=sum(nbytes_of.values()),
        dtypes=tuple(sorted(nbytes_of, key=lambda dtype: -nbytes_of[dtype])),
        variants=variants,
    )


def _merged(headers: Iterable[Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    return {name: info for header in headers for name, info in header.items()}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value.isprintable() else None


def _readable(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
