"""LoRA files in the formats of kohya, diffusers and PEFT; safetensors only.

What is read here knows no model: layers keep the names that the file gives them. Finding their places is the work
of :mod:`latentgen.adapters.lora`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentgen.adapters.peft_config import MAX_ALPHA, PeftConfig
from latentgen.checkpoints.folder import as_path
from latentgen.checkpoints.identify import likely_architecture
from latentgen.checkpoints.io import Header, TensorInfo, read_header, refuse_pickle
from latentgen.checkpoints.weights import check_values, first_five
from latentgen.errors import AdapterError, CheckpointCorruptError, CheckpointNotFoundError, InputError
from latentgen.files import parse_json_object, quote, read_json, safe_join

Format = Literal["kohya", "diffusers", "peft"]
Role = Literal["down", "up", "alpha"]

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
# How the end of a key tells of a kind of adapter that is not read.
_NOT_IMPLEMENTED = {
    r"\.dora_scale|\.lora_magnitude_vector(\.weight)?": "DoRA",
    r"\.hada_(w1|w2|t1|t2)(_[ab])?": "LoHa",
    r"\.lokr_(w1|w2|t1|t2)(_[ab])?": "LoKr",
    r"\.lora_mid\.weight": "LoCon in CP decomposition",
    r"\.(diff|diff_b|w_norm|b_norm)": "full differences of weights",
    r"\.(on_input|ia3_l)": "IA3",
    r"\.(oft_blocks|oft_diag|oft_r(\.weight)?)": "OFT",
    r"\.[ab][12]\.weight": "GLoRA",
    r"\.lora_embedding_[AB]": "LoRA of an embedding",
    r"\.(lora_up|lora_B)\.bias": "LoRA with a bias",
}
# Early diffusers named the projections of an attention after the UNet's, in text encoders too.
_LEGACY_PROJECTION = re.compile(r"(.*\.)?(to_q|to_k|to_v|to_out)")
_LEGACY_NAMES = {
    "unet": {"to_out": "to_out.0"},
    "text": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}
_UNET_START = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b")
_TEXT_START = re.compile(r"(text_model\.)?(encoder\.layers|text_projection)\b")


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
    """The content of a LoRA file; nothing changes it, and any number of models may use it.

    Attributes:
        name: what the adapter is called where no other name is given: the file's, without its suffix.
        format: "kohya", "diffusers" or "peft".
        components: component ("unet", "text_encoder", "text_encoder_2") -> name of a layer in the file's own
            scheme -> its adapter. The tensors are views of the memory-mapped file.
        metadata: the free text that was stored with the tensors.
    """

    name: str
    format: Format
    components: Mapping[str, Mapping[str, LoRALayer]]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> tuple[int, int]:
        """The smallest and the largest rank."""
        ranks = [layer.rank for layers in self.components.values() for layer in layers.values()]
        return min(ranks), max(ranks)


class LoRASummary(NamedTuple):
    """What a LoRA is, without its values.

    Attributes:
        format: as in :class:`LoRA`.
        layers: component -> how many of its layers are adapted.
        ranks: the smallest and the largest rank.
        alphas: the smallest and the largest alpha; where none is stored, it is the rank.
    """

    format: Format
    layers: Mapping[str, int]
    ranks: tuple[int, int]
    alphas: tuple[float, float]


class _Key(NamedTuple):
    """A key of a file: the layer that it belongs to, and what it holds of it."""

    component: str
    layer: str
    role: Role


def read_lora(source: str | Path, *, component: str | None = None) -> LoRA:
    """Read a LoRA.

    Args:
        source: a kohya or diffusers file; a diffusers folder with `pytorch_lora_weights.safetensors`; a PEFT folder
            with `adapter_config.json` and `adapter_model.safetensors`, or a folder of such folders, each named
            after its component.
        component: what the LoRA adapts, for files that do not say so: those of PEFT. None judges by the names of
            the layers, which tell a UNet from a text encoder, but not one text encoder from the other.

    Raises:
        CheckpointNotFoundError: there is no such file, or no LoRA in the folder.
        CheckpointCorruptError: a file is damaged.
        UnsafeCheckpointError: the file is a pickle.
        CheckpointValueError: the LoRA holds NaN or infinity.
        AdapterError: not a LoRA, one of a kind that is not implemented, or one whose parts do not fit together.
        InputError: `component` is not the name of a component.
    """
    return _read(source, component, checked=True)


def summarize_lora(source: str | Path) -> LoRASummary:
    """Say what a LoRA is; its factors are not read, and so are not known to be finite.

    Raises:
        CheckpointError: as :func:`read_lora`.
    """
    lora = _read(source, None, checked=False)
    alphas = [layer.scale * layer.rank for layers in lora.components.values() for layer in layers.values()]
    counts = {name: len(lora.components[name]) for name in COMPONENTS if name in lora.components}
    return LoRASummary(lora.format, counts, lora.ranks, (min(alphas), max(alphas)))


def lora_weights(folder: Path) -> dict[str, Path]:
    """The weights in the folder of a LoRA: those of each component, or "weights"; empty where there is no LoRA.

    Raises:
        UnsafeCheckpointError: they are a pickle.
        UnsafePathError: a file lies outside of the folder.
    """
    if (diffusers_file := safe_join(folder, _DIFFUSERS_FILE, "LoRA folder")).is_file():
        return {"weights": diffusers_file}
    parts = {name: safe_join(folder, name, "LoRA folder") for name in COMPONENTS}
    parts = {name: part for name, part in parts.items() if _is_peft(part)}
    parts = {"weights": folder} if _is_peft(folder) else parts
    for part in parts.values():
        if not (part / _PEFT_FILES[1]).is_file():
            _refuse_pickles(part)
    return {name: safe_join(part, _PEFT_FILES[1], "LoRA folder") for name, part in parts.items()}


def _read(source: str | Path, component: str | None, *, checked: bool) -> LoRA:
    path = as_path(source)
    if component is not None and component not in COMPONENTS:
        raise InputError(f"component={quote(component)} is unknown; choose from {', '.join(COMPONENTS)}")
    if not path.is_dir():
        return _read_file(path, path.stem, component, None, checked)
    parts = [
        _read_file(
            file,
            path.name,
            component if name == "weights" else name,
            None if file.name == _DIFFUSERS_FILE else _peft_config(file.parent),
            checked,
        )
        for name, file in lora_weights(path).items()
    ]
    if not parts:
        _refuse_pickles(path)
        raise CheckpointNotFoundError(
            f"{quote(path)} holds no LoRA; looked for {_DIFFUSERS_FILE}, {' and '.join(_PEFT_FILES)}, and "
            f"folders {', '.join(COMPONENTS)} with these"
        )
    components = {name: layers for part in parts for name, layers in part.components.items()}
    metadata = {key: text for part in parts for key, text in part.metadata.items()}
    return LoRA(path.name, parts[0].format, components, metadata)


def _is_peft(folder: Path) -> bool:
    return (folder / _PEFT_FILES[0]).is_file()


def _refuse_pickles(folder: Path) -> None:
    """Where no LoRA is found, say so if it lies there as a pickle."""
    for file in sorted(folder.iterdir()):
        refuse_pickle(file)


def _peft_config(folder: Path) -> PeftConfig:
    file = safe_join(folder, _PEFT_FILES[0], "LoRA folder")
    return PeftConfig.from_json(read_json(file), quote(file))


def _read_file(
    path: Path, name: str, component: str | None, config: PeftConfig | None, checked: bool
) -> LoRA:
    header = read_header(path)
    keys = _parse(header, component, quote(path))
    _check_whole(keys.values(), quote(path))
    configs = _metadata_configs(header, quote(path))
    components: dict[str, dict[str, LoRALayer]] = {}
    by_layer = {key: source for source, key in keys.items()}
    try:
        with safe_open(path, framework="pt", device="cpu") as reader:
            for key, source in by_layer.items():
                if key.role != "down":
                    continue
                up_source, alpha_source = (by_layer.get(key._replace(role=role)) for role in ("up", "alpha"))
                assert up_source is not None
                down, up = reader.get_tensor(source), reader.get_tensor(up_source)
                if checked:
                    check_values(down, None, source, path)
                    check_values(up, None, up_source, path)
                if alpha_source is not None:
                    scale = _alpha(reader.get_tensor(alpha_source), alpha_source, path) / down.shape[0]
                else:
                    chosen = config or configs.get(key.component)
                    scale = chosen.scale(key.layer, down.shape[0], quote(path)) if chosen else 1.0
                components.setdefault(key.component, {})[key.layer] = LoRALayer(down, up, scale)
    except SafetensorError as error:
        raise CheckpointCorruptError(f"{quote(path)} cannot be read: {error}") from error
    return LoRA(name, _format(keys, config), components, header.metadata)


def _parse(header: Header, component: str | None, where: str) -> dict[str, _Key]:
    """What each key of the file is; all are known, with shapes and dtypes that are possible."""
    for pattern, kind in _NOT_IMPLEMENTED.items():
        if ours := [key for key in header if re.search(rf"({pattern})\Z", key)]:
            raise AdapterError(
                f"{where} is a {kind} adapter ({len(ours)} such keys: {first_five(ours)}), which is not "
                "implemented; merge it into a checkpoint with the program that made it"
            )
    keys = {key: parsed for key in header if (parsed := _parse_key(key, component)) is not None}
    if unknown := [key for key in header if key not in keys]:
        likely = likely_architecture(header) if not keys else None
        hint = f". The file is probably {likely}" if likely else ""
        raise AdapterError(
            f"{where}: {len(unknown)} of its {len(header)} keys are not those of a LoRA "
            f"({first_five(unknown)}){hint}"
        )
    repeated = {parsed: key for key, parsed in keys.items()}
    if len(repeated) < len(keys):
        twice = next(key for key, parsed in keys.items() if repeated[parsed] != key)
        raise AdapterError(f"{where}: {quote(twice)} and {quote(repeated[keys[twice]])} mean the same tensor")
    infos = {parsed: header[key] for key, parsed in keys.items()}
    if wrong := [f"{key}: {what}" for key, parsed in keys.items() if (what := _shape_problem(parsed, infos))]:
        raise AdapterError(f"{where}: {len(wrong)} tensors are not as they have to be ({first_five(wrong)})")
    return keys


def _parse_key(key: str, component: str | None) -> _Key | None:
    """What a key is; None if it is not one of a LoRA."""
    suffix = next((suffix for suffix in _ROLES if key.endswith(suffix)), None)
    if suffix is None:
        return None
    name = key.removesuffix(suffix).replace(".processor.", ".")
    for prefix, owner in _KOHYA_PREFIXES.items():
        if name.startswith(prefix):
            return _Key(owner, name.removeprefix(prefix), _ROLES[suffix])
    named = next((owner for owner in COMPONENTS if name.startswith(f"{owner}.")), None)
    name = name.removeprefix(f"{named}." if named else _PEFT_PREFIX)
    owner = named or component or _owner(name)
    if owner is None or not name:
        return None
    if suffix.startswith("_lora"):
        name = _modern_name(name, owner)
    return _Key(owner, name, _ROLES[suffix])


def _owner(layer: str) -> str | None:
    """Which component a layer belongs to, where a file does not say it."""
    if _UNET_START.match(layer):
        return "unet"
    return "text_encoder" if _TEXT_START.match(layer) else None


def _modern_name(layer: str, owner: str) -> str:
    match = _LEGACY_PROJECTION.fullmatch(layer)
    if not match:
        return layer
    names = _LEGACY_NAMES["unet" if owner == "unet" else "text"]
    return f"{match.group(1) or ''}{names.get(match.group(2), match.group(2))}"


def _shape_problem(key: _Key, infos: Mapping[_Key, TensorInfo]) -> str | None:
    """What is wrong with the dtype or shape of a tensor, alone or beside its other factor."""
    info = infos[key]
    allowed = _ALPHA_DTYPES if key.role == "alpha" else _FACTOR_DTYPES
    if info.dtype not in allowed:
        return f"dtype {info.dtype}; allowed are {', '.join(allowed)}"
    if key.role == "alpha":
        return None if math.prod(info.shape) == 1 else f"shape {list(info.shape)}; alpha is one number"
    if len(info.shape) not in (2, 4):
        return f"shape {list(info.shape)}; a factor has 2 or 4 dimensions"
    if key.role == "down":
        rank = info.shape[0]
        return None if rank <= MAX_RANK else f"rank {rank:,}; allowed are 1 to {MAX_RANK:,}"
    if info.shape[2:] not in ((), (1, 1)):
        return f"shape {list(info.shape)}; the factor that leads up is a matrix or a 1x1 convolution"
    down = infos.get(key._replace(role="down"))
    if down is not None and down.shape[:1] != info.shape[1:2]:
        return f"shape {list(info.shape)} beside {list(down.shape)}; their ranks differ"
    return None


def _check_whole(keys: Iterable[_Key], where: str) -> None:
    """Refuse layers of which a factor is missing."""
    roles: dict[tuple[str, str], set[Role]] = {}
    for key in keys:
        roles.setdefault((key.component, key.layer), set()).add(key.role)
    if not roles:
        raise AdapterError(f"{where} holds no tensors; a LoRA has two for every layer that it adapts")
    if broken := [f"{owner}: {layer}" for (owner, layer), has in roles.items() if not {"down", "up"} <= has]:
        raise AdapterError(
            f"{where}: {len(broken)} of {len(roles)} layers lack one of their two factors "
            f"({first_five(broken)}); download the file again"
        )


def _alpha(tensor: Tensor, key: str, path: Path) -> float:
    check_values(tensor, None, key, path)
    alpha = float(tensor)
    if abs(alpha) > MAX_ALPHA:
        raise AdapterError(f"{quote(path)}: {quote(key)} is {alpha:g}; allowed are up to {MAX_ALPHA:g}")
    return alpha


def _metadata_configs(header: Header, where: str) -> dict[str, PeftConfig]:
    """PEFT's settings of each component, which diffusers may store in the metadata, prefixed by its name."""
    text = header.metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    where = f"{where}, lora_adapter_metadata"
    settings = parse_json_object(text.encode("utf-8", "surrogatepass"), where)
    return {
        name: PeftConfig.from_json(own, f"{where}, {name}")
        for name in COMPONENTS
        if (own := dict(_under(settings, f"{name}.")))
    }


def _under(settings: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    return ((name.removeprefix(prefix), value) for name, value in settings.items() if name.startswith(prefix))


def _format(keys: Mapping[str, _Key], config: PeftConfig | None) -> Format:
    if config is not None or any(key.startswith(_PEFT_PREFIX) for key in keys):
        return "peft"
    return "kohya" if any(key.startswith(tuple(_KOHYA_PREFIXES)) for key in keys) else "diffusers"
