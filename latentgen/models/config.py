"""The frozen, strictly validated configurations that the stages are built from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from latentgen.errors import ConfigError

# What the weights of frozen layers may be stored in; see latentgen.models.quantized_weights.
StorageDtype = Literal["fp32", "bf16", "fp16", "fp8", "int8"]


class StageConfig(BaseModel):
    """A stage's `config.json`: the names of the JSON kept, unknown fields and wrong types refused.

    Underscored keys (`_class_name`, `_diffusers_version`, ...) are metadata of the file and not part of the
    configuration.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    diffusers_class: ClassVar[str]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Validate the content of a `config.json`.

        Raises:
            ConfigError: naming every field that is unknown, of a wrong type or out of bounds.
        """
        known = {name: _as_tuples(value) for name, value in fields.items() if not name.startswith("_")}
        try:
            return cls(**known)
        except ValidationError as error:
            raise ConfigError(_describe(cls.diffusers_class, error)) from None

    def to_json(self) -> dict[str, Any]:
        """The content of a `config.json` that diffusers reads as well."""
        return {"_class_name": self.diffusers_class, **self.model_dump(mode="json")}


def _as_tuples(value: Any) -> Any:
    """JSON has only lists; the configurations hold tuples, so that they are hashable."""
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value


def _describe(name: str, error: ValidationError) -> str:
    problems = []
    for detail in error.errors(include_url=False):
        field = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            problems.append(f"{field}: unknown field")
        else:
            found = repr(detail["input"])
            found = found if len(found) <= 80 else found[:77] + "..."
            problems.append(f"{field}: {detail['msg']} (found {found})" if field else detail["msg"])
    return f"the configuration of {name} cannot be used: " + "; ".join(problems)
