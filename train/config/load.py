"""Reads recipes: YAML files, validated before anything is loaded or built."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from latentgen.errors import ConfigError
from latentgen.files import quote
from latentgen.train.config.base import current_name, with_current_names
from latentgen.train.config.run import TrainConfig


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `key=value` assignments, with dots for nested keys; the value is read as YAML.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown, missing, of a wrong type or out of bounds.
    """
    try:
        fields = _read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"the recipe {path} must map fields to values; see configs/train/ for examples")
    try:
        fields = with_current_names(fields)
    except ConfigError as error:
        raise ConfigError(f"the recipe {path} cannot be used: {error}") from None
    for override in overrides:
        _assign(fields, override)
    try:
        return TrainConfig.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"the recipe {path} cannot be used: {in_one_line(error)}") from None


class _Loader(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys; other loaders use the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"line {line}: {key.value} is already in line {lines[key.value]}")
            lines[key.value] = line
        return node


def _read_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def in_one_line(error: ValidationError) -> str:
    """Every problem of a recipe, with its field."""
    problems = []
    for detail in error.errors(include_url=False):
        field, message = ".".join(map(str, detail["loc"])), _message(detail)
        problems.append(f"{field}: {message}" if field else message)
    return "; ".join(problems)


def _message(detail: ErrorDetails) -> str:
    """The error of a field; for a section or a list, how to write it."""
    kind, found = detail["type"], detail["input"]
    if kind == "value_error":  # one of ours, without pydantic's "Value error, "
        return str(detail.get("ctx", {}).get("error", detail["msg"]))
    if kind == "model_attributes_type":
        return f"it must be a section, as in {{kind: {found if isinstance(found, str) else '...'}}}"
    if kind == "model_type":
        return f"it must be a section, with its fields below it; found {quote(found)}"
    if kind in ("tuple_type", "list_type"):
        return f"it must be a list, as in [{found if isinstance(found, str) else '...'}]"
    return detail["msg"]


def _assign(fields: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes key=value, found {override!r}")
    *parents, last = current_name(key).split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise ConfigError(f"--set {override!r}: {parent} is not a section of the recipe")
    try:
        fields[last] = _read_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from None
