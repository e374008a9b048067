"""PEFT's description of a LoRA, of which only the scale of each layer matters once it is trained."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from latentgen.errors import AdapterError
from latentgen.files import quote

MAX_ALPHA = 1e6
_READ = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"})
# What training needed, or what says where the adapter came from.
_PASSED_OVER = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
        "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
        "lora_ga_config", "megatron_core", "parent_library", "peft_version", "qalora_group_size", "revision",
        "runtime_config", "target_modules", "task_type",
    }
)  # fmt: skip
# Other ways of initialising change the weights of the base model, which the file does not hold.
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")
_PLAIN_NAME = re.compile(r"\^?[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class PeftConfig:
    """The fields of an `adapter_config.json` that set the scale of each layer."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]

    @classmethod
    def from_json(cls, settings: Mapping[str, object], where: str) -> PeftConfig:
        """Judge the fields of a config; `where` names it in errors.

        Raises:
            AdapterError: another kind of adapter than a plain LoRA, or a field out of bounds.
        """
        kind = settings.get("peft_type", "LORA")
        if kind != "LORA":
            raise AdapterError(f"{where}: peft_type {quote(kind)} is not implemented; allowed is LORA")
        initialisation = settings.get("init_lora_weights", True)
        if initialisation not in _INITIALISATIONS:
            raise AdapterError(
                f"{where}: init_lora_weights {quote(initialisation)} changes the base model; save the adapter "
                "converted to a plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
            )
        for name, value in settings.items():
            if name in _READ | _PASSED_OVER or name == "init_lora_weights":
                continue
            if value not in (None, False, "none", [], {}):
                raise AdapterError(f"{where}: {quote(name)} is {quote(value)}, which is not implemented")
        use_rslora = settings.get("use_rslora", False)
        if not isinstance(use_rslora, bool):
            raise AdapterError(f"{where}: use_rslora is {quote(use_rslora)}; allowed are true and false")
        rank = _number(settings.get("r", 8), f"{where}, r")
        if rank < 1 or rank != int(rank):
            raise AdapterError(f"{where}: r is {quote(rank)}; a rank is a whole number from 1 on")
        return cls(
            rank=int(rank),
            alpha=_number(settings.get("lora_alpha", 8), f"{where}, lora_alpha"),
            use_rslora=use_rslora,
            rank_pattern=_pattern(settings.get("rank_pattern"), f"{where}, rank_pattern"),
            alpha_pattern=_pattern(settings.get("alpha_pattern"), f"{where}, alpha_pattern"),
        )

    def scale(self, layer: str, rank: int, where: str) -> float:
        """alpha / rank of a layer, or alpha / sqrt(rank) (arXiv:2312.03732) with `use_rslora`.

        Raises:
            AdapterError: the layer's tensors have another rank than the config says.
        """
        expected = _look_up(self.rank_pattern, layer, self.rank)
        if expected != rank:
            raise AdapterError(
                f"{where}: {quote(layer)} has rank {rank}, but its config says {expected:g}; they belong to "
                "different adapters"
            )
        alpha = _look_up(self.alpha_pattern, layer, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _look_up(pattern: Mapping[str, float], layer: str, default: float) -> float:
    """The value of the first entry that names the layer or the end of its path."""
    for name, value in pattern.items():
        anchored = name.removeprefix("^")
        if layer == anchored or (anchored == name and layer.endswith(f".{name}")):
            return value
    return default


def _pattern(value: object, where: str) -> dict[str, float]:
    """PEFT takes regular expressions; only names are read, because an expression from a file may never end."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise AdapterError(f"{where} is {quote(value)}; it has to map names of layers to numbers")
    for name in value:
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise AdapterError(
                f"{where}: {quote(name)} is not the plain name of a layer; give each its entry"
            )
    return {name: _number(number, f"{where}, {quote(name)}") for name, number in value.items()}


def _number(value: object, where: str) -> float:
    # bool is an int; NaN fails the comparison.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        raise AdapterError(f"{where} is {quote(value)}; a number of at most {MAX_ALPHA:g} is needed")
    return float(value)
