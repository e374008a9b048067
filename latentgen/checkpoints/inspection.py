"""Inspects checkpoints by their headers and configurations: milliseconds at any size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from latentgen.adapters.lora_files import lora_weights, summarize_lora
from latentgen.adapters.textual_inversion import read_embedding
from latentgen.checkpoints.families import FAMILIES
from latentgen.checkpoints.folder import CheckpointFolder, as_path
from latentgen.checkpoints.identify import (
    declared_prediction,
    declared_target,
    identify,
    unet_kind,
)
from latentgen.checkpoints.io import TensorInfo, read_header
from latentgen.errors import AdapterError, CheckpointNotFoundError, CheckpointValueError
from latentgen.files import quote

# Prefix of the keys of a single file in the original layout -> component.
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
class ComponentSummary:
    """The weights of one component: counts, size in bytes, and the dtypes by decreasing size."""

    architecture: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]
    variants: tuple[str | None, ...] = (None,)


@dataclass(frozen=True)
class Inspection:
    """Facts about a checkpoint or an adapter.

    Attributes:
        path: the file or folder.
        family: a description, such as "SDXL base".
        parts: the weights of each component.
        scheduler: the class name; None if not stored.
        prediction_type: None if not stored.
        adapter: fact -> value, of a LoRA or an embedding; None for anything else.
        metadata: the text entries in the header of a file.
    """

    path: Path
    family: str
    parts: Mapping[str, ComponentSummary]
    scheduler: str | None
    prediction_type: str | None
    adapter: Mapping[str, str] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts.values())

    @property
    def nbytes(self) -> int:
        """Size of the weights in bytes, counting one variant of each component."""
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
        ]
        if self.adapter is None:
            lines.append(f"scheduler: {self.scheduler or 'not stored'}")
            lines.append(f"prediction type: {self.prediction_type or 'not stored'}")
        else:
            lines += (f"{fact}: {value}" for fact, value in self.adapter.items())
        for name, part in self.parts.items():
            variants = ", ".join(variant or "default" for variant in part.variants)
            lines.append(
                f"{name}: {part.architecture}; {part.parameters:,} parameters in {part.tensors:,} tensors, "
                f"{', '.join(part.dtypes)}, {_readable(part.nbytes)}; variants: {variants}"
            )
        # Trainers store whole reports in the metadata; one line of each is enough.
        lines += (f"metadata {quote(key)[1:-1]}: {quote(text)[1:-1]}" for key, text in self.metadata.items())
        return lines


def inspect(path: str | Path) -> Inspection:
    """Inspect a checkpoint folder, the folder of a LoRA, or a safetensors file.

    Raises:
        CheckpointError: one of its subclasses, if the checkpoint is missing, damaged or unsafe.
        InputError: the path is empty or not a path.
    """
    path = as_path(path)
    if not path.is_dir():
        return _inspect_file(path)
    if not (path / "model_index.json").is_file() and (files := lora_weights(path)):
        return _inspect_lora_folder(path, files)
    return _inspect_folder(CheckpointFolder.open(path))


def _inspect_file(path: Path) -> Inspection:
    header = read_header(path)
    identity = identify(header)
    keys = {key.removeprefix(identity.key_prefix) for key in header}
    declared = declared_prediction(keys, header.metadata)
    if identity.kind != "checkpoint":
        part, adapter = _summary(header), None
        if identity.kind == "adapter":
            adapter = _lora_facts(path, identity.family or declared_target(header.metadata))
        elif identity.kind == "embedding":
            adapter = _embedding_facts(path, identity.family)
        return Inspection(
            path, part.architecture, {"weights": part}, None, declared, adapter, header.metadata
        )
    family = FAMILIES.get(identity.family or "")
    return Inspection(
        path=path,
        family=f"{identity.family}, a single file in the original layout",
        parts={name: _summary(tensors) for name, tensors in _components(header, identity.key_prefix).items()},
        scheduler=None,
        prediction_type=declared or (family.prediction_type if family else None),
        metadata=header.metadata,
    )


def _inspect_lora_folder(folder: Path, files: Mapping[str, Path]) -> Inspection:
    headers = {name: read_header(file) for name, file in files.items()}
    metadata = {key: text for header in headers.values() for key, text in header.metadata.items()}
    identities = [identify(header) for header in headers.values()]
    family = next((identity.family for identity in identities if identity.family), None)
    return Inspection(
        path=folder,
        family=min(identities, key=lambda identity: identity.kind == "unknown").name,
        parts={name: _summary(header) for name, header in headers.items()},
        scheduler=None,
        prediction_type=None,
        adapter=_lora_facts(folder, family or declared_target(metadata)),
        metadata=metadata,
    )


def _lora_facts(path: Path, target: str | None) -> dict[str, str]:
    """Facts about a LoRA, or the reason why it cannot be used."""
    facts = {"target": target or "not stored"}
    try:
        lora = summarize_lora(path)
    except (AdapterError, CheckpointValueError) as error:
        return {**facts, "problem": str(error)}
    counts = ", ".join(f"{count} in {component}" for component, count in lora.layers.items())
    return {
        **facts,
        "format": lora.format,
        "rank": _span(*lora.ranks),
        "alpha": _span(*lora.alphas),
        "layers": f"{sum(lora.layers.values())} ({counts})",
    }


def _embedding_facts(path: Path, target: str | None) -> dict[str, str]:
    """Facts about an embedding, or the reason why it cannot be used."""
    facts = {"target": target or "not stored"}
    try:
        embedding = read_embedding(path)
    except (AdapterError, CheckpointValueError) as error:
        return {**facts, "problem": str(error)}
    widths = ", ".join(
        f"{rows.shape[1]} ({component})" for component, rows in sorted(embedding.vectors.items())
    )
    count = len(next(iter(embedding.vectors.values())))
    return {**facts, "token": embedding.token, "vectors per token": str(count), "width": widths}


def _span(low: float, high: float) -> str:
    return f"{low:g}" if f"{low:g}" == f"{high:g}" else f"{low:g} to {high:g}"


def _components(tensors: Mapping[str, TensorInfo], key_prefix: str) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of a single file by component, without the component's prefix."""
    result: dict[str, dict[str, TensorInfo]] = {}
    for key, info in tensors.items():
        key = key.removeprefix(key_prefix)
        prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")
        result.setdefault(_PREFIXES.get(prefix, "other"), {})[key.removeprefix(prefix)] = info
    return result


def _inspect_folder(folder: CheckpointFolder) -> Inspection:
    parts: dict[str, ComponentSummary] = {}
    family = "unknown (no UNet)"
    for component in folder.components:
        variants = tuple(folder.variants(component))
        if not variants:
            continue
        tensors = folder.weights(component, variants[0]).tensors()
        parts[component] = _summary(tensors, variants)
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


def _summary(
    tensors: Mapping[str, TensorInfo], variants: tuple[str | None, ...] = (None,)
) -> ComponentSummary:
    nbytes_of: dict[str, int] = {}
    for info in tensors.values():
        nbytes_of[info.dtype] = nbytes_of.get(info.dtype, 0) + info.nbytes
    return ComponentSummary(
        architecture=identify(tensors).name,
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
