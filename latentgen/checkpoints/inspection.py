"""What a checkpoint is, read from headers and configurations alone: milliseconds at any size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from latentgen.checkpoints.families import FAMILIES
from latentgen.checkpoints.folder import CheckpointFolder, as_path
from latentgen.checkpoints.headers import TensorInfo, read_header
from latentgen.checkpoints.identify import identify, likely_architecture, stated_prediction, unet_kind
from latentgen.errors import CheckpointNotFoundError
from latentgen.files import quote

# What the keys of a single file in the original layout begin with -> the component that they belong to.
_PREFIXES = {
    "model.diffusion_model.": "unet",
    "model_ema.": "unet's moving averages",
    "first_stage_model.": "vae",
    "cond_stage_model.transformer.": "text_encoder",
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.0.model.": "text_encoder_2",
    "conditioner.embedders.1.model.": "text_encoder_2",
}


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
    return _inspect_folder(CheckpointFolder.open(path)) if path.is_dir() else _inspect_file(path)


def _inspect_file(path: Path) -> Inspection:
    header = read_header(path)
    identity = identify(header)
    wrapper = identity.wrapper if identity else ""
    stated = stated_prediction({key.removeprefix(wrapper) for key in header}, header.metadata)
    if identity is None or identity.kind != "checkpoint":
        part = _part(header)
        return Inspection(path, part.architecture, {"weights": part}, None, stated)
    family = FAMILIES.get(identity.family or "")
    return Inspection(
        path=path,
        family=f"{identity.family}, a single file in the original layout",
        parts={name: _part(tensors) for name, tensors in _components(header, wrapper).items()},
        scheduler=None,
        prediction_type=stated or (family.prediction_type if family else None),
    )


def _components(tensors: Mapping[str, TensorInfo], wrapper: str) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of a single file by component, under the names that they have in it."""
    result: dict[str, dict[str, TensorInfo]] = {}
    for key, info in tensors.items():
        key = key.removeprefix(wrapper)
        prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")
        result.setdefault(_PREFIXES.get(prefix, "other"), {})[key.removeprefix(prefix)] = info
    return result


def _inspect_folder(folder: CheckpointFolder) -> Inspection:
    parts: dict[str, Part] = {}
    family = "unknown (no UNet)"
    for component in folder.components:
        variants = tuple(folder.variants(component))
        if not variants:
            continue
        tensors = folder.weights(component, variants[0]).tensors()
        parts[component] = _part(tensors, variants)
        if component == "unet" and (kind := unet_kind(tensors)):
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


def _part(tensors: Mapping[str, TensorInfo], variants: tuple[str | None, ...] = (None,)) -> Part:
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


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value.isprintable() else None


def _readable(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
