"""The base class and field types of all sections of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

from latentgen.deprecated import warn_renamed
from latentgen.errors import ConfigError

Rate = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Count = Annotated[int, Field(ge=1, le=2**40)]

# Deprecated names of fields, with dots for nested ones.
RENAMED_FIELDS = {
    "held_out": "validation_fraction",
    "task.cached_views": "task.views_per_image",
    "task.turn_into": "task.convert_to",
    "task.fresh_layers": "task.reinit_layers",
}


class Section(BaseModel):
    """A part of a recipe: unknown keys fail."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def current_name(field: str) -> str:
    """The current name of a field, with dots for nested ones; warns about an old name."""
    new = RENAMED_FIELDS.get(field)
    if new is not None:
        warn_renamed(f"the recipe field {field}", new, stacklevel=3)
    return new or field


def with_current_names(fields: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """A copy of a recipe's fields, or of those of its `section`, under their current names.

    Raises:
        ConfigError: a field is set under both of its names.
    """
    renamed: dict[str, Any] = {}
    for name, value in fields.items():
        path = f"{section}{name}"
        if path in RENAMED_FIELDS:
            new = current_name(path)
            name = new.rpartition(".")[2]
            if name in fields:
                raise ConfigError(f"{path} is now called {new}; keep one of them")
        holds_renamed = any(old.startswith(f"{path}.") for old in RENAMED_FIELDS)
        renamed[name] = (
            with_current_names(value, f"{path}.") if holds_renamed and isinstance(value, dict) else value
        )
    return renamed


def has_field(section: type[Section], name: str) -> bool:
    """Whether recipes can have a field, or a section, of this name, with dots for nested ones."""
    sections = {section}
    for part in name.split("."):
        annotations = [one.model_fields[part].annotation for one in sections if part in one.model_fields]
        if not annotations:
            return False
        if any(
            get_origin(annotation) is dict for annotation in annotations
        ):  # of a network, with its own keys
            return True
        sections = {one for annotation in annotations for one in _sections(annotation)}
    return True


def _sections(annotation: object) -> Iterator[type[Section]]:
    """The sections that a field may be."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)
