"""LoRA files in the formats of kohya, diffusers and PEFT; safetensors only.

Layers keep the names that the file gives them; :mod:`latentgen.adapters.lora` finds these layers in a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import ConfigDict, Field
from torch import Tensor

from latentgen.checkpoints.folder import as_path
from latentgen.checkpoints.identify import UNSUPPORTED_ADAPTERS, likely_architecture
from latentgen.checkpoints.io import Header, MappedFile, check_values, refuse_pickles
from latentgen.checkpoints.weights import first_five
from latentgen.errors import AdapterError, CheckpointNotFoundError, ConfigError, InputError
from latentgen.files import parse_json_object, quote, read_json, safe_join
from latentgen.models.config import StageConfig

Format = Literal["kohya", "diffusers", "peft"]
Role = Literal["down", "up", "alpha"]
MAX_ALPHA = 1e6
Alpha = Annotated[float, Field(ge=-MAX_ALPHA, le=MAX_ALPHA)]
# PEFT allows regular expressions; only names are read, because matching an expression may never end.
LayerName = Annotated[str, Field(pattern=r"\A\^?[A-Za-z0-9_.-]+\z")]

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
MAX_RANK = 4096
_FACTOR_DTYPES = ("F16", "BF16", "F32", "F64")
_ALPHA_DTYPES = (*_FACTOR_DTYPES, "I16", "I32", "I64")
_KOHYA_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_PEFT_PREFIX = "base_model.model."
_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
_ROLES: Mapping[str, Role] = {
    ".lora_down.weight": "down", ".lora_up.weight": "up",
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".alpha": "alpha",
}  # fmt: skip
# Early diffusers used the UNet's names of attention projections in text encoders too.
_LEGACY_PROJECTION = re.compile(r"(.*\.)?(to_q|to_k|to_v|to_out)")
_LEGACY_NAMES = {
    "unet": {"to_out": "to_out.0"},
    "text": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}
_UNET_START = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b")
_TEXT_START = re.compile(r"(text_model\.)?(encoder\.layers|text_projection)\b")


class PeftConfig(StageConfig):
    """The fields of PEFT's `adapter_config.json` that set the scale of each layer.

    Other fields must be off, except those that matter only in training.
    """

    model_config = ConfigDict(extra="ignore")
    diffusers_class: ClassVar[str] = "PEFT's LoraConfig"
    training_fields: ClassVar[frozenset[str]] = frozenset(
        {
            "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
            "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
            "lora_dropout", "lora_ga_config", "megatron_core", "parent_library", "peft_version", "qalora_group_size",
            "revision", "runtime_config", "target_modules", "task_type",
        }
    )  # fmt: skip

    peft_type: Literal["LORA"] = "LORA"
    r: Annotated[int, Field(ge=1, le=MAX_RANK)] = 8
    lora_alpha: Alpha = 8
    use_rslora: bool = False
    rank_pattern: dict[LayerName, Alpha] | None = None
    alpha_pattern: dict[LayerName, Alpha] | None = None
    # Other methods change the weights of the base model, and the file does not hold the changed weights.
    init_lora_weights: Literal[True, False, "gaussian", "eva", "orthogonal"] = True

    @classmethod
    def read(cls, fields: Mapping[str, Any], where: str) -> Self:
        """Validate a config, named `where` in errors; AdapterError if it is not a plain LoRA or is out of bounds."""
        for name in fields.keys() - cls.model_fields.keys() - cls.training_fields:
            if fields[name] not in (None, False, "none", [], {}):
                raise AdapterError(
                    f"{where}: {quote(name)} is {quote(fields[name])}, which is not implemented"
                )
        try:
            return cls.from_json(fields)
        except ConfigError as error:
            raise AdapterError(f"{where}: {error}") from None

    def scale(self, layer: str, rank: int, where: str) -> float:
        """alpha / rank of a layer, or alpha / sqrt(rank) (arXiv:2312.03732) with `use_rslora`.

        AdapterError if the layer's tensors have another rank than the config says.
        """
        expected = _look_up(self.rank_pattern, layer, self.r)
        if expected != rank:
            raise AdapterError(
                f"{where}: {quote(layer)} has rank {rank}, but its config says {expected:g}; they belong to "
                "different adapters"
            )
        alpha = _look_up(self.alpha_pattern, layer, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _look_up(pattern: Mapping[str, float] | None, layer: str, default: float) -> float:
    """The value of the first entry that names the layer or the end of its path."""
    for name, value in (pattern or {}).items():
        anchored = name.removeprefix("^")
        if layer == anchored or (anchored == name and layer.endswith(f".{name}")):
            return value
    return default


class LoRALayer(NamedTuple):
    """The adapter of one layer: it adds ``scale * up(down(x))`` to the layer's output.

    `down` is [rank, in] or [rank, in, kH, kW], `up` is [out, rank] or [out, rank, 1, 1]; `scale` is alpha / rank.
    """

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class LoRA:
    """The content of a LoRA file.

    Attributes:
        name: the default name of the adapter: the file's, without its suffix.
        format: "kohya", "diffusers" or "peft".
        components: component ("unet", "text_encoder", "text_encoder_2") -> name of a layer in the file's own
            scheme -> its adapter. The tensors are views of the memory-mapped file.
    """

    name: str
    format: Format
    components: Mapping[str, Mapping[str, LoRALayer]]

    @property
    def layers(self) -> list[LoRALayer]:
        """The adapters of all layers."""
        return [layer for layers in self.components.values() for layer in layers.values()]


# (component, layer) -> the key of each of its tensors.
_Layers = dict[tuple[str, str], dict[Role, str]]


def read_lora(source: str | Path, *, component: str | None = None, check_factors: bool = True) -> LoRA:
    """Read a LoRA.

    Args:
        source: a kohya or diffusers file; a diffusers folder with `pytorch_lora_weights.safetensors`; a PEFT folder
            with `adapter_config.json` and `adapter_model.safetensors`, or a folder of such folders, each named
            after its component.
        component: what the LoRA adapts, for PEFT files, which do not name it. None infers it from the names of the
            layers, which distinguish a UNet from a text encoder, but not one text encoder from the other.
        check_factors: read all values, and refuse NaN and infinity.

    Raises:
        CheckpointNotFoundError: there is no such file, or no LoRA in the folder.
        CheckpointCorruptError: a file is damaged.
        UnsafeCheckpointError: the file is a pickle.
        CheckpointValueError: the LoRA holds NaN or infinity.
        AdapterError: not a LoRA, one of a kind that is not implemented, or one with mismatched tensors.
        InputError: `component` is not the name of a component.
    """
    path = as_path(source)
    if component is not None and component not in COMPONENTS:
        raise InputError(f"component={quote(component)} is unknown; choose from {', '.join(COMPONENTS)}")
    if not path.is_dir():
        return _read_file(path, path.stem, component, None, check_factors)
    parts = []
    for name, file in lora_weights(path).items():
        owner = component if name == "weights" else name
        config = None if file.name == _DIFFUSERS_FILE else _peft_config(file.parent)
        parts.append(_read_file(file, path.name, owner, config, check_factors))
    if not parts:
        refuse_pickles(path)
        raise CheckpointNotFoundError(
            f"{quote(path)} holds no LoRA; looked for {_DIFFUSERS_FILE}, {' and '.join(_PEFT_FILES)}, and "
            f"folders {', '.join(COMPONENTS)} with these"
        )
    components = {name: layers for part in parts for name, layers in part.components.items()}
    return LoRA(path.name, parts[0].format, components)


def lora_weights(folder: Path) -> dict[str, Path]:
    """The weights in the folder of a LoRA: those of each component, or "weights"; empty if there is no LoRA.

    UnsafeCheckpointError if they are a pickle, UnsafePathError if a file lies outside of the folder.
    """
    if (diffusers_file := safe_join(folder, _DIFFUSERS_FILE, "LoRA folder")).is_file():
        return {"weights": diffusers_file}
    config, weights = _PEFT_FILES
    parts = {"weights": folder}
    if not (folder / config).is_file():
        parts = {name: safe_join(folder, name, "LoRA folder") for name in COMPONENTS}
        parts = {name: part for name, part in parts.items() if (part / config).is_file()}
    for part in parts.values():
        if not (part / weights).is_file():
            refuse_pickles(part)
    return {name: safe_join(part, weights, "LoRA folder") for name, part in parts.items()}


def _peft_config(folder: Path) -> PeftConfig:
    file = safe_join(folder, _PEFT_FILES[0], "LoRA folder")
    return PeftConfig.read(read_json(file), quote(file))


def _read_file(
    path: Path, name: str, component: str | None, config: PeftConfig | None, check_factors: bool
) -> LoRA:
    mapped, where = MappedFile(path), quote(path)
    configs = _metadata_configs(mapped.header, where)
    components: dict[str, dict[str, LoRALayer]] = {}
    for (owner, layer), keys in _layers(mapped.header, component, where).items():
        tensors = {role: mapped.tensor(key) for role, key in keys.items()}
        for role, key in keys.items():
            if check_factors or role == "alpha":
                check_values(tensors[role], None, key, path)
        rank, scale, layer_config = len(tensors["down"]), 1.0, config or configs.get(owner)
        if "alpha" in tensors:
            alpha = float(tensors["alpha"])
            if abs(alpha) > MAX_ALPHA:
                raise AdapterError(
                    f"{where}: {quote(keys['alpha'])} is {alpha:g}; allowed are up to {MAX_ALPHA:g}"
                )
            scale = alpha / rank
        elif layer_config is not None:
            scale = layer_config.scale(layer, rank, where)
        components.setdefault(owner, {})[layer] = LoRALayer(tensors["down"], tensors["up"], scale)
    return LoRA(name, "peft" if config else _format(mapped.header), components)


def _layers(header: Header, component: str | None, where: str) -> _Layers:
    """The layers of a file: all of its keys are known, and every layer is complete, with valid shapes and dtypes."""
    for kind, ends in UNSUPPORTED_ADAPTERS.items():
        if matches := [key for key in header if key.endswith(ends)]:
            raise AdapterError(
                f"{where} is a {kind} adapter ({len(matches)} such keys: {first_five(matches)}), which is not "
                "implemented; merge it into a checkpoint with the program that made it"
            )
    layers: _Layers = {}
    unknown = []
    for key in header:
        if (parsed := _parse_key(key, component)) is None:
            unknown.append(key)
            continue
        owner, layer, role = parsed
        keys = layers.setdefault((owner, layer), {})
        if role in keys:
            raise AdapterError(f"{where}: {quote(keys[role])} and {quote(key)} mean the same tensor")
        keys[role] = key
    if unknown or not layers:
        likely = None if layers else likely_architecture(header)
        hint = f". The file is probably {likely}" if likely else ""
        raise AdapterError(
            f"{where}: {len(unknown)} of its {len(header)} keys are not those of a LoRA "
            f"({first_five(unknown)}){hint}"
        )
    if broken := [
        f"{owner}: {layer}" for (owner, layer), keys in layers.items() if not {"down", "up"} <= keys.keys()
    ]:
        raise AdapterError(
            f"{where}: {len(broken)} of {len(layers)} layers have only one of their two factors "
            f"({first_five(broken)}); download the file again"
        )
    if wrong := [problem for keys in layers.values() if (problem := _shape_problem(keys, header))]:
        raise AdapterError(f"{where}: {len(wrong)} layers cannot be read ({first_five(wrong)})")
    return layers


def _parse_key(key: str, component: str | None) -> tuple[str, str, Role] | None:
    """The component, layer and role of a key; None if it is not one of a LoRA."""
    suffix = next((suffix for suffix in _ROLES if key.endswith(suffix)), None)
    if suffix is None:
        return None
    name = key.removesuffix(suffix).replace(".processor.", ".")
    for prefix, owner in _KOHYA_PREFIXES.items():
        if name.startswith(prefix):
            return owner, name.removeprefix(prefix), _ROLES[suffix]
    named = next((owner for owner in COMPONENTS if name.startswith(f"{owner}.")), None)
    name = name.removeprefix(f"{named}." if named else _PEFT_PREFIX)
    owner = named or component
    if owner is None and _UNET_START.match(name):
        owner = "unet"
    elif owner is None and _TEXT_START.match(name):
        owner = "text_encoder"
    if owner is None or not name:
        return None
    legacy = _LEGACY_PROJECTION.fullmatch(name) if suffix.startswith("_lora") else None
    if legacy:
        start, projection = legacy.groups(default="")
        name = start + _LEGACY_NAMES["unet" if owner == "unet" else "text"].get(projection, projection)
    return owner, name, _ROLES[suffix]


def _shape_problem(keys: Mapping[Role, str], header: Header) -> str | None:
    """What is wrong with the dtype or shape of the tensors of a layer."""
    for role, key in keys.items():
        allowed = _ALPHA_DTYPES if role == "alpha" else _FACTOR_DTYPES
        if header[key].dtype not in allowed:
            return f"{key}: dtype {header[key].dtype}; allowed are {', '.join(allowed)}"
    down, up = header[keys["down"]].shape, header[keys["up"]].shape
    if "alpha" in keys and math.prod(header[keys["alpha"]].shape) != 1:
        return f"{keys['alpha']}: shape {list(header[keys['alpha']].shape)}; alpha is one number"
    if len(down) not in (2, 4) or down[0] > MAX_RANK:
        return (
            f"{keys['down']}: shape {list(down)}; it has 2 or 4 dimensions and a rank of at most {MAX_RANK:,}"
        )
    if len(up) not in (2, 4) or up[1] != down[0] or up[2:] not in ((), (1, 1)):
        return f"{keys['up']}: shape {list(up)}; a matrix or 1x1 convolution of rank {down[0]} is expected"
    return None


def _metadata_configs(header: Header, where: str) -> dict[str, PeftConfig]:
    """PEFT's config of each component, which diffusers may store in the metadata, prefixed by its name."""
    text = header.metadata.get("lora_adapter_metadata", "{}")
    where = f"{where}, lora_adapter_metadata"
    fields = parse_json_object(text.encode("utf-8", "surrogatepass"), where)
    configs = {}
    for component in COMPONENTS:
        start = f"{component}."
        own = {name.removeprefix(start): value for name, value in fields.items() if name.startswith(start)}
        if own:
            configs[component] = PeftConfig.read(own, f"{where}, {component}")
    return configs


def _format(header: Header) -> Format:
    if any(key.startswith(_PEFT_PREFIX) for key in header):
        return "peft"
    return "kohya" if any(key.startswith(tuple(_KOHYA_PREFIXES)) for key in header) else "diffusers"
