"""Inspects checkpoints by their headers and configurations: milliseconds at any size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from latentgen.adapters.lora_files import COMPONENTS, lora_weights, read_lora
from latentgen.adapters.textual_inversion import read_embedding
from latentgen.checkpoints.families import FAMILIES
from latentgen.checkpoints.folder import CheckpointFolder, as_path
from latentgen.checkpoints.identify import declared_prediction, declared_target, identify
from latentgen.checkpoints.io import Header, TensorInfo, read_header
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

    @classmethod
    def of(
        cls, tensors: Mapping[str, TensorInfo], variants: tuple[str | None, ...] = (None,)
    ) -> ComponentSummary:
        nbytes_of: Counter[str] = Counter()
        for info in tensors.values():
            nbytes_of[info.dtype] += info.nbytes
        return cls(
            architecture=identify(tensors).name,
            tensors=len(tensors),
            parameters=sum(math.prod(info.shape) for info in tensors.values()),
            nbytes=nbytes_of.total(),
            dtypes=tuple(dtype for dtype, _ in nbytes_of.most_common()),
            variants=variants,
        )


@dataclass(frozen=True)
class Inspection:
    """Facts about a checkpoint or an adapter.

    Attributes:
        path: the file or folder.
        family: a description, such as "SDXL base".
        parts: the weights of each component.
        facts: "scheduler" and "prediction type" of a checkpoint; others of a LoRA or an embedding.
        metadata: the text entries in the header of a file.
    """

    path: Path
    family: str
    parts: Mapping[str, ComponentSummary]
    facts: Mapping[str, str]
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
            *(f"{fact}: {value}" for fact, value in self.facts.items()),
        ]
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
    if path.is_dir():
        if not (path / "model_index.json").is_file() and (files := lora_weights(path)):
            return _inspect_weights(path, {name: read_header(file) for name, file in files.items()})
        return _inspect_folder(CheckpointFolder.open(path))
    header = read_header(path)
    if identify(header).kind == "checkpoint":
        return _inspect_single_file(path, header)
    return _inspect_weights(path, {"weights": header})


def _inspect_single_file(path: Path, header: Header) -> Inspection:
    identity = identify(header)
    keys = {key.removeprefix(identity.key_prefix): info for key, info in header.items()}
    components: dict[str, dict[str, TensorInfo]] = {}
    for key, info in keys.items():
        prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")
        components.setdefault(_PREFIXES.get(prefix, "other"), {})[key.removeprefix(prefix)] = info
    family = FAMILIES.get(identity.family or "")
    prediction = declared_prediction(keys, header.metadata) or (family and family.prediction_type)
    return Inspection(
        path,
        f"{identity.family}, a single file in the original layout",
        {name: ComponentSummary.of(tensors) for name, tensors in components.items()},
        _checkpoint_facts(None, prediction),
        header.metadata,
    )


def _inspect_weights(path: Path, headers: Mapping[str, Header]) -> Inspection:
    """Inspect a LoRA, an embedding, or the weights of one component."""
    metadata = {key: text for header in headers.values() for key, text in header.metadata.items()}
    identities = [identify(header) for header in headers.values()]
    identity = min(identities, key=lambda identity: identity.kind == "unknown")
    family = next((identity.family for identity in identities if identity.family), None)
    if identity.kind in ("adapter", "embedding") or path.is_dir():
        is_embedding = identity.kind == "embedding" and not path.is_dir()
        facts = {"target": family or (not is_embedding and declared_target(metadata)) or "not stored"}
        try:
            facts |= _embedding_facts(path) if is_embedding else _lora_facts(path)
        except (AdapterError, CheckpointValueError) as error:
            facts["problem"] = str(error)
    else:
        keys = {key.removeprefix(identity.key_prefix) for header in headers.values() for key in header}
        facts = _checkpoint_facts(None, declared_prediction(keys, metadata))
    parts = {name: ComponentSummary.of(header) for name, header in headers.items()}
    return Inspection(path, identity.name, parts, facts, metadata)


def _inspect_folder(folder: CheckpointFolder) -> Inspection:
    parts: dict[str, ComponentSummary] = {}
    family = "unknown (no UNet)"
    for component in folder.components:
        variants = tuple(folder.variants(component))
        if not variants:
            continue
        tensors = folder.weights(component, variants[0]).tensors()
        parts[component] = ComponentSummary.of(tensors, variants)
        if component == "unet":
            family = identify(tensors).family or "unknown"
    if not parts:
        raise CheckpointNotFoundError(
            f"no component of {quote(folder.path)} has weights in .safetensors files"
        )
    config = folder.config("scheduler") if "scheduler" in folder.components else {}
    facts = _checkpoint_facts(config.get("_class_name"), config.get("prediction_type"))
    return Inspection(folder.path, family, parts, facts)


def _checkpoint_facts(scheduler: object, prediction_type: object) -> dict[str, str]:
    facts = {"scheduler": scheduler, "prediction type": prediction_type}
    return {
        fact: value if isinstance(value, str) and value.isprintable() else "not stored"
        for fact, value in facts.items()
    }


def _lora_facts(path: Path) -> dict[str, str]:
    lora = read_lora(path, check_factors=False)
    counts = {name: len(lora.components[name]) for name in COMPONENTS if name in lora.components}
    return {
        "format": lora.format,
        "rank": _span([layer.rank for layer in lora.layers]),
        "alpha": _span([layer.scale * layer.rank for layer in lora.layers]),
        "layers": f"{len(lora.layers)} ({', '.join(f'{count} in {name}' for name, count in counts.items())})",
    }


def _embedding_facts(path: Path) -> dict[str, str]:
    embedding = read_embedding(path)
    vectors = dict(sorted(embedding.vectors.items()))
    return {
        "token": embedding.token,
        "vectors per token": str(len(next(iter(vectors.values())))),
        "width": ", ".join(f"{rows.shape[1]} ({component})" for component, rows in vectors.items()),
    }


def _span(values: list[float]) -> str:
    low, high = f"{min(values):g}", f"{max(values):g}"
    return low if low == high else f"{low} to {high}"


def _readable(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
