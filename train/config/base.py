"""What all sections of a recipe are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Rate = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Count = Annotated[int, Field(ge=1, le=2**40)]


class Section(BaseModel):
    """A part of a recipe: unknown keys fail."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
