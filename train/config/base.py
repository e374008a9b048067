"""What all sections of a recipe are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

Rate = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Count = Annotated[int, Field(ge=1, le=2**40)]


class Section(BaseModel):
    """A part of a recipe: unknown keys fail."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def has_field(section: type[Section], name: str) -> bool:
    """Whether recipes can have a field, or a section, of this name, with dots for nested ones."""
    sections = {section}
    for part in name.split("."):
        annotations = [one.model_fields[part].annotation for one in sections if part in one.model_fields]
        if not annotations:
            return False
        if any(_is_open(annotation) for annotation in annotations):
            return True
        sections = {one for annotation in annotations for one in _sections(annotation)}
    return True


def _is_open(annotation: object) -> bool:
    """Whether it is the configuration of a network, with keys of its own."""
    return get_origin(annotation) is dict


def _sections(annotation: object) -> Iterator[type[Section]]:
    """The sections that a field may be."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)
